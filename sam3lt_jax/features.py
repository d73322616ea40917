"""What passes from the encoders to the detector and the tracker, and may be kept for other prompts or images.

Axes: B images, P prompts, T text tokens, N boxes or points, D width, h, w rows and columns of a map.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class VisionFeatures:
  """What an image becomes: all that the detector computes of it whatever the prompt.

  Attributes:
    image: [B, h, w, D], the neck's coarsest map, one cell a token (72 x 72 at 1008 px).
    mixed: [B, h, w, D], the same after the self-attention of the fusion encoder's first layer; None in
      training with dropout or `remat`, where every prompt computes its own.
    convolved: the neck's finer maps, [B, 4h, 4w, D] and [B, 2h, 2w, D], each through the convolution of the
      pixel decoder that it would be added before.
    tracker: what the same image is for a `Sam3Tracker`; None where there is none, or nobody will ask it.
    trunk: [B, h, w, D_trunk], what that is made of; None likewise.
    without_boxes: [B, 1, D], the prompt token of the geometry encoder where a prompt has no boxes; None where
      the profile has no such token, and in training as `mixed`.
  """

  image: jax.Array
  mixed: jax.Array | None
  convolved: tuple[jax.Array, ...]
  tracker: TrackerFeatures | None = None
  trunk: jax.Array | None = None
  without_boxes: jax.Array | None = None


@flax.struct.dataclass
class TextFeatures:
  """What a phrase becomes. Names follow transformers, whose `pooler_output` is a whole sequence here.

  Attributes:
    last_hidden_state: [P, T, text width] after the text encoder's final LayerNorm.
    pooler_output: [P, T, D] tokens projected to the detector's width; what the detector reads.
    attention_mask: bool [P, T], True for tokens of the phrase.
  """

  last_hidden_state: jax.Array
  pooler_output: jax.Array
  attention_mask: jax.Array


@flax.struct.dataclass
class Prompts:
  """What is asked, as the detector reads it: one row a prompt.

  Attributes:
    tokens: [P, T, D], the phrases' `TextFeatures.pooler_output`.
    mask: bool [P, T], True for tokens of the phrase.
    boxes: float32 [P, N, 4], example boxes, normalised cxcywh; N may be 0.
    labels: int32 [P, N], 1 positive, 0 negative, -10 padding.
    image_index: int32 [P], which image each prompt is for; None: see `Sam3LiteText.__call__`.
  """

  tokens: jax.Array
  mask: jax.Array
  boxes: jax.Array
  labels: jax.Array
  image_index: jax.Array | None = None


@flax.struct.dataclass
class Detections:
  """What prompts found in their images, before anything is left out. Leading axes may be more than P.

  Attributes:
    scores: float32 [P, Q] in [0, 1], presence included.
    boxes: float32 [P, Q, 4], normalised xyxy, not clipped to the image.
    masks: float32 [P, Q, h, w] logits, h = w = 4 times the token grid.
  """

  scores: jax.Array
  boxes: jax.Array
  masks: jax.Array


@flax.struct.dataclass
class TrackerFeatures:
  """What an image becomes for the tracker: all that does not depend on the prompt.

  Attributes:
    image: [B, h, w, D], the coarsest map of the tracker's neck, one cell a token (72 x 72 at 1008 px).
    fine: [B, h, w, 16, D / 8] and [B, h, w, 4, D / 4], the finer maps as the mask decoder adds them.
  """

  image: jax.Array
  fine: tuple[jax.Array, jax.Array]

  @property
  def mask_side(self) -> int:
    """Of the square masks that the tracker gives and takes."""
    return 4 * self.image.shape[1]


@flax.struct.dataclass
class Clicks:
  """What is asked of the tracker: one object a row.

  Attributes:
    points: float32 [P, N, 2], x and y from 0 to 1 of the image. A box is two of them, its corners.
    labels: int32 [P, N], 1 on the object, 0 off it, 2 and 3 a box's top-left and bottom-right corner, -1
      no point (a token of its own), -10 padding as transformers has it.
    valid: bool [P, N], False for a slot that holds nothing.
    masks: float32 [P, 4h, 4w], logits of a mask to start from; None: no prompt has one.
    has_mask: bool [P], which prompts have one.
    image_index: int32 [P], which image each prompt is for; None: as many prompts for each, image by image.
  """

  points: jax.Array
  labels: jax.Array
  valid: jax.Array
  masks: jax.Array | None = None
  has_mask: jax.Array | None = None
  image_index: jax.Array | None = None


@flax.struct.dataclass
class Memory:
  """What is remembered of P objects on one frame, as memory attention reads it: `video.bank.choose` makes it.

  Attributes:
    maps: bfloat16 [P, K, h * w, C], those that are there first, in any order.
    rows: int32 [P, K], which row of the table of ages each map gets.
    count: int32 [P], how many maps are there.
    pointers: [P, L, D], in any order.
    distances: float32 [P, L], frames between the pointer's and this one, as a share of the most.
    there: bool [P, L], which pointers are.
  """

  maps: jax.Array
  rows: jax.Array
  count: jax.Array
  pointers: jax.Array
  distances: jax.Array
  there: jax.Array


@flax.struct.dataclass
class Tracked:
  """What the tracker says of P objects on one frame.

  Attributes:
    masks: float32 [P, 4h, 4w] logits, -1024 everywhere where the object is not there.
    pointers: [P, D], what stands for the object.
    object_score_logits: float32 [P], above 0 where it is there.
    ious: float32 [P] in [0, 1], the IoU with the true mask that the model expects.
  """

  masks: jax.Array
  pointers: jax.Array
  object_score_logits: jax.Array
  ious: jax.Array


def image_of_each_prompt(
  maps: Sequence[jax.Array | None], prompts: int, image_index: jax.Array | None
) -> tuple[jax.Array | None, ...]:
  """The maps [B, h, w, D] rearranged to one row a prompt, [P, h, w, D]; None stays None."""
  images = maps[0].shape[0]
  if image_index is not None:
    image_index = jnp.asarray(image_index)
    if image_index.ndim != 1 or prompts not in (1, image_index.shape[0]):
      raise ValueError(f"image_index must be [P] with P = {prompts} prompts, got {tuple(image_index.shape)}")
    return jax.tree.map(lambda m: jnp.take(m, image_index, axis=0), tuple(maps))
  if images == prompts or prompts == 1:
    return tuple(maps)
  if images == 1:
    return jax.tree.map(lambda m: jnp.broadcast_to(m, (prompts, *m.shape[1:])), tuple(maps))
  raise ValueError(f"{prompts} prompts for {images} images: pass image_index, one image number a prompt")
