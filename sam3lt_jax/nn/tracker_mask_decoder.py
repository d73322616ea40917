"""Mask decoder of the tracker: tokens and the image attend to each other, tokens become masks and scores.

Source: Segment Anything's mask decoder with SAM 2's object score, as both references keep it. Axes: B images,
P prompts (a multiple of B, image by image), T tokens, D width, h, w rows and columns of the image map.
"""

from __future__ import annotations

from typing import NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import (
  Attention,
  Conv,
  DoublingConv,
  Dtype,
  LayerNorm,
  Mlp,
  ReluMlp,
  Taps,
  embedding_init,
  gelu,
  repeat_rows,
  tap,
)
from sam3lt_jax.ops.stability import stability


class TwoWayLayer(nn.Module):
  """Tokens attend to themselves and to the image, the image to the tokens. Post-norm."""

  num_heads: int
  mlp_hidden: int
  inner: int  # width inside the attention between tokens and image
  first: bool  # its self-attention has neither positions nor a residual
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens, image, token_places, image_places, mask) -> tuple[jax.Array, jax.Array]:
    """tokens, token_places: [P, T, D]; image: [B or P, S, D]; image_places: [S, D]; mask: bool [P, 1, 1, T].

    Returns tokens [P, T, D] and image [P, S, D]. Rows of the image that prompts share are projected once.
    """
    D = tokens.shape[-1]
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    between = {"num_heads": self.num_heads, "inner": self.inner, **kw}
    own = Attention(self.num_heads, name="self_attn", **kw)
    if self.first:
      tokens = own(tokens, tokens, tokens, mask)
    else:
      q = tokens + token_places
      tokens = tokens + own(q, q, tokens, mask)
    tokens = LayerNorm(name="layer_norm1", **kw)(tokens)
    placed = image + image_places
    h = Attention(name="cross_attn_token_to_image", **between)(tokens + token_places, placed, image)
    tokens = LayerNorm(name="layer_norm2", **kw)(tokens + h)
    h = Mlp(self.mlp_hidden, D, nn.relu, name="mlp", **kw)(tokens)
    tokens = LayerNorm(name="layer_norm3", **kw)(tokens + h)
    h = Attention(name="cross_attn_image_to_token", **between)(placed, tokens + token_places, tokens, mask)
    return tokens, LayerNorm(name="layer_norm4", **kw)(repeat_rows(image, len(tokens)) + h)


