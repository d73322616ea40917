"""Questions about scenes: training batches and the held-out set.

A question is a phrase, example boxes, or both, with its true answer:
  phrase              all objects that match it, or none
  positive box        all objects of the boxed object's kind, the boxed one included
  phrase, negative box    all that match the phrase, without the boxed object's kind
  phrase, positive box    all that match the phrase (the box shows one of them)
Seeds below `HELD_OUT_SEED` are for training; the 500 from it on are never trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from einops import reduce

from sam3lt_jax.config import BOX_ONLY_PHRASE, PADDING_LABEL
from sam3lt_jax.shapes.phrases import SIZE_WORDS, Phrase, absent_phrase, phrase_about
from sam3lt_jax.shapes.scenes import (
  COLOURS,
  KINDS,
  PATTERNS,
  SIZES,
  Scene,
  SceneConfig,
  SceneObject,
  draw_scene,
)

ATTRIBUTES = {"kind": KINDS, "colour": tuple(COLOURS), "pattern": PATTERNS, "size": tuple(SIZES)}
HELD_OUT_SEED = 1_000_000_000
HELD_OUT_SCENES = 500
MAX_BOXES = 2


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked of a scene and which of its objects are the answer.

  Attributes:
    text: the phrase; "visual" where only boxes are given.
    boxes: xyxy in pixels; labels: 1 positive, 0 negative.
    answer: indices into `Scene.objects`.
  """

  text: str
  boxes: tuple[tuple[float, float, float, float], ...]
  labels: tuple[int, ...]
  answer: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class QuestionMix:
  """Shares of the kinds of questions; what is left are phrases that match something.

  Attributes:
    absent: phrases that match nothing. positive_box, negative_box, phrase_and_box: as in the module's table,
      asked where the scene allows it, else a phrase instead.
    simple: of the phrases about an object, the share that names at most one thing about it ("shape",
      "circle", "red shape"). They match more objects, and so teach more.
  """

  absent: float = 0.35
  simple: float = 0.5
  positive_box: float = 0.15
  negative_box: float = 0.08
  phrase_and_box: float = 0.05


def ask(scene: Scene, rng: np.random.Generator, mix: QuestionMix = QuestionMix()) -> Question:
  """One question about `scene`."""
  things = scene.objects
  if not things or rng.random() < mix.absent:
    return Question(str(absent_phrase(things, rng)), (), (), ())
  shares = np.array([mix.positive_box, mix.negative_box, mix.phrase_and_box]) / max(1.0 - mix.absent, 1e-9)
  sort = int(np.searchsorted(np.cumsum(shares), rng.random()))
  chosen = int(rng.integers(len(things)))
  if sort == 0:
    return about_kind(scene, chosen, rng)
  about = simple_phrase_about if rng.random() < mix.simple else phrase_about
  phrase = about(things[chosen], rng)
  if sort == 1:
    phrase = dataclasses.replace(phrase, kind=None)  # a phrase that several kinds can match
  answer = tuple(i for i, t in enumerate(things) if phrase.matches(t))
  if sort == 1 and len({things[i].kind for i in answer}) > 1:
    return without_kind(scene, phrase, int(rng.choice(answer)), rng)
  if sort == 2:
    return Question(str(phrase), (_loose(things[int(rng.choice(answer))].box, scene, rng),), (1,), answer)
  return Question(str(phrase), (), (), answer)


def simple_phrase_about(thing: SceneObject, rng: np.random.Generator) -> Phrase:
  """A phrase that matches `thing` and names its kind, its colour, its pattern, its size, or nothing of it."""
  said = {"kind": thing.kind, "colour": thing.colour, "pattern": thing.pattern}
  if thing.size in SIZE_WORDS:
    said["size"] = thing.size
  name = str(rng.choice(["", *said]))
  return Phrase(**{name: said[name]}) if name else Phrase()


def about_kind(scene: Scene, boxed: int, rng: np.random.Generator | None = None) -> Question:
  """A box around object `boxed` and no phrase: everything of its kind."""
  kind = scene.objects[boxed].kind
  answer = tuple(i for i, t in enumerate(scene.objects) if t.kind == kind)
  return Question(BOX_ONLY_PHRASE, (_loose(scene.objects[boxed].box, scene, rng),), (1,), answer)


def without_kind(
  scene: Scene, phrase: Phrase, boxed: int, rng: np.random.Generator | None = None
) -> Question:
  """A phrase, and a negative box around object `boxed`: what matches, without the boxed object's kind."""
  kind = scene.objects[boxed].kind
  answer = tuple(i for i, t in enumerate(scene.objects) if phrase.matches(t) and t.kind != kind)
  return Question(str(phrase), (_loose(scene.objects[boxed].box, scene, rng),), (0,), answer)


def _loose(box, scene: Scene, rng: np.random.Generator | None):
  """The box as a hand would draw it: each edge off by up to 6% of the box; exact without `rng`."""
  if rng is None:
    return box
  x1, y1, x2, y2 = box
  by = rng.uniform(-0.06, 0.06, 4) * np.array([x2 - x1, y2 - y1, x2 - x1, y2 - y1])
  return tuple(float(v) for v in np.clip(np.array(box) + by, 0, scene.image.shape[0]))


