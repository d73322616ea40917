"""`sam3lt finetune` and the example, on drawn images."""

from __future__ import annotations

import json
import pathlib
import runpy

import pytest

from sam3lt_jax.checkpoints import save_pretrained
from sam3lt_jax.cli import main
from sam3lt_jax.data.augment import AugmentConfig
from sam3lt_jax.training.detection import run
from sam3lt_jax.training.detection.lora import LoraConfig
from sam3lt_jax.training.detection.setup import FinetuneConfig
from tests import tiny
from tests.training.detection import drawn


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  annotations, images = drawn.write(folder)
  model, variables = tiny.load(tiny.config(vocab_size=49408))
  save_pretrained(folder / "tiny", model, variables)
  return [
    "finetune", "--model", str(folder / "tiny"), "--annotations", str(annotations), "--images", str(images)
  ]  # fmt: skip


@pytest.mark.full
def test_command(on_disk, tmp_path, capsys):
  out = tmp_path / "run"
  argv = [
    *on_disk, "--out", str(out), "--steps", "2", "--held-out", "0.34", "--prompts", "2", "--objects", "2",
    "--freeze", "vision", "text", "geometry", "encoder", "decoder", "masks",
  ]  # fmt: skip
  assert main(argv) == 0
  printed = capsys.readouterr().out
  assert " parameters are trained; 4 images" in printed
  assert "step 2/2, loss " in printed and "cgF1 on held-out images: " in printed
  assert f"wrote {out}/model, {out}/transformers, " in printed
  config = json.loads((out / "config.json").read_text())
  assert config["finetune"]["freeze"][-1] == "masks" and config["finetune"]["steps"] == 2
  assert config["held_out"] == 0.34 and config["validation"] == 2
  assert main([*argv, "--lr", "1e-3"]) == 2
  assert "lr was 8e-05, is 0.001" in capsys.readouterr().err


class Asked(Exception):
  pass


@pytest.fixture
def asked(monkeypatch):
  """What `finetune` is called with."""
  found = {}

  def take(model, records, out, config, **options):
    found.update(options, model=model, records=records, out=out, config=config)
    raise Asked

  monkeypatch.setattr(run, "finetune", take)
  return found


def test_defaults_are_the_published_figures(on_disk, asked):
  with pytest.raises(Asked):
    main([*on_disk, "--out", "x"])
  config = asked["config"]
  assert (config.lr, config.vision_lr, config.text_lr, config.layer_decay) == (8e-5, 2.5e-5, 5e-6, 0.9)
  assert (config.weight_decay, config.clip_norm, config.lora, config.freeze) == (0.1, 0.1, None, ())
  assert config.one_to_many and config.dropout and not config.remat
  assert config.data.augment == AugmentConfig() and config.data.prompts == 4
  assert asked["validation"] is None and len(asked["records"]) == 6 and asked["profile"] == "transformers"
  # Nothing but the data's numbers differs from the configuration's own defaults.
  assert config == FinetuneConfig(data=config.data)


def test_options_reach_the_configuration(on_disk, asked):
  options = (
    "--lora-rank 8 --lora-alpha 4 --train scoring masks --lr 1e-3 --vision-lr 2e-4 --text-lr 3e-5"
    " --lora-lr 4e-3 --layer-decay 1 --weight-decay 0 --clip 2 --ema 0.99 --accumulate 3 --steps 7 --batch 5"
    " --objects 6 --negatives 0.25 --box-prompts 0.5 --no-augment --image-size 112 --no-dropout"
    " --mask-side 28"
    " --no-one-to-many --remat --dtype bfloat16 --seed 9 --profile original --iou bbox"
    " --evaluate-every 2 --checkpoint-every 4"
  )
  annotations = on_disk[on_disk.index("--annotations") + 1]
  with pytest.raises(Asked):
    main([*on_disk, "--out", "x", "--validation", annotations, *options.split()])
  config, data = asked["config"], asked["config"].data
  assert config == FinetuneConfig(
    steps=7, data=data, lora=LoraConfig(rank=8, alpha=4.0), train=("scoring", "masks"), lr=1e-3,
    vision_lr=2e-4, text_lr=3e-5, lora_lr=4e-3, layer_decay=None, weight_decay=0.0, clip_norm=2.0,
    accumulate=3, ema_decay=0.99, one_to_many=False, dropout=False, dtype="bfloat16", remat=True,
    image_size=112, seed=9,
  )  # fmt: skip
  assert (data.batch_size, data.objects, data.negatives, data.box_prompts) == (5, 6, 0.25, 0.5)
  assert data.augment is None and data.seed == 9 and data.mask_side == 28
  assert len(asked["validation"]) == 6 and asked["profile"] == "original" and asked["iou_type"] == "bbox"
  assert (asked["evaluate_every"], asked["checkpoint_every"]) == (2, 4)
  assert asked["fingerprint"]["annotations"]["name"] == "annotations.json"


def test_the_measure_that_chooses_is_one_that_is_defined():
  pairs = {"positive_pairs": 3, "negative_pairs": 2}
  assert run.choose(pairs).measure == "cgF1"
  assert run.choose(pairs | {"negative_pairs": 0}).measure == "pmF1"
  assert run.choose(pairs | {"positive_pairs": 0}).measure is None
  assert run.choose(None) == (None, "there are no validation images")


def test_annotations_edited_without_a_change_of_size_are_another_run(on_disk, asked):
  annotations = pathlib.Path(on_disk[on_disk.index("--annotations") + 1])
  facts = []
  text = annotations.read_text()
  for edited in (text, text, text.replace("red circle", "rad circle")):
    annotations.write_text(edited)
    with pytest.raises(Asked):
      main([*on_disk, "--out", "x", "--validation", str(annotations)])
    facts.append((asked["fingerprint"]["annotations"], asked["fingerprint"]["validation_annotations"]))
  annotations.write_text(text)
  assert facts[0] == facts[1] and facts[0][0] != facts[2][0] and facts[0][1] != facts[2][1]


@pytest.mark.parametrize(
  "options, message",
  [
    (["--train", "scoring"], "--train and --lora-alpha need --lora-rank"),
    (["--lora-rank", "2", "--freeze", "text"], "--freeze with --lora-rank"),
    (["--validation", "x.json", "--held-out", "0.5"], "give one of the two"),
    (["--validation-images", "x"], "--validation-images without --validation"),
    (["--steps", "0"], "must be a whole number of at least 1"),
    (["--held-out", "0.01"], "leaves one of the two parts empty"),
    (["--freeze", "visoin"], "freeze: 'visoin' matches no parameter"),
  ],
)
def test_command_errors(on_disk, tmp_path, capsys, options, message):
  assert main([*on_disk, "--out", str(tmp_path / "run"), *options]) == 2
  (error,) = (line for line in capsys.readouterr().err.splitlines() if "running on" not in line)
  assert message in error


@pytest.mark.full
def test_example(on_disk, tmp_path, monkeypatch, capsys):
  """`python examples/finetune_detector.py`, a smaller model and fewer steps."""
  path = pathlib.Path(__file__).parents[3] / "examples" / "finetune_detector.py"
  monkeypatch.chdir(tmp_path)
  example = runpy.run_path(str(path), run_name="example")
  assert example["MODEL"] == "shapes" and example["STEPS"] >= 20
  example["main"](on_disk[on_disk.index("--model") + 1], "2")
  printed = capsys.readouterr().out
  assert "adapters of rank 8 among them; 8 images" in printed and "step 2/2, loss " in printed
  assert " parameters trained\ncgF1 " in printed and "Results(" in printed
  assert (tmp_path / "finetuned" / "model" / "config.json").is_file()
