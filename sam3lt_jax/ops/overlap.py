"""Who has which pixel where masks of several objects overlap. Axes: P objects, h, w a mask, H, W larger."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sam3lt_jax.ops.interpolation import interpolation_matrix

STRIPS = 16  # in so many parts a large mask is made, so that it is never there as a whole


def shared_pixels(masks: jax.Array, others: jax.Array) -> jax.Array:
  """bool [..., N, h, w] and [..., M, h, w] -> float32 [..., N, M], the pixels that they share; exact."""
  flat = (m.reshape(*m.shape[:-2], -1).astype(jnp.bfloat16) for m in (masks, others))
  return jnp.einsum("...ni,...mi->...nm", *flat, preferred_element_type=jnp.float32)


def areas_among_others(
  logits: jax.Array, group: jax.Array, rank: jax.Array, side: int | None = None
) -> tuple[jax.Array, jax.Array]:
  """Pixels of each object's mask, and how many of them no other object of its group has a higher logit at.

  Args:
    logits: float32 [P, h, w].
    group: int32 [P], from 0 to P - 1; only objects of one group compete.
    rank: int32 [P], of equal logits the lowest rank wins.
    side: the areas are those of masks enlarged to [side, side], a multiple of 16; None: as they are.

  Returns:
    int32 [P] each.
  """
  P, h, w = logits.shape

  def count(logits):
    mine = logits == jax.ops.segment_max(logits, group, P)[group]
    first = jax.ops.segment_min(jnp.where(mine, rank[:, None, None], P), group, P)[group]
    inside = logits > 0
    return inside.sum((1, 2)), (inside & mine & (rank[:, None, None] == first)).sum((1, 2))

  if side is None:
    return count(logits)
  rows = interpolation_matrix(h, side).reshape(STRIPS, side // STRIPS, h)
  columns = interpolation_matrix(w, side)
  highest = jax.lax.Precision.HIGHEST
  wide = jnp.einsum("phw,Ww->phW", logits, columns, precision=highest)
  before, after = jax.lax.map(
    lambda strip: count(jnp.einsum("phW,Hh->pHW", wide, strip, precision=highest)), rows
  )
  return before.sum(0), after.sum(0)


def keeps_area(
  before: jax.Array, after: jax.Array, group: jax.Array, ratio: float, spare_single: bool = False
) -> jax.Array:
  """bool [P]: objects that keep at least `ratio` of their area among the others; an empty one never does.

  spare_single: an object alone in its group always does. The others as in `areas_among_others`.
  Source: both references' `_suppress_object_pw_area_shrinkage`.
  """
  members = jax.ops.segment_sum(jnp.ones(len(group), jnp.int32), group, len(group))[group]
  return (after / jnp.maximum(before, 1) >= ratio) | (spare_single & (members < 2))
