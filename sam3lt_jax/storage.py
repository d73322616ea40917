"""Files that are whole or not there, full disks, locks, signals: for jobs, training and checkpoints.

Of local file systems, and with the standard library alone; `jobs.files` adds the URLs of object stores.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import re
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from sam3lt_jax.errors import ArgumentError, warn

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None

IMAGE_SUFFIXES = frozenset(
  ".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .avif .heic .heif .ppm .pgm .jp2 .tga .ico".split()
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# TensorStore and safetensors raise exceptions of their own, with the system's text or number in them; numpy's
# has neither.
_TOLD = re.compile(
  r"No space left on device|Disk quota exceeded|ENOSPC|^\d+ requested and \d+ written"
  + "".join(rf"|os_error_code='{number}'|\(os error {number}\)" for number in _NO_ROOM)
)
_QUIET, _PATIENCE, _POLL = 0.3, 10.0, 0.02  # seconds
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
KEPT = "what was computed before is kept: mend that and start the same command again"


class CannotWrite(ValueError):
  """A file, folder or disk that does not take what is written: which, why, and what is kept all the same."""


def is_image(name: str) -> bool:
  """Whether a file is called as an image is."""
  return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_disk_full(e: BaseException | None) -> bool:
  """Whether `e`, or what it was raised from, is a disk (or a quota) without room."""
  while e is not None:
    if (isinstance(e, OSError) and e.errno in _NO_ROOM) or _TOLD.search(str(e)):
      return True
    e = e.__cause__ or e.__context__
  return False


@contextlib.contextmanager
def writing(
  path: str,
  kept: str,
  error: type[ValueError] = CannotWrite,
  when: Callable[[BaseException], bool] = is_disk_full,
) -> Iterator[None]:
  """Turns what goes wrong while `path` is written into one sentence, which ends in what is `kept`.

  Args:
    when: what to turn, by default a full disk alone; all else passes as it is.

  Raises:
    error: with that sentence.
  """
  try:
    yield
  except Exception as e:
    if not when(e):
      raise
    number = getattr(e, "errno", None)
    reason = os.strerror(number) if number else str(e) or type(e).__name__
    if is_disk_full(e):
      reason = "no space is left on its disk"
    raise error(f"{path} is not written: {reason}; {kept}") from e


@contextlib.contextmanager
def atomic(path: str, alone: bool = False) -> Iterator[BinaryIO]:
  """A file to write that becomes `path` when the block ends without an error, and leaves no trace otherwise.

  It is on the disk by then, also after a power cut; what was at `path` is replaced.

  Args:
    alone: nobody else writes `path` now. The file's name while it is written is then always the same, and
      what a kill leaves of it goes when it is written again.

  Raises:
    OSError: no room, no permission, no such folder.
  """
  folder = os.path.dirname(path) or "."
  unique = "" if alone else f".{secrets.token_hex(4)}"
  temporary = os.path.join(folder, f".{os.path.basename(path)}{unique}.tmp")
  try:
    with open(temporary, "wb" if alone else "xb") as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise
  sync_folder(folder)


def write(path: str, text: str) -> None:
  """`atomic`, of a text that nobody else writes now."""
  with atomic(path, alone=True) as f:
    f.write(text.encode())


def sync_folder(path: str) -> None:
  """Returns when the names in a folder are on the disk, where the file system can tell."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # some network file systems do not know fsync of a folder
      os.fsync(descriptor)
  finally:
    os.close(descriptor)


def need_room(folder: str, size: int) -> None:
  """Raises OSError (ENOSPC) where the disk of `folder` has less than `size` bytes left; quotas do not show.

  For Orbax, which meets a full disk in many threads at once: each prints a traceback of its own, and what was
  under way reports to an event loop that has ended, so the better part of it cannot be caught.
  """
  disk = shutil.disk_usage(folder)
  if 0 < disk.total and disk.free < size:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)


def remove(folder: str, pattern: str) -> None:
  """Removes from `folder` what a failed save may still be writing into; returns when it stays away.

  Orbax raises what its first write meets and leaves the others under way, and TensorStore makes the folders
  it misses anew.

  Args:
    pattern: of the names, see `fnmatch`.
  """
  end = time.monotonic() + _PATIENCE
  gone_since = None
  while (now := time.monotonic()) < end and os.path.isdir(folder):
    if left := fnmatch.filter(os.listdir(folder), pattern):
      for name in left:
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
      gone_since = None
    elif gone_since is None:
      gone_since = now
    elif now - gone_since > _QUIET:
      return
    time.sleep(_POLL)


