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
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sam3lt_jax import locks, storage
from sam3lt_jax.jobs import files, shard_files

if TYPE_CHECKING:
  from sam3lt_jax.jobs.plan import Plan, Shard

_EXAMPLES = 3  # failures a reason that a shard's digest file shows
_CLASHES = 5  # times that a put is repeated because another job put the same shard


class Busy(ValueError):
  """Another process works on this shard, or has just committed it: go on with the next one."""


class ShardWriter:
  """A shard in work: a context manager that holds its lock. Not for several threads at once.

      with ShardWriter(plan, shard) as writer:
        todo = [item for item in shard.items if item.id not in writer.done]
        writer.append([{"id": ..., "uri": ..., "results": [...]}, ...])
        writer.commit({"seconds": 12.5})

  Leaving it without `commit` keeps what was appended, for the next run (on an object store it is lost).

  Attributes:
    done: ids of the items that have a record: those found on entering and those appended since.

  Raises, on entering:
    Busy: another process works on the shard or has just committed it.
    CannotWrite: the folder cannot be written.
    ValueError: the plan was changed by another job.
  """

  def __init__(self, plan: Plan, shard: Shard, process: int = 0):
    self.plan, self.shard, self.process = plan, shard, process
    self.done: set[str] = set()
    self._ids = frozenset(item.id for item in shard.items)
    self._tally = _Tally()
    kind = _MemoryPart if files.is_remote(plan.directory) else _FilePart
    self._part = kind(plan.directory, shard, self._ids)

  def open(self) -> ShardWriter:
    """Takes the lock and reads what there is; as entering does, for who leaves it elsewhere by `close`."""
    self._part.open()
    try:
      self.plan.check_current()
      for record in self._part.recover():
        self._count(record)
      self._recovered = len(self.done)
      self.begin()
    except BaseException:
      self._part.close()
      raise
    return self

  def begin(self) -> None:
    """Work begins now, for the rate. Opening does it; who compiles after that does it again."""
    self._started = time.time()
    about = {"host": locks.host_name(), "process": self.process, "pid": os.getpid(), "started": self._started}
    self._part.say(about | {"recovered": self._recovered})

  def close(self) -> None:
    """Lets go of the lock. More than once does no harm."""
    self._part.close()

  def __enter__(self) -> ShardWriter:
    return self.open()

  def __exit__(self, *exc) -> None:
    self.close()

  def _count(self, record: dict[str, Any]) -> None:
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
        raise ValueError(f"records: {item_id!r} is no item of {shard_files.shard_name(self.shard.index)}")
      if item_id in self.done or item_id in lines:
        raise ValueError(f"records: {item_id!r} has a record already")
      lines[item_id] = _encode(record)
    if lines:
      self._part.append(lines)
      for record in records:
        self._count(record)

  def commit(self, summary: dict[str, Any] | None = None) -> None:
    """Makes the shard final. Its digest file holds

    "shard", "sha256" and "bytes" of the data; "records", "failures" (how many), "reasons" (how many a
    reason), "examples" (some failures); "host", "process", "started", "committed" (seconds since the epoch),
    "seconds" and "recovered" (records that earlier runs had written); "settings" (a digest of
    the plan's fingerprint); and what `summary` adds or replaces.

    Raises:
      ValueError: an item has no record yet.
      CannotWrite: the disk is full or became read-only; the records are kept.
    """
    if self.done != self._ids:
      missing = [item.id for item in self.shard.items if item.id not in self.done]
      raise ValueError(
        f"{shard_files.shard_name(self.shard.index)} cannot be committed: {len(missing)} items "
        f"have no record (such as {missing[0]!r})"
      )
    now = time.time()
    about = {
      "shard": self.shard.index,
      "records": len(self.done),
      "failures": sum(self._tally.reasons.values()),
      "reasons": dict(self._tally.reasons),
      "examples": self._tally.examples,
      "host": locks.host_name(),
      "process": self.process,
      "started": self._started,
      "committed": now,
      "seconds": round(now - self._started, 3),
      "recovered": self._recovered,
      "settings": self.plan.settings,
    }
    self._part.commit(about | dict(summary or {}))


class _Tally:
  """Failures of a shard: how many a reason, and the first few of each."""

  def __init__(self):
    self.reasons: collections.Counter[str] = collections.Counter()
    self.examples: list[dict[str, Any]] = []

  def add(self, record: dict[str, Any]) -> None:
    reason = record.get("error")
    if reason is None:
      return
    self.reasons[reason] += 1
    if self.reasons[reason] <= _EXAMPLES:
      self.examples.append({key: record[key] for key in ("id", "uri", "error", "message") if key in record})


