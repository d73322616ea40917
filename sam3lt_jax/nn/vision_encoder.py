"""ViT trunk ("ViT-H"): windowed attention with a few global layers, 2-D RoPE, tiled positions.

Source: SAM 3 `vitdet` trunk. Axes: B batch, H, W rows and columns of tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import (
  Dense,
  Dtype,
  LayerNorm,
  Mlp,
  PatchConv,
  Taps,
  embedding_init,
  gelu,
  tap,
)
from sam3lt_jax.nn.neck import Neck
from sam3lt_jax.ops import attention, rope, windows


class RopeAttention(nn.Module):
  """Self-attention over one window or the whole grid, with 2-D RoPE on queries and keys."""

  num_heads: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x: [B, T, D]; cos, sin: float32 [T, head width / 2]. Returns [B, T, D]."""
    B, T, D = x.shape
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def project(name):
      return Dense(D, name=name, **kw)(x).reshape(B, T, self.num_heads, D // self.num_heads)

    q = rope.apply_rope(project("q_proj"), cos, sin)
    k = rope.apply_rope(project("k_proj"), cos, sin)
    out = attention.attend(q, k, project("v_proj"))
    return Dense(D, name="o_proj", **kw)(out.reshape(B, T, D))


class VitBlock(nn.Module):
  """Pre-norm transformer block; `window` 0 means global attention.

  When the grid is not a multiple of the window, tokens are zero-padded after the norm and the padding takes
  part in attention, as in the reference.
  """

  num_heads: int
  mlp_hidden: int
  window: int
  rope_window: int
  rope_theta: float
  epsilon: float
  drop_path: float = 0.0
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
    """x: [B, H, W, D], H == W. Returns the same shape in dtype."""
    B, H, W, D = x.shape
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    grid = self.window or W
    cos, sin = rope.axial_rope(grid, D // self.num_heads, self.rope_theta, self.rope_window / grid)
    attend = RopeAttention(self.num_heads, name="attention", **kw)

    h = LayerNorm(self.epsilon, name="layer_norm1", **kw)(x)
    if self.window:
      h = windows.merge(attend(windows.partition(h, self.window), cos, sin), self.window, H, W)
    else:
      h = attend(h.reshape(B, H * W, D), cos, sin).reshape(B, H, W, D)
    x = x + self._drop_path(h, deterministic)
    h = LayerNorm(self.epsilon, name="layer_norm2", **kw)(x)
    h = Mlp(self.mlp_hidden, D, gelu, name="mlp", **kw)(h)
    return x + self._drop_path(h, deterministic)

  def _drop_path(self, branch: jax.Array, deterministic: bool) -> jax.Array:
    """Drops the whole residual branch of a sample (stochastic depth), in training only."""
    # broadcast_dims: one decision a sample, shared by its tokens and channels.
    return nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3))(branch, deterministic=deterministic)


class PatchEmbeddings(nn.Module):
  """Pixels to patches; a module of its own so that the parameter sits where checkpoints have it."""

  features: int
  patch: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """pixels: [B, H * p, W * p, 3] -> [B, H, W, D]."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    return PatchConv(self.features, self.patch, name="projection", **kw)(pixels)


class Embeddings(nn.Module):
  """Patches to tokens, plus the learned position table, tiled (not interpolated) over the grid."""

  features: int
  patch: int
  pretrain_grid: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array) -> jax.Array:
    """pixels: [B, H * p, W * p, 3] -> [B, H, W, D]."""
    P = self.pretrain_grid
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = PatchEmbeddings(self.features, self.patch, name="patch_embeddings", **kw)(pixels)
    table = self.param("position_embeddings", embedding_init, (1, P * P, self.features), self.param_dtype)
    H, W = x.shape[1:3]
    tiled = jnp.tile(table.reshape(P, P, -1), (-(-H // P), -(-W // P), 1))[:H, :W]
    return x + tiled.astype(self.dtype)


class VitTrunk(nn.Module):
  """The trunk: embeddings, LayerNorm, blocks; no norm after the last one."""

  features: int
  num_layers: int
  num_heads: int
  mlp_hidden: int
  patch: int
  window: int
  global_layers: tuple[int, ...]
  pretrain_grid: int
  rope_theta: float
  epsilon: float
  drop_path: float = 0.0
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array, deterministic: bool = True, taps: Taps = None) -> jax.Array:
    """pixels: [B, S, S, 3] -> [B, S / patch, S / patch, D]. Taps: vit_block_{i}."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = Embeddings(self.features, self.patch, self.pretrain_grid, name="embeddings", **kw)(pixels)
    x = LayerNorm(self.epsilon, name="layer_norm", **kw)(x)
    for i in range(self.num_layers):
      x = VitBlock(
        num_heads=self.num_heads,
        mlp_hidden=self.mlp_hidden,
        window=0 if i in self.global_layers else self.window,
        rope_window=self.window,
        rope_theta=self.rope_theta,
        epsilon=self.epsilon,
        drop_path=self.drop_path * i / max(self.num_layers - 1, 1),
        name=f"layers_{i}",
        **kw,
      )(x, deterministic)
      tap(taps, f"vit_block_{i}", x)
    return x


class VisionEncoder(nn.Module):
  """Trunk and neck: pixels to the feature maps that the detector reads."""

  trunk: Mapping[str, Any]  # fields of VitTrunk
  pyramid: Mapping[str, Any]  # fields of Neck
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, pixels: jax.Array, deterministic: bool = True, taps: Taps = None
  ) -> tuple[jax.Array, ...]:
    """pixels: [B, S, S, 3] -> three maps [B, h, w, C], finest first (4, 2 and 1 times the token grid)."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = VitTrunk(**self.trunk, name="backbone", **kw)(pixels, deterministic, taps)
    return Neck(**self.pyramid, name="neck", **kw)(x, taps)
