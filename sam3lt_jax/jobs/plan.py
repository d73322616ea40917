"""The frozen plan of a job: its items split into shards, and what they are asked with.

`Plan.open` makes it or, on a restart, opens it and compares: other items, another model or other phrases are
refused in one sentence, because half of the results would answer another question. Two files hold it:

    plan.json    {"format", "program", "created", "fingerprint", "shards": [how many items each has],
                 "items_file", "items_sha256", "source_digest", "digest": of all of this}
    items.jsonl  the items, a line each; a shard is a run of these lines

Shards once planned keep their items: new ones follow in their own. Both files can be made again from the
source and the shards that are done.

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
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sam3lt_jax
from sam3lt_jax.jobs import files, ledger
from sam3lt_jax.jobs.ledger import Shard
from sam3lt_jax.jobs.sources import Item

PLAN = "plan.json"
ITEMS = "items.jsonl"
FORMAT = 2
_SHOWN = 60  # characters of a value in a message
_REMEDY = "give another output folder, or allow the change (--allow-change)"
_AGAIN = f"move {PLAN} away and start the command again: it is made anew from the source and what is done"


class Plan:
  """A job's plan. Use `Plan.open` to work on the job and `Plan.load` to look at it.

  Attributes:
    directory: the job's folder, absolute, or its URL.
    fingerprint: what the job asks and with what, as `open` was given it: plain JSON values.
    sizes: how many items each shard has; num_items: all of them.
    shards: the shards, each read from the items file when it is asked for.
    settings: a digest of the fingerprint, by which committed shards tell what they were made with.
    notes: what `open` did that the user may want to know, a sentence each.
  """

  def __init__(self, directory: str, content: dict[str, Any], notes: Sequence[str] = ()):
    self.directory, self.notes = directory, list(notes)
    self.fingerprint: dict[str, Any] = content["fingerprint"]
    self.settings = _sha256(self.fingerprint)[:16]
    self.sizes: list[int] = content["shards"]
    self.shards: Sequence[Shard] = _Shards(directory, content)
    self.num_items = sum(self.sizes)

  @classmethod
  def open(
    cls,
    directory: str | os.PathLike,
    items: Sequence[Item],
    fingerprint: dict[str, Any],
    shard_size: int,
    *,
    allow_change: bool = False,
    verify: bool = False,
  ) -> Plan:
    """Makes the plan of a new job, or opens that of one begun earlier.

    Args:
      directory: the job's folder or URL; made if it is not there.
      items: what to read, each id once, see `sources.list_items`.
      fingerprint: whatever must be the same on a restart, plain JSON values: model, profile, dtype,
        threshold, phrases, ... `merge` takes the order of categories from its "phrases", a list.
      shard_size: items a shard, at least 1. A job begun earlier keeps its own.
      allow_change: go on although something changed. New items become new shards; items that are gone are
        kept; items found at another place are read there; another fingerprint is for shards not committed
        yet, and started ones begin again. `notes` says what was done.
      verify: read every committed shard. Without it only what the folder's listing and the digest files
        tell is compared. Shards that are not what was written are set aside either way, and done again.

    Raises:
      ValueError: something changed (named, with the remedy), no item, a damaged plan, or shards that are
        done, whose plan is lost and which fit no plan of `items`.
      OSError: what is done cannot be read.
      CannotWrite: the folder cannot be written.
    """
    directory = files.absolute(directory)
    fingerprint = json.loads(json.dumps(fingerprint, allow_nan=False))  # as it will be read back
    files.make_folder(files.join(directory, ledger.SHARDS))
    opening = _Opening(directory, items, fingerprint, shard_size, allow_change)
    with files.exclusive(files.join(directory, ".plan.lock"), wait=60):
      plan = cls(directory, opening.content(), opening.notes)
    plan.notes += [f"{what}: it is done again" for what in plan.set_damaged_aside(whole=verify)]
    plan.notes += [f"{what}, and is left alone" for what in plan.strays(ledger.committed(directory)).values()]
    return plan

  @classmethod
  def load(cls, directory: str | os.PathLike) -> Plan:
    """The plan of an existing job, to look at. Raises ValueError if there is none or it is damaged."""
    directory = files.absolute(directory)
    content = _read(directory)
    if content is None:
      if done := len(ledger.committed(directory)):
        raise ValueError(
          f"{directory} holds no {PLAN}, but {done} shards: start the job's command again, which makes the"
          " plan anew from its source and these"
        )
      there = "holds no job" if files.is_folder(directory) else "is no folder"
      raise ValueError(f"{directory} {there}; accepted: the output folder of a job, with a {PLAN}")
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
    return {i for i in ledger.committed(self.directory) if i < len(self.sizes)}

  def strays(self, there: Iterable[int]) -> dict[int, str]:
    """A sentence for each of the committed shards `there` that is none of this plan's."""
    count = len(self.sizes)
    return {
      i: f"{ledger.shard_name(i)} is no shard of this job, which has {count}"
      for i in sorted(there)
      if i >= count
    }

  def missing(self, process_index: int = 0, process_count: int = 1) -> Iterator[Shard]:
    """Shards to do: first those with index % process_count == process_index, then, from the other end,
    those that other processes have not done yet.

    One that is committed meanwhile is skipped; one that another process works on is not known here:
    `ledger.ShardWriter` raises Busy for it.
    """
    done = self.committed()
    left = [i for i in range(len(self.sizes)) if i not in done]
    own = [i for i in left if i % process_count == process_index]
    others = [i for i in reversed(left) if i % process_count != process_index]
    if files.is_remote(self.directory):
      # No locks there: helpers that all begin at the end would do the same shards.
      random.Random(process_index).shuffle(others)
    for index in itertools.chain(own, others):
      if not files.exists(ledger.path(self.directory, index)):
        yield self.shards[index]

  def read(self, index: int) -> tuple[dict[str, Any], list[tuple[Item, dict[str, Any]]]]:
    """A committed shard's digest file, and its records in the order of the plan, each item's exactly once.

    Raises:
      Damaged: it is not what was written, or that of other items. OSError: it cannot be read.
    """
    about, found = ledger.read_shard(self.directory, index)
    records, items = {record["id"]: record for record in found}, self.shards[index].items
    if len(found) != len(items) or any(item.id not in records for item in items):
      name = ledger.shard_name(index)
      raise ledger.Damaged(f"{name} is damaged: it does not hold each of its {len(items)} images once")
    return about, [(item, records[item.id]) for item in items]

  def damaged(
    self, sizes: dict[str, tuple], digests: dict[int, dict[str, Any]], whole: bool
  ) -> dict[int, ledger.Damaged]:
    """What is wrong with which of the committed shards.

    Args:
      sizes: of the files in the folder of shards, see `files.sizes`.
      digests: digest files that are known; what is read of others is added.
      whole: read every shard; otherwise only those whose size or digest file look wrong.

    Raises:
      OSError: one cannot be read: it may be whole.
    """
    done = sorted(i for i in ledger.indices(sizes) if i < len(self.sizes))
    digests |= ledger.read_digests(self.directory, [i for i in done if i not in digests])
    for index in done:
      name, images, about = ledger.shard_name(index), self.sizes[index], digests[index]
      if isinstance(about, ledger.Damaged):
        continue
      if whole or (about["bytes"], about["records"]) != (sizes[name + ledger.DATA][0], images):
        try:
          records = self.read(index)[1] if whole else ledger.read_shard(self.directory, index)[1]
          if len(records) != images:
            raise ledger.Damaged(f"{name} is damaged: it holds {len(records)} of {images} images")
        except ledger.Damaged as e:
          digests[index] = e
    return {i: digests.pop(i) for i in done if isinstance(digests[i], ledger.Damaged)}

  def set_damaged_aside(self, whole: bool = True, strays: bool = False) -> list[str]:
    """Committed shards that are not what was written become missing again, and `strays` go.

    Args:
      whole: read all of them; otherwise see `damaged`.

    Returns:
      What was wrong, a sentence a shard.

    Raises:
      OSError: one cannot be read.
      CannotWrite: (ValueError) a file cannot be renamed.
    """
    sizes = files.sizes(files.join(self.directory, ledger.SHARDS))
    wrong = self.damaged(sizes, {}, whole) | (self.strays(ledger.indices(sizes)) if strays else {})
    for index in wrong:
      ledger.set_aside(self.directory, index)
    return list(map(str, wrong.values()))

  def check_current(self) -> None:
    """Raises ValueError if another job changed the plan since this one opened it."""
    content = _read(self.directory)
    if content is None or content["fingerprint"] != self.fingerprint:
      raise ValueError(f"the plan of {self.directory} was changed by another job; start this one again")


