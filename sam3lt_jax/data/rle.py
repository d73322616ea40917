"""COCO's run-length masks: reading every form of them, with checks that pycocotools leaves out.

pycocotools trusts what it is given: a string of runs that is too short decodes to whatever the memory held,
and masks of different sizes have an IoU of -1. Everything here ends in a compressed RLE that is sound:
`{"size": [H, W], "counts": bytes}`, runs down the columns, the first one of zeros.

Source: the COCO API's `maskApi.c` (`rleFrString`, `rleFrPoly`) for the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from sam3lt_jax.data.numbers import brief, image_size, numbers, wholes

Rle = dict[str, Any]
_LONGEST = 4e6  # pixels of outline, which is walked step by step: an absurd corner would take for ever


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


def jsonable(rle: Rle) -> Rle:
  """The RLE with its counts as a string, as JSON holds it."""
  return {"size": [int(s) for s in rle["size"]], "counts": rle["counts"].decode("ascii")}


def described(mask: np.ndarray) -> dict[str, Any]:
  """What an annotation says of a mask, bool [H, W]: `area` in pixels and `segmentation`, as JSON holds it."""
  rle = encode(mask)
  return {"area": area(rle), "segmentation": jsonable(rle)}


def from_segmentation(segmentation: Any, size: tuple[int, int]) -> Rle:
  """As `read`, of what has to be a mask; ValueError where there is none."""
  rle, _ = read(segmentation, size)
  if rle is None:
    raise ValueError(f"segmentation must be polygons or an RLE, got {brief(segmentation)}")
  return rle


def read(segmentation: Any, size: tuple[int, int]) -> tuple[Rle | None, int]:
  """An annotation's `segmentation` to RLE.

  Args:
    segmentation: polygons [[x1, y1, x2, y2, ...], ...] in pixels, or an RLE with its counts as a list or as a
      compressed string. None, [] and [[]] are ways to write that there is no mask.
    size: (height, width) of the image.

  Returns:
    The RLE, which may be without a pixel, or None where there is no mask; and how many polygons were left
    out, because they have fewer than three corners or an odd number of coordinates.

  Raises:
    ValueError: saying what is wrong with it: another form, another size, runs that do not cover the image,
      coordinates that no image has.
  """
  size = image_size(*size, "a mask")
  if isinstance(segmentation, Mapping):
    return _from_runs(segmentation, size), 0
  if segmentation is None:
    return None, 0
  if not isinstance(segmentation, (list, tuple)):
    raise ValueError(f"segmentation must be polygons or an RLE, got {brief(segmentation)}")
  parts = [numbers(points, "a polygon [x1, y1, x2, y2, x3, y3, ...]") for points in segmentation]
  polygons = [points for points in parts if len(points) >= 6 and len(points) % 2 == 0]
  gone = sum(len(points) > 0 for points in parts) - len(polygons)
  if not polygons:
    return None, gone
  if sum(map(_outline, polygons)) > _LONGEST:
    raise ValueError(f"the outline of its polygons is longer than {_LONGEST:,.0f} pixels")
  rle = coco_mask.merge(coco_mask.frPyObjects([points.tolist() for points in polygons], *size))
  return {"size": list(size), "counts": rle["counts"]}, gone


def _outline(points: np.ndarray) -> float:
  """The steps around a polygon: pycocotools makes each of them, with memory for it."""
  corners = points.reshape(-1, 2)
  return float(np.abs(np.diff(corners, axis=0, append=corners[:1])).max(1).sum())


def _from_runs(segmentation: Mapping[str, Any], size: tuple[int, int]) -> Rle:
  counts, given = segmentation.get("counts"), segmentation.get("size")
  try:
    fits = wholes(given, "size").tolist() == list(size)
  except ValueError:
    fits = False
  if not fits:
    raise ValueError(f"the RLE's size {brief(given)} is not (height, width) of the image, {list(size)}")
  if isinstance(counts, str):
    counts = counts.encode("ascii", errors="replace")
  runs = _runs(counts) if isinstance(counts, bytes) else wholes(counts, "an RLE's counts (or their string)")
  pixels = size[0] * size[1]
  if (runs < 0).any() or (runs > pixels).any() or runs.sum() != pixels:
    raise ValueError(f"the RLE's runs add up to {sum(runs.tolist())} pixels of {pixels}")
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
