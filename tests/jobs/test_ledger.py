"""The ledger: every image exactly once, whatever kills, interrupts or shares the job."""

import collections
import errno
import multiprocessing
import os
import pathlib
import random
import signal
import threading
import time

import fsspec
import pytest

from sam3lt_jax.jobs import files, ledger, locks, shard_files
from sam3lt_jax.jobs.ledger import Busy, ShardWriter
from sam3lt_jax.jobs.plan import Plan
from tests.jobs import work

# A server that has imported everything forks the processes, so that a life takes hundredths of a second.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.jobs.work"])


def start(target, *arguments):
  process = processes.Process(target=target, args=arguments, daemon=True)
  process.start()
  return process


def part_of(directory, index=0):
  return pathlib.Path(shard_files.part_path(str(directory), index))


def data_of(directory, index=0):
  return pathlib.Path(shard_files.data_path(str(directory), index))


@pytest.fixture
def plan(tmp_path):
  return work.open_plan(tmp_path / "job", number=10, shard_size=4)


def records(shard, *indices):
  return [work.record(shard.items[i]) for i in indices]


def test_a_shard_from_begin_to_commit(plan):
  shard = plan.shards[2]
  with ShardWriter(plan, shard, process=3) as writer:
    assert writer.done == set()
    writer.append(records(shard, 1))
    writer.append([])
    assert writer.done == {"0009.jpg"} and not plan.is_committed(2)
    assert part_of(plan.directory, 2).read_bytes().count(b"\n") == 1
    writer.append(records(shard, 0))
    writer.commit({"seconds": 1.5, "device": "cpu"})
  assert plan.committed() == {2} and plan.is_committed(2)
  about, lines = shard_files.read_shard(plan.directory, 2)
  assert len(lines) == 2 and list(shard_files.read_records(plan.directory, 2)) == records(shard, 1, 0)
  wanted = {
    "shard": 2,
    "records": 2,
    "failures": 0,
    "reasons": {},
    "process": 3,
    "seconds": 1.5,
    "device": "cpu",
  }
  assert wanted.items() <= about.items() and about["host"] == locks.host_name()
  assert sorted(os.listdir(data_of(plan.directory).parent)) == ["shard-00002.json", "shard-00002.jsonl"]


def test_failures_are_counted_and_some_are_shown(tmp_path):
  plan = work.open_plan(tmp_path, number=100, shard_size=100)
  with ShardWriter(plan, plan.shards[0]) as writer:
    writer.append(records(plan.shards[0], *range(50)))  # 5 failures
  with ShardWriter(plan, plan.shards[0]) as writer:  # those of an earlier run count
    writer.append(records(plan.shards[0], *range(50, 100)))
    writer.commit()
  about = shard_files.read_digest(plan.directory, 0)
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


TAILS = {
  "torn line": b'{"id":"0002.jpg","uri":"/pho',
  "line without its end": b'{"id":"0002.jpg","uri":"x"}',
  "zeros, as after a power cut": b"\0" * 4096,
  "broken line": b'{"id":"0002.jpg",\n',
  "no record": b"[]\n",
  "an id of another shard": b'{"id":"0005.jpg"}\n',
  "an id that is there": b'{"id":"0000.jpg"}\n',
  "broken, then sound": b'garbage\n{"id":"0003.jpg","uri":"x"}\n',
}


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


def test_killed_at_random_moments(tmp_path):
  """15 lives of a job of 60 small shards, each SIGKILLed; some wounds get a torn tail besides."""
  seed = random.randrange(10**6)
  print(f"seed {seed}")  # shown by pytest where the test fails
  rng = random.Random(seed)
  number, size, log = 240, 4, tmp_path / "log"
  directory = tmp_path / "job"
  torn = at_work = 0
  for _ in range(15):
    before = log.stat().st_size if log.exists() else 0
    process = start(work.life, directory, number, size, 0, 1, 2, 0.002, log)
    limit = time.monotonic() + 60
    wanted = before + 9 * rng.randrange(-3, 24)  # a line of the log has 9 bytes
    while (
      process.is_alive() and time.monotonic() < limit and (not log.exists() or log.stat().st_size <= wanted)
    ):
      time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.01))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the job ended before it was killed"
    at_work += log.exists() and log.stat().st_size > before
    for part in directory.glob("shards/*.part"):
      if rng.random() < 0.5:
        torn += 1
        with open(part, "ab") as f:
          f.write(rng.choice(list(TAILS.values())))
    for index in shard_files.committed(str(directory)):
      assert shard_files.damage(str(directory), index) is None
  assert at_work >= 5, "most lives were killed before they did anything"
  work.life(directory, number, size, log=log)
  work.check_whole(directory, number)
  times = collections.Counter(log.read_text().split())
  again = sum(times.values()) - number
  print(f"{at_work} of 15 lives killed at work, {torn} tails torn, {again} images done again")
  # Of each life what was in flight is lost (2 images, and its log may be ahead of it).
  assert set(times) == {item.id for item in work.make_items(number)} and again <= 15 * 2


