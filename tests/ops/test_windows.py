"""Windows of a map, with and without padding."""

import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.ops import windows
from tests import tiny


def test_windows_by_hand():
  """A 2 x 4 map in windows of 2: left window first, raster order inside."""
  x = jnp.arange(8.0).reshape(1, 2, 4, 1)
  out = windows.partition(x, 2)
  np.testing.assert_array_equal(out[..., 0], [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_padding_is_zero_and_at_the_bottom_and_right():
  x = jnp.arange(1.0, 10.0).reshape(1, 3, 3, 1)
  out = windows.partition(x, 2)
  np.testing.assert_array_equal(out[..., 0], [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]])


def test_images_follow_each_other():
  x = jnp.stack([jnp.zeros((4, 4, 3)), jnp.ones((4, 4, 3))])
  out = windows.partition(x, 2)
  assert out.shape == (8, 4, 3)
  np.testing.assert_array_equal(out[:4], np.zeros((4, 4, 3)))
  np.testing.assert_array_equal(out[4:], np.ones((4, 4, 3)))


@pytest.mark.parametrize(
  "height, width, window", [(4, 4, 2), (5, 5, 4), (3, 7, 4), (2, 2, 4), (6, 4, 3), (1, 1, 1)]
)
def test_merge_undoes_partition(height, width, window):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, height, width, 3)), jnp.bfloat16)

  @tiny.jit
  def both(x):
    parts = windows.partition(x, window)
    return parts, windows.merge(parts, window, height, width)

  parts, merged = both(x)
  count = 2 * -(-height // window) * -(-width // window)
  assert parts.shape == (count, window * window, 3)
  assert parts.dtype == x.dtype
  np.testing.assert_array_equal(merged, x)
