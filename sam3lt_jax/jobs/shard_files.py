"""The files of a job's shards: their names, which of them are committed, whether they are what was written.

`ledger` says how they come to be.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from sam3lt_jax.jobs import files, locks

SHARDS = "shards"
_DATA = re.compile(r"shard-(\d+)\.jsonl")
_LOCK = re.compile(r"shard-(\d+)\.lock")
_PART = re.compile(r"shard-(\d+)\.jsonl\.part")


class Damaged(ValueError):
  """A committed shard that is not what was written; the message names it."""


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


def _indices(directory: str, pattern: re.Pattern) -> set[int]:
  matches = map(pattern.fullmatch, files.names(files.join(directory, SHARDS)))
  return {int(match[1]) for match in matches if match}


def read_digest(directory: str, index: int) -> dict[str, Any]:
  """A committed shard's digest file: see `ledger.ShardWriter.commit`. Raises Damaged."""
  try:
    about = parse_digest(files.read(digest_path(directory, index)))
  except FileNotFoundError:
    raise Damaged(f"{shard_name(index)} is damaged: its digest file is missing") from None
  except OSError as e:
    raise Damaged(f"{shard_name(index)}: its digest file cannot be read: {e.strerror or e}") from e
  if about is None:
    raise Damaged(f"{shard_name(index)} is damaged: its digest file is not what was written")
  return about


def parse_digest(data: bytes | None) -> dict[str, Any] | None:
  """The content of a digest file; None if there is none or it is not one."""
  try:
    about = json.loads(data or b"")
    sound = isinstance(about["sha256"], str) and all(type(about[key]) is int for key in ("records", "bytes"))
  except (ValueError, KeyError, TypeError):
    return None
  return about if sound else None


def read_shard(directory: str, index: int) -> tuple[dict[str, Any], list[bytes]]:
  """(digest file, lines) of a committed shard, whole and as it was written.

  Raises:
    Damaged: it is not, or cannot be read.
  """
  about = read_digest(directory, index)
  try:
    data = files.read(data_path(directory, index))
  except OSError as e:
    raise Damaged(f"{shard_name(index)} cannot be read: {e.strerror or e}") from e
  if len(data) != about["bytes"]:
    raise Damaged(f"{shard_name(index)} is damaged: it has {len(data)} of {about['bytes']} bytes")
  if hashlib.sha256(data).hexdigest() != about["sha256"]:
    raise Damaged(f"{shard_name(index)} is damaged: its content is not what was written")
  return about, data.split(b"\n")[:-1]


def read_records(directory: str, index: int) -> Iterator[dict[str, Any]]:
  """The records of a committed shard. Raises Damaged."""
  return map(json.loads, read_shard(directory, index)[1])


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
  with locks.exclusive(lock_path(directory, index), wait=10):
    for path in (data_path(directory, index), digest_path(directory, index)):
      if files.exists(path):
        files.move(path, f"{path}.damaged")


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
    with locks.exclusive(lock_path(directory, index), wait=1), files.writing(part_path(directory, index)):
      os.unlink(part_path(directory, index))
  return len(parts)
