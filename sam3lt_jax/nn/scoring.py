"""Classification scores: pooled prompt against every query.

Source: SAM 3 dot-product scoring. Axes: P prompts, Q queries, L prompt tokens, D width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import Dense, Dtype, LayerNorm, ReluMlp

LOGIT_CLAMP = 12.0


class DotProductScoring(nn.Module):
  """Prompt tokens through a residual MLP, averaged over the valid ones, dot the projected queries.

  `hidden_dropout` acts after the MLP's ReLU (original), `output_dropout` after the MLP (transformers).
  """

  features: int
  mlp_hidden: int
  hidden_dropout: float = 0.0
  output_dropout: float = 0.0
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, queries, prompt, prompt_mask, deterministic: bool = True) -> jax.Array:
    """queries: [layers, P, Q, D]; prompt: [P, L, D]; prompt_mask: bool [P, L].

    Returns float32 logits [layers, P, Q], clamped to +-12.
    """
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    D = prompt.shape[-1]
    mlp = ReluMlp((self.mlp_hidden, D), dropout=self.hidden_dropout, name="text_mlp", **kw)
    update = nn.Dropout(self.output_dropout)(mlp(prompt, deterministic), deterministic=deterministic)
    prompt = LayerNorm(name="text_mlp_out_norm", **kw)(prompt + update).astype(jnp.float32)
    valid = prompt_mask[..., None]
    total = jnp.where(valid, prompt, 0.0).sum(axis=1)
    pooled = total / jnp.maximum(valid.sum(axis=1), 1)
    pooled = Dense(self.features, name="text_proj", **kw)(pooled).astype(jnp.float32)
    queries = Dense(self.features, name="query_proj", **kw)(queries).astype(jnp.float32)
    logits = jnp.einsum("npqd,pd->npq", queries, pooled) / jnp.sqrt(jnp.float32(self.features))
    return jnp.clip(logits, -LOGIT_CLAMP, LOGIT_CLAMP)
