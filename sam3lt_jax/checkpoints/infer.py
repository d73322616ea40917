"""What the tensors of a file say about the model: its configuration, and which variant it looks like.

Works on the leaves of our tree (`engine.assign` gives their shapes without reading anything), so one set of
rules serves every layout.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping

from sam3lt_jax.checkpoints.errors import CheckpointError
from sam3lt_jax.config import (
  DetrDecoderConfig,
  DetrEncoderConfig,
  GeometryEncoderConfig,
  MaskDecoderConfig,
  Profile,
  Sam3LiteTextConfig,
  TextConfig,
  VisionConfig,
)

Shape = tuple[int, ...]

# Widths whose head count is known because a released model has them: heads of 64.
_RELEASED_TEXT_WIDTHS = (512, 768, 1024)
_RELEASED_VIT_WIDTH = 1024
_VARIANTS = {
  "SAM3-LiteText-S0": Sam3LiteTextConfig.s0,
  "SAM3-LiteText-S1": Sam3LiteTextConfig.s1,
  "SAM3-LiteText-L": Sam3LiteTextConfig.l,
  "SAM 3 (the teacher)": Sam3LiteTextConfig.sam3,
}


@dataclasses.dataclass(frozen=True)
class TextFacts:
  """What tells the variants apart."""

  kind: str
  hidden_size: int
  num_hidden_layers: int
  use_repmixer_blocks: bool

  @classmethod
  def of(cls, text: TextConfig) -> TextFacts:
    return cls(text.kind, text.hidden_size, text.num_hidden_layers, text.use_repmixer_blocks)

  def __str__(self) -> str:
    name = next(
      (n for n, make in _VARIANTS.items() if TextFacts.of(make().text) == self), "an unreleased variant"
    )
    tower = "CLIP" if self.kind == "clip" else "MobileCLIP"
    blocks = " with RepMixer blocks" if self.use_repmixer_blocks else ""
    return f"{name} ({tower} text encoder, {self.num_hidden_layers} layers of {self.hidden_size}{blocks})"


class _Leaves:
  """Shapes of leaves by path, with an error that asks for `config=` where one is needed and missing."""

  def __init__(self, shapes: Mapping[str, Shape], where: str):
    self._shapes = {path.partition("/")[2]: shape for path, shape in shapes.items()}  # without the collection
    self._where = where

  def shape(self, path: str) -> Shape:
    if not self._shapes.get(path):
      raise CheckpointError(
        f"{self._where}: the configuration cannot be inferred, there is no {path}; pass config="
      )
    return self._shapes[path]

  def has(self, path: str) -> bool:
    return path in self._shapes

  def count(self, pattern: str) -> int:
    """Layers: one more than the highest index, which `pattern` captures; 0 without any."""
    found = [int(m[1]) for path in self._shapes if (m := re.match(pattern, path))]
    return max(found, default=-1) + 1


def text_facts(shapes: Mapping[str, Shape], text_kind: str) -> TextFacts | None:
  """The variant's marks in a file; None where it has no (whole) text encoder."""
  leaves = _Leaves(shapes, "")
  embedding = "text_encoder/embeddings/token_embedding/embedding"
  if not leaves.has(embedding) or len(leaves.shape(embedding)) != 2:
    return None
  return TextFacts(
    text_kind,
    leaves.shape(embedding)[1],
    leaves.count(r"text_encoder/layers_(\d+)/"),
    leaves.count(r"text_encoder/layers_(\d+)/token_mixer/") > 0,
  )


