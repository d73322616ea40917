"""Pointing at things: clicks about an encoded image to masks, in segment-anything's words and ours.

Axes: P objects, C masks of an object, H, W the image, h, w the model's masks (288 x 288 at 1008 px).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from sam3lt_jax.engine import Engine
from sam3lt_jax.features import VisionFeatures
from sam3lt_jax.processing import postprocess
from sam3lt_jax.processing.arrays import to_numpy
from sam3lt_jax.processing.clicks import ClickArrays, clicks_of
from sam3lt_jax.processing.masks import clean, mask_box
from sam3lt_jax.processing.results import Results, hold_masks

if TYPE_CHECKING:
  from sam3lt_jax.predictor import Predictor


class Answer(NamedTuple):
  """What the tracker answered, on the host.

  Attributes:
    logits: float32 [P, C, h, w], as the model gave them.
    ious: float32 [P, C], the IoU with the true mask that the model expects.
    object_score_logits: float32 [P], above 0 where the object is there.
  """

  logits: np.ndarray
  ious: np.ndarray
  object_score_logits: np.ndarray


def answer(engine: Engine, vision: VisionFeatures, clicks: ClickArrays, multimask: bool | None) -> Answer:
  """Asks the tracker.

  Args:
    vision: of `Engine.encode`; its first image is meant.
    clicks: one row an object.
    multimask: True: all of the masks that one click may mean. False: the one that the model gives for a
      prompt that says enough. None: the best of the former where there is at most one point and no box, else
      the latter; one mask either way. Source: SAM 2's rule for when several masks help.
  """
  parts, start = [], 0
  for count, found in engine.click(vision, clicks):
    ious, scores, single = (
      np.asarray(x[0, :count]) for x in (found.ious, found.object_score_logits, found.single)
    )
    chosen = np.tile(np.arange(1, ious.shape[1]), (count, 1))
    if multimask is None:
      ambiguous = clicks.valid[start : start + count].sum(axis=1) <= 1
      best = 1 + ious[:, 1:].argmax(axis=1)
      chosen = np.where(ambiguous, best, single)[:, None]
    elif not multimask:
      chosen = single[:, None]
    logits = jax.device_get(found.masks[0, np.arange(count)[:, None], chosen])
    parts.append((logits, np.take_along_axis(ious, chosen, axis=1), scores))
    start += count
  return Answer(*map(np.concatenate, zip(*parts)))


def results(engine: Engine, found: Answer, size: tuple[int, int], mask_threshold: float) -> Results:
  """Of an answer with one mask an object."""
  profile, P = engine.tracker.config.profile, len(found.ious)
  boxes = np.empty((P, 4), np.float32)

  def masks() -> Iterator[np.ndarray]:
    for box, (logits,) in zip(boxes, found.logits):
      cleaned = clean(logits, profile.hole_area)
      mask = postprocess.binary_mask(cleaned, size, mask_threshold, "upsample_then_sigmoid")
      box[:] = mask_box(mask)
      yield mask

  held = hold_masks(masks(), P, size)
  labels = ("object",) if P == 1 else tuple(f"object {p + 1}" for p in range(P))
  logits = limited(found.logits[:, 0], profile.logit_limit)
  return Results(boxes, found.ious[:, 0], held, labels, size, logits)


def limited(logits: np.ndarray, limit: float | None) -> np.ndarray:
  return logits if limit is None else np.clip(logits, -limit, limit)


class SamPredictor:
  """segment-anything's predictor, for programs written for it: change the import.

      predictor = SamPredictor.from_pretrained("s0", tracker="facebook/sam3")
      predictor.set_image(image)
      masks, scores, low_res = predictor.predict(np.array([[500, 375]]), np.array([1]))

  Arguments and results are those of segment-anything's (and SAM 2's image) predictor, with its shapes; boxes
  are outlines of one object.
  """

  def __init__(self, predictor: Predictor):
    """predictor: with a tracker, see `Predictor.from_pretrained`."""
    predictor.need_tracker()
    self.predictor = predictor

  @classmethod
  def from_pretrained(cls, source: str | os.PathLike, tracker: Any, **options: Any) -> SamPredictor:
    """Arguments as in `Predictor.from_pretrained`."""
    from sam3lt_jax.predictor import Predictor

    return cls(Predictor.from_pretrained(source, tracker=tracker, **options))

  def set_image(self, image: Any, image_format: str = "RGB") -> None:
    """Encodes an image: path, PIL image or array [H, W, 3].

    image_format: "RGB", or "BGR" for an array as OpenCV reads it.
    """
    if image_format not in ("RGB", "BGR"):
      raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
    self.predictor.set_image(to_numpy(image, "image")[..., ::-1] if image_format == "BGR" else image)

  def reset_image(self) -> None:
    """Forgets the image."""
    self.predictor.reset_image()

  def predict(
    self,
    point_coords: Any = None,
    point_labels: Any = None,
    box: Any = None,
    mask_input: Any = None,
    multimask_output: bool = True,
    return_logits: bool = False,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of one object, or of P in one go.

    Args:
      point_coords: [N, 2] or [P, N, 2], (x, y) in pixels. point_labels: [N] or [P, N], 1 or 0; None: all 1.
      box: [4] or [P, 4], (x1, y1, x2, y2) in pixels.
      mask_input: logits [1, h, w] of an earlier answer, or [P, h, w].
      multimask_output: three masks, for what one click may mean; False: one.
      return_logits: masks as float32 logits instead of bool.

    Returns:
      masks [C, H, W], scores [C] and low-resolution logits [C, h, w] for `mask_input`; with a leading [P] for
      P > 1 objects, or where arguments had that axis.

    Raises:
      ValueError: no image was set, or naming the argument.
    """
    vision, size, _ = self.predictor.encoded()
    if mask_input is not None and np.ndim(mask_input) == 4:
      mask_input = to_numpy(mask_input, "mask_input")[:, 0]
    names = ("point_coords", "point_labels", "box", "mask_input")
    clicks = clicks_of(
      size, vision.tracker.mask_side, point_coords, point_labels, box, mask_input, names=names
    )
    engine = self.predictor.engine
    found = answer(engine, vision, clicks, multimask_output)
    profile = engine.tracker.config.profile
    cleaned = np.stack([[clean(m, profile.hole_area) for m in of_one] for of_one in found.logits])
    masks = postprocess.resize_masks(cleaned, size)
    masks = masks if return_logits else masks > 0
    out = masks, found.ious, limited(found.logits, profile.logit_limit)
    several = np.ndim(point_coords) == 3 or np.ndim(box) == 2 or len(found.ious) > 1
    return out if several else tuple(x[0] for x in out)
