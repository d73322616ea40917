"""What a job writes: one JSON line an image, with its instances as COCO RLE, or with the reason it has none.

A record is

    {"id": "a/b.jpg", "uri": "/photos/a/b.jpg", "width": 640, "height": 480,
     "results": [{"phrase": "a dog", "question": 0, "score": 0.91, "box": [x1, y1, x2, y2], "area": 5210,
                  "segmentation": {"size": [480, 640], "counts": "..."}}, ...]}

with "coco_id" where the source has ids of its own, or {"id", "uri", "error": code, "message"}. Results stand
question by question, in query order, as `Predictor` gives them. Scores and boxes are float32's shortest
decimals, so nothing is lost, and the same image gives the same line again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.jobs.reading import Failure
from sam3lt_jax.processing.prompts import Prompt
from sam3lt_jax.processing.results import Results, hold_masks

Record = dict[str, Any]


def image_record(item: Any, size: tuple[int, int], instances: Sequence[Record]) -> Record:
  """An image of `size` (height, width) in pixels with its `instances`, of `instance`."""
  return _head(item) | {"width": size[1], "height": size[0], "results": list(instances)}


def failure_record(item: Any, failure: Failure) -> Record:
  return _head(item) | {"error": failure.code, "message": failure.message}


def _head(item: Any) -> Record:
  head = {"id": item.id, "uri": item.uri}
  return head if item.coco_id is None else head | {"coco_id": item.coco_id}


def instance(prompt: Prompt, number: int, score: float, box: np.ndarray, mask: np.ndarray) -> Record:
  """One found instance.

  Args:
    prompt, number: what it answers, and which of the image's prompts that is.
    score: 0 to 1.
    box: float32 [4], (x1, y1, x2, y2) in pixels.
    mask: bool [H, W].
  """
  rle = rle_ops.encode(mask)
  return {
    "phrase": prompt.phrase,
    "question": int(number),
    "score": _short(score),
    "box": [_short(v) for v in box],
    "area": rle_ops.area(rle),
    "segmentation": rle_ops.jsonable(rle),
  }


def _short(value: Any) -> float:
  return float(str(np.float32(value)))


def to_line(record: Record) -> str:
  """A record as its line of JSON, without the line's end."""
  return json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def to_results(record: Record) -> Results:
  """The record of an image as `Results`, masks decoded.

  Raises:
    ValueError: the record is of a failure, or was edited into none.
  """
  if "error" in record:
    raise ValueError(
      f"record: image {record.get('id')!r} has no results ({record['error']}: {record.get('message')})"
    )
  try:
    size, found = (record["height"], record["width"]), record["results"]
    masks = (rle_ops.decode(rle_ops.from_segmentation(r["segmentation"], size)) for r in found)
    return Results(
      np.array([r["box"] for r in found], np.float32),
      np.array([r["score"] for r in found], np.float32),
      hold_masks(masks, len(found), size),
      tuple(r["phrase"] for r in found),
      size,
    )
  except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as e:
    raise ValueError(f"record: that of image {record.get('id')!r} is not as it was written ({e!r})") from e
