"""The frozen plan of a job: its items split into shards, and what they are asked with.

`Plan.open` makes it or, on a restart, opens it and compares: other items, another model or other phrases are
refused in one sentence, because half of the results would answer another question. What was agreed on stands
in OUT/plan.json, the items in OUT/items.jsonl, a line each; a shard is a run of these lines.

The items file is written first and plan.json last, both whole or not at all, under a lock of the folder: a
job killed in between has no plan, and of two started at once one makes it and the other opens it. An object
store has no lock: there plan.json is read back, so that the one who was overwritten notices.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sam3lt_jax.jobs import files, plan_files, shard_files
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
    self.settings = plan_files.settings_of(self.fingerprint)
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
      verify: read every committed shard. Without it only what the folder's listing and the digest files
        tell is compared. Shards that are not what was written are set aside either way, and done again.

    Raises:
      ValueError: something changed (named, with the remedy), a bad argument, a damaged plan, shards that
        cannot be read, or that are done, whose plan is lost and which fit no plan of `items`.
      CannotWrite: the folder cannot be written.
    """
    directory = files.absolute(directory)
    if type(shard_size) is not int or shard_size < 1:
      raise ValueError(f"shard_size must be a whole number of at least 1, got {shard_size!r}")
    items = list(items) if isinstance(items, Iterator) else items
    fingerprint = plan_files.plain(fingerprint)
    files.make_folder(files.join(directory, shard_files.SHARDS))
    with files.exclusive(files.join(directory, ".plan.lock"), wait=60):
      content, notes = plan_files.read(directory), []
      own = None
      if content is None:
        own, notes = plan_files.create(directory, items, fingerprint, shard_size, allow_change)
        content = plan_files.read(directory)  # an object store may hold what another job put since
      if content != own:
        content, notes = plan_files.agree(directory, content, items, fingerprint, shard_size, allow_change)
      shard_files.tidy(directory)
    plan = cls(directory, content, notes)
    plan.notes += [f"{what}: it is done again" for what in plan.set_damaged_aside(whole=verify, strays=False)]
    plan.notes += [f"{what}, and is left alone" for what in plan.strays()]
    return plan

  @classmethod
  def load(cls, directory: str | os.PathLike) -> Plan:
    """The plan of an existing job, to look at. Raises ValueError if there is none or it is damaged."""
    directory = files.absolute(directory)
    content = plan_files.read(directory)
    if content is None:
      if done := len(shard_files.committed(directory)):
        raise ValueError(
          f"{directory} holds no {plan_files.PLAN}, but {done} shards: start the job's command again, which"
          " makes the plan anew from its source and these"
        )
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
    return {i for i in shard_files.committed(self.directory) if i < len(self.shards)}

  def strays(self, there: Iterable[int] | None = None) -> list[str]:
    """A sentence for each shard in the folder that is none of this plan's; `there`: of its listing before."""
    there = shard_files.committed(self.directory) if there is None else there
    count = len(self.shards)
    return [
      f"{shard_files.shard_name(i)} is no shard of this job, which has {count}"
      for i in sorted(there)
      if i >= count
    ]

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

  def read(self, index: int) -> tuple[dict[str, Any], list[tuple[Item, dict[str, Any]]]]:
    """A committed shard's digest file, and its records in the order of the plan, each item's exactly once.

    Raises:
      Damaged: it is not what was written, or that of other items.
    """
    about, found = shard_files.read_shard(self.directory, index)
    records, items = {record["id"]: record for record in found}, self.shards[index].items
    if len(found) != len(items) or any(item.id not in records for item in items):
      name = shard_files.shard_name(index)
      raise shard_files.Damaged(f"{name} is damaged: it does not hold each of its {len(items)} images once")
    return about, [(item, records[item.id]) for item in items]

  def damaged(
    self, done: Iterable[int], sizes: dict[str, tuple], digests: dict[int, dict[str, Any]], whole: bool
  ) -> dict[int, shard_files.Damaged]:
    """What is wrong with which of the committed shards `done`.

    Args:
      sizes: of the files in the folder of shards, see `files.sizes`.
      digests: digest files that are known; what is read of others is added.
      whole: read every shard; otherwise only those whose size or digest file look wrong.
    """
    found = {}
    digests |= shard_files.read_digests(self.directory, sorted(set(done) - digests.keys()))
    for index in sorted(done):
      name, images = shard_files.shard_name(index), self.shards.size(index)
      about, size = digests.get(index), sizes.get(f"{name}.jsonl", (-1,))[0]
      if about and (about["bytes"], about["records"]) == (size, images) and not whole:
        continue
      try:
        digests[index], records = self.read(index) if whole else shard_files.read_shard(self.directory, index)
        if len(records) != images:
          raise shard_files.Damaged(f"{name} is damaged: it holds {len(records)} of {images} images")
      except shard_files.Damaged as e:
        found[index] = e
    return found

  def set_damaged_aside(self, whole: bool = True, strays: bool = True) -> list[str]:
    """Committed shards that are not what was written become missing again, and `strays` go.

    Args:
      whole: read all of them; otherwise see `damaged`.

    Returns:
      What was wrong, a sentence a shard.

    Raises:
      Unreadable: (ValueError) without `whole`, a shard that may be sound.
      CannotWrite: (ValueError) a file cannot be renamed.
    """
    sizes = files.sizes(files.join(self.directory, shard_files.SHARDS))
    said = []
    for index, error in self.damaged(self.committed(), sizes, {}, whole).items():
      if isinstance(error, shard_files.Unreadable) and not whole:
        raise error
      shard_files.set_aside(self.directory, index)
      said.append(str(error))
    for index in sorted(shard_files.committed(self.directory)) if strays else ():
      if index >= len(self.shards):
        said += self.strays([index])
        shard_files.set_aside(self.directory, index)
    return said

  def check_current(self) -> None:
    """Raises ValueError if another job changed the plan since this one opened it."""
    content = plan_files.read(self.directory)
    if content is None or content["fingerprint"] != self.fingerprint:
      raise ValueError(f"the plan of {self.directory} was changed by another job; start this one again")


class _Shards(Sequence):
  """Shards as runs of lines of the items file; in memory are only their first bytes' offsets."""

  def __init__(self, directory: str, content: dict[str, Any]):
    self._directory, self._content = directory, content
    self._sizes: list[int] = content["shards"]
    self._offsets: Sequence[int] | None = None

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
      self._offsets = plan_files.scan_items(self._directory, self._content)
    start, end = self._offsets[index : index + 2]
    path = files.join(self._directory, self._content["items_file"])
    lines = files.read(path, start, end - start).splitlines()
    return Shard(index, tuple(map(plan_files.item_of, lines)))
