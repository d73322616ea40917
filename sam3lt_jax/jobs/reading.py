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
import fractions
import itertools
import multiprocessing
import os
import queue
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from multiprocessing import connection
from typing import Any

import numpy as np
from PIL import Image

from sam3lt_jax.errors import shown
from sam3lt_jax.jobs import sources
from sam3lt_jax.processing import images

MAX_PIXELS = 100_000_000  # 300 MB decoded, about what Pillow warns above (89 million)
TRIES, PAUSE_S = 3, 0.5  # of reading a file whose storage answers with an error
PATIENCE_S = 3.0  # for images that are in work when the job ends early
_FINAL = (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError)
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


def read_image(item: Any, size: int) -> Pixels | Failure:
  """Reads, decodes and resizes one image; never raises for what is wrong with the image.

  Args:
    item: a `sources.Item`; above `pixel_limit` it is refused before it is decoded.
    size: side of the model's input in pixels.
  """
  try:
    image = load_item(item)
    return Pixels(images.resize_image(image, size), *image.shape[:2])
  except images.ImageError as e:
    if isinstance(e.__cause__, Image.DecompressionBombError):
      many = re.search(r"\d+ pixels", str(e.__cause__))  # Pillow's words are all that tells how many
      many = many[0] if many else "too many pixels"
      return Failure("too_large", f"{many}; the limit is {int(2 * Image.MAX_IMAGE_PIXELS)} (--max-pixels)")
    return Failure(e.reason, _line(e.said.removeprefix(" is ").strip()))
  except (FileNotFoundError, NotADirectoryError) as e:
    return Failure("missing", _line(e))
  except PermissionError as e:
    return Failure("no_permission", _line(e))
  except MemoryError:
    return Failure("too_large", "larger than the memory holds")
  except OSError as e:
    return Failure("other", _line(e))
  except Exception as e:  # a name that no file can have, say
    return Failure("other", f"{type(e).__name__}: {_line(e)}")


def load_item(item: Any) -> np.ndarray:
  """An item's image, uint8 [H, W, 3], in the frame of the annotations that it comes from, if there are any.

  Storage that answers with an error is asked again. Raises as `images.decode` and `sources.open_item`.
  """
  frame = item.meta.get("height"), item.meta.get("width")
  for tries in itertools.count(1):
    try:
      with sources.open_item(item) as file:
        return images.decode(file, "image", frame)
    except OSError as e:
      if tries == TRIES or isinstance(e, _FINAL) or e.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        raise
      time.sleep(PAUSE_S)


def _line(e: BaseException | str) -> str:
  if isinstance(e, OSError) and e.strerror:
    return e.strerror
  return shown(" ".join((str(e) or type(e).__name__).split())[:300])


@contextlib.contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
  """Pillow's limit, which is the process's, is `pixels` meanwhile.

  Pillow asks it wherever it learns a size, also that of an image within an icon, which it decodes before it
  tells anyone.
  """
  # Pillow refuses above twice its own, and warns above it.
  before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, fractions.Fraction(pixels, 2)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", Image.DecompressionBombWarning)
      yield
  finally:
    Image.MAX_IMAGE_PIXELS = before


def _start_worker(job: connection.Connection, max_pixels: int) -> None:
  """In a worker process. Ctrl-C is for the job, which ends its workers itself; so does its death."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  Image.MAX_IMAGE_PIXELS = fractions.Fraction(max_pixels, 2)
  warnings.simplefilter("ignore", Image.DecompressionBombWarning)

  def follow() -> None:
    connection.wait([job])  # nothing is ever sent: the other end was closed
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()


class _Threads(futures.Executor):
  """As `ThreadPoolExecutor`; but one that hangs in a read does not keep the process from ending."""

  def __init__(self, workers: int, max_pixels: int):
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._threads = [
      threading.Thread(target=self._work, name=f"sam3lt-read-{i}", daemon=True) for i in range(workers)
    ]
    for thread in self._threads:
      thread.start()

  def submit(self, function: Callable, /, *arguments: Any) -> futures.Future:
    future: futures.Future = futures.Future()
    self._queue.put((future, function, arguments))
    return future

  def _work(self) -> None:
    while (work := self._queue.get()) is not None:
      future, function, arguments = work
      if future.set_running_or_notify_cancel():
        try:
          future.set_result(function(*arguments))
        except BaseException as e:
          future.set_exception(e)
      del work, future

  def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
    """What has not begun is left. `wait`: for all that has, else for as long as most images take."""
    with contextlib.suppress(queue.Empty):
      while True:
        self._queue.get_nowait()
    for _ in self._threads:
      self._queue.put(None)
    end = time.monotonic() + PATIENCE_S
    for thread in self._threads:
      thread.join(None if wait else max(0.0, end - time.monotonic()))


class _Processes(futures.ProcessPoolExecutor):
  """Worker processes that end with the job, however it ends, and at once where it does not wait for them."""

  def __init__(self, workers: int, max_pixels: int):
    context = multiprocessing.get_context("forkserver")
    # The workers have one end, this process alone the other, which the system closes when the process ends.
    theirs, self._ours = context.Pipe(duplex=False)
    super().__init__(workers, context, _start_worker, (theirs, max_pixels))

  def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
    super().shutdown(wait=wait, cancel_futures=cancel_futures)
    self._ours.close()


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
    max_pixels: see `pixel_limit`.
    stop: whether to give up.
    """
    self._size, self._max_pixels, self._open = size, max_pixels, contextlib.ExitStack()
    self._kind = _Processes if processes else _Threads
    self._workers, self._ahead, self._stop = workers, ahead or 2 * workers, stop
    self._pool: futures.Executor | None = None
    self._queue: collections.deque[tuple[Any, Any, futures.Future | None]] = collections.deque()
    self._awaited: futures.Future | None = None
    self.waited_s = 0.0

  def __enter__(self) -> Reader:
    self._open.enter_context(pixel_limit(self._max_pixels))
    self._pool = self._kind(self._workers, self._max_pixels)
    return self

  def __exit__(self, *exception) -> None:
    # Where images are left, one of them may be hanging in its read.
    self._pool.shutdown(wait=self._awaited is None and not self._queue)
    self._open.close()

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
      return self._pool.submit(read_image, item, self._size)
    except futures.BrokenExecutor as e:
      broken: futures.Future = futures.Future()
      broken.set_exception(e)
      return broken

  def _wait(self, item: Any, future: futures.Future) -> Pixels | Failure:
    start = time.perf_counter()
    try:
      return self._result(future)
    except futures.BrokenExecutor:
      return self._after_a_death(item)
    finally:
      self.waited_s += time.perf_counter() - start

  def _restart(self) -> None:
    self._pool.shutdown()  # a broken pool kills its workers; its pipes are closed before new ones are made
    self._pool = self._kind(self._workers, self._max_pixels)

  def _result(self, future: futures.Future) -> Pixels | Failure:
    self._awaited = future
    while not futures.wait([future], _POLL_S).done:
      if self._stop():
        raise Stopped
    self._awaited = None
    return future.result()

  def _after_a_death(self, item: Any) -> Pixels | Failure:
    """A worker died of some image that was being read. This one is tried alone; all others start anew."""
    self._restart()
    try:
      found = self._result(self._submit(item))
    except futures.BrokenExecutor:
      found = Failure("other", "the worker process that decoded it died")
      self._restart()
    self._queue = collections.deque(
      (tag, later, None if later is None else self._submit(later)) for tag, later, _ in self._queue
    )
    return found
