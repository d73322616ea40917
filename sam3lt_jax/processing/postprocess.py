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

MaskOrder = Literal["upsample_then_sigmoid", "sigmoid_then_upsample"]


def _namespace(x):
  if isinstance(x, (np.ndarray, np.generic)):
    return np
  import jax.numpy as jnp

  return jnp


def sigmoid(x):
  """Logistic function of any float array, without overflow at either end."""
  xp = _namespace(x)
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
  """Normalised boxes to pixels, not clipped to the image (neither reference does).

  Args:
    boxes: float [..., N, 4], (x1, y1, x2, y2) in units of the image's sides.
    sizes: [..., 2], (height, width) in pixels.

  Returns:
    [..., N, 4] in pixels, dtype of `boxes`.
  """
  xp = _namespace(boxes)
  height_width = xp.asarray(sizes, boxes.dtype)
  return boxes * xp.concatenate([height_width[..., ::-1]] * 2, axis=-1)[..., None, :]


def check_threshold(name: str, value: Any) -> float:
  """A probability from the user: a float in [0, 1], or ValueError."""
  number = isinstance(value, numbers.Real) or hasattr(value, "__array__")
  if not number or np.ndim(value) != 0:
    raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
  if not 0.0 <= float(value) <= 1.0:  # written so that NaN fails
    raise ValueError(f"{name} must be in [0, 1], got {value}")
  return float(value)


def check_sizes(name: str, sizes: Any, count: int | None = None) -> list[tuple[int, int]]:
  """(height, width) pairs from the user as ints; ValueError if they are not, or not `count` of them."""
  try:
    pairs = [tuple(float(v) for v in pair) for pair in sizes]
  except (TypeError, ValueError) as e:
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
  # Two taps an axis by indexing: 2-3 times faster than the matrix products here. Columns first, as torch.
  low, high, weight = taps(masks.shape[-1], size[1])
  masks = np.take(masks, low, axis=-1) * (1 - weight) + np.take(masks, high, axis=-1) * weight
  low, high, weight = taps(masks.shape[-2], size[0])
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
  # sigmoid(x) > t is x > logit(t): no exponential over the full-size mask.
  bound = logit(mask_threshold) if mask_order == "upsample_then_sigmoid" else mask_threshold
  masks = np.empty((len(mask_logits), *size), bool)
  for values, mask in zip(mask_logits, masks):
    values = values if mask_order == "upsample_then_sigmoid" else sigmoid(values)
    np.greater(resize_masks(values, size), np.float32(bound), out=mask)
  return masks
