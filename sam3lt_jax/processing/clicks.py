"""Clicks, outlines and masks as a user gives them, checked and lined up as the tracker takes them.

Axes: P objects, N points of an object, H, W the image, h, w its token grid.
Source of the conventions: segment-anything's `SamPredictor`, transformers 5.23.0 `Sam3TrackerProcessor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.ops.interpolation import interpolation_matrix
from sam3lt_jax.processing.arrays import plain, to_numpy

CORNERS = (2, 3)  # labels of a box's top-left and bottom-right corner
GIVEN_MASK = 10.0  # logit of a pixel of a mask that is given as such; the reference's, too

_POINTS = "[x, y], [[x, y], ...] of one object or [[[x, y], ...], ...] of several, in pixels"


class ClickArrays(NamedTuple):
  """`features.Clicks` on the host: the same fields, of numpy arrays. `Sam3Tracker` takes either."""

  points: np.ndarray
  labels: np.ndarray
  valid: np.ndarray
  masks: np.ndarray | None = None
  has_mask: np.ndarray | None = None
  image_index: np.ndarray | None = None


def clicks_of(
  size: tuple[int, int],
  mask_side: int,
  points: Any = None,
  labels: Any = None,
  boxes: Any = None,
  masks: Any = None,
  *,
  names: tuple[str, str, str, str] = ("points", "point_labels", "box", "mask"),
  accepted: Sequence[int] = (0, 1),
) -> ClickArrays:
  """One row an object.

  Args:
    size: (height, width) of the image.
    mask_side: of the logits that the model takes and gives, 4 times its token grid.
    points: in pixels of the image, [2], [N, 2] (one object) or [P, N, 2]; lists may be ragged.
    labels: 1 on the object, 0 off it, nested as `points`; None: all 1.
    boxes: outlines, (x1, y1, x2, y2) in pixels, [4] or [P, 4].
    masks: to start from: bool [H, W] or [P, H, W] of the image, or logits [mask_side, mask_side] or
      [P, mask_side, mask_side] of an earlier answer.
    names: what the caller's user knows these four by.
    accepted: labels that may be given, see `features.Clicks`.

  Returns:
    As many rows as objects, as many slots as the object with most points needs, box corners first.

  Raises:
    ValueError: naming the argument, what came and what is accepted.
  """
  points_name, labels_name, box_name, mask_name = names
  if points is None and boxes is None and masks is None:
    raise ValueError(f"nothing to look for: give {points_name}, {box_name} or {mask_name}")
  if points is None and labels is not None:
    raise ArgumentError(labels_name, f" were given without {points_name}")
  rows = [] if points is None else _point_rows(points, labels, size, points_name, labels_name, accepted)
  corners = None if boxes is None else _boxes(boxes, size, box_name)
  given = None if masks is None else _masks(masks, size, mask_side, mask_name)
  named = ((points_name, rows or None), (box_name, corners), (mask_name, given))
  counts = {name: len(value) for name, value in named if value is not None}
  if len(set(counts.values())) > 1:
    told = ", ".join(f"{name} for {count}" for name, count in counts.items())
    raise ValueError(f"{' and '.join(counts)} must be for the same objects, one each; got {told}")
  P = next(iter(counts.values()))
  if not rows:
    rows = [(np.zeros((0, 2)), np.zeros(0, np.int32))] * P
  if corners is not None:
    pair = np.array(CORNERS, np.int32)
    rows = [
      (np.concatenate([box.reshape(2, 2), xy]), np.concatenate([pair, kind]))
      for box, (xy, kind) in zip(corners, rows)
    ]
  N = max(1, *(len(kind) for _, kind in rows))
  xy, kinds, valid = np.zeros((P, N, 2), np.float32), np.zeros((P, N), np.int32), np.zeros((P, N), bool)
  for p, (row, kind) in enumerate(rows):
    xy[p, : len(row)] = row / (size[1], size[0])
    kinds[p, : len(kind)], valid[p, : len(kind)] = kind, True
  has_mask = None if given is None else np.ones(P, bool)
  return ClickArrays(xy, kinds, valid, given, has_mask)


def _point_rows(
  points: Any, labels: Any, size: tuple[int, int], name: str, labels_name: str, accepted: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """(points [N, 2], labels [N]) of each object."""
  points = plain(points, name)
  depth = _depth(points)
  if depth not in (1, 2, 3):
    raise ArgumentError(name, f" must be {_POINTS}, got {points!r:.80}")
  if labels is not None:
    labels = plain(labels, labels_name)
    if _depth(labels) != depth - 1:
      raise ArgumentError(labels_name, f" must be nested as {name}, one number a point, got {labels!r:.80}")
  for _ in range(3 - depth):
    points, labels = [points], None if labels is None else [labels]
  if labels is not None and len(labels) != len(points):
    raise ArgumentError(labels_name, f" are for {len(labels)} objects, {name} for {len(points)}")
  rows = []
  for p, row in enumerate(points):
    which = f": object {p}" if len(points) > 1 else ""
    if not row:
      raise ArgumentError(name, f"{which} must hold at least one point, got none")
    try:
      xy = np.asarray(row, np.float64).reshape(len(row), 2)
    except (TypeError, ValueError, OverflowError):
      raise ArgumentError(name, f"{which} must be [[x, y], ...] in pixels, got {row!r:.80}") from None
    if not np.isfinite(xy).all():
      raise ArgumentError(name, f"{which} must be finite, got {xy.tolist()!r:.80}")
    kind = [1] * len(xy) if labels is None else labels[p]
    if len(kind) != len(xy):
      raise ArgumentError(labels_name, f"{which} must be one a point: {len(xy)} expected, got {len(kind)}")
    for label in kind:
      if isinstance(label, (str, bytes)) or label not in accepted:
        raise ArgumentError(labels_name, f"{which} must be 1 (on the object) or 0 (off it), got {label!r}")
    outside = ((xy < 0) | (xy > (size[1], size[0]))) & np.isin(kind, (0, 1))[:, None]  # padding may
    if outside.any():
      k = int(np.flatnonzero(outside.any(axis=1))[0])
      raise ArgumentError(
        name, f"{which} must lie in the image of {size[1]}x{size[0]} pixels, got {xy[k].tolist()}"
      )
    rows.append((xy, np.asarray(kind, np.int32)))
  return rows


def _boxes(boxes: Any, size: tuple[int, int], name: str) -> np.ndarray:
  """float64 [P, 4]."""
  accepted = "(x1, y1, x2, y2) in pixels, one an object"
  given = plain(boxes, name)
  try:
    array = np.atleast_2d(np.asarray(given, np.float64))
  except (TypeError, ValueError, OverflowError):
    array = np.zeros(0)
  if array.ndim == 3:
    raise ArgumentError(name, f" must be one an object, got several for one: {given!r:.80}")
  if array.ndim != 2 or array.shape[1] != 4 or not len(array):
    raise ArgumentError(name, f" must be {accepted}, got {given!r:.80}")
  for box in array:
    if not np.isfinite(box).all():
      raise ArgumentError(name, f" must be finite, got {box.tolist()}")
    if box[2] < box[0] or box[3] < box[1]:
      raise ArgumentError(name, f" must have x1 <= x2 and y1 <= y2, got {box.tolist()}")
    if box[2] <= 0 or box[3] <= 0 or box[0] >= size[1] or box[1] >= size[0]:
      raise ArgumentError(name, f" must meet the image of {size[1]}x{size[0]} pixels, got {box.tolist()}")
  return array


def _masks(masks: Any, size: tuple[int, int], side: int, name: str) -> np.ndarray:
  """float32 [P, side, side] logits."""
  height, width = size
  accepted = f"bool [{height}, {width}] as the image or logits [{side}, {side}] of an answer, one an object"
  array = to_numpy(masks, name)
  if array.dtype.kind not in "bfiu":
    raise ArgumentError(name, f" must be {accepted}, got {array.dtype}")
  array = array[None] if array.ndim == 2 else array
  whole = array.ndim == 3 and array.shape[1:] == tuple(size)
  if (not whole and (array.ndim != 3 or array.shape[1:] != (side, side))) or not len(array):
    raise ArgumentError(name, f" must be {accepted}, got an array of shape {array.shape}")
  if array.dtype.kind == "f" and not np.isfinite(array).all():
    raise ArgumentError(name, " must be finite, got NaN or infinity")
  if array.dtype.kind == "f" and array.shape[1:] == (side, side):
    return array.astype(np.float32)
  if not np.isin(array, (0, 1)).all():
    raise ArgumentError(name, f" must be {accepted}; this one is no logits and holds more than 0 and 1")
  return np.stack([mask_logits(mask > 0, side) for mask in array])


def mask_logits(mask: np.ndarray, side: int) -> np.ndarray:
  """bool [H, W] -> float32 [side, side]: the share of each cell, from -10 to 10."""
  rows, columns = (_shares(n, side) for n in mask.shape)
  return (2 * GIVEN_MASK * (rows @ mask.astype(np.float32) @ columns.T) - GIVEN_MASK).astype(np.float32)


def _shares(length: int, side: int) -> np.ndarray:
  """float32 [side, length]: the mean over each of `side` equal parts; where enlarging, linear."""
  if length <= side:
    return interpolation_matrix(length, side)
  edges = np.linspace(0, length, side + 1)
  low, high = edges[:-1, None], edges[1:, None]
  pixel = np.arange(length)
  overlap = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None)
  return (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)


def _depth(value: Any) -> int:
  depth = 0
  while isinstance(value, list):
    depth, value = depth + 1, value[0] if value else None
  return depth
