"""Stability by hand."""

from __future__ import annotations

import numpy as np

from sam3lt_jax.ops.stability import stability


def test_by_hand():
  logits = np.array([[[3.0, 0.5], [-0.5, -3.0]], [[-9.0, -9.0], [-9.0, -9.0]]], np.float32)
  # Above 1: one cell, above -1: three. Nothing above -1: as stable as can be.
  np.testing.assert_allclose(stability(logits, 1.0), [1 / 3, 1.0])
  np.testing.assert_allclose(stability(logits, 0.0), [1.0, 1.0])
