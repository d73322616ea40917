"""`python -m convert.from_torch` and `convert.to_transformers` on tiny checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import convert
from convert import from_torch, to_transformers
from tests import reference

pytestmark = pytest.mark.torch
_ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=["s0", "sam3"])
def saved(request, tmp_path_factory):
  """(state dict, directory that transformers saved, model class)"""
  ref = reference.import_torch_reference()
  model = reference.random_torch_model(reference.tiny_config(request.param), seed=11)
  directory = reference.save_torch(model, tmp_path_factory.mktemp("convert") / request.param)
  return model.state_dict(), directory, ref.Sam3Model if request.param == "sam3" else ref.Sam3LiteTextModel


@pytest.mark.full  # 6 s
def test_round_trip_is_bit_equal(saved, tmp_path, capsys):
  state, directory, cls = saved
  ref = reference.import_torch_reference()
  there, back = str(tmp_path / "orbax"), str(tmp_path / "transformers")
  assert convert.run(from_torch.main, [directory, there]) == 0
  text = capsys.readouterr().out
  # Counted as torch counts them; the summary's last line but one is the total.
  total = sum(p.numel() for k, p in state.items() if "running_" not in k and "num_batches" not in k)
  assert f"{total:,} parameters" in text.splitlines()[-2]

  assert convert.run(to_transformers.main, [there, back]) == 0
  loaded, info = cls.from_pretrained(back, output_loading_info=True)
  # transformers' own counter of training batches is noise, which it reports neither way.
  assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
  again = loaded.state_dict()
  for name, value in state.items():
    if not name.endswith("num_batches_tracked"):
      assert ref.torch.equal(value, again[name]), name


def test_format_and_dtype(saved, tmp_path, capsys):
  state, directory, cls = saved
  ref = reference.import_torch_reference()
  out = str(tmp_path / "half")
  argv = [directory, out, "--format", "transformers", "--dtype", "bfloat16", "--profile", "original"]
  assert convert.run(from_torch.main, argv) == 0
  assert "bfloat16, profile original" in capsys.readouterr().out
  again = cls.from_pretrained(out, dtype=ref.torch.bfloat16).state_dict()
  name = "vision_encoder.backbone.layers.1.attention.q_proj.weight"
  assert ref.torch.equal(state[name].to(ref.torch.bfloat16), again[name])
  with open(os.path.join(out, "config.json"), encoding="utf-8") as f:
    assert json.load(f)["sam3lt_jax"]["profile"]["name"] == "original"


def test_original_file(tmp_path):
  """A `.pt` in the authors' layout, with a configuration of its own as it is not of a released size."""
  fixture = _ROOT / "tests" / "fixtures" / "original_detector_tiny.npz"
  if not fixture.exists():
    pytest.skip("the fixture is not in this checkout")
  ref = reference.import_torch_reference()
  with np.load(fixture) as arrays:
    state = {k.removeprefix("sd/"): ref.torch.from_numpy(arrays[k]) for k in arrays if k.startswith("sd/")}
  ref.torch.save({"model": state}, tmp_path / "model.pt")
  config = reference.tiny_config(
    "s0",
    vocab_size=256,
    context=77,
    vit_layer_norm_eps=1e-5,
    num_hidden_layers=4,
    bos_token_id=254,
    eos_token_id=255,
  )
  config.to_json_file(tmp_path / "config.json")
  argv = [str(tmp_path / "model.pt"), str(tmp_path / "out"), "--config", str(tmp_path / "config.json")]
  assert convert.run(from_torch.main, [*argv, "--format", "transformers"]) == 0
  model = ref.Sam3LiteTextModel.from_pretrained(tmp_path / "out")
  qkv = state["detector.backbone.vision_backbone.trunk.blocks.0.attn.qkv.weight"]
  attention = model.vision_encoder.backbone.layers[0].attention
  parts = [getattr(attention, f"{p}_proj").weight.detach() for p in "qkv"]
  assert ref.torch.equal(ref.torch.cat(parts), qkv)


@pytest.mark.parametrize("module", [from_torch, to_transformers])
def test_mistakes_are_one_line_and_code_2(module, saved, tmp_path, capsys):
  _, directory, _ = saved
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "something").write_text("x")
  (tmp_path / "file").write_text("x")
  (tmp_path / "broken.safetensors").write_bytes(b"\x10")
  for argv, message in (
    ([directory, str(tmp_path / "full")], "is not empty"),
    ([directory, str(tmp_path / "file")], "is a file"),
    ([str(tmp_path / "nothing"), str(tmp_path / "out")], "nothing"),
    ([str(tmp_path / "broken.safetensors"), str(tmp_path / "out")], "broken.safetensors"),
  ):
    assert convert.run(module.main, argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.startswith("error: ") and len(captured.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["from_torch", "to_transformers", "verify"])
def test_help_runs_from_a_checkout(command):
  done = subprocess.run(
    [sys.executable, "-m", f"convert.{command}", "--help"],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.startswith(f"usage: python -m convert.{command}") and "SOURCE" in done.stdout
