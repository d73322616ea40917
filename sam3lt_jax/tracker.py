"""Sam3Tracker: one object a prompt, from clicks, a box or a mask; and what it takes to follow it.

It reads the last map of the image model's trunk, so that one encoding of an image serves phrases and clicks:

    model, variables = from_pretrained("s0")
    tracker, weights = tracker_from_pretrained("facebook/sam3")
    trunk = model.apply(variables, pixel_values, method="trunk_map")
    features = tracker.apply(weights, trunk, method="get_image_features")
    output = tracker.apply(weights, features, clicks)

Source: facebookresearch/sam3 `sam3_tracker_base.py` and `sam/`; transformers 5.23.0 `sam3_tracker`,
`sam3_tracker_video`. Axes: B images, P prompts, N points, C masks of a prompt, D width, h, w rows and columns
of the token grid.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from sam3lt_jax.config import NOT_A_POINT, PADDING_LABEL, TrackerConfig
from sam3lt_jax.features import Clicks, Memory, Tracked, TrackerFeatures, image_of_each_prompt
from sam3lt_jax.nn.layers import (
  Dense,
  Dtype,
  PatchConv,
  ReluMlp,
  Taps,
  embedding_init,
  param,
  repeat_rows,
  tap,
)
from sam3lt_jax.nn.memory_attention import MemoryAttention
from sam3lt_jax.nn.memory_encoder import MemoryEncoder
from sam3lt_jax.nn.neck import Neck
from sam3lt_jax.nn.prompt_encoder import PromptEncoder
from sam3lt_jax.nn.tracker_mask_decoder import Decoded, TrackerMaskDecoder, single_mask
from sam3lt_jax.ops import positions
from sam3lt_jax.ops.resize import resized

ABSENT_LOGIT = -1024.0  # everywhere in the mask of an object that is not there
CELL = 16  # pixels a side of the memory encoder's masks for one token
MEMORY_SCALE = 10.0  # of those masks: from minus to plus this


@flax.struct.dataclass
class Sam3TrackerOutput:
  """Masks of P prompts; names follow transformers.

  Attributes:
    pred_masks: float32 [P, C, 4h, 4w] logits (288 x 288 at 1008 px); C is 3, or 1 where one is asked for.
    iou_scores: float32 [P, C] in [0, 1], the IoU with the true mask that the model expects.
    object_score_logits: float32 [P, 1], above 0 where the object is there. Nothing is hidden by it.
  """

  pred_masks: jax.Array
  iou_scores: jax.Array
  object_score_logits: jax.Array


class Sam3Tracker(nn.Module):
  """SAM 3's tracker: clicks about an image, and what one frame of a clip takes; clips are `video`'s.

  `dtype` is what layers compute in, `param_dtype` what parameters are stored in; norms, softmax, places,
  scores and masks are float32 either way.
  """

  config: TrackerConfig = TrackerConfig()
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    c, kw = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    D = c.hidden_size
    self.neck = Neck(D, c.scale_factors, **kw)
    self.prompt_encoder = PromptEncoder(D, c.mask_input_channels, **kw)
    self.mask_decoder = TrackerMaskDecoder(
      D, c.num_layers, c.num_attention_heads, c.intermediate_size, D // c.attention_downsample_rate,
      1 + c.num_multimask_outputs, c.iou_head_hidden_size, **kw,
    )  # fmt: skip
    self.no_memory_embedding = self._vector("no_memory_embedding", 1, 1, D)
    if (m := c.memory) is not None:
      self.memory_attention = MemoryAttention(
        D, m.hidden_size, m.num_layers, m.intermediate_size, m.rope_theta, **kw
      )
      self.memory_encoder = MemoryEncoder(D, m.hidden_size, m.fuser_layers, m.fuser_intermediate_size, **kw)
      self.mask_downsample = PatchConv(1, 4, use_bias=True, **kw)
      self.object_pointer_proj = ReluMlp((D, D, D), prefix="layers_", first=0, **kw)
      self.temporal_positional_encoding_projection_layer = Dense(m.hidden_size, **kw)
      self.memory_temporal_positional_encoding = self._vector(
        "memory_temporal_positional_encoding", m.num_maps, 1, 1, m.hidden_size
      )
      self.no_memory_positional_encoding = self._vector("no_memory_positional_encoding", 1, 1, D)
      self.no_object_pointer = self._vector("no_object_pointer", 1, D)
      self.occlusion_spatial_embedding_parameter = self._vector(
        "occlusion_spatial_embedding_parameter", 1, m.hidden_size
      )

  def _vector(self, name: str, *shape: int) -> jax.Array:
    return param(self, name, embedding_init, shape)

  def get_image_features(self, trunk_map: jax.Array) -> TrackerFeatures:
    """trunk_map: [B, h, w, D_trunk], of `Sam3LiteText.trunk_map` -> `TrackerFeatures`, for many prompts."""
    x4, x2, x1 = self.neck(trunk_map)
    return TrackerFeatures(x1, self.mask_decoder.fine(x4, x2))

  def __call__(
    self, features: TrackerFeatures, clicks: Clicks, multimask_output: bool = True, taps: Taps = None
  ) -> Sam3TrackerOutput:
    """One object a prompt.

    Args:
      features: of B images, from `get_image_features`.
      clicks: P prompts, see `Clicks` for which image each is for.
      multimask_output: three masks, for what one click may mean (whole, part, subpart); False: the one mask
        of the model's single-mask token or, where that depends on its threshold, the best of the three.

    Raises:
      ValueError: shapes that contradict each other.
    """
    decoded = self.decode(features, clicks, taps)
    masks, ious = decoded.masks[:, 1:], decoded.ious[:, 1:]
    if not multimask_output:
      chosen = self.single(decoded)[:, None]
      ious = jnp.take_along_axis(decoded.ious, chosen, axis=1)
      masks = jnp.take_along_axis(decoded.masks, chosen[..., None, None], axis=1)
    return Sam3TrackerOutput(masks, ious, decoded.object_score_logits)

  def single(self, decoded: Decoded) -> jax.Array:
    """Which mask answers where one is asked for: int32 [P], see `single_mask`."""
    return single_mask(decoded, self.config.stability_offset, self.config.stability_threshold)

  def decode(self, features: TrackerFeatures, clicks: Clicks, taps: Taps = None) -> Decoded:
    """All masks of all tokens; arguments and errors as in `__call__`."""
    image, fine = features.image, features.fine
    if clicks.image_index is not None:
      image, *fine = image_of_each_prompt((image, *fine), len(clicks.points), clicks.image_index)
    clicks = self._checked(clicks, len(image))
    if self.config.profile.no_memory_on_image:
      image = self._without_memory(image)
    return self._decode(image, tuple(fine), clicks, taps)

  def _without_memory(self, image: jax.Array) -> jax.Array:
    return image + self.no_memory_embedding[0, 0].astype(self.dtype)

  def _decode(self, image: jax.Array, fine: tuple, clicks: Clicks, taps: Taps = None) -> Decoded:
    """image: [B or P, h, w, D], conditioned or not; fine: of B images."""
    grid = image.shape[1]
    side = grid * self.config.patch_size
    tokens, token_mask = self.prompt_encoder.points(clicks.points + 0.5 / side, clicks.labels, clicks.valid)
    tap(taps, "prompt_tokens", tokens)
    tap(taps, "prompt_mask", token_mask)
    if clicks.masks is None:
      image = image + self.prompt_encoder.no_mask()
    else:
      dense = self.prompt_encoder.masks(clicks.masks, clicks.has_mask)
      tap(taps, "mask_prompt", dense)
      image = repeat_rows(image, len(tokens)) + dense
    places = self.prompt_encoder.image_places(grid)
    return self.mask_decoder(image, fine, places, tokens, token_mask, taps)

  def _checked(self, clicks: Clicks, images: int) -> Clicks:
    """With the slots that count as the profile says."""
    points, labels, valid = (jnp.asarray(x) for x in (clicks.points, clicks.labels, clicks.valid))
    shape = points.shape[:2]
    if points.ndim != 3 or points.shape[2] != 2 or labels.shape != shape or valid.shape != shape:
      raise ValueError(
        f"clicks must hold points [P, N, 2], labels [P, N] and valid [P, N], got {points.shape}, "
        f"{labels.shape} and {valid.shape}"
      )
    if shape[0] % images:
      raise ValueError(f"{shape[0]} prompts for {images} images: pass image_index, one image number a prompt")
    if (clicks.masks is None) != (clicks.has_mask is None):
      raise ValueError("clicks must hold masks and has_mask together, got one of them")
    profile = self.config.profile
    if not profile.zero_tokens:
      valid = valid & (labels != PADDING_LABEL)
    if profile.tokens_without_points:
      if not shape[1]:
        raise ValueError("this profile needs at least one slot for a point, got points [P, 0, 2]")
      empty = ~valid.any(axis=1)
      labels = labels.at[:, 0].set(jnp.where(empty, NOT_A_POINT, labels[:, 0]))
      valid = valid.at[:, 0].set(valid[:, 0] | empty)
    return clicks.replace(points=points, labels=labels, valid=valid)

  # ---------------------------------------------------------------- one frame of a clip

  def start_memory_attention(self, features: TrackerFeatures) -> jax.Array:
    """What memory attention makes of a frame for every object alike: [B, h, w, D] of its features."""
    return self.memory_attention.start(features.image)

  def condition(self, started: jax.Array, memory: Memory) -> jax.Array:
    """The image map with what is remembered of P objects: [P, h, w, D].

    started: [1 or P, h, w, D], see `start_memory_attention`.
    """
    table = self.memory_temporal_positional_encoding[:, 0, 0].astype(jnp.float32)
    P, L, D = memory.pointers.shape
    C = table.shape[-1]
    code = positions.frame_code(memory.distances, D)
    places = self.temporal_positional_encoding_projection_layer(code)  # [P, L, C], of D / C tokens each
    spread = lambda x: jnp.repeat(x, D // C, axis=1)  # noqa: E731
    tokens = memory.pointers.reshape(P, L * (D // C), C)
    return self.memory_attention(
      started, memory.maps, table[memory.rows], memory.count, tokens, spread(places), spread(memory.there)
    )

  def prompted(
    self, features: TrackerFeatures, clicks: Clicks | None = None, image: jax.Array | None = None
  ) -> Tracked:
    """P objects on a frame.

    Args:
      features: of the frame, 1 row.
      clicks: without image_index; a row without any point is like one of a frame that nobody asked about.
        None: all are.
      image: [P, h, w, D], what `condition` gave. None: nothing is remembered, as for a first frame.
    """
    if clicks is None:
      clicks, points = self._no_clicks(len(image)), jnp.zeros(len(image), jnp.int32)
    else:
      points = clicks.valid.sum(axis=1)
      empty = (jnp.arange(clicks.valid.shape[1]) == 0) & (points == 0)[:, None]
      labels = jnp.where(empty, NOT_A_POINT, clicks.labels)
      clicks = clicks.replace(labels=labels, valid=clicks.valid | empty)
    image = self._without_memory(features.image) if image is None else image
    return self._answer(self._decode(image, features.fine, clicks), points)

  def _no_clicks(self, P: int) -> Clicks:
    return Clicks(jnp.zeros((P, 1, 2)), jnp.full((P, 1), NOT_A_POINT, jnp.int32), jnp.ones((P, 1), bool))

  def _answer(self, decoded: Decoded, points: jax.Array) -> Tracked:
    """One mask an object: the best of several where there is at most one point (a box is two), else the one
    of the single-mask token. The pointer is of that token even where another's mask stands in for it.
    """
    several, row = points <= 1, jnp.arange(len(points))
    best = 1 + decoded.ious[:, 1:].argmax(axis=1)
    chosen = jnp.where(several, best, self.single(decoded))
    score = decoded.object_score_logits[:, 0]
    masks = jnp.where((score > 0)[:, None, None], decoded.masks[row, chosen], ABSENT_LOGIT)
    pointers = self.object_pointers(decoded.tokens[row, jnp.where(several, best, 0)], score > 0)
    return Tracked(masks, pointers, score, decoded.ious[row, chosen])

  def pointers_of_masks(self, features: TrackerFeatures, masks: jax.Array) -> jax.Array:
    """What stands for P objects that were given as masks: [P, D].

    features: of the frame, 1 row. masks: float32 [P, S, S] in [0, 1], S as `mask_side` says.
    """
    P, side = len(masks), features.mask_side
    logits = self.mask_downsample(masks[..., None])[..., 0].astype(jnp.float32)
    if logits.shape[1] != side:
      logits = resized(logits, side)
    clicks = self._no_clicks(P).replace(masks=logits, has_mask=jnp.ones(P, bool))
    # Of the image itself: neither memory nor the vector that stands for none.
    decoded = self._decode(features.image, features.fine, clicks)
    best = 1 + decoded.ious[:, 1:].argmax(axis=1)
    token = best if self.config.profile.mask_pointer_of_best else jnp.zeros(P, jnp.int32)
    there = (decoded.object_score_logits[:, 0] > 0) & (masks > 0).any(axis=(1, 2))
    return self.object_pointers(decoded.tokens[jnp.arange(P), token], there)

  def mask_side(self, grid: int) -> int:
    """Of the square masks that objects may be given as, for a token grid of this side."""
    return grid * (self.config.patch_size if self.config.profile.mask_prompt_of_image_side else CELL)

  def mask_to_remember(
    self,
    logits: jax.Array,
    binary: jax.Array,
    grid: int,
    direct: bool = False,
    exclusive: jax.Array | None = None,
  ) -> jax.Array:
    """float32 [P, 16h, 16w] in [-10, 10], as the memory encoder reads it.

    Args:
      logits: float32 [P, S, S] of any side. grid: side of the token grid.
      binary: bool [P], masks that were asked for: what is above 0 counts, not how far.
      direct: enlarge the logits at once, not by way of the image's side, as both references do where phrases
        are followed.
      exclusive: bool [P], masks of which a pixel belongs to the highest alone. None: none are.
    """
    x = logits if direct else resized(logits, grid * self.config.patch_size)
    if not self.config.profile.memory_mask_at_image_side or direct:
      x = resized(x, grid * CELL)
    if exclusive is not None:
      rival = jnp.where(exclusive[:, None, None], x, -jnp.inf)
      mine = rival.argmax(axis=0) == jnp.arange(len(x))[:, None, None]
      x = jnp.where(mine | ~exclusive[:, None, None], x, jnp.minimum(x, -MEMORY_SCALE))
    x = jnp.where(binary[:, None, None], (x > 0).astype(x.dtype), jax.nn.sigmoid(x))
    return resized(2 * MEMORY_SCALE * x - MEMORY_SCALE, grid * CELL)

  def encode_memory(self, features: TrackerFeatures, masks: jax.Array, present: jax.Array) -> jax.Array:
    """What to remember of a frame: [P, h, w, C].

    Args:
      features: of the frame, of 1 or P rows.
      masks: float32 [P, 16h, 16w], in [-10, 10], see `mask_to_remember`.
      present: bool [P], False where the object is hidden.
    """
    image = repeat_rows(features.image, len(masks))
    memory = self.memory_encoder(image, masks)
    absent = self.occlusion_spatial_embedding_parameter[0].astype(memory.dtype)
    return memory + jnp.where(present[:, None, None, None], 0, absent)

  def object_pointers(self, tokens: jax.Array, present: jax.Array) -> jax.Array:
    """tokens [P, D] of the chosen masks (`Decoded.tokens`), present bool [P] -> [P, D]."""
    absent = self.no_object_pointer.astype(self.dtype)
    return jnp.where(present[:, None], self.object_pointer_proj(tokens), absent)

  def init_variables(self, rng: jax.Array, trunk_width: int) -> dict:
    """Random parameters for every layer; trunk_width: of the image model's trunk."""

    def touch(self, trunk):
      features = self.get_image_features(trunk)
      one = jnp.ones((1, 1), bool)
      clicks = Clicks(jnp.zeros((1, 1, 2)), jnp.ones((1, 1), jnp.int32), one, jnp.zeros((1, 8, 8)), one[0])
      decoded = self.decode(features, clicks)
      if (m := self.config.memory) is not None:
        memory = self.encode_memory(features, jnp.zeros((1, 32, 32)), one[0])
        self.object_pointers(decoded.tokens[:, 0], one[0])
        self.temporal_positional_encoding_projection_layer(decoded.tokens[:, 0])
        self.mask_downsample(jnp.zeros((1, 32, 32, 1)))
        flat = memory.reshape(1, 4, m.hidden_size)
        started, row = self.start_memory_attention(features), flat[:, :1]
        self.memory_attention(started, flat[:, None], row, jnp.ones(1, jnp.int32), row, row, one)

    def init(rng):
      return self.init(rng, jnp.zeros((1, 2, 2, trunk_width), self.dtype), method=touch)

    return jax.jit(init)(rng)
