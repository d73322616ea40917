"""Everything in an image: masks of a grid of points, the good ones, each thing once.

Source: segment-anything's `SamAutomaticMaskGenerator`, its defaults and its records. Two things differ, both
so that masks need not be enlarged before it is known which stay: stability and the boxes that are compared
are those of the mask as the model gives it (288 x 288 at 1008 px). Axes: K masks, h, w of the model's masks.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.data import rle
from sam3lt_jax.errors import ArgumentError, check_whole
from sam3lt_jax.ops.nms import box_nms
from sam3lt_jax.processing import images as image_ops
from sam3lt_jax.processing.clicks import clicks_of
from sam3lt_jax.processing.masks import largest_part, mask_box, small_parts

if TYPE_CHECKING:
  from sam3lt_jax.predictor import Predictor

Record = dict[str, Any]
_NEAR_EDGE = 20  # pixels; a mask that ends so near to the border of its crop is one that was cut
_nms = jax.jit(box_nms)


@dataclasses.dataclass(frozen=True)
class Options:
  """What `generate_masks` takes; names and defaults are segment-anything's.

  Attributes:
    points_per_side: of the grid laid over the image.
    points_per_batch: that are asked at once, at most; what runs together is the engine's choice.
    pred_iou_thresh: masks whose expected IoU is not above are left out, 0 to 1.
    stability_score_thresh: the same for `stability_score`, 0 to 1.
    stability_score_offset: what the logits' threshold is moved by to see how stable a mask is.
    box_nms_thresh: of masks whose boxes overlap by more (IoU), the one with the best expected IoU stays.
    crop_n_layers: layers of crops that are looked at beside the whole: 2 x 2, 4 x 4, ...
    crop_nms_thresh: like `box_nms_thresh`, between crops; what was found in the smaller crop stays.
    crop_overlap_ratio: how much the first layer's crops overlap, as a share of the image's shorter side.
    crop_n_points_downscale_factor: the grid of layer n has fewer points a side by this factor to the n.
    min_mask_region_area: holes and islands of fewer pixels are taken out; 0: none.
    output_mode: `segmentation` as "binary_mask", bool [H, W] of each, or as "coco_rle".
  """

  points_per_side: int = 32
  points_per_batch: int = 64
  pred_iou_thresh: float = 0.88
  stability_score_thresh: float = 0.95
  stability_score_offset: float = 1.0
  box_nms_thresh: float = 0.7
  crop_n_layers: int = 0
  crop_nms_thresh: float = 0.7
  crop_overlap_ratio: float = 512 / 1500
  crop_n_points_downscale_factor: int = 1
  min_mask_region_area: int = 0
  output_mode: Literal["binary_mask", "coco_rle"] = "binary_mask"

  def __post_init__(self):
    for name, least in (
      ("points_per_side", 1), ("points_per_batch", 1), ("crop_n_layers", 0), ("min_mask_region_area", 0),
      ("crop_n_points_downscale_factor", 1),
    ):  # fmt: skip
      check_whole(name, getattr(self, name), least)
    for name in (
      "pred_iou_thresh", "stability_score_thresh", "box_nms_thresh", "crop_nms_thresh", "crop_overlap_ratio",
    ):  # fmt: skip
      value = getattr(self, name)
      if not isinstance(value, (int, float, np.number)) or not 0 <= value <= 1:
        raise ArgumentError(name, f" must be between 0 and 1, got {value!r}")
    if not isinstance(self.stability_score_offset, (int, float)) or not self.stability_score_offset >= 0:
      raise ArgumentError(
        "stability_score_offset", f" must be at least 0, got {self.stability_score_offset!r}"
      )
    if self.output_mode not in ("binary_mask", "coco_rle"):
      raise ArgumentError("output_mode", f" must be 'binary_mask' or 'coco_rle', got {self.output_mode!r}")


@dataclasses.dataclass
class _Found:
  """Candidates of one crop: [K], points [K, 2] and boxes [K, 4] in pixels of the image, logits [K, h, w] on a
  device.
  """

  ious: np.ndarray
  stability: np.ndarray
  points: np.ndarray
  boxes: np.ndarray
  logits: jax.Array
  crop: tuple[int, int, int, int]

  def __getitem__(self, index: np.ndarray) -> _Found:
    return _Found(
      self.ious[index], self.stability[index], self.points[index], self.boxes[index], self.logits[index],
      self.crop,
    )  # fmt: skip


def _of_crop(
  predictor: Predictor, pixels: np.ndarray, crop: tuple[int, int, int, int], layer: int, options: Options
) -> _Found:
  """What stays of one crop (x1, y1, x2, y2) of the image."""
  engine, (x1, y1, x2, y2) = predictor.engine, crop
  part = pixels[y1:y2, x1:x2]
  vision = engine.encode([image_ops.resize_image(part, predictor.processor.image_size)])
  size = part.shape[:2]
  per_side = int(options.points_per_side / options.crop_n_points_downscale_factor**layer)
  points = _grid(max(per_side, 1)) * (size[1], size[0])
  ious, stability, boxes, logits, where = [], [], [], [], []
  for start in range(0, len(points), options.points_per_batch):
    some = points[start : start + options.points_per_batch]
    clicks = clicks_of(size, vision.tracker.mask_side, some[:, None])
    first = start
    for count, found in engine.click(vision, clicks, options.stability_score_offset):
      iou, stable = (np.asarray(x[0, :count, 1:]) for x in (found.ious, found.stability))
      good = (iou > options.pred_iou_thresh) & (stable >= options.stability_score_thresh)
      p, m = np.nonzero(good)
      chosen = found.masks[0, p, 1 + m]
      ious.append(iou[good])
      stability.append(stable[good])
      boxes.append(_boxes_of(chosen, size))
      logits.append(chosen)
      where.append(points[first + p])
      first += count
  found = _Found(
    np.concatenate(ious), np.concatenate(stability), np.concatenate(where), np.concatenate(boxes),
    jax.device_put(jnp.concatenate(logits), engine.devices[0]), crop,
  )  # fmt: skip
  offset = np.array([x1, y1], np.float32)
  found.points, found.boxes = found.points + offset, found.boxes + np.tile(offset, 2)
  found = found[np.flatnonzero(~_cut(found.boxes, crop, pixels.shape[:2]))]
  return found[np.flatnonzero(_suppress(found.boxes, found.ious, options.box_nms_thresh))]


def _boxes_of(logits: jax.Array, size: tuple[int, int]) -> np.ndarray:
  """float32 [K, 4] in pixels of an image of `size`, around what is above 0 of [K, h, w]; zeros of nothing."""
  rows, columns = (np.asarray((logits > 0).any(axis=axis)) for axis in (2, 1))
  out = np.zeros((len(rows), 4), np.float32)
  for axis, on, length in ((1, rows, size[0]), (0, columns, size[1])):
    scale = length / max(on.shape[1], 1)
    out[:, axis] = on.argmax(axis=1) * scale
    out[:, axis + 2] = (on.shape[1] - on[:, ::-1].argmax(axis=1)) * scale
  out[~rows.any(axis=1)] = 0
  return out


def _cut(boxes: np.ndarray, crop: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
  """bool [K]: which end at a border of the crop that is none of the image."""
  image = np.array([0, 0, size[1], size[0]])
  at_crop = np.abs(boxes - np.array(crop)) <= _NEAR_EDGE
  at_image = np.abs(boxes - image) <= _NEAR_EDGE
  return (at_crop & ~at_image).any(axis=1)


def _suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
  """bool [K]: which stay. Compiled for powers of two."""
  K = len(scores)
  room = max(64, 1 << max(K - 1, 0).bit_length())
  padded = np.pad(boxes, ((0, room - K), (0, 0))), np.pad(scores.astype(np.float32), (0, room - K))
  return np.asarray(_nms(*padded, np.arange(room) < K, np.float32(threshold)))[:K]


def _grid(per_side: int) -> np.ndarray:
  """[per_side ** 2, 2]: (x, y) from 0 to 1, in the middle of equal cells."""
  line = (np.arange(per_side) + 0.5) / per_side
  return np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)


def _crops(
  size: tuple[int, int], layers: int, overlap_ratio: float
) -> list[tuple[int, tuple[int, int, int, int]]]:
  """(layer, (x1, y1, x2, y2)): the whole image, then 2 x 2, 4 x 4, ... crops that overlap."""
  height, width = size
  crops = [(0, (0, 0, width, height))]
  for layer in range(1, layers + 1):
    n = 2**layer
    overlap = int(overlap_ratio * min(size) * (2 / n))
    w, h = (int(np.ceil((overlap * (n - 1) + length) / n)) for length in (width, height))
    for j in range(n):
      for i in range(n):
        x, y = int((w - overlap) * i), int((h - overlap) * j)
        crops.append((layer, (x, y, min(x + w, width), min(y + h, height))))
  return crops


def _records(predictor: Predictor, found: _Found, size: tuple[int, int], options: Options) -> list[Record]:
  """The masks that stayed, enlarged one by one; `segmentation` as options say."""
  K = len(found.ious)
  if not K:
    return []
  x1, y1, x2, y2 = found.crop
  at = np.zeros(K, int), np.zeros(K, int), np.arange(K)
  (mask_of,) = predictor.engine.click_masks.of(found.logits[None, None], at, [(y2 - y1, x2 - x1)], 0.5)
  records = []
  for k in range(K):
    mask = mask_of(k)
    if (y2 - y1, x2 - x1) != tuple(size):
      whole = np.zeros(size, bool)
      whole[y1:y2, x1:x2] = mask
      mask = whole
    record = {
      "segmentation": mask,
      "predicted_iou": float(found.ious[k]),
      "point_coords": [found.points[k].tolist()],
      "stability_score": float(found.stability[k]),
      "crop_box": [x1, y1, x2 - x1, y2 - y1],
    }
    if not options.min_mask_region_area:
      _finish(record, options.output_mode)  # at once, so that one full mask is held and not all
    records.append(record)
  return records


def _finish(record: Record, output_mode: str) -> None:
  """Adds `area` and `bbox` (x, y, width, height) and writes the mask as asked."""
  mask = record["segmentation"]
  x1, y1, x2, y2 = mask_box(mask).tolist()
  record["area"], record["bbox"] = int(np.count_nonzero(mask)), [x1, y1, x2 - x1, y2 - y1]
  if output_mode == "coco_rle":
    record["segmentation"] = rle.jsonable(rle.encode(mask))


def _without_small_regions(records: list[Record], options: Options) -> list[Record]:
  """Holes and islands taken out of every mask; of masks that became alike, one that needed it goes."""
  changed = []
  for record in records:
    mask, holes = _without_small(record["segmentation"], options.min_mask_region_area, holes=True)
    mask, islands = _without_small(mask, options.min_mask_region_area, holes=False)
    record["segmentation"] = mask
    changed.append(holes or islands)
  if not records:
    return records
  boxes = np.stack([mask_box(record["segmentation"]) for record in records])
  threshold = max(options.box_nms_thresh, options.crop_nms_thresh)
  stays = _suppress(boxes, 1 - np.array(changed, np.float32), threshold)
  return [record for record, kept in zip(records, stays) if kept]


def _without_small(mask: np.ndarray, area: int, *, holes: bool) -> tuple[np.ndarray, bool]:
  """(mask without its holes or islands of fewer than `area` pixels, whether there were any).

  Of islands the largest stays in any case.
  """
  small = small_parts(mask ^ holes, area - 1)
  if not small.any():
    return mask, False
  if not holes and np.array_equal(small, mask):
    return largest_part(mask), True
  return mask ^ small, True


class SamAutomaticMaskGenerator:
  """segment-anything's generator, for programs written for it: change the import.

  generator = SamAutomaticMaskGenerator(predictor, points_per_side=32)
  records = generator.generate(image)
  """

  def __init__(self, model: Predictor, **options: Any):
    """model: a `Predictor` with a tracker. options: see `Options`."""
    known = [field.name for field in dataclasses.fields(Options)]
    for name in options:
      if name not in known:
        raise ArgumentError(name, f" is no option of generate_masks; accepted: {', '.join(known)}")
    self._predictor, self._options = model, Options(**options)

  def generate(self, image: Any) -> list[Record]:
    """See `Predictor.generate_masks`."""
    predictor, options = self._predictor, self._options
    predictor.need_tracker()
    pixels = image_ops.load_image(image)
    found = [
      _of_crop(predictor, pixels, crop, layer, options)
      for layer, crop in _crops(pixels.shape[:2], options.crop_n_layers, options.crop_overlap_ratio)
    ]
    if len(found) > 1:
      areas = np.concatenate(
        [np.full(len(f.ious), (f.crop[2] - f.crop[0]) * (f.crop[3] - f.crop[1])) for f in found]
      )
      boxes = np.concatenate([f.boxes for f in found])
      stays = _suppress(boxes, 1 / areas, options.crop_nms_thresh)
      found = [f[own] for f, own in zip(found, np.split(stays, np.cumsum([len(f.ious) for f in found])))]
    records = [record for f in found for record in _records(predictor, f, pixels.shape[:2], options)]
    if options.min_mask_region_area:
      records = _without_small_regions(records, options)
      for record in records:
        _finish(record, options.output_mode)
    return sorted(records, key=lambda record: -record["predicted_iou"])
