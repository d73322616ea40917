"""The benchmark of batch jobs runs; what it says on a loaded machine is not looked at."""

import json
import subprocess
import sys

import pytest

from tests.benchmarks import job


@pytest.mark.full
def test_it_measures(tmp_path):
  command = [
    sys.executable,
    "-m",
    "tests.benchmarks.job",
    "--model",
    "tiny",
    "--images",
    "6",
    "--many",
    "100",
  ]
  command += ["--rounds", "1", "--json", str(tmp_path / "a.json"), "--parts", "throughput", "memory", "kill"]
  done = subprocess.run(command, cwd=job.ROOT, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads((tmp_path / "a.json").read_text())
  values = {row["what"]: row["value"] for part in ("throughput", "memory", "kill") for row in found[part]}
  assert values["bare forward, images/s"] > 0 and values["job, images/s"] > 0
  assert values["resident after 100 of 100 images, MB"] > 100
  assert 3 <= values["images that were on the disk at the kill"] <= 6
  assert "| throughput | |" in done.stdout