def test_killed_at_every_step(tmp_path):
  """A small job is killed at its first call of the file system, at its second, ...; each is restarted."""
  step, kills = 1, 0
  while True:
    directory = tmp_path / str(step)
    process = start(work.life_until, step, directory, 6, 3)
    process.join(60)
    if process.exitcode == 0:
      break
    assert process.exitcode == -signal.SIGKILL
    kills += 1
    for index in shard_files.committed(str(directory)):
      assert shard_files.damage(str(directory), index) is None
    work.life(directory, 6, 3)
    work.check_whole(directory, 6)
    step += 1
  assert kills > 30
  work.check_whole(directory, 6)


def test_killed_twice_in_a_row_at_every_step(tmp_path):
  """The second life dies while it recovers what the first left."""
  shard_steps = range(14, 40, 2)
  for first in shard_steps:
    directory = tmp_path / str(first)
    for step in (first, random.randrange(5, 30)):
      process = start(work.life_until, step, directory, 6, 3)
      process.join(60)
      assert process.exitcode in (0, -signal.SIGKILL)
    work.life(directory, 6, 3)
    work.check_whole(directory, 6)


def test_two_jobs_on_one_folder(tmp_path):
  """Nothing is done twice, nothing is lost: both were started as if they were alone."""
  directory, log = tmp_path / "job", tmp_path / "log"
  jobs = [start(work.life, directory, 120, 4, 0, 1, 2, 0.003, log) for _ in range(2)]
  for job in jobs:
    job.join(60)
  assert [job.exitcode for job in jobs] == [0, 0]
  work.check_whole(directory, 120)
  times = collections.Counter(log.read_text().split())
  assert len(times) == 120 and set(times.values()) == {1}


def test_two_jobs_on_one_folder_one_is_killed(tmp_path):
  directory, log = tmp_path / "job", tmp_path / "log"
  jobs = [start(work.life, directory, 120, 4, i, 2, 2, 0.005, log) for i in range(2)]
  while not log.exists() or log.stat().st_size < 9 * 30:
    time.sleep(0.001)
  jobs[0].kill()
  jobs[1].join(60)
  assert jobs[1].exitcode == 0
  jobs[0].join()
  # What the dead one had begun when the other came past is left for a restart, with any number of processes.
  assert len(list(Plan.load(directory).missing(2, 3))) <= 1
  work.finish(Plan.load(directory))
  work.check_whole(directory, 120)


def test_a_shard_in_other_hands_is_busy(plan):
  with ShardWriter(plan, plan.shards[0]) as writer:
    with (
      pytest.raises(Busy, match="shard-00000: another process works on it"),
      ShardWriter(plan, plan.shards[0]),
    ):
      pass
    assert shard_files.started(plan.directory) == {0}
    writer.append(records(plan.shards[0], 0, 1, 2, 3))
    writer.commit()
  with pytest.raises(Busy, match="was committed meanwhile"), ShardWriter(plan, plan.shards[0]):
    pass
  assert plan.committed() == {0} and shard_files.started(plan.directory) == set()


