"""evaluate: every phrase asked, the measures of what comes back, the files, and unreadable records."""

import json
import logging

import numpy as np
import pytest

from sam3lt_jax import Predictor
from sam3lt_jax.data.coco import load_coco
from sam3lt_jax.data.records import Prompt, Record
from sam3lt_jax.data.saco import load_saco
from sam3lt_jax.evaluation.run import evaluate, table
from tests import tiny
from tests.data import scenes
from tests.evaluation.fake import FakePredictor

# 3 images x 3 phrases; objects: 2 red and 1 green in a, 1 blue in b: 3 positive pairs, 6 negative ones.
HALF = {"red box": [(0.9, "box", 5, 10, 25, 40)], "blue box": [(0.5, "box", 40, 0, 80, 30)]}
# HALF on every image. Red: right for one of two in a; false on b and c. Blue: right in b, false on a and c.
# Green: missed in a. Pairs with objects: TP 1 + 1, FN 1 (red) + 1 (green), so F1 = 4 / (4 + 2) at every IoU.
# Presence: TP 2, FN 1, FP 4, TN 2: MCC = (2*2 - 4*1) / ... = 0.


@pytest.fixture
def images(tmp_path):
  return scenes.write_images(tmp_path)


@pytest.fixture(params=["coco", "saco"])
def records(request, images):
  if request.param == "coco":
    return load_coco(scenes.coco_dataset(), images)
  return load_saco(scenes.saco_dataset(), images)


def test_perfect(records):
  predictor = FakePredictor()
  report = evaluate(predictor, records, metrics=("cgf1", "ap"))
  for iou_type in ("segm", "bbox"):
    measures = report["cgf1"][iou_type]
    assert (measures["cgF1"], measures["pmF1"], measures["IL_MCC"]) == (100.0, 1.0, 1.0)
    assert (measures["positive_pairs"], measures["negative_pairs"], measures["objects"]) == (3, 6, 4)
    # What is found wrongly has a lower score than anything right.
    assert report["ap"][iou_type]["AP"] == pytest.approx(1.0)
  assert report["images"] == 3 and report["pairs"] == 9 and report["skipped"] == {}
  assert predictor.images == 3 and predictor.asked == [list(p) for p in (
    ("red box", "green disc", "blue box"),
    ("blue box", "red box", "green disc") if report["ap"]["over"] == "categories" else scenes.PHRASES,
    scenes.PHRASES,
  )]  # fmt: skip
  assert set(predictor.thresholds) == {0.01}


def test_half_right_by_hand(records):
  predictor = FakePredictor(HALF)
  measures = evaluate(predictor, records)["cgf1"]["segm"]
  assert measures["pmF1"] == pytest.approx(2 / 3) and measures["IL_MCC"] == 0.0 == measures["cgF1"]
  counts = {key: measures[key] for key in ("IL_TP", "IL_FN", "IL_FP", "IL_TN")}
  assert counts == {"IL_TP": 2, "IL_FN": 1, "IL_FP": 4, "IL_TN": 2}
  assert measures["mean_matched_iou"] == 1.0 and measures["IL_accuracy"] == pytest.approx(4 / 9)
  # A score of exactly 0.5 counts, so the predictor is asked for all above the number before it.
  assert set(predictor.thresholds) == {float(np.nextafter(np.float32(0.5), np.float32(0)))}


def test_ap_over_categories_and_over_pairs(images):
  coco = evaluate(FakePredictor(HALF), load_coco(scenes.coco_dataset(), images), metrics=["ap"])
  # Red: one of two found, of three results with equal scores, the right one first (a comes first): precision
  # 1 up to recall 0.5, which is 51 of the 101 points. Green: 0. Blue: the second of three is right: 1/2.
  assert coco["ap"]["over"] == "categories" and "cgf1" not in coco
  assert coco["ap"]["segm"]["AP50"] == pytest.approx((51 / 101 + 0 + 0.5) / 3)
  saco = evaluate(FakePredictor(HALF), load_saco(scenes.saco_dataset(), images), metrics=["ap"])
  # All as one class, by score: three red (right, wrong, wrong), three blue (wrong, right, wrong); 4 objects.
  # Recall 1/4 at precision 1 (points 0 .. 0.25: 26), 2/4 at precision 2/5 (0.26 .. 0.5: 25).
  assert saco["ap"]["over"] == "pairs"
  assert saco["ap"]["segm"]["AP50"] == pytest.approx((26 + 25 * 2 / 5) / 101)


