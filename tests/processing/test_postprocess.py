"""Scores, boxes and mask resampling, against torch and by hand."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.ops.interpolation import interpolation_matrix
from sam3lt_jax.processing import postprocess as pp

_ORDERS = ("upsample_then_sigmoid", "sigmoid_then_upsample")


def _blobs(count, height, width, seed=0):
  """Smooth logit maps with steep edges, float32 [count, height, width], roughly -15..15."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width].astype(np.float32)
  maps = []
  for _ in range(count):
    cy, cx, r = rng.uniform(0.2, 0.8) * height, rng.uniform(0.2, 0.8) * width, rng.uniform(0.1, 0.4) * width
    maps.append(np.clip(2 * (r - np.hypot(y - cy, x - cx)), -12, 12) + rng.normal(0, 0.7, y.shape))
  return np.stack(maps).astype(np.float32)


@pytest.mark.parametrize("xp", [np, jnp])
def test_sigmoid_and_scores(xp):
  x = xp.asarray([-200.0, -20.0, 0.0, 3.0, 200.0], xp.float32)
  with np.errstate(all="raise", under="ignore"):
    out = np.asarray(pp.sigmoid(x))
  np.testing.assert_allclose(out, [0, 2.0611537e-09, 0.5, 0.95257413, 1], rtol=1e-6, atol=1e-38)
  scores = pp.detection_scores(x[None], xp.asarray([[0.0]], xp.float32))
  assert scores.dtype == xp.float32
  np.testing.assert_allclose(scores, out[None] / 2, rtol=1e-6)
  np.testing.assert_array_equal(pp.detection_scores(x), out)


def test_logit():
  assert pp.logit(0.5) == 0 and pp.logit(0.0) == -np.inf and pp.logit(1.0) == np.inf
  assert abs(pp.sigmoid(np.float64(pp.logit(0.3))) - 0.3) < 1e-12


@pytest.mark.parametrize("xp", [np, jnp])
def test_scale_boxes(xp):
  boxes = xp.asarray([[[0.1, 0.2, 0.5, 1.0]], [[-0.5, 0.0, 1.5, 0.25]]], xp.float32)
  scaled = pp.scale_boxes(boxes, xp.asarray([[100, 200], [8, 4]]))
  assert scaled.dtype == xp.float32
  np.testing.assert_allclose(scaled, [[[20, 20, 100, 100]], [[-2, 0, 6, 2]]], rtol=1e-6)


@pytest.mark.parametrize("xp", [np, jnp])
def test_clip_boxes(xp):
  clipped = pp.clip_boxes(xp.asarray([[-2.0, 0.5, 201, 99]], xp.float32), (100, 200))
  assert clipped.dtype == xp.float32 and np.asarray(clipped).tolist() == [[0, 0.5, 200, 99]]


