"""Axial rotary position embedding of the ViT trunk.

Source: SAM 3 ViT trunk; theta 10000, interleaved pairs (x0, x1), (x2, x3), ..., the first half of the head
rotates with x, the second with y. Axes: T tokens, N heads, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.ops import target

Tables = tuple[np.ndarray, np.ndarray]  # cosines and sines, each float32 [T, H / 2]


def axial_rope(grid: int, head_dim: int, theta: float, scale: float = 1.0) -> Tables:
  """Cosines and sines for a grid x grid map in raster order.

  Args:
    grid: side of the map in tokens.
    head_dim: width of a head, a multiple of 4.
    scale: positions are multiplied by it (window / grid in the global layers).

  Returns:
    (cos, sin), each float32 [grid * grid, head_dim // 2], one column a pair.

  Raises:
    ValueError: head_dim is not a multiple of 4.
  """
  if head_dim % 4:
    raise ValueError(f"head_dim must be a multiple of 4 for 2-D RoPE, got {head_dim}")
  half = head_dim // 2
  frequencies = (1.0 / theta ** (np.arange(0, half, 2, dtype=np.float32) / half)).astype(np.float32)
  positions = np.arange(grid, dtype=np.float32) * np.float32(scale)
  angles = positions[:, None] * frequencies  # [grid, H / 4]
  shape = (grid, grid, half // 2)
  x, y = np.broadcast_to(angles[None], shape), np.broadcast_to(angles[:, None], shape)
  angles = np.concatenate([x, y], axis=-1).reshape(grid * grid, half)
  return np.cos(angles), np.sin(angles)


def apply_rope(x: jax.Array, cos: np.ndarray, sin: np.ndarray) -> jax.Array:
  """Rotates the pairs of `x` [B, T, N, H] by angles [T, H // 2]; float32 inside, dtype of x outside."""
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  cos, sin = np.asarray(cos)[:, None], np.asarray(sin)[:, None]  # broadcast over heads
  if target.current().has_cpu:
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
  else:  # without a concatenation, which is a kernel of its own on GPUs; on a CPU 4 times slower in bfloat16
    rotated = pairs * cos[..., None] + pairs[..., ::-1] * np.stack([-sin, sin], axis=-1)
  return rotated.reshape(x.shape).astype(x.dtype)
