"""Names that other libraries have for our arguments: what is said of them."""

import numpy as np
import pytest

from sam3lt_jax import Predictor, errors, from_pretrained, tracker_from_pretrained
from tests import tiny

PHOTO = np.zeros((60, 90, 3), np.uint8)


@pytest.fixture(scope="module")
def base():
  with tiny.hurry():
    return Predictor(*tiny.load(tiny.config(vocab_size=49408)))


@pytest.mark.parametrize(
  "name, says",
  [
    ("device_map", "device_map is no argument of Predictor.from_pretrained; here it is device ('cpu', 'gpu'"),
    ("torch_dtype", "here it is dtype ('float32' or 'bfloat16')"),
    ("half", "here it is dtype='bfloat16'"),
    ("imgsz", "here it is image_size (a multiple of 14)"),
    ("devcie", "here it is device"),
    ("xyzzy", "accepted: source, tracker, config, profile"),
  ],
)
def test_loading(name, says):
  with pytest.raises(ValueError) as told:
    Predictor.from_pretrained("shapes", **{name: 1})
  assert says in str(told.value) and isinstance(told.value, TypeError)


def test_the_same_for_the_functions():
  for load in (from_pretrained, tracker_from_pretrained):
    with pytest.raises(ValueError, match=r"torch_dtype is no argument of .*; here it is dtype"):
      load("random:tiny", torch_dtype="bfloat16")
  with pytest.raises(ValueError, match="device_map is no argument of Predictor; here it is device"):
    Predictor(*tiny.load(tiny.config()), device_map="cpu")


@pytest.mark.parametrize(
  "name, says",
  [
    ("conf", "conf is no argument of Predictor; here it is threshold"),
    ("stream", "here it is the method stream(images, text)"),
    ("points", "points is no argument of Predictor; here it is points of predict, after set_image(image)"),
    ("imgsz", "here it is image_size of from_pretrained"),
    ("half", "here it is dtype='bfloat16' of from_pretrained"),
    ("txt", "here it is text"),
    ("prompt", "here it is text"),
    ("bboxes", "here it is boxes"),
    ("image", "here it is images"),
    ("max_det", "here it is results.top_k(number)"),
  ],
)
def test_calling(base, name, says):
  with pytest.raises(ValueError) as told:
    base(PHOTO, **{name: 1})
  assert says in str(told.value)


def test_predicting(base):
  for call in (
    base.predict,
    lambda **more: base.stream([PHOTO], **more),
    lambda **more: base.refine(None, 0, **more),
  ):
    with pytest.raises(ValueError, match=r"conf is no argument of Predictor\.\w+; here it is threshold"):
      call(conf=0.5)
  with pytest.raises(ValueError, match=r"point_coords is no argument .* here it is points of predict"):
    base.predict(point_coords=[[1, 2]])
  with pytest.raises(TypeError, match="missing 1 required positional argument"):
    base.stream([PHOTO])


def test_names_are_theirs_and_not_ours():
  """What is ours stands in the table only where it is of another function."""
  assert not {"text", "boxes", "threshold", "dtype", "device"} & errors._OURS.keys()
