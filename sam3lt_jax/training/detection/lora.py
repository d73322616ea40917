"""LoRA: low-rank adapters beside frozen kernels, without touching the modules (arXiv 2106.09685).

A kernel [in, out] becomes kernel + alpha / rank * a @ b with a [in, rank], b [rank, out]. The adapters are a
tree of their own that mirrors the parameters: where those have a kernel, it has `{"a": ..., "b": ...}`. So
patterns of names ("^vision_encoder/") mean the same for both, and a tree may hold adapters of some kernels
beside other parameters that are trained as they are (`split_adapters`).
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.checkpoints.engine import flatten, unflatten
from sam3lt_jax.errors import ArgumentError, check
from sam3lt_jax.training.freezing import matches

Tree = dict[str, Any]

# Attention and MLPs of the three large stacks.
_STACKS = r"^(vision_encoder/backbone|detr_encoder|detr_decoder)/layers_\d+/"
DEFAULT_TARGETS = (_STACKS + r".*[qkvo]_proj/kernel$", _STACKS + r"mlp/fc[12]/kernel$")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """What is adapted, and how.

  Attributes:
    rank: columns of `a`. alpha: the product is scaled by alpha / rank, which keeps learning rates comparable
      between ranks.
    targets: regular expressions over paths ("vision_encoder/backbone/layers_0/mlp/fc1/kernel", `re.search`).
      Kernels that one of them finds get adapters. Default: attention projections and MLPs of the vision
      trunk, the fusion encoder and the decoder.

  Raises:
    ValueError: rank below 1, alpha not above 0, or no targets.
  """

  rank: int = 16
  alpha: float = 16.0
  targets: tuple[str, ...] = DEFAULT_TARGETS

  def __post_init__(self):
    given = not isinstance(self.targets, str) and len(self.targets) > 0
    check(given, "targets", self.targets, "one or more regular expressions")
    object.__setattr__(self, "targets", tuple(self.targets))
    check(self.rank >= 1, "rank", self.rank, "1 or more")
    check(self.alpha > 0, "alpha", self.alpha, "a number above 0")

  @property
  def scale(self) -> float:
    """alpha / rank."""
    return self.alpha / self.rank


def target_paths(params: Mapping[str, Any], config: LoraConfig) -> list[str]:
  """Paths of the kernels that `config` adapts, sorted.

  Raises:
    ValueError: a pattern that finds no kernel, one that finds a kernel which is not a matrix (a convolution),
      or a kernel with fewer rows or columns than `rank`.
  """
  kernels = {path: x for path, x in flatten(params).items() if path.rpartition("/")[2] == "kernel"}
  found: set[str] = set()
  for pattern in config.targets:
    here = matches("targets", pattern, kernels)
    wrong = [f"{path} {tuple(kernels[path].shape)}" for path in sorted(here) if len(kernels[path].shape) != 2]
    if wrong:
      raise ArgumentError(
        "targets",
        f": {pattern!r} finds kernels that are no matrices (convolutions have no adapter):"
        f" {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}",
      )
    found |= here
  for path in sorted(found):
    if config.rank > min(kernels[path].shape):
      raise ArgumentError("rank", f"={config.rank} is more than {path} has: {tuple(kernels[path].shape)}")
  return sorted(found)


def init_lora(params: Mapping[str, Any], config: LoraConfig, key: jax.Array) -> Tree:
  """Adapters of the kernels of `params` that `config` targets, float32.

  `a` is uniform within +-1 / sqrt(in), `b` zero, so that the adapted model starts as the one it adapts. What
  is drawn for a kernel depends on `key` and its path alone.

  Args:
    params: the model's parameters, nested; shapes and names are read, not values.

  Returns:
    A tree like `params` with `{"a": [in, rank], "b": [rank, out]}` for each targeted kernel and nothing else.
    Errors as of `target_paths`.
  """
  kernels, adapters = flatten(params), {}
  for path in target_paths(params, config):
    rows, columns = kernels[path].shape
    own = jax.random.fold_in(key, zlib.crc32(path.encode()))
    bound = rows**-0.5
    adapters[f"{path}/a"] = jax.random.uniform(own, (rows, config.rank), minval=-bound, maxval=bound)
    adapters[f"{path}/b"] = jnp.zeros((config.rank, columns))
  return unflatten(adapters)


def apply_lora(params: Mapping[str, Any], lora: Mapping[str, Any], config: LoraConfig) -> Tree:
  """Parameters with kernel + alpha / rank * a @ b; for use inside the step, where gradients reach a and b.

  Args:
    params: the model's whole parameter tree, of any dtype.
    lora: of `init_lora`.
    config: as it was for `init_lora`.

  Returns:
    A tree like `params`; adapted kernels are float32 at least, all other leaves the same objects.

  Raises:
    ValueError: an adapter of a kernel that `params` has not, or of another shape.
  """

  def add(kernel, a, b):
    delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return kernel + config.scale * delta

  return _adapt(params, lora, add)


def merge_lora(params: Mapping[str, Any], lora: Mapping[str, Any], config: LoraConfig) -> Tree:
  """As `apply_lora`, once and for good: for export. Computed by numpy in float32.

  Returns:
    A tree like `params`; adapted kernels are numpy arrays in their own dtype (in bfloat16 or float16 that
    rounds once more), all other leaves the same objects. Errors as of `apply_lora`.
  """

  def add(kernel, a, b):
    kernel, a, b = np.asarray(kernel), np.asarray(a, np.float32), np.asarray(b, np.float32)
    return (kernel.astype(np.float32) + np.float32(config.scale) * (a @ b)).astype(kernel.dtype)

  return _adapt(params, lora, add)


def split_adapters(tree: Mapping[str, Any]) -> tuple[Tree, Tree]:
  """(adapters, all the rest) of a tree that holds both, without empty branches."""
  flat = flatten(tree)
  adapters = {path: x for path, x in flat.items() if re.search(r"(^|/)kernel/[ab]$", path)}
  return unflatten(adapters), unflatten({path: x for path, x in flat.items() if path not in adapters})


def _adapt(params: Mapping[str, Any], lora: Mapping[str, Any], add: Callable) -> Tree:
  flat, adapters = flatten(params), flatten(lora)
  for path in dict.fromkeys(name.rpartition("/")[0] for name in adapters):
    a, b = adapters[f"{path}/a"], adapters[f"{path}/b"]
    if path not in flat:
      raise ValueError(f"lora: {path} is in the adapters and not in the parameters")
    rows, columns = a.shape[0], b.shape[1]
    if tuple(flat[path].shape) != (rows, columns):
      raise ValueError(
        f"lora: the adapter of {path} is for [{rows}, {columns}], the kernel is {tuple(flat[path].shape)}"
      )
    flat[path] = add(flat[path], a, b)
  return unflatten(flat)
