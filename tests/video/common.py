"""An engine whose images were encoded by the authors' code: frame t of a clip is an image of the value t."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax import parallel
from sam3lt_jax.engine import Engine
from sam3lt_jax.programs import Program
from sam3lt_jax.tracker import Sam3Tracker
from tests.parity import tracker as reference
from tests.tiny import hurry


class StubEngine:
  """What `video` asks of an `Engine`, with features from anywhere instead of a trunk's."""

  programs = Engine.programs
  waited_s = Engine.waited_s

  def __init__(self, tracker: Sam3Tracker, variables: Any, image_size: int, encode: Callable):
    self.tracker, self.tracker_variables, self.encode_frames = tracker, variables, encode
    self.mesh = parallel.make_mesh(devices=jax.devices()[:1])
    self.processor = types.SimpleNamespace(image_size=image_size)
    self.model = types.SimpleNamespace(dtype=jnp.float32)
    self._programs: list[Program] = []

  def program(self, *args: Any, **kwargs: Any) -> Program:
    with hurry():
      return Engine.program(self, *args, **kwargs)


@functools.cache
def recorded(frames: tuple[int, ...]) -> Any:
  return reference.features(list(frames))


@functools.cache
def engine(**profile: Any) -> StubEngine:
  """One for each profile, so that its programs are compiled once for all tests."""
  tracker, variables = reference.load()
  changed = dataclasses.replace(tracker.config.profile, **profile)
  tracker = Sam3Tracker(tracker.config.replace(profile=changed))
  encode = lambda pixels: recorded(tuple(int(x[0, 0, 0]) for x in pixels))  # noqa: E731
  return StubEngine(tracker, variables, reference.sizes()["image_size"], encode)


def clip(frame_index: Any = range(24)) -> list[np.ndarray]:
  """Frames as large as the authors' clips were."""
  c = reference.sizes()
  return [np.full((c["video_height"], c["video_width"], 3), t, np.uint8) for t in frame_index]
