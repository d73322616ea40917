"""`Results.from_coco`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from sam3lt_jax.data import rle
from sam3lt_jax.processing.results import Results, hold_masks


def read(coco: Mapping[str, Any] | str | os.PathLike, image_id: int | str | None) -> Results:
  """See `Results.from_coco`."""
  if not isinstance(coco, Mapping):
    with open(coco, encoding="utf-8") as f:
      coco = json.load(f)
  try:
    images = {image["id"]: image for image in coco["images"]}
    if image_id is None:
      if len(images) != 1:
        raise ValueError(f"image_id must be given for a data set of {len(images)} images")
      (image_id,) = images
    if image_id not in images:
      raise ValueError(f"image_id must be the id of one of {len(images)} images, got {image_id!r}")
    size = int(images[image_id]["height"]), int(images[image_id]["width"])
    names = {category["id"]: category["name"] for category in coco.get("categories", ())}
    rows, masks, boxes = [], [], []
    for row in coco.get("annotations", ()):
      if row["image_id"] != image_id:
        continue
      try:
        mask, _ = rle.read(row.get("segmentation"), size)
      except ValueError as e:
        raise ValueError(f"annotation {row.get('id')!r}: {e}") from e
      if mask is None:
        continue
      rows.append(row)
      masks.append(mask)
      boxes.append(rle.bounds(mask))
      if "bbox" in row:
        x, y, width, height = row["bbox"]
        boxes[-1] = x, y, x + width, y + height
    return Results(
      np.reshape(np.array(boxes, np.float32), (len(rows), 4)),
      [row.get("score", 1.0) for row in rows],
      hold_masks(map(rle.decode, masks), len(rows), size),
      [names.get(row["category_id"], row["category_id"]) for row in rows],
      size,
      ids=[row["track_id"] for row in rows] if rows and all("track_id" in row for row in rows) else None,
    )
  except KeyError as e:
    raise ValueError(f"coco must be a COCO data set: an entry of it has no {e}") from e
