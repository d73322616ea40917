"""COCO's average precision of boxes and masks, through pycocotools."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sam3lt_jax.data import records as record_ops
from sam3lt_jax.data import rle as rle_ops

# In the order of pycocotools' twelve figures.
MEASURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
            "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large")  # fmt: skip
Measures = dict[str, float | None]


def coco_ap(
  ground_truth: str | os.PathLike | Mapping[str, Any],
  results: Sequence[Mapping[str, Any]],
  *,
  iou_types: Sequence[Literal["segm", "bbox"]] = ("segm", "bbox"),
  image_ids: Sequence[int] | None = None,
) -> dict[str, Measures]:
  """Average precision and recall as COCO defines them (at most 100 results an image and category).

  Masks are ordered into small, medium and large by their own area, boxes by the box's, which is what
  pycocotools does for results of the respective kind alone.

  Args:
    ground_truth: a COCO JSON file, or what it holds. `area`, `bbox`, `iscrowd` and annotation ids are filled
      in where they lack.
    results: `Results.to_coco` of every image, in one list: image_id, category_id, score, bbox (x, y, width,
      height in pixels), segmentation (RLE). May be empty.
    iou_types: what to evaluate.
    image_ids: the images to evaluate; None, all of the file.

  Returns:
    For each of `iou_types` the measures of `MEASURES`, 0 to 1; None where COCO leaves one undefined, as there
    is no object of the size.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not COCO's format; a result of an unknown image or category; masks asked for where an
      annotation has none.
  """
  from pycocotools.coco import COCO

  for iou_type in iou_types:
    if iou_type not in ("segm", "bbox"):
      raise ValueError(f"iou_types must be of 'segm' and 'bbox', got {iou_type!r}")
  data, name = record_ops.read_annotations(ground_truth)
  truth = _complete(data, name, image_ids, "segm" in iou_types)
  _check_results(results, truth, name)
  with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    return {iou_type: _evaluate(coco, results, iou_type) for iou_type in iou_types}


def _evaluate(coco: Any, results: Sequence[Mapping[str, Any]], iou_type: str) -> Measures:
  from pycocotools.coco import COCO
  from pycocotools.cocoeval import COCOeval

  # With both present loadRes would take masks' areas from the boxes.
  shape = "segmentation" if iou_type == "segm" else "bbox"
  chosen = [{key: r[key] for key in ("image_id", "category_id", "score", shape)} for r in results]
  if chosen:
    found = coco.loadRes(chosen)
  else:  # which loadRes cannot take
    found = COCO()
    found.dataset = coco.dataset | {"annotations": []}
    found.createIndex()
  evaluation = COCOeval(coco, found, iou_type)
  evaluation.evaluate()
  evaluation.accumulate()
  evaluation.summarize()
  return {key: float(v) if v >= 0 else None for key, v in zip(MEASURES, evaluation.stats)}


def _complete(
  data: Mapping[str, Any], name: str, image_ids: Sequence[int] | None, masks: bool
) -> dict[str, Any]:
  """A data set of the chosen images with all that pycocotools reads."""
  known = {entry["id"]: entry for entry in data["images"]}
  chosen = list(known) if image_ids is None else list(dict.fromkeys(image_ids))
  strange = [i for i in chosen if i not in known]
  if strange:
    raise ValueError(f"image_ids: {name} has no image {strange[0]}")
  categories = data.get("categories") or []
  if not categories:
    raise ValueError(f"{name} lists no categories")
  grouped = record_ops.annotations_by_image(data, name)
  annotations = []
  for image_id in chosen:
    _, size = record_ops.image_entry(known[image_id], name)
    for annotation in grouped[image_id]:
      # Numbered from 1: pycocotools takes a match with id 0 for none.
      annotations.append(_annotation(annotation, size, name, masks) | {"id": len(annotations) + 1})
  return {"images": [known[i] for i in chosen], "categories": categories, "annotations": annotations}


def _annotation(given: Mapping[str, Any], size: tuple[int, int], name: str, masks: bool) -> dict[str, Any]:
  where = f"{name}, image {given['image_id']}, annotation {given.get('id', '?')}"
  if "category_id" not in given:
    raise ValueError(f"{where} has no category_id")
  segmentation = given.get("segmentation") or None
  if masks and segmentation is None:
    raise ValueError(f"{where} has no mask; evaluate boxes alone with iou_types=('bbox',) (--iou bbox)")
  out = {key: given[key] for key in ("image_id", "category_id")} | {
    "iscrowd": int(record_ops.is_crowd(given))
  }
  if segmentation is not None:
    try:
      out["segmentation"] = rle_ops.from_segmentation(segmentation, size, allow_empty=True)
    except ValueError as e:
      raise ValueError(f"{where}: {e}") from e
  box = given.get("bbox")
  if box is None and segmentation is not None:
    x1, y1, x2, y2 = rle_ops.bounds(out["segmentation"]).tolist()
    box = [x1, y1, x2 - x1, y2 - y1]
  if not isinstance(box, (list, tuple)) or len(box) != 4:
    raise ValueError(f"{where}: bbox must be [x, y, width, height], got {box!r}")
  area = given.get("area")
  if area is None:
    area = box[2] * box[3] if segmentation is None else rle_ops.area(out["segmentation"])
  return out | {"bbox": list(box), "area": float(area)}


def _check_results(results: Sequence[Mapping[str, Any]], truth: Mapping[str, Any], name: str) -> None:
  for key, entries in (("image_id", truth["images"]), ("category_id", truth["categories"])):
    known = {entry["id"] for entry in entries}
    for i, result in enumerate(results):
      if result.get(key) not in known:
        raise ValueError(
          f"results: number {i} has {key} {result.get(key)!r}, which is not evaluated in {name}"
        )
