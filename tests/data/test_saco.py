"""SA-Co files to records: pairs of one image together, negatives, boxes in either unit, open pairs."""

import json

import numpy as np
import pytest

from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.data.coco import CocoRecords
from sam3lt_jax.data.load import load_records
from sam3lt_jax.data.records import RecordError
from sam3lt_jax.data.saco import SaCoRecords, load_saco
from tests.data import scenes


@pytest.fixture
def images(tmp_path):
  return scenes.write_images(tmp_path)


def test_pairs_of_one_file_are_one_record(tmp_path, images):
  records = load_saco(scenes.write_json(tmp_path, scenes.saco_dataset()), images)
  assert len(records) == 3 and records.pairs == 9
  first, second, third = records
  assert [r.id for r in records] == [100, 103, 106]
  assert [p.phrase for p in first.prompts] == list(scenes.PHRASES)
  assert [p.image_id for p in second.prompts] == [103, 104, 105]
  assert [len(p.boxes) for p in first.prompts] == [2, 1, 0]
  assert [len(p.boxes) for p in third.prompts] == [0, 0, 0]
  np.testing.assert_array_equal(first.prompts[0].boxes, [[5, 10, 25, 40], [50, 30, 70, 50]])
  np.testing.assert_array_equal(
    rle_ops.decode(first.prompts[1].masks[0]), scenes.mask_of("disc", 30, 5, 50, 25)
  )
  assert all(p.exhaustive and p.all_of_kind for r in records for p in r.prompts)
  assert first.load_image().shape == (60, 80, 3)


def test_pairs_apart_in_the_file_come_together(images):
  data = scenes.saco_dataset()
  data["images"] = data["images"][::-1]
  records = load_saco(data, images)
  assert [r.id for r in records] == [108, 105, 102]  # the first one of each file, in file order
  assert [p.image_id for p in records[0].prompts] == [108, 107, 106]


@pytest.mark.parametrize("unit", ["sides", "pixels"])
def test_boxes_without_masks_in_either_unit(images, unit):
  data = scenes.saco_dataset()
  for annotation in data["annotations"]:
    del annotation["segmentation"]
    if unit == "pixels":
      annotation["bbox"] = (np.array(annotation["bbox"]) * [80, 60, 80, 60]).tolist()
  boxes = load_saco(data, images)[0].prompts[0].boxes
  np.testing.assert_allclose(boxes, [[5, 10, 25, 40], [50, 30, 70, 50]], atol=1e-4)


def test_open_pairs(images):
  data = scenes.saco_dataset()
  data["images"][0]["is_instance_exhaustive"] = 0
  data["annotations"][2]["iscrowd"] = 1
  red, green, blue = load_saco(data, images)[0].prompts
  assert (red.exhaustive, len(red.boxes)) == (False, 2)
  assert (green.exhaustive, len(green.boxes)) == (False, 0)
  assert blue.exhaustive


def test_either_format_is_recognised(tmp_path, images):
  saco = scenes.write_json(tmp_path, scenes.saco_dataset(), "saco.json")
  coco = scenes.write_json(tmp_path, scenes.coco_dataset(), "coco.json")
  assert isinstance(load_records(saco, images), SaCoRecords)
  records = load_records(coco, images, negatives=False)
  assert isinstance(records, CocoRecords) and not records.negatives
  with pytest.raises(ValueError, match=r"saco\.json is an SA-Co file"):
    load_records(saco, images, phrases={"a": "b"})


@pytest.mark.parametrize(
  ("entry", "fields", "message"),
  [
    (1, {"text_input": ""}, "image 101 has no text_input, got ''"),
    (1, {"text_input": 3}, "image 101 has no text_input, got 3"),
    (2, {"width": 81}, "image 102 says a.png is 81x60 pixels, an entry before it says 80x60"),
    (2, {"height": None}, "image 102 has no height and width"),
  ],
)
def test_wrong_files_are_named(tmp_path, images, entry, fields, message):
  data = scenes.saco_dataset()
  data["images"][entry] |= fields
  path = scenes.write_json(tmp_path, data)
  with pytest.raises(ValueError, match=message) as caught:
    load_saco(path, images)
  assert str(path) in str(caught.value)


def test_damaged_masks_name_the_pair(tmp_path, images):
  data = scenes.saco_dataset()
  data["annotations"][2]["segmentation"]["counts"] = "0"
  path = scenes.write_json(tmp_path, data)
  with pytest.raises(RecordError, match=r"image 101 \(a\.png\), annotation 3: the RLE's runs add up to 0"):
    load_saco(path, images)[0]


def test_numbers_of_other_exporters(tmp_path, images):
  data = scenes.saco_dataset()
  for entry in (*data["images"], *data["annotations"]):
    entry.update({key: f"{v}.0" for key, v in entry.items() if isinstance(v, int)})
  for annotation in data["annotations"]:
    annotation["bbox"] = [str(v * 60) for v in annotation["bbox"]]  # no longer in units of the sides
  data["images"][1]["is_instance_exhaustive"] = "0"
  path = tmp_path / "text.json"
  path.write_text(json.dumps(data), encoding="utf-8-sig")
  records, expected = load_records(path, images), load_saco(scenes.saco_dataset(), images)
  for one, other in zip(records, expected, strict=True):
    assert (one.id, one.size) == (other.id, other.size)
    assert [(p.phrase, p.image_id, p.masks) for p in one.prompts] == [
      (p.phrase, p.image_id, p.masks) for p in other.prompts
    ]
  assert [p.exhaustive for p in records[0].prompts] == [True, False, True]
  assert not records._normalised and expected._normalised


def test_an_object_without_a_pixel_goes_and_its_pair_is_open(images):
  data = scenes.saco_dataset()
  data["annotations"][0]["segmentation"] = {"size": [60, 80], "counts": [4800]}
  data["annotations"][2]["segmentation"] = [[]]
  records = load_saco(data, images)
  red, green, blue = records[0].prompts
  assert [(len(p.boxes), p.exhaustive) for p in (red, green, blue)] == [(1, False), (1, True), (0, True)]
  assert green.masks == (None,) and records.left_out == {"a mask without a pixel": 1} and records.has_masks
