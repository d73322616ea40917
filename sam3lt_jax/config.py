"""Every number of the models, and the two reference profiles.

A variant is data: `Sam3LiteTextConfig.s0()`, `.s1()`, `.l()`, or any other numbers read from a
transformers `config.json` (the schema itself is in `config_schema.py`).

Sources: transformers 5.23.0 `configuration_sam3_lite_text.py` / `configuration_sam3.py` for the schema;
the authors' model builder for the values.
"""

from __future__ import annotations

import dataclasses
import json
import numbers
import os
import sys
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from sam3lt_jax.errors import ArgumentError

PADDING_LABEL = -10  # of a slot that holds no box or point; real ones have 1 or 0
NOT_A_POINT = -1  # a point's label: its own token, whatever its place
BOX_ONLY_PHRASE = "visual"  # what both references read where there are boxes and no phrase

GeometryCls = Literal["always", "with_boxes", "with_any_boxes"]


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
  if not isinstance(value, str) or value not in choices:
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


class _Named:
  """What follows one of the two references, or a mixture of them."""

  @classmethod
  def named(cls, name: str | Self) -> Self:
    """`"original"` or `"transformers"` to the numbers of that name; such numbers pass through."""
    if isinstance(name, cls):
      return name
    _check_choice("profile", name, ("original", "transformers"))
    return getattr(cls, name)()


_LARGEST = 1 << 24  # of any number of ours that counts something
_FLOAT_MAX = sys.float_info.max
_LONGEST = 1024  # of our lists: global layers, scales


def typed(name: str, value: Any, like: Any) -> Any:
  """`value` in the type of `like` where that loses nothing: 512.0 is an int, 512.7, "512" and NaN are not.

  Raises:
    ValueError: another type, a number that is not finite, a count that is negative or beyond 2**24, or a list
      beyond 1024.
  """
  kind = type(like)
  if kind is tuple and isinstance(value, (list, tuple)):
    if len(value) > _LONGEST:
      raise ValueError(f"{name} may hold {_LONGEST} numbers, got {len(value)}")
    return tuple(typed(f"{name}[{i}]", x, like[0]) for i, x in enumerate(value))
  numeric = isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) <= _FLOAT_MAX
  if kind is float and numeric:
    return float(value)
  if kind is int and numeric and value == int(value):
    if not 0 <= value <= _LARGEST:
      raise ValueError(f"{name} must be from 0 to {_LARGEST}, got {value!r:.40}")
    return int(value)
  if kind in (bool, str) and isinstance(value, kind):
    return value
  raise ValueError(f"{name}: expected {kind.__name__}, got {value!r:.80}")


def parse_json(data: bytes, name: str) -> Any:
  """What the JSON of a file says: UTF-8 with or without a byte-order mark, UTF-16 or UTF-32.

  Raises:
    ValueError: it is not JSON, nested too deep, or holds a number of thousands of digits; begins with `name`.
  """
  try:
    return json.loads(data)
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{name} is not valid JSON: {e}") from e


def read_json(path: str | os.PathLike) -> Any:
  """`parse_json` of a file. Raises OSError as well."""
  with open(path, "rb") as f:
    return parse_json(f.read(), os.fspath(path))


# A field of `Profile`: what the authors' code has, what transformers has.
_REFERENCES: dict[str, tuple[Any, Any]] = {
  "pad_token_id": (0, 49407),
  "context_length": (16, 32),
  "mask_text_padding": (False, True),
  "position_policy": ("slice", "interpolate"),
  "geometry_cls": ("always", "with_boxes"),
  "vit_layer_norm_eps": (1e-5, 1e-6),
  "presence_logit_clamp": (None, 10.0),
  "text_cleaning": ("original", "transformers"),
  "mask_order": ("upsample_then_sigmoid", "sigmoid_then_upsample"),
  "score_threshold": (0.5, 0.3),
  "training_dropout": ("original", "transformers"),
}


