"""Memory attention of the tracker: the image map attends to itself and to what is remembered of an object.

Scores of one remembered map and some queries are all that is ever held: written out they would be 5184 x
52,000 numbers an object. Attention weights are applied to the memory as it is, C wide, and what comes out is
projected to D: the same function with a third fewer products, as the rows of a softmax sum to 1.

Source: SAM 2's memory attention, as both references keep it. Axes: P objects, T tokens of the image map, K
remembered maps, S other remembered tokens, D width, C memory width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import Dense, Dtype, LayerNorm, param, repeat_rows
from sam3lt_jax.ops import attention, positions, rope, target


class Weights(nn.Module):
  """Those of a `Dense` layer, for a product inside of a loop, where no module may stand."""

  inputs: int
  features: int
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array]:
    """kernel [inputs, features] and bias [features]."""
    kernel = param(self, "kernel", nn.initializers.xavier_uniform(), (self.inputs, self.features))
    return kernel, param(self, "bias", nn.initializers.zeros_init(), (self.features,))


class RopeSelfAttention(nn.Module):
  """One head, with 2-D RoPE on queries and keys."""

  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, tables: rope.Tables) -> jax.Array:
    """x: [B, T, D]; tables: of its T cells. Returns [B, T, D]."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    q, k, v = (Dense(self.features, name=f"{name}_proj", **kw)(x)[:, :, None] for name in "qkv")
    q, k = (rope.apply_rope(y, *tables) for y in (q, k))
    if target.current().is_for("tpu"):
      out = attention.attend(q, k, v)[:, :, 0]  # a kernel of its own, which holds no scores either
    else:
      q, k, v = (y[:, :, 0] for y in (q, k, v))
      out = attention.attend_in_parts(q, [(k, v, jnp.ones(k.shape[:2], bool))])
    return Dense(x.shape[-1], name="o_proj", **kw)(out.astype(self.dtype))


class MemoryCrossAttention(nn.Module):
  """One head, to maps, with 2-D RoPE on queries and keys, and to other tokens, without."""

  features: int
  memory_features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x, cells, maps, map_places, count, tokens, token_places, token_mask, tables
  ) -> jax.Array:
    """x: [P, T, D]; cells: float32 [T, C], joins the keys of every map; tables: of its T cells; the rest see
    `MemoryAttention`. Returns [P, T, D].
    """
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    q = Dense(self.features, name="q_proj", **kw)(x)[:, :, None]
    q = rope.apply_rope(q, *tables)[:, :, 0]
    kernel, bias = (
      w.astype(self.dtype)
      for w in Weights(self.memory_features, self.features, self.param_dtype, name="k_proj")()
    )
    P, K, T, _ = maps.shape

    def key(memory: jax.Array, places: jax.Array) -> jax.Array:
      return (memory + places).astype(self.dtype) @ kernel + bias

    def remembered(i: jax.Array) -> attention.Part:
      there = i < count
      memory = jax.lax.dynamic_index_in_dim(maps, i, axis=1, keepdims=False).astype(self.dtype)
      memory = jnp.where(there[:, None, None], memory, 0)  # what stands in an empty place may be NaN
      row = jax.lax.dynamic_index_in_dim(map_places, i, axis=1)  # [P, 1, C]
      k = rope.apply_rope(key(memory, cells + row)[:, :, None], *tables)[:, :, 0]
      return k, memory, jnp.broadcast_to(there[:, None], (P, T))

    tokens = jnp.where(token_mask[..., None], tokens.astype(self.dtype), 0)
    first = key(tokens, jnp.where(token_mask[..., None], token_places, 0)), tokens, token_mask
    # A number that is known when it is traced makes a loop that gradients can go back through.
    most = jnp.minimum(count.max(), K) if isinstance(count, jax.Array) else min(int(count.max()), K)
    out = attention.attend_in_parts(q, [first], remembered, most)
    out = Dense(self.features, name="v_proj", **kw)(out.astype(self.dtype))
    return Dense(x.shape[-1], name="o_proj", **kw)(out)


class MemoryAttentionLayer(nn.Module):
  """Pre-norm: attend to oneself, to the memory, MLP."""

  features: int
  memory_features: int
  mlp_hidden: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.self_attn = RopeSelfAttention(self.features, **kw)
    self.cross_attn_image = MemoryCrossAttention(self.features, self.memory_features, **kw)
    self.layer_norm1, self.layer_norm2, self.layer_norm3 = (LayerNorm(**kw) for _ in range(3))
    self.linear1, self.linear2 = Dense(self.mlp_hidden, **kw), Dense(self.features, **kw)

  def to_itself(self, x: jax.Array, tables: rope.Tables) -> jax.Array:
    """x: [B, T, D] -> the same shape."""
    return x + self.self_attn(self.layer_norm1(x), tables)

  def to_memory(self, x: jax.Array, memory: tuple, tables: rope.Tables) -> jax.Array:
    """x: [P, T, D] -> the same shape; memory: see `MemoryAttention`."""
    x = x + self.cross_attn_image(self.layer_norm2(x), *memory, tables)
    return x + self.linear2(nn.relu(self.linear1(self.layer_norm3(x))))


class MemoryAttention(nn.Module):
  """The layers and a last LayerNorm, in two halves: what no object changes, and the rest."""

  features: int
  memory_features: int
  num_layers: int
  mlp_hidden: int
  rope_theta: float
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    self.layers = [
      MemoryAttentionLayer(self.features, self.memory_features, self.mlp_hidden, **kw)
      for _ in range(self.num_layers)
    ]
    self.layer_norm = LayerNorm(**kw)

  def start(self, image: jax.Array) -> jax.Array:
    """The first layer's self-attention, which sees the same whatever the object: [B, h, w, D] -> the same.

    A tenth of the places' sine code is added to the image before.
    """
    B, h, w, D = image.shape
    x = image + 0.1 * positions.map_positions(h, w, D).astype(image.dtype)
    x = self.layers[0].to_itself(x.reshape(B, h * w, D), self._tables(h))
    return x.reshape(image.shape)

  def __call__(
    self,
    started: jax.Array,
    maps: jax.Array,
    map_places: jax.Array,
    count: jax.Array,
    tokens: jax.Array,
    token_places: jax.Array,
    token_mask: jax.Array,
  ) -> jax.Array:
    """Conditions the image map on what is remembered.

    Args:
      started: [1 or P, h, w, D], what `start` gave.
      maps: [P, K, h * w, C], those that are there first.
      map_places: float32 [P, K, C], joins the keys of a map beside the sine code of its cells.
      count: int32 [P], how many maps are there. Time goes by the largest.
      tokens: [P, S, C], no cells of a map.
      token_places: [P, S, C], joins their keys. token_mask: bool [P, S], False for what is not there.

    Returns:
      [P, h, w, D].
    """
    _, h, w, D = started.shape
    x, tables = started.reshape(-1, h * w, D), self._tables(h)
    cells = positions.map_positions(h, w, self.memory_features).reshape(h * w, -1)
    memory = cells, maps, map_places, count, tokens, token_places, token_mask
    for i, layer in enumerate(self.layers):
      x = layer.to_itself(x, tables) if i else repeat_rows(x, len(maps))
      x = layer.to_memory(x, memory, tables)
    return self.layer_norm(x).reshape(-1, h, w, D)

  def _tables(self, grid: int) -> rope.Tables:
    return rope.axial_rope(grid, self.features, self.rope_theta)