def test_interpolation_matrix_by_hand():
  np.testing.assert_array_equal(interpolation_matrix(3, 3), np.eye(3))
  np.testing.assert_array_equal(interpolation_matrix(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
  np.testing.assert_array_equal(interpolation_matrix(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
  np.testing.assert_array_equal(interpolation_matrix(1, 3), np.ones((3, 1)))
  padded = interpolation_matrix(2, 4, 6)
  assert padded.shape == (6, 2) and padded.dtype == np.float32 and not padded[4:].any()
  for size in (7, 1200, 1801):
    matrix = interpolation_matrix(288, size)
    np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-6)
    assert matrix.min() >= 0
  with pytest.raises(ValueError, match="padded_size at least out_size"):
    interpolation_matrix(4, 8, 6)
  with pytest.raises(ValueError):  # cached, so it must not be written to
    padded[0, 0] = 1


@pytest.mark.parametrize("size", [(100, 150), (48, 48), (1, 1), (7, 333), (600, 30)])
def test_numpy_and_jax_resample_alike(size):
  masks = _blobs(3, 48, 48)
  expected = np.einsum(
    "Hh,nhw,Ww->nHW",
    interpolation_matrix(48, size[0]).astype(np.float64),
    masks,
    interpolation_matrix(48, size[1]).astype(np.float64),
  )
  resized = pp.resize_masks(masks, size)
  assert resized.dtype == np.float32 and resized.shape == (3, *size)
  np.testing.assert_allclose(resized, expected, atol=1e-5)
  rows, columns = interpolation_matrix(48, size[0], 640), interpolation_matrix(48, size[1], 352)
  padded = jax.jit(pp.upsample_masks)(masks, rows, columns)
  assert padded.shape == (3, 640, 352) and padded.dtype == jnp.float32
  np.testing.assert_allclose(padded[:, : size[0], : size[1]], expected, atol=1e-5)
  assert not np.asarray(padded[:, size[0] :]).any() and not np.asarray(padded[:, :, size[1] :]).any()


def test_one_compilation_serves_every_size_in_a_bucket():
  traced = []

  def binarise(masks, rows, columns, threshold):
    traced.append(masks.shape)
    return pp.upsample_and_binarise_masks(masks, rows, columns, threshold, "upsample_then_sigmoid")

  compiled = jax.jit(binarise)
  masks = _blobs(2, 36, 36)
  for size, threshold in (((50, 60), 0.5), ((64, 64), 0.3), ((20, 7), 0.7)):
    rows, columns = interpolation_matrix(36, size[0], 64), interpolation_matrix(36, size[1], 64)
    out = compiled(masks, rows, columns, np.float32(threshold))
    expected = pp.binary_masks(masks, size, threshold, "upsample_then_sigmoid")
    assert (np.asarray(out[:, : size[0], : size[1]]) != expected).mean() < 1e-3
  assert len(traced) == 1


@pytest.mark.parametrize("order", _ORDERS)
def test_binary_masks(order):
  masks = _blobs(4, 36, 36)
  out = pp.binary_masks(masks, (90, 120), 0.5, order)
  assert out.dtype == bool and out.shape == (4, 90, 120)
  assert 0.02 < out.mean() < 0.9
  matrices = interpolation_matrix(36, 90), interpolation_matrix(36, 120)
  from_jax = pp.upsample_and_binarise_masks(jnp.asarray(masks), *matrices, 0.5, order)
  assert from_jax.dtype == bool
  assert (np.asarray(from_jax) != out).mean() < 1e-4
  np.testing.assert_array_equal(pp.binary_masks(masks, None, 0.5, order), masks > 0)
  assert pp.binary_masks(masks[:0], (90, 120), 0.5, order).shape == (0, 90, 120)
  assert pp.binary_masks(masks[:0], None, 0.5, order).shape == (0, 36, 36)
  assert pp.binary_masks(masks, (90, 120), 0.0, order).all()
  assert not pp.binary_masks(masks, (90, 120), 1.0, order).any()
  # One mask's result does not depend on the others.
  np.testing.assert_array_equal(pp.binary_masks(masks[2:3], (90, 120), 0.5, order)[0], out[2])


def test_the_two_orders_differ_a_little():
  masks = _blobs(4, 36, 36)
  a, b = (pp.binary_masks(masks, (300, 300), 0.5, order) for order in _ORDERS)
  assert 0 < (a != b).mean() < 0.02


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf, "0.5", None, [0.5], np.zeros(2)])
def test_bad_thresholds(value):
  with pytest.raises(ValueError, match=r"threshold must be .*\[0, 1\], got"):
    pp.check_threshold("threshold", value)


def test_good_thresholds():
  for value in (0, 1, 0.3, np.float32(0.3), np.asarray(0.3), jnp.asarray(0.5)):
    assert pp.check_threshold("threshold", value) == float(value)


def test_sizes():
  assert pp.check_sizes("target_sizes", np.asarray([[3, 4], [5, 6]]), 2) == [(3, 4), (5, 6)]
  assert pp.check_sizes("target_sizes", [(3.0, 4)]) == [(3, 4)]
  with pytest.raises(ValueError, match="2 expected, got 1"):
    pp.check_sizes("target_sizes", [(3, 4)], 2)
  for bad in ([(3,)], [(3, 4, 5)], [(0, 4)], [(3.5, 4)], [(np.nan, 4)], [(np.inf, 4)], [(-1, 2)]):
    with pytest.raises(ValueError, match="target_sizes must hold"):
      pp.check_sizes("target_sizes", bad)
  for bad in (3, (3, 4), ["ab"], [None]):
    with pytest.raises(ValueError, match=r"target_sizes must be a list of \(height, width\)"):
      pp.check_sizes("target_sizes", bad)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(120, 180), (48, 48), (480, 333), (20, 31), (1, 1), (1, 200)])
