"""A job's records: the same masks as post-processing makes, numbers that survive JSON."""

import json
import types

import numpy as np
import pytest

from sam3lt_jax.jobs import results
from sam3lt_jax.processing.prompts import Prompt

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools


def item(coco_id=None):
  return types.SimpleNamespace(id="a/b.jpg", uri="/photos/a/b.jpg", coco_id=coco_id)


def test_an_instance_survives_json():
  mask = np.hypot(*(np.mgrid[:60, :91] - [[[30]], [[50]]])) < 17
  score, box = np.float32(0.1) * np.float32(7.77), np.array([9.1, 12, 91 / 3, 54], np.float32)
  found = results.instance(Prompt("a dog"), 3, score, box, mask)
  record = results.record(item(7), width=91, height=60, results=[found])
  line = json.dumps(record)
  assert "\n" not in line and json.loads(line) == record
  assert {k: record[k] for k in ("id", "uri", "coco_id", "width", "height")} == {
    "id": "a/b.jpg", "uri": "/photos/a/b.jpg", "coco_id": 7, "width": 91, "height": 60,
  }  # fmt: skip
  assert (found["phrase"], found["question"]) == ("a dog", 3)
  back = results.to_results(json.loads(line))
  assert back.scores[0] == score and back.labels == ("a dog",)
  np.testing.assert_array_equal(back.boxes[0], box)
  np.testing.assert_array_equal(back.masks, mask[None])
  assert found["area"] == mask.sum() > 0


def test_boxes_alone_are_called_visual_and_nothing_found_is_a_record_too():
  asked = Prompt(None, ((1, 2, 3, 4),), (1,))
  found = results.instance(asked, 0, 0.5, np.zeros(4, np.float32), np.zeros((9, 9), bool))
  assert found["phrase"] == "visual" and found["area"] == 0
  empty = results.record(item(), width=9, height=9, results=[])
  assert "coco_id" not in empty and empty["results"] == []
  assert len(results.to_results(empty)) == 0 and results.to_results(empty).size == (9, 9)


def test_a_failure_has_no_results():
  record = results.record(item(), error="empty", message="the file has 0 bytes")
  assert record == {
    "id": "a/b.jpg", "uri": "/photos/a/b.jpg", "error": "empty", "message": "the file has 0 bytes",
  }  # fmt: skip
  with pytest.raises(ValueError, match=r"'a/b\.jpg' has no results \(empty: the file has 0 bytes\)"):
    results.to_results(record)


def test_a_record_that_was_edited_is_one_sentence(monkeypatch):
  mask, box = np.eye(9, dtype=bool), np.zeros(4, np.float32)
  found = results.instance(Prompt("a dog"), 0, np.float32(0.5), box, mask)
  record = results.record(item(), width=9, height=9, results=[found, found])
  monkeypatch.setattr("sam3lt_jax.processing.results.PACKED_ABOVE", 2 * 81 - 1)
  held = results.to_results(record)  # of a huge image a bit a pixel, as the predictor's
  assert "masks" not in held.__dict__ and np.array_equal(held.masks, [mask] * 2)
  rle = found["segmentation"]
  for change in (
    {"height": None}, {"width": 8}, {"results": [1]}, {"results": [{}]}, {"results": [found | {"box": [1]}]},
    {"results": [found | {"segmentation": rle | {"counts": "~"}}]}, {"results": [found | {"score": "x"}]},
    {"results": [found | {"segmentation": rle | {"size": [8, 9]}}]}, {"results": None},
  ):  # fmt: skip
    with pytest.raises(ValueError, match=r"record: that of image 'a/b\.jpg' is not as it was written"):
      results.to_results(record | change)
