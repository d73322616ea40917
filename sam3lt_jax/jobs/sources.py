"""What a job reads: SOURCE -> items.

| source | an item's id |
| --- | --- |
| a folder, its subfolders included: files with an image's suffix | path in the folder |
| a glob, `photos/**/*.jpg` | path below the part without wildcards |
| a list, `list.txt`: a path (relative to the list) or URL a line | the line |
| COCO images, `instances.json`: each `file_name` in a folder of images | the image's id |
| tar shards, `shard-{000000..000009}.tar`, a glob, one .tar, a folder of them | the member without suffix |
| one image file | as it was given |

Hidden files and folders, and blank lines, are left out. A glob whose suffix is written out (`*.dat`) takes
such files as they are, other globs those with an image's suffix. All may be local or URLs (see `files`), and
several may be given together. The order is the same on every host: folders by id, lists as they are written,
COCO by image id, tars by name and then as their members lie.

Every image of a tar is an item, whatever the dots in its name, a second one of a WebDataset sample
(`0001.jpg`, `0001.seg.png`) as well; of two that differ in their suffix alone the second is called by its
whole name. Left out are macOS's companions of files, `._0001.jpg`, which are no images.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import io
import itertools
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from sam3lt_jax.config import parse_json
from sam3lt_jax.errors import shown
from sam3lt_jax.jobs import files
from sam3lt_jax.storage import IMAGE_SUFFIXES

VIDEO_SUFFIXES = frozenset(
  ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .wmv .flv .ogv .3gp .gif".split()
)


@dataclasses.dataclass(frozen=True)
class Kind:
  """What is looked for: its name, the suffixes of its files, what a source may be."""

  name: str
  suffixes: frozenset[str]
  accepted: str

  def has(self, name: str) -> bool:
    return os.path.splitext(name)[1].lower() in self.suffixes


IMAGES = Kind(
  "images",
  IMAGE_SUFFIXES,
  "a folder, a glob, a list (.txt), COCO images (.json), tar shards (.tar) or an image file",
)
VIDEOS = Kind("video files", VIDEO_SUFFIXES, "a folder, a glob, a list (.txt) or a video file")


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
    return shown(f"{self[i].uri} (from {self._parts[bisect.bisect_right(self._ends, i)].place})")


def list_items(
  source: str | os.PathLike | Sequence[str | os.PathLike],
  *,
  recursive: bool = True,
  images: str | os.PathLike | None = None,
  kind: Kind = IMAGES,
) -> Sequence[Item]:
  """The images of a source, in an order that does not depend on the host.

  Args:
    source: see the module's table; a list of sources is their mixture, one after the other.
    recursive: folders with all their subfolders.
    images: the folder that COCO's file names are in. Default: beside the JSON file, or its folder "images".
    kind: VIDEOS: the video files of a local folder, glob or list; one that is named alone has its name as id.

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
    raise ValueError(f"source must name at least one of {kind.accepted}, got none")
  images = None if images is None else files.absolute(images)
  parts = [_list_one(os.fspath(one), recursive, images, kind) for one in given]
  items = Items(parts)
  if not (len(parts) == 1 and parts[0].unique):
    _check_unique(items)
  return items


def images_in(folder: str, recursive: bool = True) -> list[str]:
  """The images of a folder by their suffix, sorted; see `files.walk`."""
  return sorted(filter(IMAGES.has, files.walk(folder, recursive)))


def open_item(item: Item) -> BinaryIO:
  """The encoded image: a file, to be read as far as it is needed; an object or a tar's member in memory.

  Raises:
    ImageError: what is there is no regular file.
    OSError: no such file, no permission, ..., whatever a store's package raises.
  """
  if "offset" in item.meta:
    return io.BytesIO(files.read(split_member(item)[0], item.meta["offset"], item.meta["size"]))
  if files.is_remote(item.uri):
    return io.BytesIO(files.read(item.uri))
  from sam3lt_jax.processing import images  # here, as it brings numpy and Pillow

  return images.open_file(item.uri)


def _list_one(source: str, recursive: bool, images: str | None, kind: Kind) -> _Part:
  if not source.strip():
    raise ValueError(f"source must be {kind.accepted}, got an empty string")
  suffix = os.path.splitext(source)[1].lower()
  if kind is VIDEOS and files.is_remote(source):
    raise ValueError(
      f"source {shown(source)}: video files are read from a local disk; accepted: {kind.accepted}"
    )
  if source.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
    raise ValueError(
      f"{shown(source)}: a compressed tar cannot be read at any place; unpack it to a .tar first"
    )
  if suffix == ".tar" and "{" in source and not files.exists(source):
    return _tar_part(source, expand_braces(source))
  if files.is_pattern(source) and not files.exists(source):
    return _glob(source, kind)
  path = files.absolute(source)
  if files.is_folder(path):
    return _folder(source, path, recursive, kind)
  if not files.exists(path):
    raise ValueError(f"source {shown(source)} does not exist; accepted: {kind.accepted}")
  if suffix == ".tar" and kind is IMAGES:
    return _tar_part(source, [path])
  if suffix == ".txt":
    return _list_file(source, path)
  if suffix == ".json" and kind is IMAGES:
    return _coco(source, path, images)
  if kind is VIDEOS:
    return _Part(source, [os.path.basename(path)], functools.partial(_plain, os.path.dirname(path)))
  if kind.has(source):
    return _Part(source, [source], functools.partial(_listed, ""), unique=True)
  raise ValueError(f"source {shown(source)} is none of those accepted: {kind.accepted}")


