"""Many clips as a job: `sam3lt batch --video`. A clip is a unit of the ledger, one clip a device at a time.

    OUT/plan.json, OUT/shards/   as of a job of images, a shard a clip: which are done, in work, failed
    OUT/clips/NAME/              what `video.writing` writes of the clip NAME

A clip that was interrupted goes on from its own state, whichever device or process takes it up.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import jax

from sam3lt_jax.errors import shown
from sam3lt_jax.jobs import files, ledger, run, sources
from sam3lt_jax.jobs.ledger import Shard
from sam3lt_jax.jobs.plan import Plan
from sam3lt_jax.jobs.sources import Item
from sam3lt_jax.jobs.summary import Summary
from sam3lt_jax.video.frames import open_frames
from sam3lt_jax.video.writing import Files, write_tracks

OPTIONS = ("threshold", "latency", "max_objects")  # of `VideoPredictor.track`


@dataclasses.dataclass(frozen=True)
class ClipConfig(run.Config):
  """What a job of clips is; `out` is a folder of a local file system.

  Attributes:
    tracker: see `VideoPredictor.from_pretrained`.
    latency, max_objects: see `VideoPredictor.track`.
    overlay, davis, every: see `video.writing.Files`.
  """

  tracker: str | bool = "facebook/sam3"
  latency: int | None = None
  max_objects: int | None = None
  overlay: bool = True
  davis: bool = False
  every: int | None = None

  def __post_init__(self):
    if not self.phrases:
      raise ValueError("phrases must name at least one thing to follow, got none")
    super().__post_init__()


def folder_of(out: str, item: Item) -> str:
  """Where a clip's files are written: its id below OUT/clips; a list may have paths from elsewhere."""
  parts = [part for part in item.id.split("/") if part not in ("", ".", "..")]
  return os.path.join(files.absolute(out), "clips", *parts)


def run_clips(
  config: ClipConfig,
  *,
  predictors: Sequence[Any] | None = None,
  progress: run.Progress | None = None,
  stop: threading.Event | None = None,
) -> Summary:
  """Runs this process's part of a job of clips, see `run.run_part`; a clip that is stopped writes its state.

  Args:
    predictors: one a device, in place of those of the configuration.
  """
  progress, stop = progress or run.Progress(), stop or threading.Event()
  return run.run_part(_Clips(config, predictors, progress, stop), progress, stop)


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


class _Clips:
  def __init__(
    self,
    config: ClipConfig,
    predictors: Sequence[Any] | None,
    progress: run.Progress,
    stop: threading.Event,
  ):
    if files.is_remote(os.fspath(config.out)):
      raise ValueError(f"out={config.out!r}: clips are written to local folders, not to URLs")
    self.config, self._predictors, self._progress, self._stop = config, predictors, progress, stop
    self._options = {name: getattr(config, name) for name in OPTIONS}
    self._lock = threading.Lock()

  def items(self) -> Sequence[Item]:
    items = sources.list_items(self.config.source, recursive=self.config.recursive, kind=sources.VIDEOS)
    folders: dict[str, Item] = {}
    for item in items:
      if (other := folders.setdefault(folder_of(self.config.out, item), item)) is not item:
        raise ValueError(f"two clips are called {shown(item.id)}: {shown(other.uri)} and {shown(item.uri)}")
    return items

  def load(self, items: Sequence[Item]) -> dict[str, Any]:
    config = self.config
    self._predictors = load(config) if self._predictors is None else self._predictors
    return {
      "video": True,
      "model": config.model,
      "weights": self._predictors[0].fingerprint(),
      "phrases": list(config.phrases),
      "options": self._options,
      "files": {"overlay": config.overlay, "davis": config.davis},
    }

  def shard_size(self, items: int, processes: int) -> int:
    return 1

  def work(self, plan: Plan, items: Sequence[Item], shards: Iterator[Shard], summary: Summary) -> None:
    def on_device(predictor: Any) -> None:
      """Clip after clip."""
      try:
        while not self._stop.is_set():
          with self._lock:
            shard = next(shards, None)
          if shard is None:
            return
          try:
            with ledger.ShardWriter(plan, shard, self.config.process()[0]) as writer:
              self._one(predictor, shard.items[0], writer, summary)
          except ledger.Busy:
            summary.shards_busy += 1
      except BaseException:
        self._stop.set()  # the other devices write where they are, and end
        raise
      summary.stopped = "stopped"

    self._progress.describe("")
    summary.devices = len(self._predictors)
    with futures.ThreadPoolExecutor(len(self._predictors), "sam3lt-clip") as pool:
      for done in [pool.submit(on_device, predictor) for predictor in self._predictors]:
        done.result()

  def _one(self, predictor: Any, item: Item, writer: ledger.ShardWriter, summary: Summary) -> None:
    if item.id not in writer.done:
      record, config, new = {"id": item.id, "uri": item.uri}, self.config, 0
      try:
        frames = open_frames(item.uri)
      except (ValueError, OSError) as e:
        missing = isinstance(e, FileNotFoundError)
        record |= {"error": "missing" if missing else "not_a_video", "message": str(e)}
        self._progress.note(f"{shown(item.id)}: {e}")
      else:
        chosen = Files(folder_of(config.out, item), config.overlay, config.davis, config.every)
        stop = self._stop.is_set
        written = write_tracks(predictor, frames, chosen, config.phrases, stop=stop, **self._options)
        if written.stopped:
          return
        new = written.frames - written.before
        record |= {"results": [], "frames": written.frames, "objects": written.objects}
        record |= {"notes": written.notes} if written.notes else {}
      writer.append([record])
      with self._lock:
        summary.count(record)
        summary.frames += new
        self._progress.advance("error" in record)
    writer.commit()
    with self._lock:
      summary.shards_done += 1