def test_files_are_written_as_results_come(tmp_path, images):
  records = load_saco(scenes.saco_dataset(), images)
  out = tmp_path / "out"
  seen = []

  def on_image(name):
    lines = (out / "predictions.jsonl").read_text().splitlines()
    seen.append((name, len(lines)))

  report = evaluate(FakePredictor(HALF), records, out=out, on_image=on_image)
  assert seen == [
    ("annotations, image 100 (a.png)", 0),
    ("annotations, image 103 (b.png)", 3),
    ("annotations, image 106 (c.png)", 6),
  ]
  lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
  assert [line["image_id"] for line in lines] == list(range(100, 109))
  first = lines[0]
  assert first["phrase"] == "red box" and first["objects"] == 2 and first["exhaustive"]
  assert first["image"] == str(images / "a.png")
  (result,) = first["predictions"]
  assert result["bbox"] == [5, 10, 20, 30] and result["score"] == pytest.approx(0.9)
  assert result["segmentation"] == scenes.rle_json(scenes.mask_of("box", 5, 10, 25, 40))
  assert (result["image_id"], result["category_id"]) == (100, 1)
  assert json.loads((out / "report.json").read_text()) == report


def test_several_annotators(images):
  """The second one saw only the first red box, and the green disc not at all."""
  data = scenes.saco_dataset()
  data["annotations"] = [a for a in data["annotations"] if a["id"] not in (2, 3)]
  records, other = load_saco(scenes.saco_dataset(), images), load_saco(data, images)
  alone = evaluate(FakePredictor(HALF), records, limit=1)["cgf1"]["segm"]
  assert (alone["pmF1"], alone["IL_TP"], alone["IL_FN"]) == (0.5, 1, 1)  # TP 1, FN 1 + 1
  both = evaluate(FakePredictor(HALF), records, limit=1, annotators=[other])["cgf1"]["segm"]
  assert (both["pmF1"], both["IL_TP"], both["IL_FN"], both["IL_TN"]) == (1.0, 1, 0, 1)


def test_open_pairs_are_left_out_of_cgf1(images):
  data = scenes.saco_dataset()
  data["images"][0]["is_instance_exhaustive"] = 0
  report = evaluate(FakePredictor(), load_saco(data, images), metrics=("cgf1", "ap"))
  assert report["pairs"] == 9 and report["not_exhaustive"] == 1
  assert report["cgf1"]["segm"]["pairs"] == 8 and report["ap"]["segm"]["AP"] == pytest.approx(1.0)
  # Open with the other annotator is open as well.
  other = load_saco(data, images)
  report = evaluate(FakePredictor(), load_saco(scenes.saco_dataset(), images), annotators=[other])
  assert report["not_exhaustive"] == 1


def test_records_that_cannot_be_read(images, caplog):
  (images / "a.png").unlink()
  with caplog.at_level(logging.WARNING):
    report = evaluate(FakePredictor(), load_coco(scenes.coco_dataset(), images), metrics=("cgf1", "ap"))
  assert report["skipped"] == {"image missing": 1} and report["images"] == 2
  assert report["ap"]["segm"]["AP"] == pytest.approx(1.0)  # of the images that were read
  assert "a.png" in caplog.text
  assert "left out: 1 (image missing)" in table(report)
  with pytest.raises(ValueError, match=r"nothing to evaluate in 3 records: .*no such image .*a\.png"):
    evaluate(FakePredictor(), load_coco(scenes.coco_dataset(), images), limit=1)


