"""The ledger on full, read-only and damaged disks and on object stores."""

import errno
import os
import random

import fsspec
import pytest

from sam3lt_jax.jobs import files, ledger
from sam3lt_jax.jobs.ledger import Busy, ShardWriter
from tests.jobs import ledgers, work
from tests.jobs.ledgers import data_of, part_of, records


def fill_disk(monkeypatch, name, number=errno.ENOSPC):
  def fail(*args, **kwargs):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize("half", [False, True], ids=["at once", "after half"])
def test_a_full_disk_keeps_what_was_computed(plan, monkeypatch, half):
  shard = plan.shards[0]
  pwrite = os.pwrite
  with ShardWriter(plan, shard) as writer:
    writer.append(records(shard, 0, 1))

    def full(descriptor, data, offset):
      if half and len(data) > 50:
        return pwrite(descriptor, data[:50], offset)
      raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(files.CannotWrite) as error:
      writer.append(records(shard, 2, 3))
    assert writer.done == {"0000.jpg", "0001.jpg"}
    assert len(part_of(plan.directory).read_bytes().splitlines()) == 2
    monkeypatch.undo()
  assert str(error.value) == (
    f"{part_of(plan.directory)} is not written: no space is left on its disk; "
    "what was computed before is kept: mend that and start the same command again"
  )
  with ShardWriter(plan, shard) as writer:
    assert writer.done == {"0000.jpg", "0001.jpg"}
  work.finish(plan)
  work.check_whole(plan.directory, 10)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_at_the_commit(plan, monkeypatch, call):
  shard = plan.shards[0]
  with ShardWriter(plan, shard) as writer:
    writer.append(records(shard, 0, 1, 2, 3))
    fill_disk(monkeypatch, call)
    with pytest.raises(files.CannotWrite, match="no space is left"):
      writer.commit()
    monkeypatch.undo()
  assert plan.committed() == set()
  with ShardWriter(plan, shard) as writer:
    assert len(writer.done) == 4
  work.finish(plan)
  work.check_whole(plan.directory, 10)


def test_a_folder_that_is_read_only(plan, monkeypatch):
  fill_disk(monkeypatch, "open", errno.EROFS)
  with pytest.raises(files.CannotWrite, match=r"shard-00000\.lock is not written: Read-only file system"):
    with ShardWriter(plan, plan.shards[0]):
      pass


def test_damage_is_found_and_done_again(plan):
  work.finish(plan)
  directory = plan.directory
  data = bytearray(data_of(directory, 1).read_bytes())
  data[30] ^= 1
  data_of(directory, 1).write_bytes(data)
  os.truncate(data_of(directory, 2), 100)
  os.unlink(ledger.path(directory, 0, ledger.DIGEST))
  assert [ledgers.damage(directory, i) for i in range(3)] == [
    "shard-00000 is damaged: its digest file is missing",
    "shard-00001 is damaged: its content is not what was written",
    f"shard-00002 is damaged: it has 100 of {ledger.read_digests(directory, [2])[2]['bytes']} bytes",
  ]
  with pytest.raises(ledger.Damaged, match="shard-00001 is damaged"):
    ledger.read_shard(directory, 1)
  quick = work.open_plan(directory, 10, 4)  # finds what sizes and digest files tell
  assert [note.partition(":")[0] for note in quick.notes] == [
    "shard-00000 is damaged",
    "shard-00002 is damaged",
  ]
  assert [shard.index for shard in quick.missing()] == [0, 2]
  again = work.open_plan(directory, 10, 4, verify=True)
  assert again.notes == ["shard-00001 is damaged: its content is not what was written: it is done again"]
  assert [shard.index for shard in again.missing()] == [0, 1, 2]
  assert (data_of(directory, 1).parent / "shard-00001.jsonl.damaged").read_bytes() == data
  work.finish(again)
  work.check_whole(directory, 10)
  assert work.open_plan(directory, 10, 4, verify=True).notes == []


@pytest.fixture
def bucket():
  fs = fsspec.filesystem("memory")
  fs.store.clear()
  yield work.open_plan("memory://bucket/job", number=10, shard_size=4)
  fs.store.clear()


def test_object_store(bucket):
  shard = bucket.shards[0]
  with ShardWriter(bucket, shard) as writer:
    writer.append(records(shard, 3, 2))
    assert files.names("memory://bucket/job/shards") == []
  with ShardWriter(bucket, shard) as writer:  # what is not put is lost
    assert writer.done == set()
    writer.append(records(shard, 3, 2))
    writer.append(records(shard, 1, 0))
    writer.commit()
  assert bucket.committed() == {0}
  assert ledger.read_shard(bucket.directory, 0)[1] == records(shard, 0, 1, 2, 3)
  with pytest.raises(Busy, match="committed meanwhile"), ShardWriter(bucket, shard):
    pass
  work.finish(bucket)
  assert [ledgers.damage(bucket.directory, i) for i in range(3)] == [None] * 3
  fs = fsspec.filesystem("memory")
  fs.pipe_file("/bucket/job/shards/shard-00001.jsonl", b"{}\n")
  assert len(work.open_plan("memory://bucket/job", 10, 4, verify=True).notes) == 1
  assert [s.index for s in bucket.missing()] == [1]


@pytest.mark.parametrize("seed", range(6))
def test_two_jobs_put_one_shard_of_an_object_store(bucket, monkeypatch, seed):
  """In whatever order their puts come: the digest that stays is that of the data that stays."""
  rng = random.Random(seed)
  shard = bucket.shards[0]
  put = files.write_atomic
  inside = False

  def interleaved(path, data):
    nonlocal inside
    put(path, data)
    if not inside and rng.random() < 0.7:
      inside = True
      other = ShardWriter(bucket, shard)
      other.done = {item.id for item in shard.items}
      other._started, other._recovered = 0, 0
      line = '{"id":"%s","results":[],"by":"%d"}\n'
      other._lines = {item.id: (line % (item.id, rng.randrange(9))).encode() for item in shard.items}
      monkeypatch.setattr(files, "exists", lambda path: False)  # it looked before the first one's put
      other.commit()
      inside = False

  with ShardWriter(bucket, shard) as writer:
    writer.append(records(shard, 0, 1, 2, 3))
    monkeypatch.setattr(files, "write_atomic", interleaved)
    try:
      writer.commit()
    except files.CannotWrite as e:
      assert "another job keeps writing it" in str(e)
  monkeypatch.undo()
  assert ledgers.damage(bucket.directory, 0) is None
