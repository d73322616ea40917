"""Local paths and URLs of object stores (gs://, s3://, memory://, ...) behind the same few functions.

A path without "scheme://" is local and handled by os alone; anything else goes through fsspec, which is
imported when the first such path turns up. Folders and names are joined by "/" in URLs.

An object store has no append and no rename, but putting an object is atomic: `write_atomic` is a rename here
and a put there, and what needs more than that (`ledger`) says how it does without.
"""

from __future__ import annotations

import contextlib
import errno
import glob as local_glob
import heapq
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from sam3lt_jax import storage
from sam3lt_jax.errors import shown
from sam3lt_jax.storage import CannotWrite

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_MAGIC = re.compile(r"[*?[]")


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
  """`storage.writing` for any OSError while `path` is written, at a URL for any error. Raises CannotWrite."""
  # Object stores' packages have errors of their own.
  with storage.writing(path, storage.KEPT, CannotWrite, lambda e: isinstance(e, OSError) or is_remote(path)):
    yield


def exclusive(path: str, wait: float) -> contextlib.AbstractContextManager:
  """`storage.exclusive`; at a URL it does nothing."""
  return contextlib.nullcontext() if is_remote(path) else storage.exclusive(path, wait)


def is_remote(path: str) -> bool:
  """Whether `path` is a URL. "file://" is not: `absolute` makes it a path."""
  return bool(_SCHEME.match(path)) and not path.startswith("file://")


def is_pattern(path: str) -> bool:
  return bool(_MAGIC.search(path))


def absolute(path: str | os.PathLike) -> str:
  """A local path in full (links are not resolved), a URL without its last slash."""
  path = os.fspath(path)
  if is_remote(path):
    return path.rstrip("/")
  return os.path.abspath(path.removeprefix("file://"))


def join(folder: str, *names: str) -> str:
  """`folder`/`names`; a name that is absolute or a URL stands for itself."""
  for name in names:
    if is_remote(name):
      folder = name
    elif is_remote(folder):
      folder = f"{folder.rstrip('/')}/{name}"
    else:
      folder = os.path.join(folder, name)
  return folder


def folder_of(path: str) -> str:
  return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def filesystem(url: str) -> tuple[Any, str]:
  """(fsspec file system, path in it).

  Raises:
    ImportError: fsspec, or the package that it needs for this scheme, is not installed.
    ValueError: a scheme that fsspec does not know.
  """
  scheme = url.partition("://")[0]
  wanted = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "http": "aiohttp", "https": "aiohttp"}.get(scheme)
  try:
    import fsspec

    # Without the cache of listings: another host's shards must show.
    return fsspec.core.url_to_fs(url, use_listings_cache=False)
  except ImportError as e:
    more = f" {wanted}" if wanted else ""
    raise ImportError(f"{scheme}:// needs a package: pip install 'sam3lt_jax[jobs]'{more} ({e})") from e
  except ValueError as e:
    raise ValueError(f"{url}: the scheme {scheme}:// is not known ({e})") from e


def open_read(path: str) -> BinaryIO:
  """`path` for reading bytes, with seek. Raises OSError."""
  if not is_remote(path):
    return open(path, "rb")
  fs, inner = filesystem(path)
  return fs.open(inner, "rb")


def read(path: str, start: int = 0, size: int | None = None) -> bytes:
  """All of `path`, or `size` bytes from `start`; fewer where it ends earlier. Raises OSError."""
  if is_remote(path):
    fs, inner = filesystem(path)
    try:
      return fs.cat_file(inner, start=start or None, end=None if size is None else start + size)
    except Exception as e:
      raise _os_error(e) from e
  with open(path, "rb") as f:
    f.seek(start)
    return f.read(-1 if size is None else size)


