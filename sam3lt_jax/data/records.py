"""What a data set is here: a sequence of records, each an image and the phrases asked of it.

`coco.load_coco` and `saco.load_saco` read files into such sequences; anything else that yields `Record`s (a
generator of drawn scenes, say) can be trained on and evaluated in the same way.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.data.rle import Rle
from sam3lt_jax.processing import images as image_ops


class RecordError(ValueError):
  """A record that cannot be used. `reason` is one of few, for counting; the message names file and record."""

  def __init__(self, reason: str, message: str):
    super().__init__(message)
    self.reason = reason

  def __reduce__(self):
    return RecordError, (self.reason, str(self))


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """A phrase asked of an image, and its objects; none: the phrase is absent, a negative.

  Attributes:
    phrase: what is asked.
    boxes: float32 [N, 4], (x1, y1, x2, y2) in pixels of the image.
    masks: N entries, each an RLE of the image's size (see `rle`) or None where only the box is known.
    exhaustive: every object of the phrase is listed.
    all_of_kind: the objects are all of their kind in the image, so an example box alone asks for them, too.
      False for phrases of single annotations ("the man on the left").
    image_id, category_id: the ids under which results are reported in COCO's format.
  """

  phrase: str
  boxes: np.ndarray
  masks: tuple[Rle | None, ...] = ()
  exhaustive: bool = True
  all_of_kind: bool = True
  image_id: int = 0
  category_id: int = 1

  def __post_init__(self):
    boxes = np.asarray(self.boxes, np.float32).reshape(-1, 4)
    masks = tuple(self.masks) or (None,) * len(boxes)
    if len(masks) != len(boxes):
      raise ValueError(f"masks must be one a box, got {len(masks)} masks for {len(boxes)} boxes")
    object.__setattr__(self, "boxes", boxes)
    object.__setattr__(self, "masks", masks)

  @classmethod
  def from_masks(cls, phrase: str, masks: np.ndarray, **options: Any) -> Prompt:
    """From masks, bool [N, H, W], none of them empty; boxes are those around them."""
    rles = tuple(rle_ops.encode(mask) for mask in masks)
    if not all(map(rle_ops.area, rles)):
      raise ValueError(f"masks: one of the {len(rles)} masks of {phrase!r} is empty")
    return cls(phrase, np.array([rle_ops.bounds(r) for r in rles]), rles, **options)


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
  """An image and what is asked of it.

  Attributes:
    id: names the record in batches and messages.
    image: a path, an array uint8 [H, W, 3], or a function without arguments that returns one.
    size: (height, width) in pixels, the frame of the boxes and masks.
    prompts: positives and negatives.
    source: the file and the entry it came from, for messages.
  """

  id: int
  image: str | os.PathLike | np.ndarray | Callable[[], np.ndarray]
  size: tuple[int, int]
  prompts: tuple[Prompt, ...]
  source: str = ""

  def __str__(self) -> str:
    return self.source or f"record {self.id}"

  def load_image(self) -> np.ndarray:
    """uint8 [H, W, 3] of `size`.

    A file is turned upright as its EXIF entry says, except where only the pixels as stored have `size`.

    Raises:
      RecordError: "image missing", "image damaged" or "image size".
    """
    try:
      image = image_ops.load_image(self.image() if callable(self.image) else self.image)
      if image.shape[:2] != tuple(self.size) == image.shape[1::-1] and isinstance(
        self.image, (str, os.PathLike)
      ):
        from PIL import Image

        with Image.open(self.image) as stored:
          if stored.size == tuple(self.size)[::-1]:
            image = image_ops.load_image(stored)
    except FileNotFoundError as e:
      raise RecordError("image missing", f"{self}: no such image {os.fspath(self.image)!r}") from e
    except (OSError, ValueError) as e:
      raise RecordError("image damaged", f"{self}: {e}") from e
    if image.shape[:2] != tuple(self.size):
      raise RecordError(
        "image size",
        f"{self}: the image is {image.shape[1]}x{image.shape[0]} pixels, its annotations are for "
        f"{self.size[1]}x{self.size[0]}",
      )
    return image


def read_annotations(annotations: str | os.PathLike | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
  """An annotation file (or what it holds) and its name for messages, checked as far as every format goes.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not JSON, or without lists of images and annotations.
  """
  if isinstance(annotations, Mapping):
    data, name = annotations, "annotations"
  else:
    name = os.fspath(annotations)
    with open(name, encoding="utf-8") as f:
      try:
        data = json.load(f)
      except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{name} is not valid JSON: {e}") from e
  check_dataset(data, name)
  return data, name


def read_dataset(
  annotations: str | os.PathLike | Mapping[str, Any], images: str | os.PathLike
) -> tuple[Mapping[str, Any], str]:
  """As `read_annotations`, and FileNotFoundError where there is no folder `images`."""
  data, name = read_annotations(annotations)
  if not os.path.isdir(images):
    raise FileNotFoundError(2, "No such folder of images", os.fspath(images))
  return data, name


def check_dataset(data: Any, name: str) -> None:
  """ValueError unless `data` has the lists "images" and "annotations" of objects, images with an id each."""
  if not isinstance(data, Mapping):
    raise ValueError(f"{name} must hold an object with images and annotations, got {type(data).__name__}")
  for key in ("images", "annotations"):
    if not isinstance(data.get(key), list):
      raise ValueError(f"{name} has no list {key!r}; it has: {', '.join(map(repr, data)) or 'nothing'}")
    for i, entry in enumerate(data[key]):
      if not isinstance(entry, Mapping):
        raise ValueError(f"{name}: entry {i} of {key!r} must be an object, got {type(entry).__name__}")
  seen: set[int] = set()
  for i, entry in enumerate(data["images"]):
    given = entry.get("id")
    if not isinstance(given, int) or isinstance(given, bool) or given in seen:
      what = "an id of another image" if given in seen else f"no whole-number id ({given!r})"
      raise ValueError(f"{name}: image {i} has {what}")
    seen.add(given)
  if not data["images"]:
    raise ValueError(f"{name} lists no images")


def image_entry(entry: Mapping[str, Any], name: str) -> tuple[str, tuple[int, int]]:
  """(file name, (height, width)) of an entry of "images"; ValueError naming what lacks."""
  file_name = entry.get("file_name")
  if not isinstance(file_name, str) or not file_name:
    raise ValueError(f"{name}: image {entry['id']} has no file_name")
  size = entry.get("height"), entry.get("width")
  if not all(isinstance(s, (int, float)) and s >= 1 and s == int(s) for s in size):
    raise ValueError(f"{name}: image {entry['id']} has no height and width in pixels, got {size}")
  return file_name, (int(size[0]), int(size[1]))


def annotations_by_image(data: Mapping[str, Any], name: str) -> dict[int, list[Mapping[str, Any]]]:
  """The annotations under their image's id, in file order; ValueError for one of an unlisted image."""
  grouped: dict[int, list[Mapping[str, Any]]] = {entry["id"]: [] for entry in data["images"]}
  for i, annotation in enumerate(data["annotations"]):
    image_id = annotation.get("image_id")
    if not isinstance(image_id, int) or image_id not in grouped:
      raise ValueError(
        f"{name}: annotation {annotation.get('id', f'number {i}')} is of image {image_id!r}, "
        "which 'images' does not list"
      )
    grouped[image_id].append(annotation)
  return grouped


