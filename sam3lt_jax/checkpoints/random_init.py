"""Untrained weights from a fixed seed, for trying out and for benchmarks where no checkpoint is at hand.

Drawn by numpy leaf by leaf: at full size that takes seconds, where `model.init` has to compile first.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sam3lt_jax.config import (
  DetrDecoderConfig,
  DetrEncoderConfig,
  GeometryEncoderConfig,
  MaskDecoderConfig,
  MemoryConfig,
  Sam3LiteTextConfig,
  TextConfig,
  TrackerConfig,
  VisionConfig,
)


def _tiny(**text: Any) -> Sam3LiteTextConfig:
  """A model of 4 million parameters with every kind of layer, the real vocabulary and 168 px images."""
  part = {"hidden_size": 32, "num_attention_heads": 4}
  return Sam3LiteTextConfig(
    vision=VisionConfig(
      hidden_size=64, intermediate_size=296, num_hidden_layers=4, num_attention_heads=4, image_size=168,
      window_size=4, global_attn_indexes=(1, 3), pretrain_image_size=56, fpn_hidden_size=32,
    ),
    text=TextConfig(
      **{"hidden_size": 64, "intermediate_size": 256, "projection_dim": 64, "num_attention_heads": 4, **text}
    ),
    geometry_encoder=GeometryEncoderConfig(**part, num_layers=2, intermediate_size=96),
    detr_encoder=DetrEncoderConfig(**part, num_layers=2, intermediate_size=96),
    detr_decoder=DetrDecoderConfig(**part, num_layers=2, intermediate_size=96, num_queries=20),
    mask_decoder=MaskDecoderConfig(**part),
  )  # fmt: skip


RANDOM_CONFIGS: dict[str, Callable[[], Sam3LiteTextConfig]] = {
  "s0": Sam3LiteTextConfig.s0,
  "s1": Sam3LiteTextConfig.s1,
  "l": Sam3LiteTextConfig.l,
  "sam3": Sam3LiteTextConfig.sam3,
  "tiny": lambda: _tiny(num_hidden_layers=4, use_repmixer_blocks=True),
  "tiny-s1": lambda: _tiny(num_hidden_layers=3),
  "tiny-l": lambda: _tiny(
    num_hidden_layers=2, hidden_size=96, intermediate_size=384, projection_dim=96, num_attention_heads=6
  ),
}


def tracker_config(model: Sam3LiteTextConfig) -> TrackerConfig:
  """A tracker for one of these models: SAM 3's, or one as small as the model."""
  width = model.vision.fpn_hidden_size
  if width == TrackerConfig().hidden_size:
    return TrackerConfig()
  memory = MemoryConfig(
    num_layers=2, intermediate_size=2 * width, hidden_size=width // 4, fuser_intermediate_size=2 * width
  )
  return TrackerConfig(
    hidden_size=width, patch_size=model.vision.patch_size, num_attention_heads=4, intermediate_size=2 * width,
    iou_head_hidden_size=width, memory=memory,
  )  # fmt: skip


def random_leaf(path: str, shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
  """One leaf. Depends on its path, shape and `seed` only, not on what else the model has."""
  rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
  name = path.rpartition("/")[2]
  mean, scale = 0.0, 0.02
  if name == "kernel":
    scale = float(np.prod(shape[:-1])) ** -0.5
  elif name in ("scale", "var"):
    mean, scale = 1.0, (0.1 if name == "scale" else 0.0)
  elif name == "layer_scale":
    mean = 0.1
  elif name == "positional_embedding":
    scale = 1.0  # the tracker's random frequencies
  elif name == "embedding" and "text_encoder" not in path:
    scale = 1.0  # queries, reference points, labels: what torch.nn.Embedding starts with
  value = rng.standard_normal(shape, dtype=np.float32)
  value *= np.float32(scale)
  value += np.float32(mean)
  return value.astype(dtype, copy=False)


def random_leaves(
  target: Mapping[str, Any],
  seed: int,
  place: Callable[[np.ndarray], Any],
  advance: Callable[[int], Any],
) -> dict[str, Any]:
  """A flat tree like `target`, drawn from `seed`."""
  out = {}
  for path, leaf in target.items():
    value = random_leaf(path, tuple(leaf.shape), leaf.dtype, seed)
    out[path] = place(value)
    advance(value.nbytes)
  return out
