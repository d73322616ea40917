"""COCO's average precision of boxes and masks, and LVIS's federated one, through pycocotools.

Source: the COCO API's `cocoeval.py`; the LVIS API's `eval.py` and `results.py` for what LVIS does otherwise:
results of categories that an image neither has nor lists as absent are not looked at, results beyond the
objects of a category that the image lists as not exhaustive are ignored, and at most 300 results an image
count, of all categories together.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sam3lt_jax.data import annotations as annotation_ops
from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.data.annotations import ImageEntry
from sam3lt_jax.data.numbers import MOST_PIXELS, brief, numbers, whole

MEASURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
            "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")  # fmt: skip
LVIS_MEASURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AP_rare", "AP_common",
                 "AP_frequent", "AR300", "AR_small", "AR_medium", "AR_large")  # fmt: skip
MOST_RESULTS = {False: 100, True: 300}  # COCO's, an image and category; LVIS's, an image
_FREQUENCIES = {"AP_rare": "r", "AP_common": "c", "AP_frequent": "f"}
Measures = dict[str, float | None]
_log = logging.getLogger(__name__)


def coco_ap(
  ground_truth: str | os.PathLike | Mapping[str, Any],
  results: Sequence[Mapping[str, Any]],
  *,
  iou_types: Sequence[Literal["segm", "bbox"]] = ("segm", "bbox"),
  image_ids: Sequence[int] | None = None,
) -> dict[str, Measures]:
  """Average precision and recall as COCO defines them (at most 100 results an image and category), or as LVIS
  does where images list the categories that they are known not to have (`neg_category_ids`).

  Masks are ordered into small, medium and large by their own area, boxes by the box's, which is what
  pycocotools does for results of the respective kind alone. Categories of one name are one. Objects whose
  mask has no pixel or whose box has no area, and where masks are compared those without a mask, cannot be
  found: they are left out, and in their image results beyond the other objects of the category are ignored.

  Args:
    ground_truth: a COCO JSON file, or what it holds. `area`, `bbox` (of what has a mask), `iscrowd` and
      annotation ids are filled in where they lack or are none.
    results: `Results.to_coco` of every image, in one list: image_id, category_id, score, bbox (x, y, width,
      height in pixels), segmentation (RLE). May be empty.
    iou_types: what to evaluate.
    image_ids: the images to evaluate; None, all of the file.

  Returns:
    For each of `iou_types` the measures of `MEASURES` (of LVIS `LVIS_MEASURES`), 0 to 1; None where one is
    undefined, as there is no object of the size.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not COCO's format; a result of an unknown image or category, or that is none; masks asked for
      where no annotation has one.
  """
  for iou_type in iou_types:
    if iou_type not in ("segm", "bbox"):
      raise ValueError(f"iou_types must be of 'segm' and 'bbox', got {iou_type!r}")
  data, name = annotation_ops.read_annotations(ground_truth)
  truth = _Truth(data, name, image_ids)
  with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
    return {iou_type: truth.measures(results, iou_type) for iou_type in iou_types}


class _Truth:
  """The chosen images with what pycocotools reads of them."""

  def __init__(self, data: Mapping[str, Any], name: str, image_ids: Sequence[int] | None):
    self.name = name
    images = annotation_ops.images_of(data, name)
    self._grouped = annotation_ops.annotations_by_image(data, images, name)
    known = {image.id: image for image in images}
    chosen = known if image_ids is None else dict.fromkeys(whole(i, "image_ids: each") for i in image_ids)
    strange = [i for i in chosen if i not in known]
    if strange:
      raise ValueError(f"image_ids: {name} has no image {strange[0]}")
    self.images = {i: known[i] for i in chosen}
    categories = annotation_ops.categories_of(data, name)
    if not categories:
      raise ValueError(f"{name} lists no categories")
    self.first = annotation_ops.first_of_name(categories)
    self.categories = {i: categories[i] for i in dict.fromkeys(self.first.values())}
    lists = {image.id: annotation_ops.lists_of(image, name) for image in images}
    self.federated = any(absent is not None for absent, _ in lists.values())
    self.absent = {i: {self.first.get(c) for c in lists[i][0] or ()} for i in self.images}
    self.open = {(i, self.first.get(c)) for i in self.images for c in lists[i][1]}

  def measures(self, results: Sequence[Mapping[str, Any]], iou_type: str) -> Measures:
    annotations, open_pairs = self._annotations(iou_type)
    coco = COCO()
    images = [{"id": i, "height": e.size[0], "width": e.size[1]} for i, e in self.images.items()]
    categories = [{"id": i, "name": category["name"]} for i, category in self.categories.items()]
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    chosen = self._results(results, iou_type)
    if self.federated:
      chosen = self._federated(chosen, {(a["image_id"], a["category_id"]) for a in annotations} | open_pairs)
    if chosen:
      answers = coco.loadRes(chosen)
    else:  # which loadRes cannot take
      answers = COCO()
      answers.dataset = coco.dataset | {"annotations": []}
      answers.createIndex()
    evaluation = _Evaluation(coco, answers, iou_type)
    evaluation.open = open_pairs
    evaluation.params.maxDets = [MOST_RESULTS[True]] if self.federated else [1, 10, MOST_RESULTS[False]]
    # A category at a time, in its images alone: of LVIS's 24 million pairs nearly all have nothing.
    pairs: dict[int, set[int]] = {category: set() for category in self.categories}
    for entry in (*annotations, *chosen):
      pairs[entry["category_id"]].add(entry["image_id"])
    found = {}
    for category, where in pairs.items():
      if where:
        evaluation.params.catIds, evaluation.params.imgIds = [category], sorted(where)
        evaluation.evaluate()
        evaluation.accumulate()
        found[category] = evaluation.eval
    return self._summary(found, evaluation.params.maxDets)

  def _annotations(self, iou_type: str) -> tuple[list[dict[str, Any]], set[tuple[int, int]]]:
    """The annotations as pycocotools reads them; (image, category) whose objects are not all among them."""
    annotations, open_pairs, maskless = [], set(self.open), []
    for i, image in self.images.items():
      for given in self._grouped[i]:
        where = f"{self.name}, image {i}, annotation {brief(given.get('id', '?'))}"
        if given.get("category_id") not in self.first:
          raise ValueError(
            f"{where} has no category_id that is listed, got {brief(given.get('category_id'))}"
          )
        category = self.first[given["category_id"]]
        try:
          annotation = _annotation(given, image)
        except ValueError as e:
          raise ValueError(f"{where}: {e}") from e
        if annotation is not None and iou_type == "segm" and "segmentation" not in annotation:
          maskless.append(where)
          annotation = None
        if annotation is None:
          open_pairs.add((i, category))
          continue
        # Numbered from 1: pycocotools takes a match with id 0 for none.
        own = {"id": len(annotations) + 1, "image_id": i, "category_id": category}
        annotations.append(annotation | own)
    if maskless and not annotations:
      raise ValueError(
        f"{maskless[0]} has no mask; evaluate boxes alone with iou_types=('bbox',) (--iou bbox)"
      )
    if maskless:
      _log.warning(
        "AP of masks leaves out %d objects without a mask; the first is %s", len(maskless), maskless[0]
      )
    return annotations, open_pairs

  def _results(self, results: Sequence[Mapping[str, Any]], iou_type: str) -> list[dict[str, Any]]:
    """The results as pycocotools reads them; of one kind: with both it takes masks' areas from the boxes."""
    chosen = []
    for k, result in enumerate(results):
      where = f"results: number {k}"
      if not isinstance(result, Mapping):
        raise ValueError(f"{where} must be an object, got {type(result).__name__}")
      i, category = result.get("image_id"), result.get("category_id")
      for key, value, known in (("image_id", i, self.images), ("category_id", category, self.first)):
        if whole(value, f"{where}: its {key}") not in known:
          raise ValueError(f"{where} has {key} {value!r}, which is not evaluated in {self.name}")
      i, category = whole(i, "image_id"), self.first[whole(category, "category_id")]
      try:
        score = numbers([result.get("score")], "score").item()
        if iou_type == "bbox":
          shape = {"bbox": _box(result.get("bbox"))}
        else:
          size = self.images[i].size
          shape = {"segmentation": rle_ops.from_segmentation(result.get("segmentation"), size)}
      except ValueError as e:
        raise ValueError(f"{where}: {e}") from e
      chosen.append({"image_id": i, "category_id": category, "score": score} | shape)
    return chosen

  def _federated(self, results: list[dict[str, Any]], present: set[tuple[int, int]]) -> list[dict[str, Any]]:
    """The best 300 results of each image, and of them those whose category is known to be there or not."""
    by_image: dict[int, list[dict[str, Any]]] = {}
    for result in results:
      by_image.setdefault(result["image_id"], []).append(result)
    kept = []
    for i, found in by_image.items():
      best = sorted(found, key=lambda result: -result["score"])[: MOST_RESULTS[True]]
      kept += [r for r in best if r["category_id"] in self.absent[i] or (i, r["category_id"]) in present]
    return kept

  def _summary(self, found: Mapping[int, Mapping[str, Any]], limits: Sequence[int]) -> Measures:
    """`found`: what pycocotools accumulated, by category."""
    keys = LVIS_MEASURES if self.federated else MEASURES
    if not found:
      return dict.fromkeys(keys)
    # Axes: IoU thresholds, recalls (of precision alone), categories, sizes (all, small, ...), limits.
    precision, recall = (
      np.concatenate([one[key] for one in found.values()], axis=-3) for key in ("precision", "recall")
    )
    values = {"AP": precision[..., 0, -1], "AP50": precision[0, ..., 0, -1], "AP75": precision[5, ..., 0, -1]}
    for k, size in enumerate(("small", "medium", "large"), 1):
      values |= {f"AP_{size}": precision[..., k, -1], f"AR_{size}": recall[..., k, -1]}
    for k, limit in enumerate(limits):
      values[f"AR{limit}"] = recall[..., 0, k]
    kinds = [self.categories[i].get("frequency") for i in found]
    for key, kind in _FREQUENCIES.items():
      values[key] = precision[:, :, [k == kind for k in kinds], 0, -1]
    return {key: _mean(values[key]) for key in keys}


