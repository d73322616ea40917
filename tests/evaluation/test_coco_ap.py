"""COCO's AP through pycocotools: by hand, with nothing found, with a hand-made file, and wrong input."""

import json

import numpy as np
import pytest

from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.evaluation.coco_ap import MEASURES, coco_ap
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
  boxes = [rle_ops.mask_bounds(m) for m in masks]
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


@pytest.mark.parametrize(
  ("fields", "results", "message"),
  [
    ({}, [{"image_id": 9, "category_id": 1}], r"number 0 has image_id 9"),
    ({}, [{"image_id": 1, "category_id": 9}], r"number 0 has category_id 9"),
    ({"segmentation": None, "bbox": [0, 0, 5, 5]}, [], r"image 1, annotation 0 has no mask; .*--iou bbox"),
    ({"bbox": [1]}, [], r"annotation 0: bbox must be"),
    ({"segmentation": {"size": [40, 50], "counts": [3]}}, [], "annotation 0: the RLE's runs add up to 3"),
    ({"image_id": 4}, [], "annotation 0 is of image 4"),
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
