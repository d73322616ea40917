"""COCO's run-length masks: reading every form of them, with checks that pycocotools leaves out.

pycocotools trusts what it is given: a string of runs that is too short decodes to whatever the memory held,
and masks of different sizes have an IoU of -1. Everything here ends in a compressed RLE that is sound:
`{"size": [H, W], "counts": bytes}`, runs down the columns, the first one of zeros.

Source: the COCO API's `maskApi.c` (`rleFrString`, `rleFrPoly`) for the format.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

Rle = dict[str, Any]
_FARTHEST = 1e5  # pixels; a polygon's outline is walked step by step, so an absurd corner would take for ever


def encode(mask: np.ndarray) -> Rle:
  """bool [H, W] to RLE."""
  rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
  return {"size": [int(s) for s in rle["size"]], "counts": rle["counts"]}


def decode(rle: Rle) -> np.ndarray:
  """RLE to bool [H, W]."""
  return coco_mask.decode(rle).astype(bool)


def area(rle: Rle) -> int:
  """Pixels of the mask."""
  return int(coco_mask.area(rle))


def bounds(rle: Rle) -> np.ndarray:
  """The box around the mask, float32 [4] (x1, y1, x2, y2) in pixels, edges outside the outermost pixels."""
  x, y, width, height = coco_mask.toBbox(rle).tolist()
  return np.array([x, y, x + width, y + height], np.float32)


def mask_bounds(mask: np.ndarray) -> np.ndarray | None:
  """As `bounds`, of a bool [H, W]; None for an empty mask."""
  rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  if not len(rows):
    return None
  return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def jsonable(rle: Rle) -> Rle:
  """The RLE with its counts as a string, as JSON holds it."""
  return {"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode("ascii")}


def from_segmentation(segmentation: Any, size: tuple[int, int], allow_empty: bool = False) -> Rle:
  """An annotation's `segmentation` to RLE.

  Args:
    segmentation: polygons [[x1, y1, x2, y2, ...], ...] in pixels, or an RLE with its counts as a list or as a
      compressed string.
    size: (height, width) of the image.
    allow_empty: a mask without a pixel is no error.

  Raises:
    ValueError: saying what is wrong with it: another form, another size, runs that do not cover the image, a
      polygon of under three corners, no pixel at all.
  """
  if isinstance(segmentation, dict):
    rle = _from_runs(segmentation, size)
  elif isinstance(segmentation, (list, tuple)) and len(segmentation):
    polygons = [_polygon(points) for points in segmentation]
    rle = coco_mask.merge(coco_mask.frPyObjects(polygons, *size))
  else:
    raise ValueError(f"segmentation must be polygons or an RLE, got {_short(segmentation)}")
  if not allow_empty and not area(rle):
    raise ValueError("the mask holds no pixel")
  return {"size": list(size), "counts": rle["counts"]}


def _polygon(points: Any) -> list[float]:
  try:
    values = np.asarray(points, np.float64)
  except (TypeError, ValueError):
    values = np.zeros(0)
  if values.ndim != 1 or len(values) < 6 or len(values) % 2:
    raise ValueError(f"a polygon must be [x1, y1, x2, y2, x3, y3, ...], got {_short(points)}")
  if not (np.abs(values) <= _FARTHEST).all():  # written so that NaN fails
    raise ValueError(f"a polygon's corners must be finite and within {_FARTHEST:g} pixels")
  return values.tolist()


def _from_runs(segmentation: dict[str, Any], size: tuple[int, int]) -> Rle:
  counts, given = segmentation.get("counts"), segmentation.get("size")
  try:
    fits = [int(s) for s in given] == list(size)
  except (TypeError, ValueError):
    fits = False
  if not fits:
    raise ValueError(f"the RLE's size {given} is not (height, width) of the image, {list(size)}")
  if isinstance(counts, str):
    counts = counts.encode("ascii", errors="replace")
  if isinstance(counts, bytes):
    runs = _runs(counts)
  else:
    try:
      runs = np.asarray(counts, np.int64)
    except (TypeError, ValueError):
      runs = None
    if runs is None or runs.ndim != 1:
      raise ValueError(f"an RLE's counts must be a list of whole numbers or a string, got {_short(counts)}")
  if (runs < 0).any() or runs.sum() != size[0] * size[1]:
    raise ValueError(f"the RLE's runs add up to {runs.sum()} pixels of {size[0] * size[1]}")
  if isinstance(counts, bytes):
    return {"size": list(size), "counts": counts}
  return coco_mask.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size)


def _runs(text: bytes) -> np.ndarray:
  """A compressed string to its runs, int64 [R].

  Each number takes one or more characters of 6 bits (minus 48): 5 of the number, lowest first, and one that
  says whether more follow; the last character's fifth bit is the sign. From the fourth number on they are
  differences to the number two before.
  """
  chars = np.frombuffer(text, np.uint8).astype(np.int64) - 48
  last = (chars & 0x20) == 0
  if not len(chars) or chars.min() < 0 or chars.max() > 63 or not last[-1]:
    raise ValueError("the RLE's string of counts is damaged")
  ends = np.flatnonzero(last)
  starts = np.concatenate([[0], ends[:-1] + 1])
  place = np.arange(len(chars)) - np.repeat(starts, ends - starts + 1)
  if place.max() > 6:
    raise ValueError("the RLE's string of counts is damaged")
  numbers = np.add.reduceat((chars & 0x1F) << (5 * place), starts)
  negative = (chars[ends] & 0x10) != 0
  numbers -= np.where(negative, np.int64(1) << (5 * (ends - starts + 1)), 0)
  numbers[1::2] = np.cumsum(numbers[1::2])
  numbers[2::2] = np.cumsum(numbers[2::2])
  return numbers


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else f"{text[:57]}..."
