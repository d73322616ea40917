"""`sam3lt status`: what is done, in work and missing, failures, rate, hosts; during the job and after."""

import json
import os
import time

import fsspec
import pytest

from sam3lt_jax import cli
from sam3lt_jax.jobs import ledger, status
from sam3lt_jax.jobs.ledger import ShardWriter
from sam3lt_jax.jobs.status import Watcher, duration, job_status, table
from tests.jobs import work

NOW = 1_000_000.0


def commit(plan, index, start=NOW, end=NOW, host="h", process=0):
  """A shard that `host` worked on from `start` to `end`."""
  shard = plan.shards[index]
  with ShardWriter(plan, shard, process) as writer:
    writer.append([work.record(item) for item in shard.items if item.id not in writer.done])
    writer.commit(started=start, committed=end, host=host)


@pytest.fixture
def plan(tmp_path):
  return work.open_plan(tmp_path / "job", number=50, shard_size=10)


def test_a_job_while_it_runs(plan):
  commit(plan, 0)
  with ShardWriter(plan, plan.shards[2]) as killed:
    killed.append([work.record(item) for item in plan.shards[2].items[:4]])
  with ShardWriter(plan, plan.shards[1], process=3) as writer:
    writer.append([work.record(item) for item in plan.shards[1].items[:8]])
    now = job_status(plan.directory)
    assert now.shards == {"total": 5, "done": 1, "running": 1, "stopped": 1, "missing": 2, "damaged": 0}
    assert now.images == {"total": 50, "done": 22, "failed": 2} and not now.finished
    assert now.failures == {"truncated": 2}
    assert [e["id"] for e in now.examples] == ["0007.jpg", "0017.jpg"]
    assert set(now.examples[0]) == {"id", "uri", "error", "message"}
    (running,) = [host for host in now.hosts if host["running"]]
    assert running["process"] == 3 and running["running"] == ["shard-00001"] and running["images"] == 8
    assert " images a second lately, " in table(now)
    assert len(now.hosts) == 2  # who left shard 2 is not known
    assert now.to_json()["finished"] is False and json.dumps(now.to_json())
    # Looking does not disturb it.
    writer.append([work.record(item) for item in plan.shards[1].items[8:]])
    writer.commit()
  assert job_status(plan.directory).shards["done"] == 2


def test_a_finished_job(plan):
  for i in range(5):
    commit(plan, i, NOW + 10 * i, NOW + 10 * i + 10, host="ab"[i % 2])
  now = job_status(plan.directory, now=NOW + 86400)
  assert now.finished and now.seconds_left == 0 and now.rate == pytest.approx(1.0)
  assert now.images == {"total": 50, "done": 50, "failed": 5}
  assert [(h["host"], h["shards"], h["images"], h["last"]) for h in now.hosts] == [
    ("a", 3, 30, 86350), ("b", 2, 20, 86360)
  ]  # fmt: skip
  assert "1.00 images a second over all; finished" in table(now)


def test_rate_and_time_left(plan):
  """Two hosts, a shard of 10 images in 20 s each, since a minute: 1 a second; half a minute for the rest."""
  commit(plan, 0, NOW - 20, NOW, "a")
  commit(plan, 1, NOW - 20, NOW, "b")
  now = job_status(plan.directory, now=NOW)
  assert now.rate == pytest.approx(1.0) and now.seconds_left == pytest.approx(30)
  assert [host["rate"] for host in now.hosts] == [pytest.approx(0.5)] * 2
  # A pause counts: the same work, looked at 20 s later.
  assert job_status(plan.directory, now=NOW + 20).rate == pytest.approx(0.5)
  # Nothing was done lately.
  late = job_status(plan.directory, now=NOW + status.WINDOW + 30)
  assert late.rate is None and late.seconds_left is None
  assert late.last == status.WINDOW + 30 and "no process works on it now; last written 10 min ago" in table(
    late
  )


