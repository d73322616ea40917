"""Runs on disks that are really full: one sentence, nothing half written stays, and the run goes on later."""

import os
import time

import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.checkpoints.errors import CheckpointError
from sam3lt_jax.training.checkpoints import TrainCheckpoints
from sam3lt_jax.training.outcome import write_outcome
from sam3lt_jax.training.run_files import MetricsLog, check_unchanged
from tests import mounts, tiny
from tests.training import toy

FULL = "no space is left on its disk"


def big(value: float, arrays: int = 40):
  """6 MB that do not compress, in arrays that are written side by side."""
  draw = np.random.default_rng(int(value)).normal
  return {f"w{i}": jnp.asarray(draw(size=40_000), jnp.float32) for i in range(arrays)}


@pytest.mark.full  # 5 s
@pytest.mark.parametrize("size", ["60k", "300k", "2m"])
def test_nothing_of_a_checkpoint_stays_on_a_full_disk(tmp_path, size, complaints, caplog, capfd):
  """Without waiting for the writes under way, something was left in one of three."""
  with mounts.tmpfs(tmp_path / "disk", f"size={size}") as small:
    for _ in range(3):
      checkpoints = TrainCheckpoints(small / "run")
      with pytest.raises(CheckpointError) as e:
        checkpoints.save(10, big(1))
        checkpoints.wait()
      said = f"{small / 'run'}: the checkpoint of step 10 is not written: {FULL}; no checkpoint is there"
      assert str(e.value) == said
      assert os.listdir(small / "run") == []
      time.sleep(0.2)
      assert os.listdir(small / "run") == []
  assert complaints == [] and caplog.records == [] and capfd.readouterr() == ("", "")


def test_the_checkpoint_before_is_kept_and_the_next_one_finds_its_room(tmp_path):
  with mounts.tmpfs(tmp_path / "disk", "size=16m") as small:
    checkpoints = TrainCheckpoints(small / "run")
    checkpoints.save(10, big(1))
    checkpoints.wait()
    filler = mounts.fill(small, 1_000_000)
    with pytest.raises(CheckpointError, match=f"step 20 .*{FULL}; the last good checkpoint is .*run/10"):
      checkpoints.save(20, big(2))
      checkpoints.wait()
    assert os.listdir(small / "run") == ["10"]
    filler.unlink()
    checkpoints.save(20, big(2))
    checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.restore(big(0))["w3"], big(2)["w3"])


def test_a_run_on_a_full_disk_ends_in_one_sentence_and_goes_on(tmp_path):
  """The metrics grow by a line a step; with them the disk fills up."""
  with mounts.tmpfs(tmp_path / "disk", "size=1m") as small:
    toy.run(small / "run", 4)
    filler = mounts.fill(small, 0)
    with pytest.raises(CheckpointError, match=rf"is not written: {FULL}; .* (kept|good)"):
      toy.run(small / "run", 400, every=400, evaluate=None, best=None)
    filler.unlink()
    toy.run(small / "run", 12)
    toy.run(tmp_path / "unfilled", 12)
    losses = [[x for x in toy.lines(d) if "loss" in x] for d in (small / "run", tmp_path / "unfilled")]
    assert losses[0] == losses[1]


def test_the_files_beside_the_checkpoints(tmp_path):
  with mounts.tmpfs(tmp_path / "disk", "size=64k") as small:
    log = MetricsLog(str(small / "metrics.jsonl"), 0)
    mounts.fill(small, 0)
    kept = "the run's checkpoints are kept: make room and start it again"
    with pytest.raises(CheckpointError) as e:
      for step in range(10_000):
        log.write({"step": step})
    assert str(e.value) == f"{small}/metrics.jsonl is not written: {FULL}; {kept}"
    log.close()  # the line that has no place is not tried again
    with pytest.raises(CheckpointError, match=f"config.json is not written: {FULL}; nothing was begun"):
      check_unchanged(small, {"x": ["y"] * 9999}, write=True)
    (small / "filler").unlink()
    MetricsLog(str(small / "metrics.jsonl"), 5).close()


@pytest.mark.full  # 2 s
@pytest.mark.parametrize(
  "size, part",
  [("16k", "model"), ("300k", "model"), ("2m", "model"), ("8m", "transformers")],
)
def test_the_models_of_a_finished_run(tmp_path, size, part, complaints, caplog, capfd):
  model, variables = tiny.load(tiny.config(vocab_size=49408))  # 6.7 MB
  with mounts.tmpfs(tmp_path / "disk", f"size={size}") as small:
    (small / "checkpoints" / "12").mkdir(parents=True)
    with pytest.raises(CheckpointError) as e:
      write_outcome(small, model, variables, {}, name="numbers", title="")
    assert str(e.value) == (
      f"{small / part} is not written: {FULL}; the run is kept in {small / 'checkpoints' / '12'}: make room"
      " and start it again, which only writes its models"
    )
    assert sorted(os.listdir(small)) == ["checkpoints"] + ["model"] * (part == "transformers")
  assert complaints == [] and caplog.records == [] and capfd.readouterr() == ("", "")
