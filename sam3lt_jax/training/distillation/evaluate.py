"""How close a student is to its teacher: in features, and in what the detector makes of them.

Axes: P prompts, T tokens, D feature width, Q queries, h, w mask rows and columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.processing.processor import Sam3Processor
from sam3lt_jax.training.distillation import text_part
from sam3lt_jax.training.distillation.losses import cosine_similarity, mean_of_prompts
from sam3lt_jax.training.prompts import token_rows

Batch = Mapping[str, np.ndarray]


def make_feature_evaluator(
  student: Sam3LiteText, batches: Sequence[Batch]
) -> Callable[[Variables], dict[str, float]]:
  """A function that measures a student on held-out phrases.

  Args:
    student: in the dtype to be measured. BatchNorm uses its running statistics.
    batches: input_ids, attention_mask [P, T], teacher_features [P, T, D]; all of one shape but the last.

  Returns:
    f(student variables) -> {"heldout_cosine": mean cosine over valid tokens of a prompt, then over prompts;
    "heldout_cosine_min": of the worst prompt; "heldout_mse": likewise mean}.
  """

  @jax.jit
  def measure(variables, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"].astype(bool)
    features = student.apply(variables, ids, mask, method="get_text_features").pooler_output
    features, wanted = features.astype(jnp.float32), batch["teacher_features"].astype(jnp.float32)
    cosine = mean_of_prompts(cosine_similarity(features, wanted), mask)
    return cosine, mean_of_prompts(jnp.square(features - wanted).mean(axis=-1), mask)

  def evaluate(variables: Variables) -> dict[str, float]:
    cosine, error = (np.concatenate(x) for x in zip(*(measure(variables, batch) for batch in batches)))
    return {
      "heldout_cosine": float(cosine.mean()),
      "heldout_cosine_min": float(cosine.min()),
      "heldout_mse": float(error.mean()),
    }

  return evaluate


def mean_feature_cosine(batches: Sequence[Batch]) -> float:
  """The cosine that the mean feature of every slot has with the teacher's features, whatever the phrase.

  A student has learnt to read only as far as it is above that: with features that are much alike it is high.

  Args:
    batches: attention_mask [P, T] and teacher_features [P, T, D]; the mean is over all their valid tokens.
  """
  features, mask = (np.concatenate([b[k] for b in batches]) for k in ("teacher_features", "attention_mask"))
  features, mask = features.astype(np.float64), mask.astype(bool)
  count = np.maximum(mask.sum(axis=0), 1)[:, None]
  mean = np.where(mask[..., None], features, 0.0).sum(axis=0) / count
  norms = np.linalg.norm(features, axis=-1) * np.linalg.norm(mean, axis=-1)
  cosine = np.where(mask, (features * mean).sum(axis=-1) / np.maximum(norms, 1e-8), 0.0)
  return float((cosine.sum(axis=1) / np.maximum(mask.sum(axis=1), 1)).mean())


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How far two models agree on (image, phrase) pairs. Shares are 0 to 1; None: nothing to compare.

  Attributes:
    pairs: how many pairs.
    presence_difference: mean |difference| of the presence probabilities.
    presence_agreement: share of pairs whose presence is on the same side of 0.5.
    score_difference: mean |difference| of the detection scores, query by query.
    found_by_teacher, found_by_student: detections with a score above the threshold.
    f1: of the student's detections against the teacher's: matched one to one, best first, at a mask IoU of
      0.5 or more. 1 where neither finds anything.
    mask_iou: mean mask IoU of the matched, at the resolution of `pred_masks`.
  """

  pairs: int
  presence_difference: float
  presence_agreement: float
  score_difference: float
  found_by_teacher: int
  found_by_student: int
  f1: float
  mask_iou: float | None

  def __str__(self) -> str:
    iou = "none to compare" if self.mask_iou is None else f"{self.mask_iou:.3f}"
    return (
      f"{self.pairs} pairs of image and phrase: presence agrees in {self.presence_agreement:.1%} (mean"
      f" difference {self.presence_difference:.4f}), scores differ by {self.score_difference:.4f},"
      f" {self.found_by_student} found where the teacher finds {self.found_by_teacher}, F1 {self.f1:.3f},"
      f" mask IoU {iou}"
    )


