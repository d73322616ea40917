"""The frozen plan of a job: its items split into shards, and what they are asked with.

`Plan.open` makes it or, on a restart, opens it and compares: other items, another model or other phrases are
refused in one sentence, because half of the results would answer another question. What was agreed on stands
in OUT/plan.json, the items in OUT/items.jsonl, a line each; a shard is a run of these lines.

The items file is written first and plan.json last, both whole or not at all, under a lock of the folder: a
job killed in between has no plan, and of two started at once one makes it and the other opens it. An object
store has no lock: there plan.json is read back, so that the one who was overwritten notices.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sam3lt_jax.jobs import files, locks, plan_files, shard_files
from sam3lt_jax.jobs.sources import Item


@dataclasses.dataclass(frozen=True)
class Shard:
  """A part of the job that is done, and committed, as one. `items` are in the order of the plan."""

  index: int
  items: tuple[Item, ...]


class Plan:
  """A job's plan. Use `Plan.open` to work on the job and `Plan.load` to look at it.

  Attributes:
    directory: the job's folder, absolute, or its URL.
    fingerprint: what the job asks and with what, as `open` was given it: plain JSON values.
    shards: the shards, each read from the items file when it is asked for.
    num_items: how many items all shards have.
    settings: a digest of the fingerprint, by which committed shards tell what they were made with.
    notes: what `open` did that the user may want to know, a sentence each.
  """

  def __init__(self, directory: str, content: dict[str, Any], notes: Sequence[str] = ()):
    self.directory, self._content, self.notes = directory, content, list(notes)
    self.fingerprint: dict[str, Any] = content["fingerprint"]
    self.settings = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    self.shards: Sequence[Shard] = _Shards(directory, content)
    self.num_items = sum(content["shards"])

  @classmethod
  def open(
    cls,
    directory: str | os.PathLike,
    items: Iterable[Item],
    fingerprint: dict[str, Any],
    shard_size: int,
    *,
    allow_change: bool = False,
    verify: bool = False,
  ) -> Plan:
    """Makes the plan of a new job, or opens that of one begun earlier.

    Args:
      directory: the job's folder or URL; made if it is not there.
      items: what to read, see `sources.list_items`.
      fingerprint: whatever must be the same on a restart, plain JSON values: model, profile, dtype,
        threshold, phrases, ... `merge` takes the order of categories from its "phrases", a list.
      shard_size: items a shard. A job begun earlier keeps its own.
      allow_change: go on although something changed. New items become new shards; items that are gone are
        kept; items found at another place are read there; another fingerprint is for shards not committed
        yet, and started ones begin again. `notes` says what was done.
      verify: read every committed shard, and set aside those that are not what was written, so that they
        are done again.

    Raises:
      ValueError: something changed (named, with the remedy), a bad argument, a damaged plan, a folder that
        has shards but no plan.
      CannotWrite: the folder cannot be written.
    """
    directory = files.absolute(directory)
    if type(shard_size) is not int or shard_size < 1:
      raise ValueError(f"shard_size must be a whole number of at least 1, got {shard_size!r}")
    items = list(items) if isinstance(items, Iterator) else items
    fingerprint = plan_files.plain(fingerprint)
    files.make_folder(files.join(directory, shard_files.SHARDS))
    with locks.exclusive(files.join(directory, ".plan.lock"), wait=60):
      content, notes = plan_files.read(directory), []
      own = None
      if content is None:
        own = plan_files.create(directory, items, fingerprint, shard_size)
        content = plan_files.read(directory)  # an object store may hold what another job put since
      if content != own:
        content, notes = plan_files.agree(directory, content, items, fingerprint, shard_size, allow_change)
      shard_files.tidy(directory)
    plan = cls(directory, content, notes)
    if verify:
      plan.notes += [f"{what}: it is done again" for what in plan.set_damaged_aside()]
    return plan

  @classmethod
  def load(cls, directory: str | os.PathLike) -> Plan:
    """The plan of an existing job, to look at. Raises ValueError if there is none or it is damaged."""
    directory = files.absolute(directory)
    content = plan_files.read(directory)
    if content is None:
      there = "holds no job" if files.is_folder(directory) else "is no folder"
      raise ValueError(f"{directory} {there}; accepted: the output folder of a job, with a {plan_files.PLAN}")
    return cls(directory, content)

  @classmethod
  def is_done(cls, directory: str | os.PathLike) -> bool:
    """Whether a job stands there of which nothing is left."""
    try:
      plan = cls.load(directory)
      return len(plan.committed()) == len(plan.shards)
    except (ValueError, OSError):  # whoever opens it says what is wrong
      return False

  def committed(self) -> set[int]:
    """Indices of the shards that are done, as the folder has them now."""
    return shard_files.committed(self.directory)

  def is_committed(self, index: int) -> bool:
    return shard_files.is_committed(self.directory, index)

  def missing(self, process_index: int = 0, process_count: int = 1) -> Iterator[Shard]:
    """Shards to do: first those with index % process_count == process_index, then, from the other end,
    those that other processes have not done yet.

    One that is committed meanwhile is skipped; one that another process works on is not known here:
    `ledger.ShardWriter` raises Busy for it.
    """
    if not 0 <= process_index < process_count:
      raise ValueError(f"process_index must be within 0..{process_count - 1}, got {process_index}")
    done = self.committed()
    left = [i for i in range(len(self.shards)) if i not in done]
    own = [i for i in left if i % process_count == process_index]
    others = [i for i in reversed(left) if i % process_count != process_index]
    if files.is_remote(self.directory):
      # No locks there: helpers that all begin at the end would do the same shards.
      random.Random(process_index).shuffle(others)
    for index in itertools.chain(own, others):
      if not self.is_committed(index):
        yield self.shards[index]

  def set_damaged_aside(self) -> list[str]:
    """Reads every committed shard; those that are not what was written become missing again.

    Returns what was wrong, a sentence a shard. Raises CannotWrite.
    """
    said = []
    for index in sorted(self.committed()):
      if what := shard_files.damage(self.directory, index):
        shard_files.set_aside(self.directory, index)
        said.append(what)
    return said

  def check_current(self) -> None:
    """Raises ValueError if another job changed the plan since this one opened it."""
    content = plan_files.read(self.directory)
    if content is None or content["fingerprint"] != self.fingerprint:
      raise ValueError(f"the plan of {self.directory} was changed by another job; start this one again")


class _Shards(Sequence):
  """Shards as runs of lines of the items file; in memory are only their first bytes' offsets."""

  def __init__(self, directory: str, content: dict[str, Any]):
    self._path = files.join(directory, content["items_file"])
    self._sizes: list[int] = content["shards"]
    self._digest = content["items_sha256"]
    self._offsets: array.array | None = None

  def __len__(self) -> int:
    return len(self._sizes)

  def size(self, index: int) -> int:
    """How many items shard `index` has; the items file is not read."""
    return self._sizes[index]

  def __getitem__(self, key):
    if isinstance(key, slice):
      return [self[i] for i in range(*key.indices(len(self)))]
    index = key + len(self) if key < 0 else key
    if not 0 <= index < len(self):
      raise IndexError(f"shard {key} of {len(self)}")
    if self._offsets is None:
      self._offsets = self._scan()
    start, end = self._offsets[index : index + 2]
    lines = files.read(self._path, start, end - start).splitlines()
    return Shard(index, tuple(map(plan_files.item_of, lines)))

  def _scan(self) -> array.array:
    offsets, sha = array.array("Q", [0]), hashlib.sha256()
    try:
      with files.open_read(self._path) as f:
        for size in self._sizes:
          offsets.append(offsets[-1])
          for line in itertools.islice(f, size):
            sha.update(line)
            offsets[-1] += len(line)
        sha.update(f.read())  # nothing, or lines that were not planned
    except FileNotFoundError:
      raise ValueError(f"{self._path} is missing: the plan cannot be opened without it") from None
    if sha.hexdigest() != self._digest:
      raise ValueError(f"{self._path} is not what was planned: it was changed or damaged")
    return offsets
