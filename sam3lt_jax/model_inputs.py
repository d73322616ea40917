"""Checks and layout of what `Sam3LiteText` is called with.

Axes: B images, P prompts, T text tokens, N boxes, h, w rows and columns of a map, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def token_mask(attention_mask, shape) -> jax.Array:
  """attention_mask as bool, checked against `shape`; None: all are tokens."""
  if attention_mask is None:
    return jnp.ones(shape, bool)
  attention_mask = jnp.asarray(attention_mask)
  if tuple(attention_mask.shape) != tuple(shape):
    raise ValueError(
      f"attention_mask must be {tuple(shape)} like the tokens, got {tuple(attention_mask.shape)}"
    )
  return attention_mask.astype(bool)


def check_boxes(boxes, labels, prompts: int) -> tuple[jax.Array, jax.Array]:
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
