"""plan.json and the items file: written, read, and compared with what a restarted job brings.

plan.json: {"format", "program", "created", "fingerprint", "shards": [how many items each has], "items_file",
"items_sha256", "source_digest", "digest": of all of this}. Shards once planned keep their items: new ones
follow in their own. Both files can be made again from the source and the shards that are done, see `create`.
"""

from __future__ import annotations

import array
import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

import sam3lt_jax
from sam3lt_jax.jobs import files, shard_files
from sam3lt_jax.jobs.sources import Item, Items

PLAN = "plan.json"
ITEMS = "items.jsonl"
FORMAT = 2
_SHOWN = 60  # characters of a value in a message
_REMEDY = "give another output folder, or allow the change (--allow-change)"
_AGAIN = f"move {PLAN} away and start the command again: it is made anew from the source and what is done"
_ITEMS_NAME = re.compile(r"items(-[0-9]+)?\.jsonl")


def plain(fingerprint: dict[str, Any]) -> dict[str, Any]:
  """As it will be read back. Raises ValueError for what JSON cannot hold."""
  try:
    return json.loads(json.dumps(dict(fingerprint), allow_nan=False))
  except (TypeError, ValueError) as e:
    raise ValueError(f"fingerprint must hold plain JSON values: {e}") from None


def line_of(item: Item) -> bytes:
  entry: dict[str, Any] = {"id": item.id, "uri": item.uri}
  if item.coco_id is not None:
    entry["coco_id"] = item.coco_id
  if item.meta:
    entry["meta"] = item.meta
  return json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def item_of(line: bytes) -> Item:
  """Raises ValueError for a line that `line_of` did not write."""
  try:
    entry = json.loads(line)
    item = Item(entry["id"], entry["uri"], entry.get("coco_id"), entry.get("meta", {}))
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    item = None
  if item is None or not (
    isinstance(item.id, str)
    and isinstance(item.uri, str)
    and isinstance(item.coco_id, (int, type(None)))
    and isinstance(item.meta, dict)
  ):
    raise ValueError(f"a line of the items file is no item: {line[:80]!r}; {_AGAIN}")
  return item


def settings_of(fingerprint: dict[str, Any]) -> str:
  """A digest of it, by which committed shards tell what they were made with."""
  return _sha256(fingerprint)[:16]


