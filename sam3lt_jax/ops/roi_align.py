"""RoIAlign as two small matrix products.

Bilinear sampling on a regular grid separates into rows and columns, and so does the average of the
samples of a bin. So each box becomes a [bins, H] and a [bins, W] matrix of weights, with no gather and
with static shapes, which is what a compiler for accelerators wants.

Source: torchvision's compiled `roi_align` (C++/CUDA), aligned=False, sampling_ratio=-1. Its pure-Python
twin differs for samples outside the map; we follow the compiled one, as the released weights did.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Boxes up to this many times the size of the map are sampled exactly as the reference does; larger ones
# keep the number of samples of that size.
MAX_BOX_TO_MAP = 4


def axis_weights(low: jax.Array, high: jax.Array, size: int, bins: int) -> jax.Array:
  """Weights of the cells of one axis for each bin of each box.

  Args:
    low, high: float32 [...], the box's edges in cells of the map.
    size: cells along the axis.
    bins: output bins.

  Returns:
    float32 [..., bins, size]. A sample below -1 or above `size` counts as zero, any other is clamped to
    the border, and ceil(length / bins) samples are averaged in a bin; a length under one cell counts as one.
  """
  length = jnp.maximum(high - low, 1.0)
  most = -(-MAX_BOX_TO_MAP * size // bins)
  count = jnp.clip(jnp.ceil(length / bins), 1, most)[..., None, None]  # [..., 1, 1]
  bin_size = (length / bins)[..., None, None]
  bin_index = jnp.arange(bins, dtype=jnp.float32)[:, None]
  sample = jnp.arange(most, dtype=jnp.float32)
  position = low[..., None, None] + bin_size * (bin_index + (sample + 0.5) / count)  # [..., bins, most]
  counts = (sample < count) & (position >= -1.0) & (position <= size)
  nearest = jnp.clip(position, 0.0, size - 1.0)
  cells = jnp.arange(size, dtype=jnp.float32)
  hat = jnp.maximum(1.0 - jnp.abs(nearest[..., None] - cells), 0.0)  # [..., bins, most, size]
  return jnp.sum(jnp.where(counts[..., None], hat, 0.0), axis=-2) / count


def roi_align(features: jax.Array, boxes: jax.Array, bins: int) -> jax.Array:
  """Average features of each bin of each box.

  Args:
    features: [B, H, W, D].
    boxes: float32 [B, N, 4], xyxy in cells of the map.
    bins: output side.

  Returns:
    [B, N, bins, bins, D] in the dtype of `features`.
  """
  _, H, W, _ = features.shape
  x = axis_weights(boxes[..., 0], boxes[..., 2], W, bins).astype(features.dtype)
  y = axis_weights(boxes[..., 1], boxes[..., 3], H, bins).astype(features.dtype)
  rows = jnp.einsum("bnph,bhwd->bnpwd", y, features, preferred_element_type=jnp.float32)
  out = jnp.einsum("bnqw,bnpwd->bnpqd", x.astype(jnp.float32), rows)
  return out.astype(features.dtype)
