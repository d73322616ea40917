"""Phrases and boxes as a user writes them, checked and lined up, for `Sam3Processor` and `Predictor`.

Axes: P prompts, N boxes of a prompt. Source of the conventions: transformers 5.23.0 `processing_sam3.py`.
"""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam3lt_jax.config import BOX_ONLY_PHRASE, PADDING_LABEL

_BOXES_FORMAT = "[prompt][box][x1, y1, x2, y2] in pixels (or an array [P, N, 4])"

Sizes = Sequence[tuple[int, int]]


def box_rows(input_boxes: Any, name: str = "input_boxes") -> list[np.ndarray]:
  """`input_boxes` to one float64 [N, 4] a prompt, N = 0 where a prompt has none.

  `name`, here and below, is what the caller's user knows the argument by.
  """
  if hasattr(input_boxes, "__array__"):
    input_boxes = np.asarray(input_boxes)
    if input_boxes.ndim != 3 or input_boxes.shape[-1] != 4:
      raise ValueError(f"{name} must be {_BOXES_FORMAT}, got an array of shape {input_boxes.shape}")
  elif not isinstance(input_boxes, (list, tuple)) or not input_boxes:
    raise ValueError(f"{name} must be {_BOXES_FORMAT}, got {input_boxes!r}")
  return [_box_row(row, i, name) for i, row in enumerate(input_boxes)]


def _box_row(row: Any, i: int, name: str) -> np.ndarray:
  if row is None or (isinstance(row, (list, tuple)) and not row):
    return np.zeros((0, 4))
  if isinstance(row, (str, bytes)) or np.ndim(row[0] if isinstance(row, (list, tuple)) else row) == 0:
    raise ValueError(f"{name} must be {_BOXES_FORMAT}; entry {i} is {row!r}, one level of nesting is missing")
  for k, box in enumerate(row):
    # One box at a time, so that the message can say which one.
    try:
      values = np.asarray(box, np.float64)
    except (TypeError, ValueError) as e:
      raise ValueError(f"{name}: box {k} of prompt {i} must be four numbers, got {box!r}") from e
    if values.shape != (4,):
      raise ValueError(
        f"{name}: box {k} of prompt {i} must be four numbers (x1, y1, x2, y2), got {box!r}; "
        f"the nesting is {_BOXES_FORMAT}"
      )
  return np.asarray(row, np.float64).reshape(-1, 4)


def label_rows(
  labels: Any, boxes: list[np.ndarray], name: str = "input_boxes_labels", boxes_name: str = "input_boxes"
) -> list[np.ndarray]:
  """`input_boxes_labels` to one int32 [N] a prompt, counts checked against the boxes; None: all 1."""
  if labels is None:
    return [np.ones(len(row), np.int32) for row in boxes]
  if hasattr(labels, "__array__"):
    labels = np.asarray(labels)
    if labels.ndim != 2:
      raise ValueError(f"{name} must be [prompt][box], got an array of shape {labels.shape}")
    labels = labels.tolist()
  if not isinstance(labels, (list, tuple)) or not all(
    isinstance(r, (list, tuple, np.ndarray, type(None))) for r in labels
  ):
    raise ValueError(f"{name} must be [prompt][box], got {labels!r}")
  if len(labels) != len(boxes):
    raise ValueError(f"{name} are for {len(labels)} prompts, {boxes_name} for {len(boxes)}")
  rows = []
  for i, (row, row_boxes) in enumerate(zip(labels, boxes)):
    row = [] if row is None else list(row)
    if len(row) != len(row_boxes):
      raise ValueError(f"{name}: prompt {i} has {len(row)} labels for {len(row_boxes)} boxes")
    for k, label in enumerate(row):
      if not isinstance(label, (numbers.Integral, np.bool_)) or int(label) not in (0, 1, PADDING_LABEL):
        raise ValueError(
          f"{name} must be 1 (like this), 0 (not like this) or {PADDING_LABEL} (ignore); "
          f"box {k} of prompt {i} has {label!r}"
        )
    rows.append(np.asarray(row, np.int32))
  return rows


def phrase_rows(text: Any, boxes: list[np.ndarray] | None, sizes: Sizes | None) -> list[str] | None:
  """One phrase a prompt: a single one repeated, None beside boxes replaced by "visual"."""
  if text is None and boxes is None:
    return None
  if text is None or isinstance(text, str):
    rows = len(boxes) if boxes is not None else len(sizes) if sizes is not None else 1
    return [BOX_ONLY_PHRASE if text is None else text] * rows
  if not isinstance(text, (list, tuple)):
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
  if len(sizes) == 1:
    return list(sizes) * len(boxes)
  if len(sizes) != len(boxes):
    raise ValueError(
      f"input_boxes are for {len(boxes)} prompts, but there are {len(sizes)} images (or sizes)"
    )
  return sizes


