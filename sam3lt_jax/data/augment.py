"""Augmentation that keeps boxes and masks true: flip, zoom and crop, colour.

An `Augmentation` is drawn once for an image and then applied to its pixels, its masks and its boxes, one at a
time, so that they cannot disagree. Everything is numpy on whole pixels: nothing is resampled here, the
model's preparation squares and resizes the result once.

Hue is left alone: a red car turned green would make its phrase untrue.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from sam3lt_jax.errors import check
from sam3lt_jax.processing.masks import mask_bounds

FILL = 127  # of what a zoomed-out window shows beside the image; near 0 after normalisation
_SIDED = re.compile(r"\b(?:left|right)(?:most|wards?|hand|handed)?\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
  """How much to change.

  Attributes:
    flip: probability of a left-right flip. Images with a phrase that says left or right are never flipped.
    scale: (low, high) zoom, drawn evenly on a logarithmic scale: 2 shows half of each side, 0.5 puts the
      image on a grey field of twice its sides.
    aspect: the window's sides are stretched against each other by up to this factor, at least 1.
    brightness, contrast, saturation: each factor is drawn from 1 +- this.
    min_area: an object that the window cuts is dropped if fewer pixels of it are left.
    min_visible: the same, if less than this share of it is left.
  """

  flip: float = 0.5
  scale: tuple[float, float] = (0.7, 2.0)
  aspect: float = 1.2
  brightness: float = 0.2
  contrast: float = 0.2
  saturation: float = 0.2
  min_area: int = 16
  min_visible: float = 0.1

  def __post_init__(self):
    check(0 <= self.flip <= 1, "flip", self.flip, "a probability")
    good = len(self.scale) == 2 and 0.1 <= self.scale[0] <= self.scale[1] <= 10
    check(good, "scale", self.scale, "(low, high) within 0.1 and 10")
    check(1 <= self.aspect <= 4, "aspect", self.aspect, "1 to 4")
    for name in ("brightness", "contrast", "saturation"):
      check(0 <= getattr(self, name) < 1, name, getattr(self, name), "a share in [0, 1)")
    check(self.min_area >= 1, "min_area", self.min_area, "1 or more pixels")
    check(0 <= self.min_visible <= 1, "min_visible", self.min_visible, "a share in [0, 1]")


NO_AUGMENTATION = AugmentConfig(
  flip=0.0, scale=(1.0, 1.0), aspect=1.0, brightness=0.0, contrast=0.0, saturation=0.0
)


class Seen(NamedTuple):
  """What is left of an object: "whole" or "cut" with its box and mask, "sliver" (dropped, but something of it
  still shows) or "gone"."""

  state: Literal["whole", "cut", "sliver", "gone"]
  box: np.ndarray | None = None
  mask: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """One draw. The flip comes first, then the window, then the colours.

  Attributes:
    size: (height, width) of the image it is for.
    flip: left and right are exchanged.
    window: (x1, y1, x2, y2) in whole pixels; may reach over the image.
    brightness, contrast, saturation: factors, 1 changes nothing.
  """

  size: tuple[int, int]
  flip: bool
  window: tuple[int, int, int, int]
  brightness: float = 1.0
  contrast: float = 1.0
  saturation: float = 1.0

  @property
  def out_size(self) -> tuple[int, int]:
    """(height, width) of the result."""
    x1, y1, x2, y2 = self.window
    return y2 - y1, x2 - x1

  def image(self, image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of `size` to uint8 [*out_size, 3]."""
    return self._recolour(self._cut(image, FILL))

  def mask(self, mask: np.ndarray) -> np.ndarray:
    """bool [H, W] of `size` to bool [*out_size]."""
    return self._cut(mask, False)

  def boxes(self, boxes: np.ndarray) -> np.ndarray:
    """float [N, 4] (x1, y1, x2, y2) in pixels, moved and clipped to the window; float32 [N, 4]."""
    x1, y1, x2, y2 = np.moveaxis(np.asarray(boxes, np.float64).reshape(-1, 4), -1, 0)
    if self.flip:
      x1, x2 = self.size[1] - x2, self.size[1] - x1
    left, top = self.window[:2]
    height, width = self.out_size
    moved = np.stack([x1 - left, y1 - top, x2 - left, y2 - top], axis=-1)
    return np.clip(moved, 0, [width, height, width, height]).astype(np.float32)

  def object(self, box: np.ndarray, mask: np.ndarray | None, config: AugmentConfig) -> Seen:
    """An object as the window shows it.

    Args:
      box: float [4], (x1, y1, x2, y2) in pixels. Not looked at where there is a mask.
      mask: bool [H, W] of `size`, or None.
      config: says what is too little.

    Returns:
      `Seen`; the box is float32 [4], with a mask the one around it.
    """
    if mask is None:
      moved = self.boxes(box)[0]
      before, after = _box_area(np.asarray(box, np.float64)), _box_area(moved)
      whole = after >= before * (1 - 1e-6)
    else:
      shown = self.mask(mask)
      before, after = np.count_nonzero(mask), np.count_nonzero(shown)
      whole = after == before
      moved = mask_bounds(shown)
    if after <= 0:
      return Seen("gone")
    if not whole and (after < config.min_area or after < config.min_visible * before):
      return Seen("sliver")
    return Seen("whole" if whole else "cut", moved, None if mask is None else shown)

  def _cut(self, array: np.ndarray, fill: int) -> np.ndarray:
    if array.shape[:2] != self.size:
      raise ValueError(f"this augmentation is for (height, width) {self.size}, got {array.shape[:2]}")
    if self.flip:
      array = array[:, ::-1]
    (height, width), (x1, y1, x2, y2) = self.size, self.window
    inside = array[max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0)]
    if x1 >= 0 and y1 >= 0 and x2 <= width and y2 <= height:
      return np.ascontiguousarray(inside)
    out = np.full((*self.out_size, *array.shape[2:]), fill, array.dtype)
    top, left = max(-y1, 0), max(-x1, 0)
    out[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return out

  def _recolour(self, image: np.ndarray) -> np.ndarray:
    if self.brightness == self.contrast == self.saturation == 1:
      return image
    values = image.astype(np.float32) * self.brightness
    mean = values.mean(dtype=np.float64)
    values = (values - mean) * self.contrast + mean
    grey = values @ np.array([0.299, 0.587, 0.114], np.float32)
    values = (values - grey[..., None]) * self.saturation + grey[..., None]
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def draw(
  config: AugmentConfig, size: tuple[int, int], phrases: Iterable[str], rng: np.random.Generator
) -> Augmentation:
  """Draws an augmentation.

  Args:
    config: how much to change.
    size: (height, width) of the image in pixels.
    phrases: what is asked of the image; one that names a side forbids the flip.
    rng: takes the same number of draws whatever the outcome.
  """
  flip = bool(rng.random() < config.flip) and not any(map(names_a_side, phrases))
  zoom = np.exp(rng.uniform(*np.log(config.scale)))
  stretch = np.exp(rng.uniform(-0.5, 0.5) * np.log(config.aspect))
  place = rng.random(2)
  height, width = size
  sides = np.array([width / zoom * stretch, height / zoom / stretch])
  sides = np.maximum(np.rint(sides), 1).astype(int)
  # Where the window is smaller than the image it lies within it, where it is larger it holds all of it.
  x1, y1 = np.rint(place * (np.array([width, height]) - sides)).astype(int)
  colours = [
    1 + float(rng.uniform(-1, 1)) * amount
    for amount in (config.brightness, config.contrast, config.saturation)
  ]
  return Augmentation(size, flip, (int(x1), int(y1), int(x1 + sides[0]), int(y1 + sides[1])), *colours)


def names_a_side(phrase: str) -> bool:
  """Whether a phrase says left or right, so that a flipped image would make it untrue."""
  return _SIDED.search(phrase) is not None


def _box_area(box: np.ndarray) -> float:
  return float(max(box[2] - box[0], 0) * max(box[3] - box[1], 0))
