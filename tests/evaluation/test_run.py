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
  for annotation, nothing in zip(data["annotations"], ([], None, [[]], [[], []]), strict=True):
    annotation["segmentation"] = nothing
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


def test_ap_looks_at_a_hundred_results_and_cgf1_at_all(tmp_path):
  many = {"red box": [(0.51 + 0.003 * i, "box", 0, 0, 4, 4) for i in range(120)]}
  many["red box"] += [(0.1 + 0.01 * i, "box", 0, 0, 4, 4) for i in range(30)]
  picture = scenes.picture([])
  record = Record(5, lambda: picture, (60, 80), (Prompt("red box", [[0, 0, 4, 4]]),))
  measures = {}
  for metrics in (["cgf1"], ["cgf1", "ap"], ["ap"]):
    report = evaluate(FakePredictor(many), [record], metrics=metrics, iou_types=["bbox"], out=tmp_path)
    measures[tuple(metrics)] = report.get("cgf1"), report.get("ap")
    (line,) = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert len(json.loads(line)["predictions"]) == (100 if metrics == ["ap"] else 120)
  (alone, _), (both, ap), (_, ap_alone) = measures.values()
  assert alone == both and both["bbox"]["predictions"] == 120
  assert ap == ap_alone and ap["bbox"]["AP"] == pytest.approx(1.0)


def test_a_crowd_of_objects_counts_alike_with_and_without_ap():
  """120 objects, all found: cgF1 is 100, whatever else is measured."""
  boxes = [(x, y, x + 4, y + 3) for x in range(0, 80, 8) for y in range(0, 60, 5)]
  many = {"red box": [(0.9, "box", *box) for box in boxes]}
  picture = scenes.picture([])
  prompts = (Prompt("red box", boxes), Prompt("disc", []))
  record = Record(5, lambda: picture, (60, 80), prompts)
  for metrics in (["cgf1"], ["cgf1", "ap"]):
    report = evaluate(FakePredictor(many), [record], metrics=metrics, iou_types=["bbox"])
    assert report["cgf1"]["bbox"]["cgF1"] == pytest.approx(100.0)


def test_lvis(tmp_path, images):
  records = load_coco(scenes.lvis_dataset(), images)
  # Everything everywhere: red is wrong in b, which lists it as absent, and not looked at in c.
  answers = {"box": [(0.9, "box", 5, 10, 25, 40), (0.8, "box", 50, 30, 70, 50)],
             "green disc": [(0.9, "disc", 30, 5, 50, 25), (0.95, "box", 0, 0, 9, 9)],
             "blue box": [(0.9, "box", 40, 0, 80, 30)]}  # fmt: skip
  report = evaluate(FakePredictor(answers), records, metrics=("cgf1", "ap"))
  assert report["ap"]["over"] == "lvis" and report["pairs"] == 4 and report["not_exhaustive"] == 1
  values = report["ap"]["segm"]
  # Red: right, wrong (b, the same score), right, wrong: precision 1 to recall 1/2, 2/3 to 1.
  assert values["AP_rare"] == pytest.approx((51 + 50 * 2 / 3) / 101)
  assert [values["AP_common"], values["AP_frequent"]] == pytest.approx([1.0, 1.0])
  assert report["cgf1"]["segm"]["pmF1"] == pytest.approx(1.0) and report["cgf1"]["segm"]["IL_FP"] == 1
  text = table(report)
  assert "LVIS AP" in text and "AP_freq" in text and "COCO AP" not in text


def test_one_phrase_of_two_categories_answers_both(images):
  data = scenes.coco_dataset()
  data["categories"][0]["name"], data["categories"][1]["name"] = "box_(red)", "box_(green)"
  answers = {"box": [(0.9, *shape[1:]) for shape in scenes.SCENES["a.png"]], "blue box": []}
  report = evaluate(FakePredictor(answers), load_coco(data, images), metrics=["ap"], limit=1)
  # Red: two of three right, in this order; green: the last of three; blue: no object in the first image.
  assert report["ap"]["segm"]["AP50"] == pytest.approx((1.0 + 1 / 3) / 2)


def test_objects_without_a_mask_among_others(images):
  data = scenes.coco_dataset()
  data["annotations"][0]["segmentation"] = [[]]
  records = load_coco(data, images)
  report = evaluate(FakePredictor(), records, metrics=("cgf1", "ap"))
  assert report["without_mask"] == 1
  assert (report["cgf1"]["segm"]["pairs"], report["cgf1"]["bbox"]["pairs"]) == (8, 9)
  assert [report["ap"][t]["AP"] for t in ("segm", "bbox")] == pytest.approx([1.0, 1.0])
  assert "not in segm: 1 phrases" in table(report)
  part = [records[0]]
  with pytest.raises(ValueError, match="'red box' has no mask; evaluate boxes alone"):
    evaluate(FakePredictor(), [Record(1, part[0].image, part[0].size, part[0].prompts[:1])])


def test_what_the_annotations_are_read_without_is_reported(images):
  data = scenes.coco_dataset()
  data["annotations"][0]["segmentation"] = [[90, 1, 95, 1, 95, 9]]
  report = evaluate(FakePredictor(), load_coco(data, images), metrics=("cgf1", "ap"))
  assert report["left_out"] == {"a mask without a pixel": 1} and report["not_exhaustive"] == 1
  assert report["ap"]["segm"]["AP"] == pytest.approx(1.0)
  assert table(report).endswith("annotations: 1 x a mask without a pixel")


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
