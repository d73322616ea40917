"""Sam3TrackerProcessor: images, points and boxes to the tracker's arrays, and its masks to the images' size.

Arguments and conventions are those of transformers 5.23.0 (`processing_sam3_tracker.py`). Axes: B images, P
objects of all images, N points, C masks of an object, S side of the model's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sam3lt_jax.config import NOT_A_POINT, PADDING_LABEL, TrackerConfig
from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.processing import postprocess
from sam3lt_jax.processing.arrays import to_numpy
from sam3lt_jax.processing.clicks import ClickArrays, clicks_of
from sam3lt_jax.processing.masks import clean
from sam3lt_jax.processing.processor import ProcessorOutput, preprocess_all

_NAMES = ("input_points", "input_labels", "input_boxes", "input_masks")
_LABELS = (0, 1, NOT_A_POINT, PADDING_LABEL)


class Sam3TrackerProcessor:
  """Prepares prompts for `Sam3Tracker` and reads its masks, with transformers' arguments.

  Differences from transformers 5.23.0: `pixel_values` are channels-last; prompts come back as one set of
  rows, an object each, so that images may have different numbers of objects and objects different numbers of
  points without padding that is attended; holes and specks are cleaned without a CUDA package; a point beyond
  its image is an error.
  """

  def __init__(self, config: TrackerConfig | None = None, image_size: int = 1008):
    """config: of the tracker; image_size: S, a multiple of its patch size."""
    self.config = config or TrackerConfig()
    patch = self.config.patch_size
    if (
      isinstance(image_size, bool)
      or not isinstance(image_size, int)
      or image_size < 2 * patch
      or image_size % patch
    ):
      raise ArgumentError(
        "image_size", f" must be a multiple of {patch}, at least {2 * patch}, got {image_size!r}"
      )
    self.image_size = image_size

  def __call__(
    self,
    images: Any = None,
    segmentation_maps: Any = None,
    input_points: Any = None,
    input_labels: Any = None,
    input_boxes: Any = None,
    input_masks: Any = None,
    original_sizes: Any = None,
  ) -> ProcessorOutput:
    """Args (all optional):
      images: one image or a list of B (what `images.load_image` takes), or an array [B, H, W, 3].
      segmentation_maps: not supported.
      input_points: `[image][object][point][x, y]` in pixels of the image.
      input_labels: `[image][object][point]`, 1 on the object, 0 off it, -1 no point, -10 padding. Default: 1.
      input_boxes: `[image][object][x1, y1, x2, y2]` in pixels: the outline of each object.
      input_masks: `[image][object]` logits of the model's mask size, or bool masks of the image's.
      original_sizes: (height, width) an image, in place of images.

    Returns:
      A dictionary with attribute access: pixel_values float32 [B, S, S, 3] in [-1, 1], original_sizes int64
      [B, 2], and, where there are prompts, clicks: `ClickArrays` of P objects, image by image, with
      image_index.

    Raises:
      ValueError: naming the argument, what was received and what is accepted.
    """
    if segmentation_maps is not None:
      raise ValueError("segmentation_maps is not supported: this processor prepares images and prompts only")
    given = dict(zip(_NAMES, (input_points, input_labels, input_boxes, input_masks)))
    if images is None and original_sizes is None:
      raise ValueError("give images, or original_sizes with prompts")
    out = ProcessorOutput()
    if images is not None:
      out["pixel_values"], sizes = preprocess_all(images, self.image_size)
    else:
      sizes = postprocess.check_sizes("original_sizes", original_sizes)
    out["original_sizes"] = np.asarray(sizes, np.int64).reshape(-1, 2)
    if any(value is not None for value in given.values()):
      out["clicks"] = self._clicks(given, sizes)
    return out

  def _clicks(self, given: dict[str, Any], sizes: list[tuple[int, int]]) -> ClickArrays:
    for name, value in given.items():
      if value is not None and len(value) != len(sizes):
        raise ArgumentError(name, f" must have one entry an image: {len(sizes)} expected, got {len(value)}")
    side = 4 * (self.image_size // self.config.patch_size)
    rows = []
    for i, size in enumerate(sizes):
      own = [None if value is None else value[i] for value in given.values()]
      if any(value is not None for value in own):
        names = tuple(f"{name}[{i}]" for name in _NAMES)
        rows.append((i, clicks_of(size, side, *own, names=names, accepted=_LABELS)))
    if not rows:
      raise ValueError("every image's prompts are None: leave them out, or give one")
    return _joined(rows, side)

  def post_process_masks(
    self,
    masks: Sequence[Any] | np.ndarray,
    original_sizes: Any,
    mask_threshold: float = 0.0,
    binarize: bool = True,
    max_hole_area: float = 0.0,
    max_sprinkle_area: float = 0.0,
    apply_non_overlapping_constraints: bool = False,
  ) -> list[np.ndarray]:
    """The model's masks in the size of their images.

    Args:
      masks: logits, one entry an original size: `pred_masks` [P, C, h, w] with the size of each row's image,
        or a list of [P, C, h, w], one an image.
      original_sizes: (height, width), one an entry of `masks`.
      mask_threshold: logit above which a pixel is on the mask.
      binarize: bool masks; False: float32 logits.
      max_hole_area, max_sprinkle_area: cells of the model's masks; what is not larger is filled or taken out.
      apply_non_overlapping_constraints: a pixel belongs to the object with the highest logit alone; the first
        axis of an entry is then the objects.

    Returns:
      One array an entry, [..., H, W].

    Raises:
      ValueError: counts that do not match.
    """
    sizes = postprocess.check_sizes("original_sizes", original_sizes, len(masks))
    out = []
    for mask, size in zip(masks, sizes):
      mask = to_numpy(mask, "masks").astype(np.float32, copy=False)
      cleaned = [
        clean(m, int(max_hole_area), int(max_sprinkle_area), mask_threshold)
        for m in mask.reshape(-1, *mask.shape[-2:])
      ]
      large = postprocess.resize_masks(np.stack(cleaned).reshape(mask.shape), size)
      if apply_non_overlapping_constraints and len(large) > 1:
        best = large.argmax(axis=0) == np.arange(len(large)).reshape(-1, *[1] * (large.ndim - 1))
        large = np.where(best, large, np.minimum(large, -10.0))
      out.append(large > mask_threshold if binarize else large)
    return out


def _joined(rows: list[tuple[int, ClickArrays]], side: int) -> ClickArrays:
  """Clicks of several images as one."""
  slots = max(clicks.valid.shape[1] for _, clicks in rows)
  parts = []
  for i, clicks in rows:
    P, N = clicks.valid.shape
    masks = np.zeros((P, side, side), np.float32) if clicks.masks is None else clicks.masks
    padded = [np.pad(x, ((0, 0), (0, slots - N), (0, 0))[: x.ndim]) for x in clicks[:3]]
    parts.append((*padded, masks, np.full(P, clicks.masks is not None), np.full(P, i, np.int32)))
  joined = ClickArrays(*map(np.concatenate, zip(*parts)))
  return joined if joined.has_mask.any() else joined._replace(masks=None, has_mask=None)