def check_variant(
  config: Sam3LiteTextConfig, shapes: Mapping[str, Shape], text_kind: str, where: str, *, given: bool
) -> None:
  """Compares the file's text encoder with the configuration's.

  Args:
    given: `config` was passed by the user; else it comes from the checkpoint's own config.json.

  Raises:
    CheckpointError: another variant, in one sentence that names both; or a position table of other length.
  """
  facts = text_facts(shapes, text_kind)
  if facts is None:
    return
  expected = TextFacts.of(config.text)
  told_by = "the given config" if given else "its config.json"
  if facts != expected:
    advice = "leave config= out, or pass the file's own" if given else "the two do not belong together"
    raise CheckpointError(f"{where} looks like {facts}, but {told_by} is for {expected}; {advice}")
  table = shapes.get("params/text_encoder/embeddings/position_embedding")
  if table and table[0] != config.text.max_position_embeddings:
    raise CheckpointError(
      f"{where} has {table[0]} rows in the text encoder's position table, but {told_by} says "
      f"text.max_position_embeddings={config.text.max_position_embeddings}; set it to {table[0]}"
    )


def infer_config(
  shapes: Mapping[str, Shape],
  text_kind: str,
  where: str,
  *,
  rope: Mapping[int, Shape] | None = None,
  profile: str | Profile = "original",
) -> Sam3LiteTextConfig:
  """The configuration of a file, from its shapes.

  Head counts leave no trace in a weight's shape. The decoder's is read off its position bias and taken for
  every part of the detector, the ViT's off the RoPE tables of an original file; the rest are the released
  ones (heads of 64 in the text encoder and the ViT).

  Args:
    shapes: leaf path -> shape, see `engine.assign`.
    text_kind: "mobileclip" or "clip".
    where: names the file in errors.
    rope: layer -> shape [tokens, head width / 2] of the RoPE tables of an original file, which tell the
      window, the image size and the global layers.
    profile: the reference profile to follow.

  Raises:
    CheckpointError: something that cannot be read off, with a request for `config=`.
  """
  leaves = _Leaves(shapes, where)
  heads = leaves.shape("detr_decoder/box_rpb_embed_x/layer2/bias")[0]
  width = leaves.shape("detr_decoder/query_embed/embedding")[1]
  mlp = "layers_0/mlp/fc1/bias"
  part = {"hidden_size": width, "num_attention_heads": heads}
  config = Sam3LiteTextConfig(
    vision=_vision(leaves, rope or {}, where),
    text=_text(leaves, text_kind, where),
    geometry_encoder=GeometryEncoderConfig(
      **part,
      num_layers=leaves.count(r"geometry_encoder/layers_(\d+)/"),
      intermediate_size=leaves.shape(f"geometry_encoder/{mlp}")[0],
      roi_size=leaves.shape("geometry_encoder/boxes_pool_project/kernel")[0],
    ),
    detr_encoder=DetrEncoderConfig(
      **part,
      num_layers=leaves.count(r"detr_encoder/layers_(\d+)/"),
      intermediate_size=leaves.shape(f"detr_encoder/{mlp}")[0],
    ),
    detr_decoder=DetrDecoderConfig(
      **part,
      num_layers=leaves.count(r"detr_decoder/layers_(\d+)/"),
      num_queries=leaves.shape("detr_decoder/query_embed/embedding")[0],
      intermediate_size=leaves.shape(f"detr_decoder/{mlp}")[0],
    ),
    mask_decoder=MaskDecoderConfig(
      **part, num_upsampling_stages=leaves.count(r"mask_decoder/pixel_decoder/conv_layers_(\d+)/")
    ),
    profile=Profile.named(profile),
  )
  if text_kind == "clip" and config.profile == Profile.original():
    # The teacher was trained with 32 tokens; its table says so.
    length = config.text.max_position_embeddings
    config = config.replace(profile=dataclasses.replace(config.profile, context_length=length))
  return config


