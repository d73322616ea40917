"""Where our time goes, by part, and how near each part comes to the machine's matrix peak.

The model runs once with every submodule's inputs recorded (`flax.linen.intercept_methods`), then each part
runs alone on what it got. Nothing here depends on how a part is called.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.config import PADDING_LABEL
from sam3lt_jax.nn import vision_encoder
from sam3lt_jax.processing import images as image_ops
from tests.benchmarks import flops, timing
from tests.benchmarks.sides import Ours
from tests.benchmarks.workload import PHRASE, Workload

BOX_SLOTS = 8  # what `Predictor` pads to, with boxes or without
Path = tuple[str, ...]
_TRUNK: Path = ("vision_encoder", "backbone")
# Part -> the modules whose calls make it up.
_MODULES = {
  flops.NECK: [("vision_encoder", "neck")],
  flops.TEXT: [("text_encoder",), ("text_projection",)],
  flops.GEOMETRY: [("geometry_encoder",)],
  flops.FUSION: [("detr_encoder",)],
  flops.DECODER: [("detr_decoder",)],
  flops.SCORES: [("dot_product_scoring",)],
  flops.MASKS: [("mask_decoder",)],
}


@dataclasses.dataclass(frozen=True)
class Share:
  """One part. `gflop` is 0 where the work is not matrix products."""

  part: str
  dtype: str
  seconds: float
  gflop: float

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Call:
  """A recorded call of one submodule: `treedef` and `static` make arguments of `arrays` again."""

  module: nn.Module
  path: Path
  treedef: Any
  static: tuple[tuple[int, Any], ...]

  def arguments(self, arrays: list[jax.Array]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    leaves, static, left = [], dict(self.static), iter(arrays)
    for i in range(self.treedef.num_leaves):
      leaves.append(static[i] if i in static else next(left))
    return jax.tree.unflatten(self.treedef, leaves)


def measure(workload: Workload, ours: Ours, dtype: str, repeats: int) -> list[Share]:
  """Every part for one image and one phrase without boxes, as `Predictor` runs it, and the whole."""
  pixels = ours.pixels(workload.pixels(1))
  ids = ours.ids(workload.tokens(1))
  boxes = jnp.zeros((1, BOX_SLOTS, 4)), jnp.full((1, BOX_SLOTS), PADDING_LABEL, jnp.int32)

  @jax.jit
  def run(variables, pixels, ids, mask, boxes, labels):
    return ours.model.apply(variables, pixels, ids, mask, input_boxes=boxes, input_boxes_labels=labels)

  arguments = (ours.variables, pixels, *ids, *boxes)
  calls, recorded = record(ours.model, arguments)
  counted = flops.by_part(ours.model.config, ids[0].shape[1], BOX_SLOTS)

  def seconds(function: Callable[[], Any]) -> float:
    samples = timing.interleave({(timing.OURS, ""): lambda: jax.block_until_ready(function())}, repeats)
    return statistics.median(samples[timing.OURS, ""])

  def part_seconds(paths: list[Path]) -> float:
    return sum(seconds(_replay(calls[p], ours.variables, recorded[p])) for p in paths if p in calls)

  def share(part: str, value: float) -> Share:
    timing.say(f"profile: {part}, {dtype}: {value:.3f} s")
    return Share(part, dtype, value, counted.get(part, 0) / 1e9)

  shares = [share("image file to pixels", _host_seconds(workload, repeats))]
  shares += [share(*item) for item in _trunk(ours, calls, recorded, seconds).items()]
  shares += [share(part, part_seconds(paths)) for part, paths in _MODULES.items()]
  whole = seconds(functools.partial(run, *arguments))
  parts = sum(s.seconds for s in shares[1:])
  shares.append(share("the rest, and what compiling together changes", whole - parts))
  everything = seconds(lambda: ours.end_to_end(workload.photos[:1], PHRASE, workload.threshold))
  shares.append(share("post-processing and dispatch", everything - whole - shares[0].seconds))
  total = dataclasses.replace(share("file to results", everything), gflop=sum(counted.values()) / 1e9)
  return [*shares, total]


def _trunk(ours: Ours, calls, recorded, seconds) -> dict[str, float]:
  """The ViT split in its kinds of layers; as one part where layers are not modules of their own."""
  trunk = seconds(_replay(calls[_TRUNK], ours.variables, recorded[_TRUNK]))
  v = ours.model.config.vision
  layers = {i: (*_TRUNK, f"layers_{i}") for i in range(v.num_hidden_layers)}
  if not all(path in calls for path in layers.values()):
    return {"ViT trunk": trunk}
  times = {}
  for part, chosen in (
    (flops.WINDOWED, [p for i, p in layers.items() if i not in v.global_attn_indexes]),
    (flops.GLOBAL, [p for i, p in layers.items() if i in v.global_attn_indexes]),
  ):
    if chosen:
      times[part] = seconds(_layers(calls, recorded, chosen, ours.variables))
  return {flops.PATCHES: max(trunk - sum(times.values()), 0.0), **times}


def record(
  model: nn.Module, arguments: tuple[Any, ...]
) -> tuple[dict[Path, Call], dict[Path, list[jax.Array]]]:
  """Calls of the submodules up to the trunk's layers by path, and the arrays they were given.

  arguments: variables, pixels, ids, mask, boxes, labels. All layers of the trunk are given the first one's
  input, to save their maps' memory: time does not depend on values.
  """
  calls: dict[Path, Call] = {}
  wanted = {path for paths in _MODULES.values() for path in paths} | {_TRUNK}

  def run(variables, pixels, ids, mask, boxes, labels):
    arrays: dict[str, list[jax.Array]] = {}

    def interceptor(next_function, args, kwargs, context):
      path = context.module.path
      layer = path[:2] == _TRUNK and len(path) == 3 and path[2].startswith("layers_")
      if context.method_name == "__call__" and path not in calls and (path in wanted or layer):
        leaves, treedef = jax.tree.flatten((args, kwargs))
        static = tuple((i, x) for i, x in enumerate(leaves) if not isinstance(x, jax.Array))
        calls[path] = Call(context.module.clone(parent=None, name=None), path, treedef, static)
        first = (*_TRUNK, "layers_0")
        if not layer or path == first:
          arrays["/".join(path)] = [x for x in leaves if isinstance(x, jax.Array)]
      return next_function(*args, **kwargs)

    # Blocks traced once run within a transform of flax, whose modules have no path here; plain ones do.
    plain = mock.patch.object(vision_encoder, "TracedOnce", vision_encoder.VitBlock)
    with plain, nn.intercept_methods(interceptor):
      model.apply(variables, pixels, ids, mask, input_boxes=boxes, input_boxes_labels=labels)
    return arrays

  arrays = {tuple(k.split("/")): v for k, v in jax.block_until_ready(jax.jit(run)(*arguments)).items()}
  first = arrays.get((*_TRUNK, "layers_0"), [])
  return calls, {path: arrays.get(path, first) for path in calls}


def _variables_of(call: Call, variables: Any) -> Any:
  """The part of each collection that belongs to the module."""
  found = {}
  for collection, tree in variables.items():
    for name in call.path:
      tree = tree.get(name, {})
    if tree:
      found[collection] = tree
  return found


def _replay(call: Call, variables: Any, arrays: list[jax.Array]) -> Callable[[], Any]:
  @jax.jit
  def run(variables, arrays):
    args, kwargs = call.arguments(arrays)
    return call.module.apply(variables, *args, **kwargs)

  return functools.partial(run, _variables_of(call, variables), arrays)


def _layers(calls, recorded, paths: list[Path], variables: Any) -> Callable[[], list[Any]]:
  """Layers of one kind, one after the other, through one compiled function."""
  call = calls[paths[0]]

  @jax.jit
  def layer(variables, arrays):
    args, kwargs = call.arguments(arrays)
    return call.module.apply(variables, *args, **kwargs)

  weights = [_variables_of(calls[path], variables) for path in paths]
  return lambda: [jax.block_until_ready(layer(w, recorded[paths[0]])) for w in weights][-1]


def _host_seconds(workload: Workload, repeats: int) -> float:
  side = workload.config.vision.image_size
  samples = []
  for _ in range(repeats + 1):
    start = time.perf_counter()
    image_ops.preprocess(workload.photos[0], side)
    samples.append(time.perf_counter() - start)
  return float(np.median(samples[1:]))
