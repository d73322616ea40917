"""`sam3lt distill` is killed (SIGKILL) in its middle, started again, and ends as if nothing had been."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from sam3lt_jax.shapes.phrases import all_phrases
from tests.training import toy

ROOT = pathlib.Path(__file__).parents[3]
STEPS, LAST = 20, 15  # the life that is killed comes so far
COMMAND = [sys.executable, "-m", "sam3lt_jax"]
# As the command, but its 16th batch never comes: however late the kill comes, it meets the run at work.
ENDLESS = f"""
import sys, time
from sam3lt_jax.cli import main
from sam3lt_jax.training import loop

class Endless:
  def __init__(self, data):
    self.data = data
  def __getitem__(self, step):
    while step >= {LAST}:
      time.sleep(1)
    return self.data[step]

prefetch = loop.prefetch
loop.prefetch = lambda data, *args: prefetch(Endless(data), *args)
sys.exit(main(sys.argv[1:]))
"""


def arguments(tmp_path, out):
  return (
    f"distill --teacher shapes --student tiny-s1 --context 8 --prompts {tmp_path}/phrases.txt --held-out 0.2"
    f" --steps {STEPS} --batch 16 --out {out}"
  ).split()


def start(command):
  pipe = subprocess.PIPE
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def through(command):
  """What a run that nobody kills says."""
  process = start(command)
  try:
    out, err = process.communicate(timeout=300)
  finally:
    process.kill()
  assert process.returncode == 0, err[-3000:]
  return out


def killed(command, out):
  """Kills a run when it has left a checkpoint behind and gone on from it."""
  process = start(command)
  try:
    end = time.monotonic() + 300
    while len(trained(out)) <= 10 or not (out / "checkpoints" / "10").is_dir():
      assert process.poll() is None, process.communicate()[1][-3000:]
      assert time.monotonic() < end, "the run does not come to its tenth step"
      time.sleep(0.02)
  finally:
    process.kill()
    process.communicate()
  assert process.returncode == -signal.SIGKILL


def trained(out):
  """Steps in metrics.jsonl, whole lines only."""
  path = out / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return [json.loads(line)["step"] for line in lines if '"loss"' in line]


@pytest.mark.full
def test_a_killed_run_gives_the_same_numbers(tmp_path):
  (tmp_path / "phrases.txt").write_text("\n".join(all_phrases()[:100]))
  one, two = tmp_path / "killed", tmp_path / "unkilled"
  killed([sys.executable, "-c", ENDLESS, *arguments(tmp_path, one)], one)
  assert 10 < trained(one)[-1] <= LAST
  said = through([*COMMAND, *arguments(tmp_path, one)])
  assert f"going on after step 10 of {STEPS}" in said
  through([*COMMAND, *arguments(tmp_path, two)])
  assert trained(one) == list(range(1, STEPS + 1))
  assert toy.lines(one) == toy.lines(two)
  assert (one / "distillation.json").read_bytes() == (two / "distillation.json").read_bytes()
