"""TrainState: all that a train step changes, and all that a checkpoint holds."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax


@flax.struct.dataclass
class TrainState:
  """One run's state after `step` calls of the train step.

  Attributes:
    step: int32 [], calls of the train step so far. With accumulation, an update takes several calls.
    params: the trainable parameters only; frozen ones are passed beside the state.
    batch_stats: BatchNorm statistics, {} if the model has none.
    opt_state: what optax keeps.
    ema: an average of `params`, a tree like it, or None.
    key: a PRNG key that stays the same; a step folds its number in, so that any step can be run again.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema: Any
  key: jax.Array

  @classmethod
  def create(
    cls,
    params: Any,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    batch_stats: Any = None,
    ema: bool = False,
  ) -> TrainState:
    """The state before the first step.

    Args:
      params: trainable parameters, nested dicts of arrays.
      tx: the optimiser of `make_optimizer`.
      key: `jax.random.key(seed)`.
      batch_stats: BatchNorm statistics; None: the model has none.
      ema: keep an average of the parameters; needs `ema_decay` in `make_train_step`.

    Raises:
      ValueError: nothing to train.
    """
    if not jax.tree.leaves(params):
      raise ValueError("params: no parameter to train")
    params = jax.tree.map(jnp.asarray, params)
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats=jax.tree.map(jnp.asarray, {} if batch_stats is None else batch_stats),
      opt_state=tx.init(params),
      ema=jax.tree.map(jnp.copy, params) if ema else None,
      key=key,
    )

  def averaged(self) -> Any:
    """The parameters to evaluate and to ship: `ema` where it is kept, else `params`."""
    return self.params if self.ema is None else self.ema
