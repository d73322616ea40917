"""How large a model is, part by part, and what tells it from another."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sam3lt_jax.checkpoints.engine import flatten

_SAMPLES = 64  # values of each array that tell one model from another
# Top-level names of the tree -> the part they count as, in the order of the architecture.
PARTS = {
  "vision_encoder": "vision encoder",
  "text_encoder": "text encoder",
  "text_projection": "text encoder",
  "geometry_encoder": "geometry encoder",
  "detr_encoder": "fusion encoder",
  "detr_decoder": "decoder",
  "dot_product_scoring": "scoring",
  "mask_decoder": "mask decoder",
}


@dataclasses.dataclass(frozen=True)
class PartSize:
  """Parameters of one part, and the bytes of its parameters and statistics."""

  name: str
  parameters: int
  bytes: int


def parameter_summary(variables: Mapping[str, Any]) -> list[PartSize]:
  """Parameters and bytes of every part, and last of the whole (`name="total"`).

  Args:
    variables: the model's variables; shapes and dtypes alone do (`jax.eval_shape`). Statistics of BatchNorm
      (`batch_stats`) count as bytes, not as parameters, as in torch.
  """
  sizes: dict[str, list[int]] = {}
  for path, leaf in flatten(variables).items():
    collection, name, *_ = path.split("/")
    count = int(np.prod(leaf.shape, dtype=np.int64))
    size = sizes.setdefault(PARTS.get(name, name), [0, 0])
    size[0] += count * (collection == "params")
    size[1] += count * np.dtype(leaf.dtype).itemsize
  order = list(dict.fromkeys([*PARTS.values(), *sizes]))
  parts = [PartSize(name, *sizes[name]) for name in order if name in sizes]
  return [*parts, PartSize("total", sum(p.parameters for p in parts), sum(p.bytes for p in parts))]


def digest(variables: Any) -> str:
  """Of a sample of every array's values, in order of their names: another model gives another digest."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    flat = leaf.reshape(-1)
    sample = np.asarray(flat[:: max(1, flat.size // _SAMPLES)], np.float32)
    sha.update(f"{jax.tree_util.keystr(path)} {leaf.shape} ".encode() + sample.tobytes())
  return sha.hexdigest()[:16]