def test_rate_over_the_window_only(plan):
  commit(plan, 0, NOW - 100_000, NOW - 99_000)  # an earlier run
  commit(plan, 1, NOW - 2 * status.WINDOW, NOW)  # half of it within the window
  assert job_status(plan.directory, now=NOW).rate == pytest.approx(5 / status.WINDOW)


def test_what_earlier_runs_did_is_not_this_ones_rate(plan):
  with ShardWriter(plan, plan.shards[0]) as writer:
    writer.append([work.record(item) for item in plan.shards[0].items[:8]])
  commit(plan, 0, NOW - 10, NOW)
  assert job_status(plan.directory, now=NOW).rate == pytest.approx(0.2)


def test_a_shard_in_work_counts_to_the_rate(plan):
  with ShardWriter(plan, plan.shards[0]) as writer:
    writer.append([work.record(item) for item in plan.shards[0].items[:6]])
    lock = ledger.path(plan.directory, 0, ledger.LOCK)
    about = json.loads(open(lock).read())
    assert about["recovered"] == 0 and about["pid"] == os.getpid()
    with open(lock, "w") as f:
      json.dump(about | {"started": NOW - 12}, f)
    os.utime(ledger.path(plan.directory, 0, ledger.PART), (NOW, NOW))
    now = job_status(plan.directory, now=NOW)
  assert now.rate == pytest.approx(0.5) and now.seconds_left == pytest.approx(88)


def test_damage(plan, capsys):
  for i in range(5):
    commit(plan, i)
  os.truncate(ledger.path(plan.directory, 1), 10)
  os.unlink(ledger.path(plan.directory, 3, ledger.DIGEST))
  with open(ledger.path(plan.directory, 4), "r+b") as f:
    f.write(b"?")
  quick = job_status(plan.directory)  # sizes are compared; what has the right size is read on demand
  assert quick.shards["damaged"] == 2 and quick.shards["done"] == 3 and not quick.finished
  assert [text.partition(" ")[0] for text in quick.damaged] == ["shard-00001", "shard-00003"]
  assert job_status(plan.directory, verify=True).shards["damaged"] == 3
  assert cli.main(["status", plan.directory, "--verify"]) == 1
  out = capsys.readouterr().out
  assert "2 done, 0 missing, 3 damaged of 5" in out
  assert "damaged  shard-00001 is damaged: it has 10 of" in out and "--repair" in out
  assert cli.main(["status", plan.directory, "--repair", "--json"]) == 0
  out, err = capsys.readouterr()
  assert err.count("set aside") == 3 and json.loads(out)["shards"]["missing"] == 3
  work.finish(plan)
  work.check_whole(plan.directory, 50)
  assert cli.main(["status", plan.directory, "--repair", "--json"]) == 0
  out, err = capsys.readouterr()
  assert err == "" and json.loads(out)["finished"] is True


def test_right_after_a_stop_it_tells_when_it_was_written(plan):
  """The shard that was left in order names no host any more; when it was written the file itself tells."""
  with ShardWriter(plan, plan.shards[0]) as writer:
    writer.append([work.record(item) for item in plan.shards[0].items[:6]])
  os.utime(ledger.path(plan.directory, 0, ledger.PART), (NOW, NOW))
  now = job_status(plan.directory, now=NOW + 12)
  assert now.last == 12 and now.hosts == [] and now.shards["stopped"] == 1
  assert "  rate     no process works on it now; last written 12 s ago" in table(now)
  assert "nothing is written yet" in table(job_status(work.open_plan(plan.directory + "2").directory))


