"""How much a mask depends on its threshold. Source: segment-anything's `calculate_stability_score`."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def stability(masks: jax.Array, offset: float) -> jax.Array:
  """How little a mask depends on its threshold: the area above `offset` by the area above -`offset`.

  masks: float32 [..., h, w] logits -> float32 [...]; 1 where nothing is above -offset.
  """
  inner = (masks > offset).sum(axis=(-2, -1), dtype=jnp.float32)
  outer = (masks > -offset).sum(axis=(-2, -1), dtype=jnp.float32)
  return jnp.where(outer > 0, inner / jnp.maximum(outer, 1.0), 1.0)
