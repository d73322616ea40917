"""What a step costs at the released size, as far as its program says; nothing is run."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.checkpoints.random_init import tracker_config
from sam3lt_jax.config import Sam3LiteTextConfig
from sam3lt_jax.ops import target
from sam3lt_jax.tracker import Sam3Tracker
from sam3lt_jax.video import bank as banks
from sam3lt_jax.video import tracks

GRID, SLOTS = 72, 8


@functools.cache
def arguments(P: int):
  config = Sam3LiteTextConfig.s0()
  tracker = Sam3Tracker(tracker_config(config), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  make = functools.partial(tracker.init_variables, trunk_width=config.vision.hidden_size)
  variables = jax.eval_shape(make, jax.random.key(0))
  trunk = jax.ShapeDtypeStruct((1, GRID, GRID, config.vision.hidden_size), jnp.bfloat16)
  features = jax.eval_shape(functools.partial(tracker.apply, method="get_image_features"), variables, trunk)
  bank = jax.eval_shape(lambda: banks.empty(tracker.config, GRID, P, dtype=jnp.bfloat16))
  clock = banks.Clock.at(5, tracker.config)
  return tracker, (variables, bank, features, clock, np.ones(P, bool))


def _everything(jaxpr) -> Iterator[jax.core.ShapedArray]:
  for equation in jaxpr.eqns:
    yield from (v.aval for v in equation.outvars)
    for inner in jax.tree.leaves(
      list(equation.params.values()),
      is_leaf=lambda x: isinstance(x, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)),
    ):
      inner = getattr(inner, "jaxpr", inner)
      if isinstance(inner, jax.extend.core.Jaxpr):
        yield from _everything(inner)


@pytest.mark.full  # 4 s
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_no_matrix_of_all_scores_is_ever_written(platform):
  tracker, given = arguments(SLOTS)
  with target.traced_for([platform]):
    jaxpr = jax.make_jaxpr(functools.partial(tracks.advance, tracker))(*given)
  arrays = list(_everything(jaxpr.jaxpr))
  # Scores of some queries and all keys of one map there must be; of all queries never.
  assert any(a.shape[-1:] == (GRID**2,) and len(a.shape) > 1 and a.shape[-2] >= 64 for a in arrays)
  assert not [a for a in arrays if sum(n >= GRID**2 for n in a.shape) > 1]


def test_an_object_takes_seven_megabytes_of_state_at_any_length():
  _, (_, bank, *_) = arguments(SLOTS)
  each = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(bank)) / SLOTS
  maps = 11  # 4 with prompts, 6 before and one more that selection may need
  assert each == pytest.approx(maps * GRID**2 * 64 * 2, rel=0.01)
