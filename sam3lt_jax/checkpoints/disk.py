"""A disk without room, or one that cannot be written: found out, told in one sentence, and left tidy."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from sam3lt_jax.checkpoints.errors import CheckpointError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# TensorStore and safetensors raise exceptions of their own, with the system's text or number in them.
_TOLD = re.compile(
  r"No space left on device|Disk quota exceeded|ENOSPC"
  + "".join(rf"|os_error_code='{number}'|\(os error {number}\)" for number in _NO_ROOM)
)
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy's, without the system's number
_QUIET, _PATIENCE = 0.3, 10.0  # seconds


def is_disk_full(e: BaseException | None) -> bool:
  """Whether `e`, or what it was raised from, is a disk (or a quota) without room."""
  while e is not None:
    if isinstance(e, OSError) and (e.errno in _NO_ROOM or _short(e)):
      return True
    if _TOLD.search(str(e)):
      return True
    e = e.__cause__ or e.__context__
  return False


def _short(e: OSError) -> bool:
  return e.errno is None and _SHORT_WRITE.match(str(e)) is not None


@contextlib.contextmanager
def needs_room(path: str, kept: str, error: type[ValueError] = CheckpointError) -> Iterator[None]:
  """Turns a full disk while `path` is written into one sentence, which ends in what is `kept`.

  Raises:
    error: the disk is full. Whatever else goes wrong inside passes as it is.
  """
  try:
    yield
  except Exception as e:
    if isinstance(e, error) or not is_disk_full(e):
      raise
    raise error(no_room(path, kept)) from e


def no_room(path: str, kept: str) -> str:
  """The sentence of a full disk: `path` is not written, what is `kept` all the same."""
  return f"{path} is not written: no space is left on its disk; {kept}"


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
    time.sleep(0.02)


def check_directory(directory: str | os.PathLike[str], name: str) -> None:
  """Whether files can be written in `directory`, or where it will be made; leaves nothing behind.

  Args:
    name: of the argument, for the message.

  Raises:
    ValueError: it is an address, there is a file on the way to it, or nothing can be written there.
  """
  given = os.fspath(directory)
  if "://" in given:
    raise ValueError(f"{name}={given!r}; accepted: a folder of a file system")
  there = os.path.abspath(given)
  while not os.path.lexists(there):
    there = os.path.dirname(there)
  if not os.path.isdir(there):
    raise ValueError(f"{name}={given!r}: {there} is no directory; accepted: a directory, there or not yet")
  try:
    with tempfile.TemporaryFile(dir=there):
      pass
  except OSError as e:
    raise ValueError(f"{name}={given!r}: nothing can be written in {there} ({e.strerror})") from e


def quiet_orbax() -> None:
  """From now on a save that fails is told by what it raises alone.

  By itself Orbax shows a traceback for every thread of it and for every array that was still under way: a
  thousand lines on stderr for a tiny model. None of them says more than the exception.
  """
  logging.getLogger("absl").addFilter(_told_twice)  # the same one again is not added
  logging.getLogger("asyncio").addFilter(_of_an_abandoned_save)
  if getattr(sys.unraisablehook, "_of_sam3lt", False):
    return
  before = sys.unraisablehook

  def hook(args) -> None:
    # TensorStore's threads report to the event loop of the save, which has ended.
    foreign = isinstance(threading.current_thread(), threading._DummyThread)
    if not (foreign and args.exc_type is RuntimeError and str(args.exc_value) == "Event loop is closed"):
      before(args)

  hook._of_sam3lt = True
  sys.unraisablehook = hook


def _told_twice(record: logging.LogRecord) -> bool:
  return "_SignalingThread.run() raised an exception" not in str(record.msg)


def _of_an_abandoned_save(record: logging.LogRecord) -> bool:
  text = record.getMessage()
  return not ("exception was never retrieved" in text and "orbax" in text)
