"""DETR decoder: object queries to boxes and presence, refined layer by layer.

Source: SAM 3 detector. Axes: P prompts, Q queries, S = H * W image tokens, L prompt tokens, N heads, D width.
"""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from sam3lt_jax.nn import repeat
from sam3lt_jax.nn.layers import Attention, Dtype, LayerNorm, Mlp, ReluMlp
from sam3lt_jax.ops import attention, positions, target
from sam3lt_jax.ops import boxes as box_ops


@flax.struct.dataclass
class DecoderOutput:
  """Every layer's view; the leading axis is the layer.

  Attributes:
    hidden_states: [layers, P, Q, D] after the shared output norm; with one_to_many [layers, P, 2Q, D].
    boxes: float32 [layers, P, Q, 4] normalised cxcywh, after that layer's refinement; 2Q with one_to_many.
    presence_logits: float32 [layers, P, 1].
  """

  hidden_states: jax.Array
  boxes: jax.Array
  presence_logits: jax.Array


class DecoderLayer(nn.Module):
  """Post-norm: self-attention, prompt cross-attention, image cross-attention with a bias, MLP.

  `talking`: how many leading rows attend to each other (None: all); the rest pass by, see `DetrDecoder`.
  """

  num_heads: int
  mlp_hidden: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  mlp_dropout: float = 0.0
  talking: int | None = None
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x,
    query_pos,
    image,
    image_with_pos,
    bias,
    prompt,
    prompt_mask,
    deterministic: bool = True,
    row_mask: jax.Array | None = None,
  ) -> jax.Array:
    """One layer.

    Args:
      x: [P, 1 + Q, D], presence token first. query_pos: the same shape, zero for the presence token.
        row_mask: bool [1 + Q], False for rows of padding; None: there are none.
      image, image_with_pos: [P, S, D]. bias: [P, N, 1 + Q, S] as a `GridBias`.
      prompt: [P, L, D]; prompt_mask: bool [P, L].

    Returns:
      [P, 1 + Q, D]
    """
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    options = {"num_heads": self.num_heads, "dropout": self.attention_dropout, **kw}

    def add(x, update, norm):
      return LayerNorm(name=norm, **kw)(x + nn.Dropout(self.dropout)(update, deterministic=deterministic))

    q, v = (a[:, : self.talking] for a in (x + query_pos, x))
    mask = None if row_mask is None else row_mask[None, None, None]
    h = Attention(name="self_attn", **options)(q, q, v, mask, deterministic=deterministic)
    h = jnp.pad(h, ((0, 0), (0, x.shape[1] - h.shape[1]), (0, 0)))
    x = add(x, h, "self_attn_layer_norm")
    mask = prompt_mask[:, None, None, :]
    h = Attention(name="text_cross_attn", **options)(
      x + query_pos, prompt, prompt, mask, deterministic=deterministic
    )
    x = add(x, h, "text_cross_attn_layer_norm")
    h = Attention(name="vision_cross_attn", **options)(
      x + query_pos, image_with_pos, image, bias=bias, deterministic=deterministic
    )
    x = add(x, h, "vision_cross_attn_layer_norm")
    h = Mlp(self.mlp_hidden, x.shape[-1], nn.relu, self.mlp_dropout, name="mlp", **kw)(x, deterministic)
    return add(x, h, "mlp_layer_norm")


