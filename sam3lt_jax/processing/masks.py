"""What is read off a mask on the host: the box around it, its small parts, its holes and specks.

Source of `clean`: the post-processing of the authors' image predictor (SAM 2's `SAM2Transforms`).
"""

from __future__ import annotations

import numpy as np

from sam3lt_jax.errors import needed

FILLED = 10.0  # how far beyond the threshold a changed cell is set


def mask_bounds(mask: np.ndarray) -> np.ndarray | None:
  """The box around bool [H, W], float32 [4] (x1, y1, x2, y2) in pixels, edges outside the outermost pixels;
  None for an empty mask.
  """
  rows = np.flatnonzero(mask.any(axis=1))
  if not len(rows):
    return None
  columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
  return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def mask_box(mask: np.ndarray) -> np.ndarray:
  """As `mask_bounds`; zeros for an empty mask."""
  bounds = mask_bounds(mask)
  return np.zeros(4, np.float32) if bounds is None else bounds


def drawing_order(areas: np.ndarray) -> list[int]:
  """Indices from the largest area to the smallest, so that what is drawn last, on top, is the smaller."""
  return np.argsort(-areas, kind="stable").tolist()


def clean(logits: np.ndarray, hole_area: int = 0, speck_area: int = 0, threshold: float = 0.0) -> np.ndarray:
  """Fills holes and takes out specks of up to so many cells, 8-connected; what is larger stays.

  Args:
    logits: float [h, w]. Both kinds are looked for in them as they come.
    hole_area, speck_area: cells; 0 leaves that kind alone.
    threshold: above it a cell is on the mask.

  Returns:
    float32 [h, w].
  """
  out = np.array(logits, np.float32)
  for area, inside, value in (
    (hole_area, logits <= threshold, threshold + FILLED),
    (speck_area, logits > threshold, threshold - FILLED),
  ):
    if area:
      out[small_parts(inside, area)] = value
  return out


def cleaned(mask: np.ndarray, hole_area: int = 0, speck_area: int = 0) -> np.ndarray:
  """As `clean`, of bool [H, W]; but the largest part stays."""
  out = mask.copy()
  if hole_area:
    out |= small_parts(~mask, hole_area)
  if speck_area and mask.any():
    out &= ~small_parts(mask, speck_area) | largest_part(mask)
  return out


def outline(mask: np.ndarray) -> np.ndarray:
  """A polygon around the pixels of bool [H, W], float64 [K, 2] (x, y); K is 0 for an empty mask.

  It runs half-way between the middles of pixels on and off the mask. Several parts, and holes, are joined to
  one ring by bridges of no width, which whoever fills the polygon does not see.

  Raises:
    ImportError: contourpy is not installed.
  """
  with needed("polygons need", "contourpy", "viz"):
    import contourpy
  import scipy.spatial

  bounds = mask_bounds(mask)
  if bounds is None:
    return np.zeros((0, 2))
  x1, y1, x2, y2 = bounds.astype(int)
  lines = contourpy.contour_generator(z=np.pad(mask[y1:y2, x1:x2], 1).astype(np.float32)).lines(0.5)
  rings = sorted((_turns(line[:-1]) for line in lines), key=len, reverse=True)
  joined = rings[0]
  for ring in rings[1:]:
    distances, nearest = scipy.spatial.KDTree(joined).query(ring)
    here = int(distances.argmin())
    there = int(nearest[here])
    joined = np.concatenate([joined[: there + 1], np.roll(ring, -here, axis=0), ring[[here]], joined[there:]])
  return joined + (x1 - 0.5, y1 - 0.5)


def _turns(ring: np.ndarray) -> np.ndarray:
  """The points [K, 2] of a ring at which it turns."""
  before, after = ring - np.roll(ring, 1, axis=0), np.roll(ring, -1, axis=0) - ring
  return ring[np.abs(before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]) > 1e-9]


def small_parts(inside: np.ndarray, area: int) -> np.ndarray:
  """bool [h, w]: the 8-connected parts of `inside` that have up to `area` cells."""
  labels, sizes = _parts(inside)
  small = sizes <= area
  small[0] = False
  return small[labels]


def largest_part(inside: np.ndarray) -> np.ndarray:
  """bool [h, w]: the 8-connected part of `inside`, which has one, with the most cells."""
  labels, sizes = _parts(inside)
  return labels == 1 + sizes[1:].argmax()


def _parts(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """int [h, w], the number of each cell's part from 1 on, 0 outside; and how many cells each number has."""
  import scipy.ndimage  # 0.1 s, which only who cleans masks pays

  labels, _ = scipy.ndimage.label(inside, np.ones((3, 3), bool))
  return labels, np.bincount(labels.ravel())
