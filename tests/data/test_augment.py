"""Augmentation: image, masks and boxes stay together whatever is drawn, and nothing else changes."""

import dataclasses

import numpy as np
import pytest

from sam3lt_jax.data import augment
from sam3lt_jax.data.augment import NO_AUGMENTATION, Augmentation, AugmentConfig
from sam3lt_jax.processing.masks import mask_bounds
from tests.data import scenes

SIZE = (scenes.HEIGHT, scenes.WIDTH)
FULL = (0, 0, scenes.WIDTH, scenes.HEIGHT)
OBJECTS = scenes.SCENES["a.png"]
MASKS = [scenes.mask_of(*shape) for _, *shape in OBJECTS]
IMAGE = scenes.picture(OBJECTS)
GEOMETRY = AugmentConfig(brightness=0, contrast=0, saturation=0, scale=(0.4, 3.0), aspect=1.5)
PLAIN = AugmentConfig(min_area=1, min_visible=0.0)


def drawn(config, seed, phrases=("red box",)):
  return augment.draw(config, SIZE, phrases, np.random.default_rng(seed))


def test_masks_boxes_and_pixels_agree_after_any_geometry():
  states = set()
  for seed in range(60):
    change = drawn(GEOMETRY, seed)
    image = change.image(IMAGE)
    assert image.shape[:2] == change.out_size
    for (phrase, *_), mask in zip(OBJECTS, MASKS):
      seen = change.object(mask_bounds(mask), mask, PLAIN)
      states.add(seen.state)
      if seen.state == "gone":
        assert not change.mask(mask).any()
        continue
      np.testing.assert_array_equal(seen.box, mask_bounds(seen.mask))
      # Only this object's pixels have its colour (two red ones do not overlap the green one).
      assert (image[seen.mask] == scenes.COLOURS[phrase.split()[0]]).all()
      # A box moved without its mask is never smaller than the mask, and equal to it where nothing is cut.
      moved = change.boxes(mask_bounds(mask))[0]
      assert (moved[:2] <= seen.box[:2]).all() and (moved[2:] >= seen.box[2:]).all()
      if seen.state == "whole":
        np.testing.assert_array_equal(moved, seen.box)
    colours = np.any([(image == c).all(-1) for c in scenes.COLOURS.values()], axis=0)
    np.testing.assert_array_equal(colours, np.any([change.mask(m) for m in MASKS], axis=0))
  assert states == {"whole", "cut", "gone"}  # the seeds do reach all of it


def test_flipping_twice_is_identity():
  flip = Augmentation(SIZE, True, FULL)
  np.testing.assert_array_equal(flip.image(flip.image(IMAGE)), IMAGE)
  assert (flip.image(IMAGE) != IMAGE).any()
  for mask in MASKS:
    once = flip.object(mask_bounds(mask), mask, PLAIN)
    twice = flip.object(once.box, once.mask, PLAIN)
    np.testing.assert_array_equal(twice.mask, mask)
    np.testing.assert_array_equal(twice.box, mask_bounds(mask))
  boxes = np.array([[5, 10, 25, 40], [0.5, 1.25, 79.5, 60]], np.float32)
  np.testing.assert_array_equal(flip.boxes(boxes)[0], [55, 10, 75, 40])
  np.testing.assert_array_equal(flip.boxes(flip.boxes(boxes)), boxes)


def test_a_crop_by_hand():
  # The first box is x 5..25, y 10..40: the window leaves x 10..25 and y 20..40, moved to the window's corner.
  change = Augmentation(SIZE, False, (10, 20, 50, 60))
  seen = change.object(mask_bounds(MASKS[0]), MASKS[0], PLAIN)
  assert seen.state == "cut"
  np.testing.assert_array_equal(seen.box, [0, 0, 15, 20])
  assert seen.mask.shape == (40, 40) and seen.mask.sum() == 15 * 20
  flipped = Augmentation(SIZE, True, (10, 20, 50, 60))  # flipped first: x 55..75, outside
  assert flipped.object(mask_bounds(MASKS[0]), MASKS[0], PLAIN).state == "gone"


def test_zooming_out_shows_grey_and_keeps_everything():
  change = Augmentation(SIZE, False, (-20, -10, 100, 80))
  image = change.image(IMAGE)
  assert image.shape == (90, 120, 3)
  np.testing.assert_array_equal(image[10:70, 20:100], IMAGE)
  assert (image[:10] == augment.FILL).all() and (image[:, 100:] == augment.FILL).all()
  seen = change.object(mask_bounds(MASKS[1]), MASKS[1], PLAIN)
  assert seen.state == "whole"
  np.testing.assert_array_equal(seen.box, [70, 40, 90, 60])