def test_against_torch(size):
  torch = pytest.importorskip("torch")

  def interpolate(x):
    x = torch.as_tensor(x)[None]
    return torch.nn.functional.interpolate(x, size=size, mode="bilinear", align_corners=False)[0]

  masks = _blobs(3, 48, 48, seed=1)
  expected = interpolate(masks).numpy()
  np.testing.assert_allclose(pp.resize_masks(masks, size), expected, atol=5e-6)
  matrices = interpolation_matrix(48, size[0]), interpolation_matrix(48, size[1])
  np.testing.assert_allclose(pp.upsample_masks(jnp.asarray(masks), *matrices), expected, atol=1e-5)
  for threshold in (0.3, 0.5):
    original = interpolate(masks).sigmoid() > threshold
    transformers = interpolate(torch.as_tensor(masks).sigmoid()) > threshold
    for order, reference in zip(_ORDERS, (original, transformers)):
      out = pp.binary_masks(masks, size, threshold, order)
      assert (out != reference.numpy()).mean() <= 1e-5


@pytest.mark.torch
@pytest.mark.parametrize("sizes", [(288, 1800), (288, 1337), (288, 100), (48, 1200), (72, 1008)])
def test_weights_are_torchs(sizes):
  torch = pytest.importorskip("torch")
  identity = torch.eye(sizes[0])[None]
  expected = torch.nn.functional.interpolate(identity, size=sizes[1], mode="linear", align_corners=False)[0]
  np.testing.assert_allclose(interpolation_matrix(*sizes), expected.numpy().T, atol=1e-7)


def logits(kind, h=24, w=24):
  rng = np.random.default_rng(0)
  y, x = np.mgrid[:h, :w]
  if kind == "noise":
    return rng.normal(0, 3, (h, w)).astype(np.float32)
  if kind == "none":
    return np.full((h, w), -5, np.float32)
  if kind == "all":
    return np.full((h, w), 5, np.float32)
  if kind == "corner":
    return (4 - np.hypot(y - h, x)).astype(np.float32)
  if kind == "cell":
    values = np.full((h, w), -1, np.float32)
    values[7, 11] = 1
    return values
  return (5 - np.hypot(y - 9, x - 14) + rng.normal(0, 0.5, (h, w))).astype(np.float32)


@pytest.mark.parametrize("order", _ORDERS)
@pytest.mark.parametrize("kind", ["disc", "corner", "noise", "none", "all", "cell"])
@pytest.mark.parametrize("size", [(60, 91), (24, 24), (5, 300), (3, 2), (1, 1)])
def test_a_mask_is_computed_where_it_can_be_true(order, kind, size):
  values = logits(kind)
  for threshold in (0.5, 0.3, 0.0, 1.0):
    if order == "upsample_then_sigmoid":
      wanted = pp.resize_masks(values, size) > np.float32(pp.logit(threshold))
    else:
      wanted = pp.resize_masks(pp.sigmoid(values), size) > np.float32(threshold)
    np.testing.assert_array_equal(pp.binary_mask(values, size, threshold, order), wanted)


def test_a_huge_mask_is_made_in_strips(monkeypatch):
  """The same to the bit; what is held beside the mask is one strip, not three float32 of the mask's size."""
  values, size = _blobs(1, 24, 24)[0], (1500, 2000)
  whole = pp.binary_mask(values, size, 0.5, "upsample_then_sigmoid")
  monkeypatch.setattr(pp, "_STRIP", 50_000)
  tracemalloc.start()
  strips = pp.binary_mask(values, size, 0.5, "upsample_then_sigmoid")
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  np.testing.assert_array_equal(strips, whole)
  assert 0 < strips.mean() < 1 and peak < strips.nbytes + 4 * 4 * 50_000, peak
