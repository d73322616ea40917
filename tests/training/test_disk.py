"""Disks that are really full, or cannot be written: one sentence, and nothing half written stays."""

import contextlib
import errno
import os
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.checkpoints.errors import CheckpointError
from sam3lt_jax.training import disk
from sam3lt_jax.training.checkpoints import TrainCheckpoints
from sam3lt_jax.training.outcome import write_outcome
from sam3lt_jax.training.run_files import MetricsLog, check_fingerprint
from tests import tiny
from tests.training import mounts, toy

FULL = "no space is left on its disk"


@pytest.fixture
def complaints(monkeypatch):
  """What would have been shown on stderr by Python itself, for exceptions that nobody catches."""
  seen = []
  monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(args.exc_value))
  return seen


def big(value: float, arrays: int = 40):
  """6 MB that do not compress, in arrays that are written side by side."""
  draw = np.random.default_rng(int(value)).normal
  return {f"w{i}": jnp.asarray(draw(size=40_000), jnp.float32) for i in range(arrays)}


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
      check_fingerprint(str(small / "config.json"), {"x": ["y"] * 9999}, resuming=False)
    (small / "filler").unlink()
    MetricsLog(str(small / "metrics.jsonl"), 5).close()


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


@pytest.mark.parametrize(
  "error, full",
  [
    # What the parts we write with really raise.
    (OSError(errno.ENOSPC, "No space left on device"), True),
    (OSError(errno.EDQUOT, "quota"), True),
    (OSError("43008 requested and 18368 written"), True),  # numpy
    (
      ValueError("RESOURCE_EXHAUSTED: Failed writing: \"x\": No space left on device [os_error_code='28']"),
      True,
    ),
    (ValueError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
    (OSError(errno.EIO, "broken"), False),
    (ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes"), False),  # of a device
    (ValueError("RESOURCE_EXHAUSTED: Failed opening \"x\": Too many open files [os_error_code='24']"), False),
    (None, False),
  ],
)
def test_is_disk_full(error, full):
  assert disk.is_disk_full(error) is full


def test_is_disk_full_looks_at_causes():
  try:
    try:
      raise OSError(errno.EDQUOT, "quota")
    except OSError as e:
      raise RuntimeError("save failed") from e
  except RuntimeError as e:
    assert disk.is_disk_full(e)


def test_other_errors_pass_as_they_are():
  with pytest.raises(PermissionError), disk.needs_room("x", "all is kept"):
    raise PermissionError(errno.EACCES, "Permission denied")
  told = CheckpointError("told already")
  with pytest.raises(CheckpointError) as e, disk.needs_room("x", "all is kept"):
    raise told from OSError(errno.ENOSPC, "full")
  assert e.value is told


def test_a_folder_that_is_still_written_into_goes(tmp_path):
  def write():
    for number in range(20):
      with contextlib.suppress(FileNotFoundError):  # removed between two of its folders
        os.makedirs(tmp_path / "x" / str(number), exist_ok=True)
      time.sleep(0.02)

  (tmp_path / "y").mkdir()
  thread = threading.Thread(target=write)
  thread.start()
  disk.remove(str(tmp_path), "x*")
  thread.join()
  assert os.listdir(tmp_path) == ["y"]


def test_other_unraisable_errors_are_still_shown(complaints):
  disk.quiet_orbax()
  disk.quiet_orbax()

  class Args:
    exc_type, exc_value = RuntimeError, RuntimeError("Event loop is closed")

  sys.unraisablehook(Args)  # in a thread of Python's, so somebody else's
  assert complaints == [Args.exc_value]


def test_a_directory_is_checked_and_left_as_it_was(tmp_path):
  disk.check_directory(tmp_path, "out")
  disk.check_directory(tmp_path / "a" / "b", "out")
  assert os.listdir(tmp_path) == []
  (tmp_path / "file").write_text("")
  for given in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(ValueError) as e:
      disk.check_directory(given, "out")
    assert str(e.value) == (
      f"out={str(given)!r}: {tmp_path / 'file'} is no directory; accepted: a directory, there or not yet"
    )
  with pytest.raises(ValueError, match="out='gs://bucket/run'; accepted: a folder of a file system"):
    disk.check_directory("gs://bucket/run", "out")


def test_a_directory_that_cannot_be_written(tmp_path):
  with mounts.tmpfs(tmp_path / "disk", "ro") as disk_:
    with pytest.raises(ValueError) as e:
      disk.check_directory(disk_ / "run", "out")
  assert str(e.value) == (
    f"out={str(disk_ / 'run')!r}: nothing can be written in {disk_} (Read-only file system)"
  )