class TwoWayTransformer(nn.Module):
  """The layers, and one last look of the tokens at the image."""

  num_layers: int
  num_heads: int
  mlp_hidden: int
  inner: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens, image, image_places, mask) -> tuple[jax.Array, jax.Array]:
    """Arguments and results as in `TwoWayLayer`; the tokens as they come in are their places."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    places = tokens
    for i in range(self.num_layers):
      layer = TwoWayLayer(self.num_heads, self.mlp_hidden, self.inner, i == 0, name=f"layers_{i}", **kw)
      tokens, image = layer(tokens, image, places, image_places, mask)
    last = Attention(self.num_heads, inner=self.inner, name="final_attn_token_to_image", **kw)
    h = last(tokens + places, image + image_places, image)
    return LayerNorm(name="layer_norm_final_attn", **kw)(tokens + h), image


class Decoded(NamedTuple):
  """What the decoder says of each prompt, by mask token: 0 for one mask, the others for several.

  Attributes:
    masks: float32 [P, M, 4h, 4w] logits.
    ious: float32 [P, M] in [0, 1], what the model expects of each mask.
    object_score_logits: float32 [P, 1], above 0 where the object is there.
    tokens: [P, M, D], which object pointers are made of.
  """

  masks: jax.Array
  ious: jax.Array
  object_score_logits: jax.Array
  tokens: jax.Array


class TrackerMaskDecoder(nn.Module):
  """Tokens in the order object score, IoU, masks, prompt."""

  features: int
  num_layers: int
  num_heads: int
  mlp_hidden: int
  inner: int
  num_masks: int  # mask tokens, the single one included
  iou_hidden: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    D, M = self.features, self.num_masks
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    head = {"prefix": "layers_", "first": 0, **kw}
    table = {"embedding_init": embedding_init, **kw}
    self.obj_score_token, self.iou_token = nn.Embed(1, D, **table), nn.Embed(1, D, **table)
    self.mask_tokens = nn.Embed(M, D, **table)
    self.transformer = TwoWayTransformer(self.num_layers, self.num_heads, self.mlp_hidden, self.inner, **kw)
    self.conv_s0, self.conv_s1 = Conv(D // 8, 1, **kw), Conv(D // 4, 1, **kw)
    self.upscale_conv1, self.upscale_conv2 = DoublingConv(D // 4, **kw), DoublingConv(D // 8, **kw)
    self.upscale_layer_norm = LayerNorm(1e-6, **kw)
    self.output_hypernetworks_mlps = [ReluMlp((D, D, D // 8), **head) for _ in range(M)]
    self.iou_prediction_head = ReluMlp((self.iou_hidden, self.iou_hidden, M), **head)
    self.pred_obj_score_head = ReluMlp((D, D, 1), **head)

  def fine(self, x4: jax.Array, x2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The neck's finer maps [B, 4h, 4w, D], [B, 2h, 2w, D] as they are added: [B, h, w, 16, D / 8] and
    [B, h, w, 4, D / 4], the cells that the coarsest map's cell is doubled to.
    """
    s1 = einops.rearrange(self.conv_s1(x2), "b (h a) (w c) d -> b h w (a c) d", a=2, c=2)
    pattern = "b (h a e) (w c f) d -> b h w (a c e f) d"
    return einops.rearrange(self.conv_s0(x4), pattern, a=2, c=2, e=2, f=2), s1

  def __call__(
    self,
    image: jax.Array,
    fine: tuple[jax.Array, jax.Array],
    image_places: jax.Array,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    taps: Taps = None,
  ) -> Decoded:
    """Decodes P prompts.

    Args:
      image: [B or P, h, w, D], with the prompt's mask (or the lack of one) added.
      fine: what `fine` made of B images.
      image_places: float32 [h, w, D].
      prompt: [P, L, D]; prompt_mask: bool [P, L].

    Returns:
      `Decoded`. Taps: twoway_tokens [P, T, D] and twoway_image [P, h, w, D].
    """
    P, M = prompt.shape[0], self.num_masks
    _, h, w, D = image.shape
    own = [t.embedding.astype(self.dtype) for t in (self.obj_score_token, self.iou_token, self.mask_tokens)]
    own = jnp.broadcast_to(jnp.concatenate(own), (P, 2 + M, D))
    tokens = jnp.concatenate([own, prompt], axis=1)
    mask = jnp.pad(prompt_mask, ((0, 0), (2 + M, 0)), constant_values=True)[:, None, None]
    places = image_places.reshape(h * w, D).astype(self.dtype)
    tokens, seen = self.transformer(tokens, image.reshape(-1, h * w, D), places, mask)
    tap(taps, "twoway_tokens", tokens)
    tap(taps, "twoway_image", seen.reshape(P, h, w, D))
    # No cell looks at another from here on: they are put in rows and columns when they are masks.
    s0, s1 = fine
    x = self.upscale_conv1(seen.reshape(P, h, w, D))
    x = gelu(self.upscale_layer_norm(_added(x, s1)))
    x = self.upscale_conv2(x).reshape(P, h, w, 16, -1)
    x = gelu(_added(x, s0))
    weights = jnp.stack([mlp(tokens[:, 2 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], 1)
    # The small result is turned, and not x, which XLA:CPU would do cell by cell together with the GELU.
    masks = jnp.einsum("phwkd,pmd->phwkm", x, weights, preferred_element_type=jnp.float32)
    masks = einops.rearrange(masks, "p h w (a c e f) m -> p m (h a e) (w c f)", a=2, c=2, e=2)
    ious = jax.nn.sigmoid(self.iou_prediction_head(tokens[:, 1]).astype(jnp.float32))
    score = self.pred_obj_score_head(tokens[:, 0]).astype(jnp.float32)
    return Decoded(masks, ious, score, tokens[:, 2 : 2 + M])


def _added(x: jax.Array, of_images: jax.Array) -> jax.Array:
  """x [P, ...] and a map of B images, each of which belongs to P / B prompts in a row."""
  B = of_images.shape[0]
  return (x.reshape(B, -1, *x.shape[1:]) + of_images[:, None]).reshape(x.shape)


def single_mask(decoded: Decoded, offset: float, least: float) -> jax.Array:
  """Which mask token answers where one mask is asked for: int32 [P].

  Token 0 where its mask is stable (`stability` of at least `least`), else that of the others with the highest
  IoU. Source: "dynamic multimask via stability" of both references.
  """
  stable = stability(decoded.masks[:, 0], offset) >= least
  return jnp.where(stable, 0, 1 + decoded.ious[:, 1:].argmax(axis=1))
