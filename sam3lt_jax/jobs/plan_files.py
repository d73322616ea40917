"""plan.json and the items file: written, read, and compared with what a restarted job brings.

plan.json: {"format", "program", "created", "fingerprint", "shards": [how many items each has], "items_file",
"items_sha256", "source_digest"}. Shards once planned keep their items: new ones follow in their own.
"""

from __future__ import annotations

import hashlib
import json
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
  entry = json.loads(line)
  return Item(entry["id"], entry["uri"], entry.get("coco_id"), entry.get("meta", {}))


def read(directory: str) -> dict[str, Any] | None:
  """plan.json, or None where there is none. Raises ValueError if it is damaged or of a later version."""
  path = files.join(directory, PLAN)
  try:
    content = json.loads(files.read(path))
    if content["format"] != FORMAT:
      raise ValueError(f"{path} is of another version of this program")
    if not content["shards"] or type(content["fingerprint"]) is not dict:
      raise KeyError
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
    raise ValueError(f"{path} is damaged: it is no plan of a job") from None
  return content


def create(directory: str, items: Iterable[Item], fingerprint: dict, shard_size: int) -> dict[str, Any]:
  """Writes a new plan and returns it. Raises ValueError for a folder with shards, or no items."""
  if left := sorted(files.names(files.join(directory, shard_files.SHARDS))):
    raise ValueError(f"{directory} holds shards ({left[0]}) but no {PLAN}: give another output folder")
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
  _write(directory, content)
  return content


def _sizes(items: int, shard_size: int) -> list[int]:
  return [min(shard_size, items - start) for start in range(0, items, shard_size)]


def _write(directory: str, content: dict[str, Any]) -> None:
  data = json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass")
  files.write_atomic(files.join(directory, PLAN), data + b"\n", alone=True)


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
  _write(directory, content)
  return content, notes


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
