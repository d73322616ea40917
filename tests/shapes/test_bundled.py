"""The bundled model: it loads from the package, answers about scenes nobody trained on, and stays small."""

import pathlib

import numpy as np
import pytest

from examples.shapes import evaluation, models
from sam3lt_jax import Predictor
from sam3lt_jax.checkpoints import from_pretrained, sources

# Floors under what the 500 held-out scenes gave when it was made (docs/shapes/README.md has the figures).
FLOORS = {
  "cgF1": 68.5,
  "f1": 0.93,
  "mask_iou": 0.855,
  "presence_accuracy": 0.97,
  "box_f1": 0.875,
  "negative_box_f1": 0.91,
  "negative_box_removed": 0.91,
  "boxed_removed": 0.98,
}


@pytest.fixture(scope="module")
def loaded():
  return from_pretrained("shapes", progress=False)


@pytest.mark.full  # a minute; the test of the predictor below asks about one scene
def test_all_held_out_scenes(loaded):
  scenes = list(evaluation.held_out_scenes(evaluation.HELD_OUT_SCENES))
  found = evaluation.evaluate(*loaded, models.tokenizer("transformers"), scenes)
  short = {k: found[k] for k, floor in FLOORS.items() if found[k] < floor}
  assert not short


def test_size():
  folder = pathlib.Path(sources.bundled("shapes"))
  assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 10e6


def test_predictor(loaded):
  scene = next(s for s in evaluation.held_out_scenes() if len(s.objects) > 3)
  results = Predictor.from_pretrained("shapes")(scene.image, text="shape")
  assert len(results) and results.masks.shape[1:] == scene.image.shape[:2] and np.all(results.scores > 0.5)
  for thing in scene.objects:
    assert (
      max((m & thing.mask).sum() / (m | thing.mask).sum() for m in results.masks) > FLOORS["mask_iou"] - 0.2
    )
