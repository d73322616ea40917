"""2-D RoPE, by hand and by its properties."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.ops import rope


def rotated(vector, grid, scale=1.0):
  """One vector [H] placed at every cell of a grid: [grid, grid, H] indexed (y, x)."""
  cos, sin = rope.axial_rope(grid, len(vector), 10000.0, scale)
  x = jnp.broadcast_to(jnp.asarray(vector, jnp.float32), (1, grid * grid, 1, len(vector)))
  return np.asarray(rope.apply_rope(x, cos, sin)).reshape(grid, grid, -1)


def test_one_pair_a_side_by_hand():
  """Width 4: the pair (1, 0) turns by x, the pair (0, 1) by y."""
  out = rotated([1, 0, 0, 1], grid=3)
  wanted = [np.cos(1), np.sin(1), -np.sin(2), np.cos(2)]
  np.testing.assert_allclose(out[2, 1], wanted, atol=1e-6)


def test_frequencies_fall_from_1_to_theta():
  """Width 64: 16 pairs a side, pair j turns by 10000 ** (-j / 16) a cell."""
  cos, sin = rope.axial_rope(2, 64, 10000.0)
  chex.assert_shape([cos, sin], (4, 32))
  assert cos.dtype == sin.dtype == np.float32
  angles = 10000.0 ** (-np.arange(16) / 16)
  np.testing.assert_allclose(np.arctan2(sin[1, :16], cos[1, :16]), angles, rtol=1e-5)  # cell (y 0, x 1)
  np.testing.assert_allclose(np.arctan2(sin[2, 16:], cos[2, 16:]), angles, rtol=1e-5)  # cell (y 1, x 0)


def test_first_half_of_the_head_is_x_second_half_is_y():
  rng = np.random.default_rng(0)
  vector = rng.normal(size=16).astype(np.float32)
  out = rotated(vector, grid=5)
  np.testing.assert_array_equal(out[:, :, :8], np.broadcast_to(out[:1, :, :8], (5, 5, 8)))
  np.testing.assert_array_equal(out[:, :, 8:], np.broadcast_to(out[:, :1, 8:], (5, 5, 8)))
  np.testing.assert_array_equal(out[0, 0], vector)
  assert np.abs(out[0, 1, :8] - vector[:8]).max() > 0.1


def test_norms_are_kept():
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.normal(size=(2, 25, 3, 16)), jnp.float32)
  out = rope.apply_rope(x, *rope.axial_rope(5, 16, 10000.0))
  lengths = [np.linalg.norm(np.asarray(a).reshape(2, 25, 3, 8, 2), axis=-1) for a in (out, x)]
  np.testing.assert_allclose(*lengths, rtol=1e-5)


def test_products_depend_on_the_difference_of_positions_only():
  rng = np.random.default_rng(2)
  q, k = (rotated(rng.normal(size=16), grid=6) for _ in range(2))

  def product(a, b):
    return q[a] @ k[b]

  for dy, dx in [(0, 1), (2, 0), (1, 3), (3, 2)]:
    values = [product((y, x), (y + dy, x + dx)) for y in range(6 - dy) for x in range(6 - dx)]
    np.testing.assert_allclose(values, values[0], atol=2e-5)
  assert abs(product((0, 0), (0, 1)) - product((0, 0), (1, 0))) > 1e-2


def test_scale_multiplies_positions():
  vector = np.random.default_rng(3).normal(size=8)
  np.testing.assert_allclose(rotated(vector, 6, scale=0.5)[4, 2], rotated(vector, 6)[2, 1], atol=1e-6)
  # 24 / 72 in the released model's global layers: the last cell stands at 71 / 3.
  cos, _ = rope.axial_rope(72, 4, 10000.0, 24 / 72)
  np.testing.assert_allclose(cos[71, 0], np.cos(71 / 3), atol=1e-5)


def test_bfloat16_is_rotated_in_float32():
  x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 9, 1, 8)), jnp.bfloat16)
  angles = rope.axial_rope(3, 8, 10000.0)
  out = rope.apply_rope(x, *angles)
  assert out.dtype == jnp.bfloat16
  exact = rope.apply_rope(x.astype(jnp.float32), *angles)
  np.testing.assert_array_equal(
    np.asarray(out, np.float32), np.asarray(exact.astype(jnp.bfloat16), np.float32)
  )


@pytest.mark.parametrize("head_dim", [2, 6, 63])
def test_head_width_must_split_into_pairs_a_side(head_dim):
  with pytest.raises(ValueError, match="multiple of 4"):
    rope.axial_rope(3, head_dim, 10000.0)
