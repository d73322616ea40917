import contextlib
import errno
import json
import os
import pathlib
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from sam3lt_jax.checkpoints.errors import CheckpointError, CheckpointMismatchError
from sam3lt_jax.training.checkpoints import TrainCheckpoints
from sam3lt_jax.training.state import TrainState
from tests.training import toy


def small(value: float):
  return {"w": jnp.full((3, 2), float(value)), "n": jnp.asarray(int(value), jnp.int32)}


def filled(directory, steps, **kwargs):
  """Checkpoints of `small(step)`."""
  checkpoints = TrainCheckpoints(directory, **{"keep": 9} | kwargs)
  for step in steps:
    checkpoints.save(step, small(step))
  checkpoints.wait()
  return checkpoints


def parts(checkpoint):
  return sorted(str(p.relative_to(checkpoint)) for p in pathlib.Path(checkpoint).rglob("*") if p.is_file())


def test_a_state_comes_back_to_the_bit(tmp_path):
  tx = optax.MultiSteps(optax.adamw(0.1), 2).gradient_transformation()
  params = {"a/b": {"c": jnp.arange(6.0).reshape(2, 3) / 7}, "half": jnp.full((4,), 1 / 3, jnp.bfloat16)}
  state = TrainState.create(params, tx, jax.random.key(5), batch_stats={"m": jnp.ones(2)}, ema=True)
  state = state.replace(
    step=jnp.asarray(3, jnp.int32), opt_state=tx.update(params, state.opt_state, params)[1]
  )
  checkpoints = TrainCheckpoints(tmp_path)
  checkpoints.save(3, state)
  for like in (state, jax.eval_shape(lambda: state)):
    back = checkpoints.restore(like)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert toy.equal(back, state)
    assert back.key.dtype == state.key.dtype
    assert np.array_equal(jax.random.uniform(back.key, (3,)), jax.random.uniform(state.key, (3,)))


def test_other_kinds_of_keys(tmp_path):
  checkpoints = TrainCheckpoints(tmp_path)
  state = {"key": jax.random.key(1, impl="rbg")}
  checkpoints.save(1, state)
  for like in (state, jax.eval_shape(lambda: state)):
    back = checkpoints.restore(like)["key"]
    assert back.dtype == state["key"].dtype
    assert np.array_equal(jax.random.key_data(back), jax.random.key_data(state["key"]))


def test_nothing_there(tmp_path):
  checkpoints = TrainCheckpoints(tmp_path / "new" / "folder")
  assert checkpoints.steps() == [] and checkpoints.restore(small(0)) is None
  with pytest.raises(CheckpointError, match="has no checkpoint of step 4; it has: none"):
    checkpoints.restore(small(0), 4)


