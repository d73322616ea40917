"""Fine-tuning from end to end on a few drawn images: it learns, resumes, and writes what it learnt."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from sam3lt_jax import Predictor, from_pretrained
from sam3lt_jax.checkpoints.engine import flatten
from sam3lt_jax.data.batches import BatchConfig
from sam3lt_jax.data.load import load_records
from sam3lt_jax.training.checkpoints import TrainCheckpoints
from sam3lt_jax.training.detection import run as detection_run
from sam3lt_jax.training.detection import setup
from sam3lt_jax.training.detection.lora import LoraConfig
from sam3lt_jax.training.detection.run import finetune, hold_out
from sam3lt_jax.training.detection.setup import FinetuneConfig, prepare
from tests import tiny
from tests.training.detection import drawn

pytestmark = pytest.mark.full  # long: CI runs it

STEPS = 24
CONFIG = FinetuneConfig(
  steps=STEPS,
  data=BatchConfig(batch_size=2, prompts=2, objects=2, augment=None),
  lora=LoraConfig(rank=4, alpha=4.0, targets=("detr_(encoder|decoder)/layers_0/.*[qv]_proj",)),
  train=("scoring", "masks", "presence_head", "box_head"),
  lr=5e-3,
  lora_lr=5e-3,
  clip_norm=1.0,
  dropout=False,
  one_to_many=False,
)
TRAINED = ("dot_product_scoring/", "mask_decoder/", "detr_decoder/presence_head/", "detr_decoder/box_head/")


def start():
  return tiny.load(tiny.config(vocab_size=49408))  # the tokenizer's


@pytest.fixture(scope="module")
def records(tmp_path_factory):
  return load_records(*drawn.write(tmp_path_factory.mktemp("drawn")))


def held(records):
  return [records[i] for i in range(3)]


def losses(directory):
  lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


def run(directory, records, **options):
  options = {
    "log_every": 1,
    "evaluate_every": 12,
    "checkpoint_every": 6,
    "report": lambda line: None,
  } | options
  return finetune(start(), records, directory, CONFIG, validation=held(records), **options)


@pytest.fixture(scope="module")
def done(tmp_path_factory, records):
  """(result, directory) of a whole run."""
  directory = tmp_path_factory.mktemp("whole")
  return run(directory, records), directory


def test_the_loss_falls(done):
  """Measured: 80 in the first two steps, 55 in the last six."""
  by_step = losses(done[1])
  assert list(by_step) == list(range(1, STEPS + 1))
  values = np.array(list(by_step.values()))
  assert values[-6:].mean() < 0.8 * values[:2].mean()


def test_what_was_frozen_is_bit_for_bit_what_it_was(done):
  result, _ = done
  before, after = flatten(start()[1]), flatten(result.variables)
  assert before.keys() == after.keys()
  adapted = {
    p.rpartition("/")[0] for p in flatten(prepare(*start(), CONFIG).params) if p.endswith("kernel/a")
  }
  changed = {path for path in before if np.any(np.asarray(before[path]) != after[path])}
  expected = {path for path in before if path.removeprefix("params/").startswith(TRAINED)}
  expected |= {f"params/{path}" for path in adapted}
  # Two stages of the mask decoder are never run with three maps; a shift of all keys moves no softmax.
  idle = {p for p in expected - changed if "pixel_decoder" in p or "k_proj/bias" in p}
  assert changed == expected - idle
  assert len(adapted) == 2 * 2 + 3 * 2


def test_merged_model_is_the_adapted_model(done):
  """The exported parameters against those of the best checkpoint, as the step sees them."""
  result, directory = done
  made = prepare(*start(), CONFIG)
  checkpoints = TrainCheckpoints(directory / "checkpoints", best=("eval_cgF1", "max"))
  state = checkpoints.restore_best(made.state())
  model, variables = start()

  @tiny.jit
  def outputs(params):
    out = model.apply({**variables, "params": params}, **tiny.inputs())
    return {name: getattr(out, name) for name in tiny.OUTPUTS}

  adapted = outputs(setup.merged(state.params, made.frozen["params"], CONFIG.lora))
  merged, base = outputs(result.variables["params"]), outputs(variables["params"])
  for name in tiny.OUTPUTS:
    np.testing.assert_allclose(merged[name], adapted[name], atol=1e-4, err_msg=name)
  assert np.abs(merged["pred_logits"] - base["pred_logits"]).max() > 0.1


def test_data_without_negatives_choose_by_pmf1_and_the_later_of_equals(records, tmp_path, monkeypatch):
  """One class in every picture: cgF1 is 0 throughout, and the earliest state used to be shipped."""
  pmf1 = iter([0.1, 0.2, 0.5, 0.5, 0.4, 0.5])  # before, after 1, 2, 3 and 4 steps, and of what is returned

  def evaluate(self, variables):
    value = next(pmf1)
    return {"cgF1": 0.0, "pmF1": value, "IL_MCC": 0.0, "mean_matched_iou": value, "positive_pairs": 3,
            "negative_pairs": 0}  # fmt: skip

  monkeypatch.setattr(detection_run._Run, "evaluate", evaluate)
  said = []
  config = dataclasses.replace(CONFIG, steps=4)
  result = finetune(
    start(), records, tmp_path, config, validation=held(records), evaluate_every=1, report=said.append
  )
  numbers = json.loads((tmp_path / "finetune.json").read_text())
  assert numbers["step"] == 3 and numbers["chosen_by"]["measure"] == result.choice.measure == "pmF1"
  assert "every phrase that is asked" in numbers["chosen_by"]["why"]
  assert any(
    line.startswith("the state of the best pmF1 (of equals, the latest) will be kept") for line in said
  )
  assert "pmF1 on held-out images: 0.1000 before, 0.5000 after 3 steps" in said


def test_written_models_load(done):
  result, _ = done
  expected = flatten(result.variables)
  for name in ("model", "transformers"):
    model, variables = from_pretrained(result.written[name], progress=False)
    for path, value in flatten(variables).items():
      np.testing.assert_array_equal(value, expected[path], err_msg=path)
    assert model.config.vision == result.model.config.vision
  found = Predictor.from_pretrained(result.written["model"])(
    np.zeros((84, 84, 3), np.uint8), text="red circle"
  )
  assert found.size == (84, 84)


def test_numbers_and_plot(done):
  result, directory = done
  numbers = json.loads((directory / "finetune.json").read_text())
  assert numbers["trained_parameters"] == result.trained_parameters
  assert numbers["before"]["pairs"] == numbers["after"]["pairs"] == 3 * 2  # both phrases of 3 images
  assert numbers["before"]["positive_pairs"] == 4
  assert (directory / "curves.png").stat().st_size > 10_000
  lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines if "eval_cgF1" in line] == [12, 24]
  assert {"mask", "presence", "grad_norm", "learning_rate", "images_per_second"} <= set(lines[0])


def test_a_stopped_run_goes_on_to_the_digit(done, records, tmp_path):
  class Stop(Exception):
    pass

  def stop(line):
    if line.startswith("step 9/"):
      raise Stop

  with pytest.raises(Stop):
    run(tmp_path, records, report=stop)
  lines = []
  result = run(tmp_path, records, report=lines.append)
  assert "going on after step 6 of 24" in lines
  assert losses(tmp_path) == losses(done[1])
  expected = flatten(done[0].variables)
  for path, value in flatten(result.variables).items():
    np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_a_changed_run_is_refused(done, records):
  other = FinetuneConfig(**{**vars(CONFIG), "lora_lr": 1e-3})
  with pytest.raises(ValueError, match=r"finetune/lora_lr was 0\.005, is 0\.001"):
    finetune(start(), records, done[1], other, validation=held(records), report=lambda line: None)
  model, variables = start()
  moved = jax.tree.map(lambda x: x + 1, variables)
  with pytest.raises(ValueError, match="start_crc32 was"):
    finetune((model, moved), records, done[1], CONFIG, validation=held(records), report=lambda line: None)


def test_hold_out():
  train, part = hold_out(list(range(10)), 0.3, seed=1)
  assert len(part) == 3 and sorted([*train, *part]) == list(range(10))
  assert list(part) == list(hold_out(list(range(10)), 0.3, seed=1)[1])
  assert list(part) != list(hold_out(list(range(10)), 0.3, seed=2)[1])
  with pytest.raises(ValueError, match=r"share=1\.5; accepted: a number between 0 and 1"):
    hold_out([1, 2], 1.5)
  with pytest.raises(ValueError, match="leaves one of the two parts empty"):
    hold_out([1, 2], 0.1)
  with pytest.raises(ValueError, match="seed=-1; accepted: 0 or more"):
    hold_out([1, 2], 0.5, seed=-1)


def test_batch_must_divide(records, tmp_path):
  with pytest.raises(ValueError, match="cannot be split evenly"):
    devices = 2 * jax.devices()[:1]
    mesh = type("Mesh", (), {"shape": {"data": 2, "model": 1}, "devices": devices})()
    config = FinetuneConfig(data=BatchConfig(batch_size=3))
    finetune(start(), records, tmp_path, config, mesh=mesh, report=lambda line: None)