def _text(leaves: _Leaves, kind: str, where: str) -> TextConfig:
  hidden = leaves.shape("text_encoder/embeddings/token_embedding/embedding")[1]
  count = leaves.count(r"text_encoder/layers_(\d+)/")
  repmixer = leaves.count(r"text_encoder/layers_(\d+)/token_mixer/") > 0
  kernel = leaves.shape("text_encoder/layers_0/token_mixer/mixer/conv/kernel")[0] if repmixer else 11
  plain = 1 if repmixer else 0
  mlp = f"text_encoder/layers_{plain}/mlp/fc1/bias"
  if not leaves.has(mlp):  # RepMixer blocks only
    mlp = "text_encoder/layers_0/conv_feed_forward/mlp/fc1/bias"
  return TextConfig(
    kind=kind,
    vocab_size=leaves.shape("text_encoder/embeddings/token_embedding/embedding")[0],
    hidden_size=hidden,
    intermediate_size=leaves.shape(mlp)[0],
    projection_dim=leaves.shape("text_encoder/projection/kernel")[1],
    num_hidden_layers=count,
    num_attention_heads=_heads_of_64(hidden, "text encoder", hidden in _RELEASED_TEXT_WIDTHS, where),
    max_position_embeddings=leaves.shape("text_encoder/embeddings/position_embedding")[0],
    use_repmixer_blocks=repmixer,
    repmixer_kernel_size=kernel,
  )


def _heads_of_64(width: int, part: str, released: bool, where: str) -> int:
  if width % 64:
    raise CheckpointError(
      f"{where}: the head count of the {part} cannot be inferred from its width {width}; pass config="
    )
  if not released:
    warnings.warn(
      f"{where}: no released model has a {part} of width {width}; heads of 64 are assumed, so {width // 64}. "
      "Pass config= if that is wrong",
      stacklevel=2,
    )
  return width // 64


def _vision(leaves: _Leaves, rope: Mapping[int, Shape], where: str) -> VisionConfig:
  backbone = "vision_encoder/backbone"
  kernel = leaves.shape(f"{backbone}/embeddings/patch_embeddings/projection/kernel")
  patch, channels, width = kernel[0], kernel[2], kernel[3]
  table = leaves.shape(f"{backbone}/embeddings/position_embeddings")[1]
  depth = leaves.count(rf"{backbone}/layers_(\d+)/")
  levels = leaves.count(r"vision_encoder/neck/fpn_layers_(\d+)/")
  factors = []
  for i in range(levels):
    ups = sum(leaves.has(f"vision_encoder/neck/fpn_layers_{i}/scale_layers_{j}/kernel") for j in (0, 2))
    # A level without transposed convolutions keeps the map, or halves it if one before already keeps it.
    factors.append(2.0**ups if ups else (0.5 if 1.0 in factors else 1.0))
  sizes = _window_and_grid(rope, depth, where)
  if rope:
    heads = width // (2 * next(iter(rope.values()))[1])
  else:
    heads = _heads_of_64(width, "ViT", width == _RELEASED_VIT_WIDTH, where)
  return VisionConfig(
    hidden_size=width,
    intermediate_size=leaves.shape(f"{backbone}/layers_0/mlp/fc1/bias")[0],
    num_hidden_layers=depth,
    num_attention_heads=heads,
    num_channels=channels,
    image_size=sizes[1] * patch,
    patch_size=patch,
    window_size=sizes[0],
    global_attn_indexes=sizes[2],
    pretrain_image_size=math.isqrt(table) * patch,
    fpn_hidden_size=leaves.shape("vision_encoder/neck/fpn_layers_0/proj2/bias")[0],
    scale_factors=tuple(factors),
  )


def _window_and_grid(rope: Mapping[int, Shape], depth: int, where: str) -> tuple[int, int, tuple[int, ...]]:
  """(window, grid, global layers), from the numbers of positions that each layer's RoPE table has."""
  released = VisionConfig()
  grid = released.image_size // released.patch_size
  sides = {layer: math.isqrt(shape[0]) for layer, shape in rope.items()}
  if len(set(sides.values())) == 2:
    window, grid = sorted(set(sides.values()))
    return window, grid, tuple(sorted(layer for layer, side in sides.items() if side == grid))
  if depth == released.num_hidden_layers:
    return released.window_size, grid, released.global_attn_indexes
  raise CheckpointError(
    f"{where}: window, image size and global layers of a ViT of {depth} layers cannot be inferred; "
    "pass config="
  )
