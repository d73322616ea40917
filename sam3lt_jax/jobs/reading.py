"""Images to the model's pixels, ahead of the device: several at once, in order, bounded in memory.

Workers are threads by default. Pillow lets go of Python's lock while it decodes and resizes, so threads keep
as many cores busy as processes do (measured, see docs/jobs.md), start at once, and hand over their pixels
without copying them through a pipe. Processes are for what a decoder may do to the process that runs it: one
that dies takes only its own image with it. They come from a fork server, never from a plain fork, which a
process that runs JAX does not survive.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import io
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
from PIL import Image

from sam3lt_jax.jobs import sources
from sam3lt_jax.processing import images

MAX_PIXELS = 100_000_000  # 300 MB decoded, about what Pillow warns above (89 million)
TRIES, PAUSE_S = 3, 0.5  # of reading a file whose storage answers with an error
_POLL_S = 0.2  # between looks at whether the job was told to stop


@dataclasses.dataclass(frozen=True)
class Pixels:
  """uint8 [S, S, 3], the model's input before normalisation; height, width of the image as it was."""

  pixels: np.ndarray
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class Failure:
  """Why an image cannot be used.

  Attributes:
    code: "truncated" (or damaged inside), "not_an_image", "too_large" (over the limit on pixels, or more than
      the memory holds), "empty" (zero bytes), "no_permission", "missing" or "other".
    message: the same in words.
  """

  code: str
  message: str


def read_image(item: Any, size: int, max_pixels: int = MAX_PIXELS) -> Pixels | Failure:
  """Reads, decodes and resizes one image; never raises for what is wrong with the image.

  Args:
    item: a `sources.Item`.
    size: side of the model's input in pixels.
    max_pixels: images of more are refused before they are decoded.
  """
  data = _read_bytes(item)
  if isinstance(data, Failure):
    return data
  if not data:
    return Failure("empty", "the file has 0 bytes")
  try:
    with Image.open(io.BytesIO(data)) as head:
      width, height = head.size
  except Image.UnidentifiedImageError:
    return Failure("not_an_image", "not an image in a format that Pillow reads")
  except Exception as e:  # decoders raise whatever they like on damaged heads
    return Failure("truncated", f"damaged or truncated: {_line(e)}")
  if width * height > max_pixels:
    return Failure("too_large", f"{width}x{height} pixels; the limit is {max_pixels} (--max-pixels)")
  try:
    image = images.load_image(data)
    return Pixels(images.resize_image(image, size), *image.shape[:2])
  except MemoryError:
    return Failure("too_large", f"{width}x{height} pixels, more than the memory holds")
  except ValueError as e:
    text = _line(e).partition(" bytes) is ")[2] or _line(e)
    return Failure("truncated" if "damaged or truncated" in text else "other", text)


def _read_bytes(item: Any) -> bytes | Failure:
  for left in reversed(range(TRIES)):
    try:
      return sources.read_bytes(item)
    except (FileNotFoundError, NotADirectoryError) as e:
      return Failure("missing", _line(e))
    except PermissionError as e:
      return Failure("no_permission", _line(e))
    except IsADirectoryError:
      return Failure("not_an_image", "it is a folder")
    except MemoryError:
      return Failure("too_large", "the file is larger than the memory")
    except EOFError as e:
      return Failure("truncated", _line(e))
    except OSError as e:
      if not left or e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return Failure("other", _line(e))
      time.sleep(PAUSE_S)
    except Exception as e:  # an archive's or a remote store's own exceptions
      return Failure("other", f"{type(e).__name__}: {_line(e)}")
  raise AssertionError("unreachable")


def _line(e: BaseException) -> str:
  if isinstance(e, OSError) and e.strerror:
    return e.strerror
  return " ".join((str(e) or type(e).__name__).split())[:300]


@contextlib.contextmanager
def _own_pixel_limit() -> Iterator[None]:
  """Pillow's limit, which is the process's, makes way for `max_pixels`, and comes back."""
  before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
  try:
    yield
  finally:
    Image.MAX_IMAGE_PIXELS = before


