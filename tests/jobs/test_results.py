"""A job's records: the same masks as post-processing makes, numbers that survive JSON."""

import json
import types

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3lt_jax.jobs import results
from sam3lt_jax.jobs.reading import Failure
from sam3lt_jax.processing import postprocess

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools

ORDERS = ("upsample_then_sigmoid", "sigmoid_then_upsample")


def item(coco_id=None):
  return types.SimpleNamespace(id="a/b.jpg", uri="/photos/a/b.jpg", coco_id=coco_id)


def logits(kind, h=24, w=24):
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:h, :w]
  if kind == "noise":
    return rng.normal(0, 3, (h, w)).astype(np.float32)
  if kind == "none":
    return np.full((h, w), -5, np.float32)
  if kind == "all":
    return np.full((h, w), 5, np.float32)
  if kind == "corner":
    return (4 - np.hypot(y - h, x)).astype(np.float32)
  if kind == "cell":
    values = np.full((h, w), -1, np.float32)
    values[7, 11] = 1
    return values
  return (5 - np.hypot(y - 9, x - 14) + rng.normal(0, 0.5, (h, w))).astype(np.float32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["disc", "corner", "noise", "none", "all", "cell"])
@pytest.mark.parametrize("size", [(60, 91), (24, 24), (5, 300), (3, 2), (1, 1)])
def test_masks_are_those_of_post_processing(order, kind, size):
  values = logits(kind)
  for threshold in (0.5, 0.3, 0.0, 1.0):
    wanted = postprocess.binary_masks(values[None], size, threshold, order)[0]
    found = coco_mask.decode(results.mask_rle(values, size, threshold, order)).astype(bool)
    np.testing.assert_array_equal(found, wanted)


def test_an_instance_survives_json():
  question = types.SimpleNamespace(text="a dog", boxes=(), labels=())
  values = logits("disc")
  score, box = np.float32(0.1) * np.float32(7.77), np.array([0.1, 0.2, 1 / 3, 0.9], np.float32)
  found = results.instance(question, 3, score, box, values, (60, 91), 0.5, ORDERS[0])
  record = results.image_record(item(7), (60, 91), [found])
  line = results.to_line(record)
  assert "\n" not in line and json.loads(line) == record
  assert {k: record[k] for k in ("id", "uri", "coco_id", "width", "height")} == {
    "id": "a/b.jpg", "uri": "/photos/a/b.jpg", "coco_id": 7, "width": 91, "height": 60,
  }  # fmt: skip
  assert (found["phrase"], found["question"]) == ("a dog", 3)
  back = results.to_results(json.loads(line))
  assert back.scores[0] == score and back.labels == ("a dog",)
  np.testing.assert_array_equal(back.boxes[0], postprocess.scale_boxes(box[None], (60, 91))[0])
  wanted = postprocess.binary_masks(values[None], (60, 91), 0.5, ORDERS[0])
  np.testing.assert_array_equal(back.masks, wanted)
  assert found["area"] == wanted.sum() > 0


def test_boxes_alone_are_called_visual_and_nothing_found_is_a_record_too():
  question = types.SimpleNamespace(text=None, boxes=((1, 2, 3, 4),), labels=(1,))
  found = results.instance(question, 0, 0.5, np.zeros(4, np.float32), logits("none"), (9, 9), 0.5, ORDERS[0])
  assert found["phrase"] == "visual" and found["area"] == 0
  empty = results.image_record(item(), (9, 9), [])
  assert "coco_id" not in empty and empty["results"] == []
  assert len(results.to_results(empty)) == 0 and results.to_results(empty).size == (9, 9)


def test_a_failure_has_no_results():
  record = results.failure_record(item(), Failure("empty", "the file has 0 bytes"))
  assert record == {
    "id": "a/b.jpg", "uri": "/photos/a/b.jpg", "error": "empty", "message": "the file has 0 bytes",
  }  # fmt: skip
  with pytest.raises(ValueError, match=r"'a/b\.jpg' has no results \(empty: the file has 0 bytes\)"):
    results.to_results(record)


def test_a_score_that_is_no_number_is_refused():
  with pytest.raises(ValueError, match="JSON"):
    results.to_line({"score": float("nan")})
