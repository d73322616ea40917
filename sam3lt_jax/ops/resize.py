"""Resizing inside the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sam3lt_jax.ops.interpolation import interpolation_matrix


def resize_rows(table: jax.Array, rows: int) -> jax.Array:
  """Linear resampling of a table [L, D] to [rows, D] (text positions under position_policy="interpolate")."""
  if table.shape[0] == rows:
    return table
  return jnp.einsum(
    "tl,ld->td", interpolation_matrix(table.shape[0], rows), table.astype(jnp.float32)
  ).astype(table.dtype)
