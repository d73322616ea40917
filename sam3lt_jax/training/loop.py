"""fit: batches in, steps done, metrics and checkpoints out; goes on where it was stopped, to the digit."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from sam3lt_jax import parallel, storage
from sam3lt_jax.errors import check
from sam3lt_jax.training.checkpoints import TrainCheckpoints
from sam3lt_jax.training.errors import Interrupted, NonFiniteLoss
from sam3lt_jax.training.run_files import MetricsLog, check_unchanged, working_in
from sam3lt_jax.training.state import TrainState
from sam3lt_jax.training.step import TrainStep

_IN_FLIGHT = 2  # steps handed to the device before the first of them is looked at
_NAMED = 16  # records of a batch that a message names

Report = Callable[[str], Any]


def fit(
  state: TrainState,
  step_fn: TrainStep | parallel.JitStep,
  data: Any,
  *,
  total_steps: int,
  directory: str | os.PathLike[str],
  frozen: Any = None,
  mesh: jax.sharding.Mesh | None = None,
  log_every: int = 50,
  evaluate: Callable[[TrainState], Mapping[str, Any]] | None = None,
  evaluate_every: int | None = None,
  checkpoint_every: int | None = None,
  best: tuple[str, str] | None = None,
  keep: int = 2,
  fingerprint: Mapping[str, Any] | None = None,
  report: Report | None = None,
  unit: str = "images",
  record_name: Callable[[int], str] | None = None,
  take_best: bool = False,
) -> TrainState:
  """Trains up to `total_steps` calls of the step, from the newest checkpoint in `directory` if there is one.

  A run that was killed at any moment and started again with the same arguments gives the same losses, to the
  digit, as one that was not.

  Args:
    state: before the first step; left as it is.
    step_fn: of `make_train_step`, compiled here; or what `parallel.data_parallel` returns.
    data: data[step] -> {name: numpy [B, ...]}, the batch of that step, for steps from 0: the same every time
      it is asked. With several processes, the rows of this one. The array "id" (int64 [B], optional) names
      the records and is not sent to the device. An attribute `skipped` ({reason: count}) is shown when it
      grows.
    total_steps: calls of the step; with gradient accumulation, an optimiser update takes several.
    directory: gets metrics.jsonl, config.json and checkpoints/.
    frozen: any tree handed to every step: frozen weights, a teacher.
    mesh: of `parallel.make_mesh`; None: one device.
    log_every: steps between lines of metrics.jsonl, which hold that step's own metrics.
    evaluate: state -> metrics, which get the prefix "eval_". With several processes, equal in all of them. It
      must not keep the state's arrays, which the next step takes over.
    evaluate_every: steps between evaluations; None: only after the last step.
    checkpoint_every: steps between checkpoints; None: every tenth of the run.
    best: ("eval_name", "max" or "min"): also saves whenever that metric is the best so far, or as good, and
      keeps that.
    keep: newest checkpoints that stay.
    fingerprint: what must not change when the run goes on; written to config.json.
    report: called with each line for the reader; None: print.
    unit: what a row of a batch is, where those lines say how many a second. (metrics.jsonl says
      "images_per_second" of any.)
    record_name: a record's id -> what the reader knows it by, for `NonFiniteLoss`; None: its id.
    take_best: return the state that `best` keeps, where there is one.

  Returns:
    The state after the last step, or the best, on the devices of the mesh.

  Raises:
    NonFiniteLoss: names the step, the batch's records and the last good checkpoint.
    Interrupted: SIGTERM or SIGINT came; the state is saved.
    CheckpointError: a checkpoint cannot be written (the disk is full) or read.
    ValueError: arguments out of range, a changed fingerprint, rows that the devices do not divide, or another
      process works in `directory`.
  """
  checkpoint_every = max(1, total_steps // 10) if checkpoint_every is None else checkpoint_every
  evaluate_every = total_steps if evaluate_every is None else evaluate_every
  for name, value in {
    "total_steps": total_steps, "log_every": log_every, "evaluate_every": evaluate_every,
    "checkpoint_every": checkpoint_every,
  }.items():  # fmt: skip
    check(value >= 1, name, value, "1 or more steps")
  if best is not None and evaluate is None:
    raise ValueError(f"best={best!r} needs evaluate, whose metrics it names")
  report = report or functools.partial(print, flush=True)
  runner = _runner(step_fn, mesh)
  directory = os.path.abspath(os.fspath(directory))
  with contextlib.ExitStack() as stack:
    stack.enter_context(working_in(directory))
    folder = os.path.join(directory, "checkpoints")
    checkpoints = TrainCheckpoints(folder, keep=keep, best=best, report=report)
    check_unchanged(directory, fingerprint or {}, write=True)
    like = runner.abstract_state(state)
    restored = checkpoints.restore(like) if checkpoints.steps() else None
    state = runner.place_state(state) if restored is None else restored
    done = 0 if restored is None else int(restored.step)
    if 0 < done < total_steps:
      report(f"going on after step {done} of {total_steps}")
    log = stack.enter_context(contextlib.closing(MetricsLog(os.path.join(directory, "metrics.jsonl"), done)))
    if done >= total_steps:
      report(
        f"nothing is left to do: all {total_steps} steps are done; to train on, start a run in another folder"
        " from the model of this one"
      )
    frozen = runner.place_frozen(frozen)
    run = _Run(data, checkpoints, log, report, unit, record_name, total_steps)
    batches = stack.enter_context(contextlib.closing(prefetch(data, done, total_steps)))
    caught = stack.enter_context(storage.signals())
    stack.callback(checkpoints.wait)  # what is being written is written to its end
    for index, batch in batches:
      step, last = index + 1, index + 1 == total_steps
      arrays = {name: x for name, x in batch.items() if name != "id"}
      state, metrics = runner(state, frozen, runner.place_batch(arrays))
      run.pending.append((step, batch.get("id"), metrics))
      # The first step is waited for: it compiles, and its time says nothing of the others.
      run.look(0 if index == done else _IN_FLIGHT)
      run.clock.count(parallel.batch_rows(arrays) * jax.process_count(), first=index == done)
      checkpoints.check()  # a full disk ends the run now, not at the next checkpoint
      asked = _asked(caught, step, log_every)
      scores = {}
      if step % log_every == 0 or last:
        run.write(step)
      if evaluate is not None and (step % evaluate_every == 0 or last):
        scores = run.evaluate(step, evaluate, state)
      if step % checkpoint_every == 0 or last or asked or checkpoints.is_best(scores):
        run.look(0)  # a state after a bad step is never saved
        log.sync()
        checkpoints.save(step, state, scores)
      if asked and not last:
        raise run.interrupted(step, asked)
    checkpoints.settle()
    chosen = take_best and checkpoints.best_step() is not None
    return checkpoints.restore_best(like) if chosen else state


def _runner(step_fn: Any, mesh: jax.sharding.Mesh | None) -> parallel.JitStep:
  if isinstance(step_fn, parallel.JitStep):
    if mesh is not None and step_fn.mesh != mesh:
      raise ValueError("mesh: the step is compiled already; pass the plain step, or leave mesh out")
    return step_fn
  if mesh is None:
    if jax.process_count() > 1:
      raise ValueError("mesh: several processes need one; pass parallel.make_mesh()")
    mesh = parallel.make_mesh(1, devices=jax.local_devices()[:1])
  return parallel.data_parallel(step_fn, mesh)


@dataclasses.dataclass
class _Run:
  """What a call of `fit` has seen of its steps, and says of them."""

  data: Any
  checkpoints: TrainCheckpoints
  log: MetricsLog
  report: Report
  unit: str
  record_name: Callable[[int], str] | None
  total: int

  def __post_init__(self):
    # (step, ids of its batch, metrics on the device) of steps not looked at yet.
    self.pending: collections.deque[tuple[int, Any, Any]] = collections.deque()
    self.clock = _Clock()
    self.newest: dict[str, float] = {}
    self.skipped: dict[str, int] = {}

  def look(self, in_flight: int) -> None:
    """Waits until no more than `in_flight` steps are unseen; keeps the metrics of the newest seen."""
    while len(self.pending) > in_flight:
      step, ids, metrics = self.pending.popleft()
      seen = {name: float(x) for name, x in jax.device_get(metrics).items()}
      if not seen.get("finite", 1.0) or not math.isfinite(seen["loss"]):
        raise self.non_finite(step, ids, seen)
      self.newest = seen

  def write(self, step: int) -> None:
    self.look(0)
    rate, left = self.clock.read(self.total - step)
    metrics = {name: x for name, x in self.newest.items() if name != "finite"}
    line = {"step": step, "time": time.time(), "loss": metrics.pop("loss"), **metrics}
    self.log.write(line | {"images_per_second": rate})
    shown = [f"step {step}/{self.total}", f"loss {line['loss']:.5g}"]
    if "learning_rate" in metrics:
      shown.append(f"rate {metrics['learning_rate']:.3g}")
    if left is not None:
      shown += [f"{rate:.3g} {self.unit}/s", f"{_duration(left)} left"]
    self.report(", ".join(shown) + self.newly_skipped())

  def newly_skipped(self) -> str:
    now = dict(getattr(self.data, "skipped", None) or {})
    grown = {reason: n for reason, n in now.items() if n > self.skipped.get(reason, 0)}
    self.skipped = now
    return f"; skipped so far: {', '.join(f'{n} {reason}' for reason, n in grown.items())}" if grown else ""

  def evaluate(self, step: int, evaluate: Callable, state: TrainState) -> dict[str, float]:
    self.look(0)
    with self.clock.paused():
      values = evaluate(state)
      scores = {f"eval_{name}": float(x) for name, x in values.items()}
    if self.checkpoints.best is not None and self.checkpoints.best[0] not in scores:
      raise ValueError(f"best={self.checkpoints.best!r}; evaluate gives {', '.join(scores) or 'nothing'}")
    self.log.write({"step": step, "time": time.time(), **scores})
    self.report(f"step {step}/{self.total}, " + ", ".join(f"{name} {x:.5g}" for name, x in scores.items()))
    return scores

  def last_good(self) -> str:
    self.checkpoints.wait()
    steps = self.checkpoints.steps()
    if not steps:
      return "there is no checkpoint yet"
    return f"the last good checkpoint is {os.path.join(self.checkpoints.directory, str(steps[-1]))}"

  def non_finite(self, step: int, ids: Any, seen: dict[str, float]) -> NonFiniteLoss:
    ids = None if ids is None else [int(i) for i in np.asarray(ids).reshape(-1)]
    names = None if ids is None or self.record_name is None else [self.record_name(i) for i in ids]
    records = "whose records have no id" if ids is None else f"of the records {ids}"
    if names is not None:
      more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
      records = f"of the {self.unit} {', '.join(map(repr, names[:_NAMED]))}{more}"
    values = f"the loss is {seen['loss']:g}, its gradient's norm {seen.get('grad_norm', math.nan):g}"
    return NonFiniteLoss(
      f"step {step}: {values}, on batch {step - 1} {records}; {self.last_good()}", step, ids, names
    )

  def interrupted(self, step: int, number: int) -> Interrupted:
    name, where = signal.Signals(number).name, self.last_good()
    text = f"stopped by {name} after step {step} of {self.total}; {where}; start again to go on"
    return Interrupted(text, step, number)


def prefetch(data: Any, start: int, stop: int, depth: int = 2) -> Iterator[tuple[int, Any]]:
  """(step, data[step]) of steps from `start` up to `stop`, read in a thread, at most `depth` ahead.

  What reading a batch raises is raised there, with a note of its number.
  """

  def read(step: int) -> Any:
    try:
      return data[step]
    except BaseException as e:
      e.add_note(f"while reading batch {step}")
      raise

  pool = concurrent.futures.ThreadPoolExecutor(1, "Prefetch")
  try:
    waiting: collections.deque = collections.deque()
    for step in range(start, stop + depth):
      if step < stop:
        waiting.append(pool.submit(read, step))
      if step >= start + depth:
        yield step - depth, waiting.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


class _Clock:
  """Rows a second since the last reading, and what is left. Evaluations and compiling do not count."""

  def __init__(self):
    self.since, self.steps, self.rows = time.perf_counter(), 0, 0
    self.compiled: float | None = None  # when the first step of this process was done

  def count(self, rows: int, first: bool) -> None:
    if self.compiled is not None:  # the second step: forget the first
      self.since, self.steps, self.rows = self.compiled, 0, 0
    self.compiled = time.perf_counter() if first else None
    self.steps, self.rows = self.steps + 1, self.rows + rows

  def read(self, steps_left: int) -> tuple[float, float | None]:
    """(rows a second, seconds left); None after the first step alone, which compiled."""
    now = time.perf_counter()
    passed = max(now - self.since, 1e-9)
    rate = self.rows / passed
    left = passed / max(self.steps, 1) * steps_left if self.compiled is None else None
    self.since, self.steps, self.rows, self.compiled = now, 0, 0, None
    return rate, left

  @contextlib.contextmanager
  def paused(self):
    start = time.perf_counter()
    yield
    self.since += time.perf_counter() - start


def _asked(caught: list[int], step: int, log_every: int) -> int:
  """The number of the signal that asks the run to end, or 0.

  Several processes agree on it at every logged step: all must save.
  """
  number = caught[0] if caught else 0
  if jax.process_count() == 1:
    return number
  if step % log_every:
    return 0
  from jax.experimental import multihost_utils

  return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def _duration(seconds: float) -> str:
  seconds = round(seconds)
  if seconds < 100:
    return f"{seconds} s"
  minutes = round(seconds / 60)
  return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
