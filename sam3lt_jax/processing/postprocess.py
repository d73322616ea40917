"""The model's outputs to scores, boxes in pixels and full-size masks: pure functions.

Functions without "numpy" or "jax" in their docstring work on either. Axes: P prompts, Q queries, N kept
queries, h w low-resolution mask (288 x 288 at 1008 pixels), H W the user's image.

Sources: the original's `sam3_image_processor.py`; transformers 5.23.0 `image_processing_sam3.py`; torch
`interpolate(mode="bilinear", align_corners=False)` for the resampling.
"""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any, Literal

import numpy as np

from sam3lt_jax.ops.interpolation import taps
from sam3lt_jax.processing.arrays import plain

MaskOrder = Literal["upsample_then_sigmoid", "sigmoid_then_upsample"]
_STRIP = 1 << 22  # pixels of a mask that are resampled at once on the host


def sigmoid(x):
  """Logistic function of any float array, without overflow at either end."""
  xp = np
  if not isinstance(x, (np.ndarray, np.generic)):
    import jax.numpy as xp
  e = xp.exp(-xp.abs(x))
  return xp.where(x >= 0, 1 / (1 + e), e / (1 + e))


def logit(probability: float) -> float:
  """Inverse of the sigmoid for a Python number in [0, 1]; the ends are -inf and +inf."""
  if probability <= 0.0:
    return -math.inf
  return math.inf if probability >= 1.0 else math.log(probability / (1.0 - probability))


def detection_scores(pred_logits, presence_logits=None):
  """sigmoid(logit) * sigmoid(presence logit).

  Args:
    pred_logits: float [..., Q].
    presence_logits: float [..., 1], or None for 1.

  Returns:
    float [..., Q] in [0, 1].
  """
  scores = sigmoid(pred_logits)
  return scores if presence_logits is None else scores * sigmoid(presence_logits)


def scale_boxes(boxes, sizes):
  """Normalised boxes to pixels, not clipped to the image, as in both references.

  Args:
    boxes: float [..., N, 4], (x1, y1, x2, y2) in units of the image's sides.
    sizes: [..., 2], (height, width) in pixels.

  Returns:
    [..., N, 4] in pixels, dtype of `boxes`.
  """
  width_height = np.asarray(sizes, boxes.dtype)[..., ::-1]
  return boxes * np.concatenate([width_height] * 2, axis=-1)[..., None, :]


def clip_boxes(boxes, size):
  """Boxes [N, 4], (x1, y1, x2, y2) in pixels, cut to an image of `size` (height, width). Same dtype."""
  height, width = size
  return boxes.clip(0, np.asarray([width, height] * 2, boxes.dtype))


def check_threshold(name: str, value: Any) -> float:
  """A probability from the user: a float in [0, 1], or ValueError."""
  number = plain(value, name)
  if not isinstance(number, numbers.Real):
    raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
  if not 0.0 <= number <= 1.0:  # written so that NaN fails
    raise ValueError(f"{name} must be in [0, 1], got {value}")
  return float(number)


def check_sizes(name: str, sizes: Any, count: int | None = None) -> list[tuple[int, int]]:
  """(height, width) pairs from the user as ints; ValueError if they are not, or not `count` of them."""
  try:
    pairs = [tuple(float(v) for v in pair) for pair in plain(sizes, name)]
  except (TypeError, ValueError, OverflowError) as e:
    raise ValueError(f"{name} must be a list of (height, width), got {sizes!r}") from e
  for pair in pairs:
    if len(pair) != 2 or not all(math.isfinite(v) and v >= 1 and v == int(v) for v in pair):
      raise ValueError(f"{name} must hold (height, width) in whole pixels, at least 1; got {pair}")
  if count is not None and len(pairs) != count:
    raise ValueError(f"{name} must have one (height, width) a prompt: {count} expected, got {len(pairs)}")
  return [(int(h), int(w)) for h, w in pairs]


def upsample_masks(masks, row_matrix, column_matrix):
  """jax: resamples masks with static shapes; to be called inside `jit`.

  Args:
    masks: float [..., h, w].
    row_matrix: float32 [H', h], `interpolation_matrix(h, H, H')`.
    column_matrix: float32 [W', w], `interpolation_matrix(w, W, W')`.

  Returns:
    float32 [..., H', W']; what lies past (H, W) is zero and means nothing.
  """
  import jax
  import jax.numpy as jnp

  # Highest: an accelerator's default product rounds to bfloat16, which moves mask edges.
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  masks = product("...hw,Hh->...Hw", masks.astype(jnp.float32), row_matrix)
  return product("...Hw,Ww->...HW", masks, column_matrix)