def _plain(root: str, name: str) -> Item:
  return Item(name, files.join(root, name))


def _listed(folder: str, entry: str) -> Item:
  return Item(entry, files.absolute(files.join(folder, entry)))


def _is_tar(name: str) -> bool:
  return name.lower().endswith(".tar")


def _folder(source: str, path: str, recursive: bool, kind: Kind) -> _Part:
  images, archives = [], []
  for name in files.walk(path, recursive):
    if kind.has(name):
      images.append(name)
    elif kind is IMAGES and _is_tar(name):
      archives.append(name)
  if images and archives:
    raise ValueError(
      f"the folder {shown(source)} holds images ({shown(min(images))}) and tar shards"
      f" ({shown(min(archives))}); say which: {shown(files.join(source, '**', '*.jpg'))} or"
      f" {shown(files.join(source, '**', '*.tar'))}"
    )
  if archives:
    return _tar_part(source, [files.join(path, name) for name in sorted(archives)])
  if not images:
    below = " or its subfolders" if recursive else ""
    suffixes = " ".join(sorted(kind.suffixes))
    raise ValueError(f"no {kind.name} in the folder {shown(source)}{below} ({suffixes})")
  return _Part(source, sorted(images), functools.partial(_plain, path), unique=True)


def _glob(source: str, kind: Kind) -> _Part:
  found = files.glob(files.absolute(source))
  if kind is IMAGES and _is_tar(source):
    if not found:
      raise ValueError(f"no tar shards match {shown(source)}")
    return _tar_part(source, found)
  suffix = os.path.splitext(source)[1]
  if not suffix or files.is_pattern(suffix):
    found = list(filter(kind.has, found))
  if not found:
    raise ValueError(f"no {kind.name} match {shown(source)}")
  root = files.absolute(source)
  while files.is_pattern(root):
    root = files.folder_of(root)
  skip = len(root.rstrip("/")) + 1
  return _Part(source, [path[skip:] for path in found], functools.partial(_plain, root), unique=True)


def _list_file(source: str, path: str) -> _Part:
  rows = [text for _, text in files.read_lines(path)]
  if not rows:
    raise ValueError(f"the list {shown(source)} names nothing; it holds a path or URL a line")
  return _Part(source, rows, functools.partial(_listed, files.folder_of(path)))


def _coco(source: str, path: str, images: str | None) -> _Part:
  """Rows (image id, where its file may be below the folder of images, its size or None)."""
  from sam3lt_jax.data import annotations  # numpy and pycocotools come with it

  entries = annotations.images_of(parse_json(files.read(path), source), source, sizes=False)
  rows = sorted((entry.id, entry.names, entry.size) for entry in entries)
  folder, which = _beside(source, images, files.folder_of(path), rows[0][1])

  def item(row: tuple) -> Item:
    image_id, names, size = row
    name = names[min(which, len(names) - 1)]
    known = {} if size is None else {"width": size[1], "height": size[0]}
    return Item(str(image_id), files.join(folder, name), image_id, {"file_name": name} | known)

  return _Part(source, rows, item)


def _beside(source: str, images: str | None, folder: str, names: tuple[str, ...]) -> tuple[str, int]:
  """The folder of images, and at which of an image's `names` its file is there; found by the first image."""
  for candidate in [images] if images else [folder, files.join(folder, "images")]:
    for which, name in enumerate(names):
      if files.exists(files.join(candidate, name)):
        return candidate, which
  if images:
    return images, -1
  raise ValueError(
    f"the images of {shown(source)} are not beside it, nor in a folder images there (its first is"
    f" {shown(names[-1])}); say where they are: --images DIR"
  )


def _tar_part(source: str, paths: Sequence[str]) -> _Part:
  """Rows (number of the tar, member, offset or None, bytes, whether the id is the whole name)."""
  paths = [files.absolute(path) for path in paths]
  rows, taken = [], {}
  for number, path in enumerate(paths):
    for member, offset, size in tar_members(path):
      first = taken.setdefault(os.path.splitext(member)[0], member)
      rows.append((number, member, offset, size, first != member))
  if not rows:
    raise ValueError(f"no images in the tar shards {shown(source)} ({len(paths)} read)")

  def made(row: tuple) -> Item:
    number, member, offset, size, whole = row
    path = paths[number]
    item = Item(member if whole else os.path.splitext(member)[0], f"{path}!{member}")
    if offset is not None:
      item.meta.update(offset=offset, size=size)
      if split_member(item) != (path, member):
        item.meta["tar"] = len(path)
    return item

  return _Part(source, rows, made)


