"""What a run leaves beside its checkpoints: config.json, which says what it is, and metrics.jsonl.

Only the first of several processes writes; the others read.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from sam3lt_jax import storage
from sam3lt_jax.checkpoints.engine import flatten
from sam3lt_jax.checkpoints.errors import CheckpointError
from sam3lt_jax.config import read_json

_KEPT = "the run's checkpoints are kept: make room and start it again"
_held: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("run folders", default=frozenset())


@contextlib.contextmanager
def working_in(directory: str | os.PathLike[str]) -> Iterator[None]:
  """Holds a run's folder for the block, so that the same run started twice is told so and damages nothing.

  The folder is made, and removed again if nothing was put into it. In a block of the same folder there is
  nothing to do. Of several processes of a run the first one holds it.

  Raises:
    ValueError: another process, which is named, works in it.
    CheckpointError: the lock cannot be written, as the disk is full.
  """
  directory = os.path.realpath(directory)
  held = _held.get()
  if directory in held or jax.process_index():
    yield
    return
  made = not os.path.isdir(directory)
  os.makedirs(directory, exist_ok=True)
  lock = storage.FileLock(os.path.join(directory, "run.lock"))
  try:
    if not lock.acquire():
      raise ValueError(
        f"{directory}: {_whose(lock.path)} works in this folder; wait until it has ended, or choose another"
      )
    lock.say({"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()})
  except storage.CannotWrite as e:
    lock.release()
    raise CheckpointError(str(e)) from e
  token = _held.set(held | {directory})
  try:
    yield
  finally:
    _held.reset(token)
    lock.release()
    if made:
      with contextlib.suppress(OSError):
        os.rmdir(directory)


def _whose(lock: str) -> str:
  about = storage.holder(lock)
  if not {"host", "pid", "started"} <= about.keys():
    return "another process"
  since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about["started"]))
  return f"another process (number {about['pid']} on {about['host']}, since {since})"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl. A last line that a killed process left unfinished is passed over.

  Raises:
    ValueError: no such file, or a line that is no JSON object.
  """
  if not os.path.isfile(path):
    raise ValueError(f"{os.fspath(path)}: no such file; pass the metrics.jsonl of a run")
  with open(path, encoding="utf-8") as f:
    text = f.read()
  lines = text.split("\n")[:-1]  # what follows the last line break is torn
  found = []
  for number, line in enumerate(lines, 1):
    try:
      found.append(dict(json.loads(line)))
    except (ValueError, TypeError) as e:
      raise ValueError(f"{os.fspath(path)}, line {number}: no JSON object ({line[:60]!r})") from e
  return found


class MetricsLog:
  """metrics.jsonl: a JSON object a line, appended. Opening it cuts away what is after `step` or torn.

  Opening, `write` and `sync` raise CheckpointError where the disk is full.
  """

  def __init__(self, path: str, step: int):
    self.path = path
    self._file = None
    if jax.process_index():
      return
    kept = [] if not step or not os.path.exists(path) else read_metrics(path)
    kept = [line for line in kept if line["step"] <= step]
    with storage.writing(path, _KEPT, CheckpointError):
      storage.write(path, "".join(json.dumps(line) + "\n" for line in kept))
      self._file = open(path, "a", encoding="utf-8")

  def write(self, line: Mapping[str, float]) -> None:
    """Appends one line, at once. JSON has no NaN: numbers that are not finite are left out."""
    if self._file is None:
      return
    with storage.writing(self.path, _KEPT, CheckpointError):
      finite = {name: x for name, x in line.items() if math.isfinite(x)}
      self._file.write(json.dumps(finite) + "\n")
      self._file.flush()

  def sync(self) -> None:
    """Returns when the lines are on the disk: they have to be there before a checkpoint of their step is."""
    if self._file is not None:
      with storage.writing(self.path, _KEPT, CheckpointError):
        os.fsync(self._file.fileno())

  def close(self) -> None:
    if self._file is not None:
      with contextlib.suppress(OSError):  # it tries once more to write a line that `write` failed with
        self._file.close()


def check_unchanged(
  directory: str | os.PathLike[str],
  fingerprint: Mapping[str, Any],
  *,
  partly: bool = False,
  write: bool = False,
) -> None:
  """Compares config.json with this run's `fingerprint`, where there is a checkpoint to go on from.

  Args:
    directory: of the run.
    fingerprint: what must not change between the starts of a run; anything JSON can hold, nested.
    partly: what is not in `fingerprint` is not known yet, and not compared.
    write: where nothing is compared, it becomes config.json.

  Raises:
    ValueError: the two differ; names every changed key, its old and its new value.
    CheckpointError: the disk is full.
  """
  try:
    text = json.dumps(fingerprint, indent=2, sort_keys=True)
  except TypeError as e:
    raise ValueError(f"fingerprint: {e}; accepted: what JSON can hold") from e
  path = os.path.join(directory, "config.json")
  if not checkpoint_steps(directory) or not os.path.exists(path):
    if write and not jax.process_index():
      with storage.writing(path, "nothing was begun", CheckpointError):
        storage.write(path, text + "\n")
    return
  old, new = read_json(path), json.loads(text)
  if not isinstance(old, dict):
    raise ValueError(f"{path} holds no object; choose another directory, or repair it")
  old, new = flatten({k: x for k, x in old.items() if k in new} if partly else old), flatten(new)
  changed = [k for k in {**old, **new} if (k in old, old.get(k)) != (k in new, new.get(k))]
  if changed:
    was, now = ({k: json.dumps(side[k]) if k in side else "absent" for k in changed} for side in (old, new))
    changes = "; ".join(f"{name} was {was[name]}, is {now[name]}" for name in changed)
    raise ValueError(
      f"{path}: the run in this directory was started with another configuration: {changes}; go on with the"
      " old one, or start another run in a new directory (from this one's model, where that is wanted)"
    )


def checkpoint_steps(directory: str | os.PathLike[str]) -> list[int]:
  """Steps of a run's whole checkpoints, ascending, without opening them as a run does, which tidies."""
  folder = os.path.join(directory, "checkpoints")
  names = os.listdir(folder) if os.path.isdir(folder) else []
  return sorted(int(name) for name in names if name.isdecimal())
