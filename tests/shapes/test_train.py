"""`examples.shapes.train`, every stage of it, for two steps each."""

import dataclasses
import json

import chex
import pytest

from examples.shapes import evaluation, models, record, train
from sam3lt_jax.checkpoints import from_pretrained

pytestmark = pytest.mark.full  # eight train steps to compile: CI runs it


@pytest.fixture
def small(monkeypatch):
  """Every part of the models with fewer layers of less width, and fewer scenes to answer about at once."""
  layers = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
  fewer = {
    "vision": {**layers, "num_hidden_layers": 2, "global_attn_indexes": (1,), "fpn_hidden_size": 16},
    "text": {**layers, "num_hidden_layers": 2, "projection_dim": 16},
    "geometry_encoder": layers,
    "detr_encoder": layers | {"num_layers": 1},
    "detr_decoder": layers | {"num_layers": 2, "num_queries": 6},
    "mask_decoder": {"hidden_size": 16, "num_attention_heads": 2},
  }

  def shrunk(config):
    parts = {name: dataclasses.replace(getattr(config, name), **of) for name, of in fewer.items()}
    return config.replace(**parts)

  student, teacher = models.student_config, models.teacher_config
  monkeypatch.setattr(models, "student_config", lambda *rules: shrunk(student(*rules)))
  monkeypatch.setattr(models, "teacher_config", lambda: shrunk(teacher()))
  monkeypatch.setattr(models, "WIDTH", 16)
  monkeypatch.setattr(evaluation, "_IMAGES", 2)
  monkeypatch.setattr(train, "VALIDATION_SCENES", 2)


def short(run):
  """The run in two steps of one or two images.

  The detector's stages share the numbers of loss and rate: stage 3 then is the program of stage 2, already
  compiled.
  """
  changes = {"steps": 2}
  if hasattr(run, "optimizer"):
    changes["optimizer"] = dataclasses.replace(run.optimizer, total_steps=2, warmup_steps=1)
  if isinstance(run, train.TeacherRun):
    rate = dataclasses.replace(changes["optimizer"], peak_lr=1e-3, end_lr=1e-5)
    changes |= {"optimizer": rate, "loss": train.TeacherRun.loss}
  if hasattr(run, "images"):
    changes["images"] = 1
  if hasattr(run, "questions"):
    changes["questions"] = 2
  if hasattr(run, "phrases"):
    changes["phrases"] = 4
  return dataclasses.replace(run, **changes)


def test_every_stage_and_the_record_of_them(tmp_path, small):
  every = train.Runs()
  runs = {name: short(getattr(every, name)) for name in train.STAGES}
  train.train(train.Runs(**runs, held_out=2, fresh=2), str(tmp_path))
  model, variables = from_pretrained(tmp_path / "model", progress=False)
  assert model.config == models.student_config("transformers")
  found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in (*record.COLUMNS, "sizes")}
  assert found["fresh"] != found["port"]  # other scenes
  # Killed and started again at the very end: nothing is trained again, and the same model comes out.
  train.train(train.Runs(**runs, held_out=2, fresh=2), str(tmp_path))
  _, again = from_pretrained(tmp_path / "model", progress=False)
  chex.assert_trees_all_equal(again, variables)
  text = record.page(found, dict.fromkeys(train.STAGES, 0.5))
  assert "| finish | 0.50 |" in text and "| all | 4.00 |" in text and "goal | what it is |" in text
