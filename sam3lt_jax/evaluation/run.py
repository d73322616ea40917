"""Evaluating a predictor on a data set: every phrase of every image asked, measured, and written down."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TextIO

import numpy as np

from sam3lt_jax.data.coco import CocoRecords
from sam3lt_jax.data.records import Prompt, Record, RecordError
from sam3lt_jax.evaluation.cgf1 import CgF1
from sam3lt_jax.evaluation.coco_ap import MOST_RESULTS, coco_ap
from sam3lt_jax.processing.results import Results

METRICS = ("cgf1", "ap")
_AP_FLOOR = 0.01  # results of a lower score cost AP very little, and most of the masks
_log = logging.getLogger(__name__)


def evaluate(
  predictor: Any,
  records: Sequence[Record],
  *,
  metrics: Sequence[Literal["cgf1", "ap"]] = ("cgf1",),
  iou_types: Sequence[Literal["segm", "bbox"]] = ("segm", "bbox"),
  annotators: Sequence[Sequence[Record]] = (),
  limit: int | None = None,
  score_threshold: float = 0.5,
  phrases_at_once: int = 16,
  out: str | os.PathLike | None = None,
  on_image: Callable[[str], None] | None = None,
) -> dict[str, Any]:
  """Asks a predictor for every prompt of every record by its phrase, and compares.

  cgF1 counts the pairs whose objects are all annotated (`Prompt.exhaustive`). AP is COCO's where the records
  are of a COCO file with a phrase a category (`ap["over"]` is "categories"; it is the published figure only
  if every category is asked of every image, `negatives=True`), and LVIS's federated AP where its images list
  the categories that they do not have ("lvis": of each image the categories are asked that it has or lists).
  Otherwise it is taken over image-phrase pairs, each as an image of one class, so that scores of different
  phrases are compared with each other ("pairs"). Objects without a mask among others with one are left out
  of the comparison of masks, with their pair.

  Args:
    predictor: a `Predictor`, or anything with its `set_image` and `predict`.
    records: see `sam3lt_jax.data`. Those that cannot be read are counted, logged and left out.
    metrics: "cgf1", "ap" or both.
    iou_types: by masks ("segm"), boxes ("bbox") or both.
    annotators: further annotations of the same pairs (SA-Co/Gold has three in all), matched by
      `Prompt.image_id`; see `cgf1`. AP uses `records` alone.
    limit: only the first so many records.
    score_threshold: of cgF1.
    phrases_at_once: phrases whose full-size masks are held at the same time.
    out: a folder for predictions.jsonl, written as they come, one line a pair, and report.json.
    on_image: called with the name of each record before it.

  Returns:
    images, pairs, seconds, images_per_second; "cgf1": iou type to `CgF1.compute()`; "ap": "over", and iou
    type to `coco_ap`'s measures; skipped: reason to number of records; not_exhaustive: pairs that cgF1 left
    out; without_mask: pairs that the comparison of masks left out; left_out: reason to number of objects, or
    parts of them, that the annotations are read without.

  Raises:
    ValueError: an argument as named; no object has a mask where "segm" is asked; no record that can be read.
  """
  for name, given, accepted in (("metrics", metrics, METRICS), ("iou_types", iou_types, ("segm", "bbox"))):
    if not given or not set(given) <= set(accepted):
      raise ValueError(f"{name} must be of {', '.join(map(repr, accepted))}, got {list(given)}")
  if limit is not None and limit < 1:
    raise ValueError(f"limit must be at least 1, got {limit}")
  run = _Evaluation(records, metrics, iou_types, annotators, score_threshold)
  with contextlib.ExitStack() as stack:
    if out is not None:
      os.makedirs(out, exist_ok=True)
      run.file = stack.enter_context(open(os.path.join(out, "predictions.jsonl"), "w", encoding="utf-8"))
    start = time.perf_counter()
    for i in range(min(len(records), limit or len(records))):
      run.add_record(predictor, i, phrases_at_once, on_image)
    seconds = time.perf_counter() - start
  report = run.report(seconds)
  if out is not None:
    with open(os.path.join(out, "report.json"), "w", encoding="utf-8") as f:
      json.dump(report, f, indent=2)
      f.write("\n")
  return report


class _Evaluation:
  """What accumulates while the images go by."""

  def __init__(self, records, metrics, iou_types, annotators, score_threshold: float):
    self.records, self.iou_types = records, tuple(iou_types)
    self.cgf1 = {t: CgF1(t, score_threshold=score_threshold) for t in iou_types if "cgf1" in metrics}
    self.ap = "ap" in metrics
    self.by_category = isinstance(records, CocoRecords) and records.by_category
    self.federated = self.by_category and records.federated
    self.score_threshold = np.float32(score_threshold)
    # The predictor keeps what lies above its threshold, the metric what reaches it.
    just_below = float(np.nextafter(np.float32(score_threshold), np.float32(0)))
    self.floor = min(_AP_FLOOR, just_below) if self.ap else just_below
    self.others = [{p.image_id: p for record in other for p in record.prompts} for other in annotators]
    self.file: TextIO | None = None
    self.results: list[dict[str, Any]] = []
    self.truth: list[dict[str, Any]] = []  # of AP over pairs
    self.image_ids: list[int] = []
    self.images = self.pairs = self.not_exhaustive = 0
    self.pair_sizes: list[tuple[int, int]] = []
    self.masked = self.without_mask = 0  # pairs whose objects all have masks; pairs with one that has none
    self.first_without_mask = ""
    self.skipped: dict[str, int] = {}
    self.first_error: RecordError | None = None

  def add_record(self, predictor: Any, index: int, phrases_at_once: int, on_image) -> None:
    try:
      record = self.records[index]
      if on_image is not None:
        on_image(str(record))
      image = record.load_image()
    except RecordError as e:
      self.skipped[e.reason] = self.skipped.get(e.reason, 0) + 1
      self.first_error = self.first_error or e
      _log.warning("left out (%s): %s", e.reason, e)
      return
    prompts: dict[str, list[Prompt]] = {}
    for prompt in record.prompts:
      prompts.setdefault(prompt.phrase, []).append(prompt)
    phrases = list(prompts)
    if phrases:
      predictor.set_image(image)
    for start in range(0, len(phrases), phrases_at_once):
      chunk = phrases[start : start + phrases_at_once]
      found = predictor.predict(text=chunk, threshold=self.floor)
      for phrase in chunk:
        mine = found.with_label(phrase)
        for prompt in prompts[phrase]:
          self.add_pair(record, prompt, mine)
    self.images += 1
    self.image_ids.append(record.id)

  def add_pair(self, record: Record, prompt: Prompt, found: Results) -> None:
    if "segm" in self.iou_types and len(prompt.boxes):
      self._count_masks(record, prompt)
    if self.ap:  # of those that cgF1 does not count, only as many as AP looks at: each costs a mask
      counted = np.count_nonzero(found.scores >= self.score_threshold) if self.cgf1 else 0
      found = found[: max(counted, MOST_RESULTS[self.federated])]
    results = found.to_coco(prompt.image_id, {prompt.phrase: prompt.category_id})
    for result in results:
      del result["id"], result["iscrowd"]
    if self.file is not None:
      self._write(record, prompt, results)
    self.pairs += 1
    self._add_cgf1(prompt, found, results)
    if self.ap:
      self._add_ap(record, prompt, results)

  def _count_masks(self, record: Record, prompt: Prompt) -> None:
    """Raises ValueError where none of the records can have a mask."""
    if None not in prompt.masks:
      self.masked += 1
      return
    self.without_mask += 1
    self.first_without_mask = self.first_without_mask or (
      f"{record}: an object of {prompt.phrase!r} has no mask; evaluate boxes alone with iou_types=('bbox',) "
      "(--iou bbox)"
    )
    if not getattr(self.records, "has_masks", True):
      raise ValueError(self.first_without_mask)

  def _add_cgf1(self, prompt: Prompt, found: Results, results: list[dict[str, Any]]) -> None:
    if not self.cgf1:
      return
    versions = [prompt, *(other[prompt.image_id] for other in self.others if prompt.image_id in other)]
    if not all(version.exhaustive for version in versions):
      self.not_exhaustive += 1
      return
    for iou_type, metric in self.cgf1.items():
      if iou_type == "segm":
        if any(None in version.masks for version in versions):
          continue
        masks = [result["segmentation"] for result in results]
        metric.update_best_of(masks, found.scores, [version.masks for version in versions])
      else:
        metric.update_best_of(found.boxes, found.scores, [version.boxes for version in versions])

  def _add_ap(self, record: Record, prompt: Prompt, results: list[dict[str, Any]]) -> None:
    if self.by_category:
      for category in self.records.answers[prompt.category_id]:
        self.results += [result | {"category_id": category} for result in results]
      return
    if not prompt.exhaustive:
      return
    self.pair_sizes.append(tuple(record.size))
    pair = len(self.pair_sizes)
    self.results += [result | {"image_id": pair, "category_id": 1} for result in results]
    for (x1, y1, x2, y2), mask in zip(prompt.boxes.tolist(), prompt.masks):
      annotation = {"image_id": pair, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
      self.truth.append(annotation if mask is None else annotation | {"segmentation": mask})

  def _write(self, record: Record, prompt: Prompt, results: list[dict[str, Any]]) -> None:
    name = os.fspath(record.image) if isinstance(record.image, (str, os.PathLike)) else str(record)
    line = {
      "image": name,
      "phrase": prompt.phrase,
      "image_id": prompt.image_id,
      "category_id": prompt.category_id,
      "objects": len(prompt.boxes),
      "exhaustive": prompt.exhaustive,
      "predictions": results,
    }
    self.file.write(json.dumps(line) + "\n")
    self.file.flush()

  def report(self, seconds: float) -> dict[str, Any]:
    if not self.pairs:
      why = self.first_error or "they ask for no phrase"
      raise ValueError(f"nothing to evaluate in {len(self.records)} records: {why}")
    if self.without_mask and not self.masked:
      raise ValueError(self.first_without_mask)
    report: dict[str, Any] = {
      "images": self.images,
      "pairs": self.pairs,
      "seconds": round(seconds, 3),
      "images_per_second": round(self.images / seconds, 4) if seconds > 0 else None,
      "skipped": self.skipped,
      "not_exhaustive": self.not_exhaustive,
      "without_mask": self.without_mask,
      "left_out": dict(getattr(self.records, "left_out", {})),
    }
    if self.cgf1:
      report["cgf1"] = {iou_type: metric.compute() for iou_type, metric in self.cgf1.items()}
    if self.ap:
      over = {"over": "lvis" if self.federated else "categories" if self.by_category else "pairs"}
      report["ap"] = over | coco_ap(
        self._ap_truth(),
        self.results,
        iou_types=self.iou_types,
        image_ids=self.image_ids if self.by_category else None,
      )
    return report

  def _ap_truth(self) -> Any:
    if self.by_category:
      return self.records.dataset
    images = [
      {"id": i, "file_name": f"pair {i}", "height": height, "width": width}
      for i, (height, width) in enumerate(self.pair_sizes, 1)
    ]
    return {"images": images, "categories": [{"id": 1, "name": "object"}], "annotations": self.truth}


_COLUMNS = {  # measure -> (heading, how it is written)
  "cgF1": ("cgF1", "{:.2f}"), "pmF1": ("pmF1", "%"), "IL_MCC": ("IL_MCC", "{:.3f}"),
  "pmF1@0.5": ("pmF1@0.5", "%"), "IL_precision": ("IL_prec", "%"), "IL_recall": ("IL_recall", "%"),
  "mean_matched_iou": ("match IoU", "%"), "objects": ("objects", "{}"),
}  # fmt: skip
_OVER = {"categories": "COCO AP", "lvis": "LVIS AP", "pairs": "AP of pairs"}


def table(report: dict[str, Any]) -> str:
  """The report's main figures as text, percentages but for IL_MCC and counts."""
  lines = [f"{report['images']} images, {report['pairs']} phrases, {report['seconds']:.1f} s"]
  if "cgf1" in report:
    lines += _rows("cgF1", report["cgf1"], _COLUMNS)
  if "ap" in report:
    measures = dict(report["ap"])
    keys = "AP AP50 AP75 AP_small AP_medium AP_large".split()
    if (over := measures.pop("over")) == "lvis":
      keys += ["AP_rare", "AP_common", "AP_frequent"]
    lines += _rows(_OVER[over], measures, {key: (key.replace("frequent", "freq"), "%") for key in keys})
  if report["skipped"]:
    lines.append("left out: " + ", ".join(f"{n} ({reason})" for reason, n in report["skipped"].items()))
  if report["not_exhaustive"]:
    lines.append(f"not in cgF1: {report['not_exhaustive']} phrases whose objects are not all annotated")
  if report["without_mask"]:
    lines.append(f"not in segm: {report['without_mask']} phrases with an object that has no mask")
  if report["left_out"]:
    lines.append("annotations: " + ", ".join(f"{n} x {reason}" for reason, n in report["left_out"].items()))
  return "\n".join(lines)


def _rows(heading: str, measures: dict[str, Any], columns: dict[str, tuple[str, str]]) -> Iterator[str]:
  yield f"{heading:<11}" + "".join(f"{label:>11}" for label, _ in columns.values())
  for iou_type, values in measures.items():
    cells = (_cell(values[key], style) for key, (_, style) in columns.items())
    yield f"  {iou_type:<9}" + "".join(f"{cell:>11}" for cell in cells)


def _cell(value: float | None, style: str) -> str:
  if value is None:
    return "-"
  return f"{100 * value:.2f}" if style == "%" else style.format(value)
