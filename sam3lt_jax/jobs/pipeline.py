"""From images to lines of a shard, with every stage at work at the same time.

    reader threads           decode, resize, in order                        bounded by images ahead
    the caller's thread      batches -> `Engine.run`: starts the next call, then takes the last one's scores
    devices                  one call runs, one waits; on accelerators kept masks are enlarged here
    post-processing threads  masks -> RLE
    writer thread            appends, a write and an fsync for several images; commits shards, in order

Images of consecutive shards share batches, so devices do not wait at a shard's end, and only the job's last
batch is padded.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any

import jax

from sam3lt_jax.engine import Asked, Engine
from sam3lt_jax.errors import shown
from sam3lt_jax.jobs import results
from sam3lt_jax.jobs.ledger import ShardWriter
from sam3lt_jax.jobs.reading import Failure, Pixels, Reader, Stopped
from sam3lt_jax.kept import Kept
from sam3lt_jax.processing.prompts import Prompt

FLUSH_RECORDS, FLUSH_S = 32, 2.0  # written together; what a kill may cost beyond what is in work
FEWEST = 20  # images, before a share of failures stops a job
_CLOSE = object()


class TooManyFailures(Exception):
  """The share of failures is above the one that was stated."""


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
  """Takes records and futures of records in order, and writes them from a thread of its own.

  A context manager that ends when all that was put is written, and raises what the thread ran into.
  """

  def __init__(self, room: int, on_record: Callable[[results.Record], None]):
    """`room`: records that may wait; `on_record` is called with each that is written."""
    self._queue: queue.Queue = queue.Queue(room)
    self._on_record = on_record
    self._error: BaseException | None = None
    self._buffer: list[results.Record] = []
    self._shard: ShardWriter | None = None
    self._flushed = time.perf_counter()
    self.waited_s = 0.0
    self.committed = 0
    self._thread = threading.Thread(target=self._work, name="sam3lt-write", daemon=True)

  def __enter__(self) -> Writer:
    self._thread.start()
    return self

  def __exit__(self, kind: Any, *exception) -> None:
    self._queue.put(_CLOSE)
    self._thread.join()
    if self._error is not None and kind is None:
      raise self._error

  def put(self, shard: ShardWriter, record: results.Record | futures.Future | None) -> None:
    """A record of `shard`, or None: it is complete. Waits for room; raises what the writer ran into."""
    if self._error is not None:
      raise self._error
    start = time.perf_counter()
    self._queue.put((shard, record))
    self.waited_s += time.perf_counter() - start

  def _work(self) -> None:
    entry = None
    while entry is not _CLOSE:
      try:
        entry = self._queue.get(timeout=FLUSH_S)
      except queue.Empty:
        entry = None
      try:
        if self._error is None:  # else it only takes what is put, so that nobody waits for room
          self._take(entry)
      except BaseException as e:
        self._error = e

  def _take(self, entry: Any) -> None:
    shard, record = (self._shard, None) if entry in (None, _CLOSE) else entry
    # A record may be long in coming.
    if record is None or shard is not self._shard or time.perf_counter() - self._flushed > FLUSH_S:
      self._flush()
    self._shard = shard
    if record is not None:
      self._buffer.append(record.result() if isinstance(record, futures.Future) else record)
      if len(self._buffer) >= FLUSH_RECORDS:
        self._flush()
    elif entry not in (None, _CLOSE):
      shard.commit()
      shard.close()
      self.committed += 1

  def _flush(self) -> None:
    if self._buffer:
      self._shard.append(self._buffer)
      for record in self._buffer:
        self._on_record(record)
      self._buffer = []
    self._flushed = time.perf_counter()


@dataclasses.dataclass(frozen=True)
class _Entry:
  """An image, a failure, or a shard's end (`item` None) on its way; `row` where the devices have it."""

  shard: ShardWriter
  item: Any
  found: Pixels | Failure | None
  row: int | None = None


