"""Sam3LiteText: the boxes of the architecture figure, composed.

    image -> ViT trunk -> neck ------------------+
    phrase -> text encoder --+                   |
    boxes  -> geometry ------+-> prompt tokens -> fusion encoder -> decoder -> boxes, presence
                                                                   scoring -> scores
                                                                   mask decoder -> masks

Axes: B images, P prompts, T text tokens, N boxes, L prompt tokens, Q queries, D detector width,
S image side in pixels, h, w rows and columns of a map.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from sam3lt_jax.config import PADDING_LABEL, Sam3LiteTextConfig
from sam3lt_jax.features import Prompts, TextFeatures, VisionFeatures, image_of_each_prompt
from sam3lt_jax.nn.detr_decoder import DetrDecoder
from sam3lt_jax.nn.fusion_encoder import FusionEncoder
from sam3lt_jax.nn.geometry_encoder import GeometryEncoder
from sam3lt_jax.nn.layers import Dense, Dtype, Taps, tap
from sam3lt_jax.nn.mask_decoder import MaskDecoder
from sam3lt_jax.nn.scoring import DotProductScoring
from sam3lt_jax.nn.text_encoder import TextEncoder
from sam3lt_jax.nn.vision_encoder import VisionEncoder
from sam3lt_jax.ops import boxes as box_ops
from sam3lt_jax.ops import positions, target

Variables = dict[str, Any]


@flax.struct.dataclass
class Sam3LiteTextOutput:
  """Raw predictions, one row a prompt, all float32. `Sam3Processor` turns them into results.

  Attributes:
    pred_masks: [P, Q, h, w] logits, h = w = 4 times the token grid.
    pred_boxes: [P, Q, 4] normalised xyxy, not clipped to the image.
    pred_logits: [P, Q], clamped to +-12. Score = sigmoid(pred_logits) * sigmoid(presence_logits).
    presence_logits: [P, 1]: does the image hold the concept at all.
    semantic_seg: [P, 1, h, w] logits of "any object of the concept".
    intermediates: name -> array when asked for, else None. Names: vit_block_{i} [B, h, w, width],
      neck_{i} [B, h, w, D], text_embeddings and text_block_{i} [P, T, width], text_features [P, T, D],
      prompt_tokens [P, L, D], prompt_mask [P, L], encoder_output [P, h * w, D], decoder_hidden_states
      [layers, P, Q, D], decoder_boxes [layers, P, Q, 4] cxcywh, decoder_logits [layers, P, Q],
      decoder_presence_logits [layers, P, 1], pixel_embed [P, h, w, D]; with `one_to_many` also
      one_to_many_boxes [layers, P, Q, 4], one_to_many_logits [layers, P, Q], one_to_many_masks [P, Q, h, w].
  """

  pred_masks: jax.Array
  pred_boxes: jax.Array
  pred_logits: jax.Array
  presence_logits: jax.Array
  semantic_seg: jax.Array
  intermediates: dict[str, jax.Array] | None = None


class Sam3LiteText(nn.Module):
  """SAM3-LiteText (and SAM 3 itself, with `config.text.kind == "clip"`).

      model = Sam3LiteText(Sam3LiteTextConfig.s0())
      variables = model.init_variables(jax.random.key(0))      # or from_pretrained
      output = model.apply(variables, pixel_values, input_ids, attention_mask)

  `dtype` is what layers compute in, `param_dtype` what parameters are stored in; norms, softmax, RoPE, box
  arithmetic and outputs are float32 either way. `one_to_many` is for training, see `nn.detr_decoder`; so
  is `remat`: less memory for the backward pass, which computes the trunk's, the fusion encoder's and the
  decoder's layers a second time (see `nn.repeat`).
  """

  config: Sam3LiteTextConfig
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32
  one_to_many: bool = False
  remat: bool = False

  def setup(self):
    c, kw = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    v, t, g, e, d, m = c.vision, c.text, c.geometry_encoder, c.detr_encoder, c.detr_decoder, c.mask_decoder
    original_dropout = c.profile.training_dropout == "original"

    def dropout(rate):
      inner = rate if original_dropout else 0.0
      return {"dropout": rate, "attention_dropout": inner, "mlp_dropout": inner}

    self.vision_encoder = VisionEncoder(
      trunk={
        "features": v.hidden_size,
        "num_layers": v.num_hidden_layers,
        "num_heads": v.num_attention_heads,
        "mlp_hidden": v.intermediate_size,
        "patch": v.patch_size,
        "window": v.window_size,
        "global_layers": v.global_attn_indexes,
        "pretrain_grid": v.pretrain_grid,
        "rope_theta": v.rope_theta,
        "epsilon": c.profile.vit_layer_norm_eps,
        "drop_path": v.drop_path_rate if original_dropout else 0.0,
        "remat": self.remat,
      },
      pyramid={"features": v.fpn_hidden_size, "scales": v.scale_factors},
      **kw,
    )
    self.text_encoder = TextEncoder(
      vocab_size=t.vocab_size,
      features=t.hidden_size,
      num_layers=t.num_hidden_layers,
      num_heads=t.num_attention_heads,
      mlp_hidden=t.intermediate_size,
      projection_dim=t.projection_dim,
      max_positions=t.max_position_embeddings,
      epsilon=t.layer_norm_eps,
      position_policy=c.profile.position_policy,
      mask_padding=c.profile.mask_text_padding,
      causal=t.kind == "clip",
      repmixer=t.kind == "mobileclip" and t.use_repmixer_blocks,
      repmixer_kernel=t.repmixer_kernel_size,
      layer_scale_init=t.layer_scale_init_value,
      batch_norm_eps=t.batch_norm_eps,
      fused=t.fused,
      **kw,
    )
    self.text_projection = Dense(e.hidden_size, **kw)
    self.geometry_encoder = GeometryEncoder(
      g.hidden_size, g.num_layers, g.num_attention_heads, g.intermediate_size, g.roi_size,
      **dropout(g.dropout), **kw,
    )  # fmt: skip
    self.detr_encoder = FusionEncoder(
      e.num_layers,
      e.num_attention_heads,
      e.hidden_size,
      e.intermediate_size,
      **dropout(e.dropout),
      remat=self.remat,
      **kw,
    )
    self.detr_decoder = DetrDecoder(
      d.hidden_size, d.num_layers, d.num_queries, d.num_attention_heads, d.intermediate_size,
      c.profile.presence_logit_clamp, **dropout(d.dropout), one_to_many=self.one_to_many,
      remat=self.remat, **kw,
    )  # fmt: skip
    self.dot_product_scoring = DotProductScoring(
      d.hidden_size,
      d.intermediate_size,
      hidden_dropout=d.dropout if original_dropout else 0.0,
      output_dropout=0.0 if original_dropout else d.dropout,
      **kw,
    )
    self.mask_decoder = MaskDecoder(
      m.hidden_size, m.num_attention_heads, m.num_upsampling_stages, m.num_groups, **kw
    )

  def __call__(
    self,
    pixel_values: jax.Array | None = None,
    input_ids: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    *,
    input_boxes: jax.Array | None = None,
    input_boxes_labels: jax.Array | None = None,
    image_index: jax.Array | None = None,
    vision_embeds: VisionFeatures | None = None,
    text_embeds: TextFeatures | jax.Array | None = None,
    deterministic: bool = True,
    update_batch_stats: bool = False,
    output_intermediates: bool = False,
  ) -> Sam3LiteTextOutput:
    """Finds, scores and segments every object that matches each prompt.

    Args:
      pixel_values: [B, S, S, 3] in [-1, 1], RGB, channels last; S any multiple of the patch size (14).
      input_ids: int32 [P, T]. attention_mask: bool or int [P, T], 1 = token; None: all are tokens.
      input_boxes: float32 [P, N, 4], normalised cxcywh. N may be 0.
      input_boxes_labels: int32 [P, N], 1 positive, 0 negative, -10 padding; None: all positive.
      image_index: int32 [P], which image each prompt is for; a number beyond the images gives NaN.
        None: prompt p is for image p, a single image serves all prompts, a single prompt all images.
      vision_embeds: in place of pixel_values, from `get_vision_features`.
      text_embeds: in place of input_ids: `TextFeatures`, or its `pooler_output` [P, T, D] and attention_mask.
      deterministic: False applies dropout (rng "dropout"); where it acts follows the profile.
      update_batch_stats: True normalises RepMixer blocks by the batch and updates `batch_stats` (mutable).
      output_intermediates: fills `Sam3LiteTextOutput.intermediates`.

    Raises:
      ValueError: arguments that contradict each other, or shapes that are not as above.
    """
    taps: Taps = {} if output_intermediates else None
    if not isinstance(vision_embeds, VisionFeatures | None):
      raise ValueError(f"vision_embeds must be VisionFeatures, got {type(vision_embeds).__name__}")
    if (pixel_values is None) == (vision_embeds is None):
      raise ValueError("pass exactly one of pixel_values and vision_embeds")
    if (input_ids is None) == (text_embeds is None):
      raise ValueError("pass exactly one of input_ids and text_embeds")
    if vision_embeds is None:
      vision_embeds = self.get_vision_features(pixel_values, deterministic, taps)
    if text_embeds is None:
      text_embeds = self.get_text_features(input_ids, attention_mask, update_batch_stats, taps)
    else:
      text_embeds = self._given_text(text_embeds, attention_mask)
    tap(taps, "text_features", text_embeds.pooler_output)
    P = text_embeds.pooler_output.shape[0]
    rows = P if image_index is None else image_index.shape[0]
    if image_index is None and P == 1:
      rows = vision_embeds.image.shape[0]
    boxes, labels = _checked_boxes(input_boxes, input_boxes_labels, rows)
    prompts = Prompts(text_embeds.pooler_output, text_embeds.attention_mask, boxes, labels, image_index)
    return self.detect(vision_embeds, prompts, deterministic, taps)

  def get_vision_features(
    self, pixel_values: jax.Array, deterministic: bool = True, taps: Taps = None
  ) -> VisionFeatures:
    """pixel_values [B, S, S, 3] in [-1, 1] -> `VisionFeatures`, to be reused over many prompts."""
    return self.prepare(self.neck_maps(pixel_values, deterministic, taps), deterministic)

  def trunk_map(self, pixel_values: jax.Array, deterministic: bool = True, taps: Taps = None) -> jax.Array:
    """pixel_values [B, S, S, 3] in [-1, 1] -> the trunk's last map [B, h, w, D_trunk], one cell a token,
    which the necks of the detector and of a `Sam3Tracker` read.
    """
    v = self.config.vision
    pixel_values = jnp.asarray(pixel_values)
    shape = pixel_values.shape
    if not jnp.issubdtype(pixel_values.dtype, jnp.floating):
      raise ValueError(
        f"pixel_values must be floating point in [-1, 1] (see Sam3Processor), got {pixel_values.dtype}"
      )
    if len(shape) != 4 or shape[-1] != v.num_channels:
      hint = "; this looks channels-first" if len(shape) == 4 and shape[1] == v.num_channels else ""
      raise ValueError(f"pixel_values must be [B, S, S, {v.num_channels}], got {tuple(shape)}{hint}")
    if shape[1] != shape[2] or shape[1] % v.patch_size or shape[1] < 2 * v.patch_size:
      raise ValueError(
        f"pixel_values must be square with a side that is a multiple of {v.patch_size} (at least"
        f" {2 * v.patch_size}), got {shape[1]} x {shape[2]}"
      )
    return self.vision_encoder.backbone(pixel_values, deterministic, taps)

  def neck_maps(
    self, pixel_values: jax.Array, deterministic: bool = True, taps: Taps = None
  ) -> tuple[jax.Array, ...]:
    """pixel_values [B, S, S, 3] in [-1, 1] -> the neck's maps [B, h, w, D] of 4, 2 and 1 times the token grid
    (288, 144, 72 at 1008 px): the first half of `get_vision_features`, for losses on the maps themselves.
    """
    return self.vision_encoder.neck(self.trunk_map(pixel_values, deterministic, taps), taps)

  def read_trunk(self, trunk_map: jax.Array) -> VisionFeatures:
    """`trunk_map` -> `VisionFeatures`: the second half of `get_vision_features`."""
    return self.prepare(self.vision_encoder.neck(trunk_map))

  def prepare(self, maps: tuple[jax.Array, ...], deterministic: bool = True) -> VisionFeatures:
    """`neck_maps` -> what all prompts about an image share, about a quarter of a prompt's work, done once."""
    *finer, image = maps
    B, h, w, D = image.shape
    mixed = without_boxes = None
    if deterministic and not self.remat and not self.is_initializing():
      place = positions.map_positions(h, w, D)
      mixed = self.detr_encoder.mix(image.reshape(B, h * w, D), place.reshape(h * w, D)).reshape(image.shape)
      none = jnp.zeros((B, 0, 4)), jnp.zeros((B, 0), jnp.int32)
      geometry = self._geometry_tokens(*none, image, place, deterministic)
      without_boxes = None if geometry is None else geometry[0]
    convolved = self.mask_decoder.convolve(tuple(finer))
    return VisionFeatures(image, mixed, convolved, without_boxes=without_boxes)

  def get_text_features(
    self,
    input_ids: jax.Array,
    attention_mask: jax.Array | None = None,
    update_batch_stats: bool = False,
    taps: Taps = None,
  ) -> TextFeatures:
    """input_ids int32 [P, T] (attention_mask [P, T], 1 = token) -> `TextFeatures`, reusable over images."""
    input_ids = jnp.asarray(input_ids)
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
      raise ValueError(f"input_ids must be int [P, T], got {input_ids.dtype} {tuple(input_ids.shape)}")
    mask = _token_mask(attention_mask, input_ids.shape)
    hidden = self.text_encoder(input_ids, mask, update_batch_stats, taps)
    return TextFeatures(hidden, self.text_projection(hidden), mask)

  def init_variables(self, rng: jax.Array) -> Variables:
    """Random parameters for every layer, as `init` gives, without shaping inputs by hand."""
    v, t = self.config.vision, self.config.text
    side = v.patch_size * 2  # parameters do not depend on the image size
    tokens = min(4, t.max_position_embeddings)

    def init(rng):
      return self.init(
        rng,
        jnp.zeros((1, side, side, v.num_channels)),
        jnp.zeros((1, tokens), jnp.int32),
        input_boxes=jnp.full((1, 1, 4), 0.5),
      )

    return jax.jit(init)(rng)

  def fuse(self, variables: Variables) -> tuple[Sam3LiteText, Variables]:
    """The same function with RepMixer blocks folded into plain convolutions, for inference.

    Returns (model, variables); unchanged where there is nothing to fold. See `sam3lt_jax.fusing`.
    """
    from sam3lt_jax import fusing

    return fusing.fuse(self, variables)

  def _given_text(self, text_embeds: TextFeatures | jax.Array, attention_mask) -> TextFeatures:
    """`text_embeds` as `TextFeatures`, checked."""
    if isinstance(text_embeds, TextFeatures):
      if attention_mask is not None:
        raise ValueError("attention_mask beside TextFeatures, which carry their own; pass one of the two")
    else:
      shape = jnp.shape(text_embeds)
      if len(shape) != 3:
        raise ValueError(f"text_embeds must be TextFeatures or an array [P, T, D], got shape {shape}")
      text_embeds = TextFeatures(text_embeds, text_embeds, _token_mask(attention_mask, shape[:2]))
    width, shape = self.config.detr_encoder.hidden_size, text_embeds.pooler_output.shape
    if len(shape) != 3 or shape[-1] != width:
      raise ValueError(f"text_embeds must be [P, T, {width}] (projected tokens), got {tuple(shape)}")
    return text_embeds

  def detect(
    self, vision: VisionFeatures, prompts: Prompts, deterministic: bool = True, taps: Taps = None
  ) -> Sam3LiteTextOutput:
    """Everything after the two encoders; `__call__` says which image each prompt is for."""
    rows = prompts.tokens.shape[0]
    image, mixed, without_boxes, *finer = image_of_each_prompt(
      (vision.image, vision.mixed, vision.without_boxes, *vision.convolved), rows, prompts.image_index
    )
    tokens, mask = (
      jnp.broadcast_to(a, (image.shape[0], *a.shape[1:])) for a in (prompts.tokens, prompts.mask)
    )
    place = positions.map_positions(*image.shape[1:])
    if prompts.boxes.shape[1] == 0 and without_boxes is not None:
      geometry = without_boxes, jnp.ones(without_boxes.shape[:2], bool)
    else:
      geometry = self._geometry_tokens(prompts.boxes, prompts.labels, image, place, deterministic)
    if geometry is not None:
      tokens = jnp.concatenate([tokens, geometry[0]], axis=1)
      mask = jnp.concatenate([mask, geometry[1]], axis=1)
    if not target.current().has_cpu:  # by eights, as the decoder's rows
      padding = (0, 0), (0, -tokens.shape[1] % 8)
      tokens, mask = jnp.pad(tokens, (*padding, (0, 0))), jnp.pad(mask, padding)
    tap(taps, "prompt_tokens", tokens)
    tap(taps, "prompt_mask", mask)

    P, h, w, D = image.shape
    flat_place = place.reshape(h * w, D)
    flat, mixed = (None if x is None else x.reshape(P, h * w, D) for x in (image, mixed))
    encoded = self.detr_encoder(flat, flat_place, tokens, mask, deterministic, mixed)
    tap(taps, "encoder_output", encoded)
    encoded = encoded.reshape(P, h, w, D)
    decoded = self.detr_decoder(encoded, place, tokens, mask, deterministic)
    logits = self.dot_product_scoring(decoded.hidden_states, tokens, mask, deterministic)
    Q = self.config.detr_decoder.num_queries
    if self.one_to_many:
      tap(taps, "one_to_many_boxes", decoded.boxes[:, :, Q:])
      tap(taps, "one_to_many_logits", logits[:, :, Q:])
    hidden, boxes, logits = decoded.hidden_states[:, :, :Q], decoded.boxes[:, :, :Q], logits[:, :, :Q]
    tap(taps, "decoder_hidden_states", hidden)
    tap(taps, "decoder_boxes", boxes)
    tap(taps, "decoder_logits", logits)
    tap(taps, "decoder_presence_logits", decoded.presence_logits)
    masks, semantic = self.mask_decoder(
      decoded.hidden_states[-1], tuple(finer), encoded, tokens, mask, taps
    )  # fmt: skip
    if self.one_to_many:
      tap(taps, "one_to_many_masks", masks[:, Q:])
    return Sam3LiteTextOutput(
      pred_masks=masks[:, :Q],
      pred_boxes=box_ops.cxcywh_to_xyxy(boxes[-1]),
      pred_logits=logits[-1],
      presence_logits=decoded.presence_logits[-1],
      semantic_seg=semantic,
      intermediates=taps,
    )

  def _geometry_tokens(self, boxes, labels, image, place, deterministic: bool):
    """Box tokens and the CLS token with their mask, or None where the profile adds none without boxes."""
    policy = self.config.profile.geometry_cls
    if boxes.shape[1] == 0 and policy != "always" and not self.is_initializing():
      return None
    box_mask = labels != PADDING_LABEL
    cls_mask = box_mask.any(axis=1) if policy == "with_boxes" else jnp.ones(boxes.shape[0], bool)
    return self.geometry_encoder(boxes, labels, box_mask, cls_mask, image, place, deterministic)


