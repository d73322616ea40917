"""The tracker's processor, against transformers' own where torch is there."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sam3lt_jax import Sam3TrackerProcessor
from sam3lt_jax.config import TrackerConfig
from tests.reference import import_torch_reference

SIZES = [(60, 90), (40, 30)]
POINTS = [[[[30, 20]], [[70, 45], [5, 5]]], [[[10, 10]]]]
LABELS = [[[1], [1, 0]], [[1]]]


@pytest.fixture(scope="module")
def processor():
  return Sam3TrackerProcessor(image_size=112)


def test_rows_image_by_image(processor):
  out = processor(original_sizes=SIZES, input_points=POINTS, input_labels=LABELS)
  clicks = out.clicks
  assert clicks.image_index.tolist() == [0, 0, 1]
  assert clicks.valid.tolist() == [[True, False], [True, True], [True, False]]
  assert clicks.labels[clicks.valid].tolist() == [1, 1, 0, 1]
  np.testing.assert_allclose(clicks.points[1], [[70 / 90, 45 / 60], [5 / 90, 5 / 60]], rtol=1e-6)
  assert clicks.masks is None
  boxes = [[[1, 2, 30, 40], [0, 0, 90, 60]], [[3, 3, 20, 30]]]
  both = processor(original_sizes=SIZES, input_points=POINTS, input_labels=LABELS, input_boxes=boxes).clicks
  assert both.labels[0].tolist() == [2, 3, 1, 0] and both.valid[0].tolist() == [True, True, True, False]
  masks = [np.zeros((2, 32, 32), np.float32) + 3, None]
  some = processor(original_sizes=SIZES, input_points=POINTS, input_masks=masks).clicks
  assert some.has_mask.tolist() == [True, True, False] and some.masks.shape == (3, 32, 32)


def test_images_and_padding_labels(processor):
  images = [np.zeros((60, 90, 3), np.uint8), np.zeros((40, 30, 3), np.uint8)]
  points = [[[[30, 20], [0, 0]]], [[[10, 10], [-10, -10]]]]
  out = processor(images, input_points=points, input_labels=[[[1, -10]], [[0, -1]]])
  assert out.pixel_values.shape == (2, 112, 112, 3)
  assert out.original_sizes.tolist() == [list(size) for size in SIZES]
  assert out.clicks.labels.tolist() == [[1, -10], [0, -1]]
  jax.tree.map(np.asarray, out.clicks)


@pytest.mark.torch
def test_post_processing_as_transformers(processor):
  torch = import_torch_reference().torch
  from transformers import Sam3ImageProcessor

  rng = np.random.default_rng(0)
  masks = [rng.normal(size=(3, 2, 24, 24)).astype(np.float32) for _ in SIZES]
  for options in (
    {},
    {"binarize": False},
    {"mask_threshold": 0.4},
    {"apply_non_overlapping_constraints": True},
  ):
    want = Sam3ImageProcessor().post_process_masks(
      [torch.as_tensor(m) for m in masks], [list(size) for size in SIZES], **options
    )
    got = processor.post_process_masks(masks, SIZES, **options)
    for ours, theirs in zip(got, want, strict=True):
      assert ours.shape == tuple(theirs.shape)
      if options.get("binarize", True):
        assert (ours != theirs.numpy()).mean() < 1e-3
      else:
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


def test_holes_are_filled(processor):
  logits = np.full((1, 1, 8, 8), 5.0, np.float32)
  logits[0, 0, 3, 3] = -1
  (plain,), (filled,) = (
    processor.post_process_masks(logits, [(8, 8)], max_hole_area=area) for area in (0, 1)
  )
  assert not plain[0, 3, 3] and filled[0, 3, 3]


@pytest.mark.parametrize(
  ("message", "arguments"),
  [
    ("input_points must have one entry an image: 2 expected, got 1", {"input_points": POINTS[:1]}),
    (r"input_points\[1\] must lie in the image of 30x40", {"input_points": [[[[1, 1]]], [[[50, 1]]]]}),
    (
      r"input_labels\[0\]: object 1 must be 1 .* got 7",
      {"input_points": POINTS, "input_labels": [[[1], [1, 7]], [[1]]]},
    ),
    ("every image's prompts are None", {"input_boxes": [None, None]}),
    ("segmentation_maps is not supported", {"segmentation_maps": 1}),
  ],
)  # fmt: skip
def test_bad_input_is_a_sentence(processor, message, arguments):
  with pytest.raises(ValueError, match=message):
    processor(original_sizes=SIZES, **arguments)


def test_what_a_processor_is_made_of():
  with pytest.raises(ValueError, match="give images, or original_sizes with prompts"):
    Sam3TrackerProcessor()()
  with pytest.raises(ValueError, match="image_size must be a multiple of 14, at least 28, got 100"):
    Sam3TrackerProcessor(TrackerConfig(), image_size=100)
