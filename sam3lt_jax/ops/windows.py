"""Windows of a feature map. Axes: B batch, H, W rows and columns of tokens, D width, w window side."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange


def partition(x: jax.Array, window: int) -> jax.Array:
  """[B, H, W, D] -> [B * windows, w * w, D], zero-padded at the bottom and right to whole windows."""
  pad_h, pad_w = -x.shape[1] % window, -x.shape[2] % window
  if pad_h or pad_w:
    x = jnp.pad(x, ((0, 0), (0, pad_h), (0, pad_w), (0, 0)))
  return rearrange(x, "b (h p) (w q) d -> (b h w) (p q) d", p=window, q=window)


def merge(windows: jax.Array, window: int, height: int, width: int) -> jax.Array:
  """Undoes `partition` for a map of `height` x `width` tokens; the padding is cut off."""
  rows, columns = -(-height // window), -(-width // window)
  x = rearrange(windows, "(b h w) (p q) d -> b (h p) (w q) d", h=rows, w=columns, p=window, q=window)
  return x[:, :height, :width]
