"""The ledger under SIGKILL and under two jobs at once: every image exactly once."""

import collections
import random
import signal
import time

import pytest

from sam3lt_jax.jobs import ledger
from sam3lt_jax.jobs.plan import Plan
from tests.jobs import ledgers, work
from tests.jobs.ledgers import TAILS, start


@pytest.mark.full  # 3 s
def test_killed_at_random_moments(tmp_path):
  """10 lives of a job of 100 small shards, each SIGKILLed; some wounds get a torn tail besides."""
  seed = random.randrange(10**6)
  print(f"seed {seed}")  # shown by pytest where the test fails
  rng = random.Random(seed)
  number, size, log = 400, 4, tmp_path / "log"
  directory = tmp_path / "job"
  torn = at_work = 0
  for _ in range(10):
    before = log.stat().st_size if log.exists() else 0
    kill = (rng.randrange(12), rng.uniform(0, 0.01))
    process = start(work.life, directory, number, size, 0, 1, 2, 0.002, log, kill)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, "the job ended before it was killed"
    at_work += log.exists() and log.stat().st_size > before
    for part in directory.glob("shards/*.part"):
      if rng.random() < 0.5:
        torn += 1
        with open(part, "ab") as f:
          f.write(rng.choice(list(TAILS.values())))
    for index in ledger.committed(str(directory)):
      assert ledgers.damage(str(directory), index) is None
  assert at_work >= 3, "most lives were killed before they did anything"
  work.life(directory, number, size, log=log)
  work.check_whole(directory, number)
  times = collections.Counter(log.read_text().split())
  again = sum(times.values()) - number
  print(f"{at_work} of 10 lives killed at work, {torn} tails torn, {again} images done again")
  # Of each life what was in flight is lost (2 images, and its log may be ahead of it).
  assert set(times) == {item.id for item in work.make_items(number)} and again <= 10 * 2


@pytest.mark.full  # 6 s
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
    for index in ledger.committed(str(directory)):
      assert ledgers.damage(str(directory), index) is None
    work.life(directory, 6, 3)
    work.check_whole(directory, 6)
    step += 1
  assert kills > 30
  work.check_whole(directory, 6)


@pytest.mark.full  # 26 processes; the first kills of each step are the test above
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
