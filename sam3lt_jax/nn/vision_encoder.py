"""ViT trunk ("ViT-H"): windowed attention with a few global layers, 2-D RoPE, tiled positions.

Source: SAM 3 `vitdet` trunk. Axes: B batch, H, W rows and columns of tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn import repeat
from sam3lt_jax.nn.layers import (
  Dense,
  Dtype,
  LayerNorm,
  Mlp,
  PatchConv,
  Taps,
  embedding_init,
  gelu,
  param,
  tap,
)
from sam3lt_jax.nn.neck import Neck
from sam3lt_jax.ops import attention, kernels, rope, target, windows


class RopeAttention(nn.Module):
  """Self-attention within windows or over the whole grid, with 2-D RoPE on queries and keys."""

  num_heads: int
  window: int  # 0: the whole grid
  remat: bool = False  # see `ops.attention.attend`
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, tables: rope.Tables) -> jax.Array:
    """x: [B, H, W, D]; tables: of `rope.axial_rope` for a window. Returns [B, H, W, D].

    Where the grid is not whole windows, zeros pad it and take part in attention, as in the reference.
    """
    B, H, W, D = x.shape
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    q, k, v, out = (Dense(D, name=f"{name}_proj", **kw) for name in "qkvo")
    kernel = kernels.chosen_for_windows(x, self.num_heads, self.window, tables, target.current())
    if kernel is not None:
      return out(kernel(q(x), k(x), v(x)))
    x = windows.partition(x, self.window) if self.window else x.reshape(B, H * W, D)
    heads = lambda y: y.reshape(*x.shape[:2], self.num_heads, D // self.num_heads)  # noqa: E731
    # Rounded once, behind the rotation: two thirds of the time on CPUs with AMX.
    q, k = (rope.apply_rope(heads(p(x, rounded=False)), *tables).astype(self.dtype) for p in (q, k))
    v = heads(v(x))
    x = out(attention.attend(q, k, v, remat=self.remat).reshape(x.shape))
    return windows.merge(x, self.window, H, W) if self.window else x.reshape(B, H, W, D)


class VitBlock(nn.Module):
  """Pre-norm transformer block; `window` 0 means global attention.

  `runs_on`: what the program is for, so that a block which was traced for a CPU is not taken for a TPU.
  """

  num_heads: int
  mlp_hidden: int
  window: int
  rope_window: int
  rope_theta: float
  epsilon: float
  drop_path: float = 0.0
  remat: bool = False  # of global attention, see `ops.attention.attend`
  runs_on: target.Target | None = None
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, deterministic: bool = True, drop_path: jax.Array | None = None
  ) -> jax.Array:
    """x: [B, H, W, D], H == W; drop_path: float32 [] in place of the field. Returns x's shape in dtype."""
    _, _, W, D = x.shape
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    grid = self.window or W
    tables = rope.axial_rope(grid, D // self.num_heads, self.rope_theta, self.rope_window / grid)
    h = LayerNorm(self.epsilon, name="layer_norm1", **kw)(x)
    remat = self.remat and not self.window
    h = RopeAttention(self.num_heads, self.window, remat, name="attention", **kw)(h, tables)
    x = x + self._drop_path(h, deterministic, drop_path)
    h = LayerNorm(self.epsilon, name="layer_norm2", **kw)(x)
    h = Mlp(self.mlp_hidden, D, gelu, name="mlp", **kw)(h)
    return x + self._drop_path(h, deterministic, drop_path)

  def _drop_path(self, branch: jax.Array, deterministic: bool, rate: jax.Array | None) -> jax.Array:
    """Drops the whole residual branch of a sample (stochastic depth), in training only."""
    if rate is not None and not deterministic:
      keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (len(branch), 1, 1, 1))
      return jnp.where(keep, branch / (1 - rate).astype(branch.dtype), 0)
    # broadcast_dims: one decision a sample, shared by its tokens and channels.
    return nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3))(branch, deterministic=deterministic)


