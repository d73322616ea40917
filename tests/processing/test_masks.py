"""What is read off a mask: holes and specks against the authors' post-processing, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from sam3lt_jax.ops.interpolation import interpolation_matrix
from sam3lt_jax.processing.masks import clean
from tests.checkpoints.common import fixture


@pytest.mark.parametrize(
  ("name", "hole", "speck"),
  [("hole_0", 0, 0), ("hole_6", 6, 0), ("hole_256", 256, 0), ("hole_6_sprinkle_6", 6, 6)],
)
def test_as_the_authors(name, hole, speck):
  low, want = (fixture("tracker")[f"image_postprocess/{key}"] for key in ("low_res", name))
  rows, columns = (interpolation_matrix(low.shape[-1], n) for n in want.shape[-2:])
  got = np.stack([rows @ clean(x, hole, speck) @ columns.T for x in low])
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_hole_and_a_speck_by_hand():
  logits = np.full((6, 6), -1.0)
  logits[:4, :4] = 1.0
  logits[1, 1] = 0.0  # at the threshold: not on the mask
  logits[5, 5] = 2.0
  cleaned = clean(logits, hole_area=1, speck_area=1)
  assert cleaned[1, 1] == 10.0 and cleaned[5, 5] == -10.0
  assert (cleaned != logits).sum() == 2
  np.testing.assert_array_equal(clean(logits), logits)
