"""Floating point operations of the model by part, from the configuration.

Matrix products and convolutions only, a multiplication and an addition counting two, for what the outputs
need: the neck's unused level is left out, and so are RoIAlign (a gather), norms, softmax and activations.
Held against torch's own count of the reference in test_benchmarks.py.
"""

from __future__ import annotations

import itertools

from sam3lt_jax.config import Sam3LiteTextConfig, TextConfig, VisionConfig

PATCHES = "patch embedding"
WINDOWED = "windowed layers"
GLOBAL = "global layers"
NECK = "neck"
TEXT = "text encoder"
GEOMETRY = "geometry encoder"
FUSION = "fusion encoder"
DECODER = "decoder"
SCORES = "scores"
MASKS = "masks"


def by_part(
  config: Sam3LiteTextConfig, tokens: int, boxes: int, image_size: int | None = None
) -> dict[str, int]:
  """One image and one phrase of `tokens` tokens with `boxes` box slots (0: no geometry encoder)."""
  v = config.vision
  grid = (image_size or v.image_size) // v.patch_size
  prompt = tokens + (boxes + 1 if boxes else 0)
  geometry = {GEOMETRY: _geometry(config, boxes, grid * grid)} if boxes else {}
  return {
    **_trunk(v, grid),
    NECK: _neck(v, grid * grid),
    TEXT: _text(config.text, tokens, config.detr_encoder.hidden_size),
    **geometry,
    FUSION: _fusion(config, grid * grid, prompt),
    DECODER: _decoder(config, grid, prompt),
    SCORES: _scores(config, prompt),
    MASKS: _masks(config, grid * grid, prompt),
  }


def _linear(rows: int, *widths: int) -> int:
  """A chain of linear layers over `rows` rows."""
  return sum(2 * rows * a * b for a, b in itertools.pairwise(widths))


def _attention(queries: int, keys: int, width: int) -> int:
  """Four projections and two products of scores and values."""
  projections = _linear(queries, width, width, width) + _linear(keys, width, width, width)
  return projections + 4 * queries * keys * width


def _trunk(v: VisionConfig, grid: int) -> dict[str, int]:
  tokens, width, window = grid * grid, v.hidden_size, v.window_size
  mlp = _linear(tokens, width, v.intermediate_size, width)
  windows = (-(-grid // window)) ** 2  # the last row and column are padded, and the padding is attended
  windowed = windows * _attention(window * window, window * window, width) + mlp
  everywhere = _attention(tokens, tokens, width) + mlp
  count = len([i for i in v.global_attn_indexes if i < v.num_hidden_layers])
  return {
    PATCHES: _linear(tokens, v.patch_size**2 * v.num_channels, width),
    WINDOWED: (v.num_hidden_layers - count) * windowed,
    GLOBAL: count * everywhere,
  }


def _neck(v: VisionConfig, tokens: int) -> int:
  D, C, total = v.hidden_size, v.fpn_hidden_size, 0
  for scale in v.scale_factors[:-1]:
    width, rows = D, tokens
    while rows < tokens * scale**2:  # a 2x2 kernel with stride 2 that halves the width
      total += _linear(rows, width, 4 * (width // 2))
      width, rows = width // 2, 4 * rows
    rows = int(tokens * scale**2)
    total += _linear(rows, width, C) + _linear(rows, 9 * C, C)
  return total


def _text(t: TextConfig, tokens: int, features: int) -> int:
  mlp = _linear(tokens, t.hidden_size, t.intermediate_size, t.hidden_size)
  mixers = 2 if t.use_repmixer_blocks else 0
  mixer = 2 * (2 * tokens * t.repmixer_kernel_size * t.hidden_size) + mlp
  block = _attention(tokens, tokens, t.hidden_size) + mlp
  blocks = t.num_hidden_layers - mixers
  return mixers * mixer + blocks * block + _linear(tokens, t.hidden_size, features)


def _geometry(config: Sam3LiteTextConfig, boxes: int, tokens: int) -> int:
  g = config.geometry_encoder
  C, slots = g.hidden_size, boxes + 1
  embed = _linear(boxes, 4, C) + _linear(boxes, g.roi_size**2 * C, C) + _linear(boxes, C + 2, C)
  layer = (
    _attention(slots, slots, C) + _attention(slots, tokens, C) + _linear(slots, C, g.intermediate_size, C)
  )
  return embed + _linear(slots, C, C) + g.num_layers * layer


def _fusion(config: Sam3LiteTextConfig, tokens: int, prompt: int) -> int:
  e = config.detr_encoder
  C = e.hidden_size
  layer = _attention(tokens, tokens, C) + _attention(tokens, prompt, C)
  return e.num_layers * (layer + _linear(tokens, C, e.intermediate_size, C))


def _decoder(config: Sam3LiteTextConfig, grid: int, prompt: int) -> int:
  d = config.detr_decoder
  C, Q, tokens = d.hidden_size, d.num_queries, grid * grid
  rows = Q + 1  # the presence token
  attention = _attention(rows, rows, C) + _attention(rows, prompt, C) + _attention(rows, tokens, C)
  position = _linear(Q, 2 * C, C, C) + 2 * _linear(Q * grid, 2, C, d.num_attention_heads)
  heads = _linear(Q, C, C, C, 4) + _linear(1, C, C, C, 1)
  return d.num_layers * (attention + position + _linear(rows, C, d.intermediate_size, C) + heads)


def _scores(config: Sam3LiteTextConfig, prompt: int) -> int:
  d = config.detr_decoder
  C, queries = d.hidden_size, d.num_layers * d.num_queries
  pooled = _linear(prompt, C, d.intermediate_size, C) + _linear(1, C, C)
  return pooled + _linear(queries, C, C) + _linear(queries, C, 1)


def _masks(config: Sam3LiteTextConfig, tokens: int, prompt: int) -> int:
  C, Q = config.mask_decoder.hidden_size, config.detr_decoder.num_queries
  pixels = 16 * tokens
  maps = _linear(4 * tokens, 9 * C, C) + _linear(pixels, 9 * C, C)
  heads = _linear(pixels, C, C) + _linear(pixels, C, 1) + _linear(Q, C, C, C, C)
  return _attention(tokens, prompt, C) + maps + heads + _linear(Q, C, pixels)
