"""A job from its configuration to its summary, for `sam3lt batch` and `python -m tpu.batch_inference`.

    summary = run_job(JobConfig(source="photos", out="found", phrases=["a dog", "a cat"]))
    print(summary)

Started again with the same arguments it does what is missing and only that. On several hosts, or in several
processes, every one runs the same call: each takes shards by its number, then those that others have left,
and none waits for another.

`run_part` is what jobs of images (here) and of clips (`clips`) share: list, load, plan, work, summary.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sam3lt_jax import devices, parallel, storage
from sam3lt_jax.checkpoints import open_checkpoint
from sam3lt_jax.checkpoints.sources import check_phrases
from sam3lt_jax.checkpoints.summary import digest
from sam3lt_jax.engine import IMAGE_BUCKETS, PROMPT_BUCKETS, Engine
from sam3lt_jax.errors import check_whole, renamed
from sam3lt_jax.jobs import files, reading
from sam3lt_jax.jobs.ledger import Shard
from sam3lt_jax.jobs.pipeline import Pipeline
from sam3lt_jax.jobs.plan import Plan
from sam3lt_jax.jobs.questions import Questions
from sam3lt_jax.jobs.results import Overlays
from sam3lt_jax.jobs.sources import Item, list_items
from sam3lt_jax.jobs.summary import Summary
from sam3lt_jax.predictor import Predictor
from sam3lt_jax.processing import postprocess

SHARD_SIZES = (16, 500)
_LISTED = 10_000  # phrases that stand in plan.json; more only by their digest


@dataclasses.dataclass(frozen=True)
class Config:
  """What jobs of images and of clips are both told.

  Attributes:
    source: what to read, see `sources.list_items`; `recursive` as there.
    out: the job's folder, or a URL.
    phrases: asked of every image or clip.
    model, profile, dtype, image_size: see `Predictor.from_pretrained`.
    threshold: detections with a score above it are kept. None: the profile's.
    allow_change, verify: see `Plan.open`.
    process_index, process_count: which part of the job this process does. None: as `jax.distributed` has it,
      where it was started, else 0 of 1.
    compilation_cache: folder of XLA's persistent cache, see `devices.keep_compiled`.
  """

  source: str | Sequence[str]
  out: str
  phrases: Sequence[str] = ()
  model: str = "s0"
  profile: Any = None
  dtype: str = "float32"
  image_size: int | None = None
  threshold: float | None = None
  recursive: bool = True
  allow_change: bool = False
  verify: bool = False
  process_index: int | None = None
  process_count: int | None = None
  compilation_cache: str | None = None

  def __post_init__(self):
    if (self.process_index is None) != (self.process_count is None):
      raise ValueError("process_index and process_count go together; one was given")
    if self.process_count is not None and not 0 <= self.process_index < self.process_count:
      raise ValueError(
        f"process_index={self.process_index} of process_count={self.process_count}; accepted: 0 to one less"
      )
    if self.threshold is not None:
      postprocess.check_threshold("threshold", self.threshold)

  def process(self) -> tuple[int, int]:
    """(index, count) of this process."""
    if self.process_count is not None:
      return self.process_index, self.process_count
    devices.check()
    return jax.process_index(), jax.process_count()


@dataclasses.dataclass(frozen=True)
class JobConfig(Config):
  """What a job of images is.

  Attributes:
    prompts_file: in place of `phrases`: phrases, or questions an image, see `questions`.
    images: see `sources.list_items`.
    mask_threshold: probability above which a pixel belongs to its object.
    batch: images a device that run together. None: 8 on accelerators, or as many as the compiled programs
      leave room for; 1 on a CPU.
    buckets: questions of an image that run together, ascending. None: see `engine_options`.
    model_parallel: devices that share one copy of the weights.
    workers: images decoded at once. None: as many as there are cores, 2 to 16. worker_processes: in processes
      instead of threads, see `reading`.
    shard_size: images that are committed together. None: an eighth of what a process does, 16 to 500. What
      is in a shard that is not yet complete survives a restart all the same (not on object stores).
    max_pixels: larger images are recorded as failures.
    max_failures: share of failed images above which the job stops, from 20 images on.
    overlays: so many images, spread evenly over the source, are also drawn, into OUT/overlays.
  """

  prompts_file: str | None = None
  images: str | None = None
  mask_threshold: float = 0.5
  batch: int | None = None
  buckets: Sequence[int] | None = None
  model_parallel: int = 1
  workers: int | None = None
  worker_processes: bool = False
  shard_size: int | None = None
  max_pixels: int = reading.MAX_PIXELS
  max_failures: float = 0.5
  overlays: int = 0

  def __post_init__(self):
    if bool(self.phrases) == (self.prompts_file is not None):
      raise ValueError("give either phrases (--prompts) or a file of them (--prompts-file)")
    if not 0 <= self.max_failures <= 1:
      raise ValueError(f"max_failures must be a share within 0 and 1, got {self.max_failures}")
    least = {"max_pixels": 1, "overlays": 0, "workers": 1, "batch": 1, "model_parallel": 1, "shard_size": 1}
    for name, low in least.items():
      if (value := getattr(self, name)) is not None:
        check_whole(name, value, low)
    super().__post_init__()
    postprocess.check_threshold("mask_threshold", self.mask_threshold)


class Progress:
  """What a job tells while it runs; this one says nothing."""

  def describe(self, text: str) -> None:
    """What is being done now."""

  def expect(self, total: int) -> None:
    """How many images this process may do at most: all that the job has left."""

  def advance(self, failed: bool) -> None:
    """One more is written."""

  def note(self, text: str) -> None:
    """Something the user may want to know."""


def run_part(job: Any, progress: Progress, stop: threading.Event) -> Summary:
  """Runs this process's part of a job.

  SIGINT and SIGTERM (where this is the main thread) end it early, as `stop` does: what the devices have is
  finished and written, started shards stay in the folder for the next run. A second signal ends it at once.

  Args:
    job: `_Images` or `clips._Clips`. Asked in this order: `items()`; `load(items)`, which loads the model and
      returns the fingerprint; `shard_size(items, processes)`; `work(plan, items, shards, summary)`.
    progress: hears what is going on.
    stop: ends it early.

  Returns:
    A `Summary`; its `stopped` says why the job ended early, if it did.

  Raises:
    ValueError: something in the configuration, the source or the prompts, in one sentence.
    CannotWrite: (ValueError) the output folder cannot be written or is full.
  """
  started, config = time.perf_counter(), job.config
  index, count = config.process()
  with storage.signals(stop.set) as caught:
    files.make_folder(files.absolute(config.out))
    progress.describe("listing the source")
    items = job.items()
    devices.keep_compiled(config.compilation_cache)
    progress.describe(f"loading {config.model}")
    fingerprint = job.load(items)
    plan = Plan.open(
      config.out, items, fingerprint, job.shard_size(len(items), count),
      allow_change=config.allow_change, verify=config.verify,
    )  # fmt: skip
    for note in plan.notes:
      progress.note(note)
    committed = plan.committed()
    summary = Summary(f"{index} of {count}", plan.directory, len(plan.sizes), started=started)
    summary.video = bool(fingerprint.get("video"))
    summary.images_before = sum(plan.sizes[i] for i in committed)
    if len(committed) == len(plan.sizes):
      return summary.finish(plan)
    progress.expect(plan.num_items - summary.images_before)
    job.work(plan, items, plan.missing(index, count), summary)
    if caught and summary.stopped is not None:
      summary.signal, summary.stopped = caught[0], f"{summary.stopped} by {signal.Signals(caught[0]).name}"
    summary.finish(plan).write(index)
    return summary


def run_job(
  config: JobConfig,
  *,
  predictor: Predictor | None = None,
  progress: Progress | None = None,
  stop: threading.Event | None = None,
) -> Summary:
  """Runs this process's part of a job of images, see `run_part`.

  Args:
    predictor: a loaded model in place of the configuration's `model`, `dtype` and so on.
  """
  progress, stop = progress or Progress(), stop or threading.Event()
  return run_part(_Images(config, predictor, progress, stop), progress, stop)


@dataclasses.dataclass
class _Images:
  """A job of images: its model, and the stages of its run, put together."""

  config: JobConfig
  predictor: Predictor | None
  progress: Progress
  stop: threading.Event
  engine: Engine | None = None

  def items(self) -> Sequence[Item]:
    config = self.config
    items = list_items(config.source, recursive=config.recursive, images=config.images)
    file = config.prompts_file
    questions = Questions.of_phrases(config.phrases) if file is None else Questions.from_file(file)
    self.questions = questions
    if skipped := questions.check_items(item.id for item in items) if questions.per_image else 0:
      self.progress.note(f"nothing is asked of {skipped} of {len(items)} images")
    first = itertools.islice(items, SHARD_SIZES[1])
    self.asked = max([1, *(len(questions.for_item(item.id)) for item in first)])
    if self.predictor is None:
      check_phrases(config.model, questions.phrases)
    return items

  def load(self, items: Sequence[Item]) -> dict[str, Any]:
    if self.predictor is None:
      ahead = not Plan.is_done(self.config.out)
      self.engine, weights = load(self.config, self.asked, ahead)
    else:
      weights = digest(self.predictor.variables)
    return fingerprint(self.config, self.engine or self.predictor, self.questions, weights)

  def shard_size(self, items: int, processes: int) -> int:
    return self.config.shard_size or min(max(-(-items // (8 * processes)), SHARD_SIZES[0]), SHARD_SIZES[1])

  def work(self, plan: Plan, items: Sequence[Item], shards: Iterator[Shard], summary: Summary) -> None:
    config, progress = self.config, self.progress
    progress.describe("preparing the devices")
    if (engine := self.engine) is None:
      loaded, options = self.predictor, engine_options(config, self.asked)
      engine = self.engine = Engine(loaded.model, loaded.variables, loaded.processor, **options)
    progress.note(f"running on {devices.running(engine.devices, engine.model.dtype)}")
    engine.compile_ahead(engine.rows, self.asked)
    if config.batch is None:
      engine.fit_memory(self.asked)
    summary.startup_s = time.perf_counter() - summary.started
    progress.describe("")
    overlays, stop = Overlays(plan.directory, items, config.overlays), self.stop.is_set
    pipeline = Pipeline(engine, self.questions, config, summary, progress, stop, overlays.draw)
    pipeline.run(plan, shards, config.process()[0])


def load(config: JobConfig, questions: int, ahead: bool) -> tuple[Engine, str]:
  """The configuration's model on this process's devices, and the digest of its weights.

  Args:
    questions: of each image, as far as is known. ahead: compile for them while the weights are read.
  """
  opened = open_checkpoint(config.model, None, config.profile, config.dtype, config.dtype)
  with renamed("prompt_buckets", "buckets"):
    predictor = Predictor.without_weights(opened, config.image_size, **engine_options(config, questions))
  if ahead:
    predictor.engine.compile_ahead(predictor.engine.rows, questions)
  # On the host where one device is too small for the weights.
  variables = opened.load(parallel.host_device() if config.model_parallel > 1 else None)
  weights = digest(variables)  # before folding, whose rounding may depend on the platform
  predictor.use_variables(variables)
  return predictor.engine, weights


def engine_options(config: JobConfig, questions: int) -> dict[str, Any]:
  """All local devices; what runs together is as the configuration says, or as suits the questions."""
  local = jax.local_devices()
  options: dict[str, Any] = {"devices": local, "model_parallel": config.model_parallel}
  on_cpu = local[0].platform == "cpu"
  if config.batch is not None or not on_cpu:
    options["image_buckets"] = (config.batch or IMAGE_BUCKETS[-1],)
  if config.buckets is not None:
    options["prompt_buckets"] = config.buckets
  elif not on_cpu:
    options["prompt_buckets"] = sorted({*PROMPT_BUCKETS, questions})
  return options


def fingerprint(
  config: JobConfig, loaded: Engine | Predictor, questions: Questions, weights: str
) -> dict[str, Any]:
  """What must be the same on a restart, and what `merge` and a reader need to know, once."""
  processor, name = loaded.processor, config.model.rstrip("/")
  return {
    # By name where that says something; a folder may be another one on another host.
    "model": os.path.basename(name) if os.path.exists(name) else name,
    "weights": weights,
    "profile": processor.profile.name,
    "dtype": np.dtype(loaded.model.dtype).name,
    "image_size": processor.image_size,
    "threshold": processor.profile.score_threshold if config.threshold is None else config.threshold,
    "mask_threshold": config.mask_threshold,
    "max_pixels": config.max_pixels,
    "questions": questions.digest,
    "per_image": questions.per_image,
    "phrases": list(questions.phrases if len(questions.phrases) <= _LISTED else ()),
  }
