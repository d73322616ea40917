"""Memory attention of the tracker: the image map attends to itself and to what is remembered of an object.

Source: SAM 2's memory attention, as both references keep it. Axes: P objects, T tokens of the image map, S
remembered tokens, D width, C memory width.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn.layers import Dense, Dtype, LayerNorm
from sam3lt_jax.ops import attention, rope


class RopeCrossAttention(nn.Module):
  """One head, with 2-D RoPE on queries and keys; keys that are no cells of a map are not rotated."""

  features: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    tables: rope.Tables,
    rotated: int,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """query: [P, T, D]; key, value: [P, S, C]; tables: of the map's T cells; rotated: keys from the first on
    that stand for cells, a multiple of T; mask: bool [P, 1, 1, S]. Returns [P, T, D].
    """
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    q, k, v = (
      Dense(self.features, name=f"{name}_proj", **kw)(x)[:, :, None]
      for name, x in (("q", query), ("k", key), ("v", value))
    )
    P, T = query.shape[:2]
    q = rope.apply_rope(q, *tables)
    maps = k[:, :rotated].reshape(-1, T, *k.shape[2:])
    maps = rope.apply_rope(maps, *tables).reshape(P, rotated, *k.shape[2:])
    k = jnp.concatenate([maps, k[:, rotated:]], axis=1)
    out = attention.attend(q, k, v, mask=mask)[:, :, 0]
    return Dense(query.shape[-1], name="o_proj", **kw)(out)


class MemoryAttentionLayer(nn.Module):
  """Pre-norm: attend to oneself, to the memory, MLP."""

  features: int
  mlp_hidden: int
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x, memory, places, tables, rotated: int, mask=None) -> jax.Array:
    """x: [P, T, D]; memory, places: [P, S, C], places join the keys only; see `MemoryAttention`."""
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    h = LayerNorm(name="layer_norm1", **kw)(x)
    own = RopeCrossAttention(self.features, name="self_attn", **kw)
    x = x + own(h, h, h, tables, h.shape[1])
    h = LayerNorm(name="layer_norm2", **kw)(x)
    to_memory = RopeCrossAttention(self.features, name="cross_attn_image", **kw)
    x = x + to_memory(h, memory + places, memory, tables, rotated, mask)
    h = LayerNorm(name="layer_norm3", **kw)(x)
    h = nn.relu(Dense(self.mlp_hidden, name="linear1", **kw)(h))
    return x + Dense(x.shape[-1], name="linear2", **kw)(h)


class MemoryAttention(nn.Module):
  """The layers and a last LayerNorm."""

  features: int
  num_layers: int
  mlp_hidden: int
  rope_theta: float
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    image_places: jax.Array,
    memory: jax.Array,
    places: jax.Array,
    num_maps: int,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Conditions the image map on what is remembered.

    Args:
      image: [P, h, w, D]; image_places: [h, w, D], of which a tenth is added.
      memory: [P, S, C], `num_maps` maps of h * w tokens each, in rows, then object pointers.
      places: [P, S, C], joins the keys only.
      mask: bool [P, S], False for what is not there. None: all is.

    Returns:
      [P, h, w, D].
    """
    kw = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    P, h, w, D = image.shape
    x = (image + 0.1 * image_places.astype(image.dtype)).reshape(P, h * w, D)
    tables = rope.axial_rope(h, self.features, self.rope_theta)
    if mask is not None:
      mask = mask[:, None, None]
    for i in range(self.num_layers):
      layer = MemoryAttentionLayer(self.features, self.mlp_hidden, name=f"layers_{i}", **kw)
      x = layer(x, memory, places, tables, num_maps * h * w, mask)
    return LayerNorm(name="layer_norm", **kw)(x).reshape(image.shape)
