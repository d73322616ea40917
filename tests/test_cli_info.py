"""`sam3lt info`: the numbers, and where they are read."""

import json

import pytest

from sam3lt_jax import cli
from sam3lt_jax.checkpoints import from_pretrained, save_pretrained
from sam3lt_jax.checkpoints.pretrained import Opened
from sam3lt_jax.cli import info


def test_info_of_a_variant(capsys):
  assert cli.main(["info", "s0"]) == 0
  out = capsys.readouterr().out
  lines = {line.split("  ")[0].strip(): line for line in out.splitlines()}
  assert "42,541,312" in lines["text encoder"] and "170.2 MB" in lines["text encoder"]
  assert "454,038,784" in lines["vision encoder"]
  assert "text encoder: 42.54M parameters, 12.0% of SAM3's 353.72M" in out
  assert "nothing was downloaded" in out and "profile: original" in out
  assert "pad_token_id           0                      (49407)" in out


@pytest.mark.full  # 5 s
@pytest.mark.parametrize("name, text", [("s1", 63_528_192), ("random:l", 123_800_320)])
def test_info_json(name, text, capsys):
  assert cli.main(["info", name, "--json", "--profile", "transformers"]) == 0
  report = json.loads(capsys.readouterr().out)
  assert report["parts"]["text encoder"]["parameters"] == text
  assert report["profile"]["name"] == "transformers" and report["profile"]["pad_token_id"] == 49407
  assert report["total"]["parameters"] == sum(p["parameters"] for p in report["parts"].values())
  assert report["files"] == []


@pytest.mark.full  # 2 s
def test_sam3_text_parameters_are_counted():
  report = info.describe("sam3")
  # Besides what the detector uses, SAM3's file has CLIP's own projection to 512.
  assert report["parts"]["text encoder"]["parameters"] in (
    info.SAM3_TEXT_PARAMETERS, info.SAM3_TEXT_PARAMETERS - 1024 * 512
  )  # fmt: skip


def test_info_of_a_directory(tmp_path, capsys, monkeypatch):
  model, variables = from_pretrained("random:tiny", profile="transformers")
  for form in ("transformers", "orbax"):
    save_pretrained(tmp_path / form, model, variables, format=form)
  wanted = info.describe("random:tiny")["parts"]
  report = info.describe(str(tmp_path / "transformers"))
  assert report["parts"] == wanted and report["profile"]["name"] == "transformers"
  assert "config.json" in report["source"]
  (file,) = report["files"]
  weights = tmp_path / "transformers" / "model.safetensors"
  assert file["name"] == weights.name and file["bytes"] == weights.stat().st_size
  assert file["tensors"]["F32"] > 100
  assert f"{file['tensors']['F32']} x F32" in info.format_report(report)

  monkeypatch.setattr(Opened, "load", None)  # no weights are read
  alone = info.describe(str(weights))
  assert alone["source"] == "the shapes of its weights"
  assert alone["parts"] == wanted and alone["files"][0]["bytes"] == file["bytes"]
  saved = info.describe(str(tmp_path / "orbax"), profile="original")
  assert saved["parts"] == wanted and saved["profile"]["name"] == "original"
  assert saved["files"][0]["bytes"] > 10_000_000

  weights.write_bytes(b"\xff" * 50)
  assert cli.main(["info", str(weights.parent)]) == 2
  err = capsys.readouterr().err
  assert "not a safetensors file, or is damaged" in err and "Traceback" not in err


def test_info_mistakes(tmp_path, capsys):
  (tmp_path / "config.json").write_text("{")
  for argv, says in (
    ([], "the following arguments are required: MODEL"),
    ([str(tmp_path)], "not valid JSON"),
    (["random:s9"], "did you mean"),
    (["s00"], "did you mean"),
  ):
    assert cli.main(["info", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("sam3lt: error: ") and says in err and err.count("\n") == 1