def test_edited_files_in_a_jobs_folder(plan, capsys):
  """Each is a damaged shard in a sentence, or nothing to care about; never a traceback."""
  commit(plan, 0)
  digest = ledger.path(plan.directory, 0, ledger.DIGEST)
  about = json.loads(open(digest).read())
  odd = {
    "records": (9, -1, "10", 1e3), "failures": (0, None), "reasons": ([], {"x": "y"}), "host": ([], 3),
    "examples": ([1], [{"id": 3}], {"a": 1}), "started": ("x", float("nan"), 10**400), "committed": (True,),
    "recovered": ("x",), "process": ("x",), "shard": (1, "0"), "sha256": (3, "x"), "bytes": (1.0,),
  }  # fmt: skip
  for key, values in odd.items():
    for value in values:
      with open(digest, "w") as f:
        json.dump(about | {key: value}, f)
      assert job_status(plan.directory, verify=True).shards["damaged"] == 1, (key, value)
  with open(digest, "w") as f:
    json.dump(about, f)
  with ShardWriter(plan, plan.shards[1]) as writer:
    writer.append([work.record(item) for item in plan.shards[1].items[:8]])
    with open(ledger.path(plan.directory, 1, ledger.PART), "a") as f:
      f.write('{"error": "x"}\n{"error": 3, "id": 1}\n[]\nx\n"error":\n' * 3)
    for said in (b"", b"[]"):
      with open(ledger.path(plan.directory, 1, ledger.LOCK), "wb") as f:
        f.write(said)
      now = job_status(plan.directory)
      assert now.shards["running"] == 1 and now.failures == {"truncated": 2} and table(now)
      assert now.images["done"] == 20  # at most what the shard has
  assert cli.main(["status", plan.directory, "--verify"]) == 0
  os.link(digest, ledger.path(plan.directory, 9, ledger.DIGEST))
  os.link(ledger.path(plan.directory, 0), ledger.path(plan.directory, 9))
  capsys.readouterr()
  assert cli.main(["status", plan.directory]) == 1
  assert "damaged  shard-00009 is no shard of this job, which has 5" in capsys.readouterr().out


def test_the_table(plan, capsys):
  commit(plan, 0)
  assert cli.main(["status", plan.directory]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f"{plan.directory}  model m"
  assert lines[1:3] == [
    "  shards   1 done, 4 missing of 5",
    "  images   10 of 50 (20.0%), 1 failed",
  ]
  assert lines[3].startswith("  rate     no process works on it now")
  assert lines[4].startswith("  hosts    h process 0: 10 images, last seen ")
  assert lines[5] == "  failed   1 truncated" and lines[6].startswith("             0007.jpg: ")


def test_watching(plan, capsys, monkeypatch):
  """A line each time until the job is finished; committed shards' digests are read once."""
  commit(plan, 0)
  left = [1, 2, 3, 4]
  monkeypatch.setattr(time, "sleep", lambda seconds: commit(plan, left.pop(0)))
  assert cli.main(["status", plan.directory, "--watch", "7", "--json"]) == 0
  looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [look["images"]["done"] for look in looks] == [10, 20, 30, 40, 50]
  watcher = Watcher(plan.directory)
  watcher.look()
  for i in range(5):
    os.unlink(ledger.path(plan.directory, i, ledger.DIGEST))
  assert watcher.look().images["done"] == 50


def test_mistakes(tmp_path, plan, capsys):
  for argv, message in [
    ([str(tmp_path)], "holds no job"),
    ([str(tmp_path / "gone")], "is no folder"),
    ([plan.directory, "--watch", "0"], "must be a number of seconds"),
    ([plan.directory, "--watch", "--verify"], "give one of them"),
  ]:
    assert cli.main(["status", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sam3lt: error: ") and message in err and err.count("\n") == 1


def test_object_store():
  fs = fsspec.filesystem("memory")
  fs.store.clear()
  plan = work.open_plan("memory://bucket/job", number=50, shard_size=10)
  commit(plan, 0, NOW - 10, NOW)
  one = job_status(plan.directory, now=NOW)
  assert one.shards["done"] == 1 and one.shards["missing"] == 4 and one.rate == pytest.approx(1.0)
  commit(plan, 1, NOW - 10, NOW)
  assert job_status(plan.directory, now=NOW, verify=True).images == {"total": 50, "done": 20, "failed": 2}
  fs.store.clear()


def test_durations():
  wanted = {0: "0 s", 89: "89 s", 90: "2 min", 3000: "50 min", 12_000: "3 h 20 min", 190_000: "2 d 4 h"}
  assert {seconds: duration(seconds) for seconds in wanted} == wanted
