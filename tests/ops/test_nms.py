"""Suppression by hand and against a plain loop."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sam3lt_jax.ops.nms import box_iou, box_nms


def plain(boxes, scores, valid, threshold):
  kept = []
  for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
    if valid[i] and all(iou(boxes[i], boxes[k]) <= threshold for k in kept):
      kept.append(i)
  return np.isin(np.arange(len(scores)), kept)


def iou(a, b):
  both = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
  union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both
  return both / union if union else 0.0


def test_by_hand():
  boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 3], [2, 2, 6, 6], [5, 5, 5, 5]], np.float32)
  np.testing.assert_allclose(box_iou(boxes)[0], [1, 0.75, 4 / 28, 0])
  scores = np.array([0.8, 0.9, 0.7, 0.6], np.float32)
  assert box_nms(boxes, scores, np.ones(4, bool), 0.7).tolist() == [False, True, True, True]
  assert box_nms(boxes, scores, np.array([1, 0, 1, 1], bool), 0.7).tolist() == [True, False, True, True]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_as_a_plain_loop(threshold):
  rng = np.random.default_rng(0)
  boxes = rng.integers(0, 12, (40, 2, 2))
  boxes = np.sort(boxes, axis=1).reshape(40, 4).astype(np.float32)
  scores = rng.integers(0, 8, 40).astype(np.float32)  # many are equal
  valid = rng.random(40) < 0.8
  got = jax.jit(box_nms, static_argnums=3)(boxes, scores, valid, threshold)
  np.testing.assert_array_equal(got, plain(boxes, scores, valid, threshold))
