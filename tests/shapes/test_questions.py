"""Phrases, questions and their answers."""

from __future__ import annotations

import numpy as np
import pytest

from examples.shapes import models
from examples.shapes.data import (
  HELD_OUT_SEED,
  Question,
  QuestionMix,
  ShapesBatches,
  about_kind,
  ask,
  shrink,
  simple_phrase_about,
  to_batch,
  without_kind,
)
from examples.shapes.evaluation import questions_about
from sam3lt_jax.shapes.phrases import Phrase, absent_phrase, all_phrases, phrase_about
from sam3lt_jax.shapes.scenes import Scene, SceneObject, draw_scene


def thing(kind, colour, pattern="plain", size="small", at=0) -> SceneObject:
  mask = np.zeros((160, 160), bool)
  mask[at : at + 8, at : at + 16] = True
  return SceneObject(kind, colour, pattern, size, mask, (at, at, at + 16.0, at + 8.0))


SCENE = Scene(
  0,
  np.zeros((160, 160, 3), np.uint8),
  (
    thing("circle", "red", "plain", "small", 0),
    thing("circle", "blue", "striped", "large", 20),
    thing("star", "red", "plain", "medium", 40),
  ),
)


def test_phrases_match_what_they_say():
  def found(**attributes):
    return [i for i, t in enumerate(SCENE.objects) if Phrase(**attributes).matches(t)]

  assert found(kind="circle") == [0, 1]
  assert found(colour="red") == [0, 2]
  assert found(kind="circle", colour="red") == [0]
  assert found(size="small", pattern="striped") == []
  assert found() == [0, 1, 2]


def test_words_stand_in_order():
  assert str(Phrase("square", "red", "striped", "small")) == "small striped red square"
  assert str(Phrase(colour="red")) == "red shape"
  phrases = all_phrases()
  assert len(set(phrases)) == len(phrases) == 7 * 9 * 5 * 3


def test_simple_phrases_name_one_thing_at_most():
  rng = np.random.default_rng(0)
  said = {str(simple_phrase_about(SCENE.objects[0], rng)) for _ in range(200)}
  assert said == {"shape", "circle", "red shape", "plain shape", "small shape"}
  assert "medium" not in {str(simple_phrase_about(SCENE.objects[2], rng)) for _ in range(200)}


def test_drawn_phrases_are_true():
  rng = np.random.default_rng(0)
  for seed in range(40):
    things = draw_scene(seed).objects
    for t in things:
      assert phrase_about(t, rng).matches(t)
    phrase = absent_phrase(things, rng)
    assert not any(phrase.matches(t) for t in things)
    assert str(phrase) in set(all_phrases())


def test_box_questions():
  assert about_kind(SCENE, 0).answer == (0, 1) and about_kind(SCENE, 0).labels == (1,)
  assert about_kind(SCENE, 2).answer == (2,)
  assert without_kind(SCENE, Phrase(), 1).answer == (2,)
  q = without_kind(SCENE, Phrase(colour="red"), 2)
  assert q.answer == (0,) and q.labels == (0,) and q.boxes == (SCENE.objects[2].box,)


def test_the_mix_has_its_shares():
  rng = np.random.default_rng(0)
  scenes = [s for s in map(draw_scene, range(200)) if len(s.objects) > 3]
  asked = [ask(scene, rng, QuestionMix()) for scene in scenes for _ in range(20)]
  absent = np.mean([not q.answer for q in asked])
  positive = np.mean([q.labels == (1,) and q.text == "visual" for q in asked])
  negative = np.mean([q.labels == (0,) for q in asked])
  assert 0.32 < absent < 0.38 and 0.12 < positive < 0.18 and 0.03 < negative < 0.09


def test_a_batch_says_what_was_asked():
  questions = [Question("circle", (), (), (0, 1)), about_kind(SCENE, 2)]
  batch = to_batch([SCENE], [questions], models.tokenizer(), 40, 4)
  np.testing.assert_array_equal(batch["target_valid"], [[[1, 1, 0, 0], [1, 0, 0, 0]]])
  # Object 1: x 20 to 36, y 20 to 28 of 160.
  np.testing.assert_allclose(batch["target_boxes"][0, 0, 1], np.array([28, 24, 16, 8]) / 160)
  assert batch["target_masks"][0, 0, 1].sum() == (16 // 4) * (8 // 4)
  np.testing.assert_array_equal(batch["input_boxes_labels"], [[[-10, -10], [1, -10]]])
  np.testing.assert_allclose(batch["input_boxes"][0, 1, 0], np.array([48, 44, 16, 8]) / 160)
  assert batch["pixel_values"].min() == -1.0


def test_shrinking_keeps_half_covered_cells():
  mask = np.zeros((1, 8, 8), bool)
  mask[0, :4, :2] = True  # half of the first cell of 4 x 4
  mask[0, 4:, 4:5] = True  # a quarter of the last
  np.testing.assert_array_equal(shrink(mask, 2)[0], [[1, 0], [0, 0]])


def test_batches_repeat_and_stay_away_from_held_out_scenes():
  def batches(seed):
    return ShapesBatches(models.tokenizer(), images=2, questions=2, mask_side=40, seed=seed)

  a, b = batches(1)[7], batches(1)[7]
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])
  assert (batches(1)[8]["id"] != a["id"]).all()
  with pytest.raises(ValueError, match="held-out"):
    batches(10)[0]
  with pytest.raises(ValueError, match="mask_side must divide"):
    ShapesBatches(models.tokenizer(), images=1, questions=1, mask_side=33)


def test_held_out_questions_are_fixed_and_true():
  scene = next(s for s in map(draw_scene, range(HELD_OUT_SEED, HELD_OUT_SEED + 50)) if len(s.objects) > 5)
  asked = questions_about(scene)
  assert [a.question for a in asked] == [a.question for a in questions_about(scene)]
  sorts = [a.sort for a in asked]
  assert sorts.count("present") == sorts.count("absent") == 3
  for a in asked:
    assert bool(a.question.answer) == (a.sort != "absent") or a.sort == "negative_box"


def test_the_student_is_small_enough_and_knows_every_phrase():
  import jax

  from sam3lt_jax.model import Sam3LiteText

  def text_parameters(config):
    model = Sam3LiteText(config)
    params = jax.eval_shape(model.init_variables, jax.random.key(0))["params"]
    parts = ("text_encoder", "text_projection")
    return sum(x.size for part in parts for x in jax.tree.leaves(params[part]))

  student, teacher = models.student_config(), models.teacher_config()
  assert text_parameters(student) <= 0.12 * text_parameters(teacher)
  assert (student.vision, student.detr_decoder) == (teacher.vision, teacher.detr_decoder)
  ids, _ = models.tokenizer()([*all_phrases(), "visual"])
  assert ids.shape[1] == models.CONTEXT and ids.max() < student.text.vocab_size
