"""`generate_masks` against its rules written out plainly.

The recorded tracker's masks are noise all over the image; where boxes matter it answers with planted squares.
"""

from __future__ import annotations

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3lt_jax import SamAutomaticMaskGenerator, SamPredictor
from sam3lt_jax.engine import Clicked
from sam3lt_jax.everything import _crops, _cut, _grid, _without_small
from sam3lt_jax.ops.stability import stability
from sam3lt_jax.processing.postprocess import binary_mask
from tests.ops.test_nms import plain
from tests.test_clicks import HEIGHT, WIDTH, photo, predictor

__all__ = ["predictor"]  # a fixture
KEYS = {
  "segmentation", "area", "bbox", "predicted_iou", "point_coords", "stability_score", "crop_box",
}  # fmt: skip
LOOSE = {"points_per_side": 6, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 0.3}


def planted(vision, clicks, offset=1.0):
  """In place of `Engine.click`: three squares around each point, scores of the point alone."""
  side = 4 * vision.tracker.image.shape[1]
  cells = (np.arange(side) + 0.5) / side
  x, y = clicks.points[:, 0, 0, None, None], clicks.points[:, 0, 1, None, None]
  away = np.maximum(np.abs(cells - x), np.abs(cells[:, None] - y)) * side  # [P, h, w], in cells
  masks = np.stack([radius - away for radius in (1.7, 2.6, 4.9, 8.3)], axis=1)[None].astype(np.float32)
  ious = np.abs(np.sin(91 * x[..., 0] + 57 * y[..., 0] + np.arange(4)))[None].astype(np.float32)
  P = len(clicks.points)
  none = np.zeros((1, P))
  clicked = Clicked(masks, ious, none, none.astype(int), np.asarray(stability(masks, offset)))
  yield P, jax.tree.map(jnp.asarray, clicked)


@pytest.fixture
def squares(predictor, monkeypatch):
  monkeypatch.setattr(predictor.engine, "click", planted)
  return predictor


@pytest.fixture(scope="module")
def records(predictor):
  return predictor.generate_masks(photo(HEIGHT, WIDTH), **LOOSE)


def test_the_real_tracker(predictor, records):
  (record,) = records  # all boxes are nearly the whole image
  sam = SamPredictor(predictor)
  sam.set_image(photo(HEIGHT, WIDTH))
  masks, scores, _ = sam.predict(np.array(record["point_coords"]), np.array([1]))
  assert record["predicted_iou"] == pytest.approx(scores.max(), abs=1e-5)
  assert (record["segmentation"] != masks[scores.argmax()]).mean() < 0.02  # of which holes are not filled


def test_as_written_out(squares):
  predictor = squares
  records = predictor.generate_masks(photo(HEIGHT, WIDTH), **LOOSE)
  sam = SamPredictor(predictor)
  sam.set_image(photo(HEIGHT, WIDTH))
  low, ious, points = [], [], []
  for y in (np.arange(6) + 0.5) * HEIGHT / 6:
    for x in (np.arange(6) + 0.5) * WIDTH / 6:
      _, scores, logits = sam.predict(np.array([[x, y]]), np.array([1]))
      low += list(logits)
      ious += list(scores)
      points += [[x, y]] * 3
  boxes = []
  for logits in low:
    ys, xs = np.nonzero(logits > 0)
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(ys) else [0, 0, 0, 0]
    boxes.append(np.array(box, np.float32) * np.array([WIDTH, HEIGHT, WIDTH, HEIGHT]) / 24)
  stays = np.flatnonzero(plain(boxes, ious, np.ones(len(ious), bool), 0.3))
  assert 1 < len(stays) < len(low)
  expected = sorted(stays, key=lambda i: -ious[i])
  assert len(records) == len(expected)
  for record, i in zip(records, expected):
    assert record.keys() == KEYS
    assert record["predicted_iou"] == pytest.approx(ious[i], abs=1e-5)
    assert record["point_coords"] == [pytest.approx(points[i])]
    mask = binary_mask(low[i], (HEIGHT, WIDTH), 0.5, "upsample_then_sigmoid")
    assert (record["segmentation"] != mask).mean() < 1e-3
    inner, outer = (low[i] > 1).sum(), (low[i] > -1).sum()
    assert record["stability_score"] == pytest.approx(inner / outer if outer else 1, abs=0.01)
    assert record["area"] == record["segmentation"].sum()
    assert record["crop_box"] == [0, 0, WIDTH, HEIGHT]


