"""Phrases and boxes as a user writes them, checked and lined up, for `Sam3Processor` and `Predictor`.

Axes: P prompts, N boxes of a prompt. Source of the conventions: transformers 5.23.0 `processing_sam3.py`.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam3lt_jax.config import BOX_ONLY_PHRASE, PADDING_LABEL
from sam3lt_jax.errors import warn
from sam3lt_jax.processing.arrays import plain

_NESTED = "[prompt][box][x1, y1, x2, y2] in pixels (or an array [P, N, 4])"
_FLAT = "[[x1, y1, x2, y2], ...] in pixels (or an array [N, 4])"
_LABELS = f"1 (like this), 0 (not like this) or {PADDING_LABEL} (ignore)"

Sizes = Sequence[tuple[int, int]]


def box_rows(input_boxes: Any) -> list[np.ndarray]:
  """`input_boxes` of the processor to one float64 [N, 4] a prompt, N = 0 where a prompt has none."""
  name, rows = "input_boxes", plain(input_boxes, "input_boxes")
  if not isinstance(rows, list) or not rows:
    raise ValueError(f"{name} must be {_NESTED}, got {input_boxes!r}")
  for i, row in enumerate(rows):
    if not _is_nested(row, 2):
      raise ValueError(f"{name} must be {_NESTED}; entry {i} is {row!r}, one level of nesting is missing")
  return [_boxes(row or [], name, f"prompt {i}", _NESTED) for i, row in enumerate(rows)]


def _boxes(row: list[Any], name: str, whose: str, form: str) -> np.ndarray:
  """Boxes of one prompt or image, float64 [N, 4]; `whose` ("prompt 2") is for messages."""
  boxes = np.empty((len(row), 4))
  for k, box in enumerate(row):  # one at a time, so that the message can say which one
    try:
      values = np.asarray(box, np.float64)
    except (TypeError, ValueError, OverflowError):
      values = np.empty(0)
    if values.shape != (4,):
      hint = "" if values.ndim < 2 else ", one level of nesting too many"
      raise ValueError(
        f"{name}: box {k} of {whose} must be four numbers (x1, y1, x2, y2), got {box!r}{hint}; "
        f"the form is {form}"
      )
    boxes[k] = values
  return boxes


def label_rows(labels: Any, boxes: list[np.ndarray]) -> list[np.ndarray]:
  """`input_boxes_labels` of the processor to one int32 [N] a prompt, counts checked against the boxes;
  None: all 1.
  """
  if labels is None:
    return [np.ones(len(row), np.int32) for row in boxes]
  name, rows = "input_boxes_labels", plain(labels, "input_boxes_labels")
  if rows is None or not _is_nested(rows, 1) or not all(_is_nested(row, 1) for row in rows):
    raise ValueError(f"{name} must be [prompt][box], got {labels!r}")
  if len(rows) != len(boxes):
    raise ValueError(f"{name} are for {len(rows)} prompts, input_boxes for {len(boxes)}")
  return [_labels(row or [], len(own), name, f"prompt {i}") for i, (row, own) in enumerate(zip(rows, boxes))]


def _labels(row: Any, count: int, name: str, whose: str) -> np.ndarray:
  """Labels of `count` boxes of one prompt or image, int32 [N]."""
  if not isinstance(row, list):
    raise ValueError(f"{name} must be a list, for each box {_LABELS}, got {row!r}")
  if len(row) != count:
    raise ValueError(f"{name}: {whose} has {len(row)} labels for {count} boxes")
  for k, label in enumerate(row):
    if not isinstance(label, numbers.Real) or label not in (0, 1, PADDING_LABEL):
      raise ValueError(f"{name} must be {_LABELS}; box {k} of {whose} has {label!r}")
  return np.asarray(row, np.int32)


def phrase_rows(text: Any, boxes: list[np.ndarray] | None, sizes: Sizes | None) -> list[str] | None:
  """One phrase a prompt: a single one repeated, None beside boxes replaced by "visual"."""
  text = plain(text, "text")
  if text is None and boxes is None:
    return None
  if text is None or isinstance(text, str):
    rows = len(boxes) if boxes is not None else len(sizes) if sizes is not None else 1
    return [BOX_ONLY_PHRASE if text is None else text] * rows
  if not isinstance(text, list):
    raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}")
  if not text:
    raise ValueError("text must hold at least one phrase, got an empty list")
  if boxes is not None and len(text) != len(boxes):
    raise ValueError(f"text has {len(text)} phrases, input_boxes are for {len(boxes)} prompts")
  if sizes is not None and len(sizes) not in (1, len(text)):
    raise ValueError(f"text has {len(text)} phrases for {len(sizes)} images; give one an image, or one image")
  phrases = []
  for i, phrase in enumerate(text):
    if phrase is None and boxes is not None and len(boxes[i]):
      phrase = BOX_ONLY_PHRASE
    if not isinstance(phrase, str):
      hint = "; None is for prompts with boxes" if phrase is None else ""
      raise ValueError(f"text must hold strings, prompt {i} is {phrase!r}{hint}")
    phrases.append(phrase)
  return phrases


def sizes_for(boxes: list[np.ndarray], sizes: Sizes | None) -> Sizes:
  """(height, width) of the image of every prompt."""
  if sizes is None:
    raise ValueError("input_boxes are in pixels: give images or original_sizes as well")
  if len(sizes) not in (1, len(boxes)):
    raise ValueError(
      f"input_boxes are for {len(boxes)} prompts, but there are {len(sizes)} images (or sizes)"
    )
  return sizes if len(sizes) > 1 else list(sizes) * len(boxes)


def pad_boxes(
  boxes: list[np.ndarray], labels: list[np.ndarray], sizes: Sizes
) -> tuple[np.ndarray, np.ndarray]:
  """Boxes in pixels to the model's arrays, for the processor.

  Args:
    boxes: [N, 4] a prompt, (x1, y1, x2, y2) in pixels.
    labels: int32 [N] a prompt.
    sizes: (height, width) in pixels a prompt.

  Returns:
    (float32 [P, max N, 4] normalised (cx, cy, w, h), int32 [P, max N]); padding is (-10, -10, 0, 0) and -10.

  Raises:
    ValueError: a box that is not finite, or inverted.
  """
  rows = enumerate(zip(boxes, labels, sizes))
  most = max(map(len, boxes))
  padded = [_padded(*row, slots=most, name="input_boxes", whose=f"prompt {i}") for i, row in rows]
  return tuple(map(np.stack, zip(*padded)))


def box_arrays(prompt: Prompt, size: tuple[int, int], slots: int) -> tuple[np.ndarray, np.ndarray]:
  """As `pad_boxes`, of one prompt about an image of `size`, (height, width) in pixels: float32 [slots, 4] and
  int32 [slots]; there are as many slots as boxes, or more.
  """
  boxes = np.asarray(prompt.boxes, np.float64).reshape(-1, 4)
  labels = np.asarray([1] * len(boxes) if prompt.labels is None else prompt.labels, np.int32)
  return _padded(boxes, labels, size, slots, "boxes", "the image")


def _padded(
  row: np.ndarray, labels: np.ndarray, size: tuple[int, int], slots: int, name: str, whose: str
) -> tuple[np.ndarray, np.ndarray]:
  """Boxes [N, 4] as the model takes them. Warns of those that are hardly meant."""
  _check_boxes(row, labels, name, whose)
  active = np.flatnonzero(labels != PADDING_LABEL)
  for k in active:
    _warn(row[k], size, f"{name}: box {k} of {whose}")
  corners = row[active].astype(np.float32) / np.asarray([size[1], size[0]] * 2, np.float32)
  low, high = corners[:, :2], corners[:, 2:]
  boxes = np.tile(np.float32((PADDING_LABEL, PADDING_LABEL, 0, 0)), (slots, 1))
  boxes[active] = np.concatenate([(low + high) / 2, high - low], axis=-1)
  return boxes, np.pad(labels, (0, slots - len(labels)), constant_values=PADDING_LABEL)


def _check_boxes(row: np.ndarray, labels: np.ndarray, name: str, whose: str) -> None:
  for k in np.flatnonzero(labels != PADDING_LABEL):
    x1, y1, x2, y2 = box = row[k].tolist()
    if not np.isfinite(box).all():
      raise ValueError(f"{name}: box {k} of {whose} must be finite, got {box}")
    if x2 < x1 or y2 < y1:
      raise ValueError(
        f"{name}: box {k} of {whose} is inverted, got {box}; "
        "(x1, y1, x2, y2) with x1 <= x2, y1 <= y2 expected"
      )


def _warn(box: np.ndarray, size: tuple[int, int], name: str) -> None:
  x1, y1, x2, y2 = box.tolist()
  height, width = size
  if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
    warn(f"{name} {box.tolist()} lies outside the image of {width}x{height} pixels")
  elif box.min() >= 0 and box.max() <= 1 and min(size) > 1:
    warn(f"{name} {box.tolist()} is within one pixel; pixels are expected, not fractions")


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
  """One thing sought in one image.

  Attributes:
    text: a phrase, or None where boxes alone say what is sought.
    boxes: example boxes, (x1, y1, x2, y2) each, in pixels of the image.
    labels: 1 (like this) or 0 (not like this) a box; None: all 1.
  """

  text: str | None
  boxes: Sequence[Any] = ()
  labels: Sequence[int] | None = None

  @property
  def phrase(self) -> str:
    """What the text encoder reads and results are called."""
    return self.text or BOX_ONLY_PHRASE


def prompts_of(text: Any, boxes: Any, labels: Any, image: int | None = None) -> list[Prompt]:
  """What a user asks of one image: a prompt a phrase, with the same boxes, or one of boxes alone.

  `image` is its number where several are asked about, for messages.

  Raises:
    ValueError: naming the predictor's argument, and the image.
  """
  whose, of = ("the image", "") if image is None else (f"image {image}", f" of image {image}")
  text, boxes, labels = plain(text, "text"), plain(boxes, "boxes"), plain(labels, "box_labels")
  boxes = [] if boxes is None else boxes
  if not isinstance(boxes, list):
    raise ValueError(f"boxes{of} must be {_FLAT}, got {boxes!r}")
  if len(boxes) == 4 and not any(isinstance(box, list) for box in boxes):
    boxes = [boxes]  # one box, not in a list
    labels = labels if labels is None or isinstance(labels, list) else [labels]
  if labels is not None and not boxes:
    raise ValueError(f"box_labels were given without boxes{'' if image is None else f' for {whose}'}")
  if text is None and not boxes:
    where = "" if image is None else f" in {whose}"
    raise ValueError(f"nothing to look for{where}: give text, boxes or both")
  phrases = [text] if text is None or isinstance(text, str) else text
  good = isinstance(phrases, list) and phrases and all(isinstance(p, str) or p is text for p in phrases)
  if not good:
    raise ValueError(f"text{of} must be a phrase or a list of phrases, got {text!r}")
  rows = _boxes(boxes, "boxes", whose, _FLAT)
  if labels is not None:
    labels = _labels(labels, len(rows), "box_labels", whose)
  _check_boxes(rows, np.ones(len(rows)) if labels is None else labels, "boxes", whose)
  boxes = tuple(map(tuple, rows.tolist()))
  labels = None if labels is None else tuple(labels.tolist())
  return [Prompt(phrase, boxes, labels) for phrase in phrases]


def is_several(images: Any) -> bool:
  return isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4


def texts_per_image(text: Any, images: int) -> list[Any]:
  """Phrases of each image: a phrase or a flat list of phrases is asked of all of them."""
  text = plain(text, "text")
  if isinstance(text, list) and not all(isinstance(phrase, str) for phrase in text):
    return per_image("text", text, images, 0)
  return [text] * images


def per_image(name: str, value: Any, images: int, nesting: int) -> list[Any]:
  """One entry an image, each None or a list nested `nesting` deep; None alone repeats."""
  if value is None:
    return [None] * images
  value = plain(value, name)
  if not isinstance(value, list):
    raise ValueError(f"{name} must be a list with one entry (or None) an image, got {value!r}")
  if len(value) != images:
    raise ValueError(f"{name} must have one entry an image: {images} expected, got {len(value)}")
  for i, entry in enumerate(value):
    if not _is_nested(entry, nesting):
      raise ValueError(f"{name} must be nested one list an image; entry {i} is {entry!r}")
  return value


def _is_nested(value: Any, depth: int) -> bool:
  """Whether it is a list, of lists, ..., as far as the first of each tells; None and [] hold nothing."""
  if not depth or value is None:
    return True
  return isinstance(value, list) and (not value or _is_nested(value[0], depth - 1))