class DetrDecoder(nn.Module):
  """The stack with its shared heads: box refinement, position of queries, relative-position bias, presence.

  `one_to_many` (training): every query runs a second time, in rows that leave out self-attention and so
  cannot learn who else has found the object. Several of them may be matched to one object, which gives the
  shared weights many more positive examples. Source: SAM 3's training, after DAC-DETR (arXiv 2310.07685).

  `presence_clamp`: presence logits are clamped to +-this, None never (see `Profile.presence_logit_clamp`).
  `remat`: the layers run as a scan that the backward pass repeats, see `nn.repeat`. Same parameters and
  results (with dropout: other random bits).
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
  one_to_many: bool = False
  remat: bool = False
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    D, kw = self.features, {"dtype": self.dtype, "param_dtype": self.param_dtype}
    # Where training starts from: queries and reference points spread, as torch's nn.Embedding draws them.
    table = {"embedding_init": nn.initializers.normal(1.0), **kw}
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
        1 + self.num_queries if self.one_to_many else None,
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
    runs = 2 if self.one_to_many else 1
    queries = jnp.tile(self.query_embed.embedding, (runs, 1))
    x = jnp.concatenate([self.presence_token.embedding, queries]).astype(self.dtype)
    if not (target.current().has_cpu or self.one_to_many):
      # Masked rows behind: else a GPU gets a kernel for each product that fills its rows up to eights, 9% of
      # a prompt's kernels (`python -m tpu.gpu`).
      x = jnp.pad(x, ((0, -len(x) % 8), (0, 0)))
    x = jnp.broadcast_to(x, (P, *x.shape))
    reference = jax.nn.sigmoid(self.reference_points.embedding.astype(jnp.float32))
    reference = jnp.tile(reference, (runs, 1))
    boxes = jnp.broadcast_to(reference, (P, *reference.shape))
    context = (flat, with_pos, prompt, prompt_mask)
    if self.remat and not self.is_initializing():
      return DecoderOutput(*self._scanned((x, boxes, boxes), context, (H, W), deterministic))
    state, outputs = (x, boxes, boxes), []
    for i in range(self.num_layers):
      state, output = self._refine(i, state, context, (H, W), deterministic)
      outputs.append(output)
    return DecoderOutput(*(jnp.stack(values) for values in zip(*outputs)))

  def _refine(self, i: int, state, context, size: tuple[int, int], deterministic: bool):
    """Layer i: (tokens, boxes, steering boxes) -> the same refined, and (hidden, boxes, presence logits)."""
    x, boxes, steering = state
    flat, with_pos, prompt, prompt_mask = context
    query_pos = self.ref_point_head(positions.box_code(steering, self.features // 2).astype(self.dtype))
    behind = 1 + boxes.shape[1]  # where padding starts
    padding = x.shape[1] - behind
    query_pos = jnp.pad(query_pos, ((0, 0), (1, padding), (0, 0)))  # nothing for the presence token
    bias = self._position_bias(steering, *size, padding)
    mask = jnp.arange(x.shape[1]) < behind if padding else None
    x = self.layers[i](x, query_pos, flat, with_pos, bias, prompt, prompt_mask, deterministic, mask)
    hidden = self.output_layer_norm(x[:, 1:behind])
    delta = self.box_head(hidden).astype(jnp.float32)
    # Equal values, different gradients: a prediction reaches back one layer ("look forward twice"), the
    # boxes that steer the next layer carry no gradient.
    predicted = jax.nn.sigmoid(box_ops.inverse_sigmoid(boxes) + delta)
    boxes = jax.nn.sigmoid(box_ops.inverse_sigmoid(steering) + delta)
    return (x, boxes, jax.lax.stop_gradient(boxes)), (hidden, predicted, self._presence(x))

  def _scanned(self, state, context, size: tuple[int, int], deterministic: bool):
    """`_refine` of every layer as one scan, through a decoder of one layer."""
    one = self.clone(num_layers=1, remat=False, parent=None)
    params = self.variables["params"]
    layers = repeat.layer_params(params, self.num_layers)
    shared = {name: value for name, value in params.items() if not name.startswith("layers_")}
    xs = {"params": repeat.stack(layers, self.dtype)}
    if not deterministic and self.has_rng("dropout"):
      xs["rngs"] = {"dropout": jax.random.split(self.make_rng("dropout"), self.num_layers)}

    def step(state, layer):
      variables = {"params": shared | {"layers_0": layer["params"]}}
      call = (0, state, context, size, deterministic)
      return one.apply(variables, *call, rngs=layer.get("rngs"), method="_refine")

    return repeat.scan(step, state, xs)[1]

  def _presence(self, x: jax.Array) -> jax.Array:
    """[P, 1 + Q, D] -> float32 [P, 1]."""
    logits = self.presence_head(self.presence_layer_norm(x[:, 0])).astype(jnp.float32)
    if self.presence_clamp is not None:
      logits = jnp.clip(logits, -self.presence_clamp, self.presence_clamp)
    return logits

  def _position_bias(self, boxes: jax.Array, height: int, width: int, padding: int) -> attention.GridBias:
    """[P, Q, 4] cxcywh -> bias [P, N, 1 + Q + padding, H * W]; zero rows for what is no query."""
    x = self.box_rpb_embed_x(box_ops.relative_position_log(boxes, width, axis=0))  # [P, Q, W, N]
    y = self.box_rpb_embed_y(box_ops.relative_position_log(boxes, height, axis=1))  # [P, Q, H, N]
    x, y = (a.astype(jnp.float32).transpose(0, 3, 1, 2) for a in (x, y))  # [P, N, Q, W or H]
    x, y = (jnp.pad(a, ((0, 0), (0, 0), (1, padding), (0, 0))) for a in (x, y))
    return attention.GridBias(vertical=y, horizontal=x)
