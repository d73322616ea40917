"""What can be seen before a model is loaded is told before: places that cannot be written, a changed run."""

import json

import pytest

from sam3lt_jax.training.detection import run as finetuning
from sam3lt_jax.training.detection.setup import FinetuneConfig
from sam3lt_jax.training.distillation import run as distillation
from sam3lt_jax.training.distillation.config import DistillationConfig
from sam3lt_jax.training.run_files import check_unchanged
from tests import mounts
from tests.training.distillation.common import PHRASES, tiny_model, tokenizer


class TooLate(Exception):
  """What takes long was begun."""


@pytest.fixture(autouse=True)
def nothing_that_takes_long(monkeypatch):
  def begun(*_, **__):
    raise TooLate

  for module, name in (
    (distillation, "load_model"), (distillation, "_evaluator"), (distillation, "_stored_features"),
    (finetuning, "_load"), (finetuning._Run, "evaluate"),
  ):  # fmt: skip
    monkeypatch.setattr(module, name, begun)


def distil(tmp_path, out="run", models=None, **changes):
  (tmp_path / "phrases.txt").write_text("\n".join(PHRASES))
  config = DistillationConfig(
    **{"prompts": str(tmp_path / "phrases.txt"), "out": str(tmp_path / out), "steps": 8, "held_out": 0.2,
       "student": "tiny-s1", "context_length": 8} | changes
  )  # fmt: skip
  distillation.distill(config, **(models or {}), report=lambda line: None)


def tune(tmp_path, out="run", records=(1, 2, 3), **changes):
  finetuning.finetune("tiny", records, tmp_path / out, FinetuneConfig(**changes), report=lambda line: None)


def begun(directory, facts):
  """A run's directory with a checkpoint."""
  (directory / "checkpoints" / "4").mkdir(parents=True)
  (directory / "config.json").write_text(json.dumps(facts))


def facts_of(monkeypatch, call, module, *args, **kwargs):
  """What a run compares with its config.json, each time."""
  seen = []
  monkeypatch.setattr(module, "check_unchanged", lambda directory, facts, **_: seen.append(facts))
  with pytest.raises(TooLate):
    call(*args, **kwargs)
  monkeypatch.setattr(module, "check_unchanged", check_unchanged)
  return seen


@pytest.mark.parametrize("call, name", [(distil, "out"), (tune, "directory")])
def test_an_output_that_is_a_file_or_on_a_disk_that_cannot_be_written(tmp_path, call, name):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(ValueError, match=f"^{name}='.*/file': .*/file is no directory"):
    call(tmp_path, "file")
  with pytest.raises(TooLate):
    call(tmp_path)
  assert not (tmp_path / "run").exists()  # a mistake that is told later leaves nothing behind
  with mounts.tmpfs(tmp_path / "disk", "ro"):
    with pytest.raises(ValueError, match=f"^{name}='.*': nothing can be written in .*/disk "):
      call(tmp_path, "disk/run")


def test_features_have_a_place(tmp_path):
  (tmp_path / "file").write_text("mine")
  with pytest.raises(ValueError, match=r"^features='.*/file': .*/file is no directory"):
    distil(tmp_path, features=str(tmp_path / "file"))
  with pytest.raises(ValueError, match="is not empty and holds no teacher features"):
    distil(tmp_path, features=str(tmp_path))


def test_a_changed_distillation(tmp_path, monkeypatch):
  (facts,) = facts_of(monkeypatch, distil, distillation, tmp_path)
  begun(tmp_path / "run", facts | {"student_text": {"known": "later"}})
  with pytest.raises(TooLate):
    distil(tmp_path)
  with pytest.raises(ValueError, match=r"another configuration: peak_lr was 0\.005, is 0\.01; go on with"):
    distil(tmp_path, peak_lr=0.01)
  with pytest.raises(ValueError, match=r"total_steps was 8, is 10; go|steps was 8, is 10; total_steps was 8"):
    distil(tmp_path, steps=10)


def test_another_teacher_is_told_before_its_features_are_computed(tmp_path, monkeypatch):
  given = {
    "models": {"teacher": tiny_model(), "tokenizer": tokenizer()},
    "features": str(tmp_path / "features"),
  }
  _, facts = facts_of(monkeypatch, distil, distillation, tmp_path, **given)
  begun(tmp_path / "run", facts)
  with pytest.raises(TooLate):
    distil(tmp_path, **given)
  facts["teacher_identity"]["weights_sha256"] = "other"
  (tmp_path / "run" / "config.json").write_text(json.dumps(facts))
  with pytest.raises(ValueError, match=r"teacher_identity/weights_sha256 was .other., is "):
    distil(tmp_path, **given)


def test_a_changed_fine_tuning(tmp_path, monkeypatch):
  (facts,) = facts_of(monkeypatch, tune, finetuning, tmp_path)
  begun(tmp_path / "run", facts | {"start_crc32": 7})
  with pytest.raises(TooLate):
    tune(tmp_path)
  with pytest.raises(ValueError, match=r"finetune/steps was 1000, is 7; go on"):
    tune(tmp_path, steps=7)
  with pytest.raises(ValueError, match=r"records was 3, is 2; go on"):
    tune(tmp_path, records=(1, 2))


def test_without_a_checkpoint_there_is_nothing_to_go_on_with(tmp_path):
  check_unchanged(tmp_path, {"x": 1})
  (tmp_path / "config.json").write_text('{"x": 2}')
  check_unchanged(tmp_path, {"x": 1})
  begun(tmp_path, {"x": 2, "y": 3})
  for partly, what in ((True, "x was 2, is 1; go on"), (False, "x was 2, is 1; y was 3, is absent; go on")):
    with pytest.raises(ValueError, match=what):
      check_unchanged(tmp_path, {"x": 1}, partly=partly)
  check_unchanged(tmp_path, {"x": 2}, partly=True)
  with pytest.raises(ValueError, match=r"fingerprint: .*accepted: what JSON can hold"):
    check_unchanged(tmp_path, {"x": object()})