def _token_mask(attention_mask, shape) -> jax.Array:
  """attention_mask as bool, checked against `shape`; None: all are tokens."""
  if attention_mask is None:
    return jnp.ones(shape, bool)
  attention_mask = jnp.asarray(attention_mask)
  if tuple(attention_mask.shape) != tuple(shape):
    raise ValueError(
      f"attention_mask must be {tuple(shape)} like the tokens, got {tuple(attention_mask.shape)}"
    )
  return attention_mask.astype(bool)


def _checked_boxes(boxes, labels, prompts: int) -> tuple[jax.Array, jax.Array]:
  """Boxes float32 [P, N, 4] and labels int32 [P, N]; none given becomes N = 0."""
  if boxes is None:
    if labels is not None:
      raise ValueError("input_boxes_labels without input_boxes")
    boxes = jnp.zeros((prompts, 0, 4), jnp.float32)
  boxes = jnp.asarray(boxes)
  if boxes.ndim != 3 or boxes.shape[-1] != 4 or boxes.shape[0] != prompts:
    raise ValueError(
      f"input_boxes must be [P, N, 4] with P = {prompts} (the prompts of this call), got {tuple(boxes.shape)}"
    )
  if labels is None:
    labels = jnp.ones(boxes.shape[:2], jnp.int32)
  labels = jnp.asarray(labels)
  if tuple(labels.shape) != tuple(boxes.shape[:2]):
    raise ValueError(f"input_boxes_labels must be {tuple(boxes.shape[:2])}, got {tuple(labels.shape)}")
  return boxes.astype(jnp.float32), labels
