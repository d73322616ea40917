"""A job from its configuration to its summary, for `sam3lt batch` and `python -m tpu.batch_inference`.

    summary = run_job(JobConfig(source="photos", out="found", phrases=["a dog", "a cat"]))
    print(summary)

Started again with the same arguments it does what is missing and only that. On several hosts, or in several
processes, every one runs the same call: each takes shards by its number, then those that others have left,
and none waits for another.
"""

from __future__ import annotations

import dataclasses
import itertools
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from sam3lt_jax import devices, storage
from sam3lt_jax.checkpoints.sources import check_phrases
from sam3lt_jax.engine import Engine
from sam3lt_jax.jobs import files, ledger, reading, setup
from sam3lt_jax.jobs.overlays import Overlays
from sam3lt_jax.jobs.pipeline import DeviceClock, Pipeline, TooManyFailures, Writer
from sam3lt_jax.jobs.plan import Plan
from sam3lt_jax.jobs.sources import list_items
from sam3lt_jax.jobs.summary import Summary
from sam3lt_jax.jobs.summary import write as write_summary
from sam3lt_jax.predictor import Predictor
from sam3lt_jax.processing import images, postprocess

MAX_FAILURES = 0.5
SHARD_SIZES = (16, 500)


@dataclasses.dataclass(frozen=True)
class JobConfig:
  """What a job is.

  Attributes:
    source: what to read, see `sources.list_items`; `images`, `recursive` as there.
    out: the job's folder, or a URL.
    phrases: asked of every image; or
    prompts_file: phrases, or questions an image, see `questions`.
    model, profile, dtype, image_size: see `Predictor.from_pretrained`.
    threshold: detections with a score above it are kept. None: the profile's.
    mask_threshold: probability above which a pixel belongs to its object.
    batch: images a device that run together. None: 8 on accelerators, or as many as the compiled programs
      leave room for; 1 on a CPU.
    buckets: questions of an image that run together, ascending. None: see `setup.engine_options`.
    model_parallel: devices that share one copy of the weights.
    workers: images decoded at once. None: as many as there are cores, 2 to 16. worker_processes: in processes
      instead of threads, see `reading`.
    shard_size: images that are committed together. None: an eighth of what a process does, 16 to 500. What
      is in a shard that is not yet complete survives a restart all the same (not on object stores).
    max_pixels: larger images are recorded as failures.
    max_failures: share of failed images above which the job stops, from 20 images on.
    overlays: so many images, spread evenly over the source, are also drawn, into OUT/overlays.
    allow_change, verify: see `Plan.open`.
    process_index, process_count: which part of the job this process does. None: as `jax.distributed` has it,
      where it was started, else 0 of 1.
    compilation_cache: folder of XLA's persistent cache, see `devices.keep_compiled`.
  """

  source: str | Sequence[str]
  out: str
  phrases: Sequence[str] = ()
  prompts_file: str | None = None
  model: str = "s0"
  profile: Any = None
  dtype: str = "float32"
  image_size: int | None = None
  threshold: float | None = None
  mask_threshold: float = 0.5
  batch: int | None = None
  buckets: Sequence[int] | None = None
  model_parallel: int = 1
  workers: int | None = None
  worker_processes: bool = False
  shard_size: int | None = None
  max_pixels: int = reading.MAX_PIXELS
  max_failures: float = MAX_FAILURES
  overlays: int = 0
  allow_change: bool = False
  verify: bool = False
  images: str | None = None
  recursive: bool = True
  process_index: int | None = None
  process_count: int | None = None
  compilation_cache: str | None = None

  def __post_init__(self):
    if bool(self.phrases) == (self.prompts_file is not None):
      raise ValueError("give either phrases (--prompts) or a file of them (--prompts-file)")
    if not 0 <= self.max_failures <= 1:
      raise ValueError(f"max_failures must be a share within 0 and 1, got {self.max_failures}")
    least = {"max_pixels": 1, "overlays": 0, "workers": 1, "batch": 1, "model_parallel": 1, "shard_size": 1}
    for name, low in least.items():
      value = getattr(self, name)
      if value is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if (self.process_index is None) != (self.process_count is None):
      raise ValueError("process_index and process_count go together; one was given")
    if self.process_count is not None and not 0 <= self.process_index < self.process_count:
      raise ValueError(
        f"process_index={self.process_index} of process_count={self.process_count}; accepted: 0 to one less"
      )
    if self.threshold is not None:
      postprocess.check_threshold("threshold", self.threshold)
    postprocess.check_threshold("mask_threshold", self.mask_threshold)