@dataclasses.dataclass(frozen=True)
class Profile(_Named):
  """Where the two PyTorch references disagree, one explicit field a point.

  `Profile.original()` is what the released weights were trained with; `Profile.transformers()` is what users
  of transformers 5.23.0 see. Change single fields with `dataclasses.replace`.

  Attributes:
    name: "original", "transformers" or anything else for a mixture. A label only; no code branches on it.
    pad_token_id: fills a phrase up to `context_length`. RepMixer convolutions see it even when masked.
    context_length: tokens a phrase is padded (and cut) to.
    mask_text_padding: padding tokens are hidden from the text encoder's self-attention.
    position_policy: a position table longer or shorter than the phrase is cut ("slice") or resampled
      bilinearly ("interpolate").
    geometry_cls: when the geometry encoder's CLS token joins the prompt. "always" (original); "with_boxes":
      for the rows that have a box, so rows stay independent; "with_any_boxes": for every row of a call that
      passes boxes at all, which is what transformers does to a mixed batch (a text-only row then changes
      with its neighbours; kept for exact comparison only).
    vit_layer_norm_eps: epsilon of the ViT trunk's LayerNorms.
    presence_logit_clamp: presence logits are clamped to +-this; None: never.
    text_cleaning: "original" (ftfy, HTML unescaped twice, whitespace collapsed, lower case) or
      "transformers" (NFC, whitespace collapsed, lower case).
    mask_order: "upsample_then_sigmoid" (original) or "sigmoid_then_upsample" (transformers).
    score_threshold: default score under which a detection is dropped.
    training_dropout: where dropout acts in training. "original": attention weights, after attention, inside
      and after the MLP, drop path in the ViT; "transformers": after attention and after the MLP only.
  """

  name: str
  pad_token_id: int
  context_length: int
  mask_text_padding: bool
  position_policy: Literal["slice", "interpolate"]
  geometry_cls: GeometryCls
  vit_layer_norm_eps: float
  presence_logit_clamp: float | None
  text_cleaning: Literal["original", "transformers"]
  mask_order: Literal["upsample_then_sigmoid", "sigmoid_then_upsample"]
  score_threshold: float
  training_dropout: Literal["original", "transformers"]

  def __post_init__(self):
    typed("name", self.name, "")
    for name, values in _REFERENCES.items():
      value = getattr(self, name)
      if isinstance(values[0], str):
        _check_choice(name, value, get_args(GeometryCls) if name == "geometry_cls" else values)
      elif not (value is None and None in values):
        typed(name, value, values[1])
    if self.context_length < 2:
      raise ValueError(f"context_length must be at least 2, got {self.context_length}")

  @classmethod
  def original(cls) -> Profile:
    """The authors' PyTorch code (efficientsam3, branch sam3_litetext)."""
    return cls("original", **{name: original for name, (original, _) in _REFERENCES.items()})

  @classmethod
  def transformers(cls) -> Profile:
    """transformers 5.23.0, `Sam3LiteTextModel` with `Sam3Processor`; rows of a batch independent."""
    return cls("transformers", **{name: theirs for name, (_, theirs) in _REFERENCES.items()})


@dataclasses.dataclass(frozen=True)
class VisionConfig:
  """ViT trunk and neck. Sizes in pixels are square; `global_attn_indexes` are 0-based layers."""

  hidden_size: int = 1024
  intermediate_size: int = 4736
  num_hidden_layers: int = 32
  num_attention_heads: int = 16
  num_channels: int = 3
  image_size: int = 1008
  patch_size: int = 14
  window_size: int = 24
  global_attn_indexes: tuple[int, ...] = (7, 15, 23, 31)
  pretrain_image_size: int = 336
  rope_theta: float = 10000.0
  drop_path_rate: float = 0.1  # used in training under training_dropout="original" only
  fpn_hidden_size: int = 256
  scale_factors: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)

  @property
  def pretrain_grid(self) -> int:
    """Side of the learned position table, in patches."""
    return self.pretrain_image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Text encoder: MobileCLIP (`kind="mobileclip"`) or SAM 3's own CLIP text tower (`kind="clip"`)."""

  kind: Literal["mobileclip", "clip"] = "mobileclip"
  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  projection_dim: int = 512
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 16
  layer_norm_eps: float = 1e-5
  use_repmixer_blocks: bool = False
  repmixer_kernel_size: int = 11
  layer_scale_init_value: float = 1e-5
  batch_norm_eps: float = 1e-5
  fused: bool = False  # RepMixer blocks folded into plain convolutions, see Sam3LiteText.fuse


