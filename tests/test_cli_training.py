"""What `sam3lt distill`, `finetune` and `demo --data` make of their options, with the bundled model."""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import logging
import re
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from sam3lt_jax import cli, from_pretrained
from sam3lt_jax.cli import distill as distill_cli
from sam3lt_jax.config import TextConfig
from sam3lt_jax.data.batches import BatchConfig
from sam3lt_jax.shapes.phrases import all_phrases
from sam3lt_jax.training.detection import run as detection_run
from sam3lt_jax.training.detection.setup import FinetuneConfig
from sam3lt_jax.training.distillation import run as distillation_run
from sam3lt_jax.training.distillation.config import DistillationConfig

SMALL = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """A working folder with some of the phrases that the bundled model knows."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "phrases.txt").write_text("\n".join(all_phrases()[::3]))
  return tmp_path


def mistake(capsys, *argv):
  assert cli.main(argv) == 2
  out, err = capsys.readouterr()
  err = re.sub(r"^sam3lt: running on CPU, \w+, attention in blocks\n", "", err)
  assert "Traceback" not in out and err.startswith("sam3lt: error: ") and err.count("\n") == 1, err
  return err.removeprefix("sam3lt: error: ").strip()


class Asked(Exception):
  pass


@pytest.fixture
def asked(monkeypatch):
  """The configuration that `distill` or `finetune` is called with."""
  found = []

  def take(*args, **options):
    found.append(next(x for x in args if hasattr(x, "fingerprint")))
    raise Asked

  monkeypatch.setattr(distillation_run, "distill", take)
  monkeypatch.setattr(detection_run, "finetune", take)

  def ask(*argv):
    with pytest.raises(Asked):
      cli.main(argv)
    return found[-1]

  return ask


DISTILL = ("distill", "--prompts", "phrases.txt", "--out", "run")


@pytest.mark.parametrize(
  "teacher, options, context",
  [("shapes", (), 32), ("random:tiny", (), 16), ("random:sam3", (), 32), ("shapes", ("--context", "6"), 6)],
)
def test_context_is_what_the_teacher_has(asked, teacher, options, context):
  assert asked(*DISTILL, "--teacher", teacher, *options).context_length == context


def test_more_tokens_than_a_table_that_is_cut_has_rows(capsys):
  assert cli.main([*DISTILL, "--teacher", "random:tiny", "--context", "17"]) == 2
  said = "--context: the teacher's position table has 16 rows, so at most 16 tokens, got 17"
  assert capsys.readouterr().err.endswith(f"sam3lt: error: {said}\n")


def test_context_of_a_teacher_that_resamples_is_the_profiles(asked, folder):
  model, _ = from_pretrained("shapes", progress=False)
  (folder / "teacher").mkdir()
  profile = "transformers"
  model.config.replace(profile=profile).to_json(folder / "teacher" / "config.json")
  (folder / "teacher" / "model.safetensors").write_bytes(b"")
  assert asked(*DISTILL, "--teacher", "teacher").context_length == 32
  assert asked(*DISTILL, "--teacher", "teacher", "--profile", "original").context_length == 16


@pytest.mark.parametrize("student", ["s0", "s1", "l"])
def test_what_help_says_of_each_student_is_its_recipe(asked, capsys, student):
  config = asked(*DISTILL, "--teacher", "random:sam3", "--student", student)
  assert config == DistillationConfig(
    prompts=("phrases.txt",), out="run", teacher="random:sam3", student=student
  )
  assert cli.main(["distill", "--help"]) == 0
  said = " ".join(capsys.readouterr().out.split())
  short = {"s0": "for s0", "s1": "for s1", "l": "for l"}[student]
  assert f"{config.epochs:g} {short}" in said and f"{config.peak_lr:g} {short}" in said
  default = {64: "(default: 64,", 32: "32 for l)"}[config.batch_size]
  assert default in said and {2: "(default: 2,", 4: "4 for l)"}[config.accumulate] in said


def test_a_student_of_ones_own_reads_the_teachers_vocabulary(asked, folder):
  (folder / "small.json").write_text(json.dumps(SMALL | {"layer_norm_eps": 1}))
  config = asked(*DISTILL, "--teacher", "shapes", "--student", "small.json", "--shard-teacher")
  assert config.student == TextConfig(**SMALL, layer_norm_eps=1.0, vocab_size=25, max_position_embeddings=32)
  assert config.context_length == 32 and config.shard_teacher
  (folder / "small.json").write_text(json.dumps({"max_position_embeddings": 6, "kind": "clip"}))
  config = asked(*DISTILL, "--teacher", "shapes", "--student", "small.json")
  assert config.context_length == config.student.max_position_embeddings == 6 and not config.shard_teacher
  config = asked(*DISTILL, "--teacher", "random:sam3", "--student", "small.json", "--context", "5")
  assert config.context_length == 5 and config.student.vocab_size == 49408


@pytest.mark.parametrize(
  "text, said",
  [
    ("{", "x.json is not valid JSON: "),
    ("[1]", "--student: x.json: it must hold an object"),
    ('{"width": 3}', "--student: x.json: no such field: width; accepted: kind, vocab_size, hidden_size, "),
    ('{"hidden_size": "3"}', "--student: x.json: hidden_size: expected int, got '3'"),
    ('{"hidden_size": 0}', "--student: x.json: hidden_size must be above 0, got 0"),
    ('{"hidden_size": true}', "hidden_size: expected int, got True"),
    ('{"layer_norm_eps": -1}', "layer_norm_eps must be above 0, got -1"),
    ('{"use_repmixer_blocks": 1}', "use_repmixer_blocks: expected bool, got 1"),
    ('{"kind": "rnn"}', "kind must be mobileclip or clip, got 'rnn'"),
    (
      '{"hidden_size": 30}',
      "--student: num_attention_heads must divide hidden_size, got 8 heads for width 30",
    ),
    ('{"vocab_size": 30}', "--student: its vocabulary has 30 tokens, the teacher's 25"),
  ],
)
def test_mistakes_in_a_students_file(folder, capsys, text, said):
  (folder / "x.json").write_text(text)
  assert said in mistake(capsys, *DISTILL, "--teacher", "shapes", "--student", "x.json")


@pytest.mark.parametrize(
  "options, said",
  [
    ("--held-out 0.0001", "--held-out 0.0001: none of the 315 phrases is held out"),
    ("--held-out 2", "--held-out: must be a number from 0 to below 1, got '2'"),
    ("--ema 1.5", "--ema: must be a number from 0 to below 1, got '1.5'"),
    ("--layer-decay 2", "--layer-decay: must be a number above 0 and at most 1, got '2'"),
    ("--weight-decay -1", "--weight-decay: must be a number of at least 0, got '-1'"),
    ("--seed -1", "--seed: must be a whole number of at least 0, got '-1'"),
    (
      "--student s7",
      "--student must be one of s0, s1, l, sam3, tiny, tiny-s1, tiny-l, or FILE.json, got 's7'",
    ),
    ("--student nix.json", "No such file or directory: nix.json"),
    ("--prompts nix.txt", "--prompts: no such file: nix.txt"),
    ("--teacher nixx", "--teacher: unknown model 'nixx'"),
    ("--student tiny-s1 --init nixx", "--init: unknown model 'nixx'"),
    ("--shard-teacher --export-features f", "--shard-teacher with --export-features"),
  ],
)
def test_mistakes_name_the_option(capsys, options, said):
  assert said in mistake(capsys, *DISTILL, "--teacher", "shapes", *options.split())


@pytest.mark.full
def test_distil_the_bundled_model_into_a_student_of_ones_own(folder, capsys):
  """What the help shows, with few steps."""
  (folder / "small.json").write_text(json.dumps(SMALL))
  argv = [*DISTILL, "--teacher", "shapes", "--student", "small.json", "--steps", "4", "--held-out", "0.1"]
  assert cli.main(argv) == 0
  out, err = capsys.readouterr()
  assert err.splitlines() == ["sam3lt: running on CPU, bfloat16, attention in blocks"]
  assert " phrases/s, " in out and " images/s" not in out
  model, variables = from_pretrained("run/model", progress=False)
  assert (model.config.text.hidden_size, model.config.text.num_hidden_layers) == (32, 2)
  assert variables["params"]["text_encoder"]["embeddings"]["position_embedding"].shape == (32, 32)
  text = {name: x for name, x in variables["params"].items() if name.startswith("text_")}
  count = sum(x.size for x in jax.tree.leaves(text))
  assert f"text encoder: {count:,} parameters, the teacher's 147,712 ({1 - count / 147712:.0%} fewer)" in out
  assert ": peak_lr was 0.005, is 0.1" in mistake(capsys, *argv, "--lr", "0.1")


def test_how_much_smaller():
  assert distill_cli.fewer(12, 100) == "88% fewer"
  assert distill_cli.fewer(110, 100) == "10% more"
  assert distill_cli.fewer(100, 100) == "as many"


# ------------------------------------------------------------------ fine-tuning, and the data to try it on


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
  """What `demo --data` writes, drawn once; and what it says."""
  where, said = tmp_path_factory.mktemp("scenes"), io.StringIO()
  with contextlib.chdir(where), contextlib.redirect_stdout(said):
    assert cli.main(["demo", "--data", "drawn", "--scenes", "4"]) == 0
  return where / "drawn", said.getvalue()


@pytest.fixture
def drawn(folder, scenes):
  shutil.copytree(scenes[0], "drawn")
  return ["finetune", "--model", "shapes", "--annotations", "drawn/train.json", "--images", "drawn/images"]


def test_drawn_data_is_coco(drawn, folder, scenes):
  assert scenes[1] == (
    "wrote drawn/train.json, drawn/val.json, drawn/phrases.txt (3 and 1 scenes in drawn/images), "
    "and a clip of 24 frames in drawn/clip\n"
  )
  frames = sorted((folder / "drawn" / "clip").iterdir())
  assert len(frames) == 24 and frames[0].read_bytes() != frames[-1].read_bytes()
  coco = COCO("drawn/train.json")
  assert sorted(coco.getImgIds()) == [1, 2, 3] and COCO("drawn/val.json").getImgIds() == [4]
  assert [c["name"] for c in coco.loadCats(coco.getCatIds())][:2] == ["circle", "ring"]
  annotations = coco.loadAnns(coco.getAnnIds())
  assert len(annotations) >= 4
  for annotation in annotations:
    mask = coco.annToMask(annotation)
    x, y, w, h = map(round, annotation["bbox"])
    assert mask.sum() == annotation["area"] == mask[y : y + h, x : x + w].sum() > 0
  image = Image.open(folder / "drawn" / "images" / "000.png")
  assert image.size == (480, 480) and np.asarray(image).std() > 5
  assert (folder / "drawn" / "phrases.txt").read_text().splitlines() == all_phrases()


def test_demo_data_mistakes(capsys):
  assert "--scenes without --data" in mistake(capsys, "demo", "--scenes", "9")
  assert "--data draws scenes and asks nothing" in mistake(capsys, "demo", "ring", "--data", "x")
  assert "--scenes: must be at least 4" in mistake(capsys, "demo", "--data", "x", "--scenes", "3")


def test_mask_points_reach_the_loss(drawn, asked):
  assert asked(*drawn, "--out", "x", "--mask-points", "112").loss.mask_points == 112
  assert asked(*drawn, "--out", "x").loss.mask_points is None


@pytest.mark.parametrize(
  "options, said",
  [
    ("--held-out 1.0", "--held-out 1.0; accepted: a number between 0 and 1"),
    ("--held-out 0.01", "--held-out 0.01 of 3 records leaves one of the two parts empty"),
    ("--mask-points 0", "--mask-points: must be a whole number of at least 1, got '0'"),
    ("--negatives 2", "--negatives: must be a number within [0, 1], got '2'"),
    ("--ema 1", "--ema: must be a number from 0 to below 1, got '1'"),
    ("--freeze visoin", "--freeze: 'visoin' matches no parameter"),
    ("--lora-rank 8888", "--lora-rank 8888 is more than "),
    ("--image-size 100", "--image-size must be a multiple of 12, at least 24, got 100"),
    ("--model shapse", "--model: unknown model 'shapse'; did you mean 'shapes'?"),
  ],
)
def test_finetune_mistakes_name_the_option(drawn, capsys, options, said):
  assert said in mistake(capsys, *drawn, "--out", "run", *options.split())


@pytest.mark.full
def test_finetune_the_bundled_model_and_skip_a_bad_picture(drawn, folder, capsys):
  """What the help shows, with few steps; a picture that is no picture is said once, in one line."""
  (folder / "drawn" / "images" / "001.png").write_bytes(b"no picture")
  argv = [*drawn, "--out", "run", "--steps", "3", "--lora-rank", "4", "--mask-points", "16"]
  assert cli.main(argv) == 0
  out, err = capsys.readouterr()
  # Without what pycocotools warns of under pytest, and what runs.
  lines = [line for line in err.splitlines() if "__array__" not in line and "running on" not in line]
  assert len(lines) == 1 and lines[0].startswith("sam3lt: warning: skipped (image damaged): drawn/train.json")
  assert "step 3/3, loss " in out and "; skipped so far: 1 image damaged" in out and "run/model" in out


# ------------------------------------------------------------------ names and log lines


@pytest.mark.parametrize(
  "verb, config",
  [("distill", DistillationConfig), ("finetune", FinetuneConfig), ("finetune", BatchConfig)],
)
def test_options_fill_fields_of_their_name(verb, config):
  parser = cli.Parser()
  importlib.import_module(cli.VERBS[verb][0]).add_arguments(parser)
  fields = {f.name for f in dataclasses.fields(config)}
  taken = {action.dest for action in parser._actions} & fields
  assert len(taken) > 5 and {"batch_size", "seed"} & taken
  assert all(parser.option(field).startswith("--") for field in taken)
  assert parser.option("batch_size") == "--batch" and parser.option("no_such_field") is None


def test_log_lines_are_shown_as_warnings_are(monkeypatch, capsys):
  logger = logging.getLogger("sam3lt_jax.data.batches")
  before = logging.getLogger("sam3lt_jax").propagate, list(logging.getLogger("sam3lt_jax").handlers)

  def run(args):
    logger.info("not shown")
    logger.warning("skipped (%s): %s", "image damaged", "a.png")
    return 0

  module = argparse.Namespace(add_arguments=lambda parser: None, run=run)
  monkeypatch.setitem(sys.modules, "sam3lt_jax.cli.demo", module)
  assert cli.main(["demo"]) == 0
  assert capsys.readouterr().err == "sam3lt: warning: skipped (image damaged): a.png\n"
  assert before == (logging.getLogger("sam3lt_jax").propagate, logging.getLogger("sam3lt_jax").handlers)
