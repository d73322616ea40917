"""`sam3lt distill` and `sam3lt finetune` in two processes are the run of one, and one of them talks."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from sam3lt_jax import save_pretrained
from sam3lt_jax.cli import main
from tests import tiny
from tests.training.detection import drawn
from tests.training.distillation.common import PHRASES, tiny_model, tokenizer

ROOT = pathlib.Path(__file__).parents[2]
PROCESSES = 2
DEVICES = 4  # of all processes together


def start(argv, processes=1, number=0, port=0):
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(DEVICES // processes),
  }
  if processes > 1:
    argv = [*argv, "--hosts"]
    environment |= {
      "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
      "JAX_NUM_PROCESSES": str(processes),
      "JAX_PROCESS_ID": str(number),
    }
  command = [sys.executable, "-m", "sam3lt_jax", *map(str, argv)]
  pipe = subprocess.PIPE
  return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def outputs(processes, timeout=600):
  found = []
  try:
    for process in processes:
      out, err = process.communicate(timeout=timeout)
      assert process.returncode == 0, err[-3000:]
      found.append(out)
  finally:
    for process in processes:
      process.kill()
  return found


def run(argv, processes):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  return outputs([start(argv, processes, number, port) for number in range(processes)])


def metrics(directory):
  lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
  return [line for line in lines if "loss" in line], [line for line in lines if "loss" not in line]


def assert_one_run(argv, one, two):
  """Runs the command in one process and in two, and compares. Returns what the first of the two said."""
  run([*argv, one], 1)
  said = run([*argv, two], PROCESSES)
  (trained, evaluated), (trained_two, evaluated_two) = metrics(one), metrics(two)
  assert len(trained) == len(trained_two) >= 4 and len(evaluated) == len(evaluated_two) >= 1
  for a, b in zip(trained, trained_two):
    assert a["step"] == b["step"]
    np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-4)
  first, second = said
  assert f"wrote {two}/model, " in first and "step 4/4, loss " in first
  for text in ("step ", "loss", "cosine", "cgF1", "wrote"):  # XLA itself talks on stdout
    assert text not in second
  assert sorted(p.name for p in two.iterdir()) == sorted(p.name for p in one.iterdir())
  return first


@pytest.mark.full
def test_distill(tmp_path):
  (tmp_path / "phrases.txt").write_text("\n".join(PHRASES))
  save_pretrained(tmp_path / "teacher", *tiny_model(), tokenizer=tokenizer())
  argv = (
    f"distill --teacher {tmp_path}/teacher --student tiny --prompts {tmp_path}/phrases.txt --context 8"
    f" --steps 4 --batch 16 --accumulate 2 --held-out 0.2 --dtype float32"
    f" --export-features {tmp_path}/features --out"
  ).split()
  two = tmp_path / "two"
  assert_one_run(argv, tmp_path / "one", two)
  # The run of two goes on in one, which finds nothing left to do.
  (again,) = run([*argv, two], 1)
  assert "nothing is left to do: all 4 steps are done" in again


@pytest.mark.full
def test_finetune(tmp_path):
  annotations, images = drawn.write(tmp_path, images=6)
  save_pretrained(tmp_path / "tiny", *tiny.load(tiny.config(vocab_size=49408)))
  argv = (
    f"finetune --model {tmp_path}/tiny --annotations {annotations} --images {images} --steps 4 --batch 4"
    f" --prompts 1 --objects 2 --held-out 0.34 --no-dropout --freeze vision text geometry encoder --out"
  ).split()
  first = assert_one_run(argv, tmp_path / "one", tmp_path / "two")
  assert "cgF1 on held-out images: " in first


def test_the_others_must_be_found(monkeypatch, tmp_path, capsys):
  (tmp_path / "phrases.txt").write_text("\n".join(PHRASES))
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
  argv = ["distill", "--prompts", tmp_path / "phrases.txt", "--hosts", "--out", tmp_path / "run"]
  assert main(list(map(str, argv))) == 2
  assert "process_id not given" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()
