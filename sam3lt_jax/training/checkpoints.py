"""TrainCheckpoints: the states of a run on disk, written beside the training and read back exactly.

    directory/12/state/            the state after 12 steps, as Orbax writes it
    directory/12/checkpoint.json   the step, its metrics, and size and CRC-32 of every file of the state
    directory/12.writing/          being written; of a run that was killed
    directory/12.damaged/          found damaged, kept for whoever wants to look

A checkpoint gets its name by one rename, after all of it is on disk, so that a process killed at any moment
leaves whole ones. The directory is on a file system with renames (a local disk, NFS), one for all processes.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from sam3lt_jax import storage
from sam3lt_jax.checkpoints import orbax_io
from sam3lt_jax.checkpoints.engine import flatten, unflatten
from sam3lt_jax.checkpoints.errors import CheckpointError, reason
from sam3lt_jax.checkpoints.orbax_io import Damaged, barrier
from sam3lt_jax.errors import check
from sam3lt_jax.parallel import is_key

_STATE, _WRITING, _DAMAGED, _OLD = "state", ".writing", ".damaged", ".old"


class TrainCheckpoints:
  """The checkpoints of one run.

  Args:
    directory: made if it is missing.
    keep: the newest that many stay, beside the best.
    best: (metric, "max" or "min"): the checkpoint with the best value of that metric (of equals, the
      latest) is never removed.
    report: called with a line about anything unusual.

  Raises:
    ValueError: arguments out of their range.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    keep: int = 2,
    best: tuple[str, str] | None = None,
    report: Callable[[str], Any] = print,
  ):
    check(keep >= 1, "keep", keep, "1 or more checkpoints")
    good = best is None or (len(best) == 2 and best[1] in ("max", "min"))
    check(good, "best", best, 'None, (metric, "max") or (metric, "min")')
    directory = os.fspath(directory)
    check("://" not in directory, "directory", directory, "a folder of a file system")
    self.directory = os.path.abspath(directory)
    self._keep, self.best, self._report = keep, best, report
    self._thread: threading.Thread | None = None
    self._error: BaseException | None = None
    self._lead = jax.process_index() == 0
    if self._lead:
      os.makedirs(self.directory, exist_ok=True)
      self._tidy()
    barrier("sam3lt-checkpoints-open")
    self._read_best()

  def steps(self) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    return sorted(int(name) for name in os.listdir(self.directory) if re.fullmatch(r"\d+", name))

  def metrics(self, step: int) -> dict[str, float]:
    """The metrics saved with the checkpoint of `step`; {} if they cannot be read."""
    try:
      return dict(orbax_io.read_manifest(self._path(step))["metrics"])
    except (CheckpointError, KeyError, TypeError, ValueError):
      return {}

  def best_step(self) -> int | None:
    """The step with the best value of the metric; the latest of equals. None: none has that metric."""
    scores = [(self._score(self.metrics(step)), step) for step in self.steps()]
    return max((pair for pair in scores if pair[0] is not None), default=(None, None))[1]

  def is_best(self, metrics: Mapping[str, float]) -> bool:
    """Whether none so far was better than `metrics`. A value that is NaN or infinite never is the best."""
    # Kept in memory: every process has to decide alike, and one of them is changing the folder meanwhile.
    score, known = self._score(metrics), self._best_known
    return score is not None and (known is None or score >= known)

  def _score(self, metrics: Mapping[str, float]) -> float | None:
    """The value of `best`'s metric, of which more is better; None without a finite one."""
    value = metrics.get(self.best[0], math.nan) if self.best else math.nan
    return (value if self.best[1] == "max" else -value) if math.isfinite(value) else None

  def _read_best(self) -> None:
    step = self.best_step()
    self._best_known = None if step is None else self._score(self.metrics(step))

  def save(self, step: int, state: Any, metrics: Mapping[str, float] | None = None) -> None:
    """Starts to write `state`, and returns when its arrays may be donated or changed.

    Waits for the save before it, so none is ever skipped. Does nothing if the step is there already.

    Args:
      step: its name.
      state: any pytree of arrays and PRNG keys.
      metrics: numbers kept with it; those that are NaN or infinite are left out.

    Raises:
      CheckpointError: this save or the one before could not be written.
    """
    from orbax.checkpoint import v1 as ocp

    self.wait()
    if step in self.steps():
      return
    writing, leaves = self._path(step) + _WRITING, _leaves(state)
    self._guard(step, storage.need_room, self.directory, sum(x.nbytes for x in leaves.values()))
    if self._lead:
      shutil.rmtree(writing, ignore_errors=True)
      self._guard(step, os.makedirs, writing)
    barrier(f"sam3lt-checkpoint-{step}")
    metrics = {name: float(x) for name, x in (metrics or {}).items() if math.isfinite(x)}
    if self.is_best(metrics):
      self._best_known = self._score(metrics)
    manifest = {"step": step, "metrics": metrics}
    # Orbax copies to the host before it returns.
    response = self._guard(step, ocp.save_async, os.path.join(writing, _STATE), unflatten(leaves))
    self._thread = threading.Thread(target=self._finish, args=(step, response, manifest), daemon=True)
    self._thread.start()

  def wait(self) -> None:
    """Returns when nothing is being written.

    Raises:
      CheckpointError: the last save could not be written; the sentence names the last good one.
    """
    if self._thread is not None:
      self._thread.join()
      self._thread = None
    error, self._error = self._error, None
    if error is not None:
      raise error

  def settle(self) -> None:
    """`wait`, until every process sees the same checkpoints: the leading one may still be renaming."""
    self.wait()
    barrier("sam3lt-checkpoints-settled")

  def check(self) -> None:
    """As `wait`, if the last save has ended or failed; returns at once if it has not."""
    if self._thread is not None and (self._error is not None or not self._thread.is_alive()):
      self.wait()

  def _guard(self, step: int, function: Callable, *args: Any) -> Any:
    try:
      return function(*args)
    except Exception as e:
      self._discard(step)
      raise self._write_error(step, e) from e

  def _finish(self, step: int, response: Any, manifest: dict[str, Any]) -> None:
    try:
      response.result()
      if self._lead:
        self._seal(step, manifest)
    except Exception as e:
      error = self._write_error(step, e)
      error.__cause__ = e
      self._error = error  # before the next line, which takes a moment: `check` ends the run now
      self._discard(step)

  def _seal(self, step: int, manifest: dict[str, Any]) -> None:
    writing = self._path(step) + _WRITING
    orbax_io.write_manifest(writing, _STATE, manifest)
    os.rename(writing, self._path(step))
    storage.sync_folder(self.directory)
    stay = {*self.steps()[-self._keep :], self.best_step()}
    for old in self.steps():
      if old not in stay:
        # Renamed first: a process killed halfway through would leave what looks like a damaged checkpoint.
        os.rename(self._path(old), self._path(old) + _OLD)
        shutil.rmtree(self._path(old) + _OLD, ignore_errors=True)

  def _discard(self, step: int) -> None:
    if self._lead:
      storage.remove(self.directory, f"{step}{_WRITING}")

  def _write_error(self, step: int, e: Exception) -> CheckpointError:
    good = self.steps()
    last = f"the last good checkpoint is {self._path(good[-1])}" if good else "no checkpoint is there"
    why = "no space is left on its disk" if storage.is_disk_full(e) else reason(e)
    return CheckpointError(f"{self.directory}: the checkpoint of step {step} is not written: {why}; {last}")

  def _tidy(self) -> None:
    for name in os.listdir(self.directory):
      if name.endswith((_WRITING, _OLD)) and name.split(".")[0].isdigit():
        shutil.rmtree(os.path.join(self.directory, name), ignore_errors=True)

  def restore(self, like: Any, step: int | None = None) -> Any:
    """Reads a state back, bit for bit.

    Args:
      like: a tree of arrays or `jax.ShapeDtypeStruct` as it was saved; arrays go where its shardings say
        (none: the default device), and its structure (optax's named tuples) is the result's.
      step: which; None: the newest. If that one is damaged it is reported, set aside, and the one before is
        read.

    Returns:
      The state, or None if there is no checkpoint and `step` is None.

    Raises:
      CheckpointMismatchError: a state of another model or optimiser; lists what differs.
      CheckpointError: no such step, or it is damaged and there is none before it.
    """
    self.settle()
    if step is not None:
      if step not in self.steps():
        known = ", ".join(map(str, self.steps())) or "none"
        raise CheckpointError(f"{self.directory} has no checkpoint of step {step}; it has: {known}")
      return self._load(step, like)
    damaged: dict[int, Damaged] = {}
    for step in reversed(self.steps()):
      try:
        state = self._load(step, like)
      except Damaged as e:
        self._report(f"{e}; trying the one before")
        damaged[step] = e
        continue
      self._set_aside(damaged)
      return state
    if damaged:  # none is set aside: the next start would take an empty folder for a new run
      raise CheckpointError(f"{next(iter(damaged.values()))}, and no good checkpoint is before it")
    return None

  def restore_best(self, like: Any) -> Any:
    """As `restore`, of `best_step()`. Raises CheckpointError if no checkpoint has the metric."""
    self.wait()
    step = self.best_step()
    if step is None:
      name = self.best[0] if self.best else "best=None"
      raise CheckpointError(f"{self.directory}: no checkpoint has a value of the metric {name}")
    return self.restore(like, step)

  def _load(self, step: int, like: Any) -> Any:
    from orbax.checkpoint import v1 as ocp

    path = self._path(step)
    orbax_io.verify(path)
    target = {name: _abstract(x) for name, x in _leaves(like).items()}
    try:
      stored = flatten(ocp.metadata(os.path.join(path, _STATE)).metadata)
      orbax_io.compare(stored, target, path)
      for name, x in target.items():
        if (
          stored[name].dtype != x.dtype
        ):  # Orbax would convert it, and the run would go on a little differently
          raise CheckpointError(f"{path}: {name} is {stored[name].dtype} there, and {x.dtype} in this run")
      with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about shardings, which are given
        loaded = flatten(ocp.load(os.path.join(path, _STATE), unflatten(target)))
    except CheckpointError:
      raise
    except Exception as e:  # no damage, as its files are those that were written
      raise CheckpointError(f"{path} cannot be read: {reason(e)}") from e
    leaves, structure = jax.tree.flatten(like)
    new = [_as_key(loaded[name], x) for name, x in zip(_leaves(like), leaves, strict=True)]
    return jax.tree.unflatten(structure, new)

  def _set_aside(self, steps: Iterable[int]) -> None:
    barrier("sam3lt-checkpoints-read")
    for step in steps if self._lead else ():
      shutil.rmtree(self._path(step) + _DAMAGED, ignore_errors=True)
      os.rename(self._path(step), self._path(step) + _DAMAGED)
    barrier("sam3lt-checkpoints-set-aside")
    self._read_best()

  def _path(self, step: int) -> str:
    return os.path.join(self.directory, str(step))


def _leaves(tree: Any) -> dict[str, Any]:
  """path -> leaf, in the tree's order; a PRNG key is its uint32 data."""
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): _key_data(leaf) for p, leaf in paths}


def _key_data(x: Any) -> Any:
  if not is_key(x):
    return x
  if isinstance(x, jax.ShapeDtypeStruct):
    data = jax.eval_shape(jax.random.key_data, x)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)
  return jax.random.key_data(x)


def _as_key(data: Any, like: Any) -> Any:
  return jax.random.wrap_key_data(data, impl=_key_impl(like)) if is_key(like) else data


def _key_impl(like: Any) -> Any:
  if isinstance(like, jax.Array):
    return jax.random.key_impl(like)
  names = ("threefry2x32", "rbg", "unsafe_rbg")  # a shape does not tell its implementation
  return next(i for i in names if jax.eval_shape(lambda i=i: jax.random.key(0, impl=i)).dtype == like.dtype)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
  sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
