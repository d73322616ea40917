"""Neck: the last ViT map at four scales, each projected to the detector's width.

Source: SAM 3's simple feature pyramid. Axes: B batch, H, W rows and columns, D trunk width, C neck width.
"""

from __future__ import annotations

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import Conv, DoublingConv, Dtype, Taps, gelu, tap


class NeckLevel(nn.Module):
  """One scale: doubling convolutions or pooling, then a 1x1 and a 3x3 convolution."""

  features: int
  scale: float
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, H, W, D] -> [B, scale * H, scale * W, C]. Raises ValueError for another scale."""
    D = x.shape[-1]
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    if self.scale == 4.0:
      x = gelu(DoublingConv(D // 2, name="scale_layers_0", **kw)(x))
      x = DoublingConv(D // 4, name="scale_layers_2", **kw)(x)
    elif self.scale == 2.0:
      x = DoublingConv(D // 2, name="scale_layers_0", **kw)(x)
    elif self.scale == 0.5:
      x = nn.max_pool(x, (2, 2), (2, 2))
    elif self.scale != 1.0:
      raise ValueError(f"scale_factors may hold 4.0, 2.0, 1.0 and 0.5, got {self.scale}")
    x = _laid_out(Conv(self.features, 1, name="proj1", **kw)(x))  # where the map is narrowest
    return Conv(self.features, 3, name="proj2", **kw)(x)


def _laid_out(x: jax.Array) -> jax.Array:
  """[B, H, W, C], or with the cells of one doubling, or of two, before C: in rows and columns."""
  match x.ndim:
    case 5:
      return einops.rearrange(x, "b h w (a c) d -> b (h a) (w c) d", a=2, c=2)
    case 6:
      return einops.rearrange(x, "b h w (a c) (e f) d -> b (h a e) (w c f) d", a=2, c=2, e=2, f=2)
  return x


class Neck(nn.Module):
  """All scales. The detector reads every level but the last (x0.5), whose weights exist all the same."""

  features: int
  scales: tuple[float, ...]
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.fpn_layers = [NeckLevel(self.features, scale, **kw) for scale in self.scales]

  def __call__(self, x: jax.Array, taps: Taps = None) -> tuple[jax.Array, ...]:
    """x: [B, H, W, D] -> maps [B, h, w, C], finest first. Taps: neck_{i}, the unused level included."""
    used = [level(x) for level in self.fpn_layers[:-1]]
    for i, level in enumerate(used):
      tap(taps, f"neck_{i}", level)
    if taps is not None or self.is_initializing():
      unused = self.fpn_layers[-1](x)
      tap(taps, f"neck_{len(used)}", unused)
    return tuple(used)
