"""One image with its prompts as arrays: prompts drawn, augmented, squared, padded to fixed slots.

Axes: K prompts an image, M object slots a prompt, N example boxes a prompt, S side of the model's image, h w
side of a mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sam3lt_jax.config import BOX_ONLY_PHRASE, PADDING_LABEL
from sam3lt_jax.data import augment as augment_ops
from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.data.augment import Augmentation, AugmentConfig
from sam3lt_jax.data.records import Prompt, Record, RecordError
from sam3lt_jax.errors import check
from sam3lt_jax.processing import images as image_ops
from sam3lt_jax.processing.processor import Sam3Processor

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PromptConfig:
  """Which prompts an image gets, and how many of everything.

  Attributes:
    prompts: K.
    objects: M. Of more objects the largest M are kept, and the prompt counts as not exhaustive.
    negatives: share of absent phrases among the prompts, in expectation and as far as the record has both. A
      record with nothing but absent phrases gives those.
    box_prompts: probability that a present prompt also gets example boxes of its own objects.
    box_only: of those, the share whose phrase becomes "visual", so that the boxes alone ask. Prompts of
      single annotations (`Prompt.all_of_kind` False) keep their phrase.
    max_boxes: N, as 1 to N boxes are drawn. 0 slots are made where `box_prompts` is 0.
    box_jitter: each edge of an example box moves by up to this share of the box's side.
    augment: what to change in the image; None, nothing.
  """

  prompts: int = 4
  objects: int = 32
  negatives: float = 0.5
  box_prompts: float = 0.0
  box_only: float = 0.5
  max_boxes: int = 1
  box_jitter: float = 0.1
  augment: AugmentConfig | None = AugmentConfig()

  def __post_init__(self):
    for name in ("prompts", "objects", "max_boxes"):
      check(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
    for name in ("negatives", "box_prompts", "box_only"):
      check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a share in [0, 1]")
    check(0 <= self.box_jitter < 0.5, "box_jitter", self.box_jitter, "a share in [0, 0.5)")


class _Shown(NamedTuple):
  """A prompt as the augmented image shows it: (box in its pixels, mask at the mask side or None) of each
  object, and how many there are of which too little is left."""

  objects: list[tuple[np.ndarray, np.ndarray | None]]
  slivers: int


def make_example(
  record: Record, config: PromptConfig, processor: Sam3Processor, mask_side: int, rng: np.random.Generator
) -> Example:
  """A record to the arrays of one image.

  Args:
    record: its image and prompts.
    config: what to draw.
    processor: its image size, tokenizer and profile.
    mask_side: h = w.
    rng: decides everything that is drawn.

  Returns:
    pixel_values f32 [S, S, 3] in [-1, 1]; input_ids, attention_mask i32 [K, T]; input_boxes f32 [K, N, 4]
    normalised cxcywh, input_boxes_labels i32 [K, N] (1, or -10 padding); target_boxes f32 [K, M, 4]
    normalised cxcywh; target_masks u8 [K, M, h, w] 0 or 1; target_valid, target_has_mask bool [K, M];
    prompt_valid, exhaustive bool [K]; id i64 []. Unused slots are zero (boxes of prompts: -10, -10, 0, 0).

  Raises:
    RecordError: "no prompts", or as `Record.load_image`.
  """
  chosen = draw_prompts(record, config, rng)
  image = record.load_image()
  augment = config.augment or augment_ops.NO_AUGMENTATION
  change = augment_ops.draw(augment, tuple(record.size), [p.phrase for p in chosen], rng)
  pixels = image_ops.normalise(image_ops.resize_image(change.image(image), processor.image_size))
  K, M, N = config.prompts, config.objects, config.max_boxes if config.box_prompts else 0
  example = {
    "pixel_values": pixels,
    "input_boxes": np.full((K, N, 4), (PADDING_LABEL, PADDING_LABEL, 0, 0), np.float32),
    "input_boxes_labels": np.full((K, N), PADDING_LABEL, np.int32),
    "target_boxes": np.zeros((K, M, 4), np.float32),
    "target_masks": np.zeros((K, M, mask_side, mask_side), np.uint8),
    "target_valid": np.zeros((K, M), bool),
    "target_has_mask": np.zeros((K, M), bool),
    "prompt_valid": np.zeros(K, bool),
    "exhaustive": np.zeros(K, bool),
    "id": np.int64(record.id),
  }
  phrases = [BOX_ONLY_PHRASE] * K
  for k, prompt in enumerate(chosen):
    shown = _show(prompt, change, augment, mask_side)
    phrases[k] = _fill_boxes(example, k, prompt, shown, change.out_size, config, rng)
    _fill_targets(example, k, prompt, shown, change.out_size)
  text = processor(text=phrases)
  return example | {"input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}


def draw_prompts(record: Record, config: PromptConfig, rng: np.random.Generator) -> list[Prompt]:
  """At most K prompts of a record, in random order, negatives in the share that `config` says.

  A prompt without objects that is not exhaustive is neither present nor absent, and is never drawn.

  Raises:
    RecordError: "no prompts" that could be drawn.
  """
  present = [p for p in record.prompts if len(p.boxes)]
  absent = [p for p in record.prompts if not len(p.boxes) and p.exhaustive]
  if config.negatives == 0:
    absent = []
  elif config.negatives == 1:
    present = []
  if not present and not absent:
    raise RecordError("no prompts", f"{record}: it has no phrase that could be asked")
  wanted = config.prompts * config.negatives
  if present:  # too few of them to fill K: as many absent ones as keep the share
    wanted = min(wanted, len(present) * config.negatives / (1 - config.negatives))
  negatives = min(int(wanted + rng.random()), len(absent))
  if not present:
    negatives = max(negatives, 1)
  positives = min(config.prompts - negatives, len(present))
  drawn = [present[i] for i in rng.permutation(len(present))[:positives]]
  drawn += [absent[i] for i in rng.permutation(len(absent))[:negatives]]
  return [drawn[i] for i in rng.permutation(len(drawn))]


def _show(prompt: Prompt, change: Augmentation, config: AugmentConfig, mask_side: int) -> _Shown:
  """The prompt's objects, one at a time, so that only one full-size mask exists at once."""
  objects, slivers = [], 0
  for box, rle in zip(prompt.boxes, prompt.masks):
    seen = change.object(box, None if rle is None else rle_ops.decode(rle), config)
    slivers += seen.state == "sliver"
    if seen.box is not None:
      small = None if seen.mask is None else shrink_mask(seen.mask, (mask_side, mask_side))
      objects.append((seen.box, small))
  return _Shown(objects, slivers)


