"""Many clips as a job: `sam3lt batch --video`. A clip is a unit of the ledger, one clip a device at a time.

    OUT/plan.json, OUT/shards/   as of a job of images, a shard a clip: which are done, in work, failed
    OUT/clips/NAME/              what `video.writing` writes of the clip NAME

A clip that was interrupted goes on from its own state, whichever device or process takes it up.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import jax

from sam3lt_jax import storage
from sam3lt_jax.errors import shown
from sam3lt_jax.jobs import files, ledger, setup
from sam3lt_jax.jobs.plan import Plan, Shard
from sam3lt_jax.jobs.run import Progress
from sam3lt_jax.jobs.sources import Item
from sam3lt_jax.video.frames import Frames, open_frames
from sam3lt_jax.video.writing import Files, Written, write_tracks

SUFFIXES = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .wmv .flv .ogv .3gp .gif".split())
OPTIONS = ("threshold", "latency", "max_objects")  # of `VideoPredictor.track`
_ACCEPTED = "a folder, a glob, a list (.txt) or a video file"


@dataclasses.dataclass(frozen=True)
class ClipConfig:
  """What a job of clips is.

  Attributes:
    source: video files, folders of them (with their subfolders where `recursive`), globs, lists (.txt).
    out: the job's folder, of a local file system.
    phrases: asked of every clip.
    model, tracker, profile, dtype, image_size: see `VideoPredictor.from_pretrained`.
    threshold, latency, max_objects: see `VideoPredictor.track`.
    overlay, davis, every: see `video.writing.Files`.
    allow_change, verify: see `Plan.open`. process_index, process_count: as of `JobConfig`.
  """

  source: str | Sequence[str]
  out: str
  phrases: Sequence[str]
  model: str = "s0"
  tracker: str | bool = "facebook/sam3"
  profile: Any = None
  dtype: str = "float32"
  image_size: int | None = None
  threshold: float | None = None
  latency: int | None = None
  max_objects: int | None = None
  overlay: bool = True
  davis: bool = False
  every: int | None = None
  recursive: bool = True
  allow_change: bool = False
  verify: bool = False
  process_index: int | None = None
  process_count: int | None = None


@dataclasses.dataclass
class ClipSummary:
  """What a run did: clips, frames and objects of this run; failures: reason -> how many."""

  clips: int = 0
  frames: int = 0
  objects: int = 0
  failures: dict[str, int] = dataclasses.field(default_factory=dict)
  left: int = 0
  seconds: float = 0.0
  signal: int | None = None

  @property
  def exit_code(self) -> int:
    return 0 if self.signal is None else 128 + self.signal

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def __str__(self) -> str:
    rate = f", {self.frames / self.seconds:.1f} frames/s" if self.frames and self.seconds else ""
    lines = [
      f"{self.clips} clips, {self.frames} frames in {self.seconds:.1f} s{rate}: {self.objects} objects"
    ]
    if self.failures:
      reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.failures.items()))
      lines.append(f"{sum(self.failures.values())} clips failed: {reasons}")
    if self.left:
      lines.append(f"{self.left} clips are not done yet; the same command goes on from here")
    return "\n".join(lines)


def list_clips(source: str | Sequence[str], recursive: bool = True) -> list[Item]:
  """The video files of a source, each with its path below it as its id.

  Raises:
    ValueError: no such source, one without a video file, or two clips of one name.
  """
  found: dict[str, Item] = {}
  for given in [source] if isinstance(source, str) else source:
    if files.is_remote(given):
      raise ValueError(f"source {shown(given)}: clips are read from local files; accepted: {_ACCEPTED}")
    path = files.absolute(given)
    if files.is_pattern(given) and not os.path.exists(path):
      names = {os.path.basename(p): p for p in files.glob(path) if _is_video(p)}
    elif os.path.isdir(path):
      names = {name: os.path.join(path, name) for name in files.walk(path, recursive) if _is_video(name)}
    elif not os.path.exists(path):
      raise ValueError(f"source {shown(given)} does not exist; accepted: {_ACCEPTED}")
    elif path.endswith(".txt"):
      with open(path, encoding="utf-8", errors="surrogateescape") as f:
        lines = [line.strip() for line in f if line.strip()]
      names = {line: os.path.join(os.path.dirname(path), line) for line in lines}
    else:
      names = {os.path.basename(path): path}
    if not names:
      raise ValueError(f"no video files in {shown(given)} ({' '.join(sorted(SUFFIXES))})")
    for name, place in sorted(names.items()):
      # A path from elsewhere, in a list, by its parts: it names a folder below OUT.
      name = "/".join(part for part in name.split("/") if part not in ("", ".", ".."))
      if name in found:
        raise ValueError(f"two clips are called {shown(name)}: {found[name].uri} and {place}")
      found[name] = Item(name, place)
  return list(found.values())


def _is_video(name: str) -> bool:
  return os.path.splitext(name)[1].lower() in SUFFIXES


def folder_of(out: str, item: Item) -> str:
  """Where a clip's files are written."""
  return os.path.join(files.absolute(out), "clips", item.id)


