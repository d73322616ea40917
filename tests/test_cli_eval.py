"""`sam3lt eval`: what is asked of the predictor, printed and written; and one line for a mistake."""

import json
import re
import sys
import types

import pytest

from sam3lt_jax import cli
from tests.data import scenes
from tests.evaluation.fake import FakePredictor


@pytest.fixture
def loaded(monkeypatch):
  """What models were asked for; each is a `FakePredictor`."""
  calls = []
  module = types.ModuleType("sam3lt_jax.predictor")

  class Predictor(FakePredictor):
    running = "paper, float32"

    @classmethod
    def from_pretrained(cls, source, profile=None, dtype="float32"):
      calls.append((source, profile, dtype))
      return cls()

  module.Predictor = Predictor
  monkeypatch.setitem(sys.modules, "sam3lt_jax.predictor", module)
  return calls


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  scenes.write_images(tmp_path)
  scenes.write_json(tmp_path, scenes.coco_dataset(), "coco.json")
  scenes.write_json(tmp_path, scenes.saco_dataset(), "saco.json")
  return tmp_path


def test_coco(folder, loaded, capsys):
  command = (
    "eval --model s1 --annotations coco.json --images images --metrics cgf1 ap --out out --dtype bfloat16"
  )
  assert cli.main(command.split()) == 0
  out, err = capsys.readouterr()
  assert loaded == [("s1", None, "bfloat16")] and err == "sam3lt: running on paper, float32\n"
  assert out.startswith("3 images, 9 phrases, ") and "COCO AP" in out and "100.00" in out
  assert out.endswith("  wrote out/predictions.jsonl, out/report.json\n")
  report = json.loads((folder / "out" / "report.json").read_text())
  assert report["ap"]["over"] == "categories" and report["cgf1"]["bbox"]["cgF1"] == 100.0
  assert len((folder / "out" / "predictions.jsonl").read_text().splitlines()) == 9


def test_saco_as_json(folder, loaded, capsys):
  command = (
    "eval --annotations saco.json saco.json --images images --iou segm --limit 2 --threshold 0.1 --json"
  )
  assert cli.main(command.split()) == 0
  report = json.loads(capsys.readouterr().out)
  assert loaded == [("s0", None, "float32")]
  assert report["images"] == 2 and report["pairs"] == 6 and set(report["cgf1"]) == {"segm"}
  # At 0.1 the corner box of each absent phrase counts: 3 present, 3 absent, all predicted.
  assert report["cgf1"]["segm"]["IL_FP"] == 3 and report["cgf1"]["segm"]["IL_MCC"] == 0.0


def test_only_present_and_random_weights(folder, loaded, capsys):
  command = "eval --model random:tiny --annotations coco.json --images images --only-present --json"
  assert cli.main(command.split()) == 0
  out, err = capsys.readouterr()
  assert json.loads(out)["pairs"] == 3 and "RANDOM WEIGHTS" in err


@pytest.mark.parametrize(
  ("command", "message"),
  [
    ("eval --images images", "required: --annotations"),
    ("eval --annotations none.json --images images", "No such file or directory: none.json"),
    ("eval --annotations coco.json --images nowhere", "No such folder of images: nowhere"),
    ("eval --annotations cut.json --images images", "cut.json is not valid JSON"),
    ("eval --annotations saco.json coco.json --images images", "must all be SA-Co annotations .*; coco.json"),
    ("eval --annotations coco.json --images images --limit 0", "must be a whole number of at least 1"),
    (
      "eval --annotations coco.json --images images --threshold 2",
      "--threshold: must be a number within",
    ),
    ("eval --annotations coco.json --images images --metrics f1", "invalid choice: 'f1'"),
    ("eval --annotations coco.json --images images --out coco.json", "--out 'coco.json': .*is no directory"),
    ("eval --annotations coco.json --images empty", "nothing to evaluate in 3 records: coco.json, image 10"),
  ],
)
def test_mistakes_are_one_line(folder, loaded, capsys, command, message):
  (folder / "cut.json").write_text("{")
  (folder / "empty").mkdir()
  assert cli.main(command.split()) == 2
  out, err = capsys.readouterr()
  lines = err.splitlines()
  assert out == "" and lines[-1].startswith("sam3lt: error: "), err
  assert re.search(message, lines[-1]), lines[-1]


def test_help_ends_in_examples(capsys):
  assert cli.main(["eval", "--help"]) == 0
  out = capsys.readouterr().out
  assert "sam3lt eval --annotations FILE... --images DIR" in out and "examples:" in out
  assert out.rstrip().endswith("what was left out")
  assert cli.main(["--help"]) == 0 and "eval" in capsys.readouterr().out
