"""A clip's tracks to files, by a run that may be killed at any moment and started again.

    OUT/masks.jsonl      a line a frame, as they come: its number, time, and of each object the id, phrase,
                         score, box and mask (COCO's RLE)
    OUT/overlay.mp4      the video with its objects drawn on it, in its own time, with its sound
    OUT/youtube_vis.json the same masks as YouTube-VIS wants results: an entry an object
    OUT/objects.csv      a line an object: phrase, first and last frame, frames seen, best score
    OUT/davis/00000.png  one label map a frame with DAVIS' palette: 0 background, n + 1 object n
    OUT/track.json       what was asked of what; with "done" once all is written

While it runs OUT/.state holds the newest state of the tracker and finished pieces of the overlay. A state is
written once all frames before it are in masks.jsonl and on the disk; a run that is started again cuts what is
beyond, draws what the overlay lacks from the lines that are there, and goes on. As the tracker goes on to the
bit, everything ends in the same bytes.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from sam3lt_jax import storage
from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.processing.images import default_workers
from sam3lt_jax.video.frames import FrameError, Frames, open_frames
from sam3lt_jax.video.overlay import Overlay
from sam3lt_jax.video.results import FrameResults, from_record, to_record

MASKS, ABOUT = "masks.jsonl", "track.json"
VIS, OBJECTS, OVERLAY = "youtube_vis.json", "objects.csv", "overlay.mp4"
_STATE = re.compile(r"state-(\d{9})")
_SECONDS = 30.0  # of work that a kill may cost, where nothing is said
_GROUP = 1 << 28  # bytes of masks, beside one object's, that are sorted by object at once


@dataclasses.dataclass(frozen=True)
class Files:
  """What is written.

  Attributes:
    out: the folder.
    overlay, davis: whether these are. every: frames from a state to the next; None: half a minute of work.
  """

  out: str
  overlay: bool = True
  davis: bool = False
  every: int | None = None

  def path(self, name: str) -> str:
    return os.path.join(self.out, name)

  @property
  def state(self) -> str:
    return self.path(".state")


@dataclasses.dataclass
class Written:
  """What a run did.

  Attributes:
    frames: in masks.jsonl now; before: of them, those of earlier runs. objects: how many were found.
    seconds: that tracking took. stopped: it is to be started again. notes: what the user may want to know.
  """

  frames: int = 0
  before: int = 0
  objects: int = 0
  seconds: float = 0.0
  stopped: bool = False
  notes: list[str] = dataclasses.field(default_factory=list)


def write_tracks(
  predictor: Any,
  source: Any,
  files: Files,
  phrases: Sequence[str],
  *,
  rate: float | None = None,
  stop: Callable[[], bool] = lambda: False,
  on_frame: Callable[[int, int | None], None] = lambda done, count: None,
  note: Callable[[str], None] = lambda text: None,
  **options: Any,
) -> Written:
  """Tracks what the phrases name through a clip and writes it; goes on where an earlier run ended.

  Args:
    predictor: a `VideoPredictor`.
    source, rate: see `open_frames`.
    stop: asked after each frame; once it is true the state is written and the run ends. A live source ends
      there for good.
    on_frame: told how many frames are done, of how many (None: nobody knows).
    note: told what the user may want to know, a sentence each.
    options: of `VideoPredictor.track`.

  Raises:
    ValueError: something in the arguments or the source; the folder holds the tracks of something else, or
      another process works in it.
    CannotWrite: (ValueError) the folder cannot be written or is full.
  """
  storage.check_directory(files.out, "out")
  with contextlib.ExitStack() as stack:
    frames = stack.enter_context(open_frames(source, rate))
    if frames.live:
      files = dataclasses.replace(files, every=0)
    os.makedirs(files.out, exist_ok=True)
    lock = storage.FileLock(files.path(".lock"))
    if not lock.acquire():
      raise ValueError(f"another process writes to {files.out}; wait for it, or name another folder")
    stack.callback(lock.release)
    kept = "what was tracked before is kept: make room and start the same command again"
    stack.enter_context(storage.writing(files.out, kept))
    asked = {
      "source": frames.identity,
      "phrases": list(phrases),
      "overlay": files.overlay,
      "davis": files.davis,
      "model": predictor.fingerprint(),
      "options": {name: value for name, value in options.items() if value is not None},
    }
    run = _Run(predictor, frames, files, list(phrases), note)
    if run.agree(json.loads(json.dumps(asked))):
      note(f"all of {frames.name} is tracked: nothing is left to do")
    else:
      os.makedirs(files.state, exist_ok=True)
      run.track(options, stop, on_frame)
      if not run.written.stopped:
        run.finish()
    if not run.written.stopped:  # this run, or one that was killed between "done" and here
      shutil.rmtree(files.state, ignore_errors=True)
    return run.written


class _Run:
  """One run on one clip."""

  def __init__(self, predictor: Any, frames: Frames, files: Files, phrases: list[str], note: Callable):
    self._predictor, self._frames, self._files, self._note = predictor, frames, files, note
    self._phrases = phrases
    self._categories = {phrase: i for i, phrase in enumerate(phrases, 1)}
    self._about: dict[str, Any] = {}
    self._overlay: Overlay | None = None
    self.written = Written()

  def agree(self, asked: dict[str, Any]) -> bool:
    """Whether all was done before. Raises ValueError where the folder holds something else."""
    path = self._files.path(ABOUT)
    about = asked
    if os.path.exists(path):
      with open(path, encoding="utf-8") as f:
        about = json.load(f)
      changed = sorted(key for key in asked if about.get(key) != asked[key])
      if changed:
        raise ArgumentError(
          "out",
          f"={self._files.out!r} holds tracks of another run (other {', '.join(changed)}); accepted: the same"
          " command again, or another folder",
        )
    self._about = about
    if "done" in about:
      self.written = Written(before=about["done"]["frames"], **about["done"])
      return True
    self._say(about)
    return False

  def _say(self, about: dict[str, Any]) -> None:
    storage.write(self._files.path(ABOUT), json.dumps(about, ensure_ascii=False, indent=1) + "\n")

  # ---------------------------------------------------------------- going on

  def _newest_state(self) -> tuple[int, str | None]:
    """(frames that are done, the state after them)."""
    states = sorted((int(m[1]), m[0]) for m in map(_STATE.fullmatch, os.listdir(self._files.state)) if m)
    lines = _count_lines(self._files.path(MASKS))
    for done, name in reversed(states):
      if done <= lines:
        return done, os.path.join(self._files.state, name)
    return 0, None

  def _start(self) -> str | None:
    """Brings the files to where the newest state is, and returns that."""
    done, state = self._newest_state()
    _cut(self._files.path(MASKS), done)
    self.written.frames = self.written.before = done
    if done:
      self._note(f"going on after {done} frames")
    if not self._files.overlay:
      return state
    overlay = self._overlay = Overlay(self._files.state, done)
    if overlay.next < done:
      lines = itertools.islice(records(self._files.path(MASKS)), overlay.next, None)
      with contextlib.closing(self._frames.read(overlay.next)) as images:
        for record, frame in zip(lines, images):
          overlay.add(self._draw(record, frame.image))
    return state

  def _save(self, tracking: Any) -> None:
    name = f"state-{self.written.frames:09d}"
    with storage.atomic(os.path.join(self._files.state, name), alone=True) as f:
      tracking.save(f)
    for other in os.listdir(self._files.state):
      if _STATE.fullmatch(other) and other != name:
        os.unlink(os.path.join(self._files.state, other))

  # ---------------------------------------------------------------- tracking

  def track(self, options: dict[str, Any], stop: Callable, on_frame: Callable) -> None:
    """Frame by frame to the end, or until it is stopped."""
    state, started = self._start(), time.perf_counter()
    files, written, overlay = self._files, self.written, self._overlay
    if files.davis:
      os.makedirs(files.path("davis"), exist_ok=True)
    workers = default_workers()
    waiting: collections.deque[futures.Future] = collections.deque()
    with contextlib.ExitStack() as stack:
      lines = stack.enter_context(open(files.path(MASKS), "ab"))
      pool = stack.enter_context(futures.ThreadPoolExecutor(workers, "sam3lt-draw"))
      tracking = self._predictor.track(self._frames, text=self._phrases, state=state, **options)
      stack.callback(tracking.close)

      def write(most: int) -> None:
        while len(waiting) > most:
          line, image = waiting.popleft().result()
          lines.write(line)
          if overlay is not None:
            overlay.add(image)
          written.frames += 1
          on_frame(written.frames, self._frames.count)

      def save() -> None:
        write(0)
        lines.flush()
        os.fsync(lines.fileno())
        if tracking.can_be_saved and files.every != 0:
          self._save(tracking)

      saved, since = time.perf_counter(), 0
      try:
        for found in tracking.steps():
          waiting.extend(pool.submit(self._one, frame) for frame in found)
          write(2 * workers)
          since += 1
          stopping = stop()
          if stopping and self._frames.live:
            tracking.finish()
          elif stopping and tracking.can_be_saved:
            written.stopped = True
            break
          if since == files.every or (files.every is None and time.perf_counter() - saved > _SECONDS):
            save()
            saved, since = time.perf_counter(), 0
      except FrameError as e:  # what came before it was tracked to its end
        written.notes.append(str(e))
        self._note(str(e))
      save()
    written.seconds = time.perf_counter() - started

  def _one(self, frame: FrameResults) -> tuple[bytes, np.ndarray | None]:
    """The frame's line, and the frame drawn where that is wanted."""
    record = to_record(frame, self._categories)
    if self._files.davis:
      write_davis(os.path.join(self._files.path("davis"), f"{frame.index:05d}.png"), frame)
    image = self._draw(record, frame.image) if self._files.overlay else None
    return json.dumps(record, separators=(",", ":")).encode() + b"\n", image

  def _draw(self, record: dict[str, Any], image: np.ndarray) -> np.ndarray:
    """From the line, so that a frame looks the same whenever it is drawn."""
    found = from_record(record, self._frames.size, self._phrases)
    return np.asarray(found.render(image))

  # ---------------------------------------------------------------- the end

  def finish(self) -> None:
    """Everything that needs the whole clip."""
    files, written = self._files, self.written
    lines = files.path(MASKS)
    if self._overlay is not None and written.frames:
      times = [record["time"] for record in records(lines)]
      if said := self._overlay.join(files.path(OVERLAY), times, self._frames.path):
        written.notes.append(said)
        self._note(said)
    found = objects(lines)
    written.objects = len(found)
    write_table(files.path(OBJECTS), found, self._phrases)
    write_vis(files.path(VIS), lines, found, written.frames)
    done = {"frames": written.frames, "objects": written.objects, "notes": written.notes}
    self._say(self._about | {"done": done})