def upsample_and_binarise_masks(
  mask_logits, row_matrix, column_matrix, mask_threshold, mask_order: MaskOrder
):
  """jax: mask logits [..., h, w] to bool [..., H', W'] in the profile's order, inside `jit`.

  Args:
    mask_logits, row_matrix, column_matrix: as for `upsample_masks`.
    mask_threshold: probability, a number or a traced scalar, strictly between 0 and 1 where traced.
    mask_order: static; "upsample_then_sigmoid" (original) or "sigmoid_then_upsample" (transformers).
  """
  import jax.numpy as jnp

  if mask_order == "sigmoid_then_upsample":
    return (
      upsample_masks(sigmoid(mask_logits.astype(jnp.float32)), row_matrix, column_matrix) > mask_threshold
    )
  if isinstance(mask_threshold, numbers.Real):
    bound = logit(float(mask_threshold))
  else:
    bound = jnp.log(mask_threshold) - jnp.log1p(-mask_threshold)
  return upsample_masks(mask_logits, row_matrix, column_matrix) > bound


def resize_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """numpy: resamples maps, torch's bilinear `interpolate` without antialiasing.

  Args:
    masks: float [..., h, w].
    size: (H, W) in pixels.

  Returns:
    float32 [..., H, W].
  """
  masks = np.asarray(masks, np.float32)
  if masks.shape[-2:] == tuple(size):
    return masks.copy()
  return _resample(masks, taps(masks.shape[-2], size[0]), taps(masks.shape[-1], size[1]))


def _resample(masks: np.ndarray, rows: tuple, columns: tuple) -> np.ndarray:
  """[..., h, w] by the taps of its rows and columns."""
  # Two taps an axis by indexing: 2-3 times faster than the matrix products here. Columns first, as torch.
  low, high, weight = columns
  masks = np.take(masks, low, axis=-1) * (1 - weight) + np.take(masks, high, axis=-1) * weight
  low, high, weight = rows
  resized = np.take(masks, low, axis=-2)
  resized *= (1 - weight)[:, None]
  masks = np.take(masks, high, axis=-2)
  masks *= weight[:, None]
  resized += masks
  return resized


def binary_masks(
  mask_logits: np.ndarray, size: tuple[int, int] | None, mask_threshold: float, mask_order: MaskOrder
) -> np.ndarray:
  """numpy: mask logits to masks of the image's size, one mask at a time to bound the memory.

  Args:
    mask_logits: float [N, h, w].
    size: (H, W) in pixels; None keeps (h, w).
    mask_threshold: probability above which a pixel belongs to the object.
    mask_order: "upsample_then_sigmoid" (original) or "sigmoid_then_upsample" (transformers); they differ at
      0.1% of the pixels.

  Returns:
    bool [N, H, W], also for N = 0.
  """
  mask_logits = np.asarray(mask_logits, np.float32)
  size = mask_logits.shape[-2:] if size is None else size
  masks = np.empty((len(mask_logits), *size), bool)
  for values, mask in zip(mask_logits, masks):
    mask[...] = binary_mask(values, size, mask_threshold, mask_order)
  return masks


def binary_mask(
  mask_logits: np.ndarray, size: tuple[int, int], mask_threshold: float, mask_order: MaskOrder
) -> np.ndarray:
  """numpy: one mask of `binary_masks`, [h, w] to bool [H, W], computed where it can be True.

  A pixel lies between two rows and two columns of the logits and cannot be above the threshold if none of
  these four is. Of a mask that covers a tenth of a 1080p image this saves four fifths of the time.
  """
  # sigmoid(x) > t is x > logit(t): no exponential over the full-size mask.
  values, bound = np.asarray(mask_logits, np.float32), np.float32(mask_threshold)
  if mask_order == "upsample_then_sigmoid":
    bound = np.float32(logit(mask_threshold))
  else:
    values = sigmoid(values)
  if values.shape == tuple(size):
    return values > bound
  mask = np.zeros(size, bool)
  on = values > bound
  if not on.any():
    return mask
  (rows, row_taps), (columns, column_taps) = (_window(on.any(1 - axis), size[axis]) for axis in (0, 1))
  # In strips: the float32 of a mask of 100 megapixels takes 0.4 GB, and resampling needs three of them.
  strip = max(1, _STRIP // max(1, len(column_taps[0])))
  for start in range(0, len(row_taps[0]), strip):
    low, high, weight = (taps_of[start : start + strip] for taps_of in row_taps)
    first, last = low.min(), high.max() + 1
    resized = _resample(values[first:last], (low - first, high - first, weight), column_taps)
    into = slice(rows.start + start, rows.start + start + len(low))
    np.greater(resized, bound, out=mask[into, columns])
  return mask


def _window(on: np.ndarray, length: int) -> tuple[slice, tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """(the target pixels between the first and the last source cell that is on, their taps)."""
  low, high, weight = taps(len(on), length)
  inside = np.flatnonzero(on)
  touched = np.flatnonzero((high >= inside[0]) & (low <= inside[-1]))
  # Fewer target pixels than source cells: an object may fall between them.
  window = slice(touched[0], touched[-1] + 1) if len(touched) else slice(0, 0)
  return window, (low[window], high[window], weight[window])