def agreement(
  student: tuple[Sam3LiteText, Variables],
  teacher: tuple[Sam3LiteText, Variables],
  images: Sequence[Any],
  phrases: Sequence[str],
  *,
  threshold: float | None = None,
  tokenizer: Any = None,
) -> Agreement:
  """Asks both models for every phrase in every image, and compares.

  Args:
    student: (model, variables), as `text_part.splice` gives: the teacher's model but for its text
      encoder. The teacher's vision encoder serves both.
    teacher: (model, variables) of the whole model.
    images: paths, PIL images or arrays [H, W, 3].
    phrases: asked of every image.
    threshold: of detections; None: the teacher's profile's.
    tokenizer: for both models; None: the one that each profile asks for.

  Raises:
    ValueError: no images or no phrases, or words that are not in the vocabulary.
  """
  if not len(images) or not len(phrases):
    raise ValueError(f"images and phrases must hold at least one each, got {len(images)} and {len(phrases)}")
  model, variables = teacher
  if threshold is None:
    threshold = model.config.profile.score_threshold
  processor = Sam3Processor(model.config)
  encode = jax.jit(lambda v, x: model.apply(v, x, method="get_vision_features"))

  @jax.jit
  def detect(variables, vision, tokens, mask):
    """presence [], scores [Q], masks bool [Q, h, w] of one phrase."""
    out = model.apply(variables, vision_embeds=vision, text_embeds=tokens, attention_mask=mask)
    presence = jax.nn.sigmoid(out.presence_logits[0, 0])
    return presence, jax.nn.sigmoid(out.pred_logits[0]) * presence, out.pred_masks[0] > 0

  sides = [(_detector_part(v), *_read(m, v, phrases, tokenizer)) for m, v in (student, teacher)]
  rows, ious, found, matched = [], [], np.zeros(2, int), 0
  for image in images:
    vision = encode(_detector_part(variables), processor(images=image)["pixel_values"])
    for p in range(len(phrases)):
      both = [jax.device_get(detect(v, vision, text[p : p + 1], mask[p : p + 1])) for v, text, mask in sides]
      (ours, our_scores, _), (theirs, their_scores, _) = both
      rows.append((ours, theirs, np.abs(our_scores - their_scores).mean()))
      kept = [np.flatnonzero(scores > threshold) for _, scores, _ in both]
      found += [len(k) for k in kept]
      pair_ious = _match(*(m[k[np.argsort(-scores[k])]] for (_, scores, m), k in zip(both, kept)))
      ious += pair_ious
      matched += len(pair_ious)
  table = np.array(rows, np.float64)
  return Agreement(
    pairs=len(rows),
    presence_difference=float(np.abs(table[:, 0] - table[:, 1]).mean()),
    presence_agreement=float(((table[:, 0] > 0.5) == (table[:, 1] > 0.5)).mean()),
    score_difference=float(table[:, 2].mean()),
    found_by_teacher=int(found[1]),
    found_by_student=int(found[0]),
    f1=2 * matched / found.sum() if found.sum() else 1.0,
    mask_iou=float(np.mean(ious)) if ious else None,
  )


def _detector_part(variables: Variables) -> Variables:
  """Without the text part, so that both sides are of one shape."""
  return {"params": {k: v for k, v in variables["params"].items() if k not in text_part.TEXT_PARTS}}


def _read(model: Sam3LiteText, variables: Variables, phrases: Sequence[str], tokenizer: Any):
  """(tokens [P, T, D], mask [P, T]) of phrases, padded as the model's own profile says."""
  profile, words = model.config.profile, model.config.text.vocab_size
  tokenizer = Sam3Processor(model.config, tokenizer=tokenizer).tokenizer
  ids, mask = token_rows(list(phrases), tokenizer, profile.context_length)
  if ids.max() >= words:
    phrase = phrases[int(np.argmax((ids >= words).any(axis=1)))]
    raise ArgumentError("phrases", f": {phrase!r} has words beyond the model's vocabulary of {words} tokens")
  ids = np.where(mask, ids, profile.pad_token_id)
  read = jax.jit(lambda v, i, m: model.apply(v, i, m, method="get_text_features").pooler_output)
  return np.asarray(read(text_part.text_variables(variables), ids, mask)), mask


def _match(ours: np.ndarray, theirs: np.ndarray, least: float = 0.5) -> list[float]:
  """IoUs [K] of masks [n, h, w] and [m, h, w] paired one to one, in the order of `ours`; `least` or more."""
  a, b = (m.reshape(len(m), math.prod(m.shape[1:])).astype(np.float32) for m in (ours, theirs))
  both = a @ b.T
  ious, found = both / np.maximum(a.sum(1)[:, None] + b.sum(1) - both, 1), []
  for row in ious:
    if row.max(initial=0) >= least:
      found.append(float(row.max()))
      ious[:, row.argmax()] = 0  # it is taken
  return found