def is_crowd(annotation: Mapping[str, Any]) -> bool:
  """Whether the annotation covers several objects at once."""
  return bool(annotation.get("iscrowd") or annotation.get("is_crowd"))


def objects_of(
  annotations: Sequence[Mapping[str, Any]], size: tuple[int, int], source: str, normalised: bool = False
) -> tuple[np.ndarray, tuple[Rle | None, ...]]:
  """Annotations to boxes float32 [N, 4] (x1, y1, x2, y2) in pixels, and masks.

  A box is the one around the mask where there is a mask, else the annotation's `bbox` (x, y, width, height),
  in pixels or, if `normalised`, in units of the image's sides; clipped to the image.

  Raises:
    RecordError: "annotation damaged", naming the annotation.
  """
  boxes, masks = [], []
  for annotation in annotations:
    try:
      segmentation = annotation.get("segmentation")
      mask = rle_ops.from_segmentation(segmentation, size) if segmentation else None
      boxes.append(_box(annotation.get("bbox"), size, normalised) if mask is None else rle_ops.bounds(mask))
      masks.append(mask)
    except ValueError as e:
      name = f"{source}, annotation {annotation.get('id', '?')}"
      raise RecordError("annotation damaged", f"{name}: {e}") from e
  return np.array(boxes, np.float32).reshape(-1, 4), tuple(masks)


def _box(bbox: Any, size: tuple[int, int], normalised: bool) -> np.ndarray:
  try:
    values = np.asarray(bbox, np.float64)
  except (TypeError, ValueError):
    values = np.zeros(0)
  if values.shape != (4,) or not np.isfinite(values).all():
    raise ValueError(f"it has no mask, and its bbox must be [x, y, width, height], got {bbox!r}")
  limits = np.array([size[1], size[0]] * 2, np.float64)
  if normalised:
    values = values * limits
  box = np.clip(np.concatenate([values[:2], values[:2] + values[2:]]), 0, limits)
  if not (box[2:] > box[:2]).all():
    raise ValueError(f"its bbox {bbox!r} has no area within the image of {size[1]}x{size[0]} pixels")
  return box
