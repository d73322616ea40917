"""A model small enough to compile in seconds, and how tests compile it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from sam3lt_jax import Sam3LiteText, from_pretrained
from sam3lt_jax.config import (
  DetrDecoderConfig,
  DetrEncoderConfig,
  GeometryEncoderConfig,
  MaskDecoderConfig,
  Profile,
  Sam3LiteTextConfig,
  TextConfig,
  VisionConfig,
)

OUTPUTS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
SIDE = 84  # pixels: a grid of 6, which windows of 4 do not divide
QUERIES = 6
# A program of the tests runs once or twice on tiny arrays, and compiling it is all it costs: with these a
# whole tiny model takes 1.1 s of CPU, without them 6.2. The arithmetic is the same up to the order of sums.
_HURRY = {
  "xla_backend_optimization_level": 0,
  "xla_cpu_use_fusion_emitters": False,
  "xla_cpu_parallel_codegen_split_count": 1,
}
_jit = jax.jit


@functools.cache
def compiler_options() -> dict[str, Any]:
  try:
    _jit(lambda: 0, compiler_options=_HURRY)()
  except jax.errors.JaxRuntimeError:  # another jaxlib may know other options
    return {}
  return _HURRY


def jit(function: Callable, **kwargs: Any) -> Callable:
  """`jax.jit`, compiled in a hurry."""
  if isinstance(jax.numpy.zeros(()), jax.core.Tracer):
    return _jit(function, **kwargs)  # inside another's trace, which alone takes options
  asked = kwargs.pop("compiler_options", None) or {}
  return _jit(function, compiler_options=asked | compiler_options(), **kwargs)


@contextlib.contextmanager
def hurry() -> Iterator[None]:
  """`jax.jit` is the one above: for library code that calls it at its top level."""
  compiler_options()  # found out here, outside of any trace
  jax.jit, before = jit, jax.jit
  try:
    yield
  finally:
    jax.jit = before


def config(profile: str | Profile = "original", vocab_size: int = 300, **parts: Any) -> Sam3LiteTextConfig:
  """Every kind of layer once or twice: windowed and global attention, RepMixer blocks and a plain one."""
  width = {"hidden_size": 16, "num_attention_heads": 2}
  layers = width | {"num_layers": 1, "intermediate_size": 24}
  parts = {
    "vision": VisionConfig(
      hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
      window_size=4, global_attn_indexes=(1,), pretrain_image_size=56, fpn_hidden_size=16,
    ),
    "text": TextConfig(
      vocab_size=vocab_size, hidden_size=32, intermediate_size=48, projection_dim=32, num_attention_heads=2,
      num_hidden_layers=3, use_repmixer_blocks=True,
    ),
    "geometry_encoder": GeometryEncoderConfig(**layers),
    "detr_encoder": DetrEncoderConfig(**layers),
    "detr_decoder": DetrDecoderConfig(**layers | {"num_layers": 2}, num_queries=QUERIES),
    "mask_decoder": MaskDecoderConfig(**width),
  } | parts  # fmt: skip
  return Sam3LiteTextConfig(**parts, profile=Profile.named(profile))


@functools.cache
def load(config: Sam3LiteTextConfig) -> tuple[Sam3LiteText, Any]:
  """(model, variables): random weights in which nothing is inert, BatchNorm statistics included."""
  model, variables = from_pretrained("random:tiny", config, progress=False)
  rng = np.random.default_rng(0)

  def activate(path, leaf):
    if path[0].key == "batch_stats":
      value = rng.uniform(0.5, 2, leaf.shape) if path[-1].key == "var" else rng.normal(0, 0.3, leaf.shape)
    elif path[-1].key == "bias":
      value = rng.normal(0, 0.2, leaf.shape)
    elif path[-1].key == "embedding":
      value = rng.normal(0, 1, leaf.shape)
    elif path[-1].key == "layer_scale":
      value = rng.normal(0.5, 0.1, leaf.shape)
    else:
      return leaf
    return value.astype(np.float32)

  return model, jax.tree_util.tree_map_with_path(activate, variables)


def pixels(images: int, side: int = SIDE, seed: int = 0) -> np.ndarray:
  """[images, side, side, 3] in [-1, 1]."""
  return np.random.default_rng(seed).uniform(-1, 1, (images, side, side, 3)).astype(np.float32)


def phrases(prompts: int, tokens: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """ids [prompts, tokens] and their mask; every row but the first ends in padding (id 0)."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(1, 300, (prompts, tokens)).astype(np.int32)
  lengths = np.array([tokens - i % 3 for i in range(prompts)])
  mask = (np.arange(tokens) < lengths[:, None]).astype(np.int32)
  return ids * mask, mask


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
  """Arguments of a whole call: 2 images, a phrase and 2 boxes each, one of them negative, one padding."""
  ids, mask = phrases(2, seed=seed)
  return {
    "pixel_values": pixels(2, seed=seed),
    "input_ids": ids,
    "attention_mask": mask,
    "input_boxes": np.array([[[0.5, 0.5, 0.4, 0.6], [0.2, 0.3, 0.1, 0.2]]] * 2, np.float32),
    "input_boxes_labels": np.array([[1, 0], [1, -10]], np.int32),
  }
