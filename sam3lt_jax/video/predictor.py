"""VideoPredictor: a video and phrases in, tracked masks out, frame by frame and in constant memory.

    decoder thread   frames                                       bounded
    resize thread    the model's pixels                           bounded
    this thread      a few frames together: engine -> features and detections; then one by one: tracks
    whoever asks     masks at the video's size, from what is left on the device

What is put out late waits as the tracker left it, and its frame with it.

Axes: R frames that are encoded together, P slots, N objects, h, w the model's masks, H, W the video.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np

from sam3lt_jax.checkpoints.summary import digest
from sam3lt_jax.config import PhraseVideoConfig
from sam3lt_jax.engine import Engine
from sam3lt_jax.errors import ArgumentError, check_whole
from sam3lt_jax.predictor import Predictor
from sam3lt_jax.processing import images as image_ops
from sam3lt_jax.processing.clicks import clicks_of
from sam3lt_jax.processing.postprocess import check_threshold
from sam3lt_jax.processing.prompts import Prompt, prompts_of
from sam3lt_jax.video.decisions import CLICKED
from sam3lt_jax.video.frames import Frame, FrameError, Frames, ahead, open_frames
from sam3lt_jax.video.interactive import HISTORY, InteractiveVideo
from sam3lt_jax.video.phrases import Found, FrameObjects, PhraseTracks, frame_results
from sam3lt_jax.video.results import FrameResults
from sam3lt_jax.video.tracks import saved_by

SLOTS = 8  # objects that there is room for at first: every doubling compiles anew, an empty slot costs little


class VideoPredictor(InteractiveVideo):
  """Follows what phrases, example boxes and clicks ask for through videos of any length.

  For clicks on any frame and following in both directions it has the names of SAM 2's video predictor, see
  `InteractiveVideo`.

      tracker = VideoPredictor.from_pretrained("s0", tracker="facebook/sam3")
      for frame in tracker.track("clip.mp4", text=["person", "dog"]):
        frame.index, frame.time, frame.ids, frame.labels, frame.masks, frame.boxes, frame.scores
        frame.render().save(f"{frame.index}.png")

  Attributes:
    predictor: the photo predictor that it stands on, for one device.
    config: the thresholds of phrase video.
  """

  def __init__(
    self, predictor: Predictor, video: str | PhraseVideoConfig = "original", history: int = HISTORY
  ):
    """Args:
    predictor: with a tracker that remembers, on one device.
    video: thresholds and rules: "original", "transformers" or your own.
    history: see `InteractiveVideo`.
    """
    predictor.need_tracker()
    super().__init__(predictor.engine, history)
    self.predictor, self.config = predictor, PhraseVideoConfig.named(video)
    self._digests: tuple[tuple[Any, Any], list[str]] | None = None

  @classmethod
  def from_pretrained(
    cls,
    source: str | os.PathLike,
    *,
    tracker: str | os.PathLike | bool,
    video: str | PhraseVideoConfig = "original",
    history: int = HISTORY,
    **options: Any,
  ) -> VideoPredictor:
    """Args:
    source, tracker, options: of `Predictor.from_pretrained`.
    video, history: see the class.
    """
    return cls(Predictor.from_pretrained(source, tracker=tracker, **options), video, history)

  def on_device(self, device: jax.Device) -> VideoPredictor:
    """The same on another device, with a copy of the weights there."""
    engine = self.engine
    copy = Predictor(
      engine.model, engine.variables, self.predictor.processor, fuse=False, devices=[device],
      tracker=(engine.tracker, engine.tracker_variables),
    )  # fmt: skip
    return VideoPredictor(copy, self.config, self.history)

  def fingerprint(self) -> dict[str, Any]:
    """What masks depend on, in plain JSON values: a clip goes on only with what it began with."""
    engine = self.engine
    weights = engine.variables, engine.tracker_variables
    if self._digests is None or any(a is not b for a, b in zip(weights, self._digests[0])):
      self._digests = weights, [digest(jax.device_get(one)) for one in weights]  # seconds, at full size
    return {
      "weights": self._digests[1],
      "profiles": [engine.processor.profile.name, engine.tracker.config.profile.name],
      "video": dataclasses.asdict(self.config),
      "dtype": np.dtype(engine.model.dtype).name,
      "image_size": engine.processor.image_size,
      "platform": engine.devices[0].platform,
    }

  def track(
    self,
    source: Any,
    text: Any = None,
    boxes: Any = None,
    box_labels: Any = None,
    *,
    boxes_frame: int = 0,
    rate: float | None = None,
    latency: int | None = None,
    threshold: float | None = None,
    max_objects: int | None = None,
    batch: int | None = None,
    state: str | os.PathLike | None = None,
  ) -> Tracking:
    """Follows all that matches; iterate over what it returns.

    Args:
      source, rate: a video, see `open_frames`; or `Frames`.
      text: a phrase, or a list of phrases that are followed in one pass.
      boxes, box_labels: examples on frame `boxes_frame`, as of `Predictor`: with a phrase they are read
        beside it there; without, what looks like them on that frame is followed.
      latency: frames that a frame is held back. None: 14, as the hot start needs, so that an object that is
        soon lost is never shown; 0: none, and `FrameResults.removed` names such objects.
      threshold: of detections that begin an object. None: the configuration's.
      max_objects: at a time.
      batch: frames that are encoded together. None: as many as the engine takes, and 1 of a live source. The
        last bits of a mask may depend on it.
      state: a file of `Tracking.save`, of the same source and arguments, to go on from.

    Raises:
      ValueError, OSError, ImportError: of `open_frames`; a bad prompt or option; a state of something else.
    """
    prompts = prompts_of(text, boxes, box_labels)
    phrases = [prompt.phrase for prompt in prompts]
    if twice := [phrase for k, phrase in enumerate(phrases) if phrase in phrases[:k]]:
      raise ArgumentError("text", f" must be different phrases, got {twice[0]!r} twice")
    frames = open_frames(source, rate)
    if boxes is not None:
      _check_frame(frames, boxes_frame)
    given: dict[str, Any] = {}
    if threshold is not None:
      threshold = check_threshold("threshold", threshold)
      given["new_det_thresh"] = threshold
      given["score_threshold_detection"] = min(threshold, self.config.score_threshold_detection)
    if max_objects is not None:
      check_whole("max_objects", max_objects, 1)
      given["max_num_objects"] = max_objects
    most = self.engine.image_buckets[-1]
    if batch is None:
      batch = 1 if frames.live else most
    check_whole("batch", batch, 1, most)
    config = dataclasses.replace(self.config, **given)
    return Tracking(self.engine, config, frames, prompts, boxes_frame, latency, batch, state)


class Tracking:
  """A clip that is being tracked: an iterator of `FrameResults`, in order.

  Between two frames the user may step in: `add` a phrase, `click` on the newest frame, `remove` an object,
  and `save`.

  Attributes:
    frames: the source.
    phrases: what is followed, in order.
    newest: number of the frame that was tracked last, which comes out `latency` frames later; -1 before the
      first.
    can_be_saved: until the source's end was reached.
  """

  def __init__(
    self,
    engine: Engine,
    config: PhraseVideoConfig,
    frames: Frames,
    prompts: Sequence[Prompt],
    boxes_frame: int,
    latency: int | None,
    batch: int,
    state: str | os.PathLike | None,
  ):
    self._engine, self._batch, self._boxes_frame = engine, batch, boxes_frame
    self.frames, self._prompts = frames, list(prompts)
    for prompt in prompts:  # in the frame's size; raises
      engine.box_arrays(prompt, frames.size)
    self._done = self._out = 0  # frames that were tracked, and put out
    count = None if frames.live else frames.count
    self._tracks = PhraseTracks(engine, frames.size, config, frames=count, latency=latency, slots=SLOTS)
    if state is not None:
      self._resume(state)
    self._tracks.shown.update(k for k, prompt in enumerate(self._prompts) if prompt.text is None)
    self._images: dict[int, Frame] = {}
    self._last: tuple[Any, int] | None = None  # features and row of the newest frame
    self._ready: collections.deque[FrameResults] = collections.deque()
    self._ending, self.can_be_saved = False, True
    self._steps = self._run()

  @property
  def phrases(self) -> list[str]:
    return [prompt.phrase for prompt in self._prompts]

  @property
  def newest(self) -> int:
    return self._done - 1

  def __iter__(self) -> Iterator[FrameResults]:
    return self

  def __next__(self) -> FrameResults:
    while not self._ready:
      self._ready.extend(next(self._steps))
    return self._ready.popleft()

  def steps(self) -> Iterator[list[FrameResults]]:
    """After each frame that is tracked, those that may be put out by now, mostly one or none."""
    return self._steps

  def finish(self) -> None:
    """Ends the clip with the newest frame, as if the source had ended there."""
    self._ending = True

  def close(self) -> None:
    """Lets the source go."""
    self._steps.close()
    self.frames.close()

  # ---------------------------------------------------------------- stepping in

  def add(self, text: str) -> None:
    """Follows another phrase, from the next frame on."""
    (prompt,) = prompts_of(text, None, None)
    if prompt.phrase in self.phrases:
      raise ArgumentError("text", f" must be a new phrase, got {text!r}, which is followed already")
    self._prompts.append(prompt)

  def click(
    self,
    points: Any = None,
    point_labels: Any = None,
    box: Any = None,
    object_id: int | None = None,
    label: str | None = None,
  ) -> FrameResults:
    """Corrects an object on the newest frame, or begins one there.

    Args:
      points, point_labels, box: of one object, in pixels, as of `Predictor.predict`.
      object_id: which object; None: a new one.
      label: a phrase that is followed, which the new one belongs to; None: none.

    Returns:
      The newest frame as it is now, and is put out when its turn comes. (With latency=0 that was before.)
    """
    if self._last is None:
      raise ValueError("clicks are about a frame: track one first")
    if label is not None and label not in self.phrases:
      raise ArgumentError("label", f" must be one of {self.phrases}, got {label!r}")
    features, row = self._last
    clicks = clicks_of(self.frames.size, features.mask_side, points, point_labels, box)
    phrase = CLICKED if label is None else self.phrases.index(label)
    return self._results(self._tracks.click(clicks, features, row, object_id, phrase), self._newest)

  def remove(self, object_id: int) -> None:
    """Takes an object out, also of the frames that are still to be put out."""
    self._tracks.remove(object_id)

  # ---------------------------------------------------------------- kept for later

  def save(self, file: BinaryIO | str | os.PathLike) -> None:
    """Writes all that is needed to go on with the frame after the newest one.

    file: a path, or a file that is open for writing.

    Raises:
      ValueError: the source was read to its end.
    """
    if not self.can_be_saved or self._ready:
      raise ValueError("the clip was read to its end: there is nothing left to go on with")
    about = {"done": self._done, "out": self._out, "prompts": [dataclasses.astuple(p) for p in self._prompts]}
    about["boxes_frame"], about["batch"] = self._boxes_frame, self._batch
    np.savez(file, tracking=np.array(json.dumps(about)), **self._tracks.state())

  def _resume(self, path: str | os.PathLike) -> None:
    with saved_by("Tracking.save", path) as state:
      about = json.loads(str(state.pop("tracking")))
    self._done, self._out, self._boxes_frame = about["done"], about["out"], about["boxes_frame"]
    self._batch = about["batch"]
    given = about["prompts"]
    self._prompts = [
      Prompt(t, tuple(map(tuple, boxes)), labels and tuple(labels)) for t, boxes, labels in given
    ]
    self._tracks.load_state(state)

  # ---------------------------------------------------------------- frames

  def _run(self) -> Iterator[list[FrameResults]]:
    error = None
    with contextlib.closing(self._chunks()) as chunks:
      while not self._ending:
        try:
          chunk = next(chunks, None)
        except FrameError as e:  # what came before it is put out first
          error, chunk = e, None
        if chunk is None:
          break
        yield from self._track(chunk)
    self.can_be_saved = False
    if (
      error is None
      and not self._ending
      and self._done <= self._boxes_frame
      and any(p.boxes for p in self._prompts)
    ):
      error = ArgumentError(
        "boxes_frame", f"={self._boxes_frame}: {self.frames.name} has {self._done} frames"
      )
    yield [self._results(objects) for objects in self._tracks.finish()]
    if error is not None:
      raise error

  def _chunks(self) -> Iterator[list[tuple[Frame, np.ndarray]]]:
    """Frames with their pixels, `batch` together, the same ones wherever the clip was resumed."""
    start = self._done - self._done % self._batch
    side = self._engine.processor.image_size

    def pixels(frames: Iterator[Frame]) -> Iterator[tuple[Frame, np.ndarray | None]]:
      with contextlib.closing(frames):
        for frame in frames:
          yield frame, image_ops.resize_image(frame.image, side) if frame.index >= start else None

    reading = pixels(self.frames.read(min(self._out, start)))
    if not self.frames.live:
      reading = ahead(reading, 2 * self._batch)
    chunk: list[tuple[Frame, np.ndarray]] = []
    error = None
    with contextlib.closing(reading):
      try:
        for frame, resized in reading:
          if frame.index >= self._out:
            self._images[frame.index] = frame
          if resized is not None:
            chunk.append((frame, resized))
          if len(chunk) == self._batch:
            yield chunk
            chunk = []
      except FrameError as e:  # what came before it is tracked first
        error = e
    if chunk:
      yield chunk
    if error is not None:
      raise error

  def _track(self, chunk: list[tuple[Frame, np.ndarray]]) -> Iterator[list[FrameResults]]:
    engine = self._engine
    filled = [pixels for _, pixels in chunk] + [chunk[0][1]] * (self._batch - len(chunk))
    vision = engine.encode(filled)
    known, found = None, []
    for row, (frame, _) in enumerate(chunk):
      if frame.index < self._done:  # tracked before this run
        continue
      if known != len(self._prompts):  # of all frames of the chunk that are left
        known, found = len(self._prompts), self._detect(vision, [frame.index for frame, _ in chunk])
      objects = self._tracks.step(frame.index, vision.tracker, row, found)
      self._last, self._newest, self._done = (vision.tracker, row), frame, frame.index + 1
      yield [self._results(one) for one in objects]
      if self._ending:
        return

  def _detect(self, vision: Any, indices: Sequence[int]) -> list[Found]:
    """Starts the detector for every phrase on frames that are encoded."""
    engine, asked, numbers = self._engine, [], []
    for index in indices:
      mine = [
        (k, prompt if index == self._boxes_frame else Prompt(prompt.text))
        for k, prompt in enumerate(self._prompts)
        if prompt.text is not None or index == self._boxes_frame
      ]
      numbers.append([k for k, _ in mine])
      asked.append(engine.asked(None, self.frames.size, [prompt for _, prompt in mine]))
    filler = engine.asked(None, self.frames.size, [])
    asked += [filler] * (self._batch - len(asked))
    engine.phrases.add(engine.variables, self.phrases)
    found = []
    for call in engine.calls(asked):
      phrase = np.full(call.index.shape, -1)
      for row, mine in enumerate(numbers):
        there = call.index[row] >= 0
        phrase[row, there] = np.array(mine, int)[call.index[row, there]]
      found.append(Found(phrase, engine.detect(vision, call)))
    return found

  def _results(self, objects: FrameObjects, frame: Frame | None = None) -> FrameResults:
    """frame: None: the frame is put out now."""
    if frame is None:
      frame, self._out = self._images.pop(objects.frame), objects.frame + 1
    make = functools.partial(frame_results, self._engine.click_masks, objects, self.phrases, self.frames.size)
    return FrameResults(frame.index, frame.time, frame.image, make, objects.removed)


def _check_frame(frames: Frames, index: Any) -> None:
  check_whole("boxes_frame", index)
  # What a file says of itself may be wrong, so that it is counted before it is believed.
  if not frames.live and index >= (frames.count or 0) and index >= frames.measure():
    raise ArgumentError(
      "boxes_frame", f" must be a frame of {frames.name}, which has {frames.count}, got {index}"
    )