@dataclasses.dataclass(frozen=True)
class GeometryEncoderConfig:
  """Box prompts to tokens."""

  hidden_size: int = 256
  num_layers: int = 3
  num_attention_heads: int = 8
  intermediate_size: int = 2048
  dropout: float = 0.1
  roi_size: int = 7


@dataclasses.dataclass(frozen=True)
class DetrEncoderConfig:
  """Fusion encoder: image tokens attend to themselves and to the prompt."""

  hidden_size: int = 256
  num_layers: int = 6
  num_attention_heads: int = 8
  intermediate_size: int = 2048
  dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class DetrDecoderConfig:
  """Object queries to boxes, scores and presence."""

  hidden_size: int = 256
  num_layers: int = 6
  num_queries: int = 200
  num_attention_heads: int = 8
  intermediate_size: int = 2048
  dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class MaskDecoderConfig:
  """Pixel decoder and mask heads."""

  hidden_size: int = 256
  num_upsampling_stages: int = 3
  num_attention_heads: int = 8
  num_groups: int = 8  # GroupNorm


@dataclasses.dataclass(frozen=True)
class TrackerProfile(_Named):
  """Where the two references' trackers disagree, one explicit field a point; on images first, then on video.

  Attributes:
    name: "original", "transformers" or anything else for a mixture; no code branches on it.
    no_memory_on_image: the image map gets the vector that stands for "no memory", which the weights were
      trained with. False: transformers 5.23.0 adds it to a level that nothing reads.
    zero_tokens: slots of padding points (label -10) are tokens of zeros which take part in attention.
      False: they are masked.
    tokens_without_points: a prompt without a point or box gets two tokens that say so. False: none.
    hole_area: holes of up to so many cells of the 288 x 288 mask are filled before it is enlarged.
    logit_limit: low-resolution logits are handed back within +-this, for the next round; None: as they are.
    memory_mask_at_image_side: a mask is made one of 0s and 1s (or of probabilities) at the side of the input
      and then brought to the memory encoder's. False: its logits are brought there first.
    memory_quality: frames are remembered for later ones when score times IoU is above this; the frame before
      always is. None: the last ones are remembered whatever they are.
    all_cond_pointers: object pointers of all frames with prompts that are not ahead are read. False: of the
      (at most 4) whose maps are.
    mask_prompt_of_image_side: a mask that is given is brought to the side of the input and made one of 0s and
      1s. False: to the memory encoder's, and stays soft.
    mask_pointer_of_best: the pointer of a mask that is given is that of the best of three. False: of the
      single-mask token.
    corrections_remember: clicks on a frame that was tracked already are answered with memory and without the
      mask before, and the frame stays an ordinary one. False: without memory, from the mask before, and the
      frame becomes one with a prompt.
    refine_from_mask: later clicks on a frame start from the mask before.
    group_rules: objects that first appear on one frame share what the original's batching makes them share:
      frames with prompts, the mean quality, and pixels of given masks, which belong to one of them. False:
      each object is on its own.
  """

  name: str
  no_memory_on_image: bool
  zero_tokens: bool
  tokens_without_points: bool
  hole_area: int
  logit_limit: float | None
  memory_mask_at_image_side: bool = True
  memory_quality: float | None = 0.01
  all_cond_pointers: bool = False
  mask_prompt_of_image_side: bool = False
  mask_pointer_of_best: bool = False
  corrections_remember: bool = False
  refine_from_mask: bool = True
  group_rules: bool = False

  @classmethod
  def original(cls) -> TrackerProfile:
    """The authors' image predictor and video model (facebookresearch/sam3, `sam1_task_predictor.py`,
    `sam3_tracker_base.py`, February 2026), but for `group_rules`, which their batching makes and they regret.
    """
    return cls("original", True, False, False, 256, 32.0)

  @classmethod
  def transformers(cls) -> TrackerProfile:
    """transformers 5.23.0, `Sam3TrackerModel` with `Sam3TrackerProcessor`, and `Sam3TrackerVideoModel`."""
    return cls(
      "transformers", False, True, True, 0, None, memory_mask_at_image_side=False, memory_quality=None,
      all_cond_pointers=True, mask_prompt_of_image_side=True, mask_pointer_of_best=True,
      corrections_remember=True, refine_from_mask=False,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PhraseVideoConfig(_Named):
  """How phrase video decides; names of the fields are those of both references.

  Attributes:
    score_threshold_detection: detections above it count. det_nms_thresh: of two that overlap by more the
      better stays; 0: both. new_det_thresh: score from which one that fits no object is a new one.
    assoc_iou_thresh, trk_assoc_iou_thresh: IoU from which a detection belongs to an object, and from which
      the object counts as detected.
    hotstart_delay: frames for which objects are young, and results held back. A young object is removed after
      hotstart_unmatch_thresh frames without a detection or hotstart_dup_thresh that match an older one too.
    suppress_unmatched_only_within_hotstart: False: an object is hidden while its keep-alive count is 0 or
      less; it starts at init_trk_keep_alive, within min_trk_keep_alive and max_trk_keep_alive.
    decrease_trk_keep_alive_for_empty_masklets: an empty mask counts as a frame without a detection.
    suppress_overlapping_based_on_recent_occlusion_threshold: IoU from which two cover each other; 0: none.
    fill_hole_area: holes and specks of up to so many cells are cleaned away.
    recondition_every_nth_frame: when detections above high_conf_thresh and high_iou_thresh renew the memory.
    recondition_on_trk_masks: from the tracked mask, and the detection is put out. False: the other way.
    shrink_threshold: an object that keeps less of its area among the others is remembered as absent.
      shrink_at_mask_size: of masks as the tracker gives them, not as memory takes them.
      shrink_spares_single: but for one alone in its phrase.
    new_masks_at_mask_size: a new object is where its logits are at least 0.5, then enlarged. False: where
      they are above 0 once they are enlarged.
    max_num_objects: tracked at once. max_score: detection scores are held below it; 1: they are not.
    suppress_det_close_to_boundary: detections with a centre within 0.025 of the frame's edge do not count.
    masklet_confirmation_enable: only objects are put out that were once detected on so many frames in a row.
  """

  name: str = "original"
  score_threshold_detection: float = 0.5
  det_nms_thresh: float = 0.1
  new_det_thresh: float = 0.7
  assoc_iou_thresh: float = 0.1
  trk_assoc_iou_thresh: float = 0.5
  hotstart_delay: int = 15
  hotstart_unmatch_thresh: int = 8
  hotstart_dup_thresh: int = 8
  suppress_unmatched_only_within_hotstart: bool = True
  init_trk_keep_alive: int = 30
  max_trk_keep_alive: int = 30
  min_trk_keep_alive: int = -1
  decrease_trk_keep_alive_for_empty_masklets: bool = False
  suppress_overlapping_based_on_recent_occlusion_threshold: float = 0.7
  fill_hole_area: int = 16
  recondition_every_nth_frame: int = 16
  high_conf_thresh: float = 0.8
  high_iou_thresh: float = 0.8
  recondition_on_trk_masks: bool = False
  shrink_threshold: float = 0.3
  shrink_at_mask_size: bool = False
  shrink_spares_single: bool = False
  new_masks_at_mask_size: bool = False
  max_num_objects: int = 10000
  max_score: float = 0.999
  suppress_det_close_to_boundary: bool = False
  masklet_confirmation_enable: bool = False
  masklet_confirmation_consecutive_det_thresh: int = 3

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if field.name != "min_trk_keep_alive":  # which may be negative
        typed(field.name, getattr(self, field.name), field.default)

  @classmethod
  def original(cls) -> PhraseVideoConfig:
    """The authors' code (facebookresearch/sam3, `sam3_video_base.py`, February 2026)."""
    return cls()

  @classmethod
  def transformers(cls) -> PhraseVideoConfig:
    """transformers 5.23.0, `Sam3VideoModel`, with the kernels that it wants."""
    return cls(
      "transformers", recondition_on_trk_masks=True, shrink_at_mask_size=True, shrink_spares_single=True,
      new_masks_at_mask_size=True, max_score=1.0,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """What tracks an object through frames: memory attention, memory encoder, object pointers."""

  num_layers: int = 4
  intermediate_size: int = 2048
  rope_theta: float = 10000.0
  hidden_size: int = 64  # of what is remembered
  num_maps: int = 7  # frames that are told apart by age, the prompted ones being one
  max_cond_frames: int = 4  # frames with prompts whose maps are read
  max_pointers: int = 16  # frames whose object pointers are read, this one included
  fuser_layers: int = 2
  fuser_intermediate_size: int = 1024


@dataclasses.dataclass(frozen=True)
class TrackerConfig:
  """SAM 3's tracker: its own neck on the image model's trunk, prompt encoder, mask decoder, and memory.

  `memory` is None for the weights of an image tracker alone, which answers clicks and follows nothing.
  """

  hidden_size: int = 256
  patch_size: int = 14  # of the trunk
  scale_factors: tuple[float, ...] = (4.0, 2.0, 1.0, 0.5)
  mask_input_channels: int = 16
  num_layers: int = 2
  num_attention_heads: int = 8
  intermediate_size: int = 2048
  attention_downsample_rate: int = 2
  num_multimask_outputs: int = 3
  iou_head_hidden_size: int = 256
  stability_offset: float = 0.05
  stability_threshold: float = 0.98
  memory: MemoryConfig | None = MemoryConfig()
  profile: TrackerProfile = TrackerProfile.original()

  def __post_init__(self):
    for part in (self, *([self.memory] if self.memory else [])):
      for field in dataclasses.fields(part):
        if field.name not in ("memory", "profile"):
          typed(field.name, getattr(part, field.name), field.default)
    inner = self.hidden_size // max(self.attention_downsample_rate, 1)
    if self.hidden_size % 8 or not self.num_attention_heads or inner % self.num_attention_heads:
      raise ArgumentError(
        "hidden_size",
        f" must be a multiple of 8 and, divided by attention_downsample_rate, of num_attention_heads, got "
        f"{self.hidden_size}, {self.attention_downsample_rate} and {self.num_attention_heads}",
      )

  def replace(self, **changes) -> TrackerConfig:
    """A copy with fields replaced; `profile` may be a name."""
    if "profile" in changes:
      changes["profile"] = TrackerProfile.named(changes["profile"])
    return dataclasses.replace(self, **changes)


@dataclasses.dataclass(frozen=True)
class Sam3LiteTextConfig:
  """The whole model: sizes of every part, and the reference profile it follows.

  Use `.s0()`, `.s1()`, `.l()` for the released variants, `from_json` for a transformers `config.json`.
  """

  vision: VisionConfig = VisionConfig()
  text: TextConfig = TextConfig()
  geometry_encoder: GeometryEncoderConfig = GeometryEncoderConfig()
  detr_encoder: DetrEncoderConfig = DetrEncoderConfig()
  detr_decoder: DetrDecoderConfig = DetrDecoderConfig()
  mask_decoder: MaskDecoderConfig = MaskDecoderConfig()
  profile: Profile = Profile.original()
  # tokenizer.json of a vocabulary of the model's own, a pruned one; None: CLIP's. No size, so not compared.
  tokenizer: str | None = dataclasses.field(default=None, compare=False, repr=False)

  def __post_init__(self):
    for name in ("vision", "text", "geometry_encoder", "detr_encoder", "detr_decoder", "mask_decoder"):
      part = getattr(self, name)
      for field in dataclasses.fields(part):
        typed(f"{name}.{field.name}", getattr(part, field.name), field.default)
      heads, width = part.num_attention_heads, part.hidden_size
      if heads < 1 or width < 1 or width % heads:
        raise ArgumentError(
          name, f": num_attention_heads must divide hidden_size, got {heads} heads for width {width}"
        )
    v = self.vision
    if v.patch_size < 1 or v.image_size % v.patch_size or v.image_size < 2 * v.patch_size:
      raise ValueError(
        f"vision.image_size must be a multiple of the patch size {v.patch_size}, at least twice it,"
        f" got {v.image_size}"
      )
    _check_choice("text.kind", self.text.kind, ("mobileclip", "clip"))

  @classmethod
  def s0(cls, profile: str | Profile = "original") -> Sam3LiteTextConfig:
    """SAM3-LiteText-S0-16: MobileCLIP-S0 text encoder, 42.54M parameters."""
    text = TextConfig(num_hidden_layers=6, use_repmixer_blocks=True)
    return cls(text=text, profile=Profile.named(profile))

  @classmethod
  def s1(cls, profile: str | Profile = "original") -> Sam3LiteTextConfig:
    """SAM3-LiteText-S1-16: MobileCLIP-S1 text encoder, 63.53M parameters."""
    return cls(text=TextConfig(), profile=Profile.named(profile))

  @classmethod
  def l(cls, profile: str | Profile = "original") -> Sam3LiteTextConfig:
    """SAM3-LiteText-L-16: MobileCLIP2-L text encoder, 123.80M parameters."""
    text = TextConfig(hidden_size=768, intermediate_size=3072, projection_dim=768, num_attention_heads=12)
    return cls(text=text, profile=Profile.named(profile))

  @classmethod
  def sam3(cls, profile: str | Profile = "original") -> Sam3LiteTextConfig:
    """SAM 3 itself, with the 353.72M CLIP text tower that the students were distilled from."""
    text = TextConfig(
      kind="clip",
      hidden_size=1024,
      intermediate_size=4096,
      projection_dim=512,
      num_hidden_layers=24,
      num_attention_heads=16,
      max_position_embeddings=32,
    )
    profile = dataclasses.replace(Profile.named(profile), context_length=32)
    return cls(text=text, profile=profile)

  def replace(self, **changes) -> Sam3LiteTextConfig:
    """A copy with whole parts replaced; `profile` may be a name."""
    if "profile" in changes:
      changes["profile"] = Profile.named(changes["profile"])
    return dataclasses.replace(self, **changes)

  def to_json(self, path: str | os.PathLike | None = None) -> dict[str, Any]:
    """The configuration in transformers' `config.json` schema, written to `path` when given.

    Our own fields that the schema lacks (the profile, `fused`) go under the key `"sam3lt_jax"`.
    """
    from sam3lt_jax import config_schema

    data = config_schema.to_schema(self)
    if path is not None:
      with open(path, "w", encoding="utf-8") as f:
        json.dump(data, f, indent=2, sort_keys=True)
        f.write("\n")
    return data

  @classmethod
  def from_json(
    cls, source: str | os.PathLike | Mapping[str, Any], profile: str | Profile | None = None
  ) -> Sam3LiteTextConfig:
    """Reads transformers' `config.json` schema, and the vocabulary beside it where that is not CLIP's.

    Args:
      source: a path to the file, a directory that holds `config.json`, or the parsed dictionary.
      profile: overrides what the file says; a file without our key is taken as "transformers".

    Raises:
      ValueError: unreadable JSON, another model type, or a field of the wrong kind.
      FileNotFoundError: no such file.
    """
    from sam3lt_jax import config_schema

    return config_schema.read(source, profile)
