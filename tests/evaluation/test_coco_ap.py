"""COCO's AP through pycocotools: by hand, with nothing found, with a hand-made file, and wrong input."""

import json

import numpy as np
import pytest

from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.evaluation.coco_ap import LVIS_MEASURES, MEASURES, coco_ap
from sam3lt_jax.processing.masks import mask_bounds
from sam3lt_jax.processing.results import Results

SIZE = (40, 50)


def mask(x1, y1, x2, y2):
  out = np.zeros(SIZE, bool)
  out[y1:y2, x1:x2] = True
  return out


A, B = mask(0, 0, 20, 20), mask(30, 10, 50, 40)  # 400 and 600 pixels: COCO's small ones (under 32 * 32)


def dataset(**fields):
  """Two images with an object each, A of category 1 and B of category 2, with as little as COCO needs."""
  annotations = [
    {"id": 0, "image_id": 1, "category_id": 1, "segmentation": rle_ops.jsonable(rle_ops.encode(A))},
    {"id": 1, "image_id": 2, "category_id": 2, "segmentation": rle_ops.jsonable(rle_ops.encode(B))},
  ]
  return {
    "images": [{"id": i, "file_name": f"{i}.png", "height": SIZE[0], "width": SIZE[1]} for i in (1, 2)],
    "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    "annotations": [annotation | fields for annotation in annotations],
  }


def found(image_id, category, *masks_and_scores):
  masks = np.array([m for m, _ in masks_and_scores])
  boxes = [mask_bounds(m) for m in masks]
  scores = [s for _, s in masks_and_scores]
  results = Results(boxes, scores, masks, ["x"] * len(masks), SIZE)
  return results.to_coco(image_id, {"x": category})


def test_perfect():
  out = coco_ap(dataset(), found(1, 1, (A, 0.9)) + found(2, 2, (B, 0.3)))
  assert set(out) == {"segm", "bbox"}
  for measures in out.values():
    assert tuple(measures) == MEASURES
    assert [measures[key] for key in ("AP", "AP_small", "AR100")] == pytest.approx([1.0] * 3)
    assert measures["AP_medium"] is None and measures["AP_large"] is None


def test_ap_by_hand():
  # Category 1: found with IoU 15/20 = 0.75, so at 6 of the 10 thresholds; category 2: missed. A
  # false positive of a lower score costs nothing.
  shifted = mask(0, 0, 15, 20)
  results = found(1, 1, (shifted, 0.9), (B, 0.2))
  out = coco_ap(dataset(), results)["segm"]
  assert out["AP50"] == pytest.approx(0.5) and out["AP75"] == pytest.approx(0.5)
  assert out["AP"] == pytest.approx((0.6 + 0.0) / 2)
  # Of a higher score it halves the precision.
  results = found(1, 1, (shifted, 0.9), (B, 0.95))
  assert coco_ap(dataset(), results)["segm"]["AP50"] == pytest.approx(0.25)


def test_masks_and_boxes_are_told_apart():
  """The mask fills half of its box: right as a box, IoU 0.5 as a mask."""
  half = A.copy()
  half[:, 10:] = False
  result = found(1, 1, (half, 0.9))[0] | {"bbox": [0, 0, 20, 20]}
  out = coco_ap(dataset(), [result], image_ids=[1])
  assert out["bbox"]["AP"] == pytest.approx(1.0)
  assert out["segm"]["AP"] == pytest.approx(0.1) and out["segm"]["AP50"] == pytest.approx(1.0)


def test_sizes_are_the_masks_own():
  """A thin diagonal is small by its area though its box is large; loadRes would go by the box."""
  size = (200, 200)
  diagonal = np.eye(200, dtype=bool)
  data = dataset()
  data["images"] = [{"id": 1, "file_name": "x.png", "height": 200, "width": 200}]
  data["annotations"] = [
    {"id": 5, "image_id": 1, "category_id": 1, "segmentation": rle_ops.jsonable(rle_ops.encode(diagonal))}
  ]
  far = np.roll(diagonal, 100, axis=1)  # a false positive, small as well, of a higher score
  results = Results([[0, 0, 200, 200]] * 2, [0.9, 0.95], [diagonal, far], ["x"] * 2, size)
  out = coco_ap(data, results.to_coco(1, {"x": 1}), iou_types=["segm"])["segm"]
  assert out["AP_small"] == pytest.approx(0.5) and out["AP_large"] is None


