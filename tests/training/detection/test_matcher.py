"""Matching against cases worked by hand and against scipy's assignment."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from sam3lt_jax.training.detection import matcher
from sam3lt_jax.training.detection.matcher import MatcherConfig, pairwise_iou

# As one program each: outside of one, every operation is compiled alone.
match_one_to_one = jax.jit(matcher.match_one_to_one, static_argnums=4)
match_one_to_many = jax.jit(matcher.match_one_to_many, static_argnums=4)
LEFT, RIGHT = [0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]  # the two halves of the image, cxcywh


def test_iou_and_giou_by_hand():
  # Unit square against itself, against a half of it, against one that touches at a corner.
  a = jnp.array([[0.0, 0.0, 1.0, 1.0]])
  b = jnp.array([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.5, 1.0], [1.0, 1.0, 2.0, 2.0]])
  iou, giou = pairwise_iou(a, b)
  np.testing.assert_allclose(iou, [[1.0, 0.5, 0.0]], atol=1e-6)
  # The hull of the corner case has area 4, the union 2: 0 - (4 - 2) / 4.
  np.testing.assert_allclose(giou, [[1.0, 0.5, -0.5]], atol=1e-6)


def test_boxes_without_area_overlap_nothing():
  iou, giou = pairwise_iou(jnp.array([[0.5, 0.5, 0.5, 0.5]]), jnp.array([[0.5, 0.5, 0.5, 0.5]]))
  assert float(iou[0, 0]) == 0.0 and np.isfinite(giou).all()


def test_each_object_gets_the_query_on_top_of_it():
  boxes = jnp.array([RIGHT, [0.5, 0.5, 0.1, 0.1], LEFT])
  match = match_one_to_one(
    jnp.zeros(3), boxes, jnp.array([LEFT, RIGHT]), jnp.array([True, True]), MatcherConfig()
  )
  np.testing.assert_array_equal(match, [[0, 1], [0, 0], [1, 0]])


def test_a_surer_query_wins_between_equal_boxes():
  match = match_one_to_one(
    jnp.array([-2.0, 2.0]), jnp.array([LEFT, LEFT]), jnp.array([LEFT]), jnp.array([True]), MatcherConfig()
  )
  np.testing.assert_array_equal(match, [[0], [1]])


def test_empty_slots_match_nothing_and_steer_nobody():
  # The empty slot lies exactly on query 0, which would otherwise be drawn to it.
  boxes = jnp.array([LEFT, RIGHT])
  match = match_one_to_one(
    jnp.zeros(2), boxes, jnp.array([LEFT, LEFT]), jnp.array([False, True]), MatcherConfig()
  )
  np.testing.assert_array_equal(match, [[0, 1], [0, 0]])


@pytest.mark.parametrize("queries, slots", [(12, 5), (5, 8)])
def test_least_total_cost_as_scipy_finds_it(queries, slots):
  rng = np.random.default_rng(3)
  logits = rng.normal(size=(2, 7, queries)).astype(np.float32)
  boxes = rng.uniform(0.1, 0.6, (2, 7, queries, 4)).astype(np.float32)
  true = rng.uniform(0.1, 0.6, (2, 7, slots, 4)).astype(np.float32)
  valid = rng.random((2, 7, slots)) < 0.6
  config = MatcherConfig()
  match = np.asarray(match_one_to_one(logits, boxes, true, valid, config))
  cost = np.asarray(matcher._cost(jnp.array(logits), jnp.array(boxes), jnp.array(true), config))
  for index in np.ndindex(2, 7):
    columns = np.flatnonzero(valid[index])
    best = cost[index][:, columns]
    rows, picked = linear_sum_assignment(best)
    assert match[index].sum() == min(queries, len(columns))
    assert match[index].sum(0).max(initial=0) <= 1 and match[index].sum(1).max() <= 1
    np.testing.assert_allclose((match[index] * cost[index]).sum(), best[rows, picked].sum(), rtol=1e-5)


def test_one_to_many_takes_the_best_above_the_threshold():
  # Rank = 0.3 * 0.5 + 0.7 * IoU with LEFT: 0.85, 0.85 - half of it 0.5: 0.5, and none for RIGHT: 0.15.
  boxes = jnp.array([LEFT, LEFT, [0.125, 0.5, 0.25, 1.0], RIGHT])
  valid = jnp.array([True, False])
  true = jnp.array([LEFT, RIGHT])
  match = match_one_to_many(jnp.zeros(4), boxes, true, valid, MatcherConfig(many_top=4))
  np.testing.assert_array_equal(match, [[1, 0], [1, 0], [1, 0], [0, 0]])
  match = match_one_to_many(jnp.zeros(4), boxes, true, valid, MatcherConfig(many_top=2))
  np.testing.assert_array_equal(match, [[1, 0], [1, 0], [0, 0], [0, 0]])
  match = match_one_to_many(jnp.zeros(4), boxes, true, valid, MatcherConfig(many_threshold=0.6))
  np.testing.assert_array_equal(match, [[1, 0], [1, 0], [0, 0], [0, 0]])
