"""What a job reads: SOURCE -> items.

| source | an item's id |
| --- | --- |
| a folder, its subfolders included: files with an image's suffix | path in the folder |
| a glob, `photos/**/*.jpg` | path below the part without wildcards |
| a list, `list.txt`: a path (relative to the list) or URL a line | the line |
| COCO images, `instances.json`: each `file_name` in a folder of images | the image's id |
| tar shards, `shard-{000000..000009}.tar`, a glob, one .tar, a folder of them | the sample's key |
| one image file | as it was given |

Hidden files and folders, and blank lines, are left out. A glob whose suffix is written out (`*.dat`) takes
such files as they are, other globs those with an image's suffix. All may be local or URLs (see `files`), and
several may be given together. The order is the same on every host: folders by id, lists as they are written,
COCO by image id, tars by name and then as their members lie.

Source of the tar naming: webdataset (a sample is the run of members that share a path up to its first dot).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from sam3lt_jax.jobs import files

IMAGE_SUFFIXES = frozenset(
  ".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .avif .heic .heif .ppm .pgm .jp2 .tga .ico".split()
)
_ACCEPTED = "a folder, a glob, a list (.txt), COCO images (.json), tar shards (.tar) or an image file"


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
  """One image to read.

  Attributes:
    id: unique in the job and the same in every run of it; see the module's table.
    uri: absolute path or URL; of a tar's member "<tar>!<member>".
    coco_id: the image id in the COCO file that it comes from, or None.
    meta: what the source knows, where it does: "width", "height" (pixels), "file_name" (COCO's); "offset"
      and "size" (bytes) in the tar.
  """

  id: str
  uri: str
  coco_id: int | None = None
  meta: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)


@dataclasses.dataclass(frozen=True)
class _Part:
  """The items of one source, small in memory: a row each, from which `make` makes the item."""

  place: str
  rows: list
  make: Callable[[Any], Item]
  unique: bool = False  # by how it was listed


class Items(Sequence):
  """A list of `Item`, each made when it is asked for: a million take about 100 bytes each."""

  def __init__(self, parts: Sequence[_Part]):
    self._parts = list(parts)
    self._ends = list(itertools.accumulate(len(part.rows) for part in parts))

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, key):
    if isinstance(key, slice):
      return [self[i] for i in range(*key.indices(len(self)))]
    i = key + len(self) if key < 0 else key
    if not 0 <= i < len(self):
      raise IndexError(f"item {key} of {len(self)}")
    part = bisect.bisect_right(self._ends, i)
    before = self._ends[part - 1] if part else 0
    return self._parts[part].make(self._parts[part].rows[i - before])

  def __iter__(self) -> Iterator[Item]:
    for part in self._parts:
      yield from map(part.make, part.rows)

  def place(self, i: int) -> str:
    """Where item `i` was found, for a message."""
    return f"{self[i].uri} (from {self._parts[bisect.bisect_right(self._ends, i)].place})"


def list_items(
  source: str | os.PathLike | Sequence[str | os.PathLike],
  *,
  recursive: bool = True,
  images: str | os.PathLike | None = None,
) -> Sequence[Item]:
  """The images of a source, in an order that does not depend on the host.

  Args:
    source: see the module's table; a list of sources is their mixture, one after the other.
    recursive: folders with all their subfolders.
    images: the folder that COCO's file names are in. Default: beside the JSON file, or its folder "images".

  Returns:
    A sequence of `Item` that makes them when asked: `len`, indices, slices and iteration work as on a list.

  Raises:
    ValueError: no such source, an empty one, a list or JSON that cannot be read, an id that occurs twice
      (the message names both places).
    OSError: a folder or file that may not be read.
    ImportError: a URL, and fsspec or its package for that scheme is not installed.
  """
  given = [source] if isinstance(source, (str, os.PathLike)) else list(source)
  if not given:
    raise ValueError(f"source must name at least one of {_ACCEPTED}, got none")
  images = None if images is None else files.absolute(images)
  parts = [_list_one(os.fspath(one), recursive, images) for one in given]
  items = Items(parts)
  if not (len(parts) == 1 and parts[0].unique):
    _check_unique(items)
  return items


def read_bytes(item: Item) -> bytes:
  """The encoded image. Raises OSError (no such file, no permission, ...), EOFError of a tar cut short."""
  if "offset" not in item.meta:
    return files.read(item.uri)
  tar, _ = split_member(item.uri)
  size = item.meta["size"]
  data = files.read(tar, item.meta["offset"], size)
  if len(data) < size:
    raise EOFError(f"{item.uri}: the tar file ends after {len(data)} of {size} bytes")
  return data


def _list_one(source: str, recursive: bool, images: str | None) -> _Part:
  if not source.strip():
    raise ValueError(f"source must be {_ACCEPTED}, got an empty string")
  suffix = os.path.splitext(source)[1].lower()
  if source.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
    raise ValueError(f"{source}: a compressed tar cannot be read at any place; unpack it to a .tar first")
  if suffix == ".tar" and "{" in source and not files.exists(source):
    return _tar_part(source, expand_braces(source))
  if files.is_pattern(source) and not files.exists(source):
    return _glob(source)
  path = files.absolute(source)
  if files.is_folder(path):
    return _folder(source, path, recursive)
  if not files.exists(path):
    raise ValueError(f"source {source} does not exist; accepted: {_ACCEPTED}")
  if suffix == ".tar":
    return _tar_part(source, [path])
  if suffix == ".txt":
    return _list_file(source, path)
  if suffix == ".json":
    return _coco(source, path, images)
  if suffix in IMAGE_SUFFIXES:
    return _Part(source, [source], functools.partial(_listed, ""), unique=True)
  raise ValueError(f"source {source} is none of those accepted: {_ACCEPTED}")


def _plain(root: str, name: str) -> Item:
  return Item(name, files.join(root, name))


def _listed(folder: str, entry: str) -> Item:
  return Item(entry, files.absolute(files.join(folder, entry)))


def _is_image(name: str) -> bool:
  return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _folder(source: str, path: str, recursive: bool) -> _Part:
  images, archives = [], []
  for name in files.walk(path, recursive):
    if _is_image(name):
      images.append(name)
    elif name.endswith(".tar"):
      archives.append(name)
  if images and archives:
    raise ValueError(
      f"the folder {source} holds images ({min(images)}) and tar shards ({min(archives)}); "
      f"say which: {files.join(source, '**', '*.jpg')} or {files.join(source, '**', '*.tar')}"
    )
  if archives:
    return _tar_part(source, [files.join(path, name) for name in sorted(archives)])
  if not images:
    below = " or its subfolders" if recursive else ""
    raise ValueError(f"no images in the folder {source}{below} ({' '.join(sorted(IMAGE_SUFFIXES))})")
  return _Part(source, sorted(images), functools.partial(_plain, path), unique=True)


def _glob(source: str) -> _Part:
  found = files.glob(files.absolute(source))
  if source.lower().endswith(".tar"):
    if not found:
      raise ValueError(f"no tar shards match {source}")
    return _tar_part(source, found)
  suffix = os.path.splitext(source)[1]
  if not suffix or files.is_pattern(suffix):
    found = [path for path in found if _is_image(path)]
  if not found:
    raise ValueError(f"no images match {source}")
  root = files.absolute(source)
  while files.is_pattern(root):
    root = files.folder_of(root)
  skip = len(root.rstrip("/")) + 1
  return _Part(source, [path[skip:] for path in found], functools.partial(_plain, root), unique=True)


def _list_file(source: str, path: str) -> _Part:
  rows = []
  for number, line in enumerate(files.read(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
    try:
      entry = line.decode("utf-8").strip()
    except UnicodeDecodeError:
      raise ValueError(f"{source}, line {number}: not UTF-8; a list holds a path or URL a line") from None
    if "\0" in entry:
      raise ValueError(f"{source}, line {number}: a zero byte; a list holds a path or URL a line")
    if entry:
      rows.append(entry)
  if not rows:
    raise ValueError(f"the list {source} names no image; it holds a path or URL a line")
  return _Part(source, rows, functools.partial(_listed, files.folder_of(path)))


def _coco(source: str, path: str, images: str | None) -> _Part:
  """Rows (image id, where its file may be below the folder of images, its size or None)."""
  from sam3lt_jax.data import annotations  # numpy and pycocotools come with it

  entries = annotations.images_of(annotations.read_json(files.read(path), source), source, sizes=False)
  rows = sorted((entry.id, entry.names, entry.size) for entry in entries)
  folder, which = _beside(source, images, files.folder_of(path), rows[0][1])
  return _Part(source, rows, functools.partial(_coco_item, folder, which))


def _beside(source: str, images: str | None, folder: str, names: tuple[str, ...]) -> tuple[str, int]:
  """The folder of images, and at which of an image's `names` its file is there; found by the first image."""
  for candidate in [images] if images else [folder, files.join(folder, "images")]:
    for which, name in enumerate(names):
      if files.exists(files.join(candidate, name)):
        return candidate, which
  if images:
    return images, -1
  raise ValueError(
    f"the images of {source} are not beside it, nor in a folder images there (its first is {names[-1]}); "
    "say where they are: --images DIR"
  )


def _coco_item(folder: str, which: int, row: tuple) -> Item:
  image_id, names, size = row
  name = names[min(which, len(names) - 1)]
  known = {} if size is None else {"width": size[1], "height": size[0]}
  return Item(str(image_id), files.join(folder, name), image_id, {"file_name": name} | known)


def _tar_part(source: str, paths: Sequence[str]) -> _Part:
  """Rows (number of the tar, member, offset, bytes)."""
  paths = [files.absolute(path) for path in paths]
  rows = []
  for number, path in enumerate(paths):
    rows += [(number, *member) for member in tar_members(path, IMAGE_SUFFIXES)]
  if not rows:
    raise ValueError(f"no images in the tar shards {source} ({len(paths)} read)")
  return _Part(source, rows, functools.partial(_tar_item, paths))


def _tar_item(paths: list[str], row: tuple) -> Item:
  number, member, offset, size = row
  return Item(
    key_of(member), f"{paths[number]}!{member}", None, {"offset": offset, "size": size}
  )  # fmt: skip


def _check_unique(items: Items) -> None:
  seen = set()
  for i, item in enumerate(items):
    if item.id in seen:
      first = next(k for k, other in enumerate(items) if other.id == item.id)
      raise ValueError(f"the id {item.id!r} occurs twice: {items.place(first)} and {items.place(i)}")
    seen.add(item.id)


# ------------------------------------------------------------------ tar shards in WebDataset naming
#
# A sample is the members that share a path up to the first dot of the file name: `train/0001.jpg` and
# `train/0001.json` are the sample `train/0001`. Its image is the first member whose whole suffix is an
# image's: `0001.seg.png` is something else.

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(pattern: str) -> list[str]:
  """`a-{000..002}.tar` -> a-000.tar, a-001.tar, a-002.tar; `{x,y}` -> x, y. As bash and webdataset do.

  Raises:
    ValueError: a brace without its pair, or what is inside is neither a range nor a list.
  """
  match = _BRACES.search(pattern)
  if match is None:
    if "{" in pattern or "}" in pattern:
      raise ValueError(f"{pattern}: a brace without its pair; accepted: shard-{{000000..000009}}.tar")
    return [pattern]
  before, inside, after = pattern[: match.start()], match[1], pattern[match.end() :]
  if numbers := _RANGE.fullmatch(inside):
    low, high = map(int, numbers.groups())
    if low > high:
      raise ValueError(f"{pattern}: the range {{{inside}}} runs backwards")
    width = len(numbers[1]) if numbers[1].startswith("0") else 0
    values = [f"{value:0{width}d}" for value in range(low, high + 1)]
  elif "," in inside:
    values = inside.split(",")
  else:
    raise ValueError(f"{pattern}: {{{inside}}} is neither a range {{000..009}} nor a list {{a,b}}")
  return [path for value in values for path in expand_braces(f"{before}{value}{after}")]


def key_of(member: str) -> str:
  """The sample's key: the member's path up to the first dot of its file name."""
  folder, slash, name = member.rpartition("/")
  return f"{folder}{slash}{name.partition('.')[0]}"


def split_member(uri: str) -> tuple[str, str]:
  """ "<tar>!<member>" -> (tar, member)."""
  end = uri.index(".tar!") + len(".tar")
  return uri[:end], uri[end + 1 :]


def tar_members(path: str, suffixes: Collection[str]) -> Iterator[tuple[str, int, int]]:
  """(member, offset of its bytes, their number) of each sample's image, in the order of the tar.

  Only headers are read; of a URL, whole blocks, so that listing costs about as much as reading it.

  Raises:
    ValueError: not a tar, damaged, cut short, or a sample's members do not lie together.
    OSError: it cannot be opened.
  """
  finished: set[str] = set()
  last = None
  try:
    with files.open_read(path) as f, tarfile.open(fileobj=f, mode="r:") as tar:
      while (member := tar.next()) is not None:
        tar.members.clear()  # it would keep every header
        name = member.name.removeprefix("./")
        key, base = key_of(name), name.rpartition("/")[2]
        if not member.isreg() or base.startswith(".") or base[base.find(".") :].lower() not in suffixes:
          continue
        if key != last and key in finished:
          raise ValueError(f"{path}: the id {key!r} occurs twice: its members do not lie together")
        if key != last:
          yield name, member.offset_data, member.size
        last = key
        finished.add(key)
  except FileNotFoundError:
    raise ValueError(f"no such tar shard: {path}") from None
  except tarfile.TarError as e:
    raise ValueError(f"{path} is not a whole tar file: {e}") from None
