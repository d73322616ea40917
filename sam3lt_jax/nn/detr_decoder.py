"""DETR decoder: object queries to boxes and presence, refined layer by layer.

Source: SAM 3 detector. Axes: P prompts, Q queries, S = H * W image tokens, L prompt tokens, N heads, D width.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import Attention, Dtype, LayerNorm, Mlp, ReluMlp, embedding_init
from sam3lt_jax.ops import boxes as box_ops
from sam3lt_jax.ops import positions


@flax.struct.dataclass
class DecoderOutput:
  """Every layer's view; the leading axis is the layer.

  Attributes:
    hidden_states: [layers, P, Q, D] after the shared output norm.
    boxes: float32 [layers, P, Q, 4] normalised cxcywh, after that layer's refinement.
    presence_logits: float32 [layers, P, 1].
  """

  hidden_states: jax.Array
  boxes: jax.Array
  presence_logits: jax.Array


class DecoderLayer(nn.Module):
  """Post-norm: self-attention, prompt cross-attention, image cross-attention with a bias, MLP."""

  num_heads: int
  mlp_hidden: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  mlp_dropout: float = 0.0
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x, query_pos, image, image_with_pos, bias, prompt, prompt_mask, deterministic: bool = True
  ) -> jax.Array:
    """One layer.

    Args:
      x: [P, 1 + Q, D], presence token first. query_pos: the same shape, zero for the presence token.
      image, image_with_pos: [P, S, D]. bias: float32 [P, N, 1 + Q, S].
      prompt: [P, L, D]; prompt_mask: bool [P, L].

    Returns:
      [P, 1 + Q, D]
    """
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    attention = {"num_heads": self.num_heads, "dropout": self.attention_dropout, **kw}

    def add(x, update, norm):
      return LayerNorm(name=norm, **kw)(x + nn.Dropout(self.dropout)(update, deterministic=deterministic))

    q = x + query_pos
    h = Attention(name="self_attn", **attention)(q, q, x, deterministic=deterministic)
    x = add(x, h, "self_attn_layer_norm")
    mask = prompt_mask[:, None, None, :]
    h = Attention(name="text_cross_attn", **attention)(
      x + query_pos, prompt, prompt, mask, deterministic=deterministic
    )
    x = add(x, h, "text_cross_attn_layer_norm")
    h = Attention(name="vision_cross_attn", **attention)(
      x + query_pos, image_with_pos, image, bias=bias, deterministic=deterministic
    )
    x = add(x, h, "vision_cross_attn_layer_norm")
    h = Mlp(self.mlp_hidden, x.shape[-1], nn.relu, self.mlp_dropout, name="mlp", **kw)(x, deterministic)
    return add(x, h, "mlp_layer_norm")


class DetrDecoder(nn.Module):
  """The stack with its shared heads: box refinement, position of queries, relative-position bias, presence.

  `presence_clamp`: presence logits are clamped to +-this, None never (see `Profile.presence_logit_clamp`).
  """

  features: int
  num_layers: int
  num_queries: int
  num_heads: int
  mlp_hidden: int
  presence_clamp: float | None
  dropout: float = 0.0
  attention_dropout: float = 0.0
  mlp_dropout: float = 0.0
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    D, kw = self.features, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    table = {"embedding_init": embedding_init, **kw}
    self.query_embed = nn.Embed(self.num_queries, D, **table)
    self.reference_points = nn.Embed(self.num_queries, 4, **(table | {"dtype": jnp.float32}))
    self.presence_token = nn.Embed(1, D, **table)
    self.layers = [
      DecoderLayer(
        self.num_heads,
        self.mlp_hidden,
        self.dropout,
        self.attention_dropout,
        self.mlp_dropout,
        **kw,
      )
      for _ in range(self.num_layers)
    ]
    self.output_layer_norm = LayerNorm(**kw)
    self.ref_point_head = ReluMlp((D, D), **kw)
    self.box_head = ReluMlp((D, D, 4), **kw)
    self.box_rpb_embed_x = ReluMlp((D, self.num_heads), **kw)
    self.box_rpb_embed_y = ReluMlp((D, self.num_heads), **kw)
    self.presence_layer_norm = LayerNorm(**kw)
    self.presence_head = ReluMlp((D, D, 1), **kw)

  def __call__(
    self,
    image: jax.Array,
    image_positions: jax.Array,
    prompt: jax.Array,
    prompt_mask: jax.Array,
    deterministic: bool = True,
  ) -> DecoderOutput:
    """image: [P, H, W, D] encoder output; image_positions: [H, W, D]; prompt: [P, L, D], its mask [P, L]."""
    P, H, W, D = image.shape
    flat = image.reshape(P, H * W, D)
    with_pos = flat + image_positions.reshape(H * W, D).astype(flat.dtype)
    x = jnp.concatenate([self.presence_token.embedding, self.query_embed.embedding]).astype(self.dtype)
    x = jnp.broadcast_to(x, (P, *x.shape))
    reference = jax.nn.sigmoid(self.reference_points.embedding.astype(jnp.float32))
    boxes = jnp.broadcast_to(reference, (P, *reference.shape))
    outputs = []
    steering = boxes
    for layer in self.layers:
      query_pos = self.ref_point_head(positions.box_code(steering, D // 2).astype(self.dtype))
      query_pos = jnp.pad(query_pos, ((0, 0), (1, 0), (0, 0)))  # nothing for the presence token
      bias = self._position_bias(steering, H, W)
      x = layer(x, query_pos, flat, with_pos, bias, prompt, prompt_mask, deterministic)
      hidden = self.output_layer_norm(x[:, 1:])
      delta = self.box_head(hidden).astype(jnp.float32)
      # Equal values, different gradients: a prediction reaches back one layer ("look forward twice"), the
      # boxes that steer the next layer carry no gradient.
      predicted = jax.nn.sigmoid(box_ops.inverse_sigmoid(boxes) + delta)
      boxes = jax.nn.sigmoid(box_ops.inverse_sigmoid(steering) + delta)
      steering = jax.lax.stop_gradient(boxes)
      outputs.append((hidden, predicted, self._presence(x)))
    hidden, boxes, presence = (jnp.stack(values) for values in zip(*outputs))
    return DecoderOutput(hidden_states=hidden, boxes=boxes, presence_logits=presence)

  def _presence(self, x: jax.Array) -> jax.Array:
    """[P, 1 + Q, D] -> float32 [P, 1]."""
    logits = self.presence_head(self.presence_layer_norm(x[:, 0])).astype(jnp.float32)
    if self.presence_clamp is not None:
      logits = jnp.clip(logits, -self.presence_clamp, self.presence_clamp)
    return logits

  def _position_bias(self, boxes: jax.Array, height: int, width: int) -> jax.Array:
    """[P, Q, 4] cxcywh -> float32 [P, N, 1 + Q, H * W]; zero row for the presence token."""
    x = self.box_rpb_embed_x(box_ops.relative_position_log(boxes, width, axis=0))  # [P, Q, W, N]
    y = self.box_rpb_embed_y(box_ops.relative_position_log(boxes, height, axis=1))  # [P, Q, H, N]
    x, y = (a.astype(jnp.float32).transpose(0, 3, 1, 2) for a in (x, y))  # [P, N, Q, W or H]
    bias = y[..., :, None] + x[..., None, :]
    bias = bias.reshape(*bias.shape[:3], height * width)
    return jnp.pad(bias, ((0, 0), (0, 0), (1, 0), (0, 0)))