def _start_worker() -> None:
  """In a worker process: Ctrl-C is for the job, which ends its workers itself."""
  import signal

  signal.signal(signal.SIGINT, signal.SIG_IGN)
  Image.MAX_IMAGE_PIXELS = None


class Stopped(Exception):
  """The job was told to stop while it waited for an image."""


class Reader:
  """Decodes ahead of whoever iterates over `stream`.

  Attributes:
    waited_s: seconds that the iteration has spent waiting for images.
  """

  def __init__(
    self,
    size: int,
    *,
    workers: int,
    processes: bool = False,
    ahead: int | None = None,
    max_pixels: int = MAX_PIXELS,
    stop: Callable[[], bool] = lambda: False,
  ):
    """Args:
    size: side of the model's input in pixels.
    workers: images read at the same time.
    processes: worker processes instead of threads.
    ahead: images that are read or wait to be used, at most; each takes 3 * size**2 bytes, and as many as
      there are workers take their full size as well. Default: 2 * workers.
    max_pixels: see `read_image`.
    stop: whether to give up.

    Raises:
      ValueError: workers or ahead below 1.
    """
    ahead = 2 * workers if ahead is None else ahead
    for name, value in (("workers", workers), ("ahead", ahead)):
      if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    self._arguments = (size, max_pixels)
    self._workers, self._processes, self._ahead, self._stop = workers, processes, ahead, stop
    self._pool: futures.Executor | None = None
    self._open = contextlib.ExitStack()
    self._queue: collections.deque[tuple[Any, Any, futures.Future | None]] = collections.deque()
    self.waited_s = 0.0

  def __enter__(self) -> Reader:
    self._open.enter_context(_own_pixel_limit())
    self._pool = self._new_pool()
    return self

  def __exit__(self, *exception) -> None:
    self._pool.shutdown(wait=True, cancel_futures=True)
    self._open.close()

  def _new_pool(self) -> futures.Executor:
    if not self._processes:
      return futures.ThreadPoolExecutor(self._workers, thread_name_prefix="sam3lt-read")
    context = multiprocessing.get_context("forkserver")
    return futures.ProcessPoolExecutor(self._workers, mp_context=context, initializer=_start_worker)

  def stream(self, works: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any, Pixels | Failure | None]]:
    """(tag, item or None) in; (tag, item, what was read) out, in order. Without an item nothing is read.

    `works` is asked for more only as there is room.

    Raises:
      Stopped: `stop` said so.
    """
    works = iter(works)
    while True:
      while len(self._queue) < self._ahead:
        work = next(works, None)
        if work is None:
          break
        self._queue.append((*work, None if work[1] is None else self._submit(work[1])))
      if not self._queue:
        return
      tag, item, future = self._queue.popleft()
      yield tag, item, None if future is None else self._wait(item, future)

  def _submit(self, item: Any) -> futures.Future:
    try:
      return self._pool.submit(read_image, item, *self._arguments)
    except futures.BrokenExecutor as e:
      broken: futures.Future = futures.Future()
      broken.set_exception(e)
      return broken

  def _wait(self, item: Any, future: futures.Future) -> Pixels | Failure:
    start = time.perf_counter()
    try:
      while True:
        try:
          return future.result(timeout=_POLL_S)
        except futures.TimeoutError:
          if future.done():  # the image's own TimeoutError, of a remote store
            return Failure("other", "the storage did not answer in time")
          if self._stop():
            raise Stopped from None
        except futures.BrokenExecutor:
          return self._after_a_death(item)
    finally:
      self.waited_s += time.perf_counter() - start

  def _after_a_death(self, item: Any) -> Pixels | Failure:
    """A worker died of some image that was being read. This one is tried alone; all others start anew."""
    self._pool.shutdown(wait=False, cancel_futures=True)
    self._pool = self._new_pool()
    try:
      found = self._pool.submit(read_image, item, *self._arguments).result()
    except futures.BrokenExecutor:
      found = Failure("other", "the worker process that decoded it died")
      self._pool = self._new_pool()
    self._queue = collections.deque(
      (tag, later, None if later is None else self._submit(later)) for tag, later, _ in self._queue
    )
    return found