def test_boxes_without_masks(images):
  data = scenes.coco_dataset()
  for annotation in data["annotations"]:
    del annotation["segmentation"]
  records = load_coco(data, images)
  report = evaluate(FakePredictor(), records, metrics=("cgf1", "ap"), iou_types=["bbox"])
  assert set(report["cgf1"]) == {"bbox"} and report["cgf1"]["bbox"]["cgF1"] == 100.0
  assert report["ap"]["bbox"]["AP"] == pytest.approx(1.0)
  with pytest.raises(ValueError, match=r"a\.png.*'red box' has no mask; .*--iou bbox"):
    evaluate(FakePredictor(), records)


def test_records_of_ones_own_with_a_phrase_twice():
  mask = scenes.mask_of("box", 5, 10, 25, 40)[None]
  picture = scenes.picture(scenes.SCENES["a.png"])
  twice = (Prompt.from_masks("red box", mask, image_id=1), Prompt("red box", [], image_id=2))
  predictor = FakePredictor({"red box": HALF["red box"]})
  record = Record(5, lambda: picture, (60, 80), twice)
  measures = evaluate(predictor, [record], phrases_at_once=1)["cgf1"]["segm"]
  assert predictor.asked == [["red box"]]  # asked once
  assert (measures["IL_TP"], measures["IL_FP"], measures["pmF1"]) == (1, 1, 1.0)


def test_at_most_a_hundred_results_a_pair():
  many = {"red box": [(0.1 + 0.005 * i, "box", 0, 0, 4, 4) for i in range(120)]}
  picture = scenes.picture([])
  record = Record(5, lambda: picture, (60, 80), (Prompt("red box", [[0, 0, 4, 4]]),))
  report = evaluate(FakePredictor(many), [record], metrics=["cgf1", "ap"], iou_types=["bbox"])
  # Of 120 scores up to 0.695 those from 0.5 on: i = 80 .. 119.
  assert report["cgf1"]["bbox"]["predictions"] == 40
  assert report["ap"]["bbox"]["AP"] == pytest.approx(1.0)


def test_the_table(images):
  report = evaluate(FakePredictor(HALF), load_coco(scenes.coco_dataset(), images), metrics=("cgf1", "ap"))
  lines = table(report).splitlines()
  assert lines[0].startswith("3 images, 9 phrases, ")
  assert lines[1].split()[:4] == ["cgF1", "cgF1", "pmF1", "IL_MCC"]
  assert lines[2].split()[:4] == ["segm", "0.00", "66.67", "0.000"] and lines[2].endswith(" 4")
  assert lines[4].split()[:4] == ["COCO", "AP", "AP", "AP50"]
  # (51/101 + 0 + 1/2) / 3 over all sizes; no object is a large one.
  assert lines[5].split()[:4] == ["segm", "33.50", "33.50", "33.50"] and lines[5].endswith(" -")
  assert lines[3].startswith("  bbox ") and lines[6].startswith("  bbox ") and len(lines) == 7
  assert len({len(line) for line in lines[1:4]}) == len({len(line) for line in lines[4:]}) == 1


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"metrics": ["f1"]}, "metrics must be of 'cgf1', 'ap'"),
    ({"metrics": []}, "metrics must be of"),
    ({"iou_types": ["mask"]}, "iou_types must be of"),
    ({"limit": 0}, "limit must be at least 1"),
  ],
)
def test_wrong_arguments(images, options, message):
  with pytest.raises(ValueError, match=message):
    evaluate(FakePredictor(), load_coco(scenes.coco_dataset(), images), **options)


def test_with_a_real_predictor(images):
  """A tiny model with random weights: whatever it finds, the counts are those of the data."""
  loaded = tiny.load(tiny.config(vocab_size=49408))
  with tiny.hurry():
    predictor = Predictor(*loaded)
  records = load_saco(scenes.saco_dataset(), images)
  report = evaluate(predictor, records, metrics=("cgf1", "ap"), limit=1, score_threshold=0.0)
  measures = report["cgf1"]["segm"]
  assert (measures["positive_pairs"], measures["negative_pairs"], measures["objects"]) == (2, 1, 3)
  assert measures["predictions"] == 2 * tiny.QUERIES  # a threshold of 0 keeps every query
  assert 0 <= report["ap"]["segm"]["AP"] <= 1