# ---------------------------------------------------------------- lines


def records(path: str) -> Iterator[dict[str, Any]]:
  """The lines of masks.jsonl, one at a time."""
  with open(path, "rb") as f:
    for line in f:
      yield json.loads(line)


def _count_lines(path: str) -> int:
  """Whole ones."""
  if not os.path.exists(path):
    return 0
  with open(path, "rb") as f:
    return sum(line.endswith(b"\n") for line in f)


def _cut(path: str, count: int) -> None:
  """Leaves the first `count` lines."""
  with open(path, "ab+") as f:
    f.seek(0)
    for _ in range(count):
      f.readline()
    f.truncate(f.tell())


# ---------------------------------------------------------------- objects


@dataclasses.dataclass
class Object:
  """One object of a clip. size: bytes of its masks."""

  id: int
  category: int
  first: int
  last: int = 0
  frames: int = 0
  score: float = 0.0
  size: int = 0


def objects(lines: str) -> list[Object]:
  """All objects of a masks.jsonl, by id."""
  found: dict[int, Object] = {}
  for record in records(lines):
    for one in record["annotations"]:
      object = found.setdefault(one["id"], Object(one["id"], one["category_id"], record["frame"]))
      object.last = record["frame"]
      object.frames += 1
      object.score = max(object.score, one["score"])
      object.size += len(one["segmentation"]["counts"]) + 64
  return [found[i] for i in sorted(found)]


