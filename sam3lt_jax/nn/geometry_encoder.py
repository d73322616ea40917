"""Geometry encoder: example boxes to prompt tokens.

Source: SAM 3 geometry encoder (boxes only; point prompts belong to the tracker). Axes: P prompts,
N boxes, H, W rows and columns of the x1 map, S = H * W, D width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import Dense, Dtype, LayerNorm, PatchConv, PreNormLayer, embedding_init
from sam3lt_jax.ops import boxes as box_ops
from sam3lt_jax.ops import positions, roi_align


class GeometryEncoder(nn.Module):
  """A box becomes its coordinates, the pooled image inside it, its position code and its label, summed.

  A CLS token is appended. Slots of padding boxes keep their place and are masked; order does not matter
  to attention, so the references' left-packing is not needed.
  """

  features: int
  num_layers: int
  num_heads: int
  mlp_hidden: int
  roi_size: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  mlp_dropout: float = 0.0
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    boxes: jax.Array,
    labels: jax.Array,
    box_mask: jax.Array,
    cls_mask: jax.Array,
    image: jax.Array,
    image_positions: jax.Array,
    deterministic: bool = True,
  ) -> tuple[jax.Array, jax.Array]:
    """Boxes to tokens.

    Args:
      boxes: float32 [P, N, 4] normalised cxcywh. labels: int32 [P, N], 1 positive, 0 negative.
      box_mask: bool [P, N], False for padding. cls_mask: bool [P], False hides the CLS token.
      image: [P, H, W, D] x1 map. image_positions: [H, W, D].

    Returns:
      tokens [P, N + 1, D] and their mask, bool [P, N + 1].
    """
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    P, H, W, D = image.shape
    mask = jnp.concatenate([box_mask, cls_mask[:, None]], axis=1)
    table = {"embedding_init": embedding_init, **kw}
    cls = nn.Embed(1, D, name="cls_embed", **table)(jnp.zeros((P, 1), jnp.int32))
    tokens = jnp.concatenate([self._embed_boxes(boxes, labels, image), cls], axis=1)
    tokens = LayerNorm(name="prompt_layer_norm", **kw)(Dense(self.features, name="final_proj", **kw)(tokens))

    flat = image.reshape(P, H * W, D)
    with_pos = flat + image_positions.reshape(H * W, D).astype(flat.dtype)
    for i in range(self.num_layers):
      tokens = PreNormLayer(
        self.num_heads,
        D,
        self.mlp_hidden,
        self.dropout,
        self.attention_dropout,
        self.mlp_dropout,
        name=f"layers_{i}",
        **kw,
      )(tokens, with_pos, flat, self_mask=mask[:, None, None, :], deterministic=deterministic)
    return LayerNorm(name="output_layer_norm", **kw)(tokens), mask

  def _embed_boxes(self, boxes: jax.Array, labels: jax.Array, image: jax.Array) -> jax.Array:
    """[P, N, 4] boxes, [P, N] labels, [P, H, W, D] image -> [P, N, D]."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    P, N = boxes.shape[:2]
    _, H, W, D = image.shape
    x = Dense(self.features, name="boxes_direct_project", **kw)(boxes)
    normed = LayerNorm(name="vision_layer_norm", **kw)(image)
    cells = box_ops.cxcywh_to_xyxy(boxes) * jnp.asarray([W, H, W, H], jnp.float32)
    pooled = roi_align.roi_align(normed, cells, self.roi_size)
    pooled = pooled.reshape(P * N, self.roi_size, self.roi_size, D)
    pool = PatchConv(self.features, self.roi_size, use_bias=True, name="boxes_pool_project", **kw)
    x = x + pool(pooled).reshape(P, N, self.features)
    code = positions.centre_code(boxes, self.features // 2)
    x = x + Dense(self.features, name="boxes_pos_enc_project", **kw)(code)
    label = nn.Embed(2, self.features, embedding_init=embedding_init, name="label_embed", **kw)
    return x + label(jnp.clip(labels, 0, 1))
