import errno
import json
import os
import pathlib
import signal
import threading

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from sam3lt_jax.checkpoints.errors import CheckpointError
from sam3lt_jax.training.checkpoints import TrainCheckpoints
from sam3lt_jax.training.errors import Interrupted, NonFiniteLoss
from sam3lt_jax.training.loop import fit
from sam3lt_jax.training.run_files import working_in
from tests.training import toy


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run of 12 steps in one go: (directory, state, lines reported)."""
  said: list[str] = []
  directory = tmp_path_factory.mktemp("whole")
  return directory, toy.run(directory, 12, every=3, report=said.append), said


def test_what_a_run_leaves(whole):
  directory, state, said = whole
  assert int(state.step) == 12
  assert sorted(os.listdir(directory)) == ["checkpoints", "config.json", "metrics.jsonl"]
  assert json.loads((directory / "config.json").read_text()) == {"seed": 7}
  lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
  train = [line for line in lines if "loss" in line]
  assert [line["step"] for line in train] == list(range(1, 13))
  assert all(line["images_per_second"] > 0 and line["time"] > 1e9 for line in train)
  assert {"loss", "mae", "grad_norm", "learning_rate"} <= set(train[0]) and "finite" not in train[0]
  assert [line["step"] for line in lines if "eval_bias" in line] == [5, 10, 12]
  assert "step 5/12, loss " in said[4] and "images/s" in said[4] and said[4].endswith("left")
  assert said[5].startswith("step 5/12, eval_bias ")
  assert said[0].startswith("step 1/12, loss ") and "left" not in said[0]  # it compiled


def test_the_loss_is_that_of_the_step(whole):
  # At zero weights, before the first update (and with accumulation the second), the noise changes nothing.
  lines = [line for line in toy.lines(whole[0]) if "loss" in line]
  for index in (0, 1):
    assert lines[index]["loss"] == pytest.approx(np.mean(toy.Data()[index]["y"] ** 2), rel=1e-6)
  assert lines[0]["learning_rate"] == lines[1]["learning_rate"] == pytest.approx(1e-6)
  assert lines[2]["learning_rate"] == pytest.approx(1e-6 + (0.1 - 1e-6) / 5)


def test_the_newest_and_the_best_checkpoint_stay(whole):
  directory, state, _ = whole
  scores = {line["step"]: line["eval_bias"] for line in toy.lines(directory) if "eval_bias" in line}
  best = max(scores, key=scores.get)
  checkpoints = TrainCheckpoints(directory / "checkpoints", best=("eval_bias", "max"))
  assert checkpoints.best_step() == best
  assert checkpoints.steps() == sorted({10, 12, best})  # 10 is no multiple of 3: it was the best then
  assert toy.evaluate(checkpoints.restore_best(state))["bias"] == scores[best]
  assert toy.equal(checkpoints.restore(state), state)


@pytest.mark.full  # 5 s
@pytest.mark.parametrize("stops", [[3, 4, 11], list(range(1, 12))])
def test_resuming_at_any_step_changes_no_digit(tmp_path, whole, stops):
  for stop in stops:
    toy.run(tmp_path, stop, every=3)
  state = toy.run(tmp_path, 12, every=3)
  assert toy.equal(state, whole[1])
  losses = lambda directory: [line for line in toy.lines(directory) if "loss" in line]  # noqa: E731
  assert losses(tmp_path) == losses(whole[0])


def test_the_same_run_started_twice_is_told_so_and_nothing_is_damaged(tmp_path, whole):
  begun, done = threading.Event(), []

  def first():
    done.append(toy.run(tmp_path, 12, every=3, pause=0.02, report=lambda line: begun.set()))

  thread = threading.Thread(target=first)
  thread.start()
  assert begun.wait(60)
  said = (
    rf"^{tmp_path}: another process \(number {os.getpid()} on .*, since 20.*\) works in this folder; wait"
  )
  with pytest.raises(ValueError, match=said):
    toy.run(tmp_path, 12, every=3)
  thread.join()
  assert toy.equal(done[0], whole[1]) and toy.lines(tmp_path) == toy.lines(whole[0])
  toy.run(tmp_path, 12, every=3)  # when it has ended, nothing is left to wait for
  assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(whole[0]))


def test_a_folder_is_held_once_by_nested_calls_and_leaves_no_trace(tmp_path):
  folder = tmp_path / "run"
  with working_in(folder), working_in(tmp_path / "." / "run"):
    assert os.listdir(folder) == ["run.lock"]
  assert not folder.exists()
  with pytest.raises(KeyError), working_in(folder):
    (folder / "kept").touch()
    raise KeyError
  assert os.listdir(folder) == ["kept"]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path, whole):
  toy.run(tmp_path, 6, every=3)
  with open(tmp_path / "metrics.jsonl", "a") as f:  # written after the checkpoint, the last one torn
    f.write('{"step": 7, "time": 1.0, "loss": 123.0}\n{"step": 8, "lo')
  toy.run(tmp_path, 12, every=3)
  assert [line for line in toy.lines(tmp_path) if line["step"] > 6] == [
    line for line in toy.lines(whole[0]) if line["step"] > 6
  ]


def test_a_run_that_is_done_only_gives_its_state(tmp_path, whole):
  said: list[str] = []
  toy.run(tmp_path, 12, every=3)
  before = toy.lines(tmp_path)
  assert toy.equal(toy.run(tmp_path, 12, every=3, report=said.append), whole[1])
  assert len(said) == 1 and said[0].startswith("nothing is left to do: all 12 steps are done; to train on, ")
  assert toy.lines(tmp_path) == before


def test_the_callers_state_is_left_alone(tmp_path):
  state, step = toy.start()
  before = [x.copy() for x in toy.leaves(state)]
  toy.run(tmp_path, 3, state=state, step_fn=step)
  assert all(np.array_equal(a, b) for a, b in zip(before, toy.leaves(state), strict=True))


def test_a_damaged_checkpoint_is_passed_over_and_the_run_is_the_same(tmp_path, whole):
  toy.run(tmp_path, 6, every=3)
  (part,) = [p for p in (tmp_path / "checkpoints" / "6" / "state").rglob("*") if p.parent.name == "d"][:1]
  part.unlink()
  said: list[str] = []
  assert toy.equal(toy.run(tmp_path, 12, every=3, report=said.append), whole[1])
  assert f"its part {part.relative_to(tmp_path / 'checkpoints' / '6')} is missing" in said[0]
  assert said[1].startswith("going on after step 5 of 12")  # 5 was evaluated, and the best until then


@pytest.mark.parametrize("bad, good", [(7, 6), (0, None)])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad, good):
  with pytest.raises(NonFiniteLoss) as e:
    toy.run(tmp_path, 12, every=3, data=toy.Data(bad=bad))
  ids = list(range(8 * bad, 8 * bad + 8))
  assert e.value.step == bad + 1 and e.value.ids == ids and isinstance(e.value, ValueError)
  assert f"step {bad + 1}: the loss is nan" in str(e.value) and f"on batch {bad} of the records {ids}" in str(
    e.value
  )
  steps = TrainCheckpoints(tmp_path / "checkpoints").steps()
  assert max(steps, default=None) == good  # nothing of the bad step or after it is saved
  last = f"the last good checkpoint is {tmp_path / 'checkpoints' / '6'}"
  assert str(e.value).endswith(last if good else "there is no checkpoint yet")
  assert max((line["step"] for line in toy.lines(tmp_path)), default=0) == bad
  # With the record repaired, the run goes on as if nothing had been.
  assert int(toy.run(tmp_path, 12, every=3).step) == 12


def test_records_are_named_as_the_reader_knows_them(tmp_path):
  with pytest.raises(NonFiniteLoss, match=r"on batch 2 of the phrases 'no 16', 'no 17', .*'no 23'; ") as e:
    toy.run(tmp_path, 5, data=toy.Data(bad=2), unit="phrases", record_name="no {}".format)
  assert e.value.ids == list(range(16, 24)) and e.value.names == [f"no {i}" for i in range(16, 24)]


class WithoutIds(toy.Data):
  def __getitem__(self, step):
    batch = super().__getitem__(step)
    return {"x": batch["x"], "y": batch["y"]}


def test_batches_need_no_ids(tmp_path):
  with pytest.raises(NonFiniteLoss, match="on batch 2 whose records have no id") as e:
    toy.run(tmp_path, 5, data=WithoutIds(bad=2))
  assert e.value.ids is None


class Signals(toy.Data):
  """Sends a signal to this process when batch 8 is read."""

  def __init__(self, number):
    super().__init__(pause=0.02)
    self.number = number

  def __getitem__(self, step):
    if step == 8:
      os.kill(os.getpid(), self.number)
    return super().__getitem__(step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(tmp_path, whole, number):
  before = signal.getsignal(number)
  with pytest.raises(Interrupted) as e:
    toy.run(tmp_path, 12, every=100, data=Signals(number))
  assert signal.getsignal(number) is before
  step = e.value.step
  assert 5 <= step <= 9 and e.value.signal == number
  path = tmp_path / "checkpoints" / str(step)
  assert str(e.value) == (
    f"stopped by {number.name} after step {step} of 12; the last good checkpoint is {path};"
    " start again to go on"
  )
  assert path.is_dir()
  assert toy.equal(toy.run(tmp_path, 12, every=3), whole[1])


def test_runs_in_a_thread_where_no_signal_can_be_caught(tmp_path):
  found = []
  thread = threading.Thread(target=lambda: found.append(toy.run(tmp_path, 2)))
  thread.start()
  thread.join(60)
  assert int(found[0].step) == 2


def test_a_changed_configuration_is_named(tmp_path):
  old = {"optimizer": {"peak_lr": 0.1, "b1": 0.9}, "data": "a.json", "gone": 1}
  new = {"optimizer": {"peak_lr": 0.2, "b1": 0.9}, "data": "a.json", "added": [1, 2]}
  toy.run(tmp_path, 2, fingerprint=old)
  with pytest.raises(ValueError) as e:
    toy.run(tmp_path, 4, fingerprint=new)
  assert str(e.value) == (
    f"{tmp_path / 'config.json'}: the run in this directory was started with another configuration:"
    " gone was 1, is absent; optimizer/peak_lr was 0.1, is 0.2; added was absent, is [1, 2]; go on with the"
    " old one, or start another run in a new directory (from this one's model, where that is wanted)"
  )
  assert json.loads((tmp_path / "config.json").read_text()) == old
  toy.run(tmp_path, 4, fingerprint=old)


def test_a_configuration_without_checkpoints_is_replaced(tmp_path):
  (tmp_path / "config.json").write_text('{"seed": 1}')
  toy.run(tmp_path, 1)
  assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 7}


class Skips(toy.Data):
  skipped: dict[str, int]

  def __init__(self):
    super().__init__()
    self.skipped = {"empty": 0}

  def __getitem__(self, step):
    if step == 0:
      self.skipped = {"empty": 2, "unreadable": 1}
    return super().__getitem__(step)


def test_skipped_records_are_told_once(tmp_path):
  said: list[str] = []
  toy.run(tmp_path, 3, data=Skips(), report=said.append, evaluate_every=100)
  told = [line for line in said if "skipped" in line]
  assert len(told) == 1 and told[0].endswith("; skipped so far: 2 empty, 1 unreadable")


class Broken(toy.Data):
  def __getitem__(self, step):
    if step == 3:
      raise OSError("cannot read img.png")
    return super().__getitem__(step)


def test_what_data_raises_names_the_batch(tmp_path):
  with pytest.raises(OSError, match=r"cannot read img.png") as e:
    toy.run(tmp_path, 6, every=1, data=Broken())
  assert e.value.__notes__ == ["while reading batch 3"]
  assert TrainCheckpoints(tmp_path / "checkpoints").steps()[-1] == 3  # what was being written was finished
  assert not [t for t in threading.enumerate() if "Prefetch" in t.name]


class FullDisk:
  def result(self):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_ends_the_run_soon(tmp_path, monkeypatch):
  toy.run(tmp_path, 2)
  monkeypatch.setattr(ocp, "save_async", lambda *args: FullDisk())
  with pytest.raises(CheckpointError) as e:
    toy.run(tmp_path, 100, every=4, pause=0.02, evaluate=None, best=None)
  path = tmp_path / "checkpoints"
  assert str(e.value) == (
    f"{path}: the checkpoint of step 4 is not written: no space is left on its disk;"
    f" the last good checkpoint is {path / '2'}"
  )
  assert 4 <= toy.lines(tmp_path)[-1]["step"] < 8  # before the next checkpoint


def test_a_full_disk_for_metrics_is_one_sentence(tmp_path):
  if not pathlib.Path("/dev/full").exists():
    pytest.skip("needs /dev/full")
  from sam3lt_jax.training.run_files import MetricsLog

  log = MetricsLog(str(tmp_path / "metrics.jsonl"), 0)
  log._file = open("/dev/full", "w")
  with pytest.raises(CheckpointError, match=r"metrics.jsonl is not written: no space is left .* are kept"):
    log.write({"step": 1})


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"log_every": 0}, "log_every=0; accepted: 1 or more steps"),
    ({"every": 0}, "checkpoint_every=0; accepted: 1 or more steps"),
    ({"evaluate": None}, "best=.* needs evaluate"),
    ({"best": ("eval_f1", "max")}, r"best=\('eval_f1', 'max'\); evaluate gives eval_bias"),
    ({"fingerprint": {"x": object()}}, "fingerprint: .*accepted: what JSON can hold"),
  ],
)
def test_mistakes(tmp_path, kwargs, message):
  with pytest.raises(ValueError, match=message):
    toy.run(tmp_path, 5, **kwargs)


def test_the_fewest_arguments(tmp_path, capsys):
  state, step = toy.start()
  state = fit(state, step, toy.Data(), total_steps=3, directory=str(tmp_path))
  assert int(state.step) == 3
  assert "step 3/3, loss " in capsys.readouterr().out
  assert TrainCheckpoints(tmp_path / "checkpoints").steps() == [2, 3]