def write_table(path: str, found: Sequence[Object], phrases: Sequence[str]) -> None:
  """A line an object, as CSV."""
  text = io.StringIO()
  table = csv.writer(text, lineterminator="\n")
  table.writerow(["id", "phrase", "first_frame", "last_frame", "frames", "score"])
  for one in found:
    phrase = phrases[one.category - 1]
    table.writerow([one.id, phrase, one.first, one.last, one.frames, f"{one.score:.4f}"])
  storage.write(path, text.getvalue())


def write_vis(path: str, lines: str, found: Sequence[Object], frames: int) -> None:
  """Results as YouTube-VIS wants them, an object a line; in memory are some objects' masks at a time."""
  with storage.atomic(path, alone=True) as f:
    f.write(b"[")
    between = b"\n"
    sums = dict(zip((one.id for one in found), itertools.accumulate(one.size for one in found)))
    for _, group in itertools.groupby(found, lambda one: sums[one.id] // _GROUP):
      group = list(group)
      masks: dict[int, dict[int, str]] = {one.id: {} for one in group}
      for record in records(lines):
        for one in record["annotations"]:
          if one["id"] in masks:
            masks[one["id"]][record["frame"]] = json.dumps(one["segmentation"], separators=(",", ":"))
      for one in group:
        about = {"video_id": 1, "category_id": one.category, "id": one.id, "score": one.score}
        head = json.dumps(about, separators=(",", ":"))[:-1]
        f.write(between + f'{head},"segmentations":['.encode())
        for frame in range(frames):
          f.write(("," if frame else "").encode() + masks[one.id].get(frame, "null").encode())
        f.write(b"]}")
        between = b",\n"
    f.write(b"\n]\n")


# ---------------------------------------------------------------- DAVIS


def write_davis(path: str, frame: FrameResults) -> None:
  """A label map as PNG: 0 background, n + 1 object n; of objects that overlap the smaller shows.

  With DAVIS' palette; in 16 bits of grey where a number does not fit 8.
  """
  from PIL import Image

  numbers = np.concatenate([[0], frame.ids + 1])[frame.results.label_map()]
  if numbers.max() > 255:
    Image.fromarray(numbers.astype(np.uint16)).save(path)
    return
  image = Image.fromarray(numbers.astype(np.uint8))
  image.putpalette(davis_palette().tobytes())
  image.save(path)


def davis_palette() -> np.ndarray:
  """uint8 [256, 3]: PASCAL VOC's colours, which DAVIS took over: a number's bits are dealt in turn to red,
  green and blue, the highest first.
  """
  number = np.arange(256)
  colors = np.zeros((256, 3), np.uint8)
  for bit in range(8):
    for channel in range(3):
      colors[:, channel] |= ((number >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
  return colors
