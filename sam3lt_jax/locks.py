"""Exclusive locks on local files: who works on a shard, who makes the plan, who trains in a folder.

flock: the kernel drops it when its holder dies, however that dies, so there are no stale locks. It works
across hosts on NFS (Linux 2.6.12 and later). Where a file system has no locks the work goes on without, with
a warning. On object stores there is none, and nothing here is called.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

from sam3lt_jax import storage
from sam3lt_jax.errors import warn

try:
  import fcntl
except ImportError:  # Windows
  fcntl = None

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_POLL = 0.02  # seconds
KEPT = "what was computed before is kept: mend that and start the same command again"


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
  return storage.writing(path, KEPT, when=lambda e: isinstance(e, OSError))


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


def host_name() -> str:
  return socket.gethostname()


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
