"""`tracker_from_pretrained`: SAM 3's tracker out of any checkpoint that has one."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from sam3lt_jax import devices
from sam3lt_jax.checkpoints import engine, orbax_io, random_init, sources, tables
from sam3lt_jax.checkpoints.errors import CheckpointError, reason
from sam3lt_jax.checkpoints.pretrained import Opened, checked_dtypes, open_tensors, opened, sizes_file
from sam3lt_jax.checkpoints.rules import Layout
from sam3lt_jax.config import TrackerConfig, TrackerProfile, read_json
from sam3lt_jax.errors import explained

if TYPE_CHECKING:
  from sam3lt_jax.model import Variables
  from sam3lt_jax.tracker import Sam3Tracker

FOLDER = "tracker"  # in a directory that `save_pretrained` wrote, and in the bundled model's
_TRUNK_WIDTH = "params/neck/fpn_layers_2/proj1/kernel"  # the level that keeps the trunk's width and size


@explained
def tracker_from_pretrained(
  source: str | os.PathLike,
  config: TrackerConfig | None = None,
  profile: str | TrackerProfile | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  *,
  revision: str | None = None,
  token: str | bool | None = None,
  cache_dir: str | os.PathLike | None = None,
  local_files_only: bool = False,
  seed: int = 0,
  device: Any = None,
  progress: bool = True,
) -> tuple[Sam3Tracker, Variables]:
  """Loads the tracker of a checkpoint, and nothing else of it.

  The trunk of SAM3-LiteText is SAM 3's own, so every SAM 3 tracker fits every variant.

  Args:
    source: what `from_pretrained` takes, of a checkpoint that holds a tracker: the authors' `.pt` of
      SAM3-LiteText or SAM 3, transformers' "facebook/sam3", a directory of `Sam3TrackerModel` or
      `Sam3TrackerVideoModel`, a directory with one of those in it, named "tracker"; one that
      `save_pretrained` wrote with a tracker; "random:s0", "random:tiny".
    config: the sizes, instead of those of `config.json` or, where there is none, of SAM 3.
    profile: "original", "transformers" or a `TrackerProfile`. The default is "original" for every source: the
      weights are the same in all, and were trained so.
    others: as in `from_pretrained`.

  Returns:
    The `Sam3Tracker` and its variables. Its `config.memory` is None for a tracker of images alone.

  Raises:
    CheckpointError: (ValueError) there is no tracker, or SAM 3.1's; the message says where to find one.
      `CheckpointMismatchError` lists every tensor that does not fit. Others as in `from_pretrained`.
  """
  found = open_tracker(
    source, config, profile, dtype, param_dtype, revision=revision, token=token, cache_dir=cache_dir,
    local_files_only=local_files_only, seed=seed,
  )  # fmt: skip
  return found.model, found.load(device=device, progress=progress)


def open_tracker(
  source: str | os.PathLike,
  config: TrackerConfig | None = None,
  profile: str | TrackerProfile | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  *,
  seed: int = 0,
  **hub: Any,
) -> Opened:
  """The first half of `tracker_from_pretrained`, with its arguments and errors: all but the weights."""
  devices.check()
  dtypes = checked_dtypes(dtype, param_dtype)
  profile = None if profile is None else TrackerProfile.named(profile)
  found = sources.locate(source, **hub)
  path = found.path
  tensors = None
  if found.kind == "random":
    sizes = random_init.RANDOM_CONFIGS[path]()
    config = config or random_init.tracker_config(sizes)
    tracker, target = _build(config, profile, sizes.vision.hidden_size, dtypes)
  elif found.kind == "orbax":
    path = path if _is_tracker(path) else os.path.join(path, FOLDER)
    if not _is_tracker(path):
      raise CheckpointError(f"{found.path} holds no tracker; {tables.WHERE_TRACKERS_ARE}")
    stored = orbax_io.stored_shapes(path)
    config = config or _own_config(path, memory=True)
    tracker, target = _build(config, profile, stored[_TRUNK_WIDTH].shape[2], dtypes)
  else:
    inner = os.path.join(path, FOLDER)
    path = inner if os.path.isdir(inner) else path
    make = functools.partial(_of_tensors, path, config, profile, dtypes)
    tracker, target, tensors = open_tensors(path, tables.detect_tracker, make)
  return opened(source, found.kind, path, tracker, target, seed, tensors)


def tracker_leaves(tracker: Sam3Tracker, trunk_width: int) -> dict[str, Any]:
  """Leaf path -> `jax.ShapeDtypeStruct` of every variable of `tracker`; nothing is computed."""
  init = functools.partial(tracker.init_variables, trunk_width=trunk_width)
  return engine.flatten(jax.eval_shape(init, jax.random.key(0)))


def _build(
  config: TrackerConfig, profile: TrackerProfile | None, trunk_width: int, dtypes: dict[str, Any]
) -> tuple[Sam3Tracker, dict[str, Any]]:
  from sam3lt_jax.tracker import Sam3Tracker

  if profile is not None:
    config = config.replace(profile=profile)
  tracker = Sam3Tracker(config, **dtypes)
  try:
    return tracker, tracker_leaves(tracker, trunk_width)
  except Exception as e:  # JAX and Flax have one each for what does not fit together
    raise CheckpointError(f"no tracker can be made of this configuration: {reason(e)}") from e


def _of_tensors(
  path: str,
  config: TrackerConfig | None,
  profile: TrackerProfile | None,
  dtypes: dict[str, Any],
  layout: Layout,
  shapes: dict[str, Any],
) -> tuple[Sam3Tracker, dict[str, Any]]:
  if _TRUNK_WIDTH not in shapes:
    raise CheckpointError(f"{path} holds a tracker without its neck; {tables.WHERE_TRACKERS_ARE}")
  if config is None:
    memory = any(leaf.startswith("params/memory_") for leaf in shapes)
    config = _own_config(path, memory) if layout.name == "transformers" else None
    config = config or TrackerConfig()
    config = config if memory else config.replace(memory=None)
  return _build(config, profile, shapes[_TRUNK_WIDTH][2], dtypes)


def _own_config(path: str, memory: bool) -> TrackerConfig | None:
  """Of the `config.json` in a directory or beside a file; None where there is none."""
  from sam3lt_jax import config_schema

  file = sizes_file(path)
  return None if file is None else config_schema.tracker_from_schema(read_json(file), memory)


def _is_tracker(directory: str) -> bool:
  """Of a tracker's own directory; a model's has another type of configuration."""
  if not orbax_io.is_saved(directory):
    return False
  config = read_json(os.path.join(directory, "config.json"))
  return isinstance(config, Mapping) and "tracker" in str(config.get("model_type"))
