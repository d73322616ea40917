"""Sine codes by hand: angles of pi / 2 and pi have known sines."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.ops import positions, target


def test_sine_and_cosine_alternate_and_slow_down():
  """Four features: the angle itself, then a hundredth of it (temperature 10000 to the power 1/2)."""
  x = 0.7
  wanted = [np.sin(x), np.cos(x), np.sin(x / 100), np.cos(x / 100)]
  np.testing.assert_allclose(positions.sine_code(jnp.float32(x), 4), wanted, atol=1e-6)


def test_map_positions_by_hand():
  """Two rows at pi and 2 pi; four columns at pi / 2, pi, 3 pi / 2, 2 pi. y fills the first half."""
  out = np.asarray(positions.map_positions(2, 4, 4))
  assert out.shape == (2, 4, 4)
  np.testing.assert_allclose(out[0, :, :2], np.broadcast_to([0, -1], (4, 2)), atol=1e-5)
  np.testing.assert_allclose(out[1, :, :2], np.broadcast_to([0, 1], (4, 2)), atol=1e-5)
  np.testing.assert_allclose(out[0, :, 2:], [[1, 0], [0, -1], [-1, 0], [0, 1]], atol=1e-5)
  np.testing.assert_array_equal(out[0, :, 2:], out[1, :, 2:])


def test_map_positions_are_the_definition_at_full_size():
  out = np.asarray(positions.map_positions(72, 72, 256))
  step = 2 * np.pi / (72 + 1e-6)
  divisor = 10000.0 ** (2 * (np.arange(128) // 2) / 128)
  angles = step * np.arange(1, 73)[:, None] / divisor
  code = np.where(np.arange(128) % 2 == 0, np.sin(angles), np.cos(angles))
  np.testing.assert_allclose(out[:, 5, :128], code, atol=2e-6)
  np.testing.assert_allclose(out[7, :, 128:], code, atol=2e-6)


def test_box_code_is_y_x_w_h():
  """One value a quarter turn, so that sin and cos name it: cx 1/4, cy 1/2, w 3/4, h 0."""
  out = positions.box_code(jnp.asarray([0.25, 0.5, 0.75, 0.0]), 2)
  np.testing.assert_allclose(out, [0, -1, 1, 0, -1, 0, 0, 1], atol=1e-5)


def test_centre_code_is_y_x_then_raw_h_w():
  out = positions.centre_code(jnp.asarray([[0.25, 0.5, 0.7, 0.3]]), 2)
  np.testing.assert_allclose(out, [[0, -1, 1, 0, 0.3, 0.7]], atol=1e-5)


def test_shapes_for_any_leading_axes():
  boxes = jnp.zeros((2, 3, 4))
  chex.assert_shape(positions.box_code(boxes, 128), (2, 3, 512))
  chex.assert_shape(positions.centre_code(boxes, 128), (2, 3, 258))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_map_of_frequencies_is_the_code_of_its_cells(platform):
  """In both ways of computing it."""
  matrix = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
  with target.traced_for((platform,)):
    found = positions.fourier_map(5, matrix)
  y, x = (np.mgrid[:5, :5] + 0.5) / 5
  angles = 2 * np.pi * ((2 * x - 1)[..., None] * matrix[0] + (2 * y - 1)[..., None] * matrix[1])
  np.testing.assert_allclose(found, np.concatenate([np.sin(angles), np.cos(angles)], -1), atol=5e-6)
