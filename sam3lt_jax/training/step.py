"""make_train_step: a loss function becomes one step of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam3lt_jax.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (params, frozen, batch_stats, batch, key) -> (loss, (metrics, new_batch_stats))
LossFn = Callable[[Any, Any, Any, Batch, jax.Array], tuple[jax.Array, tuple[Metrics, Any]]]
TrainStep = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  ema_decay: float | None = None,
  schedule: Callable[[Any], jax.Array] | None = None,
) -> TrainStep:
  """A pure function step(state, frozen, batch) -> (state, metrics), to be compiled by `sam3lt_jax.parallel`.

  Args:
    loss_fn: (params, frozen, batch_stats, batch, key) -> (loss float32 [], (metrics, new batch_stats)).
      `params` is the trainable tree, `frozen` any tree that is never differentiated nor changed; the function
      merges them itself. `metrics` are float32 [] by name.
    tx: the optimiser of `make_optimizer`.
    ema_decay: ema = decay * ema + (1 - decay) * params at every optimiser update; for states made with ema.
    schedule: of `make_optimizer`; adds the metric "learning_rate".

  Returns:
    The step. Its metrics are those of the loss function and "loss", "grad_norm" (global, before clipping,
    of this call's gradient), "finite" (1 or 0). Where loss or gradient is not finite, "finite" is 0 and the
    state is the old one but for its step counter.
  """

  def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (metrics, batch_stats)), grads = gradient(state.params, frozen, state.batch_stats, batch, key)
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema_decay is not None and ema is not None:
      ema = _average(ema, params, ema_decay, opt_state)
    metrics = dict(metrics, loss=loss, grad_norm=norm, finite=finite)
    if schedule is not None:
      metrics["learning_rate"] = schedule(getattr(state.opt_state, "gradient_step", state.step))
    new = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_state, ema=ema)
    new = jax.tree.map(lambda n, o: o if n is o else jnp.where(finite, n, o), new, state)
    metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
    return new.replace(step=state.step + 1), metrics

  return step


def _average(ema: Any, params: Any, decay: float, opt_state: Any) -> Any:
  # Parameters stand still while gradients accumulate: averaging then too would shorten the average's memory.
  updated = jnp.asarray(getattr(opt_state, "mini_step", 0)) == 0
  rate = jnp.where(updated, 1 - decay, 0.0)
  return jax.tree.map(lambda e, p: e + (rate * (p - e)).astype(e.dtype), ema, params)