def test_small_rests_of_objects_are_slivers():
  mask, box = MASKS[0], mask_bounds(MASKS[0])  # 20 x 30 pixels at (5, 10)
  window = Augmentation(SIZE, False, (23, 0, 80, 60))  # leaves 2 x 30
  for config, state in (
    (AugmentConfig(min_area=60, min_visible=0.1), "cut"),  # 60 pixels, a tenth
    (AugmentConfig(min_area=61, min_visible=0.0), "sliver"),
    (AugmentConfig(min_area=1, min_visible=0.11), "sliver"),
  ):
    assert window.object(box, mask, config).state == state
    assert window.object(box, None, config).state == state  # by the box where there is no mask
  seen = window.object(box, mask, AugmentConfig(min_area=61))
  assert seen.box is None and seen.mask is None
  # An object that was small before is kept as it is.
  dot = np.zeros(SIZE, bool)
  dot[50, 70] = True
  assert window.object(mask_bounds(dot), dot, AugmentConfig(min_area=100)).state == "whole"


def test_phrases_with_a_side_are_not_flipped():
  config = dataclasses.replace(GEOMETRY, flip=1.0)
  assert drawn(config, 0).flip
  for phrase in ("the left shoe", "Rightmost car", "left-hand drawer", "leftward arrow"):
    assert augment.names_a_side(phrase)
    held, free = drawn(config, 0, ["red box", phrase]), drawn(config, 0)
    assert not held.flip and held.window == free.window  # the other draws are the same
  for phrase in ("leftovers", "bright lamp", "red box", "copyright"):
    assert not augment.names_a_side(phrase)


def test_draws_keep_within_the_configuration():
  config = AugmentConfig(flip=0.25, scale=(0.5, 2.0), aspect=1.0)
  changes = [drawn(config, seed) for seed in range(400)]
  assert 0.15 < np.mean([c.flip for c in changes]) < 0.35
  zooms = np.array([SIZE[0] / c.out_size[0] for c in changes])
  assert 0.5 <= zooms.min() < 0.55 and 1.85 < zooms.max() <= 2.01
  assert 0.4 < np.mean(zooms > 1) < 0.6  # even on a logarithmic scale
  for change in changes:
    x1, y1, x2, y2 = change.window
    assert abs((x2 - x1) / (y2 - y1) - 80 / 60) < 0.04
    inside = x1 >= 0 and y1 >= 0 and x2 <= 80 and y2 <= 60
    around = x1 <= 0 and y1 <= 0 and x2 >= 80 and y2 >= 60
    assert inside or around
    for name in ("brightness", "contrast", "saturation"):
      assert 0.8 <= getattr(change, name) <= 1.2
  assert changes[7] == drawn(config, 7)


def test_no_augmentation_changes_nothing():
  change = drawn(NO_AUGMENTATION, 3)
  assert change == Augmentation(SIZE, False, FULL)
  np.testing.assert_array_equal(change.image(IMAGE), IMAGE)
  np.testing.assert_array_equal(change.mask(MASKS[2]), MASKS[2])


def test_colours_by_hand():
  pixel = np.array([[[100, 50, 200], [60, 60, 60]]], np.uint8)  # mean of all values: 530 / 6 = 88.33

  def factors(**options):
    return Augmentation((1, 2), False, (0, 0, 2, 1), **options).image(pixel)[0].tolist()

  assert factors(brightness=1.5) == [[150, 75, 255], [90, 90, 90]]
  assert factors(contrast=0.5) == [[94, 69, 144], [74, 74, 74]]
  # Grey of the first: 29.9 + 29.35 + 22.8 = 82.05.
  assert factors(saturation=0.0) == [[82, 82, 82], [60, 60, 60]]


@pytest.mark.parametrize(
  ("field", "value"),
  [("flip", 1.5), ("scale", (2.0, 1.0)), ("scale", (0.0, 1.0)), ("aspect", 0.5), ("brightness", 1.0),
   ("saturation", -0.1), ("min_area", 0), ("min_visible", 2.0)],
)  # fmt: skip
def test_wrong_settings(field, value):
  with pytest.raises(ValueError, match=field):
    AugmentConfig(**{field: value})
  with pytest.raises(ValueError, match=r"\(60, 80\), got \(80, 60\)"):
    Augmentation(SIZE, False, FULL).mask(MASKS[0].T)
