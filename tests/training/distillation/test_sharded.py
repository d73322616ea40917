"""A teacher that is split over the devices teaches as one of which each device has a copy."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.full
def test_a_split_teacher_gives_the_same_run(tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "tests.training.distillation.sharded_worker", str(tmp_path)],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout.splitlines()[-1])
  whole, split = found["whole"], found["split"]
  assert found["devices"] == 2
  assert len(split["losses"]) == 4 and len(set(split["losses"])) == 4
  np.testing.assert_allclose(split["losses"], whole["losses"], rtol=1e-5)
  assert split["cosine"] == pytest.approx(whole["cosine"], rel=1e-4)
  # All but a few vectors of odd length is split.
  (all_of_it, copied), (same, half) = whole["bytes"], split["bytes"]
  assert copied == all_of_it == same and half < 0.51 * all_of_it
