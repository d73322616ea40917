"""`sam3lt everything`: what it writes, and mistakes in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lt_jax import cli, save_pretrained
from tests import tiny
from tests.parity import tracker as reference
from tests.test_clicks import HEIGHT, WIDTH, photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A model with a tracker, and a photo."""
  folder = tmp_path_factory.mktemp("everything")
  model, variables = tiny.load(tiny.config(vocab_size=49408))
  save_pretrained(folder / "model", model, variables, tracker=reference.load())
  Image.fromarray(photo(HEIGHT, WIDTH)).save(folder / "photo.png")
  return folder


def test_a_photo(folder, capsys):
  out = folder / "out"
  with tiny.hurry():
    code = cli.main([
      "everything", str(folder / "photo.png"), "--model", str(folder / "model"), "--tracker", "same",
      "--points-per-side", "3", "--pred-iou-thresh", "0", "--stability-score-thresh", "0", "--out", str(out),
      "--box-nms-thresh", "1",
    ])  # fmt: skip
  told = capsys.readouterr()
  assert code == 0, told.err
  data = json.loads((out / "photo_everything.json").read_text())
  assert f"{WIDTH}x{HEIGHT}" in told.out and f"{len(data['annotations'])} found" in told.out
  assert len(data["annotations"]) == 27  # nothing is left out
  scores = [a["score"] for a in data["annotations"]]
  assert scores == sorted(scores, reverse=True)
  for annotation in data["annotations"]:
    mask = coco_mask.decode(annotation["segmentation"])
    assert mask.shape == (HEIGHT, WIDTH) and int(mask.sum()) == annotation["area"]
  drawn = np.asarray(Image.open(out / "photo_everything.jpg"))
  assert drawn.shape[0] * WIDTH == drawn.shape[1] * HEIGHT  # small photos are drawn larger


@pytest.mark.parametrize(
  ("message", "arguments"),
  [
    ("no such photo: nowhere.jpg", ["nowhere.jpg", "--tracker", "same"]),
    ("--tracker", ["photo.png"]),
    ("holds no tracker", ["photo.png", "--model", "shapes", "--tracker", "same"]),
    (
      "--pred-iou-thresh: must be a number within",
      ["photo.png", "--tracker", "same", "--pred-iou-thresh", "2"],
    ),
  ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, message, arguments):
  monkeypatch.chdir(folder)
  assert cli.main(["everything", *arguments]) == 2
  error = capsys.readouterr().err
  assert message in error and len(error.strip().splitlines()) == 1


def test_one_bad_photo_is_named_and_the_rest_is_done(folder, monkeypatch, capsys):
  monkeypatch.chdir(folder)
  (folder / "bad.png").write_bytes(b"no image")
  with tiny.hurry():
    code = cli.main([
      "everything", "bad.png", "photo.png", "--model", "model", "--tracker", "same", "--points-per-side", "1",
      "--pred-iou-thresh", "0", "--stability-score-thresh", "0",
    ])  # fmt: skip
  told = capsys.readouterr()
  assert code == 2 and "bad.png" in told.err and "1 of 2 photos failed" in told.err
  assert "photo.png" in told.out
