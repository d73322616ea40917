"""`sam3lt everything`: what it writes, and mistakes in one line."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lt_jax import Predictor, cli
from tests.checkpoints.common import bundled_detector
from tests.test_clicks import HEIGHT, WIDTH, photo, predictor

__all__ = ["predictor"]  # a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """With a photo."""
  folder = tmp_path_factory.mktemp("everything")
  Image.fromarray(photo(HEIGHT, WIDTH)).save(folder / "photo.png")
  return folder


@pytest.fixture
def loaded(predictor, monkeypatch):
  """What was asked of `Predictor.from_pretrained`, in place of which stands one that is compiled."""
  asked = {}

  def from_pretrained(source, **options):
    asked.update(options, source=source)
    return predictor

  monkeypatch.setattr(Predictor, "from_pretrained", from_pretrained)
  return asked


def test_a_photo(folder, loaded, capsys):
  out = folder / "out"
  code = cli.main([
    "everything", str(folder / "photo.png"), "--model", "anything", "--tracker", "same",
    "--points-per-side", "3", "--pred-iou-thresh", "0", "--stability-score-thresh", "0", "--out", str(out),
    "--box-nms-thresh", "1",
  ])  # fmt: skip
  assert (loaded["source"], loaded["tracker"]) == ("anything", True)
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
    ("holds no tracker", ["photo.png", "--model", "detector", "--tracker", "same"]),
    (
      "--pred-iou-thresh: must be a number within",
      ["photo.png", "--tracker", "same", "--pred-iou-thresh", "2"],
    ),
  ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, message, arguments):
  monkeypatch.chdir(folder)
  if "detector" in arguments:
    bundled_detector(folder / "detector")
  assert cli.main(["everything", *arguments]) == 2
  error = capsys.readouterr().err.removeprefix("sam3lt: running on CPU, float32, attention in blocks\n")
  assert message in error and len(error.strip().splitlines()) == 1


def test_one_bad_photo_is_named_and_the_rest_is_done(folder, loaded, monkeypatch, capsys):
  monkeypatch.chdir(folder)
  (folder / "bad.png").write_bytes(b"no image")
  code = cli.main([
    "everything", "bad.png", "photo.png", "--model", "model", "--tracker", "same", "--points-per-side", "1",
    "--pred-iou-thresh", "0", "--stability-score-thresh", "0",
  ])  # fmt: skip
  told = capsys.readouterr()
  assert code == 2 and "bad.png" in told.err and "1 of 2 photos failed" in told.err
  assert "photo.png" in told.out


def test_photos_of_one_name_are_written_apart(folder, loaded, tmp_path, capsys):
  paths = [str(tmp_path / name / "photo.png") for name in ("a", "b")]
  for path in paths:
    os.mkdir(os.path.dirname(path))
    shutil.copy(folder / "photo.png", path)
  options = ("--tracker", "same", "--points-per-side", "1", "--out", str(tmp_path / "out"))
  assert cli.main(["everything", *paths, *options]) == 0, capsys.readouterr().err
  for name, path in zip(("photo", "photo_2"), paths, strict=True):
    data = json.loads((tmp_path / "out" / f"{name}_everything.json").read_text())
    assert data["images"][0]["file_name"] == path


# ---------------------------------------------------------------- sam3lt segment with clicks


def segment(folder, *arguments):
  return cli.main([
    "segment", str(folder / "photo.png"), "--model", "anything", "--tracker", "a/tracker",
    "--out", str(folder / "clicked"), "--json", *arguments,
  ])  # fmt: skip


def test_segment_what_is_pointed_at(folder, predictor, loaded, capsys):
  code = segment(
    folder, "--point", "30,20", "--point", "70,45:0", "--outline", "10,10,40,40", "--object", "50,30"
  )
  told = capsys.readouterr()
  assert code == 0, told.err
  data = json.loads(told.out)
  assert [c["name"] for c in data["categories"]] == ["object 1", "object 2", "object 3"]
  assert data["info"]["objects"] == [
    {"points": [[30, 20], [70, 45]], "point_labels": [1, 0], "box": None},
    {"points": None, "point_labels": None, "box": [10, 10, 40, 40]},
    {"points": [[50, 30]], "point_labels": [1], "box": None},
  ]
  assert [a["category_id"] for a in data["annotations"]] == [1, 2, 3]
  assert loaded["tracker"] == "a/tracker"
  found = predictor.set_image(folder / "photo.png").predict(points=[[30, 20], [70, 45]], point_labels=[1, 0])
  np.testing.assert_array_equal(coco_mask.decode(data["annotations"][0]["segmentation"]), found.masks[0])


@pytest.mark.parametrize(
  ("message", "arguments"),
  [
    ("all that match: one kind a call", ["--point", "1,1", "--box", "1,1,5,5"]),
    ("--point: must be x,y in pixels, then :0 or :1 or nothing, got '1,2:7'", ["--point", "1,2:7"]),
    ("points must lie in the image of 90x60 pixels, got [95.0, 1.0]", ["--point", "95,1"]),
    ("nothing to look for: give a phrase or --box, or --point at one thing", []),
  ],
)
def test_segment_mistakes_are_one_line(folder, loaded, capsys, message, arguments):
  assert segment(folder, *arguments) == 2
  error = capsys.readouterr().err.removeprefix("sam3lt: running on CPU, float32, attention in blocks\n")
  assert message in error and len(error.strip().splitlines()) == 1


def test_segment_needs_a_tracker_for_points(folder, capsys):
  assert cli.main(["segment", str(folder / "photo.png"), "--model", "shapes", "--point", "1,1"]) == 2
  assert "--point, --object and --outline need --tracker" in capsys.readouterr().err