def test_nothing_found(tmp_path, capsys):
  path = tmp_path / "truth.json"
  path.write_text(json.dumps(dataset()))
  out = coco_ap(path, [])
  assert out["segm"]["AP"] == out["bbox"]["AR100"] == 0.0
  assert capsys.readouterr().out == ""  # pycocotools' prints are kept away


def test_chosen_images_only():
  results = found(1, 1, (A, 0.9))
  assert coco_ap(dataset(), results)["segm"]["AP"] == pytest.approx(0.5)
  assert coco_ap(dataset(), results, image_ids=[1])["segm"]["AP"] == pytest.approx(1.0)
  with pytest.raises(ValueError, match="has no image 7"):
    coco_ap(dataset(), results, image_ids=[7])


def test_crowds_are_ignored():
  data = dataset()
  data["annotations"][1] |= {"image_id": 1, "category_id": 1, "iscrowd": 1}
  # What lies on the crowd is neither right nor wrong, though it scores higher than the object.
  out = coco_ap(data, found(1, 1, (A, 0.5), (B, 0.9)), image_ids=[1])
  assert out["segm"]["AP"] == pytest.approx(1.0)


def lvis(absent=((), ()), unfinished=((), ()), frequencies="rc"):
  """`dataset` as LVIS's: of each image the categories that it lacks and those that are not all annotated."""
  data = dataset()
  for entry, has_not, open_ in zip(data["images"], absent, unfinished):
    entry["coco_url"] = f"http://images.cocodataset.org/val2017/{entry.pop('file_name')}"
    entry |= {"neg_category_ids": list(has_not), "not_exhaustive_category_ids": list(open_)}
  for category, frequency in zip(data["categories"], frequencies):
    category["frequency"] = frequency
  return data


def test_lvis_is_federated():
  """A of image 1 and B of image 2 are found, and each once more, with a higher score, where nothing is known
  of it: only a category that the image lists as absent makes that wrong."""
  results = found(1, 1, (A, 0.5)) + found(2, 2, (B, 0.5)) + found(2, 1, (A, 0.9)) + found(1, 2, (B, 0.9))
  out = coco_ap(lvis(), results)
  assert set(out) == {"segm", "bbox"} and all(tuple(m) == LVIS_MEASURES for m in out.values())
  assert [out["segm"][key] for key in ("AP", "AP_rare", "AP_common", "AR300")] == pytest.approx([1.0] * 4)
  assert out["segm"]["AP_frequent"] is None and out["segm"]["AP_large"] is None
  # COCO's AP of the same file takes both for wrong: 1/2 each.
  assert coco_ap(dataset(), results)["segm"]["AP"] == pytest.approx(0.5)
  out = coco_ap(lvis(absent=((), (1,))), results)["segm"]
  assert [out[key] for key in ("AP", "AP_rare", "AP_common")] == pytest.approx([0.75, 0.5, 1.0])


def test_lvis_ignores_what_is_found_beyond_an_unfinished_category():
  results = found(1, 1, (B, 0.9), (A, 0.5)) + found(2, 2, (A, 0.9), (B, 0.5))
  assert coco_ap(lvis(), results)["segm"]["AP"] == pytest.approx(0.5)
  assert coco_ap(lvis(unfinished=((1,), ())), results)["segm"]["AP"] == pytest.approx(0.75)
  # What is not found is missed all the same.
  assert coco_ap(lvis(unfinished=((1,), (2,))), found(1, 1, (A, 0.5)))["segm"]["AP"] == pytest.approx(0.5)


def test_lvis_looks_at_300_results_an_image_of_all_categories():
  wrong = found(1, 2, (mask(0, 0, 1, 1), 0.9)) * 300  # of a category of which nothing is known there
  assert coco_ap(lvis(), wrong[:299] + found(1, 1, (A, 0.5)), image_ids=[1])["segm"]["AP"] == pytest.approx(1)
  assert coco_ap(lvis(), wrong + found(1, 1, (A, 0.5)), image_ids=[1])["segm"]["AP"] == 0.0
  # COCO's limit is 100 of a category: with 300 of another one before it A counts.
  assert coco_ap(dataset(), wrong + found(1, 1, (A, 0.5)), image_ids=[1])["segm"]["AP"] == pytest.approx(1)


