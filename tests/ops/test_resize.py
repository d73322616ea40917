"""Linear resampling and nearest doubling."""

import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.ops import resize
from sam3lt_jax.ops.interpolation import interpolation_matrix


def test_doubling_two_samples_by_hand():
  wanted = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
  np.testing.assert_allclose(interpolation_matrix(2, 4), wanted, atol=1e-7)


def test_halving_takes_the_two_in_the_middle():
  np.testing.assert_allclose(interpolation_matrix(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], atol=1e-7)


@pytest.mark.parametrize("sizes", [(1, 5), (5, 1), (16, 32), (77, 16), (32, 31), (288, 1000)])
def test_rows_are_averages(sizes):
  matrix = interpolation_matrix(*sizes)
  assert matrix.shape == sizes[::-1]
  np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)


def test_the_same_size_is_the_identity():
  np.testing.assert_array_equal(interpolation_matrix(7, 7), np.eye(7))
  table = jnp.ones((7, 3))
  assert resize.resize_rows(table, 7) is table


def test_resize_rows_keeps_the_dtype():
  table = jnp.asarray([[0.0, 8.0], [4.0, 0.0]], jnp.bfloat16)
  out = resize.resize_rows(table, 4)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(out, np.float32), [[0, 8], [1, 6], [3, 2], [4, 0]])


@pytest.mark.torch
@pytest.mark.parametrize("sizes", [(16, 32), (77, 16), (77, 32), (32, 16)])
def test_resize_rows_equals_torch(sizes):
  torch = pytest.importorskip("torch")
  table = np.random.default_rng(0).normal(size=(sizes[0], 8)).astype(np.float32)
  wanted = torch.nn.functional.interpolate(
    torch.from_numpy(table)[None, None], size=(sizes[1], 8), mode="bilinear", align_corners=False
  )
  np.testing.assert_allclose(
    resize.resize_rows(jnp.asarray(table), sizes[1]), wanted[0, 0].numpy(), atol=2e-6
  )
