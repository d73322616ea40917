"""Fusion (DETR) encoder: image tokens attend to themselves and to the prompt.

Source: SAM 3 detector. Axes: P prompts, S image tokens, L prompt tokens, D width.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.nn import repeat
from sam3lt_jax.nn.layers import Dtype, PreNormLayer


class FusionEncoder(nn.Module):
  """A stack of pre-norm layers; no norm at the end.

  `remat`: the layers run as a scan that the backward pass repeats, see `nn.repeat`. Same parameters and
  results (with dropout: other random bits).
  """

  num_layers: int
  num_heads: int
  features: int
  mlp_hidden: int
  dropout: float = 0.0
  attention_dropout: float = 0.0
  mlp_dropout: float = 0.0
  remat: bool = False
  dtype: Dtype = jnp.float32
  param_dtype: Dtype = jnp.float32

  def setup(self):
    self.layers = [self._layer() for _ in range(self.num_layers)]

  def __call__(
    self, image, positions, prompt, prompt_mask, deterministic: bool = True, mixed: jax.Array | None = None
  ) -> jax.Array:
    """image: [P, S, D]; positions: [S, D]; prompt: [P, L, D]; prompt_mask: bool [P, L]; mixed: [P, S, D],
    what `mix` makes of the image, where that is known. Returns [P, S, D].
    """
    if self.remat and mixed is None and not self.is_initializing():
      return self._scanned(image, positions, prompt, prompt_mask, deterministic)
    for layer in self.layers:
      image = self._call(layer, image, positions, prompt, prompt_mask, deterministic, mixed)
      mixed = None
    return image

  def mix(self, image, positions) -> jax.Array:
    """What the first layer does before it looks at the prompt, without dropout: [B, S, D] -> [B, S, D]."""
    return self.layers[0].mix(image, positions)

  def _layer(self, **fields) -> PreNormLayer:
    return PreNormLayer(
      self.num_heads,
      self.features,
      self.mlp_hidden,
      self.dropout,
      self.attention_dropout,
      self.mlp_dropout,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      **fields,
    )

  def _call(self, layer, image, positions, prompt, prompt_mask, deterministic: bool, mixed=None):
    mask = prompt_mask[:, None, None, :]
    return layer(
      image, prompt, prompt, positions=positions, cross_mask=mask, deterministic=deterministic, mixed=mixed
    )

  def _scanned(self, image, positions, prompt, prompt_mask, deterministic: bool) -> jax.Array:
    block = self._layer(remat=True, parent=None)
    layers = repeat.layer_params(self.variables["params"], self.num_layers)
    xs = {"params": repeat.stack(layers, self.dtype)}
    if not deterministic and self.has_rng("dropout"):
      xs["rngs"] = {"dropout": jax.random.split(self.make_rng("dropout"), self.num_layers)}

    def step(image, layer):
      apply = functools.partial(block.apply, {"params": layer["params"]}, rngs=layer.get("rngs"))
      return self._call(apply, image, positions, prompt, prompt_mask, deterministic), None

    return repeat.scan(step, image, xs)[0]
