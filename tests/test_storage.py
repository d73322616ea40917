"""Full disks and such that cannot be written, files that are whole or not there, and signals."""

import contextlib
import errno
import os
import shutil
import signal
import threading
import time

import pytest

from sam3lt_jax import storage
from sam3lt_jax.checkpoints import CheckpointError, save_pretrained
from tests import mounts, tiny


@pytest.mark.full  # 3 s
@pytest.mark.parametrize(
  "format, size",
  [("orbax", "16k"), ("orbax", "300k"), ("orbax", "2m"), ("orbax", "6m"), ("transformers", "2m")],
)
def test_a_save_on_a_full_disk_leaves_what_was_there(tmp_path, format, size, complaints, caplog, capfd):
  model, variables = tiny.load(tiny.config(vocab_size=49408))  # 6.7 MB
  with mounts.tmpfs(tmp_path / "disk", f"size={size}") as small:
    (small / "model").mkdir()
    (small / "model" / "note").write_text("of before")
    with pytest.raises(CheckpointError) as e:
      save_pretrained(small / "model", model, variables, format=format, overwrite=True)
    assert str(e.value) == (
      f"{small / 'model'} is not written: no space is left on its disk; make room and save again"
    )
    assert os.listdir(small) == ["model"] and os.listdir(small / "model") == ["note"]
    time.sleep(0.3)
    assert os.listdir(small) == ["model"]
  assert complaints == [] and caplog.records == [] and capfd.readouterr() == ("", "")


def test_a_save_that_fails_otherwise_leaves_nothing_and_the_error_is_its_own(tmp_path):
  model, variables = tiny.load(tiny.config())
  with pytest.raises(CheckpointError, match=r"tokenizer: .*nowhere has no tokenizer files"):
    save_pretrained(tmp_path / "model", model, variables, tokenizer=tmp_path / "nowhere")
  assert os.listdir(tmp_path) == []


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
  assert storage.is_disk_full(error) is full


def test_is_disk_full_looks_at_causes():
  try:
    try:
      raise OSError(errno.EDQUOT, "quota")
    except OSError as e:
      raise RuntimeError("save failed") from e
  except RuntimeError as e:
    assert storage.is_disk_full(e)


def test_a_full_disk_is_one_sentence_and_other_errors_pass_as_they_are():
  with pytest.raises(PermissionError), storage.writing("x", "all is kept"):
    raise PermissionError(errno.EACCES, "Permission denied")
  with pytest.raises(CheckpointError) as e, storage.writing("x", "all is kept", CheckpointError):
    raise OSError(errno.ENOSPC, "full")
  assert str(e.value) == "x is not written: no space is left on its disk; all is kept"


def test_a_folder_that_is_still_written_into_goes(tmp_path):
  def write():
    for number in range(20):
      with contextlib.suppress(FileNotFoundError):  # removed between two of its folders
        os.makedirs(tmp_path / "x" / str(number), exist_ok=True)
      time.sleep(0.02)

  (tmp_path / "y").mkdir()
  thread = threading.Thread(target=write)
  thread.start()
  storage.remove(str(tmp_path), "x*")
  thread.join()
  assert os.listdir(tmp_path) == ["y"]


def test_what_does_not_fit_is_told_before_it_is_written(tmp_path):
  free = shutil.disk_usage(tmp_path).free
  storage.need_room(str(tmp_path), free // 2)
  with pytest.raises(OSError) as e:
    storage.need_room(str(tmp_path), 2 * free)
  assert e.value.errno == errno.ENOSPC


@pytest.mark.parametrize("alone", [True, False])
def test_a_file_is_whole_or_as_it_was(tmp_path, alone):
  path = tmp_path / "file"
  with storage.atomic(str(path), alone) as f:
    f.write(b"first")
  with pytest.raises(KeyboardInterrupt), storage.atomic(str(path), alone) as f:
    f.write(b"second")
    raise KeyboardInterrupt
  assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"first"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_what_it_did_before(number):
  def own(*_):
    raise InterruptedError

  asked = []
  before = {n: signal.signal(n, own) for n in (signal.SIGTERM, signal.SIGINT)}
  try:
    with storage.signals(lambda: asked.append("stop")) as caught:
      os.kill(os.getpid(), number)
      assert caught == [number] and asked == ["stop"]
      with pytest.raises(InterruptedError):
        os.kill(os.getpid(), number)
    with storage.signals():
      pass
    assert signal.getsignal(number) is own
  finally:
    for n, handler in before.items():
      signal.signal(n, handler)


def test_a_directory_is_checked_and_left_as_it_was(tmp_path):
  storage.check_directory(tmp_path, "out")
  storage.check_directory(tmp_path / "a" / "b", "out")
  assert os.listdir(tmp_path) == []
  (tmp_path / "file").write_text("")
  for given in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(ValueError) as e:
      storage.check_directory(given, "out")
    assert str(e.value) == (
      f"out={str(given)!r}: {tmp_path / 'file'} is no directory; accepted: a directory, there or not yet"
    )
  with pytest.raises(ValueError, match="out='gs://bucket/run'; accepted: a folder of a file system"):
    storage.check_directory("gs://bucket/run", "out")


def test_a_directory_that_cannot_be_written(tmp_path):
  with mounts.tmpfs(tmp_path / "disk", "ro") as disk_:
    with pytest.raises(ValueError) as e:
      storage.check_directory(disk_ / "run", "out")
  assert str(e.value) == (
    f"out={str(disk_ / 'run')!r}: nothing can be written in {disk_} (Read-only file system)"
  )