def check_directory(directory: str | os.PathLike[str], name: str) -> None:
  """Whether files can be written in `directory`, or where it will be made; leaves nothing behind.

  Args:
    name: of the argument, for the message.

  Raises:
    ArgumentError: it is an address, there is a file on the way to it, or nothing can be written there.
  """
  given = os.fspath(directory)
  if "://" in given:
    raise ArgumentError(name, f"={given!r}; accepted: a folder of a file system")
  there = os.path.abspath(given)
  while not os.path.lexists(there):
    there = os.path.dirname(there)
  if not os.path.isdir(there):
    raise ArgumentError(name, f"={given!r}: {there} is no directory; accepted: a directory, there or not yet")
  try:
    with tempfile.TemporaryFile(dir=there):
      pass
  except OSError as e:
    raise ArgumentError(name, f"={given!r}: nothing can be written in {there} ({e.strerror})") from e


@contextlib.contextmanager
def signals(stop: Callable[[], Any] = bool) -> Iterator[list[int]]:
  """The first SIGINT or SIGTERM calls `stop` and is listed; a second one does what it did before.

  Outside the main thread, where none can be caught, nothing happens.
  """
  caught: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield caught
    return
  before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

  def restore() -> None:
    for number, handler in before.items():
      signal.signal(number, handler)

  def handle(number: int, _: Any) -> None:
    restore()
    caught.append(number)
    stop()

  for number in before:
    signal.signal(number, handle)
  try:
    yield caught
  finally:
    restore()


# -------------------------------------------------------------------- locks
#
# Who works on a shard, who makes the plan, who trains in a folder. By flock: the kernel drops it when its
# holder dies, however that dies, so there are no stale locks. It works across hosts on NFS (Linux 2.6.12 and
# later). Where a file system has no locks the work goes on without, with a warning.


class FileLock:
  """An exclusive lock that is a file: it says who holds it, and is removed by its holder."""

  def __init__(self, path: str):
    self.path = path
    self._descriptor: int | None = None
    self._one_thread = threading.RLock()

  def acquire(self, wait: float = 0.2) -> bool:
    """Whether it was got within `wait` seconds; some wait is needed, as `is_held` holds it for a moment.

    Raises CannotWrite if the file cannot be made.
    """
    end = time.monotonic() + wait
    while True:
      with _writing(self.path):
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
      # The holder may have removed the file after it was opened here: that lock is nobody's.
      if _flock(descriptor) and _is_at(descriptor, self.path):
        self._descriptor = descriptor
        return True
      os.close(descriptor)
      if time.monotonic() >= end:
        return False
      time.sleep(_POLL)

  def say(self, about: dict) -> None:
    """Writes who holds it, and since when, into the file, for `holder`; nothing once it was let go."""
    data = json.dumps(about).encode()
    with self._one_thread:  # another one may let go meanwhile, and the number of the file be another's
      if self._descriptor is not None:
        with _writing(self.path):
          os.ftruncate(self._descriptor, 0)
          os.pwrite(self._descriptor, data, 0)

  def release(self) -> None:
    with self._one_thread:
      if self._descriptor is not None:
        with contextlib.suppress(OSError):  # a disk that became read-only; the lock goes all the same
          os.unlink(self.path)
        os.close(self._descriptor)
        self._descriptor = None


def _writing(path: str) -> contextlib.AbstractContextManager:
  return writing(path, KEPT, when=lambda e: isinstance(e, OSError))


def _flock(descriptor: int, shared: bool = False) -> bool:
  if fcntl is None:
    return True
  try:
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
  except OSError as e:
    if e.errno not in _NO_LOCKS:
      return False
    warn(f"this file system has no file locks ({e.strerror}): start one job at a time on a folder")
  return True


def _is_at(descriptor: int, path: str) -> bool:
  try:
    return os.path.samestat(os.fstat(descriptor), os.stat(path))
  except FileNotFoundError:
    return False


def is_held(path: str) -> bool:
  """Whether some process holds the lock `path` now."""
  try:
    descriptor = os.open(path, os.O_RDONLY)
  except OSError:
    return False
  try:
    return not _flock(descriptor, shared=True)
  finally:
    os.close(descriptor)


def holder(path: str) -> dict:
  """What the holder said of itself; {} where it has not yet."""
  try:
    with open(path, "rb") as f:
      about = json.loads(f.read())
  except (OSError, ValueError):
    return {}
  return about if isinstance(about, dict) else {}


@contextlib.contextmanager
def exclusive(path: str, wait: float) -> Iterator[None]:
  """Holds the lock `path` for the block.

  Raises:
    ValueError: another process held it for all of `wait` seconds.
    CannotWrite: the file cannot be made.
  """
  lock = FileLock(path)
  if not lock.acquire(wait):
    raise ValueError(f"another process has held {path} for {wait:g} seconds; try again when it is done")
  try:
    yield
  finally:
    lock.release()
