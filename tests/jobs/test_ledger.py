"""The ledger: every image exactly once, whatever kills, interrupts or shares the job."""

import errno
import os
import socket
import threading

import pytest

from sam3lt_jax import storage
from sam3lt_jax.jobs import ledger
from sam3lt_jax.jobs.ledger import Busy, ShardWriter
from tests.jobs import ledgers, work
from tests.jobs.ledgers import TAILS, data_of, part_of, records


def test_a_shard_from_begin_to_commit(plan):
  shard = plan.shards[2]
  with ShardWriter(plan, shard, process=3) as writer:
    assert writer.done == set()
    writer.append(records(shard, 1))
    writer.append([])
    assert writer.done == {"0009.jpg"} and not plan.committed()
    assert part_of(plan.directory, 2).read_bytes().count(b"\n") == 1
    writer.append(records(shard, 0))
    writer.commit(seconds=1.5, device="cpu")
  assert plan.committed() == {2}
  about, lines = ledger.read_shard(plan.directory, 2)
  assert len(lines) == 2 and ledger.read_shard(plan.directory, 2)[1] == records(shard, 1, 0)
  wanted = {
    "shard": 2,
    "records": 2,
    "failures": 0,
    "reasons": {},
    "process": 3,
    "seconds": 1.5,
    "device": "cpu",
  }
  assert wanted.items() <= about.items() and about["host"] == socket.gethostname()
  assert sorted(os.listdir(data_of(plan.directory).parent)) == ["shard-00002.json", "shard-00002.jsonl"]


def test_failures_are_counted_and_some_are_shown(tmp_path):
  plan = work.open_plan(tmp_path, number=100, shard_size=100)
  with ShardWriter(plan, plan.shards[0]) as writer:
    writer.append(records(plan.shards[0], *range(50)))  # 5 failures
  with ShardWriter(plan, plan.shards[0]) as writer:  # those of an earlier run count
    writer.append(records(plan.shards[0], *range(50, 100)))
    writer.commit()
  about = ledger.read_shard(plan.directory, 0)[0]
  assert about["failures"] == 10 and about["reasons"] == {"truncated": 10} and about["recovered"] == 50
  assert [e["id"] for e in about["examples"]] == ["0007.jpg", "0017.jpg", "0027.jpg"]
  assert set(about["examples"][0]) == {"id", "uri", "error", "message"}


def test_leaving_without_commit_keeps_what_was_written(plan):
  shard = plan.shards[0]
  with pytest.raises(RuntimeError, match="the model failed"):
    with ShardWriter(plan, shard) as writer:
      writer.append(records(shard, 2, 0))
      raise RuntimeError("the model failed")
  with ShardWriter(plan, shard) as writer:
    assert writer.done == {"0000.jpg", "0002.jpg"}
    with pytest.raises(ValueError, match=r"2 items have no record \(such as '0001.jpg'\)"):
      writer.commit()
    writer.append(records(shard, 1, 3))
    writer.commit()
  work.finish(plan)
  work.check_whole(plan.directory, 10)


def test_an_untouched_shard_leaves_no_file(plan):
  with ShardWriter(plan, plan.shards[0]):
    assert part_of(plan.directory).exists()
  assert os.listdir(part_of(plan.directory).parent) == []


