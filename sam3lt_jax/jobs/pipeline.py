"""From images to lines of a shard, with every stage at work at the same time.

    reader threads           decode, resize, in order                        bounded by images ahead
    the caller's thread      batches -> devices; starts the next call, then takes the last one's scores
    devices                  one call runs, one waits
    post-processing threads  masks of the kept queries -> image's size -> RLE
    writer thread            appends, a write and an fsync for several images; commits shards, in order

Images of consecutive shards share batches, so devices do not wait at a shard's end, and only the job's last
batch is padded.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any

import jax
import numpy as np

from sam3lt_jax.jobs import results
from sam3lt_jax.jobs.forward import Forward, Found
from sam3lt_jax.jobs.reading import Failure, Pixels, Reader, Stopped

FLUSH_RECORDS, FLUSH_S = 32, 2.0  # written together; what a kill may cost beyond what is in work
FEWEST = 20  # images, before a share of failures stops a job
_CLOSE = object()


class TooManyFailures(Exception):
  """The share of failures is above the one that was stated."""


class ShardInWork:
  """An open shard: its ledger writer, and what was found in it by this run."""

  def __init__(self, writer: Any):
    self.writer = writer
    self.instances = 0


class DeviceClock:
  """How long the devices had something to do, seen by a thread that waits for what they compute."""

  def __init__(self):
    self.busy_s = 0.0
    self.first: float | None = None
    self.last = 0.0
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._watch, name="sam3lt-clock", daemon=True)
    self._thread.start()

  def started(self, at: float, output: jax.Array) -> None:
    """A program was started at `at` (`time.perf_counter`) that computes `output`."""
    self._queue.put((at, output))

  def _watch(self) -> None:
    while (entry := self._queue.get()) is not None:
      at, output = entry
      try:
        output.block_until_ready()
      except Exception:  # whoever reads the output gets it
        continue
      ready = time.perf_counter()
      self.busy_s += ready - max(at, self.last)
      self.first = at if self.first is None else self.first
      self.last = ready
      del entry, output

  def close(self) -> None:
    self._queue.put(None)
    self._thread.join()


class Writer:
  """Takes records and futures of records in order, and writes them from a thread of its own."""

  def __init__(self, room: int, on_record: Callable[[results.Record], None] = lambda record: None):
    """`room`: records that may wait; `on_record` is called with each that is written."""
    self._queue: queue.Queue = queue.Queue(room)
    self._on_record = on_record
    self._error: BaseException | None = None
    self._buffer: list[results.Record] = []
    self._shard: ShardInWork | None = None
    self._flushed = time.perf_counter()
    self.waited_s = 0.0
    self.committed = 0
    self._thread = threading.Thread(target=self._work, name="sam3lt-write", daemon=True)
    self._thread.start()

  def put(self, shard: ShardInWork, record: results.Record | futures.Future | None) -> None:
    """A record of `shard`, or None: it is complete. Waits for room; raises what the writer ran into."""
    start = time.perf_counter()
    while True:
      if self._error is not None:
        raise self._error
      try:
        self._queue.put((shard, record), timeout=0.2)
        break
      except queue.Full:
        continue
    self.waited_s += time.perf_counter() - start

  def close(self) -> None:
    """Writes what was put; raises what the writer ran into."""
    self._queue.put(_CLOSE)
    self._thread.join()
    if self._error is not None:
      raise self._error

  def abandon(self) -> None:
    """Ends the thread without an error, for one that is on its way already."""
    if self._thread.is_alive():
      self._queue.put(_CLOSE)
      self._thread.join()

  def _work(self) -> None:
    while True:
      try:
        entry = self._queue.get(timeout=FLUSH_S)
      except queue.Empty:
        entry = None
      if entry is _CLOSE and self._error is not None:
        return
      if self._error is not None:
        continue  # takes what is put, so that nobody waits for room
      try:
        if entry is _CLOSE:
          self._flush()
          return
        self._take(entry)
      except BaseException as e:
        self._error = e

  def _take(self, entry: Any) -> None:
    if entry is not None:
      shard, record = entry
      if shard is not self._shard:
        self._flush()
        self._shard = shard
      if record is None:
        self._flush()
        shard.writer.commit({"instances": shard.instances})
        shard.writer.__exit__(None, None, None)
        self.committed += 1
        return
      if time.perf_counter() - self._flushed > FLUSH_S:
        self._flush()  # before waiting for a record that may take long
      self._buffer.append(record.result() if isinstance(record, futures.Future) else record)
    if len(self._buffer) >= FLUSH_RECORDS or time.perf_counter() - self._flushed > FLUSH_S:
      self._flush()

  def _flush(self) -> None:
    if self._buffer:
      self._shard.writer.append(self._buffer)
      for record in self._buffer:
        self._shard.instances += len(record.get("results", ()))
        self._on_record(record)
      self._buffer = []
    self._flushed = time.perf_counter()


@dataclasses.dataclass
class _Entry:
  """An image, a failure, or a shard's end (`item` None) on its way; `row` where the devices have it."""

  shard: ShardInWork
  item: Any
  found: Pixels | Failure | None
  questions: tuple = ()
  arrays: list = dataclasses.field(default_factory=list)
  row: int | None = None


@dataclasses.dataclass
class _Group:
  """What one batch of images brings, shards' ends and failures between them included."""

  entries: list[_Entry]
  calls_left: int = 0
  found: list[Found] = dataclasses.field(default_factory=list)