class Progress:
  """What `run_job` tells while it runs; this one says nothing."""

  def phase(self, text: str) -> None:
    """What is being done now."""

  def total(self, images: int) -> None:
    """How many images this process may do at most: all that the job has left."""

  def image(self, failed: bool) -> None:
    """One more is written."""

  def note(self, text: str) -> None:
    """Something the user may want to know."""


def run_job(
  config: JobConfig,
  *,
  predictor: Predictor | None = None,
  progress: Progress | None = None,
  stop: threading.Event | None = None,
) -> Summary:
  """Runs this process's part of a job.

  SIGINT and SIGTERM (where this is the main thread) end it early, as `stop` does: what the devices have is
  finished and written, started shards stay in the folder for the next run. A second signal ends it at once.

  Args:
    predictor: a loaded model in place of the configuration's `model`, `dtype` and so on.
    progress: hears what is going on.

  Returns:
    A `Summary`; its `stopped` says why the job ended early, if it did.

  Raises:
    ValueError: something in the configuration, the source or the prompts, in one sentence.
    CannotWrite: (ValueError) the output folder cannot be written or is full.
  """
  started = time.perf_counter()
  progress, stop = progress or Progress(), stop or threading.Event()
  index, count = setup.process_number(config)
  with storage.signals(stop.set) as caught:
    files.make_folder(files.absolute(config.out))
    progress.phase("listing the images")
    items = list_items(config.source, recursive=config.recursive, images=config.images)
    if not len(items):
      raise ValueError(f"source holds no image: {config.source}")
    questions = setup.load_questions(config)
    if skipped := questions.check_items(item.id for item in items) if questions.per_image else 0:
      progress.note(f"nothing is asked of {skipped} of {len(items)} images")
    if predictor is None:
      check_phrases(config.model, questions.phrases)
    devices.keep_compiled(config.compilation_cache)
    first = itertools.islice(items, SHARD_SIZES[1])
    asked = max([1, *(len(questions.for_item(item.id)) for item in first)])
    progress.phase(f"loading {config.model}")
    if predictor is None:
      engine, weights = setup.load(config, asked, ahead=not Plan.is_done(config.out))
    else:
      engine, weights = None, setup.digest(predictor.variables)
    loaded = predictor or engine
    fingerprint = setup.fingerprint(config, loaded.model, loaded.processor, questions, weights)
    shard_size = config.shard_size or min(max(-(-len(items) // (8 * count)), SHARD_SIZES[0]), SHARD_SIZES[1])
    plan = Plan.open(
      config.out, items, fingerprint, shard_size,
      allow_change=config.allow_change, verify=config.verify,
    )  # fmt: skip
    for note in plan.notes:
      progress.note(note)
    committed = plan.committed()
    summary = Summary(process=f"{index} of {count}", out=plan.directory, shards=len(plan.shards))
    summary.images_before = sum(plan.sizes[i] for i in committed)
    if len(committed) == len(plan.shards):
      return summary.finish(started, plan)
    progress.total(plan.num_items - summary.images_before)
    progress.phase("preparing the devices")
    overlays = Overlays(plan.directory, items, config.overlays)
    if engine is None:
      options = setup.engine_options(config, asked)
      engine = Engine(predictor.model, predictor.variables, predictor.processor, **options)
    progress.note(f"running on {devices.running(engine.devices, engine.model.dtype)}")
    engine.compile_ahead(engine.rows, asked)
    if config.batch is None:
      engine.fit_memory(asked)
    job = _Job(config, engine, plan, questions, summary, progress, stop, overlays)
    job.run(plan.missing(index, count), index, started)
    if caught and summary.stopped is not None:
      summary.signal, summary.stopped = caught[0], f"{summary.stopped} by {signal.Signals(caught[0]).name}"
    summary.finish(started, plan)
    write_summary(plan.directory, index, summary)
    return summary


class _Job:
  """The stages of one run, put together, and what is counted of them."""

  def __init__(self, config, engine, plan, questions, summary, progress, stop, overlays):
    self._config, self._plan, self._summary, self._progress = config, plan, summary, progress
    self._stop, self._left_some = stop, False
    self._open: list[ledger.ShardWriter] = []
    self._waited_before: float | None = None  # for compilation, when the first program was started
    self.engine, self.clock = engine, DeviceClock()
    engine.on_start = self._on_start
    workers = config.workers or images.default_workers()
    # A batch is being gathered while another is decoded.
    self.reader = reading.Reader(
      engine.processor.image_size,
      workers=workers,
      processes=config.worker_processes,
      ahead=2 * workers + engine.rows,
      max_pixels=config.max_pixels,
      stop=stop.is_set,
    )
    default = engine.processor.profile.score_threshold
    self.pipeline_options = {
      "questions": questions.for_item,
      "threshold": default if config.threshold is None else config.threshold,
      "mask_threshold": config.mask_threshold,
      "post_workers": workers,
      "max_failures": config.max_failures,
      "stop": stop.is_set,
      "on_image": overlays.draw,
    }

  def run(self, shards: Iterator[Any], process: int, started: float) -> None:
    """Works through `shards` until all are done, the job is stopped, or too much failed."""
    engine, summary = self.engine, self._summary
    summary.devices, summary.batch = len(engine.devices), engine.image_buckets[-1]
    writer = Writer(2 * engine.rows + 8, self._on_record)
    summary.startup_s = time.perf_counter() - started
    self._progress.phase("")
    try:
      with self.reader:
        pipeline = Pipeline(engine, self.reader, writer, **self.pipeline_options)
        try:
          whole = pipeline.run(self._works(shards, process))
          if not whole or self._left_some:
            summary.stopped = "stopped"
        except TooManyFailures as e:
          summary.stopped, summary.too_many_failures = str(e), True
        writer.close()
    finally:
      writer.abandon()
      for shard in self._open:
        shard.close()
      self.clock.close()
      waited_since = engine.waited_s - (self._waited_before or 0.0)
      summary.take_counters(self.clock, self.reader, writer, engine.waited_s, waited_since)

  def _works(self, shards: Iterator[Any], process: int) -> Iterator[tuple[ledger.ShardWriter, Any]]:
    """(shard, item) of what is to do, (shard, None) at each shard's end; opens shards as they are needed."""
    for shard in shards:
      if self._stop.is_set():
        self._left_some = True
        return
      try:
        writer = ledger.ShardWriter(self._plan, shard, process).open()
      except ledger.Busy:
        self._summary.shards_busy += 1
        continue
      self._open.append(writer)
      done = frozenset(writer.done)
      self._summary.images_before += len(done)
      for item in shard.items:
        if item.id not in done:
          yield writer, item
      yield writer, None

  def _on_start(self, at: float, output: Any) -> None:
    if self._waited_before is None:
      self._waited_before = self.engine.waited_s
      for shard in self._open:  # so that `status` leaves compiling out of the rate, as the summary does
        shard.begin()
    self.clock.started(at, output)

  def _on_record(self, record: dict[str, Any]) -> None:
    self._summary.count(record)
    self._progress.image("error" in record)
