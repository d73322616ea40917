"""Clicks, outlines and masks through `Predictor` and `SamPredictor`; a tiny model, the recorded tracker."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from sam3lt_jax import Predictor, SamPredictor, tracker_from_pretrained
from sam3lt_jax.processing.clicks import mask_logits
from tests import tiny
from tests.parity import tracker as reference
from tests.test_predictor import photo

HEIGHT, WIDTH = 60, 90
POINT, OTHER = [30.0, 20.0], [70.0, 45.0]


@pytest.fixture(scope="module")
def predictor():
  config = tiny.config(vocab_size=49408)
  with tiny.hurry():
    made = Predictor(*tiny.load(config), tracker=reference.load())
  return made.set_image(photo(HEIGHT, WIDTH))


def test_one_object_a_prompt(predictor):
  one = predictor.predict(points=POINT)
  assert len(one) == 1 and one.labels == ("object",)
  assert one.masks.shape == (1, HEIGHT, WIDTH) and one.logits.shape == (1, 24, 24)
  several = predictor.predict(points=[[POINT], [OTHER]])
  assert several.labels == ("object 1", "object 2")
  outlines = predictor.predict(box=[[10, 10, 40, 40], [50, 5, 80, 50], [0, 0, 90, 60]])
  assert len(outlines) == 3
  for mask, box in zip(outlines.masks, outlines.boxes):
    ys, xs = np.nonzero(mask)
    if len(ys):
      assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_neighbours_order_and_slots_change_nothing(predictor):
  many = [POINT, OTHER, [5.0, 5.0], [80.0, 10.0], [40.0, 50.0]]  # more than the first bucket holds
  labels = [1, 0, 1, 1, 0]
  alone = predictor.predict(points=[POINT])
  among = predictor.predict(points=[[POINT], many, [OTHER]], point_labels=[[1], labels, [1]])
  np.testing.assert_allclose(among.logits[0], alone.logits[0], atol=1e-4)
  assert (among.masks[0] != alone.masks[0]).mean() < 1e-3
  turned = predictor.predict(points=many[::-1], point_labels=labels[::-1])
  np.testing.assert_allclose(turned.logits[0], among.logits[1], atol=1e-4)


def test_phrases_and_clicks_share_one_encoding(predictor):
  started = []
  predictor.engine.on_start = lambda start, output: started.append(output)
  try:
    predictor.set_image(photo(HEIGHT, WIDTH, seed=1))
    encodings = len(started)
    predictor.predict("a star", threshold=0.0)
    predictor.predict(points=POINT)
    predictor.predict(points=OTHER)
    assert (encodings, len(started)) == (1, 4)
  finally:
    predictor.engine.on_start = lambda start, output: None
    predictor.set_image(photo(HEIGHT, WIDTH))


def test_a_photo_without_clicks_does_not_pay_for_the_tracker(predictor, monkeypatch):
  monkeypatch.setattr(predictor.engine, "_neck", None)  # cannot be called
  assert predictor(photo(HEIGHT, WIDTH), text="a star") is not None
  with pytest.raises(TypeError):
    predictor.encode(photo(HEIGHT, WIDTH))


def test_a_first_click_compiles_nothing_new(predictor):
  """What is compiled ahead is what a click then runs."""
  with tiny.hurry():
    fresh = Predictor(
      predictor.model, predictor.variables, predictor.processor, fuse=False, tracker=reference.load()
    )
    fresh.engine._encode = predictor.engine._encode
    fresh.engine.compile_ahead()
    fresh.engine._ahead.wait()
  assert len(fresh.engine._click.compiled()) == 1
  fresh.set_image(photo(HEIGHT, WIDTH))
  fresh.predict(points=POINT)
  fresh.predict(points=[POINT, OTHER], point_labels=[1, 0])
  assert len(fresh.engine._click.compiled()) == 1


def test_a_click_survives_another_size_of_the_image(predictor):
  image = photo(HEIGHT, WIDTH)
  small = predictor.predict(points=POINT)
  large = np.asarray(Image.fromarray(image).resize((3 * WIDTH, 3 * HEIGHT), Image.Resampling.NEAREST))
  predictor.set_image(large)
  again = predictor.predict(points=[3 * v for v in POINT])
  predictor.set_image(image)
  assert again.masks.shape == (1, 3 * HEIGHT, 3 * WIDTH)
  assert np.abs(again.logits - small.logits).max() < 0.15 * np.abs(small.logits).max()


def test_a_click_stands_in_the_frame_that_is_seen(predictor, tmp_path):
  image = Image.fromarray(photo(HEIGHT, WIDTH))
  exif = image.getexif()
  exif[0x0112] = 6  # to be turned by 90 degrees clockwise
  image.save(tmp_path / "turned.png", exif=exif)
  predictor.set_image(tmp_path / "turned.png")
  found = predictor.predict(points=[HEIGHT - 1.0, WIDTH - 1.0])
  assert found.size == (WIDTH, HEIGHT)
  upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
  same = predictor.set_image(upright).predict(points=[HEIGHT - 1.0, WIDTH - 1.0])
  np.testing.assert_array_equal(found.masks, same.masks)
  predictor.set_image(photo(HEIGHT, WIDTH))


def test_refine_starts_from_the_instance(predictor):
  first = predictor.predict(points=[[POINT], [OTHER]])
  better = predictor.refine(first, 1, points=[OTHER, POINT], point_labels=[1, 0])
  np.testing.assert_array_equal(better.masks[0], first.masks[0])
  assert better.labels == first.labels
  direct = predictor.predict(points=[OTHER, POINT], point_labels=[1, 0], mask=first.logits[1])
  np.testing.assert_array_equal(better.masks[1], direct.masks[0])
  np.testing.assert_array_equal(better.logits[1], direct.logits[0])
  without = predictor.predict(points=[OTHER, POINT], point_labels=[1, 0])
  assert np.abs(without.logits - direct.logits).max() > 1e-3
  of_phrase = predictor.predict("a star", threshold=0.0)[:2]
  again = predictor.refine(of_phrase, -1, points=POINT)
  assert again.labels == of_phrase.labels and again.logits is None
  np.testing.assert_array_equal(again.masks[0], of_phrase.masks[0])


def test_refining_on_a_huge_picture_makes_one_mask(predictor, monkeypatch):
  wanted = predictor.refine(predictor.predict("a star", threshold=0.0)[:2], 1, points=POINT)
  monkeypatch.setattr("sam3lt_jax.processing.results.PACKED_ABOVE", 1)
  of_phrase = predictor.predict("a star", threshold=0.0)[:2]
  again = predictor.refine(of_phrase, 1, points=POINT)
  assert "masks" not in of_phrase.__dict__ and "masks" not in again.__dict__
  np.testing.assert_array_equal(again.masks, wanted.masks)


def test_a_given_mask_becomes_logits():
  mask = np.zeros((6, 9), bool)
  mask[:3, :3] = True
  assert mask_logits(mask, 3).tolist() == [[10, -10, -10], [0, -10, -10], [-10, -10, -10]]
  assert mask_logits(mask[:1, :3], 6).tolist() == np.full((6, 6), 10).tolist()


def test_as_segment_anything(predictor):
  sam = SamPredictor(predictor)
  sam.set_image(photo(HEIGHT, WIDTH))
  masks, scores, low = sam.predict(np.array([POINT]), np.array([1]))
  assert masks.shape == (3, HEIGHT, WIDTH) and masks.dtype == bool
  assert scores.shape == (3,) and low.shape == (3, 24, 24)
  best = predictor.predict(points=POINT)
  np.testing.assert_array_equal(best.masks[0], masks[scores.argmax()])
  one, score, _ = sam.predict(np.array([POINT, OTHER]), np.array([1, 0]), multimask_output=False)
  assert one.shape == (1, HEIGHT, WIDTH) and score.shape == (1,)
  again, _, _ = sam.predict(np.array([POINT]), np.array([1]), mask_input=low[:1], multimask_output=False)
  assert again.shape == (1, HEIGHT, WIDTH)
  logits, _, _ = sam.predict(np.array([POINT]), return_logits=True)
  np.testing.assert_array_equal(logits > 0, masks)
  batch, scores, low = sam.predict(
    np.array([[POINT], [OTHER]]), np.array([[1], [1]]), box=np.array([[0, 0, 50, 50], [40, 30, 90, 60]])
  )
  assert batch.shape == (2, 3, HEIGHT, WIDTH) and scores.shape == (2, 3) and low.shape == (2, 3, 24, 24)
  bgr = photo(HEIGHT, WIDTH)[..., ::-1]
  sam.set_image(bgr, "BGR")
  np.testing.assert_array_equal(sam.predict(np.array([POINT]))[0], masks)
  with pytest.raises(ValueError, match="image_format must be 'RGB' or 'BGR', got 'GRB'"):
    sam.set_image(bgr, "GRB")
  sam.reset_image()
  with pytest.raises(ValueError, match="no image is set: call set_image"):
    sam.predict(np.array([POINT]))
  predictor.set_image(photo(HEIGHT, WIDTH))


WRONG = {
  "points must lie in the image of 90x60 pixels, got [91.0, 3.0]": {"points": [91, 3]},
  "points: object 1 must lie in the image": {"points": [[[1, 1]], [[1, -2]]]},
  "points must be finite, got": {"points": [float("nan"), 3]},
  "points must be [x, y], [[x, y], ...] of one object or": {"points": 3},
  "points must be [[x, y], ...] in pixels, got": {"points": [[1, 2, 3]]},
  "points must be [[x, y], ...] in pixels, got [[1000": {"points": [10**400, 3]},
  "points: object 1 must hold at least one point": {"points": [[[1, 1]], []]},
  "point_labels must be 1 (on the object) or 0 (off it), got 2": {"points": [1, 1], "point_labels": 2},
  "point_labels must be nested as points": {"points": [[1, 1]], "point_labels": [[1]]},
  "point_labels must be one a point: 2 expected, got 1": {"points": [[1, 1], [2, 2]], "point_labels": [1]},
  "point_labels were given without points": {"point_labels": [1], "box": [1, 1, 2, 2]},
  "box must be one an object, got several for one": {"box": [[[1, 1, 2, 2], [3, 3, 4, 4]]]},
  "points and box must be for the same objects, one each; got points for 1, box for 2": {
    "points": [1, 1], "box": [[1, 1, 2, 2], [3, 3, 4, 4]],
  },
  "box must have x1 <= x2 and y1 <= y2": {"box": [5, 5, 1, 1]},
  "box must meet the image of 90x60 pixels": {"box": [100, 0, 110, 5]},
  "box must be (x1, y1, x2, y2) in pixels, one an object": {"box": [1, 2, 3]},
  "box must be (x1, y1, x2, y2) in pixels, one an object, got [1, 2": {"box": [1, 2, 3, 10**400]},
  "mask must be bool [60, 90] as the image or logits [24, 24]": {"mask": np.zeros((7, 7))},
  "mask must be finite": {"mask": np.full((24, 24), np.nan)},
  "this one is no logits and holds more than 0 and 1": {"mask": np.full((60, 90), 7)},
  "points means one object, text all that match": {"points": [1, 1], "text": "star"},
  "box means one object, boxes all that match": {"box": [1, 1, 2, 2], "boxes": [[1, 1, 2, 2]]},
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_a_sentence(predictor, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    predictor.predict(**WRONG[message])


def test_without_a_tracker(predictor):
  with tiny.hurry():
    plain = Predictor(predictor.model, predictor.variables, predictor.processor, fuse=False)
  with pytest.raises(ValueError, match="no image is set"):
    plain.predict(points=POINT)
  plain.engine._encode = lambda *_: predictor._image[0].replace(tracker=None)
  plain.engine._ahead.wait()
  plain.set_image(photo(HEIGHT, WIDTH))
  with pytest.raises(ValueError, match=r"no tracker is loaded.*tracker='facebook/sam3'"):
    plain.predict(points=POINT)
  with pytest.raises(ValueError, match="no tracker is loaded"):
    SamPredictor(plain)


def test_a_tracker_of_another_trunk():
  tracker = tracker_from_pretrained("random:tiny", progress=False)
  with pytest.raises(ValueError, match=r"tracker must be for this model's trunk \(32 wide"):
    Predictor(*tiny.load(tiny.config()), tracker=tracker)


def test_several_images_in_turn(predictor):
  """An image of `encode` is asked beside the one of `set_image`, which stays."""
  other = predictor.encode(photo(30, 40, seed=1))
  mine = predictor.predict(points=POINT)
  theirs = predictor.predict(points=[20, 10], image=other)
  assert (mine.size, theirs.size) == ((HEIGHT, WIDTH), (30, 40))
  better = predictor.refine(theirs, 0, points=[[20, 10], [3, 3]], point_labels=[1, 0], image=other)
  assert better.size == (30, 40)
  assert predictor.predict("a star", threshold=0.0, image=other).size == (30, 40)
  np.testing.assert_array_equal(predictor.predict(points=POINT).masks, mine.masks)
  with pytest.raises(ValueError, match=r"results must be of this image, \(30, 40\), got results of"):
    predictor.refine(mine, 0, points=[3, 3], image=other)
  with pytest.raises(ValueError, match=r"image must be what encode\(photo\) returned, got str"):
    predictor.predict(points=POINT, image="street.jpg")
