"""Memory encoder of the tracker: an object's mask on a frame, with the frame, to a small map to remember.

Source: SAM 2's memory encoder, as both references keep it. Axes: P objects, H, W rows and columns of the
mask, h, w of the image map (H / 16, W / 16), D width, C memory width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import Conv, Dense, Dtype, LayerNorm, gelu, param

DOWNSAMPLINGS = 4  # each halves the mask's sides and makes its channels four times as many


class MaskDownsampler(nn.Module):
  """A mask 16 times the image map a side, to the map's size and width."""

  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, masks: jax.Array) -> jax.Array:
    """masks: float32 [P, H, W] -> [P, h, w, D]."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = masks[..., None]
    for i in range(DOWNSAMPLINGS):
      x = Conv(4 ** (i + 1), 3, padding=1, stride=2, name=f"layers_{i}_conv", **kw)(x)
      x = gelu(LayerNorm(1e-6, name=f"layers_{i}_layer_norm", **kw)(x))
    return Conv(self.features, 1, name="final_conv", **kw)(x)


class FuserBlock(nn.Module):
  """A ConvNeXt block. `scale`: [D], of the branch."""

  hidden: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [P, h, w, D] -> the same shape."""
    D = x.shape[-1]
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    h = Conv(D, 7, depthwise=True, name="depthwise_conv", **kw)(x)
    h = LayerNorm(1e-6, name="layer_norm", **kw)(h)
    h = gelu(Dense(self.hidden, name="pointwise_conv1", **kw)(h))
    h = Dense(D, name="pointwise_conv2", **kw)(h)
    scale = param(self, "scale", nn.initializers.constant(1e-6), (D,))
    return x + scale.astype(self.dtype) * h


class MemoryEncoder(nn.Module):
  """Mask and image map, summed, mixed by two blocks and projected to the memory's width."""

  features: int
  memory_features: int
  num_blocks: int
  block_hidden: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, image: jax.Array, masks: jax.Array) -> jax.Array:
    """image: [P, h, w, D], the neck's x1 map; masks: float32 [P, 16h, 16w] in [-10, 10] -> [P, h, w, C]."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = Conv(self.features, 1, name="feature_projection", **kw)(image)
    x = x + MaskDownsampler(self.features, name="mask_downsampler", **kw)(masks)
    for i in range(self.num_blocks):
      x = FuserBlock(self.block_hidden, name=f"memory_fuser_layers_{i}", **kw)(x)
    return Conv(self.memory_features, 1, name="projection", **kw)(x)
