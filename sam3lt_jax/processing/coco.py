"""`Results.from_coco`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sam3lt_jax.processing.results import Results, hold_masks


def read(coco: Mapping[str, Any] | str | os.PathLike, image_id: int | str | None) -> Results:
  """See `Results.from_coco`."""
  if not isinstance(coco, Mapping):
    with open(coco, encoding="utf-8") as f:
      coco = json.load(f)
  try:
    return _read(coco, image_id)
  except KeyError as e:
    raise ValueError(f"coco must be a COCO data set: an entry of it has no {e}") from e


def _read(coco: Mapping[str, Any], image_id: int | str | None) -> Results:
  from sam3lt_jax.data import rle as rle_ops

  images = {image["id"]: image for image in coco["images"]}
  if image_id is None and len(images) != 1:
    raise ValueError(f"image_id must be given for a data set of {len(images)} images")
  if image_id is not None and image_id not in images:
    raise ValueError(f"image_id must be the id of one of {len(images)} images, got {image_id!r}")
  image = images[image_id] if image_id is not None else next(iter(images.values()))
  names = {category["id"]: category["name"] for category in coco.get("categories", ())}
  size = int(image["height"]), int(image["width"])
  rows, masks = [], []
  for row in coco.get("annotations", ()):
    if row["image_id"] != image["id"]:
      continue
    try:
      rle, _ = rle_ops.read(row.get("segmentation"), size)
    except ValueError as e:
      raise ValueError(f"annotation {row.get('id')!r}: {e}") from e
    if rle is not None:
      rows.append(row)
      masks.append(rle)
  boxes = [_corners(row["bbox"]) if "bbox" in row else rle_ops.bounds(m) for row, m in zip(rows, masks)]
  return Results(
    np.reshape(np.array(boxes, np.float32), (len(rows), 4)),
    np.array([row.get("score", 1.0) for row in rows], np.float32),
    hold_masks(map(rle_ops.decode, masks), len(rows), size),
    tuple(names.get(row["category_id"], str(row["category_id"])) for row in rows),
    size,
    ids=[row["track_id"] for row in rows] if rows and all("track_id" in row for row in rows) else None,
  )


def _corners(bbox: Sequence[float]) -> tuple[float, float, float, float]:
  x, y, width, height = bbox
  return x, y, x + width, y + height