def test_wrong_records_are_refused(plan):
  shard = plan.shards[0]
  with ShardWriter(plan, shard) as writer:
    writer.append(records(shard, 0))
    twice = {"id": "0001.jpg"}
    for bad, message in [
      ([{"id": "0004.jpg"}], "'0004.jpg' is no item of shard-00000"),
      ([{}], "None is no item"),
      ([{"id": "0000.jpg"}], "'0000.jpg' has a record already"),
      ([twice, twice], "'0001.jpg' has a record already"),
      ([{"id": "0001.jpg", "score": float("nan")}], "'0001.jpg' cannot be written as JSON"),
      ([{"id": "0001.jpg", "score": {1}}], "'0001.jpg' cannot be written as JSON"),
    ]:
      with pytest.raises(ValueError, match=message):
        writer.append(bad)
    assert writer.done == {"0000.jpg"} and part_of(plan.directory).read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_a_torn_tail_is_cut(plan, tail):
  shard = plan.shards[0]
  with ShardWriter(plan, shard) as writer:
    writer.append(records(shard, 0, 1))
  sound = part_of(plan.directory).read_bytes()
  part_of(plan.directory).write_bytes(sound + tail)
  with ShardWriter(plan, shard) as writer:
    assert writer.done == {"0000.jpg", "0001.jpg"}
    assert part_of(plan.directory).read_bytes() == sound
  work.finish(plan)
  work.check_whole(plan.directory, 10)


def test_a_shard_in_other_hands_is_busy(plan):
  with ShardWriter(plan, plan.shards[0]) as writer:
    with (
      pytest.raises(Busy, match="shard-00000: another process works on it"),
      ShardWriter(plan, plan.shards[0]),
    ):
      pass
    assert ledgers.started(plan.directory) == {0}
    writer.append(records(plan.shards[0], 0, 1, 2, 3))
    writer.commit()
  with pytest.raises(Busy, match="was committed meanwhile"), ShardWriter(plan, plan.shards[0]):
    pass
  assert plan.committed() == {0} and ledgers.started(plan.directory) == set()


def test_looking_whether_it_is_held_does_not_take_a_shard_away(plan):
  """`sam3lt status` holds the lock for a moment; a job that comes just then must not skip the shard."""
  path = ledger.path(plan.directory, 0, ledger.LOCK)
  assert not storage.is_held(path)
  with ShardWriter(plan, plan.shards[0]):
    assert storage.is_held(path) and storage.holder(path)["pid"] == os.getpid()
  descriptor = os.open(path, os.O_RDONLY | os.O_CREAT)
  storage.fcntl.flock(descriptor, storage.fcntl.LOCK_SH)
  threading.Timer(0.05, storage.fcntl.flock, (descriptor, storage.fcntl.LOCK_UN)).start()
  try:
    with ShardWriter(plan, plan.shards[0]) as writer:
      assert writer.done == set()
  finally:
    os.close(descriptor)


def test_a_lock_may_be_let_go_while_its_holder_speaks(tmp_path, monkeypatch):
  """In another thread: what is written must not meet a closed file, or another one that got its number."""
  lock, truncate = storage.FileLock(str(tmp_path / "lock")), os.ftruncate
  assert lock.acquire()
  letting_go = threading.Thread(target=lock.release)

  def slow(descriptor, size):
    letting_go.start()
    letting_go.join(0.2)
    truncate(descriptor, size)

  monkeypatch.setattr(os, "ftruncate", slow)
  lock.say({"pid": 1})
  letting_go.join()
  assert not (tmp_path / "lock").exists()
  monkeypatch.undo()
  lock.say({"pid": 1})
  assert not (tmp_path / "lock").exists()


def test_a_lock_whose_file_was_removed_is_nobodys(tmp_path, monkeypatch):
  """The holder lets go between another's open and its flock: what that locked is no longer in the folder."""
  first, second, third = (storage.FileLock(str(tmp_path / "lock")) for _ in range(3))
  assert first.acquire(0)
  os_open = os.open

  def open_late(*args):
    descriptor = os_open(*args)
    first.release()
    return descriptor

  monkeypatch.setattr(os, "open", open_late)
  assert second.acquire(1)
  monkeypatch.undo()
  assert not third.acquire(0)
  second.release()
  assert third.acquire(0)
  third.release()
  assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks(plan, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(storage.fcntl, "flock", refuse)
  with pytest.warns(UserWarning, match="no file locks .*one job at a time"):
    work.finish(plan)
  work.check_whole(plan.directory, 10)
