"""MobileCLIP text encoder, and SAM 3's CLIP text tower as the same encoder with a causal mask.

RepMixer blocks (first and last layer of S0) mix tokens with depthwise convolutions over time; all other
layers are pre-norm transformer blocks. Source: MobileCLIP's text transformer as the authors of
SAM3-LiteText use it. Axes: P prompts, T tokens, D width, K kernel.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import (
  Attention,
  Dense,
  Dtype,
  LayerNorm,
  Mlp,
  Taps,
  embedding_init,
  gelu,
  param,
  tap,
)
from sam3lt_jax.ops import resize


class DepthwiseConv(nn.Module):
  """Depthwise convolution over time, zero-padded to keep the length. `kernel` [K, 1, D]."""

  kernel_size: int
  use_bias: bool = False
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """x: [P, T, D] -> [P, T, D]."""
    K, D, T = self.kernel_size, x.shape[-1], x.shape[1]
    kernel = param(self, "kernel", nn.initializers.lecun_normal(), (K, 1, D))
    kernel = kernel.astype(self.dtype)
    # A sum of shifted products: phrases are short, and grouped convolutions are slow on XLA:CPU.
    x = jnp.pad(x.astype(self.dtype), ((0, 0), (K // 2, K // 2), (0, 0)))
    y = sum(x[:, i : i + T] * kernel[i] for i in range(K))
    if self.use_bias:
      y = y + param(self, "bias", nn.initializers.zeros_init(), (D,)).astype(self.dtype)
    return y


class BatchNorm(nn.Module):
  """torch's BatchNorm over prompts and tokens: `scale`, `bias` [D]; statistics `mean`, `var` [D] float32.

  Normalises by the batch's biased variance and, as torch does and flax does not, keeps the unbiased one,
  n / (n - 1) times that with n = P * T. A tenth of the new value enters (torch's momentum 0.1). Padding
  tokens count. Over a mesh the statistics are those of the whole batch; under pmap of each device's rows.
  """

  epsilon: float
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, running: bool) -> jax.Array:
    """x: [P, T, D] -> the same shape in dtype. `running`: normalise by the statistics kept so far."""
    D = x.shape[-1]
    scale = param(self, "scale", nn.initializers.ones_init(), (D,))
    bias = param(self, "bias", nn.initializers.zeros_init(), (D,))
    kept_mean = self.variable("batch_stats", "mean", jnp.zeros, (D,), jnp.float32)
    kept_var = self.variable("batch_stats", "var", jnp.ones, (D,), jnp.float32)
    x = x.astype(jnp.float32)
    if running:
      mean, var = kept_mean.value, kept_var.value
    else:
      n = x.shape[0] * x.shape[1]
      mean = x.mean(axis=(0, 1))
      var = jnp.mean(jnp.square(x - mean), axis=(0, 1))
      if not self.is_initializing():
        kept_mean.value = 0.9 * kept_mean.value + 0.1 * mean
        kept_var.value = 0.9 * kept_var.value + 0.1 * var * (n / max(n - 1, 1))
    gain = jax.lax.rsqrt(var + self.epsilon) * scale.astype(jnp.float32)
    return ((x - mean) * gain + bias.astype(jnp.float32)).astype(self.dtype)


def batch_norm(module: nn.Module, name: str) -> BatchNorm:
  """BatchNorm with the block's eps and dtypes."""
  return BatchNorm(module.batch_norm_eps, dtype=module.dtype, param_dtype=module.param_dtype, name=name)


class MobileOneBlock(nn.Module):
  """Depthwise convolution with BatchNorm, plus a BatchNorm of the input: one convolution after folding."""

  kernel_size: int
  batch_norm_eps: float
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, running: bool) -> jax.Array:
    """x: [P, T, D] -> [P, T, D]."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    conv = DepthwiseConv(self.kernel_size, name="conv", **kw)(x)
    return batch_norm(self, "batchnorm_conv")(conv, running) + batch_norm(self, "batchnorm_skip")(x, running)


class RepMixer(nn.Module):
  """x + layer_scale * (mixer(x) - norm(x)); linear in x, so it folds into one convolution with a bias."""

  kernel_size: int
  batch_norm_eps: float
  layer_scale_init: float
  fused: bool
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, running: bool) -> jax.Array:
    """x: [P, T, D] -> [P, T, D]."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    if self.fused:
      return DepthwiseConv(self.kernel_size, use_bias=True, name="conv", **kw)(x)
    mixed = MobileOneBlock(self.kernel_size, self.batch_norm_eps, name="mixer", **kw)(x, running)
    reference = batch_norm(self, "reference_batchnorm")(x, running)
    scale = param(self, "layer_scale", nn.initializers.constant(self.layer_scale_init), (x.shape[-1],))
    return x + scale.astype(self.dtype) * (mixed - reference)