def _check_unique(items: Items) -> None:
  seen = set()
  for i, item in enumerate(items):
    if item.id in seen:
      first = next(k for k, other in enumerate(items) if other.id == item.id)
      raise ValueError(f"the id {item.id!r} occurs twice: {items.place(first)} and {items.place(i)}")
    seen.add(item.id)


# ------------------------------------------------------------------ tar shards

_MOST_SHARDS = 1_000_000  # that a range names
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_ARCHIVE = re.compile(r"\.tar!", re.IGNORECASE)


def expand_braces(pattern: str) -> list[str]:
  """`a-{000..002}.tar` -> a-000.tar, a-001.tar, a-002.tar; `{x,y}` -> x, y. As bash and webdataset do.

  Raises:
    ValueError: a brace without its pair, or what is inside is neither a range nor a list.
  """
  match = _BRACES.search(pattern)
  if match is None and not set(pattern) & set("{}"):
    return [pattern]
  inside = match[1] if match else ""
  values = inside.split(",")
  if numbers := _RANGE.fullmatch(inside):
    low, high = map(int, numbers.groups())
    width = len(numbers[1]) if numbers[1].startswith("0") else 0
    values = [f"{value:0{width}d}" for value in range(low, high + 1)] if high - low < _MOST_SHARDS else []
  elif len(values) == 1:
    values = []
  if not values:
    raise ValueError(
      f"{shown(pattern)}: braces hold a range {{000..009}} of up to {_MOST_SHARDS:,} shards or a list {{a,b}}"
    )
  before, after = pattern[: match.start()], pattern[match.end() :]
  return [path for value in values for path in expand_braces(f"{before}{value}{after}")]


def split_member(item: Item) -> tuple[str, str]:
  """(tar, member) of the item of a tar's member. Raises ValueError where it is none."""
  mark = _ARCHIVE.search(item.uri)
  end = item.meta.get("tar") or (mark.end() - 1 if mark else 0)
  if item.uri[end : end + 1] != "!":
    raise ValueError(f"{item.uri!r} names no member of a tar")
  return item.uri[:end], item.uri[end + 1 :]


def tar_members(path: str) -> list[tuple[str, int | None, int]]:
  """(member, offset of its bytes, their number) of each image, in the order of the tar.

  A link has the bytes of what it names; None where they are not in the tar. Only headers are read; of a URL,
  whole blocks, so that listing costs about as much as reading it. Several tars that were written one behind
  the other are read to the last one's end.

  Raises:
    ValueError: not a tar, damaged, cut short, or it holds what cannot be read at its place.
    OSError: it cannot be opened.
  """
  if not files.is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
    raise ValueError(f"{shown(path)} is no regular file; accepted: a tar")
  found: list[tuple[str, int | None, int]] = []
  links: list[tuple[int, str]] = []
  try:
    # Zeros end a tar, and another may follow; only what is neither ends the listing, by an error.
    with (
      files.open_read(path) as f,
      tarfile.open(fileobj=_Headers(f), mode="r:", tarinfo=_Header, ignore_zeros=True) as tar,
    ):
      _list_members(tar, found, links)
  except FileNotFoundError:
    raise ValueError(f"no such tar shard: {shown(path)}") from None
  except (OSError, MemoryError):
    raise
  except Exception as e:  # of odd headers, tarfile raises what comes of them
    raise ValueError(f"{shown(path)} is not a whole tar file: {shown(e) or type(e).__name__}") from None
  if links:
    places = {name: (offset, size) for name, offset, size in found}
    for row, target in links:
      found[row] = (found[row][0], *places.get(target, (None, 0)))
  return found


class _Headers:
  """A tar as tarfile sees it, which reads nothing large: a damaged header may tell of any size."""

  _LARGEST = 1 << 16  # bytes of a long name, or of attributes

  def __init__(self, file: BinaryIO):
    self.seek, self.tell, self._file = file.seek, file.tell, file

  def read(self, size: int) -> bytes:
    if not 0 <= size <= self._LARGEST:
      raise tarfile.ReadError(f"a header of {size} bytes")
    return self._file.read(size)


class _Header(tarfile.TarInfo):
  """A header that is damaged or cut is an error, not the end of the tar or a block to skip."""

  @classmethod
  def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
    try:
      header = super().fromtarfile(tar)
    except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as e:
      raise tarfile.ReadError(f"{e} at byte {tar.offset}") from None
    if header.size < 0:
      raise tarfile.ReadError(f"a file of {header.size} bytes")
    return header


def _list_members(tar: tarfile.TarFile, found: list, links: list) -> None:
  while (member := tar.next()) is not None:
    tar.members.clear()  # it would keep every header
    name = member.name.removeprefix("./")
    base = name.rpartition("/")[2]
    if member.isdir() or not IMAGES.has(base) or base.startswith("._"):
      continue
    if member.issparse():
      raise tarfile.ReadError(f"{name} is stored as a sparse file: write the tar without --sparse")
    if member.issym():
      links.append((len(found), posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))))
    elif member.islnk():
      links.append((len(found), member.linkname.removeprefix("./")))
    found.append((name, member.offset_data if member.isreg() else None, member.size))
