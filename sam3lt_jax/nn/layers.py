"""Layers shared by the boxes of the figure, with every default that flax and torch disagree on spelled out.

Axes: B batch, T queries, S keys, D width, N heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.ops import attention

Dtype = Any
# Where a module leaves its intermediates when a caller asks for them: name -> array. None: do not collect.
Taps = MutableMapping[str, jax.Array] | None

embedding_init = nn.initializers.normal(stddev=0.02)


def tap(taps: Taps, name: str, value: jax.Array) -> None:
  """Keeps `value` under `name` when intermediates were asked for."""
  if taps is not None:
    taps[name] = value


def gelu(x: jax.Array) -> jax.Array:
  """Exact (erf) GELU; flax's default is the tanh approximation."""
  return nn.gelu(x, approximate=False)


def _dot_f32(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None):
  """A matrix product accumulated in float32: 3-4 times faster on XLA:CPU in bfloat16, and more exact."""
  del preferred_element_type
  out = jax.lax.dot_general(
    lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=jnp.float32
  )
  return out.astype(lhs.dtype)


class Dense(nn.Module):
  """Linear layer over the last axis. `kernel` [D_in, features], `bias` [features]."""

  features: int
  use_bias: bool = True
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [..., D_in] -> [..., features] in dtype."""
    kernel = self.param(
      "kernel", nn.initializers.xavier_uniform(), (x.shape[-1], self.features), self.param_dtype
    )
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    y = _dot_f32(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
      y = y + bias.astype(self.dtype)
    return y


class PatchConv(nn.Module):
  """Convolution whose stride is its kernel, without bias: a matrix product over patches.

  `kernel` [p, p, D_in, features].
  """

  features: int
  patch: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, H, W, D_in] -> [B, H / p, W / p, features]."""
    B, H, W, D = x.shape
    p = self.patch
    kernel = self.param(
      "kernel", nn.initializers.xavier_uniform(), (p, p, D, self.features), self.param_dtype
    )
    x = x.astype(self.dtype).reshape(B, H // p, p, W // p, p, D)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // p, W // p, p * p * D)
    return _dot_f32(x, kernel.astype(self.dtype).reshape(p * p * D, -1), (((3,), (0,)), ((), ())))


class DoublingConv(nn.Module):
  """Transposed convolution with a 2x2 kernel and stride 2. `kernel` [2, 2, D_in, features], `bias`."""

  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, H, W, D_in] -> [B, 2H, 2W, features]; out[2i+a, 2j+b] = x[i, j] kernel[a, b]."""
    B, H, W, D = x.shape
    kernel = self.param(
      "kernel", nn.initializers.xavier_uniform(), (2, 2, D, self.features), self.param_dtype
    )
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
    kernel = kernel.astype(self.dtype).transpose(2, 0, 1, 3).reshape(D, 4 * self.features)
    y = _dot_f32(x.astype(self.dtype), kernel, (((3,), (0,)), ((), ())))
    y = y.reshape(B, H, W, 2, 2, self.features).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(B, 2 * H, 2 * W, self.features) + bias.astype(self.dtype)


class Conv(nn.Module):
  """Square convolution with stride 1 and bias. `kernel` [k, k, D_in, features].

  padding: "SAME" (zeros) or "VALID".
  """

  features: int
  kernel_size: int
  padding: str = "SAME"
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [B, H, W, D_in] -> [B, H', W', features]."""
    k, D = self.kernel_size, x.shape[-1]
    kernel = self.param(
      "kernel", nn.initializers.xavier_uniform(), (k, k, D, self.features), self.param_dtype
    )
    bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), self.param_dtype)
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    if k == 1:
      y = _dot_f32(x, kernel[0, 0], (((3,), (0,)), ((), ())))
    else:
      y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
      )
    return y + bias.astype(self.dtype)


class LayerNorm(nn.Module):
  """LayerNorm with statistics in float32; flax's default eps is 1e-6, torch's 1e-5."""

  epsilon: float = 1e-5
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [..., D] -> the same shape in dtype."""
    scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), self.param_dtype)
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
    return (x * scale + bias).astype(self.dtype)


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

  Source: the detector's attention in both references. Raises ValueError if num_heads does not divide D.
  """

  num_heads: int
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
    bias: jax.Array | None = None,
    deterministic: bool = True,
  ) -> jax.Array:
    """query: [B, T, D]; key, value: [B, S, D]; mask: bool [B, 1, 1 or T, S]; bias: [B, N, T, S].

    Returns [B, T, D] in dtype.
    """
    D = query.shape[-1]
    if D % self.num_heads:
      raise ValueError(f"num_heads must divide the width, got {self.num_heads} heads for width {D}")

    def project(name, x):
      x = Dense(D, name=name, dtype=self.dtype, param_dtype=self.param_dtype)(x)
      return x.reshape(*x.shape[:-1], self.num_heads, D // self.num_heads)

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
    out = out.reshape(*query.shape[:-1], D)
    return Dense(D, name=self.out_name, dtype=self.dtype, param_dtype=self.param_dtype)(out)


class PreNormLayer(nn.Module):
  """Pre-norm transformer layer: attend to each other, attend to a context, MLP.

  The fusion encoder's layers (image tokens, prompt as context) and the geometry encoder's (box tokens, image
  as context) are this one. Source: SAM 3's TransformerEncoderLayer.
  """

  num_heads: int
  mlp_hidden: int
  dropout: float = 0.0  # after each attention and after the MLP
  attention_dropout: float = 0.0
  mlp_dropout: float = 0.0
  remat: bool = False  # of the self-attention, see `ops.attention.attend`
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
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
  ) -> jax.Array:
    """x: [B, T, D]; keys, values: [B, S, D] of the context; positions: [T, D], joins the queries and keys of
    the self-attention only; self_mask: bool [B, 1, 1, T]; cross_mask: bool [B, 1, 1, S]. Returns [B, T, D].
    """
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def drop(x):
      return nn.Dropout(self.dropout)(x, deterministic=deterministic)

    def attend(name, *args, remat=False):
      layer = Attention(self.num_heads, dropout=self.attention_dropout, remat=remat, name=name, **kw)
      return drop(layer(*args, deterministic=deterministic))

    h = LayerNorm(name="layer_norm1", **kw)(x)
    q = h if positions is None else h + positions.astype(h.dtype)
    x = x + attend("self_attn", q, q, h, self_mask, remat=self.remat)
    h = LayerNorm(name="layer_norm2", **kw)(x)
    x = x + attend("cross_attn", h, keys, values, cross_mask)
    h = LayerNorm(name="layer_norm3", **kw)(x)
    h = Mlp(self.mlp_hidden, x.shape[-1], nn.relu, self.mlp_dropout, name="mlp", **kw)(h, deterministic)
    return x + drop(h)
