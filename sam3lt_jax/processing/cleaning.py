"""Holes and specks of a mask, by the connected parts of its low-resolution logits; on the host.

Source: the post-processing of the authors' image predictor (SAM 2's `SAM2Transforms.postprocess_masks`).
"""

from __future__ import annotations

import numpy as np
import scipy.ndimage

_EIGHT = np.ones((3, 3), bool)
FILLED = 10.0  # how far beyond the threshold a changed cell is set


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


def small_parts(inside: np.ndarray, area: int) -> np.ndarray:
  """bool [h, w]: the 8-connected parts of `inside` that have up to `area` cells."""
  labels, _ = scipy.ndimage.label(inside, _EIGHT)
  small = np.bincount(labels.ravel()) <= area
  small[0] = False
  return small[labels]
