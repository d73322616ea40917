"""Splicing, and how two models are compared."""

import jax
import numpy as np
import pytest

from sam3lt_jax.training.distillation.evaluate import (
  _match,
  agreement,
  make_feature_evaluator,
  mean_feature_cosine,
)
from sam3lt_jax.training.distillation.student import make_student
from sam3lt_jax.training.distillation.text_part import splice
from sam3lt_jax.training.prompts import token_rows
from tests.training.distillation.common import PHRASES, tiny_model, tiny_teacher, tokenizer

pytestmark = pytest.mark.full  # long: CI runs it

PICTURE = np.random.default_rng(3).integers(0, 255, (40, 50, 3), np.uint8)


@pytest.fixture(scope="module")
def spliced():
  """The tiny model with an untrained student of another size."""
  model, variables = tiny_model()
  student, own, _ = make_student("tiny-l", teacher=model.config, context_length=8, seed=5)
  return splice(student, own, model, variables)


def test_splice(spliced):
  (model, variables), (old, before) = spliced, tiny_model()
  assert model.config.text.hidden_size == 96 and model.config.vision == old.config.vision
  assert model.config.profile.context_length == 8 and "batch_stats" not in variables
  assert sorted(variables["params"]) == sorted(before["params"])
  assert variables["params"]["vision_encoder"] is before["params"]["vision_encoder"]
  assert variables["params"]["text_projection"]["kernel"].shape == (96, 32)
  assert before["params"]["text_projection"]["kernel"].shape == (64, 32)  # left as it was


def test_a_model_agrees_with_itself_and_less_with_an_untrained_student(spliced):
  phrases = ["red car", "small dog"]
  same = agreement(tiny_model(), tiny_model(), [PICTURE], phrases, threshold=0.0, tokenizer=tokenizer())
  assert same.pairs == 2 and same.found_by_teacher == same.found_by_student == 2 * 20
  assert same.presence_difference == same.score_difference == 0 and same.presence_agreement == 1
  assert same.f1 > 0.95 and same.mask_iou == pytest.approx(1, abs=0.02)  # an empty mask matches nothing
  other = agreement(spliced, tiny_model(), [PICTURE], phrases, threshold=0.0, tokenizer=tokenizer())
  assert other.score_difference > 0 and other.presence_difference > 0 and other.mask_iou < same.mask_iou
  none = agreement(spliced, tiny_model(), [PICTURE], phrases[:1], threshold=1.0, tokenizer=tokenizer())
  assert none.found_by_teacher == 0 and none.mask_iou is None and none.f1 == 1
  assert "1 pairs" in str(none) and "none to compare" in str(none)


def test_matching_by_hand():
  """Masks of a row of 6: halves, and one that overlaps the first by 2 of 4."""
  first, second = np.array([[1, 1, 1, 0, 0, 0]], bool), np.array([[0, 0, 0, 1, 1, 1]], bool)
  near = np.array([[0, 1, 1, 1, 0, 0]], bool)  # IoU 2 / 4 with the first, 1 / 5 with the second
  assert _match(np.stack([near, second]), np.stack([first, second])) == [0.5, 1.0]
  assert _match(np.stack([first, near]), np.stack([first, second])) == [1.0]  # the first is taken
  assert _match(np.stack([near]), np.stack([second])) == []
  assert _match(np.zeros((0, 1, 6), bool), np.stack([first])) == []


def test_feature_evaluator(spliced):
  """The teacher itself has cosine 1; a sign flipped -1; batches of different lengths weigh by their rows."""
  teacher = tiny_teacher()
  batches = []
  for rows in (PHRASES[:5], PHRASES[5:7]):
    ids, mask = token_rows(rows, tokenizer(), 8)
    wanted = teacher.features(teacher.variables, ids, mask)
    batches.append({"input_ids": ids, "attention_mask": mask, "teacher_features": wanted})
  itself = make_feature_evaluator(teacher.model, batches)(teacher.variables)
  assert itself["heldout_cosine"] == pytest.approx(1, abs=1e-5) and itself["heldout_mse"] < 1e-9
  flipped = jax.tree.map(lambda x: -x, teacher.variables["params"]["text_projection"])
  params = {**teacher.variables["params"], "text_projection": flipped}
  values = evaluate_on(teacher, batches, params)
  assert values["heldout_cosine"] == pytest.approx(-1, abs=1e-5)
  only_first = evaluate_on(teacher, batches[:1], params), evaluate_on(teacher, batches[1:], params)
  expected = (5 * only_first[0]["heldout_mse"] + 2 * only_first[1]["heldout_mse"]) / 7
  assert values["heldout_mse"] == pytest.approx(expected, rel=1e-5)


def evaluate_on(teacher, batches, params):
  return make_feature_evaluator(teacher.model, batches)({**teacher.variables, "params": params})


def test_mean_feature_by_hand():
  """One slot: features (1, 0) and (0, 1), mean (.5, .5), cosines 1 / sqrt 2; the other has one token."""
  features = np.array([[[1.0, 0.0], [3.0, 4.0]], [[0.0, 1.0], [9.0, 9.0]]])
  batch = {"teacher_features": features, "attention_mask": np.array([[1, 1], [1, 0]])}
  assert mean_feature_cosine([batch]) == pytest.approx(((0.5**0.5 + 1) / 2 + 0.5**0.5) / 2)


def test_mistakes(spliced):
  model, variables = tiny_model()
  with pytest.raises(ValueError, match="images and phrases must hold at least one each, got 0 and 1"):
    agreement(spliced, (model, variables), [], ["red car"])
  with pytest.raises(ValueError, match="'zebra' has words beyond the model's vocabulary of 22 tokens"):
    agreement(spliced, (model, variables), [PICTURE], ["red car", "zebra"], tokenizer=tokenizer())
  wide = model.config.replace(detr_encoder=model.config.detr_encoder.__class__(hidden_size=64))
  with pytest.raises(ValueError, match="projected to a width of 64, the teacher's to 32"):
    splice(model.clone(config=wide), variables, model, variables)
