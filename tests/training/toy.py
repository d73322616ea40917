"""A linear model to train in milliseconds, and a run of it that can be a process of its own."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax import parallel
from sam3lt_jax.training.loop import fit
from sam3lt_jax.training.optimizer import OptimizerConfig, make_optimizer
from sam3lt_jax.training.state import TrainState
from sam3lt_jax.training.step import make_train_step

FEATURES, ROWS = 3, 8


class Data:
  """data[i]: 8 rows of y = x @ (1, 2, 3) + 4, other rows each step; records 8 i .. 8 i + 7."""

  def __init__(self, pause: float = 0.0, bad: int | None = None, rows: slice = slice(None)):
    self.pause, self.bad, self.rows = pause, bad, rows

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    time.sleep(self.pause)
    x = np.random.default_rng(step).normal(size=(ROWS, FEATURES)).astype(np.float32)
    y = x @ np.array([1, 2, 3], np.float32) + 4
    if step == self.bad:
      y[2] = np.nan
    batch = {"x": x, "y": y, "id": np.arange(ROWS) + ROWS * step}
    return {name: value[self.rows] for name, value in batch.items()}


def params() -> dict[str, Any]:
  return {"dense": {"kernel": np.zeros((FEATURES, 1), np.float32), "bias": np.zeros((1,), np.float32)}}


def loss_fn(params, frozen, batch_stats, batch, key):
  """Mean squared error, with dropout-like noise on the inputs where `frozen` says so, and a running mean."""
  x = batch["x"]
  if frozen is not None:
    x = x + frozen["noise"] * jax.random.normal(key, x.shape)
  out = (x @ params["dense"]["kernel"])[:, 0] + params["dense"]["bias"]
  error = out - batch["y"]
  if batch_stats:
    batch_stats = {"mean": 0.9 * batch_stats["mean"] + 0.1 * jnp.mean(batch["x"], axis=0)}
  return jnp.mean(error**2), ({"mae": jnp.mean(jnp.abs(error))}, batch_stats)


CONFIG = OptimizerConfig(peak_lr=0.1, total_steps=30, warmup_steps=5, accumulate=2, ema_decay=0.9)


def start(**config: Any) -> tuple[TrainState, Any]:
  """(state, plain step) with accumulation, an average and statistics, unless `config` says otherwise."""
  config = dataclasses.replace(CONFIG, **config)
  tx, schedule = make_optimizer(config, params())
  stats = {"mean": np.zeros(FEATURES, np.float32)}
  state = TrainState.create(params(), tx, jax.random.key(7), batch_stats=stats, ema=True)
  return state, make_train_step(loss_fn, tx, ema_decay=config.ema_decay, schedule=schedule)


@functools.cache
def compiled() -> parallel.JitStep:
  """The step of `start`, for one device: runs that share it compile once."""
  return parallel.data_parallel(start()[1], parallel.make_mesh(1, devices=jax.devices()[:1]))


def evaluate(state: TrainState) -> dict[str, float]:
  return {"bias": float(state.averaged()["dense"]["bias"][0])}


def run(directory: Any, steps: int, *, pause: float = 0.0, every: int = 2, **kwargs: Any) -> TrainState:
  """A run with noise, evaluations and a best checkpoint; silent unless `report` is given."""
  state = kwargs.pop("state", None) or start()[0]
  step = kwargs.pop("step_fn", None) or compiled()
  return fit(
    state, step, kwargs.pop("data", Data(pause)),
    **{
      "frozen": {"noise": np.float32(0.1)}, "total_steps": steps, "directory": directory, "log_every": 1,
      "evaluate": evaluate, "evaluate_every": 5, "checkpoint_every": every, "best": ("eval_bias", "max"),
      "fingerprint": {"seed": 7}, "report": lambda line: None,
    } | kwargs,
  )  # fmt: skip


def lines(directory: Any) -> list[dict[str, Any]]:
  """metrics.jsonl without what depends on the clock."""
  text = (pathlib.Path(directory) / "metrics.jsonl").read_text()
  found = [json.loads(line) for line in text.splitlines()]
  return [{n: x for n, x in line.items() if n not in ("time", "images_per_second")} for line in found]


def leaves(state: TrainState) -> list[np.ndarray]:
  return [np.asarray(x) for x in jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))]


def equal(a: TrainState, b: TrainState) -> bool:
  """To the bit."""
  return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))
