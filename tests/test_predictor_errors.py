"""What the predictor refuses, and how it says so."""

import re

import jax
import numpy as np
import pytest

from sam3lt_jax import Predictor
from tests import tiny

PHOTO = np.random.default_rng(0).integers(0, 256, (60, 90, 3)).astype(np.uint8)
BOXES = [[10, 5, 40, 30], [50, 20, 80, 55.5]]


@pytest.fixture(scope="module")
def base():
  loaded = tiny.load(tiny.config(vocab_size=49408))
  with tiny.hurry():
    return Predictor(*loaded)


def refused(message, call, *args, error=ValueError, **kwargs):
  with pytest.raises(error, match=message):
    call(*args, **kwargs)


@pytest.mark.parametrize(
  "message, kwargs",
  [
    ("nothing to look for: give text, boxes or both", {}),
    ("nothing to look for", {"boxes": []}),
    ("text must be a phrase or a list of phrases, got", {"text": []}),
    ("text must be a phrase or a list of phrases, got", {"text": ["a", None]}),
    ("text must be a phrase or a list of phrases, got", {"text": ["a", 3]}),
    ("box_labels were given without boxes", {"text": "a", "box_labels": [1]}),
    ("box_labels were given without boxes", {"text": "a", "boxes": [], "box_labels": []}),
    ("has 1 labels for 2 boxes", {"boxes": BOXES, "box_labels": [1]}),
    ("has 3 labels for 2 boxes", {"boxes": BOXES, "box_labels": [1, 0, 1]}),
    (r"must be 1 \(like this\), 0 \(not like this\)", {"boxes": BOXES, "box_labels": [1, 2]}),
    (r"box 1 .*inverted", {"boxes": [BOXES[0], [40, 5, 10, 30]]}),
    (r"box 0 .*inverted", {"boxes": [10, 30, 40, 5]}),
    (r"box 0 .*finite", {"boxes": [[10, np.nan, 40, 30]]}),
    (r"box 0 .*finite", {"boxes": [[10, 5, np.inf, 30]]}),
    (r"four numbers", {"boxes": [[10, 5, 40]]}),
    (r"four numbers", {"boxes": [[10, 5, 40, "x"]]}),
    ("threshold must be in", {"text": "a", "threshold": 1.5}),
    ("threshold must be in", {"text": "a", "threshold": -0.1}),
    ("threshold must be in", {"text": "a", "threshold": np.nan}),
    ("threshold must be a number", {"text": "a", "threshold": "high"}),
    ("mask_threshold must be in", {"text": "a", "mask_threshold": 2}),
  ],
)
def test_prompts_that_cannot_be_meant(base, message, kwargs):
  refused(message, base, PHOTO, **kwargs)
  base.set_image(PHOTO)
  refused(message, base.predict, **kwargs)


@pytest.mark.parametrize(
  "message, text, boxes, labels",
  [
    ("text must have one entry an image: 2 expected, got 3", [["a"], ["b"], ["c"]], None, None),
    ("boxes must have one entry an image: 2 expected, got 1", "a", [BOXES], None),
    ("box_labels must have one entry an image: 2 expected, got 1", "a", [BOXES, BOXES], [[1, 0]]),
    ("box_labels were given without boxes", "a", [BOXES, None], [[1, 0], [1]]),
    ("nothing to look for", [["a"], None], None, None),
  ],
)
def test_lists_that_do_not_match_the_images(base, message, text, boxes, labels):
  refused(message, base, [PHOTO, PHOTO], text, boxes, labels)


def test_messages_name_the_predictors_own_forms_and_the_image(base):
  nested = [[[10, 5, 40, 30]]]  # as the processor and transformers have them
  message = (
    r"box 0 of the image must be four numbers .*one level of nesting too many.*\[\[x1, y1, x2, y2\], \.\.\.\]"
  )
  for boxes in (nested, np.asarray(nested), jax.numpy.asarray(nested)):
    refused(message, base, PHOTO, boxes=boxes)
  two = [PHOTO, PHOTO]
  refused("nothing to look for in image 1: give text, boxes or both", base, two, [["a"], None])
  refused("nothing to look for in image 0", base, two, boxes=[None, BOXES])
  refused("box_labels were given without boxes for image 1", base, two, "a", [BOXES, None], [[1, 0], [1]])
  refused(r"box_labels: image 1 has 1 labels for 2 boxes", base, two, "a", [BOXES, BOXES], [[1, 0], [1]])
  refused(r"box 1 of image 1 has 7", base, two, "a", [BOXES, BOXES], [None, [1, 7]])
  refused("boxes: box 0 of image 1 is inverted", base, two, "a", [None, [[40, 5, 10, 30]]])
  refused("text of image 1 must be a phrase or a list of phrases, got 3", base, two, ["a", 3])
  for boxes in (nested, [["x"]], [[1, 2, 3]], "boxes", [[1, 2, np.nan, 4]], {"a": 1}):
    for images, given in ((PHOTO, boxes), (two, [boxes, None])):
      with pytest.raises(ValueError) as error:
        base(images, "a", given)
      assert "prompt" not in str(error.value) and "input_boxes" not in str(error.value)


@pytest.mark.parametrize("kwargs", [{"text": 3}, {"boxes": 3}])
@pytest.mark.parametrize("images", [PHOTO, [PHOTO, PHOTO]], ids=["one", "several"])
def test_prompts_of_another_type(base, images, kwargs):
  refused(next(iter(kwargs)), base, images, **kwargs)


def test_boxes_of_one_image_for_several(base):
  """Two boxes for two images, one level of nesting missing: not one box an image."""
  refused("boxes", base, [PHOTO, PHOTO], "a", BOXES)


def test_images_that_are_none(base, tmp_path):
  refused("image", base, 3, "a")
  refused("channels first", base, np.zeros((3, 40, 50), np.uint8), "a")
  refused("nowhere", base, tmp_path / "nowhere.png", "a", error=FileNotFoundError)


def test_predict_needs_an_image():
  refused("call set_image", Predictor(*tiny.load(tiny.config())).predict, "a")


@pytest.mark.parametrize("sizes", [(0,), (4, 1), (2, 2), (-1, 3)])
def test_buckets_ascend(sizes):
  for name in ("prompt_buckets", "box_buckets"):
    refused(
      f"{name} must be ascending positive sizes, got {re.escape(str(sizes))}",
      Predictor,
      *tiny.load(tiny.config()),
      **{name: sizes},
    )


@pytest.mark.parametrize("function", ["_encode", "_read", "_detect"])
def test_no_device_memory_says_what_to_lower(base, monkeypatch, function):
  def replace(program):
    monkeypatch.setattr(base.engine, function, program)
    if function == "_read":
      monkeypatch.setattr(base.engine.phrases, "_read", program)

  def fail(*_args, message="RESOURCE_EXHAUSTED: Out of memory allocating 123456789 bytes.\nlong dump"):
    raise jax.errors.JaxRuntimeError(message)

  replace(fail)
  message = r"too little memory .*dtype='bfloat16'.*prompt_buckets.*image_size.*123456789 bytes\.\)$"
  refused(message, base, PHOTO, "not seen before", error=MemoryError)
  replace(lambda *_: fail(message="INTERNAL: something else"))
  refused("INTERNAL: something else", base, PHOTO, "not seen before", error=jax.errors.JaxRuntimeError)
