import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam3lt_jax.training.optimizer import OptimizerConfig, make_optimizer
from sam3lt_jax.training.state import TrainState
from sam3lt_jax.training.step import make_train_step
from tests.training import toy


def one_weight(tx, loss=lambda w, x: w * x, **kwargs):
  """A state with the one parameter w = 2, and the step of the mean of `loss`."""

  def loss_fn(params, frozen, batch_stats, batch, key):
    return jnp.mean(loss(params["w"], batch["x"])), ({"x": jnp.mean(batch["x"])}, batch_stats)

  state = TrainState.create({"w": jnp.asarray(2.0)}, tx, jax.random.key(0), ema="ema_decay" in kwargs)
  return state, make_train_step(loss_fn, tx, **kwargs)


def rows(*values):
  return {"x": np.array(values, np.float32)}


def test_a_step_by_hand():
  state, step = one_weight(optax.sgd(0.5), ema_decay=0.75)
  new, metrics = step(state, None, rows(1, 3))  # loss 2 * 2, gradient 2
  assert {name: float(x) for name, x in metrics.items()} == {"loss": 4, "grad_norm": 2, "finite": 1, "x": 2}
  assert all(x.dtype == jnp.float32 for x in metrics.values())
  assert float(new.params["w"]) == 2 - 0.5 * 2
  assert float(new.ema["w"]) == 0.75 * 2 + 0.25 * 1
  assert int(new.step) == 1 and new.step.dtype == jnp.int32
  assert float(new.averaged()["w"]) == 1.75 and float(new.replace(ema=None).averaged()["w"]) == 1


@pytest.mark.parametrize(
  "loss", [lambda w, x: w * x, lambda w, x: jnp.sqrt(jnp.abs(w * x))], ids=["loss", "gradient"]
)
def test_what_is_not_finite_changes_only_the_counter(loss):
  state, step = one_weight(optax.adam(0.5), loss, ema_decay=0.5)
  state, metrics = step(state, None, rows(1, 4))
  assert float(metrics["finite"]) == 1
  bad = rows(1, np.nan) if loss(2.0, 3.0) == 6 else rows(1, 0)  # the slope of a root at 0 is infinite
  new, metrics = step(state, None, bad)
  assert float(metrics["finite"]) == 0 and int(new.step) == 2
  assert np.isfinite(metrics["loss"]) == (loss(2.0, 3.0) != 6)
  for name in ("params", "opt_state", "ema"):
    old, now = jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(new, name))
    assert old and all(np.array_equal(a, b) for a, b in zip(old, now, strict=True))


def test_two_accumulated_batches_are_one_twice_as_large():
  def trained(batches, accumulate):
    config = OptimizerConfig(peak_lr=0.1, total_steps=10, accumulate=accumulate, clip_norm=0.5)
    tx, schedule = make_optimizer(config, toy.params())
    step = jax.jit(make_train_step(toy.loss_fn, tx, schedule=schedule))
    state, rates = TrainState.create(toy.params(), tx, jax.random.key(0)), []
    for batch in batches:
      state, metrics = step(state, None, {name: batch[name] for name in ("x", "y")})
      rates.append(float(metrics["learning_rate"]))
    return state, rates

  data = [toy.Data()[i] for i in range(6)]
  joined = [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(data[::2], data[1::2])]
  small, small_rates = trained(data, 2)
  large, large_rates = trained(joined, 1)
  assert int(small.step) == 6 and int(large.step) == 3
  assert small_rates[::2] == small_rates[1::2] == large_rates  # the schedule counts updates
  assert large_rates[0] > large_rates[2]
  for a, b in zip(jax.tree.leaves(small.params), jax.tree.leaves(large.params), strict=True):
    assert np.any(b)
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_the_average_moves_with_updates_only():
  tx = optax.MultiSteps(optax.sgd(0.5), 2).gradient_transformation()
  state, step = one_weight(tx, ema_decay=0.75)
  state, _ = step(state, None, rows(1))
  assert float(state.params["w"]) == float(state.ema["w"]) == 2
  state, _ = step(state, None, rows(3))
  assert float(state.params["w"]) == 1 and float(state.ema["w"]) == 1.75
  state, _ = step(state, None, rows(3))
  assert float(state.ema["w"]) == 1.75


def test_keys_differ_by_step_and_repeat():
  def loss_fn(params, frozen, batch_stats, batch, key):
    return params["w"] * frozen["scale"], ({"draw": jax.random.uniform(key)}, batch_stats)

  tx = optax.sgd(0.0)
  state = TrainState.create({"w": jnp.asarray(2.0)}, tx, jax.random.key(3))
  step = make_train_step(loss_fn, tx)
  frozen = {"scale": 3.0}
  first, a = step(state, frozen, rows(0))
  _, b = step(first, frozen, rows(0))
  _, again = step(state, frozen, rows(0))
  assert float(a["draw"]) == float(again["draw"]) != float(b["draw"])
  assert float(a["loss"]) == 6


def test_statistics_are_kept():
  state, step = toy.start()
  batch = toy.Data()[0]
  new, _ = step(state, None, {"x": batch["x"], "y": batch["y"]})
  np.testing.assert_allclose(new.batch_stats["mean"], 0.1 * batch["x"].mean(0), rtol=1e-5)


def test_a_state_needs_something_to_train():
  with pytest.raises(ValueError, match="no parameter to train"):
    TrainState.create({}, optax.sgd(0.1), jax.random.key(0))