def _encode(record: dict[str, Any]) -> bytes:
  try:
    # ASCII: file names that are not UTF-8 survive, and no line break but ours is in a line.
    return json.dumps(record, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
  except (TypeError, ValueError) as e:
    raise ValueError(f"records: {record.get('id')!r} cannot be written as JSON: {e}") from None


def _digest_file(about: dict[str, Any]) -> bytes:
  return json.dumps(about, indent=1).encode() + b"\n"


class _FilePart:
  """A .part file under a lock, in a local folder."""

  def __init__(self, directory: str, shard: Shard, ids: Collection[str]):
    self._index, self._ids = shard.index, ids
    self._final = shard_files.data_path(directory, shard.index)
    self._path = shard_files.part_path(directory, shard.index)
    self._digest_path = shard_files.digest_path(directory, shard.index)
    self._lock = locks.FileLock(shard_files.lock_path(directory, shard.index))
    self._descriptor: int | None = None
    self._size, self._sha = 0, hashlib.sha256()

  def open(self) -> None:
    if not self._lock.acquire():
      raise Busy(f"{shard_files.shard_name(self._index)}: another process works on it")
    try:
      if os.path.exists(self._final):
        raise Busy(f"{shard_files.shard_name(self._index)} was committed meanwhile")
      with files.writing(self._path):
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        storage.sync_folder(os.path.dirname(self._path))
    except BaseException:
      self._lock.release()
      raise

  def say(self, about: dict[str, Any]) -> None:
    self._lock.say(about)

  def recover(self) -> Iterator[dict[str, Any]]:
    """The records of the longest sound beginning of the file; what follows it is cut off."""
    seen = set()
    with open(self._path, "rb") as f:
      for line in f:
        record = shard_files.record_of(line)
        if record is None or record["id"] not in self._ids or record["id"] in seen:
          break
        seen.add(record["id"])
        self._sha.update(line)
        self._size += len(line)
        yield record
    with files.writing(self._path):
      os.ftruncate(self._descriptor, self._size)
      os.fsync(self._descriptor)

  def append(self, lines: dict[str, bytes]) -> None:
    data = b"".join(lines.values())
    try:
      with files.writing(self._path):
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

  def commit(self, about: dict[str, Any]) -> None:
    digest = {"sha256": self._sha.hexdigest(), "bytes": self._size}
    files.write_atomic(self._digest_path, _digest_file(about | digest), alone=True)
    files.move(self._path, self._final)
    with files.writing(self._final):
      storage.sync_folder(os.path.dirname(self._final))

  def close(self) -> None:
    if self._descriptor is not None:
      os.close(self._descriptor)
      self._descriptor = None
      with contextlib.suppress(OSError):
        if not os.path.getsize(self._path):
          os.unlink(self._path)
    self._lock.release()


class _MemoryPart:
  """Lines in memory, to be put as one object."""

  def __init__(self, directory: str, shard: Shard, ids: Collection[str]):
    self._shard = shard
    self._final = shard_files.data_path(directory, shard.index)
    self._digest_path = shard_files.digest_path(directory, shard.index)
    self._lines: dict[str, bytes] = {}

  def open(self) -> None:
    if files.exists(self._final):
      raise Busy(f"{shard_files.shard_name(self._shard.index)} was committed meanwhile")

  def say(self, about: dict[str, Any]) -> None:
    pass

  def recover(self) -> Iterator[dict[str, Any]]:
    return iter(())

  def append(self, lines: dict[str, bytes]) -> None:
    self._lines.update(lines)

  def commit(self, about: dict[str, Any]) -> None:
    data = b"".join(self._lines[item.id] for item in self._shard.items)
    digest = _digest_file(about | {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})
    if files.exists(self._final):
      return  # another job's, whole
    for _ in range(_CLASHES):
      files.write_atomic(self._digest_path, digest)
      files.write_atomic(self._final, data)
      # Whoever puts the data last sees here whether the digest beside it is another's, and puts both again.
      if files.read(self._digest_path) == digest:
        return
    raise files.CannotWrite(f"{self._final} is not written: another job keeps writing it; end one of them")

  def close(self) -> None:
    self._lines.clear()