def test_two_categories_of_one_name_are_one():
  data = dataset()
  data["categories"][1]["name"] = "A"
  for category in (1, 2):  # found under either id
    results = found(1, category, (A, 0.9)) + found(2, category, (B, 0.8))
    assert coco_ap(data, results)["segm"]["AP"] == pytest.approx(1.0)
  assert coco_ap(data, found(1, 2, (A, 0.9)))["segm"]["AP"] == pytest.approx(51 / 101)


@pytest.mark.parametrize("nothing", [None, [], [1], [0, 0, 5, float("nan")], "x", float("nan"), 10**400])
def test_what_the_mask_says_is_filled_in(nothing):
  results = found(1, 1, (A, 0.9)) + found(2, 2, (B, 0.3))
  out = coco_ap(dataset(bbox=nothing, area=nothing, iscrowd=None), results)
  assert [out[t][key] for t in out for key in ("AP", "AP_small")] == pytest.approx([1.0] * 4)


def test_numbers_as_text_and_a_byte_order_mark(tmp_path):
  data, results = dataset(area="400"), found(1, 1, (A, 0.9)) + found(2, 2, (B, 0.8))
  for entry in (*data["images"], *data["categories"], *data["annotations"]):
    entry.update({key: str(v) for key, v in entry.items() if isinstance(v, int)})
  path = tmp_path / "text.json"
  path.write_text(json.dumps(data), encoding="utf-8-sig")
  assert coco_ap(path, results)["segm"]["AP"] == pytest.approx(1.0)
  results = [r | {"image_id": float(r["image_id"]), "category_id": str(r["category_id"])} for r in results]
  assert coco_ap(path, results)["bbox"]["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
  "fields", [{"segmentation": [[90, 1, 95, 1, 95, 9]]}, {"segmentation": [[]], "bbox": [30, 10, 20, 30]}]
)
def test_an_object_that_no_mask_can_match_is_left_out(fields, caplog):
  """And what is found in its place is not wrong: it may be the object."""
  data = dataset()
  data["annotations"].append({"id": 2, "image_id": 1, "category_id": 1} | fields)
  assert coco_ap(data, found(1, 1, (B, 0.9), (A, 0.5)), image_ids=[1])["segm"]["AP"] == pytest.approx(1.0)
  assert ("1 objects without a mask; the first is annotations, image 1, annotation 2" in caplog.text) == (
    "bbox" in fields
  )


@pytest.mark.parametrize(
  ("fields", "results", "message"),
  [
    ({}, [{"image_id": 9, "category_id": 1}], r"number 0 has image_id 9"),
    ({}, [{"image_id": 1, "category_id": 9}], r"number 0 has category_id 9"),
    ({"segmentation": None, "bbox": [0, 0, 5, 5]}, [], r"image 1, annotation 0 has no mask; .*--iou bbox"),
    ({"segmentation": [], "bbox": [1]}, [], r"annotation 0: bbox must be"),
    ({"segmentation": {"size": [40, 50], "counts": [3]}}, [], "annotation 0: the RLE's runs add up to 3"),
    ({"image_id": 4}, [], "annotation 0 is of image 4"),
    ({"segmentation": [], "bbox": [0, 0, 5, float("inf")]}, [], r"annotation 0: bbox .* must be finite"),
    ({"segmentation": [], "bbox": [0, 0, 5, None]}, [], r"annotation 0: bbox .* must be finite"),
    ({"category_id": 9}, [], r"annotation 0 has no category_id that is listed, got 9"),
    ({}, [7], "number 0 must be an object, got int"),
    ({}, [{"image_id": [1], "category_id": 1}], r"number 0: its image_id must be a whole number, got \[1\]"),
    ({}, [{"image_id": 1, "category_id": 1}], r"number 0: score must be finite .*got \[None\]"),
    ({}, [{"image_id": 1, "category_id": 1, "score": float("nan")}], "number 0: score must be finite"),
    (
      {},
      [{"image_id": 1, "category_id": 1, "score": 0.5}],
      "number 0: segmentation must be polygons or an RLE, got None",
    ),
    (
      {},
      [{"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": {"size": [9, 9], "counts": "0"}}],
      r"number 0: the RLE's size \[9, 9\] is not",
    ),
  ],
)
def test_wrong_input(fields, results, message):
  with pytest.raises(ValueError, match=message):
    coco_ap(dataset(**fields), results)


def test_wrong_settings():
  with pytest.raises(ValueError, match="iou_types"):
    coco_ap(dataset(), [], iou_types=["masks"])
  with pytest.raises(ValueError, match="lists no categories"):
    coco_ap(dataset() | {"categories": []}, [])
