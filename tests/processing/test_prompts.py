"""Boxes, labels, phrases and counts as users get them wrong: each mistake is named."""

import warnings

import numpy as np
import pytest

from sam3lt_jax.processing.processor import Sam3Processor

_BOX_A, _BOX_B = [10.0, 5.0, 40.0, 50.0], [1.5, 2.5, 30.0, 20.25]


@pytest.fixture(scope="module")
def photos():
  return [np.zeros((60, 90, 3), np.uint8), np.zeros((120, 40, 3), np.uint8)]


@pytest.fixture(scope="module", params=["original", "transformers"])
def processor(request):
  return Sam3Processor(request.param, image_size=56)


_BAD_BOXES = {
  "inverted": ([[[40, 5, 10, 50]]], r"box 0 of prompt 0 is inverted.*40.*x1 <= x2"),
  "inverted in y": ([[_BOX_A, [10, 50, 40, 5]]], r"box 1 of prompt 0 is inverted"),
  "nan": ([[[10, np.nan, 40, 50]]], r"box 0 of prompt 0 must be finite"),
  "infinite": ([[[10, 5, np.inf, 50]]], "must be finite"),
  "three numbers": ([[[10, 5, 40]]], r"box 0 of prompt 0 must be four numbers.*\[10, 5, 40\]"),
  "five numbers": ([[_BOX_A, [1, 2, 3, 4, 5]]], "box 1 of prompt 0 must be four numbers"),
  "words": ([[["a", 5, 40, 50]]], "must be four numbers"),
  "no box level": ([_BOX_A], "one level of nesting is missing"),
  "no prompt level": (_BOX_A, "one level of nesting is missing"),
  "too deep": ([[[_BOX_A]]], "must be four numbers"),
  "an array [N, 4]": (np.asarray([_BOX_A]), "one level of nesting is missing"),
  "an array of points": (np.zeros((1, 2, 2)), r"box 0 of prompt 0 must be four numbers.*\[0.0, 0.0\]"),
  "a word": ("boxes", "input_boxes must be"),
  "nothing": ([], "input_boxes must be"),
  "two prompts, one phrase": ([[_BOX_A], [_BOX_A]], "text has 1 phrases, input_boxes are for 2"),
}


@pytest.mark.parametrize("case", _BAD_BOXES, ids=lambda c: c.replace(" ", "_"))
def test_bad_boxes(processor, photos, case):
  boxes, message = _BAD_BOXES[case]
  with pytest.raises(ValueError, match=message):
    processor(images=photos[0], text=["dog"], input_boxes=boxes)


_BAD_LABELS = {
  "2": ([[2]], r"must be 1 .*0 .*-10 .*box 0 of prompt 0 has 2"),
  "-1": ([[-1]], "has -1"),
  "a fraction": ([[0.5]], "has 0.5"),
  "a word": ([["1"]], "has '1'"),
  "none in a list": ([[None]], "has None"),
  "too many": ([[1, 1]], "prompt 0 has 2 labels for 1 boxes"),
  "none for boxes": ([None], "prompt 0 has 0 labels for 1 boxes"),
  "another number of prompts": ([[1], [1]], "are for 2 prompts, input_boxes for 1"),
  "flat": ([1], r"must be \[prompt\]\[box\]"),
  "an array": (np.asarray([1]), r"must be \[prompt\]\[box\], got array"),
}


@pytest.mark.parametrize("case", _BAD_LABELS, ids=lambda c: c.replace(" ", "_"))
def test_bad_labels(processor, photos, case):
  labels, message = _BAD_LABELS[case]
  with pytest.raises(ValueError, match=message):
    processor(images=photos[0], text=["dog"], input_boxes=[[_BOX_A]], input_boxes_labels=labels)


def test_boolean_labels_are_taken_as_1_and_0(processor, photos):
  out = processor(photos[0], input_boxes=[[_BOX_A, _BOX_B]], input_boxes_labels=[[True, np.False_]])
  assert out.input_boxes_labels.tolist() == [[1, 0]]


def test_counts_that_do_not_match(processor, photos):
  with pytest.raises(ValueError, match="text has 3 phrases for 2 images"):
    processor(images=photos, text=["a", "b", "c"])
  with pytest.raises(ValueError, match="text has 2 phrases, input_boxes are for 1"):
    processor(images=photos[0], text=["a", "b"], input_boxes=[[_BOX_A]])
  with pytest.raises(ValueError, match="input_boxes are for 3 prompts, but there are 2 images"):
    processor(images=photos, input_boxes=[[_BOX_A]] * 3)
  with pytest.raises(ValueError, match="give images or original_sizes"):
    processor(text="dog", input_boxes=[[_BOX_A]])
  with pytest.raises(ValueError, match="without input_boxes"):
    processor(images=photos[0], text="dog", input_boxes_labels=[[1]])
  with pytest.raises(ValueError, match="contradict the images"):
    processor(images=photos[0], original_sizes=[(60, 91)])
  with pytest.raises(ValueError, match="at least one image"):
    processor(images=[])
  with pytest.raises(ValueError, match="at least one of images, text"):
    processor()
  with pytest.raises(ValueError, match="segmentation_maps is not supported"):
    processor(images=photos[0], segmentation_maps=np.zeros((60, 90)))


def test_bad_text(processor, photos):
  with pytest.raises(ValueError, match="prompt 1 is None; None is for prompts with boxes"):
    processor(images=photos, text=["dog", None])
  with pytest.raises(ValueError, match="prompt 0 is None"):
    processor(images=photos, text=[None, "dog"], input_boxes=[None, [_BOX_A]])
  with pytest.raises(ValueError, match="prompt 0 is 3"):
    processor(text=[3])
  with pytest.raises(ValueError, match="text must be a string or a list of strings, got int"):
    processor(text=3)
  with pytest.raises(ValueError, match="at least one phrase"):
    processor(text=[])


def test_boxes_outside_the_image_are_taken_with_a_warning(processor, photos):
  for box in ([90, 5, 120, 50], [-30, 5, 0, 50], [5, 60, 10, 80], [5, -9, 10, -1]):
    with pytest.warns(UserWarning, match=r"box 0 of prompt 0.*outside the image of 90x60"):
      out = processor(photos[0], input_boxes=[[box]])
    scale = [90, 60]
    np.testing.assert_allclose(
      out.input_boxes[0, 0, :2] * scale, [np.mean(box[::2]), np.mean(box[1::2])], rtol=1e-5
    )
  with pytest.warns(UserWarning, match="pixels are expected, not fractions"):
    processor(photos[0], input_boxes=[[[0.1, 0.2, 0.5, 0.6]]])
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    processor(photos[0], input_boxes=[[[-5, -5, 95, 65], _BOX_A]])  # over the edge is usual
    processor(photos[0], input_boxes=[[[np.nan] * 4, [9, 9, 1, 1]]], input_boxes_labels=[[-10, -10]])
