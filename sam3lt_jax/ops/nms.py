"""Greedy non-maximum suppression of boxes, as a loop of static shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def box_iou(boxes: jax.Array) -> jax.Array:
  """float32 [K, 4] xyxy -> [K, K], intersection over union; 0 of two empty boxes."""
  low = jnp.maximum(boxes[:, None, :2], boxes[None, :, :2])
  high = jnp.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
  both = jnp.prod(jnp.maximum(high - low, 0), axis=-1)
  area = jnp.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
  union = area[:, None] + area[None] - both
  return jnp.where(union > 0, both / jnp.where(union > 0, union, 1), 0)


def box_nms(boxes: jax.Array, scores: jax.Array, valid: jax.Array, threshold: float) -> jax.Array:
  """Which boxes stay: from the best score down, each that overlaps none of those that stay by more.

  boxes: float32 [K, 4] xyxy; scores: float32 [K]; valid: bool [K], False for padding; threshold: IoU. Of
  equal scores the first stays. Returns bool [K]. Source: torchvision's `nms`.
  """
  K = len(scores)
  order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True)
  overlaps = box_iou(jnp.asarray(boxes)[order]) > threshold
  candidate = jnp.asarray(valid)[order]
  before = jnp.arange(K)

  def look(i, stays):
    hidden = (stays & overlaps[i] & (before < i)).any()
    return stays.at[i].set(candidate[i] & ~hidden)

  stays = jax.lax.fori_loop(0, K, look, jnp.zeros(K, bool))
  return jnp.zeros(K, bool).at[order].set(stays)
