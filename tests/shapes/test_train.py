"""`examples.shapes.train`, every stage of it, for two steps each."""

import dataclasses
import json

import chex
import pytest

from examples.shapes import models, record, train
from sam3lt_jax.checkpoints import from_pretrained

pytestmark = pytest.mark.full  # eight train steps to compile: CI runs it


def short(run):
  """The run in two steps of one or two images."""
  changes = {"steps": 2}
  if hasattr(run, "optimizer"):
    changes["optimizer"] = dataclasses.replace(run.optimizer, total_steps=2, warmup_steps=1)
  if hasattr(run, "images"):
    changes["images"] = 1
  if hasattr(run, "questions"):
    changes["questions"] = 2
  if hasattr(run, "phrases"):
    changes["phrases"] = 4
  return dataclasses.replace(run, **changes)


def test_every_stage_and_the_record_of_them(tmp_path, monkeypatch):
  monkeypatch.setattr(train, "VALIDATION_SCENES", 2)
  every = train.Runs()
  runs = {name: short(getattr(every, name)) for name in train.STAGES}
  train.train(train.Runs(**runs, held_out=10, fresh=10), str(tmp_path))
  model, variables = from_pretrained(tmp_path / "model", progress=False)
  assert model.config == models.student_config("transformers")
  found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in (*record.COLUMNS, "sizes")}
  assert found["fresh"] != found["port"]  # other scenes
  # Killed and started again at the very end: nothing is trained again, and the same model comes out.
  train.train(train.Runs(**runs, held_out=10, fresh=10), str(tmp_path))
  _, again = from_pretrained(tmp_path / "model", progress=False)
  chex.assert_trees_all_equal(again, variables)
  text = record.page(found, dict.fromkeys(train.STAGES, 0.5))
  assert "| finish | 0.50 |" in text and "| all | 4.00 |" in text and "goal | what it is |" in text
