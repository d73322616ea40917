"""What is done: one file a shard, appended to while in work, committed whole with its digest.

Local folders. Records are appended to shard-00012.jsonl.part, each batch by one write and one fsync. A line
counts once it ends in a line feed: after a kill the torn tail is cut, and only what is missing is done. To
commit, the digest file shard-00012.json is written first (aside, then renamed) and the .part renamed to
shard-00012.jsonl last. That rename is the commit, one step that happens or does not: before it the shard is
missing and its .part whole, after it the data and their digest are both there. All of it under the shard's
lock, so that a second job goes on with the next shard.

Object stores. No append, no rename, no locks: records are held in memory and the shard is one object, put
after its digest. Two jobs that do the same shard overwrite each other with the same content (records are put
in the order of the plan); where the content differs, whoever puts last puts both files.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Any

from sam3lt_jax import storage
from sam3lt_jax.jobs import files
from sam3lt_jax.jobs.sources import Item

SHARDS = "shards"
DATA, PART, DIGEST, LOCK = ".jsonl", ".jsonl.part", ".json", ".lock"
_NAME = re.compile(r"shard-([0-9]{5}|[1-9][0-9]{5,})(\..+)")
_MOST = 1 << 53  # a number of a digest file that is larger is none that was written
_EXAMPLES = 3  # failures a reason that are shown
_CLASHES = 5  # times that a put is repeated because another job put the same shard


@dataclasses.dataclass(frozen=True)
class Shard:
  """A part of the job that is done, and committed, as one. `items` are in the order of the plan."""

  index: int
  items: tuple[Item, ...]


class Damaged(ValueError):
  """A committed shard that is not what was written; the message names it."""


class Busy(ValueError):
  """Another process works on this shard, or has just committed it: go on with the next one."""


# ------------------------------------------------------------------ a shard's files


def shard_name(index: int) -> str:
  return f"shard-{index:05d}"


def path(directory: str, index: int, ending: str = DATA) -> str:
  return files.join(directory, SHARDS, shard_name(index) + ending)


def indices(names: Iterable[str], ending: str = DATA) -> set[int]:
  """Of the shards that have a file of this ending, from a listing of the folder."""
  return {int(m[1]) for m in map(_NAME.fullmatch, names) if m and m[2] == ending}


def committed(directory: str) -> set[int]:
  return indices(files.names(files.join(directory, SHARDS)))


def record_of(line: bytes) -> dict[str, Any] | None:
  """The record of a whole line: an object with an id, and results or an error. None if it is none."""
  try:
    record = json.loads(line) if line.endswith(b"\n") else None
  except (ValueError, RecursionError):
    return None
  if not isinstance(record, dict) or not isinstance(record.get("id"), str):
    return None
  return record if is_failure(record) or isinstance(record.get("results"), list) else None


def is_failure(record: Any) -> bool:
  """Whether this is the record of an image that failed."""
  texts = ("id", "error", "message")
  return isinstance(record, dict) and all(isinstance(record.get(key), str) for key in texts)


def read_digests(directory: str, indices: Sequence[int]) -> dict[int, dict[str, Any] | Damaged]:
  """Committed shards' digest files, see `ShardWriter.commit`, or what is wrong with them."""
  contents = files.read_several([path(directory, i, DIGEST) for i in indices])
  return {i: _digest_of(i, data) for i, data in zip(indices, contents)}


def _digest_of(index: int, data: bytes | None) -> dict[str, Any] | Damaged:
  wrong = f"{shard_name(index)} is damaged: "
  if data is None:
    return Damaged(f"{wrong}its digest file is missing")
  try:
    about = json.loads(data)
    counts = [about[key] for key in ("records", "bytes")] + list(about.get("reasons", {}).values())
    counts += [about[key] for key in ("failures", "shard", "recovered") if key in about]
    times = [about[key] for key in ("started", "committed") if key in about]
    sound = (
      all(isinstance(about.get(key, ""), str) for key in ("host", "settings"))
      and isinstance(about["sha256"], str)
      and type(about.get("process", 0)) is int
      and all(type(n) is int and 0 <= n < _MOST for n in counts)
      and all(type(t) in (int, float) and 0 <= t < _MOST for t in times)
      and all(map(is_failure, about.get("examples", ())))
    )
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    sound = False
  if not sound:
    return Damaged(f"{wrong}its digest file is not what was written")
  if about.get("shard", index) != index:
    return Damaged(f"{wrong}it was written as {shard_name(about['shard'])}")
  return about


