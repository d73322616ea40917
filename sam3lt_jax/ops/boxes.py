"""Boxes. The last axis is the box; functions name the format: xyxy corners, cxcywh centre and size."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cxcywh_to_xyxy(boxes: jax.Array) -> jax.Array:
  """[..., 4] (cx, cy, w, h) -> (x1, y1, x2, y2), in the same frame."""
  centre, half = boxes[..., :2], 0.5 * boxes[..., 2:]
  return jnp.concatenate([centre - half, centre + half], axis=-1)


def xyxy_to_cxcywh(boxes: jax.Array) -> jax.Array:
  """[..., 4] (x1, y1, x2, y2) -> (cx, cy, w, h), in the same frame."""
  low, high = boxes[..., :2], boxes[..., 2:]
  return jnp.concatenate([0.5 * (low + high), high - low], axis=-1)


def inverse_sigmoid(x: jax.Array, eps: float = 1e-3) -> jax.Array:
  """logit(x) for x in [0, 1], with x and 1 - x held above `eps`. Source: both references' box refinement."""
  x = jnp.clip(x, 0.0, 1.0)
  return jnp.log(jnp.maximum(x, eps) / jnp.maximum(1.0 - x, eps))


def relative_position_log(boxes: jax.Array, size: int, axis: int) -> jax.Array:
  """Log-scaled distances from every row or column of a map to both edges of a box.

  sign(8d) * log2(|8d| + 1) / 3 with d = i / size - edge: the input of the decoder's position bias. The
  cell's left edge i / size stands for the cell, not its centre, as in both references.

  Args:
    boxes: [..., 4] normalised cxcywh.
    size: cells along the axis.
    axis: 0 for x (columns), 1 for y (rows).

  Returns:
    [..., size, 2]
  """
  xyxy = cxcywh_to_xyxy(boxes)
  edges = jnp.stack([xyxy[..., axis], xyxy[..., axis + 2]], axis=-1)  # [..., 2]
  cells = jnp.arange(size, dtype=boxes.dtype)[:, None] / size
  d = 8.0 * (cells - edges[..., None, :])
  return jnp.sign(d) * jnp.log2(jnp.abs(d) + 1.0) / 3.0