# Blocks of equal fields and shapes are traced and lowered once, not 28 and 4 times.
TracedOnce = nn.jit(VitBlock, rngs=False, static_argnums=(2,))


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
    table = param(self, "position_embeddings", embedding_init, (1, P * P, self.features))
    H, W = x.shape[1:3]
    tiled = jnp.tile(table.reshape(P, P, -1), (-(-H // P), -(-W // P), 1))[:H, :W]
    return x + tiled.astype(self.dtype)


class VitTrunk(nn.Module):
  """The trunk: embeddings, LayerNorm, blocks; no norm after the last one.

  `remat`: the blocks run as scans that the backward pass repeats, see `nn.repeat`. Same parameters and
  results (with drop path: other random bits); without effect where taps are asked for.
  """

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
  remat: bool = False
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, pixels: jax.Array, deterministic: bool = True, taps: Taps = None) -> jax.Array:
    """pixels: [B, S, S, 3] -> [B, S / patch, S / patch, D]. Taps: vit_block_{i}."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = Embeddings(self.features, self.patch, self.pretrain_grid, name="embeddings", **kw)(pixels)
    x = LayerNorm(self.epsilon, name="layer_norm", **kw)(x)
    if self.remat and taps is None and not self.is_initializing():
      return self._scanned(x, deterministic)
    keep_all = deterministic or not self.drop_path
    kind = TracedOnce if keep_all and not self.is_initializing() else VitBlock
    for i in range(self.num_layers):
      rate = 0.0 if keep_all else self._rate(i)
      x = self._block(i, kind, drop_path=rate, name=f"layers_{i}")(x, keep_all)
      tap(taps, f"vit_block_{i}", x)
    return x

  def _block(self, i: int, kind: type[VitBlock] = VitBlock, **fields: Any) -> VitBlock:
    return kind(
      num_heads=self.num_heads,
      mlp_hidden=self.mlp_hidden,
      window=0 if i in self.global_layers else self.window,
      rope_window=self.window,
      rope_theta=self.rope_theta,
      epsilon=self.epsilon,
      runs_on=target.current(),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      **fields,
    )

  def _rate(self, i: int) -> float:
    """Drop path of layer i: from 0 in the first to the full rate in the last."""
    return self.drop_path * i / max(self.num_layers - 1, 1)

  def _scanned(self, x: jax.Array, deterministic: bool) -> jax.Array:
    """All blocks: a scan over repeated groups (7 windowed and 1 global layer), in it a scan over each run."""
    n = self.num_layers
    is_global = [i in self.global_layers for i in range(n)]
    size = next(p for p in range(1, n + 1) if n % p == 0 and is_global == is_global[:p] * (n // p))
    starts = [i for i in range(size) if i == 0 or is_global[i] != is_global[i - 1]]
    runs = list(zip(starts, [*starts[1:], size]))
    layers = [{"params": p} for p in repeat.layer_params(self.variables["params"], n)]
    dropping = self.drop_path > 0 and not deterministic
    if dropping:
      for i, key in enumerate(jax.random.split(self.make_rng("dropout"), n)):
        layers[i] |= {"rate": jnp.float32(self._rate(i)), "key": key}

    def run(block, x, layer):
      rngs = {"dropout": layer["key"]} if dropping else None
      return block.apply({"params": layer["params"]}, x, not dropping, layer.get("rate"), rngs=rngs), None

    def group(x, runs_of_layers):
      for (start, _), run_of_layers in zip(runs, runs_of_layers):
        step = functools.partial(run, self._block(start, remat=True, parent=None))
        x, _ = repeat.scan(step, x, run_of_layers)
      return x, None

    # [groups, layers of the run, ...], one stack a run: the inner scans read them without a copy.
    stacks = [
      repeat.stack([repeat.stack(layers[g + a : g + b], self.dtype) for g in range(0, n, size)], self.dtype)
      for a, b in runs
    ]
    return jax.lax.scan(group, x, stacks)[0]


class VisionEncoder(nn.Module):
  """Trunk and neck: pixels to the feature maps that the detector reads."""

  trunk: Mapping[str, Any]  # fields of VitTrunk
  pyramid: Mapping[str, Any]  # fields of Neck
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.backbone = VitTrunk(**self.trunk, **kw)
    self.neck = Neck(**self.pyramid, **kw)

  def __call__(
    self, pixels: jax.Array, deterministic: bool = True, taps: Taps = None
  ) -> tuple[jax.Array, ...]:
    """pixels: [B, S, S, 3] -> three maps [B, h, w, C], finest first (4, 2 and 1 times the token grid)."""
    return self.neck(self.backbone(pixels, deterministic, taps), taps)
