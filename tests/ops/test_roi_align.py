"""RoIAlign against a direct loop over bins, samples and neighbours."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.ops import roi_align
from tests import tiny

SIZE = 12
BINS = 7


def bilinear(image, y, x):
  """One sample, the compiled operator's way: zero beyond a cell outside, else clamped to the border."""
  H, W, D = image.shape
  if y < -1 or y > H or x < -1 or x > W:
    return np.zeros(D)
  y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
  y0, x0 = int(y), int(x)
  y1, x1 = min(y0 + 1, H - 1), min(x0 + 1, W - 1)
  fy, fx = y - y0, x - x0
  top = (1 - fx) * image[y0, x0] + fx * image[y0, x1]
  return (1 - fy) * top + fy * ((1 - fx) * image[y1, x0] + fx * image[y1, x1])


def slow(image, box, bins):
  """[H, W, D] and one box xyxy in cells -> [bins, bins, D]."""
  x1, y1, x2, y2 = (float(np.float32(v)) for v in box)
  width, height = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
  across, down = math.ceil(width / bins), math.ceil(height / bins)
  out = np.zeros((bins, bins, image.shape[-1]))
  for p in range(bins):
    for q in range(bins):
      for i in range(down):
        for j in range(across):
          y = y1 + height / bins * (p + (i + 0.5) / down)
          x = x1 + width / bins * (q + (j + 0.5) / across)
          out[p, q] += bilinear(image, y, x) / (down * across)
  return out


def image(size=SIZE, channels=3, seed=0):
  return np.random.default_rng(seed).normal(size=(size, size, channels)).astype(np.float32)


def run(features, boxes, bins=BINS, dtype=np.float32):
  return _align(jnp.asarray(features[None], dtype), np.asarray([boxes], np.float32), bins)[0]


_align = tiny.jit(roi_align.roi_align, static_argnums=2)  # compiled once a shape


BOXES = {
  "inside": (2.2, 3.1, 9.7, 8.3),
  "the whole map": (0, 0, SIZE, SIZE),
  "three times the map": (-12.3, -12.2, 24.1, 23.6),
  "over two borders": (-3.3, 2.1, 4.2, 15.7),
  "outside, before": (-9.3, -7.2, -4.1, -3.6),
  "outside, behind": (13.2, 14.1, 20.3, 19.9),
  "behind the last cell": (11.3, 0.2, 12.9, 1.1),
  "empty: counts as one cell": (5.3, 5.3, 5.3, 5.3),
  "smaller than a cell": (5.1, 6.2, 5.3, 6.4),
  "inverted: one cell from its first corner": (9.2, 8.1, 3.3, 2.2),
  "a line": (4.1, 0.3, 4.4, 11.8),
}


def test_equals_the_loop():
  features = image()
  out = run(features, list(BOXES.values()))
  for result, (name, box) in zip(out, BOXES.items()):
    np.testing.assert_allclose(result, slow(features, box, BINS), atol=1e-5, err_msg=name)
  outside = [i for i, name in enumerate(BOXES) if name.startswith("outside")]
  assert not np.any(out[np.array(outside)])


def test_equals_the_loop_for_random_boxes():
  rng = np.random.default_rng(1)
  boxes = rng.uniform(-10, 22, size=(30, 4))  # half of them inverted along an axis
  features = image(channels=2)
  out = run(features, boxes)
  for result, box in zip(out, boxes):
    np.testing.assert_allclose(result, slow(features, box, BINS), atol=1e-5, err_msg=str(box))


def test_a_map_that_grows_to_the_right_gives_the_centres_of_the_bins():
  """Linear interpolation of x at the samples averages to the centre of a bin: 2 + 6 / 3 * (q + 1/2)."""
  ramp = np.broadcast_to(np.arange(SIZE, dtype=np.float32)[None, :, None], (SIZE, SIZE, 1))
  out = run(ramp, [(2, 3, 8, 9)], bins=3)
  np.testing.assert_allclose(out[0, :, :, 0], np.broadcast_to([3, 5, 7], (3, 3)), atol=1e-5)


def test_weights_of_an_axis_by_hand():
  """Two bins over cells 0..2 of 3: one sample each, at 0.5 and 1.5."""
  weights = tiny.jit(lambda low, high: roi_align.axis_weights(low, high, size=3, bins=2))(0.0, 2.0)
  np.testing.assert_allclose(weights, [[0.5, 0.5, 0], [0, 0.5, 0.5]], atol=1e-6)


def test_rectangular_maps_tell_rows_from_columns():
  features = np.random.default_rng(2).normal(size=(5, 9, 2)).astype(np.float32)
  box = (1.2, 0.4, 8.3, 4.1)
  np.testing.assert_allclose(run(features, [box], bins=3)[0], slow(features, box, 3), atol=1e-5)


def test_each_image_has_its_own_boxes():
  features = np.stack([image(seed=3), image(seed=4)])
  boxes = np.array([[[1.2, 1.3, 5.4, 6.5]], [[3.2, 2.3, 11.4, 9.5]]], np.float32)
  out = _align(features, boxes, BINS)
  assert out.shape == (2, 1, BINS, BINS, 3)
  for i in range(2):
    np.testing.assert_allclose(out[i, 0], slow(features[i], boxes[i, 0], BINS), atol=1e-5)


def test_boxes_beyond_the_static_bound_stay_finite():
  """Over four times the map, samples are fewer than the reference's; most of the box is outside anyway."""
  out = run(image(), [(-500, -500, 700, 600), (-1e6, -1e6, 1e6, 1e6)])
  assert np.isfinite(out).all()


def test_no_boxes():
  out = _align(np.zeros((2, 4, 4, 3), np.float32), np.zeros((2, 0, 4), np.float32), BINS)
  assert out.shape == (2, 0, BINS, BINS, 3)


def test_bfloat16_keeps_its_dtype():
  features, box = image(), (2.2, 3.1, 9.7, 8.3)
  out = run(features, [box], dtype=jnp.bfloat16)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(out[0], np.float32), slow(features, box, BINS), atol=0.03)


@pytest.mark.torch
def test_equals_torchvision_inside_the_map():
  """Its Python version where its operators do not load; the two differ outside the map only."""
  from tests.reference import import_torch_reference

  torch = import_torch_reference().torch
  from torchvision.ops import roi_align as theirs

  features = image()
  boxes = np.array([[2.2, 3.1, 9.7, 8.3], [0.5, 0.5, 11, 11], [5.1, 6.2, 5.3, 6.4]], np.float32)
  wanted = theirs(torch.from_numpy(features).permute(2, 0, 1)[None], [torch.from_numpy(boxes)], BINS)
  np.testing.assert_allclose(run(features, boxes), wanted.permute(0, 2, 3, 1).numpy(), atol=1e-5)