def test_thresholds_leave_out(squares):
  predictor = squares
  records = predictor.generate_masks(photo(HEIGHT, WIDTH), **LOOSE)
  ious = np.array([record["predicted_iou"] for record in records])
  bound = float(np.median(ious))
  fewer = predictor.generate_masks(photo(HEIGHT, WIDTH), **LOOSE | {"pred_iou_thresh": bound})
  assert 0 < len(fewer) < len(records) and all(r["predicted_iou"] > bound for r in fewer)
  assert predictor.generate_masks(photo(HEIGHT, WIDTH), **LOOSE | {"pred_iou_thresh": 1.0}) == []


def test_rle_is_the_same_mask(squares):
  predictor = squares
  records = predictor.generate_masks(photo(HEIGHT, WIDTH), **LOOSE)
  generator = SamAutomaticMaskGenerator(predictor, **LOOSE, output_mode="coco_rle")
  for rle, record in zip(generator.generate(photo(HEIGHT, WIDTH)), records, strict=True):
    np.testing.assert_array_equal(coco_mask.decode(rle["segmentation"]).astype(bool), record["segmentation"])
    assert (rle["area"], rle["bbox"]) == (record["area"], record["bbox"])


def test_crops(squares):
  predictor = squares
  found = predictor.generate_masks(photo(HEIGHT, WIDTH), **LOOSE, crop_n_layers=1)
  boxes = {tuple(record["crop_box"]) for record in found}
  assert len(boxes) > 1
  for record in found:
    x, y, w, h = record["crop_box"]
    outside = record["segmentation"].copy()
    outside[y : y + h, x : x + w] = False
    assert not outside.any()


def test_the_grid_and_the_crops_by_hand():
  assert _grid(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
  # segment-anything's `generate_crop_boxes((60, 90), 1, 512 / 1500)`: an overlap of 20 pixels.
  assert _crops((60, 90), 1, 512 / 1500) == [
    (0, (0, 0, 90, 60)), (1, (0, 0, 55, 40)), (1, (35, 0, 90, 40)), (1, (0, 20, 55, 60)),
    (1, (35, 20, 90, 60)),
  ]  # fmt: skip
  boxes = np.array([[0, 0, 100, 100], [50, 50, 199, 100], [50, 50, 150, 150]], np.float32)
  assert _cut(boxes, (0, 0, 200, 200), (400, 400)).tolist() == [False, True, False]


def test_small_regions_by_hand():
  mask = np.zeros((8, 8), bool)
  mask[:5, :5] = True
  mask[2, 2] = False
  mask[7, 7] = True
  filled, changed = _without_small(mask, 2, holes=True)
  assert changed and filled[2, 2] and filled.sum() == mask.sum() + 1
  whole, changed = _without_small(filled, 2, holes=False)
  assert changed and not whole[7, 7] and whole.sum() == 25
  assert (
    _without_small(whole, 2, holes=False) == (whole, False) or not _without_small(whole, 2, holes=False)[1]
  )
  largest, changed = _without_small(filled, 100, holes=False)
  assert changed and largest.sum() == 25  # all are small: the largest stays


def test_min_mask_region_area_leaves_no_speck(predictor):  # of noise
  found = predictor.generate_masks(photo(HEIGHT, WIDTH), **LOOSE, min_mask_region_area=30)
  assert found
  for record in found:
    assert not _without_small(record["segmentation"], 30, holes=True)[1]
    assert record["area"] == record["segmentation"].sum()


@pytest.mark.parametrize(
  ("message", "options"),
  [
    ("points_per_side must be a whole number of at least 1, got 0", {"points_per_side": 0}),
    ("pred_iou_thresh must be between 0 and 1, got 1.5", {"pred_iou_thresh": 1.5}),
    ("output_mode must be 'binary_mask' or 'coco_rle', got 'rle'", {"output_mode": "rle"}),
    ("points_a_side is no option of generate_masks; accepted: points_per_side", {"points_a_side": 3}),
  ],
)
def test_bad_options_are_a_sentence(predictor, message, options):
  with pytest.raises(ValueError, match=message):
    predictor.generate_masks(photo(HEIGHT, WIDTH), **options)


def test_a_large_photo_holds_one_mask_at_a_time(predictor):
  """With RLE; of bool masks all are what was asked for."""
  image = np.asarray(np.kron(photo(HEIGHT, WIDTH), np.ones((20, 20, 1), np.uint8)))
  options = LOOSE | {"box_nms_thresh": 1.0, "points_per_side": 3}
  predictor.generate_masks(image[:600, :900], **options, output_mode="coco_rle")  # compiles
  tracemalloc.start()
  try:
    found = predictor.generate_masks(image, **options, output_mode="coco_rle")
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  pixels = image.shape[0] * image.shape[1]
  assert len(found) == 27 and peak < 20 * pixels  # logits of one enlarged mask are 4 of them