def test_looking_whether_it_is_held_does_not_take_a_shard_away(plan):
  """`sam3lt status` holds the lock for a moment; a job that comes just then must not skip the shard."""
  path = shard_files.lock_path(plan.directory, 0)
  assert not locks.is_held(path)
  with ShardWriter(plan, plan.shards[0]):
    assert locks.is_held(path) and locks.holder(path)["pid"] == os.getpid()
  descriptor = os.open(path, os.O_RDONLY | os.O_CREAT)
  locks.fcntl.flock(descriptor, locks.fcntl.LOCK_SH)
  threading.Timer(0.05, locks.fcntl.flock, (descriptor, locks.fcntl.LOCK_UN)).start()
  try:
    with ShardWriter(plan, plan.shards[0]) as writer:
      assert writer.done == set()
  finally:
    os.close(descriptor)


def test_a_lock_whose_file_was_removed_is_nobodys(tmp_path, monkeypatch):
  """The holder lets go between another's open and its flock: what that locked is no longer in the folder."""
  first, second, third = (locks.FileLock(str(tmp_path / "lock")) for _ in range(3))
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


def hold_and_fork(directory, pids):
  plan = Plan.load(directory)
  with ShardWriter(plan, plan.shards[0]):
    child = os.fork()
    if child == 0:
      time.sleep(60)
      os._exit(0)
    pids.put(child)
    time.sleep(60)


def test_a_worker_that_outlives_its_parent_does_not_keep_the_lock(plan):
  pids = processes.Queue()
  parent = start(hold_and_fork, plan.directory, pids)
  child = pids.get(timeout=60)
  try:
    with pytest.raises(Busy), ShardWriter(plan, plan.shards[0]):
      pass
    parent.kill()
    parent.join()
    os.kill(child, 0)  # it lives
    with ShardWriter(plan, plan.shards[0]) as writer:
      assert writer.done == set()
  finally:
    os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks(plan, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(locks.fcntl, "flock", refuse)
  with pytest.warns(UserWarning, match="no file locks .*one job at a time"):
    work.finish(plan)
  work.check_whole(plan.directory, 10)


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
    f"cannot write {part_of(plan.directory)}: No space left on device "
    "(what was computed before is kept; make room and start the same command again)"
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
    with pytest.raises(files.CannotWrite, match="No space left"):
      writer.commit()
    monkeypatch.undo()
  assert plan.committed() == set()
  with ShardWriter(plan, shard) as writer:
    assert len(writer.done) == 4
  work.finish(plan)
  work.check_whole(plan.directory, 10)


def test_a_folder_that_is_read_only(plan, monkeypatch):
  fill_disk(monkeypatch, "open", errno.EROFS)
  with pytest.raises(files.CannotWrite, match=r"cannot write .*shard-00000\.lock: Read-only file system"):
    with ShardWriter(plan, plan.shards[0]):
      pass


def test_damage_is_found_and_done_again(plan):
  work.finish(plan)
  directory = plan.directory
  data = bytearray(data_of(directory, 1).read_bytes())
  data[30] ^= 1
  data_of(directory, 1).write_bytes(data)
  os.truncate(data_of(directory, 2), 100)
  os.unlink(shard_files.digest_path(directory, 0))
  assert [shard_files.damage(directory, i) for i in range(3)] == [
    "shard-00000 is damaged: its digest file is missing",
    "shard-00001 is damaged: its content is not what was written",
    f"shard-00002 is damaged: it has 100 of {shard_files.read_digest(directory, 2)['bytes']} bytes",
  ]
  with pytest.raises(shard_files.Damaged, match="shard-00001 is damaged"):
    shard_files.read_shard(directory, 1)
  assert list(work.open_plan(directory, 10, 4).missing()) == []
  again = work.open_plan(directory, 10, 4, verify=True)
  assert len(again.notes) == 3 and "shard-00002 is damaged: it has 100 of" in again.notes[2]
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
  assert list(shard_files.read_records(bucket.directory, 0)) == records(shard, 0, 1, 2, 3)
  with pytest.raises(Busy, match="committed meanwhile"), ShardWriter(bucket, shard):
    pass
  work.finish(bucket)
  assert [shard_files.damage(bucket.directory, i) for i in range(3)] == [None] * 3
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
      other._part._lines = {item.id: b'{"id":"%s","by":"%d"}\n' % (item.id.encode(), rng.randrange(9))
                            for item in shard.items}  # fmt: skip
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
  assert shard_files.damage(bucket.directory, 0) is None


def test_the_ledger_offers_what_the_engine_imports():
  assert issubclass(ledger.Busy, ValueError)
