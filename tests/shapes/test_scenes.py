"""Scenes: exact, repeatable, and true to what they claim to hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sam3lt_jax.shapes.scenes import (
  COLOURS,
  KINDS,
  PATTERNS,
  SIZES,
  SceneConfig,
  draw_clip,
  draw_scene,
  tight_box,
)


def test_a_scene_depends_on_its_seed_alone():
  a, b, c = draw_scene(5), draw_scene(5), draw_scene(6)
  np.testing.assert_array_equal(a.image, b.image)
  assert [o.box for o in a.objects] == [o.box for o in b.objects]
  assert (a.image != c.image).any()


def test_the_scene_of_a_seed_never_changes():
  """The bundled model's held-out scenes must stay the same scenes."""
  scene = draw_scene(1_000_000_000)
  looks = [(o.size, o.pattern, o.colour, o.kind) for o in scene.objects]
  assert looks[:2] == [("large", "plain", "green", "square"), ("small", "checked", "green", "square")]
  assert len(looks) == 5
  np.testing.assert_allclose(scene.image.sum(), 5_277_160, rtol=1e-3)  # Pillow may round otherwise one day


def test_masks_are_disjoint_tight_and_visible():
  counts = []
  for seed in range(60):
    scene = draw_scene(seed)
    counts.append(len(scene.objects))
    assert scene.image.shape == (120, 120, 3) and scene.image.dtype == np.uint8
    together = np.zeros((120, 120), int)
    for thing in scene.objects:
      together += thing.mask
      assert thing.mask.sum() > 20 and thing.box == tight_box(thing.mask)
      assert thing.kind in KINDS and thing.colour in COLOURS
      assert thing.pattern in PATTERNS and thing.size in SIZES
    assert together.max(initial=0) <= 1
  assert min(counts) == 0 and max(counts) == 8


def test_plain_objects_have_their_colour():
  """What is under the mask of a plain object is its colour, up to its jitter, noise and clutter's absence."""
  seen = 0
  for seed in range(80):
    scene = draw_scene(seed)
    for thing in scene.objects:
      if thing.pattern == "plain":
        seen += 1
        pixels = np.median(scene.image[thing.mask], axis=0)
        near = {name: np.abs(pixels - rgb).sum() for name, rgb in COLOURS.items()}
        assert min(near, key=near.get) == thing.colour, (seed, thing.kind, pixels)
  assert seen > 50


@pytest.mark.full  # 3 s
def test_sizes_do_not_overlap():
  """Side of the box over the side of the scene, of whole circles: small, medium and large stay apart."""
  extent = {size: [] for size in SIZES}
  for seed in range(400):
    scene = draw_scene(seed)
    for thing in scene.objects:
      x1, y1, x2, y2 = thing.box
      whole = thing.mask.sum() > 0.76 * (x2 - x1) * (y2 - y1)  # pi / 4 of its box
      if thing.kind == "circle" and whole and abs((x2 - x1) - (y2 - y1)) <= 1:
        extent[thing.size].append((x2 - x1) / 120)
  assert all(extent.values())
  assert max(extent["small"]) < min(extent["medium"]) and max(extent["medium"]) < min(extent["large"])


def test_configuration():
  assert draw_scene(3, SceneConfig(max_objects=0)).objects == ()
  assert draw_scene(3, dataclasses.replace(SceneConfig(), side=64)).image.shape == (64, 64, 3)
  with pytest.raises(ValueError, match="max_objects must be 0 to 32, got 50"):
    SceneConfig(max_objects=50)
  crowded = [len(draw_scene(seed, SceneConfig(min_objects=4)).objects) for seed in range(20)]
  assert min(crowded) >= 3 and np.mean(crowded) > 4
  with pytest.raises(ValueError, match="min_objects must be 0 to max_objects = 8, got 9"):
    SceneConfig(min_objects=9)
  with pytest.raises(ValueError, match="side must be at least 32"):
    SceneConfig(side=8)


def test_the_objects_of_a_clip_move_and_stay_the_same():
  hidden = 0
  for seed in range(6):
    clip, again = draw_clip(seed, 20), draw_clip(seed, 6)
    np.testing.assert_array_equal(clip[5].image, again[5].image)  # however long the clip is
    looks = [[(o.size, o.pattern, o.colour, o.kind) for o in scene.objects] for scene in clip]
    assert all(of_frame == looks[0] for of_frame in looks)
    for thing, later in zip(clip[0].objects, clip[-1].objects):
      assert (thing.mask != later.mask).any()
    for scene in clip:
      assert sum(o.mask.astype(int) for o in scene.objects).max() <= 1
      for thing in scene.objects:
        assert thing.box == (tight_box(thing.mask) if thing.mask.any() else (0.0,) * 4)
        hidden += not thing.mask.any()
  assert hidden  # some leave the picture, or go behind another
