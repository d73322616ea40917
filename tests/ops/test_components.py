"""Small connected parts: against scipy's, and the original's cleaning of masks."""

import functools

import jax
import numpy as np
import pytest

from sam3lt_jax.ops.components import clean_small, small_components
from sam3lt_jax.processing.masks import small_parts
from tests.checkpoints.common import fixture
from tests.tiny import jit


@functools.cache
def program(function, area):
  return jit(functools.partial(function, **{"most" if function is small_components else "area": area}))


def random_masks(seed, shape=(30, 24, 31)):
  """Coarse and fine noise: parts from one cell to nearly all."""
  rng = np.random.default_rng(seed)
  fine = rng.random(shape)
  coarse = np.kron(rng.random((shape[0], 8, 8)), np.ones((1, 4, 4)))[:, : shape[1], : shape[2]]
  return fine * 0.6 + coarse * 0.4 < rng.uniform(0.15, 0.85, (shape[0], 1, 1))


@pytest.mark.parametrize("area", [1, 5, 16])
def test_small_components_are_scipys(area):
  masks = random_masks(area)
  found = np.asarray(program(small_components, area)(masks))
  np.testing.assert_array_equal(found, [small_parts(mask, area) for mask in masks])
  assert found.any() and (masks & ~found).any()


def test_a_limit_of_each_mask():
  masks = random_masks(7)
  limits = np.arange(len(masks)) % 17
  found = jit(lambda m, limit: small_components(m, 16, limit))(masks, limits)
  np.testing.assert_array_equal(found, [small_parts(mask, limit) for mask, limit in zip(masks, limits)])


def test_long_thin_parts():
  """The furthest that a small part reaches, and one cell more."""
  masks = np.zeros((4, 20, 20), bool)
  masks[0, 3, 1:17] = True
  masks[1, 3, 1:18] = True
  np.fill_diagonal(masks[2, 2:18, 2:18], True)
  np.fill_diagonal(masks[3, 2:19, 2:19], True)
  found = np.asarray(program(small_components, 16)(masks))
  assert (found == masks).all((1, 2)).tolist() == [True, False, True, False]
  assert not found[1].any() and not found[3].any()


@pytest.mark.parametrize("area", [4, 16])
def test_the_originals_cleaning(area):
  changed = 0
  for case in range(5):
    masks = fixture("video_decisions")[f"cleaning/{case}/masks"]
    expected = fixture("video_decisions")[f"cleaning/{case}/cleaned_area{area}"]
    np.testing.assert_array_equal(program(clean_small, area)(masks), expected)
    changed += (masks != expected).sum()
  assert changed > 50


def test_no_area_changes_nothing():
  masks = np.ones((1, 4, 4), np.float32)
  assert clean_small(masks, 0) is masks
  assert not np.asarray(small_components(masks > 0, 0)).any()
  assert jax.eval_shape(lambda m: clean_small(m, 16), masks).shape == masks.shape