def read_shard(directory: str, index: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """(digest file, records) of a committed shard, whole and as it was written.

  Raises:
    Damaged: it is not.
    OSError: the system does not say what is in it, and it may be whole.
  """
  [about] = read_digests(directory, [index]).values()
  if isinstance(about, Damaged):
    raise about
  wrong = f"{shard_name(index)} is damaged: "
  try:
    data = files.read(path(directory, index))
  except FileNotFoundError:
    raise Damaged(f"{wrong}its data are missing") from None
  if len(data) != about["bytes"]:
    raise Damaged(f"{wrong}it has {len(data)} of {about['bytes']} bytes")
  if hashlib.sha256(data).hexdigest() != about["sha256"]:
    raise Damaged(f"{wrong}its content is not what was written")
  records = [record_of(line) for line in data.splitlines(keepends=True)]
  if None in records:
    raise Damaged(f"{wrong}line {records.index(None) + 1} is no record")
  failures = sum(map(is_failure, records))
  for key, count in (("records", len(records)), ("failures", failures)):
    if about.get(key, count) != count:
      raise Damaged(f"{wrong}it has {count} {key}, its digest file says {about[key]}")
  return about, records


def set_aside(directory: str, index: int) -> None:
  """Takes a damaged shard out of the job: its files become *.damaged, and it is missing again.

  Raises CannotWrite; ValueError if another process works on it.
  """
  with files.exclusive(path(directory, index, LOCK), wait=10):
    for name in (path(directory, index), path(directory, index, DIGEST)):
      if files.exists(name):
        files.move(name, f"{name}.damaged")


def drop_started(directory: str) -> int:
  """Removes all .part files; how many there were. Raises ValueError: a process is at work on one."""
  if files.is_remote(directory):
    return 0
  parts = sorted(indices(files.names(files.join(directory, SHARDS)), PART))
  for index in parts:
    if storage.is_held(path(directory, index, LOCK)):
      raise ValueError(f"another job works on {directory} ({shard_name(index)}); end it first")
  for index in parts:
    part = path(directory, index, PART)
    with files.exclusive(path(directory, index, LOCK), wait=1), files.writing(part):
      os.unlink(part)
  return len(parts)


@dataclasses.dataclass
class Tally:
  """What records say: instances found, failures a reason, the first few of each."""

  instances: int = 0
  reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  examples: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def add(self, record: dict[str, Any]) -> None:
    self.instances += len(record.get("results", ()))
    if "error" in record:
      self.reasons[record["error"]] += 1
      self.show(record)

  def show(self, failure: dict[str, Any]) -> None:
    if sum(one["error"] == failure["error"] for one in self.examples) < _EXAMPLES:
      self.examples.append({k: failure[k] for k in ("id", "uri", "error", "message") if k in failure})


# ------------------------------------------------------------------ a shard in work


class ShardWriter:
  """A shard in work: a context manager that holds its lock. Not for several threads at once.

      with ShardWriter(plan, shard) as writer:
        todo = [item for item in shard.items if item.id not in writer.done]
        writer.append([{"id": ..., "uri": ..., "results": [...]}, ...])
        writer.commit()

  Leaving it without `commit` keeps what was appended, for the next run (on an object store it is lost).

  Attributes:
    plan: the `plan.Plan` that the shard is of.
    done: ids of the items that have a record: those found on entering and those appended since.

  Raises, on entering:
    Busy: another process works on the shard or has just committed it.
    CannotWrite: the folder cannot be written.
    ValueError: the plan was changed by another job.
  """

  def __new__(cls, plan: Any, *_: Any, **__: Any) -> ShardWriter:
    return super().__new__(_ObjectWriter if files.is_remote(plan.directory) else cls)

  def __init__(self, plan: Any, shard: Shard, process: int = 0):
    self.plan, self.shard, self.process = plan, shard, process
    self.done: set[str] = set()
    self._ids = frozenset(item.id for item in shard.items)
    self._tally = Tally()
    endings = (DATA, PART, DIGEST, LOCK)
    self._data, self._part, self._digest, lock = (path(plan.directory, shard.index, one) for one in endings)
    self._lock = storage.FileLock(lock)
    self._descriptor: int | None = None
    self._size, self._sha = 0, hashlib.sha256()

  def open(self) -> ShardWriter:
    """Takes the lock and reads what there is; as entering does, for who leaves it elsewhere by `close`."""
    try:
      self._take()
      self.plan.check_current()
      self._recover()
      self._recovered = len(self.done)
      self.begin()
    except BaseException:
      self.close()
      raise
    return self

  def _take(self) -> None:
    if not self._lock.acquire():
      raise Busy(f"{shard_name(self.shard.index)}: another process works on it")
    if os.path.exists(self._data):
      raise Busy(f"{shard_name(self.shard.index)} was committed meanwhile")
    with files.writing(self._part):
      self._descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o666)
      storage.sync_folder(os.path.dirname(self._part))

  def _recover(self) -> None:
    """Counts the records of the longest sound beginning of the file; what follows it is cut off."""
    with open(self._part, "rb") as f:
      for line in f:
        record = record_of(line)
        if record is None or record["id"] not in self._ids or record["id"] in self.done:
          break
        self._sha.update(line)
        self._size += len(line)
        self._count([record])
    with files.writing(self._part):
      os.ftruncate(self._descriptor, self._size)
      os.fsync(self._descriptor)

  def begin(self) -> None:
    """Work begins now, for the rate. Opening does it; who compiles after that does it again."""
    self._started = time.time()
    about = {"host": socket.gethostname(), "process": self.process, "pid": os.getpid()}
    self._lock.say(about | {"started": self._started, "recovered": self._recovered})

  def close(self) -> None:
    """Lets go of the lock. More than once does no harm."""
    if self._descriptor is not None:
      os.close(self._descriptor)
      self._descriptor = None
      with contextlib.suppress(OSError):
        if not os.path.getsize(self._part):
          os.unlink(self._part)
    self._lock.release()

  __enter__ = open

  def __exit__(self, *exc) -> None:
    self.close()

  def _count(self, records: Iterable[dict[str, Any]]) -> None:
    for record in records:
      self.done.add(record["id"])
      self._tally.add(record)

  def append(self, records: Sequence[dict[str, Any]]) -> None:
    """Writes records, one an item; when it returns they are on the disk.

    Args:
      records: JSON objects with "id", an item of this shard; either "results" or, for a failure, "error"
        (a reason code) and "message".

    Raises:
      ValueError: an id that is not of this shard or has a record already, or a value that JSON cannot hold.
      CannotWrite: the disk is full or became read-only; nothing of this call is kept, all before it is.
    """
    lines: dict[str, bytes] = {}
    for record in records:
      item_id = record.get("id")
      if item_id not in self._ids:
        raise ValueError(f"records: {item_id!r} is no item of {shard_name(self.shard.index)}")
      if item_id in self.done or item_id in lines:
        raise ValueError(f"records: {item_id!r} has a record already")
      try:
        # ASCII: file names that are not UTF-8 survive, and no line break but ours is in a line.
        text = json.dumps(record, separators=(",", ":"), allow_nan=False)
      except (TypeError, ValueError) as e:
        raise ValueError(f"records: {item_id!r} cannot be written as JSON: {e}") from None
      lines[item_id] = text.encode("ascii") + b"\n"
    if lines:
      self._write(lines)
      self._count(records)

  def commit(self, **about: Any) -> None:
    """Makes the shard final. Its digest file holds

    "shard", "sha256" and "bytes" of the data; "records", "instances", "failures" (how many), "reasons" (how
    many a reason), "examples" (some failures); "host", "process", "started", "committed" (seconds since the
    epoch), "seconds" and "recovered" (records that earlier runs had written); "settings" (a digest of the
    plan's fingerprint); and what `about` adds or replaces.

    Raises:
      ValueError: an item has no record yet.
      CannotWrite: the disk is full or became read-only; the records are kept.
    """
    if missing := [item.id for item in self.shard.items if item.id not in self.done]:
      raise ValueError(
        f"{shard_name(self.shard.index)} cannot be committed: {len(missing)} items have no record (such as"
        f" {missing[0]!r})"
      )
    now, tally = time.time(), self._tally
    self._commit(
      {
        "shard": self.shard.index,
        "records": len(self.done),
        "instances": tally.instances,
        "failures": tally.reasons.total(),
        "reasons": tally.reasons,
        "examples": tally.examples,
        "host": socket.gethostname(),
        "process": self.process,
        "started": self._started,
        "committed": now,
        "seconds": round(now - self._started, 3),
        "recovered": self._recovered,
        "settings": self.plan.settings,
      }
      | about
    )

  def _write(self, lines: dict[str, bytes]) -> None:
    data = b"".join(lines.values())
    try:
      with files.writing(self._part):
        written = 0
        while written < len(data):  # a disk that fills up takes a part first
          written += os.pwrite(self._descriptor, data[written:], self._size + written)
        os.fsync(self._descriptor)
    except files.CannotWrite:
      with contextlib.suppress(OSError):
        os.ftruncate(self._descriptor, self._size)
      raise
    self._size += len(data)
    self._sha.update(data)

  def _commit(self, about: dict[str, Any]) -> None:
    files.write_atomic(self._digest, _with_digest(about, self._sha, self._size), alone=True)
    files.move(self._part, self._data)
    with files.writing(self._data):
      storage.sync_folder(os.path.dirname(self._data))


class _ObjectWriter(ShardWriter):
  """On an object store: lines in memory, to be put as one object."""

  def _take(self) -> None:
    self._lines: dict[str, bytes] = {}
    if files.exists(self._data):
      raise Busy(f"{shard_name(self.shard.index)} was committed meanwhile")

  def _recover(self) -> None:
    pass

  def _write(self, lines: dict[str, bytes]) -> None:
    self._lines.update(lines)

  def _commit(self, about: dict[str, Any]) -> None:
    data = b"".join(self._lines[item.id] for item in self.shard.items)
    digest = _with_digest(about, hashlib.sha256(data), len(data))
    if files.exists(self._data):
      return  # another job's, whole
    for _ in range(_CLASHES):
      files.write_atomic(self._digest, digest)
      files.write_atomic(self._data, data)
      # Whoever puts the data last sees here whether the digest beside it is another's, and puts both again.
      if files.read(self._digest) == digest:
        return
    raise files.CannotWrite(f"{self._data} is not written: another job keeps writing it; end one of them")


def _with_digest(about: dict[str, Any], sha: Any, size: int) -> bytes:
  return json.dumps(about | {"sha256": sha.hexdigest(), "bytes": size}, indent=1).encode() + b"\n"
