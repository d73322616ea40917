"""Resizing inside the model, and the separable bilinear matrices that resize masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def bilinear_matrix(in_size: int, out_size: int) -> np.ndarray:
  """Weights of 1-D linear resizing, float32 [out_size, in_size].

  Source: torch `interpolate(mode="bilinear", align_corners=False, antialias=False)`: sample i of the output
  stands at (i + 0.5) * in / out - 0.5, clamped at the low border; the high border repeats.
  """
  position = (np.arange(out_size, dtype=np.float32) + np.float32(0.5)) * np.float32(in_size / out_size)
  position = np.maximum(position - np.float32(0.5), 0.0)
  low = np.minimum(np.floor(position).astype(np.int64), in_size - 1)
  high = np.minimum(low + 1, in_size - 1)
  fraction = (position - low).astype(np.float32)
  matrix = np.zeros((out_size, in_size), np.float32)
  rows = np.arange(out_size)
  np.add.at(matrix, (rows, low), 1.0 - fraction)
  np.add.at(matrix, (rows, high), fraction)
  return matrix


def resize_rows(table: jax.Array, rows: int) -> jax.Array:
  """Linear resampling of a table [L, D] to [rows, D] (text positions under position_policy="interpolate")."""
  if table.shape[0] == rows:
    return table
  return jnp.einsum("tl,ld->td", bilinear_matrix(table.shape[0], rows), table.astype(jnp.float32)).astype(
    table.dtype
  )


def nearest_double(x: jax.Array) -> jax.Array:
  """[B, H, W, D] -> [B, 2H, 2W, D], every cell repeated."""
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