class ConvFeedForward(nn.Module):
  """Depthwise convolution with BatchNorm, then a pointwise MLP."""

  kernel_size: int
  mlp_hidden: int
  batch_norm_eps: float
  fused: bool
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, running: bool) -> jax.Array:
    """x: [P, T, D] -> [P, T, D]."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    D = x.shape[-1]
    x = DepthwiseConv(self.kernel_size, use_bias=self.fused, name="depthwise_conv", **kw)(x)
    if not self.fused:
      x = batch_norm(self, "depthwise_batchnorm")(x, running)
    return Mlp(self.mlp_hidden, D, gelu, name="mlp", **kw)(x)


class RepMixerBlock(nn.Module):
  """Token mixing, then the convolutional MLP under a layer scale (which folds into the MLP)."""

  kernel_size: int
  mlp_hidden: int
  batch_norm_eps: float
  layer_scale_init: float
  fused: bool
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, running: bool) -> jax.Array:
    """x: [P, T, D] -> [P, T, D]. `running`: BatchNorm uses running statistics."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = RepMixer(
      self.kernel_size, self.batch_norm_eps, self.layer_scale_init, self.fused, name="token_mixer", **kw
    )(x, running)
    update = ConvFeedForward(
      self.kernel_size, self.mlp_hidden, self.batch_norm_eps, self.fused, name="conv_feed_forward", **kw
    )(x, running)
    if self.fused:
      return x + update
    scale = param(self, "layer_scale", nn.initializers.constant(self.layer_scale_init), (x.shape[-1],))
    return x + scale.astype(self.dtype) * update


class TransformerBlock(nn.Module):
  """Pre-norm self-attention and MLP."""

  num_heads: int
  mlp_hidden: int
  epsilon: float
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x: [P, T, D]; mask: bool [P or 1, 1, 1 or T, S], of the first S tokens, which are attended to; None:
    all are. Returns [P, T, D].
    """
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    h = LayerNorm(self.epsilon, name="layer_norm1", **kw)(x)
    context = h if mask is None else h[:, : mask.shape[3]]
    attend = Attention(self.num_heads, out_name="out_proj", name="self_attn", **kw)
    x = x + attend(h, context, context, mask)
    h = LayerNorm(self.epsilon, name="layer_norm2", **kw)(x)
    return x + Mlp(self.mlp_hidden, x.shape[-1], gelu, name="mlp", **kw)(h)


class TextEmbeddings(nn.Module):
  """Token table plus position table; embeddings are not scaled."""

  vocab_size: int
  features: int
  max_positions: int
  position_policy: str
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, input_ids: jax.Array) -> jax.Array:
    """input_ids: int32 [P, T] -> [P, T, D].

    Raises ValueError for more tokens than position rows under position_policy="slice".
    """
    T = input_ids.shape[1]
    tokens = nn.Embed(
      self.vocab_size,
      self.features,
      embedding_init=embedding_init,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name="token_embedding",
    )(input_ids)
    table = param(self, "position_embedding", embedding_init, (self.max_positions, self.features))
    if self.position_policy == "interpolate":
      table = resize.resize_rows(table, T)
    elif self.max_positions < T:
      raise ValueError(
        f"input_ids has {T} tokens but the position table has {self.max_positions} rows; pass at most"
        f' {self.max_positions} tokens, or use position_policy="interpolate"'
      )
    return tokens + table[:T].astype(self.dtype)


class TextEncoder(nn.Module):
  """Token ids to features: MobileCLIP (`causal` False) or CLIP (`causal` True).

  `projection` is CLIP's own pooled head; the detector does not use it, checkpoints carry it.
  """

  vocab_size: int
  features: int
  num_layers: int
  num_heads: int
  mlp_hidden: int
  projection_dim: int
  max_positions: int
  epsilon: float
  position_policy: str
  mask_padding: bool
  causal: bool = False
  repmixer: bool = False
  repmixer_kernel: int = 11
  layer_scale_init: float = 1e-5
  batch_norm_eps: float = 1e-5
  fused: bool = False
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    update_batch_stats: bool = False,
    taps: Taps = None,
  ) -> jax.Array:
    """input_ids: int32 [P, T]; attention_mask: bool [P, T], True = token. Returns [P, T, D].

    Taps: text_embeddings, text_block_{i}.
    """
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    T = input_ids.shape[1]
    x = TextEmbeddings(
      self.vocab_size, self.features, self.max_positions, self.position_policy, name="embeddings", **kw
    )(input_ids)
    tap(taps, "text_embeddings", x)
    mask = attention_mask[:, None, None, :] if self.mask_padding else None
    if self.causal:
      earlier = jnp.tril(jnp.ones((1, 1, T, T), bool))
      mask = earlier if mask is None else earlier & mask
    for i in range(self.num_layers):
      if self._convolves(i):
        x = RepMixerBlock(
          kernel_size=self.repmixer_kernel,
          mlp_hidden=self.mlp_hidden,
          batch_norm_eps=self.batch_norm_eps,
          layer_scale_init=self.layer_scale_init,
          fused=self.fused,
          name=f"layers_{i}",
          **kw,
        )(x, not update_batch_stats)
      else:
        x = TransformerBlock(self.num_heads, self.mlp_hidden, self.epsilon, name=f"layers_{i}", **kw)(x, mask)
      tap(taps, f"text_block_{i}", x)
    x = LayerNorm(self.epsilon, name="final_layer_norm", **kw)(x)
    if self.is_initializing():
      Dense(self.projection_dim, use_bias=False, name="projection", **kw)(x)
    return x

  def _convolves(self, i: int) -> bool:
    return self.repmixer and i in (0, self.num_layers - 1)
