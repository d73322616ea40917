"""cgF1 by hand: counts, matching, presence, several annotators, merging, and what is rejected."""

import math

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.evaluation.cgf1 import IOU_THRESHOLDS, CgF1
from sam3lt_jax.processing.masks import mask_bounds

LENGTH = 20


def strips(*spans):
  """Masks bool [N, 1, 20] of the pixels from x1 to x2: IoUs can be read off."""
  x = np.arange(LENGTH)
  return np.array([[(x >= a) & (x < b)] for a, b in spans]).reshape(-1, 1, LENGTH)


def as_boxes(masks):
  return np.array([mask_bounds(m) for m in masks]).reshape(-1, 4)


# Five pairs: (predictions, scores, objects).
PAIRS = [
  # IoUs 9/10 and 6/10; the third scores too low to count.
  (strips((0, 9), (10, 16), (0, 10)), [0.9, 0.8, 0.49], strips((0, 10), (10, 20))),
  # IoUs 5/10 and 0.
  (strips((0, 5), (12, 20)), [0.9, 0.5], strips((0, 10))),
  # Absent, and something predicted; absent, and nothing predicted; present, and nothing predicted.
  (strips((0, 5), (5, 9)), [0.6, 0.7], strips()),
  (strips((0, 5)), [0.3], strips()),
  (strips(), [], strips((3, 9))),
]
# Over the pairs with objects (1, 2 and 5), by threshold:
#   0.5         TP 2+1+0  FP 0+1+0  FN 0+0+1   F1 = 6 / (6 + 2) = 0.75
#   0.55, 0.6   TP 2+0+0  FP 0+2+0  FN 0+1+1   F1 = 4 / (4 + 4) = 0.5
#   0.65 - 0.9  TP 1+0+0  FP 1+2+0  FN 1+1+1   F1 = 2 / (2 + 6) = 0.25   (six thresholds)
#   0.95        TP 0                           F1 = 0
# pmF1 = (0.75 + 2 * 0.5 + 6 * 0.25) / 10 = 0.325
# Presence: TP 2 (pairs 1, 2), FP 1 (3), TN 1 (4), FN 1 (5): MCC = (2*1 - 1*1) / sqrt(3 * 3 * 2 * 2) = 1/6
EXPECTED = {
  "cgF1": 100 * 0.325 / 6, "pmF1": 0.325, "IL_MCC": 1 / 6, "pmF1@0.5": 0.75, "pmF1@0.75": 0.25,
  "cgF1@0.5": 12.5, "positive_precision@0.5": 3 / 4, "positive_recall@0.5": 3 / 4,
  "IL_precision": 2 / 3, "IL_recall": 2 / 3, "IL_F1": 2 / 3, "IL_accuracy": 3 / 5,
  "mean_matched_iou": (0.9 + 0.6 + 0.5) / 3, "pairs": 5, "positive_pairs": 3, "negative_pairs": 2,
  "objects": 4, "predictions": 4, "negative_predictions": 2,
  "IL_TP": 2, "IL_FP": 1, "IL_FN": 1, "IL_TN": 1,
}  # fmt: skip


def assert_expected(measures, expected=EXPECTED):
  for key, value in expected.items():
    assert measures[key] == pytest.approx(value, abs=1e-12), key


def counted(pairs=PAIRS, form=lambda masks: masks, **options):
  metric = CgF1(**options)
  for predicted, scores, truth in pairs:
    metric.update(form(predicted), scores, form(truth))
  return metric


def test_five_pairs_by_hand():
  assert IOU_THRESHOLDS == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
  assert_expected(counted().compute())


def test_masks_in_every_form_and_boxes_give_the_same():
  def compressed(masks):
    return [rle_ops.encode(m) for m in masks]

  def text(masks):
    return [rle_ops.jsonable(rle_ops.encode(m)) for m in masks]

  def runs(masks):
    out = []
    for m in masks:
      x1, _, x2, _ = mask_bounds(m).astype(int)
      out.append({"size": [1, LENGTH], "counts": [int(x1), int(x2 - x1), int(LENGTH - x2)]})
    return out

  for form in (compressed, text, runs, list):
    assert_expected(counted(form=form).compute())
  assert_expected(counted(form=as_boxes, iou_type="bbox").compute())


def test_assignment_is_the_best_one_and_not_greedy():
  # X meets A with 0.8 and B with 0.75, Y meets A with 0.7 and B with 0.31. Best first would take X-A and
  # leave Y-B below 0.5; the assignment of greatest sum is X-B, Y-A.
  boxes = {"A": [0, 0, 8, 1], "B": [2.5, 0, 10, 1], "X": [0, 0, 10, 1], "Y": [0, 0, 5.6, 1]}
  metric = CgF1("bbox")
  metric.update([boxes["X"], boxes["Y"]], [0.9, 0.9], [boxes["A"], boxes["B"]])
  out = metric.compute()
  assert out["pmF1@0.5"] == 1.0 and out["pmF1@0.75"] == 0.5
  assert out["mean_matched_iou"] == pytest.approx((0.75 + 0.7) / 2)


