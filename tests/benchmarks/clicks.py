"""The tracker on an encoded image: one click, 64 objects, a grid of 1024 points; beside transformers'."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tests.benchmarks.timing import Row, measure
from tests.benchmarks.workload import SEED, Workload

GRID = 32  # points a side, and so 1024 in all
BATCH = 64  # of them at once, on the reference's side; ours as the engine chooses


def clicks(workload: Workload, sides: Sequence[Any], dtype: str, repeats: int) -> Iterator[Row]:
  """Both start from the same map of the trunk, of random numbers; masks stay at the model's size."""
  ours, reference = sides[0], sides[1]
  with tempfile.TemporaryDirectory() as folder:
    theirs = _reference(ours.model.config, reference, f"{folder}/tracker")
    engine, vision = _ours(ours, f"{folder}/tracker", theirs.trunk, dtype)
  points = {n: np.random.default_rng(SEED).uniform(size=(n, 1, 2)).astype(np.float32) for n in (1, 64)}
  line = (np.arange(GRID) + 0.5) / GRID
  points[GRID**2] = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 1, 2).astype(np.float32)
  for count, what in (
    (1, "a click"),
    (64, "64 objects, a click each"),
    (GRID**2, "1024 points, for everything"),
  ):
    calls = {
      (ours.whose, "jit"): lambda xy=points[count]: _answers(engine, vision, xy),
      (reference.whose, reference.how): lambda xy=points[count]: theirs(xy),
    }
    yield measure("clicks", what, dtype, calls, repeats)


def _answers(engine: Any, vision: Any, xy: np.ndarray) -> list[np.ndarray]:
  """IoUs on the host, which is when the masks are there."""
  from sam3lt_jax.features import Clicks

  asked = Clicks(xy, np.ones(xy.shape[:2], np.int32), np.ones(xy.shape[:2], bool))
  return [np.asarray(found.ious) for _, found in engine.click(vision, asked)]


def _ours(ours: Any, folder: str, trunk: np.ndarray, dtype: str) -> tuple[Any, Any]:
  import jax

  from sam3lt_jax import VisionFeatures, tracker_from_pretrained
  from sam3lt_jax.engine import Engine

  tracker, variables = tracker_from_pretrained(
    folder, profile="transformers", dtype=dtype, param_dtype=dtype, progress=False
  )
  engine = Engine(ours.model, ours.variables, ours.predictor.processor, tracker=(tracker, variables))
  apply = jax.jit(lambda v, x: tracker.apply(v, x, method="get_image_features"))
  features = apply(variables, trunk.astype(ours.model.dtype))
  return engine, VisionFeatures(features.image, None, (), tracker=features)


class _reference:
  """transformers' tracker of `folder`, which it is written to; called with points from 0 to 1, [P, 1, 2]."""

  def __init__(self, config: Any, reference: Any, folder: str):
    from tests.parity import full_size_clicks

    v = config.vision
    grid = v.image_size // v.patch_size
    self.trunk = np.random.default_rng(SEED).normal(size=(1, grid, grid, v.hidden_size)).astype(np.float32)
    self._side, self._reference = v.image_size, reference
    self._model = full_size_clicks.build(v, folder).to(reference._device, reference._dtype)
    with reference._torch.inference_mode():
      maps = self._model.vision_encoder.neck(reference.pixels(self.trunk))[0]
      decoder = self._model.mask_decoder
      self._maps = [decoder.conv_s0(maps[0]), decoder.conv_s1(maps[1]), maps[2]]

  def __call__(self, xy: np.ndarray) -> None:
    for start in range(0, len(xy), BATCH):
      points = self._reference._tensor(xy[None, start : start + BATCH] * np.float32(self._side))
      with self._reference._torch.inference_mode():
        out = self._model(image_embeddings=list(self._maps), input_points=points)
      self._reference._done(out).iou_scores.float().cpu().numpy()