class ShapesBatches:
  """Training batches by step number: `batches[step]`, the same for the same seed, whenever it is asked.

  Batches are as `sam3lt_jax.data.batches` describes them. Masks are shrunk to `mask_side` by area.
  """

  def __init__(
    self,
    tokenize: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]],
    *,
    images: int,
    questions: int,
    mask_side: int,
    scene: SceneConfig | None = None,
    mix: QuestionMix | None = None,
    seed: int = 0,
    labels: Callable[[Scene], Mapping[str, np.ndarray]] | None = None,
  ):
    """
    Args:
      tokenize: phrases to (ids, mask), a `ClipTokenizer`. images, questions: a batch, an image.
      labels: more arrays of every scene, stacked into the batch under their names.
    """
    scene, mix = scene or SceneConfig(), mix or QuestionMix()
    if scene.side % mask_side:
      raise ValueError(f"mask_side must divide the scene's side {scene.side}, got {mask_side}")
    self._tokenize, self._images, self._questions = tokenize, images, questions
    self._mask_side, self._scene, self._mix, self._seed = mask_side, scene, mix, seed
    self._labels = labels

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    rows = range(step * self._images, (step + 1) * self._images)
    seeds = [self._seed * 100_000_000 + row for row in rows]
    if seeds[-1] >= HELD_OUT_SEED:
      raise ValueError(f"step {step} would reach the held-out scenes (seeds from {HELD_OUT_SEED} on)")
    scenes = [draw_scene(s, self._scene) for s in seeds]
    asked = []
    for s, scene in zip(seeds, scenes):
      rng = np.random.default_rng([s, 11])
      asked.append([ask(scene, rng, self._mix) for _ in range(self._questions)])
    batch = to_batch(scenes, asked, self._tokenize, self._mask_side, self._scene.max_objects)
    more = [self._labels(scene) for scene in scenes] if self._labels else [{}]
    return batch | {name: np.stack([labels[name] for labels in more]) for name in more[0]}


def to_batch(
  scenes: Sequence[Scene],
  asked: Sequence[Sequence[Question]],
  tokenize: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]],
  mask_side: int,
  slots: int,
) -> dict[str, np.ndarray]:
  """Scenes and their questions (equally many each) as one batch of arrays, see `sam3lt_jax.data.batches`."""
  B, K, S = len(scenes), len(asked[0]), scenes[0].image.shape[0]
  ids, tokens = tokenize([q.text for questions in asked for q in questions])
  batch = {
    "pixel_values": np.stack([s.image for s in scenes]).astype(np.float32) / 127.5 - 1.0,
    "input_ids": ids.reshape(B, K, -1),
    "attention_mask": tokens.reshape(B, K, -1),
    "input_boxes": np.full((B, K, MAX_BOXES, 4), 0.5, np.float32),
    "input_boxes_labels": np.full((B, K, MAX_BOXES), PADDING_LABEL, np.int32),
    "target_boxes": np.full((B, K, slots, 4), 0.5, np.float32),
    "target_masks": np.zeros((B, K, slots, mask_side, mask_side), np.uint8),
    "target_valid": np.zeros((B, K, slots), bool),
    "phrase_attributes": np.full((B, K, len(ATTRIBUTES)), -1, np.int32),
    "target_attributes": np.zeros((B, K, slots, len(ATTRIBUTES)), np.int32),
    "prompt_valid": np.ones((B, K), bool),
    "exhaustive": np.ones((B, K), bool),
    "id": np.array([s.seed for s in scenes], np.int64),
  }
  for b, (scene, questions) in enumerate(zip(scenes, asked)):
    if scene.objects:
      masks = shrink(np.stack([t.mask for t in scene.objects]), mask_side)
      boxes = _cxcywh(np.array([t.box for t in scene.objects], np.float32)) / S
      attributes = np.array([attribute_indices(t) for t in scene.objects], np.int32)
    for k, q in enumerate(questions):
      n, m = len(q.boxes), len(q.answer)
      batch["phrase_attributes"][b, k] = named_attributes(q.text)
      if n:
        batch["input_boxes"][b, k, :n] = _cxcywh(np.array(q.boxes, np.float32)) / S
        batch["input_boxes_labels"][b, k, :n] = q.labels
      if m:
        chosen = list(q.answer)
        batch["target_boxes"][b, k, :m] = boxes[chosen]
        batch["target_masks"][b, k, :m] = masks[chosen]
        batch["target_valid"][b, k, :m] = True
        batch["target_attributes"][b, k, :m] = attributes[chosen]
  batch["target_has_mask"] = batch["target_valid"].copy()
  return batch


def attribute_indices(thing: SceneObject) -> list[int]:
  """Which value of each of `ATTRIBUTES` the object has."""
  return [values.index(getattr(thing, name)) for name, values in ATTRIBUTES.items()]


def named_attributes(text: str) -> list[int]:
  """Which value of each of `ATTRIBUTES` a phrase asks for; -1 where it leaves the attribute open."""
  words = text.split()
  return [next((i for i, v in enumerate(values) if v in words), -1) for values in ATTRIBUTES.values()]


def shrink(masks: np.ndarray, side: int) -> np.ndarray:
  """bool [N, S, S] -> uint8 [N, side, side]: 1 where at least half of the cell is covered."""
  return (reduce(masks, "n (h p) (w q) -> n h w", np.mean, h=side, w=side) >= 0.5).astype(np.uint8)


def _cxcywh(xyxy: np.ndarray) -> np.ndarray:
  low, high = xyxy[..., :2], xyxy[..., 2:]
  return np.concatenate([(low + high) / 2, high - low], -1)