def _sha256(content: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(directory: str) -> dict[str, Any] | None:
  """plan.json, or None where there is none.

  Raises:
    ValueError: it is damaged, was edited, cannot be read, or is of another version.
  """
  path = files.join(directory, PLAN)
  try:
    data = files.read(path)
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as e:
    raise ValueError(f"{path} cannot be read: {e.strerror or e}") from e
  try:
    content = json.loads(data)
    if type(content["format"]) is int and content["format"] != FORMAT:
      raise _OtherVersion(f"{path} is of another version of this program: give another output folder")
    sound = _is_plan(content)
  except _OtherVersion:
    raise
  except (ValueError, KeyError, TypeError, RecursionError):
    sound = False
  if not sound:
    raise ValueError(f"{path} is damaged: it is no plan of a job; {_AGAIN}")
  # Plans of earlier versions have no digest.
  if content.get("digest", digest := _digest(content)) != digest:
    raise ValueError(f"{path} is damaged: it was edited; undo that, or {_AGAIN}")
  return content


class _OtherVersion(ValueError):
  pass


def _is_plan(content: dict[str, Any]) -> bool:
  sizes = content["shards"]
  return (
    content["format"] == FORMAT
    and type(content["fingerprint"]) is dict
    and type(sizes) is list
    and len(sizes) > 0
    and all(type(size) is int and 0 < size < 1 << 53 for size in sizes)
    and _ITEMS_NAME.fullmatch(content["items_file"]) is not None
    and all(type(content[key]) is str for key in ("items_sha256", "source_digest"))
  )


def _digest(content: dict[str, Any]) -> str:
  return _sha256({key: value for key, value in content.items() if key != "digest"})


def create(
  directory: str, items: Iterable[Item], fingerprint: dict, shard_size: int, allow_change: bool = False
) -> tuple[dict[str, Any], list[str]]:
  """Writes a new plan; where shards are done already, whose plan is lost, one that they fit.

  Returns:
    (the plan, what was done with the shards, a sentence each).

  Raises:
    ValueError: no items, or shards that fit no plan of these items and settings.
  """
  notes = []
  if done := _left_over(directory, fingerprint, allow_change, notes):
    sizes = dict.fromkeys([*(count for count, _ in done.values()), shard_size])
    shard_size = next((size for size in sizes if _fits(items, size, done)), 0)
    if not shard_size:
      raise ValueError(
        f"{directory} holds {len(done)} shards that are done but no {PLAN}, and they do not fit the images"
        " that are listed now: start the job with the source of before, or give another output folder"
      )
    notes.append(
      f"{PLAN} was missing: made anew from the source, which the {len(done)} shards that are done fit"
    )
  if dropped := shard_files.drop_started(directory):
    notes.append(f"{PLAN} was missing; started shards that begin again: {dropped}")
  written = _Written(files.join(directory, ITEMS), items)
  if not written.count:
    raise ValueError("items must hold at least one image, got none")
  content = {
    "format": FORMAT,
    "program": f"sam3lt_jax {sam3lt_jax.__version__}",
    "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "fingerprint": fingerprint,
    "shards": _sizes(written.count, shard_size),
    "items_file": ITEMS,
    "items_sha256": written.sha256,
    "source_digest": written.source_digest,
  }
  return _write(directory, content), notes


def _left_over(
  directory: str, fingerprint: dict, allow_change: bool, notes: list[str]
) -> dict[int, tuple[int, str]]:
  """Of the shards that are done: index -> (images, digest of their ids). Damaged ones are set aside."""
  done = {}
  for index in sorted(shard_files.committed(directory)):
    try:
      about, records = shard_files.read_shard(directory, index)
    except shard_files.Unreadable:
      raise
    except shard_files.Damaged as e:
      shard_files.set_aside(directory, index)
      notes.append(f"{e}: it is done again")
      continue
    settings = about.get("settings", settings_of(fingerprint))
    if settings != settings_of(fingerprint) and not allow_change:
      raise ValueError(
        f"{directory} holds shards ({shard_files.shard_name(index)}) but no {PLAN}, and they were made with"
        f" another model, other phrases or options. To go on, {_REMEDY}"
      )
    done[index] = len(records), _ids_digest(record["id"] for record in records)
  return done


def _ids_digest(ids: Iterable[str]) -> str:
  return hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()


def _fits(items: Iterable[Item], size: int, done: dict[int, tuple[int, str]]) -> bool:
  """Whether shards of so many items have the images of those that are done."""
  if size < 1:
    return False
  left, one_by_one = set(done), iter(items)
  for index in itertools.count():
    ids = [item.id for item in itertools.islice(one_by_one, size)]
    if not ids:
      return not left
    if index in left and done[index][1] != _ids_digest(ids):
      return False
    left.discard(index)


def _sizes(items: int, shard_size: int) -> list[int]:
  return [min(shard_size, items - start) for start in range(0, items, shard_size)]


def _write(directory: str, content: dict[str, Any]) -> dict[str, Any]:
  """Writes a plan and returns it, with its digest."""
  content = content | {"digest": _digest(content)}
  data = json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass")
  files.write_atomic(files.join(directory, PLAN), data + b"\n", alone=True)
  return content


def scan_items(directory: str, content: dict[str, Any]) -> array.array:
  """The offset in bytes of each shard's first line in the items file, and the file's end.

  Raises:
    ValueError: the file is missing, or not what was planned.
  """
  path = files.join(directory, content["items_file"])
  offsets, sha, whole = array.array("Q", [0]), hashlib.sha256(), True
  try:
    with files.open_read(path) as f:
      for size in content["shards"]:
        offsets.append(offsets[-1])
        lines = 0
        for line in itertools.islice(f, size):
          sha.update(line)
          offsets[-1] += len(line)
          lines += 1
        whole &= lines == size
      rest = f.read()  # nothing, or lines that were not planned
  except FileNotFoundError:
    raise ValueError(f"{path} is missing: the plan cannot be opened without it; {_AGAIN}") from None
  except OSError as e:
    raise ValueError(f"{path} cannot be read: {e.strerror or e}") from e
  sha.update(rest)
  if rest or not whole or sha.hexdigest() != content["items_sha256"]:
    raise ValueError(f"{path} is not what was planned: it was changed or damaged; undo that, or {_AGAIN}")
  return offsets


class _Written:
  """Writes the items file; afterwards `count`, `sha256` of its bytes and `source_digest`."""

  def __init__(self, path: str, items: Iterable[Item]):
    self._unique = isinstance(items, Items)  # by how it was made
    self._digest = SourceDigest()
    sha = hashlib.sha256()
    with files.atomic(path, alone=True) as f:
      for line in self._lines(items):
        sha.update(line)
        f.write(line)
    self.count, self.sha256, self.source_digest = self._digest.count, sha.hexdigest(), str(self._digest)

  def _lines(self, items: Iterable[Item]) -> Iterator[bytes]:
    seen = set()
    for item in items:
      if not self._unique:
        if item.id in seen:
          raise ValueError(f"items: the id {item.id!r} occurs twice")
        seen.add(item.id)
      line = line_of(item)
      self._digest.add(line)
      yield line


class SourceDigest:
  """Of a listing, whatever its order: after a change the plan's order is not the listing's."""

  def __init__(self):
    self.count = self._sum = 0

  def add(self, line: bytes) -> None:
    self.count += 1
    self._sum += int.from_bytes(hashlib.sha256(line).digest(), "big")

  def __str__(self) -> str:
    return f"{self._sum % (1 << 256):064x}"


def agree(
  directory: str,
  content: dict[str, Any],
  items: Iterable[Item],
  fingerprint: dict[str, Any],
  shard_size: int,
  allow_change: bool,
) -> tuple[dict[str, Any], list[str]]:
  """(the plan to work by, what was changed in it, a sentence each): as it is, where nothing differs.

  Raises:
    ValueError: something differs and `allow_change` is not set, or another job is at work in the folder.
  """
  digest = SourceDigest()
  for item in items:
    digest.add(line_of(item))
  new_items = str(digest) != content["source_digest"]
  changes = _differences(content["fingerprint"], fingerprint)
  items_changes = _ItemChanges(directory, content, items) if new_items else None
  if not changes and items_changes is None:
    return content, []
  if not allow_change:
    said = changes + ([str(items_changes)] if items_changes else [])
    raise ValueError(f"{directory} holds another job: {'; '.join(said)}. To go on, {_REMEDY}")
  notes, content = [], dict(content)
  if changes:
    dropped = shard_files.drop_started(directory)
    content["fingerprint"] = fingerprint
    kept = len(shard_files.committed(directory))
    begun = f"; started ones that begin again: {dropped}" if dropped else ""
    notes.append(f"changed: {'; '.join(changes)}; committed shards kept as they are: {kept}{begun}")
  if items_changes:
    notes.append(f"changed: {items_changes}; {items_changes.apply(directory, content, shard_size)}")
    content["source_digest"] = str(digest)
  return _write(directory, content), notes


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """A phrase for every key whose value differs."""
  return [
    f"{key} was {_show(old.get(key))} and is now {_show(new.get(key))}"
    for key in dict.fromkeys([*old, *new])
    if old.get(key) != new.get(key)
  ]


def _show(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


class _ItemChanges:
  """What differs between the plan's items and a listing."""

  def __init__(self, directory: str, content: dict[str, Any], items: Iterable[Item]):
    scan_items(directory, content)  # raises where it is not what was planned
    self._old_file = files.join(directory, content["items_file"])
    self._listing = items
    gone = {item_of(line).id: hash(line) for line in self._old_lines()}
    self.new: list[str] = []
    self.moved: dict[str, bytes] = {}
    for item in items:
      line = line_of(item)
      known = gone.pop(item.id, None)
      if known is None:
        self.new.append(item.id)
      elif known != hash(line):
        self.moved[item.id] = line
    self.gone = list(gone)

  def _old_lines(self) -> Iterator[bytes]:
    with files.open_read(self._old_file) as f:
      yield from f

  def __str__(self) -> str:
    kinds = ((self.new, "new"), (self.gone, "gone"), (list(self.moved), "at another place"))
    said = [f"{len(ids)} {what} (such as {ids[0]!r})" for ids, what in kinds if ids]
    return f"the source has other images, {', '.join(said) or 'an id that occurs twice'}"

  def apply(self, directory: str, content: dict[str, Any], shard_size: int) -> str:
    """Writes the items file anew, old items in their old order first, and returns what was done."""
    name = f"items-{int(content['items_file'].removesuffix('.jsonl').partition('-')[2] or 0) + 1}.jsonl"
    written = _Written(files.join(directory, name), self._all())
    content |= {"items_file": name, "items_sha256": written.sha256}
    added = _sizes(len(self.new), shard_size)
    content["shards"] = content["shards"] + added
    done = [f"shards added for the new ones: {len(added)}"] if added else []
    done += ["those gone are kept"] if self.gone else []
    done += ["the new places are used from now on"] if self.moved else []
    return ", ".join(done)

  def _all(self) -> Iterator[Item]:
    for line in self._old_lines():
      item = item_of(line)
      yield item_of(self.moved[item.id]) if item.id in self.moved else item
    new = set(self.new)
    yield from (item for item in self._listing if item.id in new)
