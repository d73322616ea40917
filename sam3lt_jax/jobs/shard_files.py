"""The files of a job's shards: their names, which of them are committed, whether they are what was written.

`ledger` says how they come to be.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from sam3lt_jax import locks
from sam3lt_jax.jobs import files

SHARDS = "shards"
_NAME = re.compile(r"(shard-([0-9]+))\.(jsonl|lock|jsonl\.part)")
_DATA, _LOCK, _PART = "jsonl", "lock", "jsonl.part"
_MOST = 1 << 53  # a number of a digest file that is larger is none that was written


class Damaged(ValueError):
  """A committed shard that is not what was written; the message names it."""


class Unreadable(Damaged):
  """One of which the system does not say what is in it: it may be whole."""


def shard_name(index: int) -> str:
  return f"shard-{index:05d}"


def data_path(directory: str, index: int) -> str:
  return files.join(directory, SHARDS, f"{shard_name(index)}.jsonl")


def digest_path(directory: str, index: int) -> str:
  return files.join(directory, SHARDS, f"{shard_name(index)}.json")


def part_path(directory: str, index: int) -> str:
  return f"{data_path(directory, index)}.part"


def lock_path(directory: str, index: int) -> str:
  return files.join(directory, SHARDS, f"{shard_name(index)}.lock")


def committed(directory: str) -> set[int]:
  """Indices of the committed shards, from one listing of the folder."""
  return _indices(directory, _DATA)


def is_committed(directory: str, index: int) -> bool:
  return files.exists(data_path(directory, index))


def started(directory: str) -> set[int]:
  """Indices of the shards with a .part file: in work, or left by a kill."""
  return _indices(directory, _PART)


def _indices(directory: str, kind: str) -> set[int]:
  matches = map(_NAME.fullmatch, files.names(files.join(directory, SHARDS)))
  return {int(m[2]) for m in matches if m and m[3] == kind and m[1] == shard_name(int(m[2]))}


def read_digest(directory: str, index: int) -> dict[str, Any]:
  """A committed shard's digest file: see `ledger.ShardWriter.commit`. Raises Damaged."""
  try:
    data = files.read(digest_path(directory, index))
  except FileNotFoundError:
    raise Damaged(f"{shard_name(index)} is damaged: its digest file is missing") from None
  except OSError as e:
    raise Unreadable(f"{shard_name(index)}: its digest file cannot be read: {e.strerror or e}") from e
  about = parse_digest(data)
  if about is None:
    raise Damaged(f"{shard_name(index)} is damaged: its digest file is not what was written")
  if about.get("shard", index) != index:
    raise Damaged(f"{shard_name(index)} is damaged: it was written as {shard_name(about['shard'])}")
  return about


def read_digests(directory: str, indices: Sequence[int]) -> dict[int, dict[str, Any]]:
  """Those of `indices` that are sound; read at once where that is quicker."""
  try:
    contents = files.read_several([digest_path(directory, i) for i in indices])
  except OSError:  # one of them; which and why says `read_digest`
    return {}
  found = {i: about for i, data in zip(indices, contents) if (about := parse_digest(data)) is not None}
  return {i: about for i, about in found.items() if about.get("shard", i) == i}


def parse_digest(data: bytes | None) -> dict[str, Any] | None:
  """The content of a digest file; None if there is none, or a value in it cannot have been written."""
  try:
    about = json.loads(data or b"")
    sound = isinstance(about["sha256"], str) and all(map(about.__contains__, ("records", "bytes")))
    counts = [about[key] for key in ("records", "bytes", "failures", "shard", "recovered") if key in about]
    counts += about.get("reasons", {}).values()
    times = [about[key] for key in ("started", "committed") if key in about]
    sound &= all(type(n) is int and 0 <= n < _MOST for n in counts)
    sound &= all(type(t) in (int, float) and 0 <= t < _MOST for t in times)
    sound &= all(is_failure(example) for example in about.get("examples", []))
    sound &= all(isinstance(about.get(key, ""), str) for key in ("host", "settings"))
    sound &= type(about.get("process", 0)) is int
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return None
  return about if sound else None


def record_of(line: bytes) -> dict[str, Any] | None:
  """The record of a whole line: an object with an id, and results or an error. None if it is none."""
  if not line.endswith(b"\n"):
    return None
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(record, dict) or not isinstance(record.get("id"), str):
    return None
  return record if is_failure(record) or isinstance(record.get("results"), list) else None


def is_failure(record: Any) -> bool:
  """Whether this is the record of an image that failed."""
  texts = ("id", "error", "message")
  return isinstance(record, dict) and all(isinstance(record.get(key), str) for key in texts)


def read_shard(directory: str, index: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """(digest file, records) of a committed shard, whole and as it was written.

  Raises:
    Damaged: it is not, or cannot be read.
  """
  name = shard_name(index)
  about = read_digest(directory, index)
  try:
    data = files.read(data_path(directory, index))
  except FileNotFoundError:
    raise Damaged(f"{name} is damaged: its data are missing") from None
  except OSError as e:
    raise Unreadable(f"{name} cannot be read: {e.strerror or e}") from e
  if len(data) != about["bytes"]:
    raise Damaged(f"{name} is damaged: it has {len(data)} of {about['bytes']} bytes")
  if hashlib.sha256(data).hexdigest() != about["sha256"]:
    raise Damaged(f"{name} is damaged: its content is not what was written")
  records = [record_of(line) for line in data.splitlines(keepends=True)]
  if None in records:
    raise Damaged(f"{name} is damaged: line {records.index(None) + 1} is no record")
  failures = sum(map(is_failure, records))
  for key, count in (("records", len(records)), ("failures", failures)):
    if about.get(key, count) != count:
      raise Damaged(f"{name} is damaged: it has {count} {key}, its digest file says {about[key]}")
  return about, records


def read_records(directory: str, index: int) -> list[dict[str, Any]]:
  """The records of a committed shard. Raises Damaged."""
  return read_shard(directory, index)[1]


def damage(directory: str, index: int) -> str | None:
  """What is wrong with a committed shard, all of which is read for it; None if nothing is."""
  try:
    read_shard(directory, index)
  except Damaged as e:
    return str(e)
  return None


def tidy(directory: str) -> None:
  """Removes the locks that jobs killed just after a commit left behind."""
  if files.is_remote(directory):
    return
  done = committed(directory)
  for index in _indices(directory, _LOCK) & done:
    lock = locks.FileLock(lock_path(directory, index))
    if lock.acquire(wait=0):
      lock.release()


def set_aside(directory: str, index: int) -> None:
  """Takes a damaged shard out of the job: its files become *.damaged, and it is missing again.

  Raises CannotWrite; ValueError if another process works on it.
  """
  with files.exclusive(lock_path(directory, index), wait=10):
    for path in (data_path(directory, index), digest_path(directory, index)):
      if files.exists(path):
        names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        free = next(name for n in names if not files.exists(name := f"{path}.damaged{n}"))
        files.move(path, free)


def drop_started(directory: str) -> int:
  """Removes all .part files and returns how many there were.

  Raises:
    ValueError: a process is at work on one.
  """
  if files.is_remote(directory):
    return 0
  parts = sorted(started(directory))
  busy = [i for i in parts if locks.is_held(lock_path(directory, i))]
  if busy:
    raise ValueError(f"another job works on {directory} ({shard_name(busy[0])}); end it first")
  for index in parts:
    with files.exclusive(lock_path(directory, index), wait=1), files.writing(part_path(directory, index)):
      os.unlink(part_path(directory, index))
  return len(parts)
