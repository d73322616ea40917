"""cgF1, the measure of SA-Co: how well phrases are localised, times how well their presence is told.

Written from the description in the SAM 3 paper and checked for its choices against the evaluator in SAM 3's
repository. Per image-phrase pair, predictions with a score of at least the threshold (0.5) are kept. Then:

    cgF1 = 100 * pmF1 * IL_MCC

pmF1, positive micro F1. Over pairs that have an object only. Predictions and objects of a pair are assigned
to each other once, one to one, so that the sum of their IoUs is greatest; at an IoU threshold t an assigned
pair is a true positive (TP) if its IoU is at least t, what is left over are false positives (FP) and false
negatives (FN). The counts are summed over the pairs, F1(t) = 2 TP / (2 TP + FP + FN), and pmF1 is the mean
of F1(t) over t = 0.5, 0.55, ..., 0.95.

IL_MCC, image-level Matthews correlation. Over all pairs: whether anything was predicted against whether
there is an object. Predictions on a pair without objects count here, once a pair, and not in pmF1.

    MCC = (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)), 0 where the denominator is 0

Choices: F1 of no counts at all is 0. SA-Co's evaluator adds 1e-4 to denominators and means the same. Pairs
whose objects are not all annotated must be left out by the caller, as SA-Co does
(`is_instance_exhaustive`). With several annotators (SA-Co/Gold has three) the one most favourable to the
predictions counts for a pair: one that agrees that nothing is there, else the greatest F1, mean over the
thresholds and with SA-Co's 1e-4; of equals, the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment

from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.data.numbers import brief
from sam3lt_jax.errors import check

_EPSILON = 1e-4
IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
_COUNTS = (
  "il_tp",
  "il_fp",
  "il_fn",
  "il_tn",
  "objects",
  "predictions",
  "negative_predictions",
  "matched_iou",
)


class CgF1:
  """Counts over image-phrase pairs; `update` takes one pair, `compute` gives the measures.

      metric = CgF1()
      metric.update(results.masks, results.scores, true_masks)
      metric.compute()["cgF1"]

  Attributes:
    iou_type: "segm" or "bbox".
    thresholds: of the IoU, ascending.
    score_threshold: predictions with at least this score are kept.
  """

  def __init__(
    self,
    iou_type: Literal["segm", "bbox"] = "segm",
    thresholds: Sequence[float] = IOU_THRESHOLDS,
    score_threshold: float = 0.5,
  ):
    """Raises ValueError for another iou_type, or thresholds outside (0, 1] or not ascending."""
    check(iou_type in ("segm", "bbox"), "iou_type", iou_type, "'segm' or 'bbox'")
    thresholds = tuple(float(t) for t in thresholds)
    ascend = len(thresholds) and 0 < thresholds[0] and thresholds[-1] <= 1 and np.all(np.diff(thresholds) > 0)
    check(ascend, "thresholds", thresholds, "numbers that ascend within (0, 1]")
    check(0 <= score_threshold <= 1, "score_threshold", score_threshold, "a number within 0 and 1")
    self.iou_type, self.thresholds, self.score_threshold = iou_type, thresholds, float(score_threshold)
    self._counts = self._nothing()

  def update(self, predicted: Any, scores: Any, truth: Any) -> None:
    """Adds a pair.

    Args:
      predicted: of "segm", masks: bool [N, H, W], or N RLEs (`{"size": [H, W], "counts": ...}`, compressed or
        not); of "bbox", boxes: [N, 4], (x1, y1, x2, y2) in any unit. N may be 0.
      scores: [N], 0 to 1.
      truth: the objects, in the same form and frame, M of them. 0: the phrase is absent.

    Raises:
      ValueError: shapes or sizes that do not fit each other.
    """
    self.update_best_of(predicted, scores, [truth])

  def update_best_of(self, predicted: Any, scores: Any, truths: Sequence[Any]) -> None:
    """Adds a pair that several annotators worked on: `truths` has the objects of each."""
    if not len(truths):
      raise ValueError("truths must hold the objects of at least one annotator, got none")
    scores = np.asarray(scores, np.float32).reshape(-1)
    predicted = self._shapes("predicted", predicted)
    if len(scores) != len(predicted) or np.isnan(scores).any():
      raise ValueError(f"scores must be one number a prediction ({len(predicted)}), got {scores.tolist()}")
    kept = [p for p, score in zip(predicted, scores) if score >= np.float32(self.score_threshold)]
    best, best_rank = None, -1.0
    for truth in truths:
      counts = self._pair(kept, self._shapes("truth", truth))
      rank = 2.0 if counts["il_tn"] else _rank(counts["tp"], counts["fp"], counts["fn"])
      if rank > best_rank:
        best, best_rank = counts, rank
    for name, value in best.items():
      self._counts[name] = self._counts[name] + value

  def _shapes(self, name: str, given: Any) -> list[Any]:
    """Masks as RLEs, or boxes as [x, y, width, height] float64."""
    if self.iou_type == "bbox":
      boxes = np.asarray(given, np.float64)
      if not boxes.size:
        boxes = boxes.reshape(0, 4)
      if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise ValueError(f"{name}: boxes must be finite numbers [N, 4], got shape {boxes.shape}")
      return list(np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1))
    if isinstance(given, np.ndarray) or hasattr(given, "__array__"):
      masks = np.asarray(given)
      if masks.ndim != 3 and masks.size:
        raise ValueError(f"{name}: masks must be bool [N, H, W] or a list of RLEs, got shape {masks.shape}")
      return [rle_ops.encode(mask) for mask in masks.astype(bool)] if masks.size else []
    return [self._rle(name, rle) for rle in given]

  def _rle(self, name: str, given: Any) -> dict[str, Any]:
    if isinstance(given, np.ndarray) and given.ndim == 2:
      return rle_ops.encode(given.astype(bool))
    if not isinstance(given, dict):
      raise ValueError(f"{name}: a mask must be an RLE or a bool array [H, W], got {type(given).__name__}")
    size = given.get("size")
    try:
      if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise ValueError(f"an RLE's size must be [height, width], got {brief(size)}")
      return rle_ops.from_segmentation(given, size)
    except ValueError as e:
      raise ValueError(f"{name}: {e}") from e

  def _nothing(self) -> dict[str, Any]:
    return dict.fromkeys(_COUNTS, 0) | {
      k: np.zeros(len(self.thresholds), np.int64) for k in ("tp", "fp", "fn")
    }

  def _pair(self, predicted: list[Any], truth: list[Any]) -> dict[str, Any]:
    """The counts of one pair, named as in `_nothing`."""
    n, m, counts = len(predicted), len(truth), self._nothing()
    counts["il_tp"], counts["il_fp"] = int(n > 0 and m > 0), int(n > 0 and m == 0)
    counts["il_fn"], counts["il_tn"] = int(n == 0 and m > 0), int(n == 0 and m == 0)
    if m == 0:
      return counts | {"negative_predictions": n}
    overlaps = self._matched_overlaps(predicted, truth)
    tp = (overlaps[None] >= np.array(self.thresholds)[:, None]).sum(1)
    counts |= {"tp": tp, "fp": n - tp, "fn": m - tp, "objects": m, "predictions": n}
    return counts | {"matched_iou": float(overlaps[overlaps >= self.thresholds[0]].sum())}

  def _matched_overlaps(self, predicted: list[Any], truth: list[Any]) -> np.ndarray:
    """IoUs of the assignment whose sum is greatest, [min(N, M)]."""
    if not predicted or not truth:
      return np.zeros(0)
    if self.iou_type == "segm":
      sizes = {tuple(rle["size"]) for rle in (*predicted, *truth)}
      if len(sizes) > 1:
        raise ValueError(f"predicted and true masks must be of one size, got (height, width) {sorted(sizes)}")
    else:
      predicted, truth = np.array(predicted), np.array(truth)
    ious = np.asarray(coco_mask.iou(predicted, truth, [0] * len(truth)))
    return ious[linear_sum_assignment(-ious)]

  def compute(self) -> dict[str, float]:
    """The measures of everything added so far.

    Returns:
      cgF1 (0 to 100, or below 0 where IL_MCC is), pmF1, IL_MCC; cgF1@t, pmF1@t, positive_precision@t and
      positive_recall@t at t = 0.5 and 0.75, if among the thresholds; IL_precision, IL_recall, IL_F1,
      IL_accuracy; mean_matched_iou, of the pairs with at least the lowest threshold; all 0 to 1. And counts:
      pairs, positive_pairs, negative_pairs, objects, predictions (on positive pairs), negative_predictions,
      and IL_TP, IL_FP, IL_FN, IL_TN.
    """
    c = self._counts
    tp, fp, fn, tn = (int(c[name]) for name in ("il_tp", "il_fp", "il_fn", "il_tn"))
    f1 = _f1(c["tp"], c["fp"], c["fn"])
    mcc = _mcc(tp, fp, fn, tn)
    out = {"cgF1": 100 * float(f1.mean()) * mcc, "pmF1": float(f1.mean()), "IL_MCC": mcc}
    for threshold in (0.5, 0.75):
      if threshold in self.thresholds:
        i = self.thresholds.index(threshold)
        out[f"cgF1@{threshold}"] = 100 * float(f1[i]) * mcc
        out[f"pmF1@{threshold}"] = float(f1[i])
        out[f"positive_precision@{threshold}"] = _ratio(c["tp"][i], c["tp"][i] + c["fp"][i])
        out[f"positive_recall@{threshold}"] = _ratio(c["tp"][i], c["tp"][i] + c["fn"][i])
    pairs = tp + fp + fn + tn
    return out | {
      "IL_precision": _ratio(tp, tp + fp),
      "IL_recall": _ratio(tp, tp + fn),
      "IL_F1": _ratio(2 * tp, 2 * tp + fp + fn),
      "IL_accuracy": _ratio(tp + tn, pairs),
      "mean_matched_iou": _ratio(c["matched_iou"], c["tp"][0]),
      "pairs": pairs,
      "positive_pairs": tp + fn,
      "negative_pairs": fp + tn,
      "objects": int(c["objects"]),
      "predictions": int(c["predictions"]),
      "negative_predictions": int(c["negative_predictions"]),
      "IL_TP": tp,
      "IL_FP": fp,
      "IL_FN": fn,
      "IL_TN": tn,
    }


def _f1(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> np.ndarray:
  """2 TP / (2 TP + FP + FN) at each threshold, 0 where there are no counts."""
  total = 2 * tp + fp + fn
  return np.where(total > 0, 2 * tp / np.maximum(total, 1), 0.0)


def _rank(tp: np.ndarray, fp: np.ndarray, fn: np.ndarray) -> float:
  """The mean F1 by which SA-Co's evaluator chooses among annotators, with its 1e-4 in every denominator: of
  equal F1s that of more objects is the greater one."""
  precision, recall = tp / (tp + fp + _EPSILON), tp / (tp + fn + _EPSILON)
  return float((2 * precision * recall / (precision + recall + _EPSILON)).mean())


def _mcc(tp: int, fp: int, fn: int, tn: int) -> float:
  denominator = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
  return (tp * tn - fp * fn) / denominator if denominator else 0.0


def _ratio(part: float, whole: float) -> float:
  return float(part) / float(whole) if whole else 0.0