def pad_boxes(
  boxes: list[np.ndarray], labels: list[np.ndarray], sizes: Sizes, name: str = "input_boxes"
) -> tuple[np.ndarray, np.ndarray]:
  """Boxes in pixels to the model's arrays.

  Args:
    boxes: [N, 4] a prompt, (x1, y1, x2, y2) in pixels.
    labels: int32 [N] a prompt.
    sizes: (height, width) in pixels a prompt.

  Returns:
    (float32 [P, max N, 4] normalised (cx, cy, w, h), int32 [P, max N]); padding is (-10, -10, 0, 0) and -10.

  Raises:
    ValueError: a box that is not finite, or inverted.
  """
  most = max(map(len, boxes))
  out_boxes = np.full((len(boxes), most, 4), (PADDING_LABEL, PADDING_LABEL, 0, 0), np.float32)
  out_labels = np.full((len(boxes), most), PADDING_LABEL, np.int32)
  for i, (row, row_labels, size) in enumerate(zip(boxes, labels, sizes)):
    active = row_labels != PADDING_LABEL
    for k in np.flatnonzero(active):
      _check_box(row[k], size, f"{name}: box {k} of prompt {i}")
    corners = row.astype(np.float32) / np.asarray([size[1], size[0]] * 2, np.float32)
    low, high = corners[:, :2], corners[:, 2:]
    normalised = np.concatenate([(low + high) / 2, high - low], axis=-1)
    out_boxes[i, : len(row)][active] = normalised[active]
    out_labels[i, : len(row)] = row_labels
  return out_boxes, out_labels


def _check_box(box: np.ndarray, size: tuple[int, int], name: str) -> None:
  x1, y1, x2, y2 = box.tolist()
  height, width = size
  if not np.isfinite(box).all():
    raise ValueError(f"{name} must be finite, got {box.tolist()}")
  if x2 < x1 or y2 < y1:
    raise ValueError(
      f"{name} is inverted, got {box.tolist()}; (x1, y1, x2, y2) with x1 <= x2, y1 <= y2 expected"
    )
  if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
    warnings.warn(f"{name} {box.tolist()} lies outside the image of {width}x{height} pixels", stacklevel=4)
  elif box.min() >= 0 and box.max() <= 1 and min(size) > 1:
    warnings.warn(
      f"{name} {box.tolist()} is within one pixel; pixels are expected, not fractions", stacklevel=4
    )


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


def prompts_of(text: Any, boxes: Any, labels: Any) -> list[Prompt]:
  """What a user asks of one image: a prompt a phrase, with the same boxes, or one of boxes alone."""
  boxes = [] if boxes is None else _listed("boxes", boxes, "[[x1, y1, x2, y2], ...] in pixels")
  if len(boxes) == 4 and all(map(_is_scalar, boxes)):
    boxes = [boxes]  # one box, not in a list
    labels = [labels] if labels is not None and _is_scalar(labels) else labels
  if labels is not None and not boxes:
    raise ValueError("box_labels were given without boxes")
  if text is None and not boxes:
    raise ValueError("nothing to look for: give text, boxes or both")
  phrases = [None] if text is None else [text] if isinstance(text, str) else text
  if (
    not isinstance(phrases, (list, tuple))
    or not phrases
    or not (text is None or all(isinstance(p, str) for p in phrases))
  ):
    raise ValueError(f"text must be a phrase or a list of phrases, got {text!r}")
  return [Prompt(phrase, boxes, labels) for phrase in phrases]


def box_arrays(prompt: Prompt, size: tuple[int, int], slots: int) -> tuple[np.ndarray, np.ndarray]:
  """A prompt's boxes float32 [slots, 4], normalised cxcywh, and labels int32 [slots], padded.

  Args:
    size: (height, width) of the image in pixels. slots: at least as many as there are boxes.

  Raises:
    ValueError: a box that is no box, inverted or not finite, or labels that do not match the boxes.
  """
  boxes = np.zeros((slots, 4), np.float32)
  labels = np.full(slots, PADDING_LABEL, np.int32)
  if len(prompt.boxes):
    rows = box_rows([list(prompt.boxes)], "boxes")
    given = None if prompt.labels is None else [prompt.labels]
    given = label_rows(given, rows, "box_labels", "boxes")
    padded = pad_boxes(rows, given, [size], "boxes")
    boxes[: len(rows[0])], labels[: len(rows[0])] = (x[0] for x in padded)
  return boxes, labels


def is_several(images: Any) -> bool:
  return isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4


def _is_scalar(value: Any) -> bool:
  """Not a sequence; numpy's own test fails on lists of uneven length."""
  return not hasattr(value, "__len__") or isinstance(value, (str, bytes)) or getattr(value, "ndim", 1) == 0


def _listed(name: str, value: Any, accepted: str) -> list[Any]:
  if _is_scalar(value):
    raise ValueError(f"{name} must be {accepted}, got {value!r}")
  return list(value)


def texts_per_image(text: Any, images: int) -> list[Any]:
  """Phrases of each image: a phrase or a flat list of phrases is asked of all of them."""
  if isinstance(text, (list, tuple)) and not all(isinstance(phrase, str) for phrase in text):
    return per_image("text", text, images, 0)
  return [text] * images


def per_image(name: str, value: Any, images: int, nesting: int) -> list[Any]:
  """One entry an image, each None or a list nested `nesting` deep; None alone repeats."""
  if value is None:
    return [None] * images
  value = _listed(name, value, "a list with one entry (or None) an image")
  if len(value) != images:
    raise ValueError(f"{name} must have one entry an image: {images} expected, got {len(value)}")
  for i, entry in enumerate(value):
    inside = entry
    for _ in range(nesting):
      if inside is not None and _is_scalar(inside):
        raise ValueError(f"{name} must be nested one list an image; entry {i} is {entry!r}")
      if inside is None or not len(inside):
        break  # no boxes for this image
      inside = inside[0]
  return value
