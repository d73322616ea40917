"""`sam3lt distill` and the example, as a user runs them."""

import json
import pathlib
import re
import runpy
import sys

import pytest
from PIL import Image

from sam3lt_jax import cli, from_pretrained, save_pretrained
from sam3lt_jax.processing.processor import Sam3Processor
from tests.training.distillation.common import PHRASES, tiny_model, tokenizer

EXAMPLES = pathlib.Path(__file__).parents[3] / "examples"


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A working folder with phrases and a photo."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "phrases.json").write_text(json.dumps({"text_annotations": PHRASES}))
  Image.new("RGB", (60, 50), (200, 30, 30)).save("photo.png")
  return tmp_path


@pytest.fixture
def teacher(folder):
  """A teacher with a vocabulary of its own, in the working folder."""
  save_pretrained("teacher", *tiny_model(), tokenizer=tokenizer())


def mistake(capsys, *argv):
  assert cli.main(["distill", *argv]) == 2
  out, err = capsys.readouterr()
  err = re.sub(r"^sam3lt: running on CPU, \w+, attention in blocks\n", "", err)
  assert "Traceback" not in out and err.startswith("sam3lt: error: ") and err.count("\n") == 1, err
  return err.removeprefix("sam3lt: error: ").strip()


COMMAND = (
  "distill --teacher teacher --student tiny-s1 --prompts phrases.json --out run --context 8 --steps 6"
  " --batch 16 --held-out 0.2 --export-features features --eval-image photo.png --eval-phrase"
).split()


@pytest.mark.full
def test_distill(folder, teacher, capsys):
  assert cli.main([*COMMAND, "red car"]) == 0
  out, err = capsys.readouterr()
  assert err.splitlines() == ["sam3lt: running on CPU, bfloat16, attention in blocks"]
  for text in (
    "student: random (seed 0)", "teacher features: shard 1 of 1 written", "step 6/6, loss ",
    "held-out phrases: cosine ", "against the teacher: 1 pairs", "wrote run/model, run/transformers, ",
  ):  # fmt: skip
    assert text in out, text
  assert sorted(p.name for p in (folder / "run").iterdir()) == [
    "checkpoints", "config.json", "curves.png", "distillation.json", "metrics.jsonl", "model", "transformers"
  ]  # fmt: skip
  settings = json.loads((folder / "run" / "config.json").read_text())
  assert settings["total_steps"] == 6 and settings["peak_lr"] == 5e-3 and settings["accumulate"] == 2
  # The pruned vocabulary and its tokenizer go along; the student reads its own phrases.
  model, _ = from_pretrained("run/model", progress=False)
  assert model.config.text.vocab_size == tiny_model()[0].config.text.vocab_size
  assert (folder / "run" / "model" / "tokenizer.json").exists()
  ids = Sam3Processor.from_pretrained("run/model")(text="red car").input_ids
  assert ids.shape == (1, 8) and ids.max() < model.config.text.vocab_size


@pytest.mark.full  # 3 s
def test_mistakes(folder, teacher, capsys):
  given = "--prompts phrases.json --out run".split()
  assert "required" in mistake(capsys, "--out", "run")
  assert "no such photo: nix.jpg" in mistake(capsys, *given, "--eval-image", "nix.jpg")
  assert "--eval-phrase without --eval-image" in mistake(capsys, *given, "--eval-phrase", "car")
  assert "must be a whole number of at least 1, got '0'" in mistake(capsys, *given, "--batch", "0")
  assert "not allowed with" in mistake(capsys, *given, "--steps", "3", "--epochs", "2")
  assert "student must be one of" in mistake(capsys, *given, "--teacher", "teacher", "--student", "s7")
  assert "unknown model 'sam33'" in mistake(capsys, *given, "--teacher", "sam33")
  assert mistake(capsys, "--prompts", "nix.txt", "--out", "run").endswith("nix.txt")
  said = mistake(capsys, *given, "--teacher", "teacher", "--context", "17")
  assert "the teacher's position table has 16 rows" in said
  assert "--held-out: must be a number from 0 to below 1, got '2'" in mistake(
    capsys, *given, "--held-out", "2"
  )


def test_words_that_the_teacher_does_not_know_are_named(folder, capsys):
  (folder / "words.txt").write_text("red circle\nyellow school bus\nblue star\n")
  command = "--teacher shapes --student tiny-s1 --prompts words.txt --held-out 0 --batch 2 --out run"
  said = mistake(capsys, *command.split())
  assert said.startswith("--prompts: 1 of them have words") and "'yellow school bus'" in said


def test_help_shows_examples(capsys):
  assert cli.main(["distill", "--help"]) == 0
  out = capsys.readouterr().out
  assert "sam3lt distill --teacher sam3 --student s0 --prompts noun_phrases.json --out run" in out
  assert cli.main(["--help"]) == 0
  assert "distill" in capsys.readouterr().out


@pytest.mark.full
def test_example(tmp_path, monkeypatch, capsys):
  """`python examples/distill_text_encoder.py`, fewer steps."""
  monkeypatch.syspath_prepend(str(EXAMPLES))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", ["distill_text_encoder.py", "random:tiny", "tiny-l"])
  module = runpy.run_path(str(EXAMPLES / "distill_text_encoder.py"), run_name="example")
  module["main"](steps="4")
  out = capsys.readouterr().out
  pairs = len(module["scene"].PHRASES)
  assert "fewer text parameters, held-out cosine " in out and f"{pairs} pairs of image and phrase" in out
  assert "the student has 3 layers" in out and (tmp_path / "distilled" / "curves.png").exists()