class _Shards(Sequence):
  """Shards as runs of lines of the items file; in memory are only their first bytes' offsets."""

  def __init__(self, directory: str, content: dict[str, Any]):
    self._directory, self._content = directory, content
    self._offsets: Sequence[int] | None = None

  def __len__(self) -> int:
    return len(self._content["shards"])

  def __getitem__(self, index: int) -> Shard:
    if not 0 <= index < len(self):
      raise IndexError(f"shard {index} of {len(self)}")
    if self._offsets is None:
      self._offsets = _scan_items(self._directory, self._content)
    start, end = self._offsets[index : index + 2]
    path = files.join(self._directory, self._content["items_file"])
    return Shard(index, tuple(map(_item_of, files.read(path, start, end - start).splitlines())))


# ------------------------------------------------------------------ plan.json


def _sha256(content: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(directory: str) -> dict[str, Any] | None:
  """plan.json without its digest, or None where there is none.

  Raises:
    ValueError: it is damaged, was edited, cannot be read, or is of another version.
  """
  path = files.join(directory, PLAN)
  try:
    content = json.loads(files.read(path))
    version, digest = content["format"], content.pop("digest", None)
    sound = digest == _sha256(content)
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as e:
    raise ValueError(f"{path} cannot be read: {e.strerror or e}") from e
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    raise ValueError(f"{path} is damaged: it is no plan of a job; {_AGAIN}") from None
  if version != FORMAT:
    raise ValueError(f"{path} is of another version of this program: give another output folder")
  if digest is None:
    raise ValueError(f"{path} is damaged, or of an earlier version of this program: {_AGAIN}")
  if not sound:
    raise ValueError(f"{path} is damaged: it was edited; undo that, or {_AGAIN}")
  return content


def _write(directory: str, content: dict[str, Any]) -> dict[str, Any]:
  """Writes a plan, with its digest, and returns it."""
  signed = content | {"digest": _sha256(content)}
  data = json.dumps(signed, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass")
  files.write_atomic(files.join(directory, PLAN), data + b"\n", alone=True)
  return content


@dataclasses.dataclass
class _Opening:
  """A folder that is opened with what a job brings; `notes` of what was done, a sentence each."""

  directory: str
  items: Sequence[Item]
  fingerprint: dict[str, Any]
  size: int
  allow_change: bool
  notes: list[str] = dataclasses.field(default_factory=list)

  def content(self) -> dict[str, Any]:
    """The plan to work by."""
    content, own = _read(self.directory), None
    if content is None:
      own = self._create()
      content = _read(self.directory)  # an object store may hold what another job put since
    return content if content == own else self._agree(content)

  def _create(self) -> dict[str, Any]:
    """Writes a new plan, of items that fit the shards that are done, and returns it."""
    if not self.items:
      raise ValueError("items must hold at least one image, got none")
    size = self._fitting_size()
    if dropped := ledger.drop_started(self.directory):
      self.notes.append(f"{PLAN} was missing; started shards that begin again: {dropped}")
    content = {
      "format": FORMAT,
      "program": f"sam3lt_jax {sam3lt_jax.__version__}",
      "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
      "fingerprint": self.fingerprint,
      "shards": _sizes(len(self.items), size),
      "items_file": ITEMS,
      "items_sha256": _write_items(files.join(self.directory, ITEMS), self.items),
      "source_digest": _source_digest(self.items),
    }
    return _write(self.directory, content)

  def _fitting_size(self) -> int:
    """Items a shard: as of the shards that are done, whose plan is lost; damaged ones are set aside."""
    found: dict[int, set[str]] = {}
    for index in sorted(ledger.committed(self.directory)):
      try:
        about, records = ledger.read_shard(self.directory, index)
      except ledger.Damaged as e:
        ledger.set_aside(self.directory, index)
        self.notes.append(f"{e}: it is done again")
        continue
      settings = _sha256(self.fingerprint)[:16]
      if about.get("settings", settings) != settings and not self.allow_change:
        raise ValueError(
          f"{self.directory} holds shards ({ledger.shard_name(index)}) but no {PLAN}, and they were made"
          f" with another model, other phrases or options. To go on, {_REMEDY}"
        )
      found[index] = {record["id"] for record in records}
    for size in dict.fromkeys([*map(len, found.values()), self.size]):
      if all({item.id for item in self.items[i * size : (i + 1) * size]} == ids for i, ids in found.items()):
        if found:
          self.notes.append(
            f"{PLAN} was missing: made anew from the source, which the {len(found)} shards that are done fit"
          )
        return size
    raise ValueError(
      f"{self.directory} holds {len(found)} shards that are done but no {PLAN}, and they do not fit the"
      " images that are listed now: start the job with the source of before, or give another output folder"
    )

  def _agree(self, content: dict[str, Any]) -> dict[str, Any]:
    """A plan that is there, as it is or with what was changed in it.

    Raises:
      ValueError: something differs and may not, or another job is at work in the folder.
    """
    directory, old, new = self.directory, content["fingerprint"], self.fingerprint
    source = _source_digest(self.items)
    other = [
      f"{key} was {_show(old.get(key))} and is now {_show(new.get(key))}"
      for key in dict.fromkeys([*old, *new])
      if old.get(key) != new.get(key)
    ]
    listed = None if source == content["source_digest"] else _Listing(directory, content, self.items)
    if not other and listed is None:
      return content
    if not self.allow_change:
      said = other + ([str(listed)] if listed else [])
      raise ValueError(f"{directory} holds another job: {'; '.join(said)}. To go on, {_REMEDY}")
    if other:
      dropped = ledger.drop_started(directory)
      begun = f"; started ones that begin again: {dropped}" if dropped else ""
      kept = len(ledger.committed(directory))
      self.notes.append(f"changed: {'; '.join(other)}; committed shards kept as they are: {kept}{begun}")
      content = content | {"fingerprint": new}
    if listed:
      number = int(content["items_file"].removesuffix(".jsonl").partition("-")[2] or 0) + 1
      added, name = _sizes(len(listed.new), self.size), f"items-{number}.jsonl"
      content = content | {
        "items_file": name,
        "items_sha256": _write_items(files.join(directory, name), listed.all()),
        "shards": content["shards"] + added,
        "source_digest": source,
      }
      done = [f"shards added for the new ones: {len(added)}"] if added else []
      done += ["those gone are kept"] if listed.gone else []
      done += ["the new places are used from now on"] if listed.moved else []
      self.notes.append(f"changed: {listed}; {', '.join(done)}")
    return _write(directory, content)


def _sizes(items: int, shard_size: int) -> list[int]:
  return [min(shard_size, items - start) for start in range(0, items, shard_size)]


def _show(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


# ------------------------------------------------------------------ the items file


def _line_of(item: Item) -> bytes:
  entry: dict[str, Any] = {"id": item.id, "uri": item.uri}
  if item.coco_id is not None:
    entry["coco_id"] = item.coco_id
  if item.meta:
    entry["meta"] = item.meta
  return json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _item_of(line: bytes) -> Item:
  entry = json.loads(line)
  return Item(entry["id"], entry["uri"], entry.get("coco_id"), entry.get("meta", {}))


def _write_items(path: str, items: Iterable[Item]) -> str:
  """Writes the items file; the SHA-256 of its bytes."""
  sha = hashlib.sha256()
  with files.atomic(path, alone=True) as f:
    for line in map(_line_of, items):
      sha.update(line)
      f.write(line)
  return sha.hexdigest()


def _source_digest(items: Iterable[Item]) -> str:
  """Of a listing, whatever its order: after a change the plan's order is not the listing's."""
  digests = (hashlib.sha256(_line_of(item)).digest() for item in items)
  return f"{sum(int.from_bytes(digest, 'big') for digest in digests) % (1 << 256):064x}"


def _scan_items(directory: str, content: dict[str, Any]) -> array.array:
  """The offset in bytes of each shard's first line in the items file, and the file's end.

  Raises:
    ValueError: the file is missing, or not what was planned.
  """
  path = files.join(directory, content["items_file"])
  offsets, sha = array.array("Q", [0]), hashlib.sha256()
  try:
    with files.open_read(path) as f:
      for size in content["shards"]:
        offsets.append(offsets[-1])
        for line in itertools.islice(f, size):
          sha.update(line)
          offsets[-1] += len(line)
      sha.update(f.read())  # nothing, or lines that were not planned
  except FileNotFoundError:
    raise ValueError(f"{path} is missing: the plan cannot be opened without it; {_AGAIN}") from None
  except OSError as e:
    raise ValueError(f"{path} cannot be read: {e.strerror or e}") from e
  if sha.hexdigest() != content["items_sha256"]:
    raise ValueError(f"{path} is not what was planned: it was changed or damaged; undo that, or {_AGAIN}")
  return offsets


class _Listing:
  """What differs between the plan's items and a listing."""

  def __init__(self, directory: str, content: dict[str, Any], items: Sequence[Item]):
    _scan_items(directory, content)  # raises where it is not what was planned
    self._old, self._items = files.join(directory, content["items_file"]), items
    gone = {_item_of(line).id: hash(line) for line in self._old_lines()}
    self.new: list[str] = []
    self.moved: dict[str, Item] = {}
    for item in items:
      known = gone.pop(item.id, None)
      if known is None:
        self.new.append(item.id)
      elif known != hash(_line_of(item)):
        self.moved[item.id] = item
    self.gone = list(gone)

  def _old_lines(self) -> Iterator[bytes]:
    with files.open_read(self._old) as f:
      yield from f

  def __str__(self) -> str:
    kinds = ((self.new, "new"), (self.gone, "gone"), (list(self.moved), "at another place"))
    said = [f"{len(ids)} {what} (such as {ids[0]!r})" for ids, what in kinds if ids]
    return f"the source has other images, {', '.join(said)}"

  def all(self) -> Iterator[Item]:
    """Old items in their old order, where they are now, then the new ones."""
    for item in map(_item_of, self._old_lines()):
      yield self.moved.get(item.id, item)
    new = set(self.new)
    yield from (item for item in self._items if item.id in new)