class Pipeline:
  """Drives images through reader, devices, post-processing and writer."""

  def __init__(
    self,
    forward: Forward,
    reader: Reader,
    writer: Writer,
    questions: Callable[[str], tuple],
    *,
    threshold: float,
    mask_threshold: float,
    mask_order: str,
    post_workers: int = 2,
    max_failures: float = 1.0,
    stop: Callable[[], bool] = lambda: False,
    on_image: Callable[[Any, results.Record], None] = lambda item, record: None,
  ):
    """Args:
    questions: item id -> its questions.
    threshold: scores above it are kept. mask_threshold, mask_order: see `postprocess.binary_masks`.
    post_workers: post-processing threads.
    max_failures: share of failures above which to give up, once 20 images were read.
    stop: whether to end early.
    on_image: called from a post-processing thread with each image's record.
    """
    self._forward, self._reader, self._writer, self._questions = forward, reader, writer, questions
    self._threshold, self._mask = threshold, (mask_threshold, mask_order)
    self._max_failures, self._stop, self._on_image = max_failures, stop, on_image
    self._pool = futures.ThreadPoolExecutor(post_workers, thread_name_prefix="sam3lt-post")
    self._pending: tuple[Any, Any, _Group] | None = None
    self.images = self.failures = 0

  def run(self, works: Iterable[tuple[ShardInWork, Any]]) -> bool:
    """Does all of `works`: (shard, item), and (shard, None) at a shard's end. False: it was told to stop.

    Ended early in either way, what the devices have is finished and handed to the writer; the rest of its
    shards is left for another run.

    Raises:
      TooManyFailures: saying how many; and whatever the writer raises.
    """
    group: list[_Entry] = []
    rows = 0
    try:
      for shard, item, found in self._reader.stream(works):
        if self._stop():
          raise Stopped
        entry = self._entry(shard, item, found)
        if entry.questions:
          entry.row, rows = rows, rows + 1
        group.append(entry)
        if rows == self._forward.rows or (not rows and self._pending is None):
          self._start(_Group(group))
          group, rows = [], 0
      self._start(_Group(group))
      self._finish_pending()
      return True
    except Stopped:
      self._finish_pending()
      return False
    except TooManyFailures:
      self._finish_pending()
      raise
    finally:
      self._pool.shutdown(wait=False)  # what was handed over is still computed, for the writer

  def _entry(self, shard: ShardInWork, item: Any, found: Pixels | Failure | None) -> _Entry:
    if item is None:
      return _Entry(shard, None, None)
    self.images += 1
    questions, arrays = self._questions(item.id), []
    if isinstance(found, Pixels):
      try:
        arrays = [self._forward.box_arrays(q, (found.height, found.width)) for q in questions]
      except ValueError as e:
        found = Failure("other", f"its question cannot be asked: {e}")
    if isinstance(found, Failure):
      self.failures += 1
      if self.images >= FEWEST and self.failures > self._max_failures * self.images:
        raise TooManyFailures(
          f"{self.failures} of {self.images} images failed, more than the accepted share of"
          f" {self._max_failures:g} (--max-failures); the last one: {item.uri}: {found.message}"
        )
      questions = ()
    return _Entry(shard, item, found, questions, arrays)

  def _start(self, group: _Group) -> None:
    """Starts a group's calls; each time a call was started, the one before is taken from the devices."""
    on_device = [entry for entry in group.entries if entry.row is not None]
    if not on_device:
      self._finish_pending()
      self._hand_over(group)
      return
    maps = self._forward.encode([entry.found.pixels for entry in on_device])
    for entry in on_device:
      entry.found = dataclasses.replace(entry.found, pixels=None)  # 3 MB each, and no longer needed
    questions, arrays = [entry.questions for entry in on_device], [entry.arrays for entry in on_device]
    calls = self._forward.calls(arrays)
    group.calls_left = len(calls)
    for call in calls:
      raw = self._forward.detect(maps, call, questions, arrays)
      self._finish_pending()
      self._pending = raw, call, group

  def _finish_pending(self) -> None:
    if self._pending is None:
      return
    raw, call, group = self._pending
    self._pending = None
    group.found.append(self._forward.kept(raw, call, self._threshold))
    group.calls_left -= 1
    if not group.calls_left:
      self._hand_over(group)

  def _hand_over(self, group: _Group) -> None:
    for entry in group.entries:
      if entry.item is None:
        self._writer.put(entry.shard, None)
      elif isinstance(entry.found, Failure):
        self._writer.put(entry.shard, results.failure_record(entry.item, entry.found))
      else:
        self._writer.put(entry.shard, self._pool.submit(self._record, entry, group.found))

  def _record(self, entry: _Entry, found: list[Found]) -> results.Record:
    """Post-processing of one image."""
    size = (entry.found.height, entry.found.width)
    kept = []
    for call in found if entry.row is not None else ():
      for k in np.flatnonzero(call.image == entry.row):
        number = int(call.question[k])
        made = results.instance(
          entry.questions[number], number, call.scores[k], call.boxes[k], call.masks()[k], size, *self._mask
        )
        kept.append((number, int(call.query[k]), made))
    record = results.image_record(entry.item, size, [made for *_, made in sorted(kept, key=lambda k: k[:2])])
    self._on_image(entry.item, record)
    return record
