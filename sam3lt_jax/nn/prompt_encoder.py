"""Prompt encoder of the tracker: clicks, the corners of a box and a mask to what its decoder reads.

Source: Segment Anything's prompt encoder, as both references keep it. Axes: P prompts, N points, T tokens,
D width, h, w rows and columns of the image map.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import Conv, Dtype, LayerNorm, PatchConv, embedding_init, gelu, param
from sam3lt_jax.ops import positions

KINDS = 4  # of points, by label: 0 negative, 1 positive, 2 top-left and 3 bottom-right corner of a box
NOT_A_POINT = -1  # a label too: its own token, whatever its place
ZERO_TOKEN = -10  # transformers' padding: a token of zeros that takes part in attention


class FourierPositions(nn.Module):
  """Random Fourier features of places in [0, 1]; the matrix is drawn once and never trained."""

  features: int
  param_dtype: Dtype = jnp.float32

  def setup(self):
    shape = (2, self.features // 2)
    matrix = param(self, "positional_embedding", nn.initializers.normal(1.0), shape)
    self.matrix = jax.lax.stop_gradient(matrix).astype(jnp.float32)

  def __call__(self, xy: jax.Array) -> jax.Array:
    """xy: float32 [..., 2] -> float32 [..., D]."""
    return positions.fourier_code(xy, self.matrix)

  def of_cells(self, side: int) -> jax.Array:
    """Of the centres of side x side cells: float32 [side, side, D]."""
    return positions.fourier_map(side, self.matrix)


class MaskEmbedding(nn.Module):
  """A mask's logits, 4 times the image map a side, to the map's size and width."""

  features: int
  hidden: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, masks: jax.Array) -> jax.Array:
    """masks: float32 [P, 4h, 4w] -> [P, h, w, D]."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = masks[..., None]
    for i, width in ((1, self.hidden // 4), (2, self.hidden)):
      x = PatchConv(width, 2, use_bias=True, name=f"conv{i}", **kw)(x)
      x = gelu(LayerNorm(1e-6, name=f"layer_norm{i}", **kw)(x))
    return Conv(self.features, 1, name="conv3", **kw)(x)


class PromptEncoder(nn.Module):
  """Points to tokens, a mask to a map that is added to the image's.

  Slots of padding points are masked, so that a prompt's result depends neither on how many there are nor on
  what stands in them. transformers' padding (label -10) is a token of zeros instead, which is attended.
  """

  features: int
  mask_hidden: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    table = {"embedding_init": embedding_init, **kw}
    self.shared_embedding = FourierPositions(self.features, self.param_dtype)
    self.point_embed = [nn.Embed(1, self.features, **table) for _ in range(KINDS)]
    self.not_a_point_embed = nn.Embed(1, self.features, **table)
    self.no_mask_embed = nn.Embed(1, self.features, **table)
    self.mask_embed = MaskEmbedding(self.features, self.mask_hidden, **kw)

  def points(self, xy: jax.Array, labels: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Points to tokens, and one `NOT_A_POINT` behind them where there is any.

    Args:
      xy: float32 [P, N, 2], x and y in [0, 1] of the image. labels: int32 [P, N]. valid: bool [P, N], False
        for a slot that holds no point.

    Returns:
      tokens [P, N + 1, D] and their mask, bool [P, N + 1].
    """
    code = self.shared_embedding(xy).astype(self.dtype)
    kinds = jnp.concatenate([kind.embedding for kind in self.point_embed]).astype(self.dtype)
    token = code + jnp.where(labels[..., None] >= 0, kinds[jnp.clip(labels, 0, KINDS - 1)], 0)
    ends = self.not_a_point_embed.embedding.astype(self.dtype)  # [1, D]
    token = jnp.where(labels[..., None] == NOT_A_POINT, ends, token)
    token = jnp.where((labels[..., None] == ZERO_TOKEN) | ~valid[..., None], 0, token)
    last = jnp.broadcast_to(ends, (*token.shape[:1], 1, token.shape[-1]))
    any_point = valid.any(axis=1, keepdims=True)
    return jnp.concatenate([token, last], axis=1), jnp.concatenate([valid, any_point], axis=1)

  def masks(self, masks: jax.Array, given: jax.Array) -> jax.Array:
    """masks: float32 [P, 4h, 4w] logits; given: bool [P], False where a prompt has none -> [P, h, w, D]."""
    return jnp.where(given[:, None, None, None], self.mask_embed(masks), self.no_mask())

  def no_mask(self) -> jax.Array:
    """[D], added everywhere in place of a mask."""
    return self.no_mask_embed.embedding[0].astype(self.dtype)

  def image_places(self, side: int) -> jax.Array:
    """The code of every cell's centre, float32 [side, side, D]."""
    return self.shared_embedding.of_cells(side)