def _fill_targets(example: Example, k: int, prompt: Prompt, shown: _Shown, size: tuple[int, int]) -> None:
  slots = example["target_valid"].shape[1]
  areas = [float(np.prod(box[2:] - box[:2])) for box, _ in shown.objects]
  keep = sorted(np.argsort(-np.array(areas), kind="stable")[:slots].tolist())
  for m, i in enumerate(keep):
    box, mask = shown.objects[i]
    example["target_boxes"][k, m] = _normalised(box, size)
    example["target_valid"][k, m] = True
    if mask is not None and mask.any():  # one that vanished at this size would teach an empty mask
      example["target_masks"][k, m] = mask
      example["target_has_mask"][k, m] = True
  exhaustive = prompt.exhaustive and not shown.slivers and len(keep) == len(shown.objects)
  example["exhaustive"][k] = exhaustive
  # With nothing but slivers left the phrase is neither present nor absent.
  example["prompt_valid"][k] = bool(keep) or exhaustive


def _fill_boxes(
  example: Example,
  k: int,
  prompt: Prompt,
  shown: _Shown,
  size: tuple[int, int],
  config: PromptConfig,
  rng: np.random.Generator,
) -> str:
  """Draws example boxes into slot k; returns the phrase that goes with them."""
  use, alone = rng.random(2)
  if use >= config.box_prompts or not shown.objects:
    return prompt.phrase
  count = min(int(rng.integers(1, config.max_boxes + 1)), len(shown.objects))
  for n, i in enumerate(rng.permutation(len(shown.objects))[:count]):
    box = jitter_box(shown.objects[i][0], size, config.box_jitter, rng)
    example["input_boxes"][k, n] = _normalised(box, size)
    example["input_boxes_labels"][k, n] = 1
  return BOX_ONLY_PHRASE if alone < config.box_only and prompt.all_of_kind else prompt.phrase


def jitter_box(box: np.ndarray, size: tuple[int, int], amount: float, rng: np.random.Generator) -> np.ndarray:
  """Moves each edge of a box [4] (x1, y1, x2, y2) by up to `amount` of the box's side, within the image."""
  sides = np.tile(box[2:] - box[:2], 2)
  moved = box + rng.uniform(-amount, amount, 4) * sides
  return np.clip(moved, 0, [size[1], size[0]] * 2).astype(np.float32)


def shrink_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes a mask: a cell is set if more than half of its area is.

  Args:
    mask: bool [H, W].
    size: (h, w) of the result, also where it is larger.

  Returns:
    bool [h, w].
  """
  columns = np.flatnonzero(mask.any(0))
  if not len(columns):
    return np.zeros(size, bool)
  around = slice(columns[0], columns[-1] + 1)  # the rest is known, and most of the work
  covered = np.zeros((mask.shape[1], size[0]))
  covered[around] = _cell_means(mask[:, around], size[0]).T
  # Half a cell is not more than half, whatever the rounding says.
  return _cell_means(covered, size[1]).T > 0.5 + 1e-9


def _cell_means(values: np.ndarray, cells: int) -> np.ndarray:
  """[H, W] to the means over `cells` equal parts of the first axis, float64 [cells, W]."""
  length = len(values)
  total = np.zeros((length + 1, values.shape[1]), np.int32 if values.dtype == bool else np.float64)
  np.cumsum(values, axis=0, out=total[1:])
  edges = np.arange(cells + 1) * (length / cells)
  low = np.minimum(edges.astype(int), length - 1)
  part = (edges - low)[:, None]
  at = total[low] * (1 - part) + total[low + 1] * part
  return np.diff(at, axis=0) * (cells / length)


def _normalised(box: Sequence[float] | np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """(x1, y1, x2, y2) in pixels to (cx, cy, w, h) in units of the image's sides."""
  x1, y1, x2, y2 = np.asarray(box, np.float64) / ([size[1], size[0]] * 2)
  return np.array([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], np.float32)
