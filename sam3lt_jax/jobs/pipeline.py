"""From shards to do to shards that are done, with every stage at work at the same time.

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
from sam3lt_jax.jobs.ledger import Busy, Shard, ShardWriter
from sam3lt_jax.jobs.plan import Plan
from sam3lt_jax.jobs.questions import Questions
from sam3lt_jax.jobs.reading import Failure, Pixels, Reader, Stopped
from sam3lt_jax.jobs.sources import Item
from sam3lt_jax.jobs.summary import Summary
from sam3lt_jax.kept import Kept
from sam3lt_jax.processing import images

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
  """An image, a failure, or a shard's end (`item` None) on its way; `row`: of `asked` in its batch."""

  shard: ShardWriter
  item: Item | None
  found: Pixels | Failure | None
  asked: Asked | None = None
  row: int = 0


@dataclasses.dataclass
class Pipeline:
  """Drives a run's images through reader, devices, post-processing and writer, and counts what they do.

  `config` is a `run.JobConfig`; `on_image` is called from a post-processing thread with each image's record.
  """

  engine: Engine
  questions: Questions
  config: Any
  summary: Summary
  progress: Any
  stop: Callable[[], bool]
  on_image: Callable[[Item, results.Record], None]

  def __post_init__(self):
    engine, config = self.engine, self.config
    default = engine.processor.profile.score_threshold
    threshold = default if config.threshold is None else config.threshold
    self._thresholds = threshold, config.mask_threshold
    workers = config.workers or images.default_workers()
    self._reader = Reader(
      engine.processor.image_size,
      workers=workers,
      processes=config.worker_processes,
      ahead=2 * workers + engine.rows,  # a batch is being gathered while another is decoded
      max_pixels=config.max_pixels,
      stop=self.stop,
    )
    self._pool = futures.ThreadPoolExecutor(workers, thread_name_prefix="sam3lt-post")
    self._clock = DeviceClock()
    self._writer = Writer(2 * engine.rows + 8, self._on_record)
    self._open: list[ShardWriter] = []
    self._waited_before: float | None = None  # for compilation, when the first program was started
    self._in_hand = 0  # batches that the devices have
    self._images = self._failures = 0
    engine.on_start = self._on_start
    self.summary.devices, self.summary.batch = len(engine.devices), engine.image_buckets[-1]

  def run(self, plan: Plan, shards: Iterable[Shard], process: int) -> None:
    """Works through `shards` until all are done, the job is stopped or too much failed: `summary` says which.

    Ended early in any way, what the devices have is finished and written; the rest is left for another run.
    Raises what the writer raises.
    """
    summary, engine = self.summary, self.engine
    try:
      with self._reader, self._writer:
        try:
          batches = self._batches(self._works(plan, shards, process))
          for entries, kept in engine.run(batches, *self._thresholds):
            self._in_hand -= bool(kept)
            for entry in entries:
              self._hand_over(entry, kept)
        finally:
          self._pool.shutdown(wait=False)  # what was handed over is still computed, for the writer
    finally:
      for shard in self._open:
        shard.close()
      self._clock.close()
      clock = self._clock
      summary.shards_done, summary.compile_s = self._writer.committed, engine.waited_s
      summary.decode_wait_s, summary.write_wait_s = self._reader.waited_s, self._writer.waited_s
      if clock.first is not None:
        # Programs compiled on the way kept the devices waiting once; a longer job does not see it.
        compiling = engine.waited_s - self._waited_before
        summary.run_s = max(clock.last - clock.first - compiling, clock.busy_s)
        summary.device_busy = clock.busy_s / summary.run_s if summary.run_s else None

  def _works(
    self, plan: Plan, shards: Iterable[Shard], process: int
  ) -> Iterator[tuple[ShardWriter, Item | None]]:
    """(shard, item) of what is to do, (shard, None) at each shard's end; opens shards as they are needed."""
    for shard in shards:
      if self.stop():
        self.summary.stopped = "stopped"
        return
      try:
        writer = ShardWriter(plan, shard, process).open()
      except Busy:
        self.summary.shards_busy += 1
        continue
      self._open.append(writer)
      done = frozenset(writer.done)
      self.summary.images_before += len(done)
      for item in shard.items:
        if item.id not in done:
          yield writer, item
      yield writer, None

  def _batches(
    self, works: Iterable[tuple[ShardWriter, Item | None]]
  ) -> Iterator[tuple[list[_Entry], list[Asked]]]:
    """Images in batches for the devices, each with all entries up to its last image."""
    entries: list[_Entry] = []
    asked: list[Asked] = []
    try:
      for shard, item, found in self._reader.stream(works):
        if self.stop():
          raise Stopped
        entries.append(self._entry(shard, item, found, asked))
        # What only failed waits for no image, unless the devices are at work before it.
        if len(asked) == self.engine.rows or not (asked or self._in_hand):
          self._in_hand += bool(asked)
          yield entries, asked
          entries, asked = [], []
    except Stopped:
      self.summary.stopped = "stopped"
    except TooManyFailures as e:
      self.summary.stopped, self.summary.too_many_failures = str(e), True
    else:
      yield entries, asked

  def _entry(
    self, shard: ShardWriter, item: Item | None, found: Pixels | Failure | None, asked: list[Asked]
  ) -> _Entry:
    """Adds an image of which something is asked to `asked`."""
    if item is None:
      return _Entry(shard, None, None)
    self._images += 1
    if isinstance(found, Pixels):
      try:
        size = found.height, found.width
        one = self.engine.asked(found.pixels, size, self.questions.for_item(item.id))
      except ValueError as e:
        found = Failure("other", f"its question cannot be asked: {e}")
    if isinstance(found, Failure):
      self._failures += 1
      accepted = self.config.max_failures
      if self._images >= FEWEST and self._failures > accepted * self._images:
        raise TooManyFailures(
          f"{self._failures} of {self._images} images failed, more than the accepted share of"
          f" {accepted:g} (--max-failures); the last one: {shown(item.uri)}: {found.message}"
        )
      return _Entry(shard, item, found)
    found = dataclasses.replace(found, pixels=None)  # 3 MB each, and `asked` has them
    if not one.prompts:
      return _Entry(shard, item, found)
    asked.append(one)
    return _Entry(shard, item, found, one, len(asked) - 1)

  def _hand_over(self, entry: _Entry, kept: Sequence[Kept]) -> None:
    done: results.Record | futures.Future | None = None
    if isinstance(entry.found, Failure):
      done = results.record(entry.item, error=entry.found.code, message=entry.found.message)
    elif entry.item is not None:
      done = self._pool.submit(self._record, entry, kept[entry.row] if entry.asked else None)
    self._writer.put(entry.shard, done)

  def _record(self, entry: _Entry, kept: Kept | None) -> results.Record:
    """Post-processing of one image."""
    instances = []
    for k in range(0 if kept is None else len(kept)):
      prompt, number = entry.asked.prompts[kept.prompt[k]], int(kept.prompt[k])
      instances.append(results.instance(prompt, number, kept.scores[k], kept.boxes[k], kept.mask(k)))
    height, width = entry.found.height, entry.found.width
    record = results.record(entry.item, width=width, height=height, results=instances)
    self.on_image(entry.item, record)
    return record

  def _on_start(self, at: float, output: Any) -> None:
    if self._waited_before is None:
      self._waited_before = self.engine.waited_s
      for shard in self._open:  # so that `status` leaves compiling out of the rate, as the summary does
        shard.begin()
    self._clock.started(at, output)

  def _on_record(self, record: results.Record) -> None:
    self.summary.count(record)
    self.progress.advance("error" in record)
