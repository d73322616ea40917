"""What is found in a frame of a video, and the line of JSON that it is kept as.

Axes: N objects, H, W the video.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3lt_jax.data import rle
from sam3lt_jax.processing.results import Results, hold_masks

if TYPE_CHECKING:
  from PIL import Image


@dataclasses.dataclass(frozen=True, eq=False)
class FrameResults:
  """The objects seen in one frame.

  Attributes:
    index: the frame's number, from 0 on. time: seconds since the first frame.
    image: uint8 [H, W, 3], the frame itself.
    make: makes `results`, when they are first asked for, in any thread.
    removed: ids of objects that were put out in earlier frames and turned out to be none (with a latency
      below 14 alone), or that the user removed.
  """

  index: int
  time: float
  image: np.ndarray
  make: Callable[[], Results]
  removed: tuple[int, ...] = ()

  @functools.cached_property
  def results(self) -> Results:
    """`Results` with `ids`, in their order. An object keeps its id for the whole clip."""
    return self.make()

  @property
  def ids(self) -> np.ndarray:
    """int64 [N]."""
    return self.results.ids

  @property
  def masks(self) -> np.ndarray:
    """bool [N, H, W]."""
    return self.results.masks

  @property
  def boxes(self) -> np.ndarray:
    """float32 [N, 4], (x1, y1, x2, y2) in pixels."""
    return self.results.boxes

  @property
  def scores(self) -> np.ndarray:
    """float32 [N], 0 to 1."""
    return self.results.scores

  @property
  def labels(self) -> tuple[str, ...]:
    """The phrase of each object."""
    return self.results.labels

  def __len__(self) -> int:
    return len(self.results)

  def render(self, image: Any = None, **options: Any) -> Image.Image:
    """The frame with its objects drawn on it, an object in the same colour throughout.

    image: to draw on; default: the frame itself. options: of `sam3lt_jax.processing.render.render`.
    """
    return self.results.render(self.image if image is None else image, **options)


def to_record(frame: FrameResults, categories: Mapping[str, int]) -> dict[str, Any]:
  """A frame in plain values: its number, time and annotations, which are YouTube-VIS' of one frame.

  categories: phrase -> category id.
  """
  keys = ("category_id", "score", "bbox", "area", "segmentation")
  annotations = [
    {"id": one["track_id"]} | {key: one[key] for key in keys}
    for one in frame.results.to_coco(category_ids=categories)
  ]
  record = {"frame": frame.index, "time": frame.time, "annotations": annotations}
  return record | ({"removed": list(frame.removed)} if frame.removed else {})


def from_record(record: Mapping[str, Any], size: tuple[int, int], phrases: Sequence[str]) -> Results:
  """The results that `to_record` was given; phrases: by category id, from 1 on."""
  found = record["annotations"]
  boxes = np.array([one["bbox"] for one in found], np.float32).reshape(-1, 4)
  boxes[:, 2:] += boxes[:, :2]
  return Results(
    boxes,
    np.array([one["score"] for one in found], np.float32),
    hold_masks((rle.decode(one["segmentation"]) for one in found), len(found), size),
    tuple(phrases[one["category_id"] - 1] for one in found),
    size,
    ids=np.array([one["id"] for one in found], np.int64),
  )
