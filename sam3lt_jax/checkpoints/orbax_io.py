"""Our own format: a directory with `config.json` and the variables as an Orbax checkpoint beside it."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sam3lt_jax import storage
from sam3lt_jax.checkpoints.engine import flatten, unflatten
from sam3lt_jax.checkpoints.errors import CheckpointError, CheckpointMismatchError, Problems
from sam3lt_jax.checkpoints.hub import VARIABLES


def is_saved(directory: str) -> bool:
  """True for a directory that `save` wrote the variables into."""
  return os.path.isdir(os.path.join(directory, VARIABLES))


def save(directory: str, variables: Mapping[str, Any]) -> None:
  """Writes the variables under `directory`; Orbax itself renames when all is on disk.

  Under several processes all of them call this once the directory is there, and the first one writes.
  """
  from orbax.checkpoint import v1 as ocp

  storage.need_room(directory, sum(x.nbytes for x in jax.tree.leaves(variables)))
  if jax.process_count() > 1:  # arrays of one process's devices are the same in all of them
    variables = jax.tree.map(np.asarray, variables)
  ocp.save(os.path.abspath(os.path.join(directory, VARIABLES)), unflatten(flatten(variables)))


def barrier(name: str) -> None:
  """Returns when every process is here."""
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def load(directory: str, target: Mapping[str, Any], device: Any = None) -> dict[str, Any]:
  """Reads the variables straight into the dtypes of `target`, a flat tree of shapes.

  Raises:
    CheckpointMismatchError: leaves missing, unexpected or misshapen; lists all.
    CheckpointError: incomplete or corrupted files.
  """
  from orbax.checkpoint import v1 as ocp

  path = os.path.abspath(os.path.join(directory, VARIABLES))
  sharding = device if isinstance(device, jax.sharding.Sharding) else None
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
  try:
    with _alone():
      stored = flatten(ocp.metadata(path).metadata)
  except Exception as e:
    raise CheckpointError(f"{directory} is incomplete or corrupted ({_first_line(e)})") from e
  compare(stored, target, directory)
  abstract = {leaf: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for leaf, x in target.items()}
  try:
    with _alone(), warnings.catch_warnings():
      warnings.simplefilter("ignore", UserWarning)  # about shardings, which are given
      loaded = ocp.load(path, unflatten(abstract))
  except Exception as e:
    raise CheckpointError(f"{directory} is incomplete or corrupted ({_first_line(e)})") from e
  flat = flatten(loaded)
  return {leaf: flat[leaf] for leaf in target}


@contextlib.contextmanager
def _alone() -> Iterator[None]:
  """Reading with Orbax for this process only; by itself it waits until all processes do the same."""
  if jax.process_count() == 1:
    yield
    return
  from orbax.checkpoint import v1 as ocp

  own = jax.process_index()
  context = ocp.Context()
  context.multiprocessing.primary_host = own
  context.multiprocessing.active_processes = {own}
  context.multiprocessing.barrier_sync_key_prefix = f"sam3lt-process-{own}"
  with context:
    yield


def compare(leaves: Mapping[str, Any], target: Mapping[str, Any], where: str) -> None:
  """Raises CheckpointMismatchError unless both flat trees have the same leaves and shapes."""
  problems = Problems(
    unexpected=[f"{leaf} {list(leaves[leaf].shape)}" for leaf in leaves if leaf not in target],
    missing=[f"{leaf} {list(target[leaf].shape)}" for leaf in target if leaf not in leaves],
    wrong_shape=[
      f"{leaf}: {list(leaves[leaf].shape)}, the model has {list(target[leaf].shape)}"
      for leaf in target
      if leaf in leaves and tuple(leaves[leaf].shape) != tuple(target[leaf].shape)
    ],
  )
  if problems:
    raise CheckpointMismatchError(where, problems)


def _first_line(e: Exception) -> str:
  return f"{type(e).__name__}: {(str(e).strip() or '?').splitlines()[0][:200]}"
