"""How well a model answers questions about held-out scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.shapes.data import (
  HELD_OUT_SCENES,
  HELD_OUT_SEED,
  Question,
  about_kind,
  to_batch,
  without_kind,
)
from sam3lt_jax.evaluation.cgf1 import CgF1
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.processing.postprocess import binary_masks
from sam3lt_jax.processing.tokenizer import ClipTokenizer
from sam3lt_jax.shapes.phrases import Phrase, absent_phrase, phrase_about
from sam3lt_jax.shapes.scenes import Scene, SceneConfig, draw_scene

PHRASES = 3  # of each sort, present and absent, a scene
_IMAGES = 10  # scenes a forward


@dataclasses.dataclass(frozen=True)
class Asked:
  """A question and what it tests: "present", "absent", "box" or "negative_box"; `question` None pads."""

  sort: str
  question: Question


def held_out_scenes(count: int = HELD_OUT_SCENES, first: int = HELD_OUT_SEED) -> Iterator[Scene]:
  """Scenes that no training batch holds."""
  return (draw_scene(first + i, SceneConfig()) for i in range(count))


def questions_about(scene: Scene) -> list[Asked]:
  """What a scene is tested by, the same every time.

  Three phrases that match something (none in an empty scene) and three that match nothing; an exact box
  around an object whose kind is there twice, if one is; and, where there are two kinds, "shape" with a
  negative box.
  """
  rng = np.random.default_rng([scene.seed, 13])
  things = scene.objects
  asked = []
  for _ in range(PHRASES if things else 0):
    phrase = phrase_about(things[rng.integers(len(things))], rng)
    answer = tuple(i for i, t in enumerate(things) if phrase.matches(t))
    asked.append(Asked("present", Question(str(phrase), (), (), answer)))
  for _ in range(PHRASES):
    asked.append(Asked("absent", Question(str(absent_phrase(things, rng)), (), (), ())))
  kinds = [t.kind for t in things]
  twice = [i for i, kind in enumerate(kinds) if kinds.count(kind) > 1]
  if twice:
    asked.append(Asked("box", about_kind(scene, int(rng.choice(twice)))))
  if len(set(kinds)) > 1:
    boxed = int(rng.integers(len(things)))
    asked.append(Asked("negative_box", without_kind(scene, Phrase(), boxed)))
  return asked


def evaluate(
  model: Sam3LiteText,
  variables: Variables,
  tokenizer: ClipTokenizer,
  scenes: Sequence[Scene] | Iterator[Scene] | None = None,
  threshold: float = 0.5,
) -> dict[str, Any]:
  """Answers `questions_about` every scene and compares.

  Args:
    model, variables: a model of the shapes' image size. scenes: None, the 500 held-out ones.
    threshold: of the score.

  Returns:
    cgF1, pmF1, IL_MCC (phrases only, SA-Co's measures); f1 (masks at IoU 0.5 over phrases that are present),
    mask_iou (mean over matched objects), presence_accuracy (all phrases: found anything against is there
    anything); box_f1 (masks at IoU 0.5, one positive box, the boxed object not counted on either side);
    negative_box_removed (share of objects of the boxed kind that are not found), boxed_removed (the same, of
    the boxed objects alone), negative_box_f1 (of all that remains); and counts of questions.
  """
  answer = _Answers(model, variables, tokenizer, threshold)
  measures = {sort: CgF1(score_threshold=threshold) for sort in ("phrases", "box", "negative_box")}
  counts = dict.fromkeys(("present", "absent", "box", "negative_box"), 0)
  removed = boxed_removed = to_remove = 0
  for scene, asked, found in answer(held_out_scenes() if scenes is None else scenes):
    for item, (masks, scores) in zip(asked, found):
      counts[item.sort] += 1
      truth = np.array([scene.objects[i].mask for i in item.question.answer])
      if item.sort in ("present", "absent"):
        measures["phrases"].update(masks, scores, truth)
      elif item.sort == "box":
        boxed = _boxed(scene, item.question)
        others = [scene.objects[i].mask for i in item.question.answer if i != boxed]
        away = np.array([_iou(m, scene.objects[boxed].mask) < 0.5 for m in masks], bool)
        measures["box"].update(masks[away], scores[away], np.array(others))
      else:
        boxed = scene.objects[_boxed(scene, item.question)]
        unwanted = [t for t in scene.objects if t.kind == boxed.kind]
        gone = [all(_iou(m, t.mask) < 0.5 for m in masks) for t in unwanted]
        to_remove += len(unwanted)
        removed += sum(gone)
        boxed_removed += sum(g for g, t in zip(gone, unwanted) if t is boxed)
        measures["negative_box"].update(masks, scores, truth)
  phrases, box, negative = (measures[s].compute() for s in ("phrases", "box", "negative_box"))
  return {
    "cgF1": phrases["cgF1"],
    "pmF1": phrases["pmF1"],
    "IL_MCC": phrases["IL_MCC"],
    "f1": phrases["pmF1@0.5"],
    "mask_iou": phrases["mean_matched_iou"],
    "presence_accuracy": phrases["IL_accuracy"],
    "box_f1": box["pmF1@0.5"],
    "negative_box_f1": negative["pmF1@0.5"],
    "negative_box_removed": removed / max(to_remove, 1),
    "boxed_removed": boxed_removed / max(counts["negative_box"], 1),
    **{f"questions_{sort}": n for sort, n in counts.items()},
  }


class _Answers:
  """Runs scenes in batches of one shape and gives each question's masks and scores."""

  def __init__(self, model: Sam3LiteText, variables: Variables, tokenizer: ClipTokenizer, threshold: float):
    self._side = 4 * model.config.vision.image_size // model.config.vision.patch_size
    self._tokenizer, self._threshold, self._variables = tokenizer, threshold, variables
    self._order = model.config.profile.mask_order

    def forward(variables, batch):
      def call(model):
        K = batch["input_ids"].shape[1]
        vision = model.get_vision_features(batch["pixel_values"])
        names = ("input_ids", "attention_mask", "input_boxes", "input_boxes_labels")
        flat = {name: batch[name].reshape(-1, *batch[name].shape[2:]) for name in names}
        out = model(vision_embeds=jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), vision), **flat)
        return jax.nn.sigmoid(out.pred_logits) * jax.nn.sigmoid(out.presence_logits), out.pred_masks

      return model.apply(variables, method=call)

    self._forward = jax.jit(forward)

  def __call__(self, scenes):
    waiting: list[tuple[Scene, list[Asked]]] = []
    for scene in scenes:
      waiting.append((scene, questions_about(scene)))
      if len(waiting) == _IMAGES:
        yield from self._run(waiting)
        waiting = []
    if waiting:
      yield from self._run(waiting)

  def _run(self, waiting):
    most = 2 * PHRASES + 2
    rows = waiting + [waiting[-1]] * (_IMAGES - len(waiting))
    padding = Question("shape", (), (), ())
    asked = [[a.question for a in asked] + [padding] * (most - len(asked)) for _, asked in rows]
    slots = max(1, *(len(scene.objects) for scene, _ in rows))
    batch = to_batch([scene for scene, _ in rows], asked, self._tokenizer, self._side, slots)
    inputs = {k: v for k, v in batch.items() if k.startswith(("pixel", "input", "attention"))}
    scores, masks = (np.asarray(x) for x in self._forward(self._variables, inputs))
    for b, (scene, asked) in enumerate(waiting):
      size = scene.image.shape[:2]
      found = []
      for k in range(len(asked)):
        row = b * most + k
        kept = scores[row] >= self._threshold
        found.append((binary_masks(masks[row][kept], size, 0.5, self._order), scores[row][kept]))
      yield scene, asked, found


def _boxed(scene: Scene, question: Question) -> int:
  return next(i for i, t in enumerate(scene.objects) if t.box == question.boxes[0])


def _iou(a: np.ndarray, b: np.ndarray) -> float:
  return float((a & b).sum()) / max(float((a | b).sum()), 1.0)
