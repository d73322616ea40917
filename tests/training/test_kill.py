"""A run is killed (SIGKILL) at random moments, restarted each time, and ends as if nothing had been.

The runs are forked from a server that has imported everything, so that a life takes tenths of a second.
"""

import json
import multiprocessing
import pathlib
import random
import time

import jax
import pytest

from sam3lt_jax.checkpoints import orbax_io
from sam3lt_jax.training.checkpoints import TrainCheckpoints
from sam3lt_jax.training.run_files import checkpoint_steps
from tests.training import toy

pytestmark = pytest.mark.full  # long: CI runs it

_PAUSE = 0.002  # seconds a batch


class Endless(toy.Data):
  """The batch of the last step never comes: however slowly the kill comes, it meets a run at work."""

  def __init__(self, last: int):
    super().__init__(_PAUSE)
    self.last = last

  def __getitem__(self, step):
    while step >= self.last:
      time.sleep(1)
    return super().__getitem__(step)


def life(directory, steps, every):
  toy.run(directory, steps, every=every, data=Endless(steps - 1), keep=3)


def progress(directory):
  path = pathlib.Path(directory) / "metrics.jsonl"
  return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_and_restart(directory, kills, steps, every, rng):
  """Returns at which line of metrics.jsonl each life ended, after reading every checkpoint it left."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["tests.training.toy", "orbax.checkpoint.v1"])
  ends, half_written = [], 0
  like = jax.eval_shape(lambda: toy.start()[0])
  for left in reversed(range(kills)):
    process = context.Process(target=life, args=(directory, steps, every), daemon=True)
    before = progress(directory)
    process.start()
    # Some lives end while starting, the others after a few steps, somewhere between two of them.
    wanted, limit = min(before + rng.randrange(-4, 8), steps - 5), time.monotonic() + 60
    # The last one leaves a checkpoint, so that there is something to go on from.
    while process.is_alive() and time.monotonic() < limit:
      if progress(directory) > wanted and (left or checkpoint_steps(directory)):
        break
      time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05) if wanted > before else rng.uniform(0, 1))
    process.kill()
    process.join()
    assert process.exitcode == -9, "the run ended by itself, before it was killed"
    ends.append(progress(directory))
    half_written += len(list(pathlib.Path(directory).glob("checkpoints/*.writing")))
    for step in checkpoint_steps(directory):
      orbax_io.verify(str(pathlib.Path(directory) / "checkpoints" / str(step)))
    found = TrainCheckpoints(pathlib.Path(directory) / "checkpoints")
    for step in found.steps():
      assert int(found.restore(like, step).step) == step
  return ends, half_written


def check(tmp_path, kills, steps, every):
  seed = random.randrange(10**6)
  print(f"seed {seed}")  # shown by pytest where the test fails
  ends, half_written = kill_and_restart(tmp_path / "killed", kills, steps, every, random.Random(seed))
  print(f"metrics lines at each kill: {ends}; checkpoints half written: {half_written}")
  assert len(ends) == kills and ends[-1] > 0
  said: list[str] = []
  state = toy.run(tmp_path / "killed", steps, every=every, keep=3, report=said.append)
  unkilled = toy.run(tmp_path / "unkilled", steps, every=every, keep=3)
  assert said[0].startswith("going on after step ")
  assert toy.equal(state, unkilled)
  assert toy.lines(tmp_path / "killed") == toy.lines(tmp_path / "unkilled")
  assert not list((tmp_path / "killed").glob("checkpoints/*.damaged"))
  assert json.loads((tmp_path / "killed" / "config.json").read_text()) == {"seed": 7}


def test_three_kills(tmp_path):
  check(tmp_path, kills=3, steps=40, every=2)


def test_twenty_kills(tmp_path):
  check(tmp_path, kills=20, steps=240, every=1)
