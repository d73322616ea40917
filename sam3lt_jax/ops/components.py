"""Small connected parts of masks, found and changed on the device with static shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

FILLED = 0.1  # logits that a cell of a filled hole gets; a cell of a speck gets its negative


def small_components(inside: jax.Array, most: int, limit: jax.Array | None = None) -> jax.Array:
  """bool [..., h, w]: cells of the 8-connected parts of `inside` (bool [..., h, w]) that are small.

  most: small parts have up to so many cells. limit: int [...], the same of each mask, at most `most`.

  Every cell takes the smallest number among its neighbours `most - 1` times, which is enough for a small part
  to agree on one. A larger part agrees on one too and is counted, or has cells that touch another number.
  """
  *lead, h, w = inside.shape
  if most < 1:
    return jnp.zeros_like(inside)
  inside = inside.reshape(-1, h, w)
  cells = h * w
  outside = jnp.int32(cells)
  own = jnp.where(inside, jnp.arange(cells, dtype=jnp.int32).reshape(h, w), outside)

  def agree(_, numbers):
    return jnp.where(inside, _around(numbers, jnp.minimum, outside), outside)

  numbers = jax.lax.fori_loop(0, most - 1, agree, own)
  largest = _around(jnp.where(inside, numbers, -1), jnp.maximum, jnp.int32(-1))
  touches = inside & ((_around(numbers, jnp.minimum, outside) != numbers) | (largest != numbers))

  def small_of_one(numbers, touches, limit):
    flat = numbers.reshape(-1)
    # A cell that touches another part counts as more than any limit does.
    weights = jnp.where(touches.reshape(-1), most + 1, 1)
    counts = jax.ops.segment_sum(weights, flat, num_segments=cells + 1)
    return (counts <= limit)[flat].reshape(h, w)

  limit = jnp.full(len(inside), most) if limit is None else limit.reshape(-1)
  return (inside & jax.vmap(small_of_one)(numbers, touches, limit)).reshape(*lead, h, w)


def _around(x: jax.Array, pick, edge: jax.Array) -> jax.Array:
  """`pick` over each cell of [..., h, w] and its 8 neighbours; `edge` lies around."""
  for axis in (-1, -2):
    pad = [(0, 0)] * x.ndim
    pad[axis] = (1, 1)
    wide = jnp.pad(x, pad, constant_values=edge)
    n = x.shape[axis]
    before, here, after = (jax.lax.slice_in_dim(wide, k, k + n, axis=axis) for k in range(3))
    x = pick(pick(before, here), after)
  return x


def clean_small(logits: jax.Array, area: int) -> jax.Array:
  """Fills holes of up to `area` cells, then takes out specks of up to `area` cells, or of half the mask's if
  that is less.

  logits: float32 [..., h, w], on the mask above 0. Returns the same with the changed cells at +-0.1.
  Source: both references' `fill_holes_in_mask_scores`.
  """
  if area < 1:
    return logits
  logits = jnp.where(small_components(logits <= 0, area), FILLED, logits)
  inside = logits > 0
  limit = jnp.minimum(inside.sum((-1, -2)) // 2, area)
  return jnp.where(small_components(inside, area, limit), -FILLED, logits)
