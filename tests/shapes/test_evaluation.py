"""The measures on held-out scenes, with answers that are known: all right, none, and the wrong ones."""

from __future__ import annotations

import numpy as np
import pytest

from examples.shapes import evaluation, models
from examples.shapes.data import HELD_OUT_SEED
from examples.shapes.evaluation import evaluate, held_out_scenes, questions_about
from sam3lt_jax import from_pretrained
from sam3lt_jax.shapes.scenes import draw_scene
from tests import tiny

SCENES = [draw_scene(HELD_OUT_SEED + i) for i in range(12)]


def answered(monkeypatch, answer):
  """`evaluate` of a model that answers each question by answer(scene, asked) -> masks [N, S, S]."""

  class Answers:
    def __init__(self, *args):
      pass

    def __call__(self, scenes):
      for scene in scenes:
        asked = questions_about(scene)
        found = [np.array(answer(scene, a), bool).reshape(-1, *scene.image.shape[:2]) for a in asked]
        yield scene, asked, [(masks, np.ones(len(masks), np.float32)) for masks in found]

  monkeypatch.setattr(evaluation, "_Answers", Answers)
  return evaluate(None, None, None, SCENES)


def test_all_right(monkeypatch):
  scores = answered(monkeypatch, lambda scene, a: [scene.objects[i].mask for i in a.question.answer])
  assert scores["cgF1"] == pytest.approx(100)
  for name in ("f1", "mask_iou", "presence_accuracy", "box_f1", "negative_box_f1", "negative_box_removed"):
    assert scores[name] == pytest.approx(1), name
  assert scores["questions_absent"] == 3 * len(SCENES) and scores["questions_box"] > 3


def test_nothing_found(monkeypatch):
  scores = answered(monkeypatch, lambda scene, a: [])
  absent = scores["questions_absent"] / (scores["questions_absent"] + scores["questions_present"])
  assert scores["f1"] == scores["box_f1"] == scores["cgF1"] == 0
  assert scores["presence_accuracy"] == pytest.approx(absent)
  assert scores["negative_box_removed"] == scores["boxed_removed"] == 1


def test_the_boxed_object_alone_is_no_find(monkeypatch):
  """The one that the box shows is given; what counts is the others of its kind."""

  def boxed(scene, a):
    return [scene.objects[evaluation._boxed(scene, a.question)].mask] if a.sort == "box" else []

  assert answered(monkeypatch, boxed)["box_f1"] == 0


def test_a_negative_box_that_is_ignored(monkeypatch):
  scores = answered(monkeypatch, lambda scene, a: [t.mask for t in scene.objects])
  assert scores["negative_box_removed"] == scores["boxed_removed"] == 0 and 0 < scores["negative_box_f1"] < 1


@pytest.mark.full
def test_an_untrained_model_can_be_asked():
  drawn = from_pretrained("random:tiny", models.student_config(), progress=False)
  with tiny.hurry():
    scores = evaluate(*drawn, models.tokenizer(), held_out_scenes(3), threshold=0.0)
  # Everything is predicted for every question: present phrases are right about presence, absent ones wrong.
  total = scores["questions_present"] + scores["questions_absent"]
  assert scores["presence_accuracy"] == pytest.approx(scores["questions_present"] / total)
