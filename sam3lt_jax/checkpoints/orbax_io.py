"""Our own format: a directory with `config.json` and the variables as an Orbax checkpoint beside it.

A third file, `checkpoint.json`, has the size and CRC-32 of every file that Orbax wrote, which itself notices
neither a flipped bit nor every missing file. Checkpoints of a training run have one as well.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sam3lt_jax import storage
from sam3lt_jax.checkpoints.engine import THREADS, all_finite, flatten, unflatten
from sam3lt_jax.checkpoints.errors import CheckpointError, CheckpointMismatchError, Problems, reason
from sam3lt_jax.checkpoints.hub import VARIABLES
from sam3lt_jax.config import read_json

_MANIFEST = "checkpoint.json"


class Damaged(CheckpointError):
  """A checkpoint of which a part is missing or is not what was written; the message names the part."""


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


def stored_shapes(directory: str) -> dict[str, Any]:
  """The leaves that `save` wrote, with `shape` and `dtype`, flat; none of them is read.

  Raises:
    CheckpointError: incomplete or corrupted files.
  """
  from orbax.checkpoint import v1 as ocp

  with _read(directory):
    return flatten(ocp.metadata(os.path.abspath(os.path.join(directory, VARIABLES))).metadata)


def load(directory: str, target: Mapping[str, Any], device: Any = None) -> dict[str, Any]:
  """Reads the variables straight into the dtypes of `target`, a flat tree of shapes.

  Raises:
    CheckpointMismatchError: leaves missing, unexpected, misshapen or with NaN or infinity; lists all.
    CheckpointError: incomplete or corrupted files, among them `Damaged`.
  """
  from orbax.checkpoint import v1 as ocp

  sharding = device if isinstance(device, jax.sharding.Sharding) else None
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
  compare(stored_shapes(directory), target, directory)
  abstract = {leaf: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for leaf, x in target.items()}
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    listed = os.path.isfile(os.path.join(directory, _MANIFEST))  # directories of older versions have none
    whole = pool.submit(verify, directory) if listed else None  # meanwhile
    try:
      with _read(directory), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about shardings, which are given
        flat = flatten(ocp.load(os.path.abspath(os.path.join(directory, VARIABLES)), unflatten(abstract)))
    finally:
      if whole is not None:
        whole.result()  # names the file, where Orbax gives a reason of its own
    finite = dict(zip(target, pool.map(lambda leaf: _all_finite(flat[leaf]), target)))
  if not all(finite.values()):
    bad = [leaf for leaf, good in finite.items() if not good]
    raise CheckpointMismatchError(directory, Problems(not_finite=bad))
  return {leaf: flat[leaf] for leaf in target}


def _all_finite(x: jax.Array) -> bool:
  """Looked at by numpy: a CPU's arrays are not copied, and for others a copy is quicker than compiling."""
  parts = {str(shard.index): i for i, shard in enumerate(x.addressable_shards)}  # each once, not each copy
  # `addressable_data` is a new array each time, so what numpy sees is not kept with x.
  return all(all_finite(np.ascontiguousarray(x.addressable_data(i))) for i in parts.values())


@contextlib.contextmanager
def _read(directory: str) -> Iterator[None]:
  """Reading with Orbax for this process only, whatever goes wrong being the directory's fault."""
  try:
    with contextlib.ExitStack() as stack:
      if jax.process_count() > 1:  # Orbax by itself waits until all processes do the same
        from orbax.checkpoint import v1 as ocp

        own = jax.process_index()
        context = ocp.Context()
        context.multiprocessing.primary_host = own
        context.multiprocessing.active_processes = {own}
        context.multiprocessing.barrier_sync_key_prefix = f"sam3lt-process-{own}"
        stack.enter_context(context)
      yield
  except Exception as e:
    raise CheckpointError(f"{directory} is incomplete or corrupted ({reason(e)})") from e


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


# ------------------------------------------------------------------ are files those that were written?


def write_manifest(folder: str, part: str, about: Mapping[str, Any]) -> None:
  """Writes checkpoint.json: `about`, and size and CRC-32 of all files in `folder`/`part`. Waits for it."""
  names = [
    os.path.relpath(os.path.join(where, name), folder).replace(os.sep, "/")
    for where, _, files in os.walk(os.path.join(folder, part))
    for name in files
  ]
  manifest = dict(about, files={name: _fingerprint(os.path.join(folder, name)) for name in sorted(names)})
  storage.write(os.path.join(folder, _MANIFEST), json.dumps(manifest, indent=1, sort_keys=True))


def read_manifest(path: str) -> dict[str, Any]:
  """What `write_manifest` wrote; "files" is name -> [bytes, CRC-32]. Raises Damaged."""
  try:
    manifest = dict(read_json(os.path.join(path, _MANIFEST)))
    manifest["files"] = {name: [int(size), int(crc)] for name, (size, crc) in manifest["files"].items()}
  except FileNotFoundError:
    raise Damaged(f"{path} is damaged: its part {_MANIFEST} is missing") from None
  except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
    raise Damaged(f"{path} is damaged: its part {_MANIFEST} cannot be read") from e
  return manifest


def verify(path: str) -> None:
  """Reads every file of a checkpoint. Raises Damaged for the first that differs from its entry."""

  def look(item: tuple[str, list[int]]) -> str | None:
    name, known = item
    part = os.path.join(path, name)
    if not os.path.isfile(part):
      return f"{name} is missing"
    size, crc = _fingerprint(part)
    if size != known[0]:
      return f"{name} has {size} of {known[0]} bytes"
    return None if crc == known[1] else f"{name} is not what was written"

  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    wrong = next(filter(None, pool.map(look, read_manifest(path)["files"].items())), None)
  if wrong is not None:
    raise Damaged(f"{path} is damaged: its part {wrong}")


def _fingerprint(path: str) -> list[int]:
  """[bytes, CRC-32]."""
  size = crc = 0
  with open(path, "rb") as f:
    while block := f.read(1 << 22):
      size, crc = size + len(block), zlib.crc32(block, crc)
  return [size, crc]