class Pipeline:
  """Drives images through reader, devices, post-processing and writer."""

  def __init__(
    self,
    engine: Engine,
    reader: Reader,
    writer: Writer,
    questions: Callable[[str], Sequence[Prompt]],
    *,
    threshold: float,
    mask_threshold: float,
    post_workers: int = 2,
    max_failures: float = 1.0,
    stop: Callable[[], bool] = lambda: False,
    on_image: Callable[[Any, results.Record], None] = lambda item, record: None,
  ):
    """Args:
    questions: item id -> what is asked of it.
    threshold: scores above it are kept. mask_threshold: see `postprocess.binary_masks`.
    post_workers: post-processing threads.
    max_failures: share of failures above which to give up, once 20 images were read.
    stop: whether to end early.
    on_image: called from a post-processing thread with each image's record.
    """
    self._engine, self._reader, self._writer, self._questions = engine, reader, writer, questions
    self._thresholds = threshold, mask_threshold
    self._max_failures, self._stop, self._on_image = max_failures, stop, on_image
    self._pool = futures.ThreadPoolExecutor(post_workers, thread_name_prefix="sam3lt-post")
    self._ended: Stopped | TooManyFailures | None = None
    self._in_hand = 0  # batches that the devices have
    self.images = self.failures = 0

  def run(self, works: Iterable[tuple[ShardWriter, Any]]) -> bool:
    """Does all of `works`: (shard, item), and (shard, None) at a shard's end. False: it was told to stop.

    Ended early in either way, what the devices have is finished and handed to the writer; the rest of its
    shards is left for another run.

    Raises:
      TooManyFailures: saying how many; and whatever the writer raises.
    """
    try:
      for entries, kept in self._engine.run(self._batches(works), *self._thresholds):
        self._in_hand -= bool(kept)
        self._hand_over(entries, kept)
    finally:
      self._pool.shutdown(wait=False)  # what was handed over is still computed, for the writer
    if isinstance(self._ended, TooManyFailures):
      raise self._ended
    return self._ended is None

  def _batches(self, works: Iterable[tuple[ShardWriter, Any]]) -> Iterator[tuple[list[_Entry], list[Asked]]]:
    """Images in batches for the devices, each with all entries up to its last image."""
    entries: list[_Entry] = []
    asked: list[Asked] = []
    try:
      for shard, item, found in self._reader.stream(works):
        if self._stop():
          raise Stopped
        entries.append(self._entry(shard, item, found, asked))
        # What only failed waits for no image, unless the devices are at work before it.
        if len(asked) == self._engine.rows or not (asked or self._in_hand):
          self._in_hand += bool(asked)
          yield entries, asked
          entries, asked = [], []
    except (Stopped, TooManyFailures) as e:
      self._ended = e
    else:
      yield entries, asked

  def _entry(
    self, shard: ShardWriter, item: Any, found: Pixels | Failure | None, asked: list[Asked]
  ) -> _Entry:
    """Adds an image of which something is asked to `asked`."""
    if item is None:
      return _Entry(shard, None, None)
    self.images += 1
    if isinstance(found, Pixels):
      try:
        one = self._engine.asked(found.pixels, (found.height, found.width), self._questions(item.id))
      except ValueError as e:
        found = Failure("other", f"its question cannot be asked: {e}")
    if isinstance(found, Failure):
      self.failures += 1
      if self.images >= FEWEST and self.failures > self._max_failures * self.images:
        raise TooManyFailures(
          f"{self.failures} of {self.images} images failed, more than the accepted share of"
          f" {self._max_failures:g} (--max-failures); the last one: {shown(item.uri)}: {found.message}"
        )
      return _Entry(shard, item, found)
    found = dataclasses.replace(found, pixels=None)  # 3 MB each, and `asked` has them
    if not one.prompts:
      return _Entry(shard, item, found)
    asked.append(one)
    return _Entry(shard, item, found, len(asked) - 1)

  def _hand_over(self, entries: Sequence[_Entry], kept: Sequence[Kept]) -> None:
    for entry in entries:
      if entry.item is None:
        self._writer.put(entry.shard, None)
      elif isinstance(entry.found, Failure):
        failed = results.record(entry.item, error=entry.found.code, message=entry.found.message)
        self._writer.put(entry.shard, failed)
      else:
        found = None if entry.row is None else kept[entry.row]
        self._writer.put(entry.shard, self._pool.submit(self._record, entry, found))

  def _record(self, entry: _Entry, kept: Kept | None) -> results.Record:
    """Post-processing of one image."""
    prompts, instances = self._questions(entry.item.id), []
    for k in range(0 if kept is None else len(kept)):
      number = int(kept.prompt[k])
      instances.append(results.instance(prompts[number], number, kept.scores[k], kept.boxes[k], kept.mask(k)))
    height, width = entry.found.height, entry.found.width
    record = results.record(entry.item, width=width, height=height, results=instances)
    self._on_image(entry.item, record)
    return record