def run_clips(
  config: ClipConfig,
  *,
  predictors: Sequence[Any] | None = None,
  progress: Progress | None = None,
  stop: threading.Event | None = None,
) -> ClipSummary:
  """Runs this process's part of a job of clips.

  SIGINT and SIGTERM end it early, as `stop` does: each clip's state is written first.

  Args:
    predictors: one a device, in place of those of the configuration.

  Raises:
    ValueError: something in the configuration or the source, in one sentence.
    CannotWrite: (ValueError) the output folder cannot be written or is full.
  """
  started = time.perf_counter()
  progress, stop = progress or Progress(), stop or threading.Event()
  if files.is_remote(os.fspath(config.out)):
    raise ValueError(f"out={config.out!r}: clips are written to local folders, not to URLs")
  index, count = setup.process_number(config)
  with storage.signals(stop.set) as caught:
    items = list_clips(config.source, config.recursive)
    progress.phase(f"loading {config.model}")
    predictors = load(config) if predictors is None else predictors
    fingerprint = {
      "video": True,
      "model": config.model,
      "weights": predictors[0].fingerprint(),
      "phrases": list(config.phrases),
      "options": {name: getattr(config, name) for name in OPTIONS},
      "files": {"overlay": config.overlay, "davis": config.davis},
    }
    plan = Plan.open(
      config.out, items, fingerprint, 1, allow_change=config.allow_change, verify=config.verify
    )
    for note in plan.notes:
      progress.note(note)
    job = _Job(config, plan, progress, stop, index)
    progress.total(len(plan.shards) - len(plan.committed()))
    shards = _Shared(plan.missing(index, count))
    with futures.ThreadPoolExecutor(len(predictors), "sam3lt-clip") as pool:
      for done in [pool.submit(job.work, predictor, shards) for predictor in predictors]:
        done.result()
    summary = job.summary
    summary.left = len(plan.shards) - len(plan.committed())
    summary.seconds = time.perf_counter() - started
    if caught and summary.left:
      summary.signal = caught[0]
    return summary


def load(config: ClipConfig) -> list[Any]:
  """A predictor a local device; the weights are read once."""
  from sam3lt_jax.video.predictor import VideoPredictor

  devices = jax.local_devices()
  first = VideoPredictor.from_pretrained(
    config.model,
    tracker=config.tracker,
    profile=config.profile,
    dtype=config.dtype,
    image_size=config.image_size,
    devices=devices[:1],
  )
  return [first, *(first.on_device(device) for device in devices[1:])]


class _Shared:
  """Shards for several threads."""

  def __init__(self, shards: Iterator[Shard]):
    self._shards, self._lock = shards, threading.Lock()

  def take(self) -> Shard | None:
    with self._lock:
      return next(self._shards, None)


class _Job:
  def __init__(self, config: ClipConfig, plan: Plan, progress: Progress, stop: threading.Event, process: int):
    self._config, self._plan, self._progress, self._stop = config, plan, progress, stop
    self._process, self._lock, self.summary = process, threading.Lock(), ClipSummary()

  def work(self, predictor: Any, shards: _Shared) -> None:
    """Clip after clip on one device."""
    try:
      while not self._stop.is_set() and (shard := shards.take()) is not None:
        try:
          with ledger.ShardWriter(self._plan, shard, self._process) as writer:
            self._one(predictor, shard.items[0], writer)
        except ledger.Busy:
          continue
    except BaseException:
      self._stop.set()  # the other devices write where they are, and end
      raise

  def _one(self, predictor: Any, item: Item, writer: ledger.ShardWriter) -> None:
    record: dict[str, Any] = {"id": item.id, "uri": item.uri}
    if item.id not in writer.done:
      try:
        frames = open_frames(item.uri)
      except (ValueError, OSError) as e:
        missing = isinstance(e, FileNotFoundError)
        record |= {"error": "missing" if missing else "not_a_video", "message": str(e)}
        self._progress.note(f"{shown(item.id)}: {e}")
      else:
        written = self._track(predictor, item, frames)
        if written.stopped:
          return
        record |= {"results": [], "frames": written.frames, "objects": written.objects}
        record |= {"notes": written.notes} if written.notes else {}
        with self._lock:
          self.summary.frames += written.frames - written.before
          self.summary.objects += written.objects
      writer.append([record])
    writer.commit()
    with self._lock:
      self.summary.clips += 1
      if "error" in record:
        self.summary.failures[record["error"]] = self.summary.failures.get(record["error"], 0) + 1
      self._progress.image("error" in record)

  def _track(self, predictor: Any, item: Item, frames: Frames) -> Written:
    config = self._config
    chosen = Files(folder_of(config.out, item), config.overlay, config.davis, config.every)
    options = {name: getattr(config, name) for name in OPTIONS}
    return write_tracks(predictor, frames, chosen, config.phrases, stop=self._stop.is_set, **options)