def test_no_save_is_skipped_and_the_newest_stay(tmp_path):
  checkpoints = TrainCheckpoints(tmp_path / "all", keep=6)
  for step in range(1, 7):  # at once, each while the one before is being written
    checkpoints.save(step, small(step))
  checkpoints.wait()
  assert checkpoints.steps() == [1, 2, 3, 4, 5, 6]
  assert [int(checkpoints.restore(small(0), step)["n"]) for step in checkpoints.steps()] == [1, 2, 3, 4, 5, 6]
  assert filled(tmp_path / "two", range(1, 7), keep=2).steps() == [5, 6]
  assert sorted(os.listdir(tmp_path / "two")) == ["5", "6"]


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  checkpoints = TrainCheckpoints(tmp_path, keep=5)
  for step in range(5):
    x = jnp.full((512, 512), float(step))
    checkpoints.save(step, {"x": x})
    jax.block_until_ready(overwrite(x))  # where Orbax still looked at the device, it would find -1
  checkpoints.wait()
  like = {"x": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
  for step in range(5):
    assert np.all(np.asarray(checkpoints.restore(like, step)["x"]) == step)


@pytest.mark.parametrize("direction, expected", [("max", 3), ("min", 4)])
def test_the_best_stays(tmp_path, direction, expected):
  """Of equals the later: it has seen more."""
  checkpoints = TrainCheckpoints(tmp_path, keep=1, best=("f1", direction))
  was_best = []
  for step, value in enumerate([0.5, 0.9, 0.9, 0.1, 0.4, float("nan")], 1):
    was_best.append(checkpoints.is_best({"f1": value}))
    checkpoints.save(step, small(step), {"f1": value, "other": 1.0})
  checkpoints.wait()
  assert was_best == {
    "max": [True, True, True, False, False, False], "min": [True, False, False, True, False, False]
  }[direction]  # fmt: skip
  assert checkpoints.steps() == [expected, 6] and checkpoints.best_step() == expected
  assert int(checkpoints.restore_best(small(0))["n"]) == expected
  assert int(checkpoints.restore(small(0))["n"]) == 6
  again = TrainCheckpoints(tmp_path, keep=1, best=("f1", direction))
  assert again.best_step() == expected
  assert not again.is_best({"f1": 0.5}) and not again.is_best({"other": 9.0})
  assert again.metrics(expected) == {"f1": {"max": 0.9, "min": 0.1}[direction], "other": 1.0}
  with pytest.raises(CheckpointError, match="no checkpoint has a value of the metric auc"):
    TrainCheckpoints(tmp_path, best=("auc", "max")).restore_best(small(0))


def test_what_a_killed_process_left_is_removed(tmp_path):
  filled(tmp_path, [1])
  for name in ("2.writing", "0.old"):
    shutil.copytree(tmp_path / "1", tmp_path / name)
  checkpoints = TrainCheckpoints(tmp_path)
  assert sorted(os.listdir(tmp_path)) == ["1"] and checkpoints.steps() == [1]


def damage(path, how):
  if how == "missing":
    path.unlink()
  elif how == "truncated":
    path.write_bytes(path.read_bytes()[:-1])
  else:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.full  # 6 s
@pytest.mark.parametrize("how", ["missing", "truncated", "one bit flipped"])
def test_any_damaged_part_is_named_and_the_checkpoint_before_is_used(tmp_path, how):
  filled(tmp_path / "good", [1, 2])
  names = parts(tmp_path / "good" / "2")
  assert len(names) >= 6 and "checkpoint.json" in names
  for number, name in enumerate(names):
    folder = tmp_path / str(number)
    shutil.copytree(tmp_path / "good", folder)
    if not (folder / "2" / name).stat().st_size and how != "missing":
      continue
    damage(folder / "2" / name, how)
    said: list[str] = []
    checkpoints = TrainCheckpoints(folder, report=said.append)
    if name == "checkpoint.json" and how == "one bit flipped":
      continue  # may still be the same JSON to a reader
    assert int(checkpoints.restore(small(0))["n"]) == 1, name
    (line,) = said
    assert f"{folder / '2'} is damaged: its part {name} " in line and line.endswith("trying the one before")
    assert checkpoints.steps() == [1] and "2.damaged" in os.listdir(folder)
    checkpoints.save(2, small(2))  # its place is free again
    assert int(checkpoints.restore(small(0))["n"]) == 2


def test_when_all_are_damaged_nothing_is_set_aside(tmp_path):
  checkpoints = filled(tmp_path, [1, 2], report=lambda line: None)
  for step in (1, 2):
    (tmp_path / str(step) / "checkpoint.json").unlink()
  for _ in range(2):
    with pytest.raises(
      CheckpointError, match=r"2 is damaged: its part checkpoint.json is missing, and no good"
    ):
      checkpoints.restore(small(0))
  assert checkpoints.steps() == [1, 2]


def test_a_state_of_another_model_is_no_damage(tmp_path):
  checkpoints = filled(tmp_path, [1])
  with pytest.raises(CheckpointMismatchError, match="does not fit") as e:
    checkpoints.restore({"w": jnp.zeros((3, 3)), "extra": jnp.zeros(1)})
  assert e.value.problems.missing == ["extra [1]"] and e.value.problems.unexpected == ["n []"]
  assert e.value.problems.wrong_shape == ["w: [3, 2], the model has [3, 3]"]
  with pytest.raises(CheckpointError, match="w is float32 there, and bfloat16 in this run"):
    checkpoints.restore({"w": jnp.zeros((3, 2), jnp.bfloat16), "n": jnp.zeros((), jnp.int32)})
  assert checkpoints.steps() == [1]


class FailsLater:
  """As on a real disk (test_storage.py): when the first write fails, others are still under way."""

  def __init__(self, path):
    self.path = pathlib.Path(path)

  def late(self):
    for number in range(10):
      with contextlib.suppress(FileNotFoundError):  # removed between two of its folders
        (self.path / str(number)).mkdir(parents=True, exist_ok=True)
      time.sleep(0.02)

  def result(self):
    threading.Thread(target=self.late).start()
    raise ValueError("RESOURCE_EXHAUSTED: writing file: No space left on device [details]")


def fails_at_once(*args):
  raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
  "save_async", [fails_at_once, lambda path, state: FailsLater(path)], ids=["at once", "later"]
)
def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, save_async):
  checkpoints = filled(tmp_path, [4])
  monkeypatch.setattr(ocp, "save_async", save_async)
  with pytest.raises(CheckpointError) as e:
    checkpoints.save(6, small(6))
    checkpoints.wait()
  assert str(e.value) == (
    f"{tmp_path}: the checkpoint of step 6 is not written: no space is left on its disk;"
    f" the last good checkpoint is {tmp_path / '4'}"
  )
  time.sleep(0.3)
  assert os.listdir(tmp_path) == ["4"]  # what was written of it gives its room back
  monkeypatch.undo()
  checkpoints.save(6, small(6))
  checkpoints.wait()
  assert checkpoints.steps() == [4, 6]


def test_any_other_failure_is_told_with_its_reason(tmp_path, monkeypatch):
  def denied(*args):
    raise PermissionError(errno.EACCES, "Permission denied")

  checkpoints = TrainCheckpoints(tmp_path)
  monkeypatch.setattr(ocp, "save_async", denied)
  with pytest.raises(CheckpointError, match=r"PermissionError: .*Permission denied; no checkpoint is there"):
    checkpoints.save(1, small(1))


def test_manifest_names_step_and_metrics(tmp_path):
  checkpoints = TrainCheckpoints(tmp_path)
  checkpoints.save(8, small(8), {"f1": np.float32(0.5), "bad": float("inf")})
  checkpoints.wait()
  manifest = json.loads((tmp_path / "8" / "checkpoint.json").read_text())
  assert manifest["step"] == 8 and manifest["metrics"] == {"f1": 0.5}
  assert sorted(manifest["files"]) == [name for name in parts(tmp_path / "8") if name != "checkpoint.json"]


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"keep": 0}, "keep=0; accepted: 1 or more"),
    ({"best": ("f1", "most")}, "best=.*'most'.*; accepted: None"),
    ({"directory": "gs://bucket/run"}, "directory='gs://bucket/run'; accepted: a folder"),
  ],
)
def test_mistakes(tmp_path, kwargs, message):
  with pytest.raises(ValueError, match=message):
    TrainCheckpoints(**{"directory": tmp_path} | kwargs)