class _Evaluation(COCOeval):
  """COCO's, and what is found beyond the annotated objects of an `open` (image, category) is ignored."""

  def evaluateImg(self, imgId, catId, aRng, maxDet):
    out = super().evaluateImg(imgId, catId, aRng, maxDet)
    if out is not None and (imgId, catId) in self.open:
      out["dtIgnore"] = np.logical_or(out["dtIgnore"], out["dtMatches"] == 0)
    return out


def _mean(values: np.ndarray) -> float | None:
  defined = values[values > -1]
  return float(defined.mean()) if defined.size else None


def _annotation(given: Mapping[str, Any], image: ImageEntry) -> dict[str, Any] | None:
  """What pycocotools reads of an annotation, its mask if there is one; None: nothing can be found of it."""
  mask, gone = rle_ops.read(given.get("segmentation"), image.size)
  if mask is None and gone and given.get("bbox") is None:
    return None
  if mask is not None and not rle_ops.area(mask):
    return None
  try:
    box = _box(given.get("bbox"))
  except ValueError:
    if mask is None:
      raise
    x1, y1, x2, y2 = rle_ops.bounds(mask).tolist()
    box = [x1, y1, x2 - x1, y2 - y1]
  area = box[2] * box[3] if mask is None else rle_ops.area(mask)
  if area <= 0:
    return None
  with contextlib.suppress(ValueError):
    area = numbers([given.get("area")], "area", MOST_PIXELS).item()
  shapes = {"bbox": box} if mask is None else {"bbox": box, "segmentation": mask}
  return shapes | {"area": float(area), "iscrowd": int(given.get("iscrowd", 0))}


def _box(given: Any) -> list[float]:
  values = numbers(given, "bbox [x, y, width, height]")
  if len(values) != 4:
    raise ValueError(f"bbox must be [x, y, width, height], got {brief(given)}")
  return values.tolist()
