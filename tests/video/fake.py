"""A predictor that finds coloured squares by their colour, for tests of what stands around one.

Like the real one it puts frames out late, and what it finds depends on all frames before: each mask lacks a
pixel that moves on with a hidden state.
"""

from __future__ import annotations

import time

import numpy as np

from sam3lt_jax.processing.masks import mask_box
from sam3lt_jax.processing.results import Results
from sam3lt_jax.video.frames import FrameError, open_frames
from sam3lt_jax.video.results import FrameResults

PHRASES = ["red square", "blue square"]


class Tracking:
  def __init__(self, frames, text, state, delay, pause):
    self._frames, self._text, self._delay, self._pause = frames, list(text), delay, pause
    self._done, self._hidden, self._out = 0, 7, 0
    self.can_be_saved, self._end = True, False
    if state is not None:
      self._done, self._out, self._hidden = np.load(state).tolist()

  def save(self, file):
    np.save(file, np.array([self._done, self._out, self._hidden]))

  def steps(self):
    # Frames that wait to be put out are found again, from a hidden state that is known for each.
    waiting = []
    try:
      for frame in self._frames.read(self._out):
        if frame.index >= self._done:
          self._done, self._hidden = frame.index + 1, self._hidden * 31 % 1009
          time.sleep(self._pause)
        waiting.append(frame)
        ready = len(waiting) > self._delay and frame.index + 1 >= self._done
        self._out += ready
        yield [self._found(waiting.pop(0))] if ready else []
        if self._end:
          break
    except FrameError as e:
      error = e
    else:
      error = None
    self.can_be_saved = False
    yield [self._found(frame) for frame in waiting]
    if error is not None:
      raise error

  def __iter__(self):
    for found in self.steps():
      yield from found

  def _found(self, frame):
    red, green, blue = np.moveaxis(frame.image.astype(int), -1, 0)
    masks = np.stack([(red > green + 90) & (red > blue + 90), (blue > red + 90) & (blue > green + 60)])
    hidden = 7 * pow(31, frame.index + 1, 1009) % 1009
    masks[:, hidden % 12 + 10 if hidden % 2 else 28 + hidden % 12] = False
    kept = [i for i, phrase in enumerate(PHRASES) if phrase in self._text and masks[i].any()]
    boxes = np.array([mask_box(masks[i]) for i in kept], np.float32).reshape(-1, 4)
    scores, labels = np.full(len(kept), 0.7 + hidden / 5000, np.float32), tuple(PHRASES[i] for i in kept)
    results = Results(boxes, scores, masks[kept], labels, masks.shape[1:], ids=np.array(kept, np.int64))
    return FrameResults(frame.index, frame.time, frame.image, lambda: results)

  def finish(self):
    self._end = True

  def close(self):
    pass


class Predictor:
  def __init__(self, delay=3, pause=0.0):
    self._delay, self._pause = delay, pause

  def fingerprint(self):
    return {"delay": self._delay}

  def track(self, source, text, state=None, rate=None):
    return Tracking(open_frames(source, rate), text, state, self._delay, self._pause)
