"""What a run leaves beside its checkpoints: config.json, which says what it is, and metrics.jsonl.

Only the first of several processes writes; the others read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import jax

from sam3lt_jax.checkpoints.engine import flatten
from sam3lt_jax.checkpoints.errors import CheckpointError
from sam3lt_jax.training.integrity import is_disk_full


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
  """metrics.jsonl: a JSON object a line, appended. Opening it cuts away what is after `step` or torn."""

  def __init__(self, path: str, step: int):
    self.path = path
    self._file = None
    if jax.process_index():
      return
    kept = [] if not step or not os.path.exists(path) else read_metrics(path)
    kept = [line for line in kept if line["step"] <= step]
    with open(f"{path}.new", "w", encoding="utf-8") as f:
      f.writelines(json.dumps(line) + "\n" for line in kept)
    os.replace(f"{path}.new", path)
    self._file = open(path, "a", encoding="utf-8")

  def write(self, line: Mapping[str, float]) -> None:
    """Appends one line, at once. JSON has no NaN: numbers that are not finite are left out.

    Raises:
      CheckpointError: the disk is full.
    """
    if self._file is None:
      return
    try:
      finite = {name: x for name, x in line.items() if math.isfinite(x)}
      self._file.write(json.dumps(finite) + "\n")
      self._file.flush()
    except OSError as e:
      if is_disk_full(e):
        raise CheckpointError(f"{self.path}: no space is left on its disk") from e
      raise

  def sync(self) -> None:
    """Returns when the lines are on the disk: they have to be there before a checkpoint of their step is."""
    if self._file is not None:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    if self._file is not None:
      self._file.close()


def check_fingerprint(path: str, fingerprint: Mapping[str, Any], *, resuming: bool) -> None:
  """Compares config.json with this run's `fingerprint`, or writes it.

  Args:
    path: of config.json.
    fingerprint: what must not change between the starts of a run; anything JSON can hold, nested.
    resuming: there is a checkpoint to go on from; without one a file of other contents is replaced.

  Raises:
    ValueError: resuming, and the two differ; names every changed key, its old and its new value.
  """
  try:
    text = json.dumps(fingerprint, indent=2, sort_keys=True)
  except TypeError as e:
    raise ValueError(f"fingerprint: {e}; accepted: what JSON can hold") from e
  if resuming and os.path.exists(path):
    with open(path, encoding="utf-8") as f:
      try:
        old = flatten(json.load(f))
      except ValueError as e:
        raise ValueError(f"{path} is no JSON ({e}); choose another directory, or repair it") from e
    new = flatten(json.loads(text))
    names = [name for name in {**old, **new} if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
    if names:
      changes = "; ".join(
        f"{name} was {_show(old.get(name, _ABSENT))}, is {_show(new.get(name, _ABSENT))}" for name in names
      )
      raise ValueError(f"{path}: the run in this directory was started with another configuration: {changes}")
  elif not jax.process_index():
    with open(f"{path}.new", "w", encoding="utf-8") as f:
      f.write(text + "\n")
    os.replace(f"{path}.new", path)


_ABSENT = object()


def _show(value: Any) -> str:
  return "absent" if value is _ABSENT else json.dumps(value)