def test_perfect_and_worst():
  truth = strips((0, 5))
  perfect = counted([(truth, [1.0], truth), (strips(), [], strips())]).compute()
  assert (perfect["cgF1"], perfect["pmF1"], perfect["IL_MCC"]) == (100.0, 1.0, 1.0)
  # Localised perfectly, but presence told wrongly more often than rightly: TP 1, TN 0, FP 1, FN 1.
  wrong = counted([(truth, [1.0], truth), (truth, [1.0], strips()), (strips(), [], truth)]).compute()
  assert wrong["IL_MCC"] == pytest.approx(-1 / math.sqrt(2 * 2 * 1 * 1))
  assert wrong["cgF1"] == pytest.approx(100 * (2 / 3) * -0.5)
  # Only present pairs: no denominator, so no correlation.
  assert counted([(truth, [1.0], truth)]).compute()["cgF1"] == 0.0
  nothing = CgF1().compute()
  assert nothing["cgF1"] == 0.0 and nothing["pairs"] == 0


def test_a_score_of_exactly_the_threshold_counts():
  truth = strips((0, 5))
  for scores in (np.array([0.5], np.float32), [0.3]):
    metric = CgF1(score_threshold=float(scores[0]))
    metric.update(truth, scores, truth)
    assert metric.compute()["IL_TP"] == 1


def test_other_thresholds():
  out = counted(thresholds=(0.6, 0.9)).compute()
  assert out["pmF1"] == pytest.approx((0.5 + 0.25) / 2) and "pmF1@0.5" not in out
  assert out["mean_matched_iou"] == pytest.approx((0.9 + 0.6) / 2)


def test_the_most_favourable_annotator_counts():
  span = strips((0, 10))
  metric = CgF1()
  # F1 over the thresholds: 0 against the first, 9 of 10 (IoU 0.9) against the second.
  metric.update_best_of(strips((0, 9)), [0.9], [strips((10, 20)), span])
  assert metric.compute()["pmF1"] == pytest.approx(0.9)
  # Nothing predicted: the annotator who also saw nothing.
  metric.update_best_of(strips(), [], [span, strips(), span])
  out = metric.compute()
  assert (out["IL_TP"], out["IL_TN"], out["IL_FN"], out["objects"]) == (1, 1, 0, 1)
  # Something predicted: the annotator with objects, unless it overlaps none of them, then the first.
  metric.update_best_of(span, [0.9], [strips(), span])
  metric.update_best_of(span, [0.9], [strips(), strips((10, 20))])
  out = metric.compute()
  assert (out["IL_TP"], out["IL_FP"], out["objects"]) == (2, 1, 2)


def test_annotators_of_equal_f1_are_ranked_as_saco_ranks_them():
  """One of one object found by three predictions, or two of five: F1 = 2/4 = 4/8. With SA-Co's 1e-4 in each
  denominator the second is 0.4999406, the first 0.4999375, whatever the order."""
  predicted = strips((0, 4), (4, 8), (12, 13))
  few, many = strips((0, 4)), strips((0, 4), (4, 8), (14, 15), (15, 16), (16, 17))
  for truths in ([few, many], [many, few], [strips((18, 20)), few, many]):
    metric = CgF1()
    metric.update_best_of(predicted, [0.9] * 3, truths)
    out = metric.compute()
    assert (out["objects"], out["pmF1"]) == (5, 0.5)


def test_a_predicted_mask_without_a_pixel_is_a_miss():
  empty = np.zeros((1, 1, LENGTH), bool)
  for predicted in (empty, [rle_ops.encode(empty[0])]):
    out = counted([(predicted, [0.9], strips((0, 5)))]).compute()
    assert (out["IL_TP"], out["pmF1"], out["predictions"]) == (1, 0.0, 1)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((strips((0, 5)), [0.9, 0.8], strips()), r"one number a prediction \(1\)"),
    ((strips((0, 5)), [float("nan")], strips()), "one number a prediction"),
    ((np.zeros((3, 4), bool), [0.9], strips()), r"predicted: masks must be bool \[N, H, W\]"),
    ((strips((0, 5)), [0.9], np.ones((1, 2, 10), bool)), r"one size, got .*\(1, 20\), \(2, 10\)"),
    (([{"size": [1, 20], "counts": [5, 5]}], [0.9], strips()), "predicted: the RLE's runs add up to 10"),
    (([{"counts": [20]}], [0.9], strips()), r"predicted: an RLE's size must be \[height, width\]"),
    ((["x"], [0.9], strips()), "predicted: a mask must be an RLE"),
  ],
)
def test_what_is_rejected(arguments, message):
  with pytest.raises(ValueError, match=message):
    CgF1().update(*arguments)


def test_bad_settings():
  with pytest.raises(ValueError, match=r"iou_type=.*accepted"):
    CgF1("masks")
  for thresholds in ((), (0.5, 0.5), (0.9, 0.5), (0.0, 0.5), (0.5, 1.1)):
    with pytest.raises(ValueError, match=r"thresholds=.*accepted: numbers that ascend"):
      CgF1(thresholds=thresholds)
  with pytest.raises(ValueError, match="score_threshold"):
    CgF1(score_threshold=1.5)
  with pytest.raises(ValueError, match="boxes must be finite"):
    CgF1("bbox").update([[0, 0, 1]], [0.9], [])
  with pytest.raises(ValueError, match="at least one annotator"):
    CgF1().update_best_of(strips(), [], [])


def test_iou_is_that_of_pycocotools():
  """Random masks: the counts follow from pycocotools' IoU when there is one object."""
  rng = np.random.default_rng(0)
  for _ in range(20):
    a, b = rng.random((2, 1, 9, 7)) < 0.6
    iou = coco_mask.iou([rle_ops.encode(a[0])], [rle_ops.encode(b[0])], [0])[0, 0]
    assert iou == pytest.approx((a & b).sum() / (a | b).sum())
    out = counted([(a, [1.0], b)]).compute()
    assert out["pmF1"] == pytest.approx(sum(iou >= t for t in IOU_THRESHOLDS) / 10)
