"""Jobs on several devices and in several processes: the same results, nothing lost, nothing twice."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from sam3lt_jax.jobs.run import JobConfig, run_job
from tests.jobs import pictures
from tpu import batch_inference

pytestmark = [
  pytest.mark.full,  # long: CI runs it
  pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # pycocotools
]

ROOT = pathlib.Path(__file__).parents[2]
COUNT = 30  # good images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  return pictures.folder(tmp_path_factory.mktemp("photos"), COUNT)


def options(photos, out, **more):
  return {
    "source": str(photos), "out": str(out), "phrases": list(pictures.PHRASES), "threshold": 0.0, "workers": 1,
    "shard_size": 2, "batch": 1, "buckets": [2],
  } | more  # fmt: skip


@pytest.fixture(scope="module")
def single(photos, tmp_path_factory):
  """Records of one process with one device."""
  out = tmp_path_factory.mktemp("single")
  summary = run_job(JobConfig(**options(photos, out)), predictor=pictures.predictor())
  assert summary.images == COUNT + len(pictures.BAD) and summary.shards_left == 0
  return pictures.records(out)


def start(devices=1, cluster=None, **task):
  """A process of tests/jobs/worker.py; `cluster`: (port, how many processes, number of this one)."""
  environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
  if cluster is not None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    environment |= dict(zip(names, map(str, cluster)))
    task["join"] = True
  return subprocess.Popen(
    [sys.executable, "-m", "tests.jobs.worker", json.dumps(task)],
    cwd=ROOT,
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def together(tasks, devices=1):
  """Processes that join each other; returns them, started."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  return [start(devices, (address, len(tasks), i), **task) for i, task in enumerate(tasks)]


def result(process, timeout=600, returncode=0):
  try:
    out, err = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    raise
  assert process.returncode == returncode, err[-3000:]
  return json.loads(out.splitlines()[-1]) if returncode == 0 else None


def test_eight_devices_are_one(photos, single, tmp_path):
  """A copy of the weights on each, and split between two; the last batches are padded."""
  jobs = [
    options(photos, tmp_path / "jit"),
    options(photos, tmp_path / "split", model_parallel=2, batch=2),
  ]
  found = result(start(8, jobs=jobs))
  assert found["devices"] == 8 and [one["devices"] for one in found["runs"]] == [8, 8]
  for job, one in zip(jobs, found["runs"]):
    assert one["images"] == COUNT + len(pictures.BAD) and one["programs"] == 3
    pictures.assert_same_records(pictures.records(job["out"]), single)
  assert [one["collectives"] > 0 for one in found["runs"]] == [False, True]


def test_a_lost_process_costs_nothing(photos, single, tmp_path):
  """Process 0, which the other one met at, is killed; then one process does what is left."""
  job, mark = options(photos, tmp_path / "out"), str(tmp_path / "mark")
  lost = {"jobs": [job], "kill_after": 3, "mark_after": 3, "mark": mark}
  first, second = together([lost, {"jobs": [job], "wait_for": [mark]}])
  result(first, returncode=-signal.SIGKILL)
  [done] = result(second)["runs"]
  assert done["process"] == "1 of 2"
  last = run_job(JobConfig(**job), predictor=pictures.predictor())
  assert 3 + done["images"] + last.images == len(single)
  pictures.assert_same_records(pictures.records(tmp_path / "out"), single)


@pytest.mark.full
def test_three_processes_then_two(photos, single, tmp_path):
  """All of three end in the middle, one killed and two told to stop; two others finish the job."""
  out = tmp_path / "out"
  job, marks = options(photos, out), [str(tmp_path / f"mark{i}") for i in range(3)]
  ends = [{"stop_after": 4}, {"kill_after": 5}, {"stop_after": 2}]
  meet = [{"jobs": [job], "mark_after": 1, "mark": mark, "wait_for": marks} for mark in marks]
  three = together([start | end for start, end in zip(meet, ends)], devices=2)
  result(three[1], returncode=-signal.SIGKILL)
  stopped = [result(three[i])["runs"][0] for i in (0, 2)]
  assert all("SIGTERM" in one["stopped"] and one["shards_left"] > 0 for one in stopped)
  left = len(single) - len(lines(out))
  assert 0 < left < len(single)
  two = [result(process)["runs"][0] for process in together([{"jobs": [job]}] * 2)]
  assert sum(one["images"] for one in two) <= left
  last = run_job(JobConfig(**job), predictor=pictures.predictor())  # shards that the two left to each other
  assert sum(one["images"] for one in two) + last.images == left
  pictures.assert_same_records(pictures.records(out), single)


def lines(out):
  """Whole lines in shards, committed or not."""
  return [
    line
    for path in pathlib.Path(out, "shards").glob("*.jsonl*")
    for line in path.read_bytes().splitlines(keepends=True)
    if line.endswith(b"\n")
  ]


@pytest.mark.parametrize(
  "environment, wanted",
  [
    ({}, False),
    ({"SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ({"SLURM_NTASKS": "2"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a.b,c.d"}, True),
  ],
)
def test_what_the_environment_tells(environment, wanted):
  assert batch_inference.announced(environment) is wanted


def test_the_launchers_mistakes_are_one_line(capsys, monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "nowhere")
  monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
  assert batch_inference.main(["photos", "--prompts", "a", "--out", "x", "--distributed", "auto"]) == 2
  assert "several processes need" in capsys.readouterr().err
  assert batch_inference.main(["--distributed=sometimes"]) == 2
  assert "must be one of auto, always, never, got 'sometimes'" in capsys.readouterr().err
  assert batch_inference.main(["no/such", "--prompts", "a", "--out", "x", "--distributed=never"]) == 2
  assert "no/such" in capsys.readouterr().err
