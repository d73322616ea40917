"""What test_parallel.py runs in processes of their own, as the number of devices is set before JAX starts.

python -m tests.parallel_worker devices DIRECTORY
python -m tests.parallel_worker process DIRECTORY PORT PROCESS_ID

Prints one JSON object in its last line.
"""

from __future__ import annotations

import functools
import json
import sys

import jax
import numpy as np
import optax

from sam3lt_jax import parallel
from sam3lt_jax.ops import target
from sam3lt_jax.training.checkpoints import TrainCheckpoints
from sam3lt_jax.training.optimizer import make_optimizer
from sam3lt_jax.training.state import TrainState
from tests.training import toy

STEPS = 6


def summary(state: TrainState, losses: list[float]) -> dict:
  kernel, bias = state.params["dense"]["kernel"], state.params["dense"]["bias"]
  values = np.concatenate([np.asarray(x).reshape(-1) for x in (kernel, bias, state.batch_stats["mean"])])
  return {"losses": losses, "values": [float(x) for x in values]}


def train(runner) -> dict:
  state, frozen, losses = (
    runner.place_state(toy.start()[0]),
    runner.place_frozen({"noise": np.float32(0)}),
    [],
  )
  for index in range(STEPS):
    batch = {name: x for name, x in toy.Data()[index].items() if name != "id"}
    state, metrics = runner(state, frozen, runner.place_batch(batch))
    losses.append(float(metrics["loss"]))
  return summary(state, losses)


def pmapped() -> dict:
  """A step of one's own by `jax.pmap`, in plain JAX: docs/training.md shows it."""
  loss_fn, n = toy.loss_fn, jax.device_count()
  tx, _ = make_optimizer(toy.CONFIG, toy.params())

  @functools.partial(jax.pmap, axis_name="data")
  def step(params, batch_stats, opt_state, batch):  # each stacked, [devices, ...]
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (_, batch_stats)), grads = gradient(params, None, batch_stats, batch, None)
    loss, batch_stats, grads = jax.lax.pmean((loss, batch_stats, grads), "data")
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), batch_stats, opt_state, loss

  state, losses = toy.start()[0], []
  carried = jax.tree.map(
    lambda x: np.broadcast_to(x, (n, *np.shape(x))), (state.params, state.batch_stats, state.opt_state)
  )
  for index in range(STEPS):
    batch = {name: x.reshape(n, -1, *x.shape[1:]) for name, x in toy.Data()[index].items() if name != "id"}
    *carried, loss = step(*carried, batch)
    losses.append(float(loss[0]))
  params, batch_stats, _ = jax.tree.map(lambda x: x[0], carried)
  return summary(state.replace(params=params, batch_stats=batch_stats), losses)


def fit(directory: str, steps: int, **kwargs) -> dict:
  state = toy.run(directory, steps, frozen={"noise": np.float32(0)}, **kwargs)
  return summary(state, [line["loss"] for line in toy.lines(directory) if "loss" in line])


def devices(directory: str) -> dict:
  step, state = toy.start()[1], toy.start()[0]
  one = parallel.make_mesh(1, devices=jax.devices()[:1])
  eight, four_two = parallel.make_mesh(), parallel.make_mesh(4, 2)
  found = {
    "count": jax.device_count(),
    "one": train(parallel.data_parallel(step, one)),
    "jit": train(parallel.data_parallel(step, eight)),
    "fsdp": train(
      parallel.data_parallel(step, eight, state_sharding=parallel.fsdp_sharding(eight, state, "data"))
    ),
    "pmap": pmapped(),
  }
  shapes = {"a": np.zeros((6, 16)), "b": np.zeros((16, 16)), "c": np.zeros(3), "d": jax.random.key(0)}
  specs = lambda mesh: {n: list(s.spec) for n, s in parallel.fsdp_sharding(mesh, shapes).items()}  # noqa: E731
  found["specs"] = {"eight": specs(eight), "four_two": specs(four_two)}
  teacher = {"w": np.ones((64, 8), np.float32), "b": np.ones(3, np.float32)}
  split = jax.tree.map(jax.device_put, teacher, parallel.fsdp_sharding(four_two, teacher, "model"))
  placed = parallel.data_parallel(step, four_two).place_frozen({"teacher": split, "other": teacher["w"]})
  found["bytes"] = {
    "teacher": placed["teacher"]["w"].addressable_shards[0].data.nbytes,
    "other": placed["other"].addressable_shards[0].data.nbytes,
  }
  # A run goes on with another number of devices.
  found["fit"] = fit(f"{directory}/a", 2, step_fn=step, mesh=eight) and fit(f"{directory}/a", STEPS)
  found["fit_again"] = fit(f"{directory}/b", 2) and fit(f"{directory}/b", STEPS, step_fn=step, mesh=four_two)
  traced = []

  def told(state, frozen, batch):
    where = target.current()
    traced.append([list(where.platforms), where.mesh and dict(where.mesh.shape)])
    return step(state, frozen, batch)

  for mesh in (one, four_two):
    train(parallel.data_parallel(told, mesh))
  found["traced"] = traced
  found["error"] = ""
  try:
    toy.run(f"{directory}/c", 2, step_fn=step, mesh=eight, data=toy.Data(rows=slice(6)))
  except ValueError as e:
    found["error"] = str(e)
  return found


def process(directory: str, port: str, process_id: str) -> dict:
  number = int(process_id)
  parallel.start_distributed(f"127.0.0.1:{port}", 2, number, timeout_s=60)
  mesh = parallel.make_mesh()
  rows = toy.ROWS // 2
  data = toy.Data(rows=slice(rows * number, rows * number + rows))
  step = toy.start()[1]
  found = {"count": jax.device_count(), "local": jax.local_device_count()}
  fit(directory, 3, step_fn=step, mesh=mesh, data=data)
  found |= fit(directory, STEPS, step_fn=step, mesh=mesh, data=data)
  checkpoints = TrainCheckpoints(f"{directory}/checkpoints", best=("eval_bias", "max"))
  return found | {"steps": checkpoints.steps(), "best": checkpoints.best_step()}


if __name__ == "__main__":
  mode, *arguments = sys.argv[1:]
  print(json.dumps({"devices": devices, "process": process}[mode](*arguments)))
