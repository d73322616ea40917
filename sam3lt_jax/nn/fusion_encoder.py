"""Fusion (DETR) encoder: image tokens attend to themselves and to the prompt.

Source: SAM 3 detector. Axes: P prompts, S image tokens, L prompt tokens, D width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import Attention, Dtype, LayerNorm, Mlp


class FusionLayer(nn.Module):
  """Pre-norm; the position code joins queries and keys of the self-attention only."""

  num_heads: int
  mlp_hidden: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  mlp_dropout: float = 0.0
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, image, positions, prompt, prompt_mask, deterministic: bool = True) -> jax.Array:
    """image: [P, S, D]; positions: [S, D]; prompt: [P, L, D]; prompt_mask: bool [P, L]. Returns [P, S, D]."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}

    def drop(x):
      return nn.Dropout(self.dropout)(x, deterministic=deterministic)

    attention = {"num_heads": self.num_heads, "dropout": self.attention_dropout, **kw}
    h = LayerNorm(name="layer_norm1", **kw)(image)
    with_pos = h + positions.astype(h.dtype)
    h = Attention(name="self_attn", **attention)(with_pos, with_pos, h, deterministic=deterministic)
    image = image + drop(h)
    h = LayerNorm(name="layer_norm2", **kw)(image)
    mask = prompt_mask[:, None, None, :]
    h = Attention(name="cross_attn", **attention)(h, prompt, prompt, mask, deterministic=deterministic)
    image = image + drop(h)
    h = LayerNorm(name="layer_norm3", **kw)(image)
    h = Mlp(self.mlp_hidden, image.shape[-1], nn.relu, self.mlp_dropout, name="mlp", **kw)(h, deterministic)
    return image + drop(h)


class FusionEncoder(nn.Module):
  """The stack; no norm at the end."""

  num_layers: int
  num_heads: int
  mlp_hidden: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  mlp_dropout: float = 0.0
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, image, positions, prompt, prompt_mask, deterministic: bool = True) -> jax.Array:
    """Axes as in `FusionLayer`; returns [P, S, D]."""
    for i in range(self.num_layers):
      image = FusionLayer(
        self.num_heads,
        self.mlp_hidden,
        self.dropout,
        self.attention_dropout,
        self.mlp_dropout,
        name=f"layers_{i}",
        dtype=self.dtype,
        param_dtype=self.param_dtype,
      )(image, positions, prompt, prompt_mask, deterministic)
    return image