def read_lines(path: str) -> Iterator[tuple[str, str]]:
  """("PATH, line N", text) of each line of a text file that is not blank, stripped.

  Raises:
    ValueError: one that is not UTF-8, or holds a zero byte.
    OSError: it cannot be read.
  """
  for number, line in enumerate(read(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
    place = f"{shown(path)}, line {number}"
    try:
      text = line.decode("utf-8").strip()
    except UnicodeDecodeError:
      raise ValueError(f"{place}: not UTF-8") from None
    if "\0" in text:
      raise ValueError(f"{place}: a zero byte; this is no text file")
    if text:
      yield place, text


def read_several(paths: Sequence[str]) -> list[bytes | None]:
  """The contents of files of one file system, those of URLs read at once; None for one that is not there.

  Raises OSError for one that cannot be read.
  """
  if paths and is_remote(paths[0]):
    fs = filesystem(paths[0])[0]
    inner = [filesystem(path)[1] for path in paths]
    found = fs.cat(inner, on_error="return")  # a dict for a list of several, whatever their number
    contents = [found[path] for path in inner]
  else:
    contents = []
    for path in paths:
      try:
        contents.append(read(path))
      except OSError as e:
        contents.append(e)
  for data in contents:
    if isinstance(data, Exception) and not isinstance(data, FileNotFoundError):
      raise _os_error(data) from data
  return [data if isinstance(data, bytes) else None for data in contents]


_ERRNO = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, TimeoutError: errno.ETIMEDOUT}


def _os_error(e: Exception) -> OSError:
  """What the system would say: the packages of stores have errors of their own."""
  number = getattr(e, "errno", None) or next((_ERRNO[k] for k in _ERRNO if isinstance(e, k)), errno.EIO)
  said = getattr(e, "strerror", None) or (f"{type(e).__name__}: {e}" if str(e) else os.strerror(number))
  return OSError(number, said)


def exists(path: str) -> bool:
  if not is_remote(path):
    return os.path.exists(path)
  fs, inner = filesystem(path)
  return fs.exists(inner)


def is_folder(path: str) -> bool:
  if not is_remote(path):
    return os.path.isdir(path)
  fs, inner = filesystem(path)
  return fs.isdir(inner)


def names(folder: str) -> list[str]:
  """Names of what lies directly in `folder`, unsorted; none if there is no such folder."""
  try:
    if not is_remote(folder):
      return os.listdir(folder)
    fs, inner = filesystem(folder)
    return [entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(inner, detail=False)]
  except FileNotFoundError:
    return []


def sizes(folder: str) -> dict[str, tuple[int, float | None]]:
  """Name -> (bytes, when last written in seconds since the epoch, where known) of the files in `folder`."""
  found: dict[str, tuple[int, float | None]] = {}
  with contextlib.suppress(FileNotFoundError):
    if is_remote(folder):
      fs, inner = filesystem(folder)
      entries = fs.ls(inner, detail=True)
      return {e["name"].rpartition("/")[2]: (e["size"], None) for e in entries if e["type"] == "file"}
    with os.scandir(folder) as entries:
      for entry in entries:
        with contextlib.suppress(FileNotFoundError):  # renamed since the listing
          if entry.is_file():
            found[entry.name] = entry.stat().st_size, entry.stat().st_mtime
  return found


def walk(folder: str, recursive: bool = True) -> Iterator[str]:
  """Files under `folder` as "a/b.jpg", relative to it and unsorted. What begins with a dot is left out.

  Linked folders are followed, and every folder is listed once, by its own name if it has one in here: links
  may lead back, or to each other. Raises OSError for a folder that cannot be read: leaving it out would lose
  its images without a word.
  """
  if is_remote(folder):
    fs, inner = filesystem(folder)
    inner = inner.rstrip("/")
    for path in fs.find(inner, maxdepth=None if recursive else 1):
      name = path[len(inner) :].lstrip("/")
      if name and not any(part.startswith(".") for part in name.split("/")):
        yield name
    return
  listed: set[str] = set()
  linked = [(0, "")]  # the folder itself, and those that links lead to
  while linked:
    # The shortest way first, then by name: the same one on every host.
    prefix = heapq.heappop(linked)[1]
    stack = [(prefix, os.path.realpath(os.path.join(folder, prefix)))]
    while stack:
      prefix, place = stack.pop()
      if place in listed:
        continue
      listed.add(place)
      with os.scandir(os.path.join(folder, prefix[:-1]) if prefix else folder) as entries:
        for entry in entries:
          if entry.name.startswith("."):
            continue
          if not _is_folder(entry):
            yield prefix + entry.name
          elif recursive and entry.is_symlink():
            heapq.heappush(linked, (prefix.count("/"), f"{prefix}{entry.name}/"))
          elif recursive:
            stack.append((f"{prefix}{entry.name}/", os.path.join(place, entry.name)))


def _is_folder(entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError as e:
    if e.errno != errno.ELOOP:
      raise
    return False  # a link to itself: whoever opens it says so


def glob(pattern: str) -> list[str]:
  """Files that `pattern` (with *, ?, [...] and **) names, sorted; local ones as they are written there.

  A pattern with ** is matched against `walk`.
  """
  if not is_remote(pattern):
    before, *parts = re.split(r"/(?=[^/]*[*?[])", pattern, maxsplit=1)
    if not parts or "**" not in parts[0].split("/"):
      return sorted(path for path in local_glob.iglob(pattern) if not os.path.isdir(path))
    from fsspec.utils import glob_translate

    root = before if before or not pattern.startswith("/") else "/"
    matches = re.compile(glob_translate(parts[0])).match
    return (
      sorted(os.path.join(root, name) for name in walk(root) if matches(name)) if os.path.isdir(root) else []
    )
  fs, inner = filesystem(pattern)
  found = fs.glob(inner, detail=True)
  scheme = pattern.partition("://")[0]
  if inner.startswith(f"{scheme}://"):  # http keeps its scheme
    return sorted(path for path, about in found.items() if about["type"] == "file")
  root = pattern[: len(pattern) - len(inner.lstrip("/"))]
  return sorted(root + path.lstrip("/") for path, about in found.items() if about["type"] == "file")


def make_folder(path: str) -> None:
  """Raises CannotWrite. An object store has no folders: nothing is done there."""
  if not is_remote(path):
    with writing(path):
      os.makedirs(path, exist_ok=True)


def write_atomic(path: str, data: bytes | Iterable[bytes], alone: bool = False) -> None:
  """Writes `path` so that it is whole or not there, also after a power cut; replaces what was there.

  `alone`: as for `storage.atomic`.

  Raises:
    CannotWrite: no room, no permission, no such folder.
  """
  with atomic(path, alone=alone) as f:
    for block in [data] if isinstance(data, bytes) else data:
      f.write(block)


@contextlib.contextmanager
def atomic(path: str, alone: bool = False) -> Iterator[BinaryIO]:
  """A file to write that becomes `path` when the block ends without an error, and leaves no trace otherwise.

  A path is written by `storage.atomic`, a URL to a temporary local file and put as one object at the end.

  Raises:
    CannotWrite: for any OSError, one inside the block included: what the block reads, it answers for itself.
  """
  if is_remote(path):
    fs, inner = filesystem(path)
    with tempfile.TemporaryFile() as f:
      yield f
      size = f.tell()
      f.seek(0)
      with writing(path):
        if size < 1 << 26:
          fs.pipe_file(inner, f.read())  # one request, so no half object
        else:
          with fs.open(inner, "wb") as out:  # a multipart upload: it shows when it is complete
            shutil.copyfileobj(f, out, 1 << 24)
    return
  with writing(path), storage.atomic(path, alone) as f:
    yield f


def move(old: str, new: str) -> None:
  """Renames a file, replacing `new`; an object is copied, then removed. Raises CannotWrite."""
  with writing(new):
    if not is_remote(old):
      os.replace(old, new)
      return
    fs, inner = filesystem(old)
    fs.mv(inner, filesystem(new)[1])
