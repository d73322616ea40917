"""`sam3lt export`, as it is typed."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from sam3lt_jax import Predictor, cli
from sam3lt_jax.checkpoints import engine
from sam3lt_jax.export_loader import read_safetensors

pytestmark = pytest.mark.full  # long: CI runs it


def test_writes_an_export(tmp_path, capsys):
  out = tmp_path / "new" / "model"
  code = cli.main(
    ["export", "--model", "random:tiny", "--out", str(out), "--platforms", "cpu", "tpu", "--batch", "2",
     "--prompts", "symbolic", "--boxes", "0", "--phrases", "truck", "--dtype", "bfloat16",
     "--image-size", "84", "--profile", "transformers"]
  )  # fmt: skip
  said = capsys.readouterr()
  assert code == 0, said.err
  assert "RANDOM WEIGHTS" in said.err and f"wrote {out}" in said.out
  manifest = json.loads((out / "manifest.json").read_text())
  assert manifest["platforms"] == ["cpu", "tpu"] and manifest["model"] == "random:tiny"
  assert (manifest["batch"], manifest["prompts"], manifest["boxes"]) == (2, "symbolic", 0)
  assert manifest["dtype"] == "bfloat16" and manifest["image_size"] == 84
  assert manifest["profile"]["name"] == "transformers" and manifest["score_threshold"] == 0.3
  assert list(manifest["tokens"]["phrases"]) == ["truck"]
  inputs = {x["name"]: x for x in manifest["parts"]["detection"]["inputs"]}
  assert inputs["map_0"]["shape"] == [2, 6, 6, 32] and inputs["map_0"]["dtype"] == "bfloat16"
  assert inputs["tokens"]["shape"] == ["p", 32, 32]
  assert os.listdir(tmp_path / "new") == ["model"]
  weights = read_safetensors(out / "weights.safetensors")
  leaves = engine.flatten(
    Predictor.from_pretrained("random:tiny", dtype="bfloat16", compile_ahead=False).variables
  )
  assert {w.dtype.name for w in weights.values()} == {"bfloat16"}
  assert all((w == np.asarray(leaves[name])).all() for name, w in weights.items())


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([], "the following arguments are required: -o/--out"),
    (
      ["--out", "{new}", "--batch", "many"],
      "must be a whole number of at least 1, or 'symbolic', got 'many'",
    ),
    (["--out", "{new}", "--platforms", "gpu"], "platforms must be some of cpu, cuda, tpu, rocm"),
    (
      ["--out", "{new}", "--batch", "0"],
      "--batch: must be a whole number of at least 1, or 'symbolic', got '0'",
    ),
    (["--out", "{new}", "--image-size", "85"], "--image-size must be a multiple of 14"),
    (["--out", "{full}"], "is not empty; give a new folder"),
    (["--out", "{new}", "--model", "random:nosuch"], "random:nosuch"),
  ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, arguments, message):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "file").touch()
  arguments = [a.format(new=tmp_path / "new", full=tmp_path / "full") for a in arguments]
  code = cli.main(["export", *([] if "--model" in arguments else ["--model", "random:tiny"]), *arguments])
  lines = capsys.readouterr().err.splitlines()
  lines = [line for line in lines if "RANDOM WEIGHTS" not in line and "running on" not in line]
  assert code == 2
  assert len(lines) == 1 and message in lines[0], lines
  assert not (tmp_path / "new").exists()
