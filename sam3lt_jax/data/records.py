"""What a data set is here: a sequence of records, each an image and the phrases asked of it.

`coco.load_coco` and `saco.load_saco` read files into such sequences; anything else that yields `Record`s (a
generator of drawn scenes, say) can be trained on and evaluated in the same way.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
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
      image = image_ops.load_image(self.image() if callable(self.image) else self.image, self.size)
    except FileNotFoundError as e:
      raise RecordError("image missing", f"{self}: no such image {os.fspath(self.image)!r}") from e
    except (OSError, ValueError, MemoryError) as e:
      raise RecordError("image damaged", f"{self}: {e}") from e
    if image.shape[:2] != tuple(self.size):
      raise RecordError(
        "image size",
        f"{self}: the image is {image.shape[1]}x{image.shape[0]} pixels, its annotations are for "
        f"{self.size[1]}x{self.size[0]}",
      )
    return image
