"""Resizing inside the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.ops.interpolation import antialias_matrix, interpolation_matrix


def resize_rows(table: jax.Array, rows: int) -> jax.Array:
  """Linear resampling of a table [L, D] to [rows, D] (text positions under position_policy="interpolate")."""
  if table.shape[0] == rows:
    return table
  return jnp.einsum(
    "tl,ld->td", interpolation_matrix(table.shape[0], rows), table.astype(jnp.float32)
  ).astype(table.dtype)


def resized(maps: jax.Array, *size: int) -> jax.Array:
  """Maps [P, H, W] enlarged bilinearly or shrunk with antialiasing, float32 [P, height, width].

  size: height and width, or one number for both. Source: torch's `interpolate`, as both references call it.
  """
  height, width = size * (2 // len(size))
  rows, columns = (
    interpolation_matrix(n, to) if to >= n else antialias_matrix(n, to)
    for n, to in zip(maps.shape[1:], (height, width))
  )
  if maps.shape[1:] == (height, width):
    return maps
  x = jnp.einsum("ih,phw->piw", rows, maps.astype(jnp.float32), precision="highest")
  return jnp.einsum("jw,piw->pij", columns, x, precision="highest")


def doubled(x: jax.Array) -> jax.Array:
  """x: [B, H, W, D] -> [B, 2H, 2W, D], every cell four times.

  As sums over windows of the cells with zeros between them, each of which holds one cell: the TPU's compiler
  estimates fewer cycles for it than for a repetition, whose pairs it lays out anew.
  """
  twice, sides = (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
  zero = np.zeros((), x.dtype)  # known while it is traced: of any other sum JAX has no gradient
  return jax.lax.reduce_window(x, zero, jax.lax.add, twice, (1, 1, 1, 1), sides, base_dilation=twice)
