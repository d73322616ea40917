"""Mask decoder: pixel embeddings, instance masks and the semantic map.

Source: SAM 3 segmentation head (MaskFormer's pixel decoder). Axes: P prompts, Q queries, L prompt tokens,
h, w rows and columns of a map, D width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import Attention, Conv, Dtype, LayerNorm, ReluMlp, Taps, tap
from sam3lt_jax.ops import target


class PixelDecoder(nn.Module):
  """Coarse to fine: nearest upsampling, the backbone's map added, 3x3 convolution, GroupNorm, ReLU.

  Checkpoints carry three stages; with three maps only two of them run.
  """

  features: int
  num_stages: int
  num_groups: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.conv_layers = [Conv(self.features, 3, **kw) for _ in range(self.num_stages)]
    self.norms = [
      nn.GroupNorm(self.num_groups, epsilon=1e-5, use_fast_variance=not target.current().has_cpu, **kw)
      for _ in range(self.num_stages)
    ]

  def __call__(self, convolved: tuple[jax.Array, ...], x: jax.Array) -> jax.Array:
    """convolved: the finer maps through `convolve`, [P, h, w, D], finest first, each twice the next; x: the
    coarsest, half the last of them. Returns the finest size.
    """
    for stage, finer in enumerate(reversed(convolved)):
      x = nn.relu(self.norms[stage](self.conv_layers[stage].of_doubled(x) + finer))
    if self.is_initializing():
      for stage in range(len(convolved), self.num_stages):
        self.norms[stage](self.conv_layers[stage](x))
    return x

  def convolve(self, maps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The backbone's maps [B, h, w, D], finest first, each through the convolution that it would be added
    before: a convolution is linear, so that the sum can as well be taken behind it.
    """
    return tuple(self.conv_layers[len(maps) - 1 - i](x) for i, x in enumerate(maps))


class MaskDecoder(nn.Module):
  """The encoder's map attends to the prompt, replaces the x1 map and is refined to 4 times the token grid."""

  features: int
  num_heads: int
  num_stages: int
  num_groups: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    D = self.features
    self.prompt_cross_attn_norm = LayerNorm(**kw)
    self.prompt_cross_attn = Attention(self.num_heads, **kw)
    self.pixel_decoder = PixelDecoder(D, self.num_stages, self.num_groups, **kw)
    self.instance_projection = Conv(D, 1, **kw)
    self.mask_embedder = ReluMlp((D, D, D), prefix="layers_", first=0, **kw)
    self.semantic_projection = Conv(1, 1, **kw)

  def __call__(
    self,
    queries: jax.Array,
    convolved: tuple[jax.Array, ...],
    encoded: jax.Array,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    taps: Taps = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Masks of every query.

    Args:
      queries: [P, Q, D], the decoder's last hidden states.
      convolved: the finer levels of the neck through `convolve`, [P, h, w, D], finest first, without x1.
      encoded: [P, h, w, D], the encoder's output at x1.
      prompt: [P, L, D]; prompt_mask: bool [P, L].

    Returns:
      pred_masks [P, Q, h, w] and semantic_seg [P, 1, h, w], float32 logits. Taps: pixel_embed.
    """
    P, H, W, D = encoded.shape
    flat = encoded.reshape(P, H * W, D)
    h = self.prompt_cross_attn_norm(flat)
    h = self.prompt_cross_attn(h, prompt, prompt, prompt_mask[:, None, None, :])
    encoded = (flat + h).reshape(P, H, W, D)
    pixel = self.pixel_decoder(convolved, encoded)
    tap(taps, "pixel_embed", pixel)
    masks = self.instance_projection.read_by(self.mask_embedder(queries), pixel)
    semantic = self.semantic_projection(pixel)
    return masks, semantic.astype(jnp.float32).transpose(0, 3, 1, 2)

  def convolve(self, maps: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """See `PixelDecoder.convolve`."""
    return self.pixel_decoder.convolve(maps)
