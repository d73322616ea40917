"""What Sam3LiteText refuses, and how it says so. Nothing is computed: shapes are enough to tell."""

import dataclasses

import jax
import numpy as np
import pytest

from sam3lt_jax import Sam3LiteText, TextFeatures, VisionFeatures
from tests import tiny


@pytest.fixture(scope="module")
def model():
  return tiny.load(tiny.config())[0]


@pytest.fixture(scope="module")
def variables():
  return tiny.load(tiny.config())[1]


def refused(model, variables, message, *args, **kwargs):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: model.apply(variables, *args, **kwargs))


IDS = np.ones((2, 5), np.int32)
TOKENS = np.zeros((2, 5, 16), np.float32)
BOXES = np.full((2, 1, 4), 0.5, np.float32)


@pytest.mark.parametrize(
  "shape, message",
  [
    ((2, 30, 30, 3), "multiple of 14 .* got 30 x 30"),
    ((2, 28, 42, 3), "square .* got 28 x 42"),
    ((2, 14, 14, 3), r"at least 28\), got 14 x 14"),
    ((2, 3, 28, 28), r"got \(2, 3, 28, 28\); this looks channels-first"),
    ((28, 28, 3), r"\[B, S, S, 3\], got \(28, 28, 3\)\n"),
    ((2, 28, 28, 4), r"\[B, S, S, 3\], got"),
  ],
)
def test_pixels_of_another_shape(model, variables, shape, message):
  refused(model, variables, f"pixel_values must be .*{message}", np.zeros(shape, np.float32), IDS)
  refused(model, variables, "pixel_values must be", np.zeros(shape, np.float32), method="get_vision_features")


@pytest.mark.parametrize(
  "message, kwargs",
  [
    ("exactly one of pixel_values and vision_embeds", {"pixel_values": None}),
    ("exactly one of pixel_values and vision_embeds", {"vision_embeds": VisionFeatures(None, None, ())}),
    ("exactly one of input_ids and text_embeds", {"input_ids": None}),
    ("exactly one of input_ids and text_embeds", {"text_embeds": np.zeros((2, 5, 16), np.float32)}),
    (r"input_ids must be int \[P, T\], got float32", {"input_ids": IDS.astype(np.float32)}),
    (r"input_ids must be int \[P, T\], got int32 \(5,\)", {"input_ids": IDS[0]}),
    (r"attention_mask must be \(2, 5\) like the tokens, got \(2, 4\)", {"attention_mask": IDS[:, :4]}),
    ("input_ids has 17 tokens but the position table has 16 rows", {"input_ids": np.ones((2, 17), np.int32)}),
    (r"input_boxes must be \[P, N, 4\] with P = 2 .* got \(2, 4\)", {"input_boxes": BOXES[:, 0]}),
    (r"input_boxes must be .* got \(1, 1, 4\)", {"input_boxes": BOXES[:1]}),
    (r"input_boxes must be .* got \(2, 1, 5\)", {"input_boxes": np.zeros((2, 1, 5), np.float32)}),
    ("input_boxes_labels without input_boxes", {"input_boxes_labels": np.ones((2, 1), np.int32)}),
    (
      r"input_boxes_labels must be \(2, 1\), got \(2, 2\)",
      {"input_boxes": BOXES, "input_boxes_labels": np.ones((2, 2), np.int32)},
    ),
    ("3 prompts for 2 images: pass image_index", {"input_ids": np.ones((3, 5), np.int32)}),
    (r"image_index must be \[P\] with P = 2 prompts, got \(3,\)", {"image_index": np.zeros(3, np.int32)}),
    (
      r"image_index must be \[P\] with P = 2 prompts, got \(2, 1\)",
      {"image_index": np.zeros((2, 1), np.int32)},
    ),
  ],
)
def test_arguments_that_contradict_each_other(model, variables, message, kwargs):
  good = {"pixel_values": np.zeros((2, 28, 28, 3), np.float32), "input_ids": IDS}
  refused(model, variables, message, **(good | kwargs))


def test_a_mask_of_another_length_than_the_features(model, variables):
  refused(
    model, variables, r"attention_mask must be \(2, 5\)", np.zeros((2, 28, 28, 3), np.float32),
    attention_mask=IDS[:, :4], text_embeds=np.zeros((2, 5, 16), np.float32),
  )  # fmt: skip


def test_other_neck_scales(variables):
  vision = dataclasses.replace(tiny.config().vision, scale_factors=(4.0, 3.0, 1.0, 0.5))
  with pytest.raises(ValueError, match=r"scale_factors may hold .* got 3\.0"):
    jax.eval_shape(Sam3LiteText(tiny.config(vision=vision)).init_variables, jax.random.key(0))


def test_raw_bytes_are_not_pixel_values(model, variables):
  refused(model, variables, "floating point in .* got uint8", np.zeros((2, 28, 28, 3), np.uint8), IDS)


@pytest.mark.parametrize(
  "embeds, mask, message",
  [
    (np.zeros((5, 16), np.float32), None, r"text_embeds must be TextFeatures or an array \[P, T, D\]"),
    (np.zeros((2, 5, 7), np.float32), None, r"text_embeds must be \[P, T, 16\] .* got \(2, 5, 7\)"),
    (
      TextFeatures(*[np.zeros((2, 5, 16), np.float32)] * 2, IDS > 0),
      IDS,
      "attention_mask beside TextFeatures",
    ),
  ],
)
def test_text_features_of_another_kind(model, variables, embeds, mask, message):
  pixels = np.zeros((2, 28, 28, 3), np.float32)
  refused(model, variables, message, pixels, attention_mask=mask, text_embeds=embeds)


def test_vision_features_of_another_kind(model, variables):
  accepted = "vision_embeds must be VisionFeatures, got tuple"
  refused(model, variables, accepted, None, IDS, vision_embeds=())


def test_lists_are_taken_for_arrays(model, variables):
  pixels = np.zeros((1, 28, 28, 3), np.float32)
  arrays = jax.eval_shape(lambda: model.apply(variables, pixels, IDS[:1], input_boxes=BOXES[:1]))
  lists = jax.eval_shape(
    lambda: model.apply(
      variables, pixels.tolist(), IDS[:1].tolist(), [[1] * 5], input_boxes=BOXES[:1].tolist()
    )
  )
  assert arrays == lists
