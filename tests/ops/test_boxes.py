"""Box arithmetic by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.ops import boxes


def test_centre_to_corners():
  np.testing.assert_allclose(
    boxes.cxcywh_to_xyxy(jnp.asarray([0.5, 0.25, 0.25, 0.5])), [0.375, 0, 0.625, 0.5]
  )


def test_corners_to_centre():
  np.testing.assert_allclose(
    boxes.xyxy_to_cxcywh(jnp.asarray([0.375, 0, 0.625, 0.5])), [0.5, 0.25, 0.25, 0.5]
  )


def test_formats_are_inverse_for_any_leading_axes():
  x = jnp.asarray(np.random.default_rng(0).random((2, 3, 4)), jnp.float32)
  np.testing.assert_allclose(boxes.cxcywh_to_xyxy(boxes.xyxy_to_cxcywh(x)), x, atol=1e-6)


def test_inverse_sigmoid_by_hand():
  x = jnp.asarray([0.5, 0.75, 0.0, 1.0, -3.0, 7.0, 0.0005])
  limit = np.log(1000)  # log(max(x, eps) / max(1 - x, eps)) at the ends
  wanted = [0, np.log(3), -limit, limit, -limit, limit, np.log(0.001 / 0.9995)]
  np.testing.assert_allclose(boxes.inverse_sigmoid(x), wanted, atol=1e-5)


def test_inverse_sigmoid_undoes_the_sigmoid_away_from_the_ends():
  x = jnp.linspace(-6.5, 6.5, 27)
  np.testing.assert_allclose(boxes.inverse_sigmoid(jax.nn.sigmoid(x)), x, atol=2e-4)


def test_relative_position_log_by_hand():
  """Box 0.25..0.75 along x on 4 columns at 0, 0.25, 0.5, 0.75: 8d = -2, 0, 2, 4 and -6, -4, -2, 0."""
  out = boxes.relative_position_log(jnp.asarray([0.5, 0.9, 0.5, 0.2]), 4, axis=0)

  def code(d):
    return np.sign(d) * np.log2(np.abs(d) + 1) / 3

  np.testing.assert_allclose(out[:, 0], code(np.array([-2, 0, 2, 4])), atol=1e-6)
  np.testing.assert_allclose(out[:, 1], code(np.array([-6, -4, -2, 0])), atol=1e-6)


def test_relative_position_log_along_y_reads_y_and_h():
  box = jnp.asarray([[0.9, 0.5, 0.2, 0.5], [0.1, 0.1, 0.3, 0.2]])
  swapped = box[:, jnp.asarray([1, 0, 3, 2])]
  out = boxes.relative_position_log(box, 5, axis=1)
  assert out.shape == (2, 5, 2)
  np.testing.assert_allclose(out, boxes.relative_position_log(swapped, 5, axis=0), atol=1e-6)


def test_one_image_side_is_one_unit():
  """8d = 8 gives log2(9) / 3, seven eighths of a side exactly 1."""
  out = boxes.relative_position_log(jnp.asarray([0.0, 0.0, 0.0, 0.0]), 8, axis=0)
  np.testing.assert_allclose(out[7], [1, 1], atol=1e-6)
