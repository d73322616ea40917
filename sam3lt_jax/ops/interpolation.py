"""1-D linear resampling as torch does it, in numpy: as taps (two neighbours and a weight) and as a matrix.

Source: torch `interpolate(mode="bilinear", align_corners=False)`; `antialias_matrix` is the one with
antialias=True.
"""

from __future__ import annotations

import functools

import numpy as np


@functools.lru_cache(maxsize=64)
def taps(in_size: int, out_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Lower and upper source index and the upper one's weight, each [out_size]."""
  # torch computes the source position in float32 with a fused multiply-add: one rounding, which float64 and a
  # cast give as well. Rounding the product too would be off by 1e-5 of a cell, 5e-4 in a steep logit map.
  scale = np.float64(np.float32(in_size) / np.float32(out_size))
  source = np.maximum((scale * (np.arange(out_size) + 0.5) - 0.5).astype(np.float32), 0)
  low = np.minimum(source.astype(np.int64), in_size - 1)
  return low, np.minimum(low + 1, in_size - 1), np.clip(source - low.astype(np.float32), 0, 1)


@functools.lru_cache(maxsize=64)
def interpolation_matrix(in_size: int, out_size: int, padded_size: int | None = None) -> np.ndarray:
  """Linear resampling of one axis as a matrix: y = A @ x.

  torch's bilinear `interpolate` with align_corners=False and no antialiasing, for enlarging and shrinking
  alike. The matrix carries the sizes as data, so that one compiled `upsample_masks` serves every image size
  in a bucket.

  Args:
    in_size: length of x.
    out_size: length of the result.
    padded_size: rows of A, at least out_size; the rows past out_size are zero. None: out_size.

  Returns:
    float32 [padded_size, in_size], read-only (the matrices are cached).
  """
  padded_size = out_size if padded_size is None else padded_size
  if in_size < 1 or out_size < 1 or padded_size < out_size:
    raise ValueError(
      f"sizes must be at least 1 and padded_size at least out_size, got {in_size}, {out_size}, {padded_size}"
    )
  low, high, weight = taps(in_size, out_size)
  rows = np.arange(out_size)
  matrix = np.zeros((padded_size, in_size), np.float32)
  matrix[rows, low] += 1 - weight
  matrix[rows, high] += weight
  matrix.setflags(write=False)
  return matrix


@functools.lru_cache(maxsize=16)
def antialias_matrix(in_size: int, out_size: int) -> np.ndarray:
  """Shrinking of one axis as a matrix: each result is a mean of its surroundings, weighted by a triangle.

  torch's `interpolate` with antialias=True. float32 [out_size, in_size], read-only.
  """
  if not 0 < out_size <= in_size:
    raise ValueError(f"antialias_matrix shrinks: out_size must be from 1 to {in_size}, got {out_size}")
  # In float32 step by step, as torch: exact weights would move an edge that lies between two pixels.
  half, one = np.float32(0.5), np.float32(1)
  scale = np.float32(in_size) / np.float32(out_size)
  centre = scale * (np.arange(out_size, dtype=np.float32)[:, None] + half)
  distance = np.arange(in_size, dtype=np.float32) - centre + half
  weights = np.maximum(0, one - np.abs(distance * (one / scale)))
  matrix = weights / weights.sum(axis=1, keepdims=True)
  matrix.setflags(write=False)
  return matrix
