"""Layers shared by the boxes of the figure, with every default that flax and torch disagree on spelled out.

Axes: B batch, T queries, S keys, D width, N heads, H head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping
from typing import Any

import einops
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.ops import amx, attention, resize, target
from sam3lt_jax.ops.convolution import convolve

Dtype = Any
# Where a module leaves its intermediates when a caller asks for them: name -> array. None: do not collect.
Taps = MutableMapping[str, jax.Array] | None

embedding_init = nn.initializers.normal(stddev=0.02)


def tap(taps: Taps, name: str, value: jax.Array) -> None:
  """Keeps `value` under `name` when intermediates were asked for."""
  if taps is not None:
    taps[name] = value


def gelu(x: jax.Array) -> jax.Array:
  """Exact (erf) GELU; flax's default is the tanh approximation.

  In float32, rounded once, as torch computes it. flax rounds every step to x's dtype, which takes XLA:CPU
  twice as long in bfloat16; its erfc takes a TPU half as long again as the product before it.
  """
  y = x.astype(jnp.float32)
  return (0.5 * y * (1.0 + jax.lax.erf(y * np.float32(np.sqrt(0.5))))).astype(x.dtype)


def _dot(lhs: jax.Array, rhs: jax.Array, rounded: bool = True) -> jax.Array:
  """lhs [..., D_in] times rhs [D_in, D_out], accumulated in float32, in the dtype of lhs if `rounded`.

  On CPUs the float32 is asked for and rounded behind: 3-4 times faster in bfloat16, and more exact. GPUs and
  TPUs accumulate so by themselves; a GPU that is asked for it writes float32 for the next kernel to read, so
  that elsewhere the result is rounded in any case.
  """
  kind = jnp.float32 if target.current().has_cpu else None
  dimensions = (((lhs.ndim - 1,), (0,)), ((), ()))
  y = jax.lax.dot_general(lhs, rhs, dimensions, preferred_element_type=kind)
  return y.astype(lhs.dtype) if rounded else y


def param(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]) -> jax.Array:
  """`module.param(name, init, shape, module.param_dtype)`, of which a program is traced in half the time.

  flax traces the initialiser whenever a parameter is read, to learn its shape, which is known here.
  Raises `flax.errors.ScopeParamShapeError`, as flax does, where the parameter at hand has another shape.
  """
  if not module.has_variable("params", name):
    return module.param(name, init, shape, module.param_dtype)
  value = module.get_variable("params", name)
  if value.shape != shape:
    raise flax.errors.ScopeParamShapeError(name, module.scope.path_text, value.shape, shape)
  return value


class Dense(nn.Module):
  """Linear layer over the last axis. `kernel` [D_in, features], `bias` [features]."""

  features: int
  use_bias: bool = True
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, rounded: bool = True) -> jax.Array:
    """x: [..., D_in] -> [..., features] in dtype.

    rounded: False for a caller that goes on in float32 and rounds then; on CPUs it gets float32 at once.
    """
    kernel = param(self, "kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features))
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    y = _dot(x, kernel, rounded)
    if self.use_bias:
      bias = param(self, "bias", nn.initializers.zeros_init(), (self.features,))
      y = y + bias.astype(self.dtype)
    return y


def repeat_rows(x: jax.Array, rows: int) -> jax.Array:
  """x [B, ...] -> [rows, ...], each row as many times in a row as it takes; rows is a multiple of B."""
  return x if x.shape[0] == rows else jnp.repeat(x, rows // x.shape[0], axis=0)


class PatchConv(nn.Module):
  """Convolution whose stride is its kernel: a product over patches. `kernel` [p, p, D_in, features]."""

  features: int
  patch: int
  use_bias: bool = False
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, H, W, D_in] -> [B, H / p, W / p, features]."""
    B, H, W, D = x.shape
    p = self.patch
    kernel = param(self, "kernel", nn.initializers.xavier_uniform(), (p, p, D, self.features))
    x = x.astype(self.dtype).reshape(B, H // p, p, W // p, p, D)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // p, W // p, p * p * D)
    y = _dot(x, kernel.astype(self.dtype).reshape(p * p * D, -1))
    if self.use_bias:
      bias = param(self, "bias", nn.initializers.zeros_init(), (self.features,))
      y = y + bias.astype(self.dtype)
    return y


class DoublingConv(nn.Module):
  """Transposed convolution with a 2x2 kernel and stride 2. `kernel` [2, 2, D_in, features], `bias`."""

  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [..., D_in] -> [..., 4, features], the cells that x's cell becomes: out[2a + b] = x kernel[a, b].

    They stay together, since no later step on cells alone needs rows and columns: these are laid out once.
    """
    D = x.shape[-1]
    kernel = param(self, "kernel", nn.initializers.xavier_uniform(), (2, 2, D, self.features))
    bias = param(self, "bias", nn.initializers.zeros_init(), (self.features,))
    kernel = kernel.astype(self.dtype).transpose(2, 0, 1, 3).reshape(D, 4 * self.features)
    y = _dot(x.astype(self.dtype), kernel)
    return y.reshape(*x.shape[:-1], 4, self.features) + bias.astype(self.dtype)


class Conv(nn.Module):
  """Square convolution with bias. `kernel` [k, k, D_in, features]; [k, k, 1, features] where `depthwise`.

  padding: "SAME" (zeros), or so many zeros on each side.
  """

  features: int
  kernel_size: int
  padding: str | int = "SAME"
  stride: int = 1
  depthwise: bool = False
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, H, W, D_in] -> [B, H', W', features]."""
    D = x.shape[-1]
    kernel, bias = self._params(1 if self.depthwise else D)
    x = x.astype(self.dtype)
    if self.kernel_size == 1:
      y = _dot(x, kernel[0, 0])
    elif self.padding == "SAME" and self.stride == 1 and not self.depthwise:
      y = convolve(x, kernel, self.kernel_size // 2)
    else:
      padding = self.padding if isinstance(self.padding, str) else ((self.padding, self.padding),) * 2
      y = jax.lax.conv_general_dilated(
        x, kernel, (self.stride, self.stride), padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=D if self.depthwise else 1,
      )  # fmt: skip
    return y + bias

  def of_doubled(self, x: jax.Array) -> jax.Array:
    """The 3x3 convolution, without bias, of x with every cell repeated: [B, H, W, D] -> [B, 2H, 2W, F].

    Of three neighbours in the doubled map two are the same cell, so a 2x2 kernel of sums does: 4/9 of the
    products. Which sums depends on the place in the pair: [k0, k1 + k2] first, [k0 + k1, k2] second.
    """
    kernel, _ = self._params(x.shape[-1])
    B, H, W, _ = x.shape
    if target.current().is_for("tpu"):
      # All of the products: to bring the pairs together again takes a TPU longer than they save.
      return convolve(resize.doubled(x.astype(self.dtype)), kernel, 1)
    sums = lambda k: jnp.stack([k[0], k[1] + k[2], k[0] + k[1], k[2]])  # noqa: E731, [place and tap, ...]
    kernel = sums(sums(kernel.astype(jnp.float32)).swapaxes(0, 1))
    kernel = einops.rearrange(kernel, "(b v) (a u) d f -> u v d (a b f)", a=2, b=2).astype(self.dtype)
    y = convolve(x.astype(self.dtype), kernel, 1)
    y = y.reshape(B, H + 1, W + 1, 2, 2, self.features)
    pairs = [jnp.stack([y[:, a : a + H, b : b + W, a, b] for b in (0, 1)], axis=3) for a in (0, 1)]
    return jnp.stack(pairs, axis=2).reshape(B, 2 * H, 2 * W, self.features)

  def read_by(self, queries: jax.Array, x: jax.Array) -> jax.Array:
    """The products of queries [B, Q, features] with every cell of the 1x1 convolution of x [B, H, W, D]:
    float32 [B, Q, H, W].

    The kernel goes to the queries, which are fewer than the cells: the convolved map is never computed.
    """
    kernel, bias = self._params(x.shape[-1])
    q = queries.astype(self.dtype)
    turned = jnp.einsum("bqf,df->bqd", q, kernel[0, 0], preferred_element_type=jnp.float32).astype(self.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if target.current().has_cpu:
      # XLA:CPU would turn the map for the other form; to turn the products takes it half as long.
      y = product("bhwd,bqd->bhwq", x.astype(self.dtype), turned).transpose(0, 3, 1, 2)
    else:
      y = product("bqd,bhwd->bqhw", turned, x.astype(self.dtype))
    return y + (q @ bias).astype(jnp.float32)[:, :, None, None]

  @nn.compact
  def _params(self, D: int) -> tuple[jax.Array, jax.Array]:
    k = self.kernel_size
    kernel = param(self, "kernel", nn.initializers.xavier_uniform(), (k, k, D, self.features))
    bias = param(self, "bias", nn.initializers.zeros_init(), (self.features,))
    return kernel.astype(self.dtype), bias.astype(self.dtype)


class LayerNorm(nn.Module):
  """LayerNorm with statistics in float32; flax's default eps is 1e-6, torch's 1e-5."""

  epsilon: float = 1e-5
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [..., D] -> the same shape in dtype."""
    scale = param(self, "scale", nn.initializers.ones_init(), (x.shape[-1],))
    bias = param(self, "bias", nn.initializers.zeros_init(), (x.shape[-1],))
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    if not target.current().is_for("tpu"):
      # XLA makes one kernel of all this on a GPU, of the other form three.
      variance = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    else:
      # In one pass, which XLA:TPU joins to the product that wrote x. A constant row may come out below zero.
      variance = jnp.maximum(jnp.mean(x * x, axis=-1, keepdims=True) - mean * mean, 0.0)
    mean, inverse = amx.apart(mean, jax.lax.rsqrt(variance + self.epsilon))
    return ((x - mean) * inverse * scale + bias).astype(self.dtype)


class Mlp(nn.Module):
  """Two linear layers, `fc1` and `fc2`, with an activation and optional dropout between them."""

  hidden: int
  features: int
  activation: Callable[[jax.Array], jax.Array]
  dropout: float = 0.0
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
    """x: [..., D] -> [..., features]."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = self.activation(Dense(self.hidden, name="fc1", **kw)(x))
    x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
    return Dense(self.features, name="fc2", **kw)(x)


class ReluMlp(nn.Module):
  """Linear layers `{prefix}1..n` (or `{prefix}0..`) with ReLU between them; the heads of the detector."""

  widths: tuple[int, ...]
  prefix: str = "layer"
  first: int = 1
  dropout: float = 0.0  # after each ReLU
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
    """x: [..., D] -> [..., widths[-1]]."""
    for i, width in enumerate(self.widths):
      name = f"{self.prefix}{self.first + i}"
      x = Dense(width, name=name, dtype=self.dtype, param_dtype=self.param_dtype)(x)
      if i < len(self.widths) - 1:
        x = nn.Dropout(self.dropout)(nn.relu(x), deterministic=deterministic)
    return x


class Attention(nn.Module):
  """Multi-head attention with separate query, key and value inputs.

  Source: the detector's and the tracker's attention in both references. Raises ValueError if num_heads does
  not divide the inner width.
  """

  num_heads: int
  inner: int | None = None  # width of queries, keys and values, all heads together; None: D
  dropout: float = 0.0  # of attention weights
  out_name: str = "o_proj"
  remat: bool = False  # see `ops.attention.attend`
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | attention.GridBias | None = None,
    deterministic: bool = True,
  ) -> jax.Array:
    """query: [B, T, D]; key, value: [B, S, D]; mask: bool [B, 1, 1 or T, S]; bias: see `attend`.

    An input with fewer rows serves several of the others' each, and is projected once (see `repeat_rows`).
    Returns [B, T, D] in dtype.
    """
    D, rows = query.shape[-1], query.shape[0]
    if rows != key.shape[0]:  # never so in an export, whose batch is symbolic
      rows = max(rows, key.shape[0])
    inner = self.inner or D
    if inner % self.num_heads:
      raise ValueError(f"num_heads must divide the width, got {self.num_heads} heads for width {inner}")

    def project(name, x):
      x = Dense(inner, name=name, dtype=self.dtype, param_dtype=self.param_dtype)(x)
      return repeat_rows(x.reshape(*x.shape[:-1], self.num_heads, inner // self.num_heads), rows)

    q, k, v = project("q_proj", query), project("k_proj", key), project("v_proj", value)
    dropping = self.dropout > 0 and not deterministic
    out = attention.attend(
      q, k, v,
      mask=mask,
      bias=bias,
      dropout_rate=self.dropout if dropping else 0.0,
      dropout_key=self.make_rng("dropout") if dropping else None,
      remat=self.remat,
    )  # fmt: skip
    out = out.reshape(*out.shape[:2], inner)
    return Dense(D, name=self.out_name, dtype=self.dtype, param_dtype=self.param_dtype)(out)


class PreNormLayer(nn.Module):
  """Pre-norm transformer layer: attend to each other, attend to a context, MLP.

  The fusion encoder's layers (image tokens, prompt as context) and the geometry encoder's (box tokens, image
  as context) are this one. Source: SAM 3's TransformerEncoderLayer.
  """

  num_heads: int
  features: int
  mlp_hidden: int
  dropout: float = 0.0  # after each attention and after the MLP
  attention_dropout: float = 0.0
  mlp_dropout: float = 0.0
  remat: bool = False  # of the self-attention, see `ops.attention.attend`
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    attention = {"num_heads": self.num_heads, "dropout": self.attention_dropout, **kw}
    self.layer_norm1 = LayerNorm(**kw)
    self.self_attn = Attention(remat=self.remat, **attention)
    self.layer_norm2 = LayerNorm(**kw)
    self.cross_attn = Attention(**attention)
    self.layer_norm3 = LayerNorm(**kw)
    self.mlp = Mlp(self.mlp_hidden, self.features, nn.relu, self.mlp_dropout, **kw)
    self.drop = nn.Dropout(self.dropout)

  def __call__(
    self,
    x: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    positions: jax.Array | None = None,
    self_mask: jax.Array | None = None,
    cross_mask: jax.Array | None = None,
    deterministic: bool = True,
    mixed: jax.Array | None = None,
  ) -> jax.Array:
    """x: [B, T, D]; keys, values: [B, S, D] of the context; positions: [T, D], joins the queries and keys of
    the self-attention only; self_mask: bool [B, 1, 1, T]; cross_mask: bool [B, 1, 1, S]; mixed: [B, T, D],
    what `mix` makes of x, where that is known. Returns [B, T, D].
    """
    x = self.mix(x, positions, self_mask, deterministic) if mixed is None else mixed
    h = self.cross_attn(self.layer_norm2(x), keys, values, cross_mask, deterministic=deterministic)
    x = x + self.drop(h, deterministic=deterministic)
    return x + self.drop(self.mlp(self.layer_norm3(x), deterministic), deterministic=deterministic)

  def mix(self, x, positions=None, self_mask=None, deterministic: bool = True) -> jax.Array:
    """The first third, which the context has no part in; arguments as above."""
    h = self.layer_norm1(x)
    q = h if positions is None else h + positions.astype(h.dtype)
    h = self.self_attn(q, q, h, self_mask, deterministic=deterministic)
    return x + self.drop(h, deterministic=deterministic)
