"""The bundled model's tracker: its prompts and losses by hand, and what it answers."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.shapes import tracker, tracker_data, tracker_evaluation
from examples.shapes.data import HELD_OUT_SEED
from examples.shapes.tracker_data import ClickBatches, ClipBatches, first_prompt
from sam3lt_jax import Predictor, VideoPredictor, tracker_from_pretrained
from sam3lt_jax.nn.tracker_mask_decoder import Decoded
from sam3lt_jax.shapes.scenes import SceneConfig, draw_clip, draw_scene
from tests import tiny

# As one program: outside of one, every operation is compiled alone.
answer_loss = jax.jit(tracker.answer_loss)
FLOORS = {"click": 0.6, "box": 0.6, "clip": 0.5, "ids": 0.7}


def square(top: int, left: int, side: int) -> np.ndarray:
  mask = np.zeros((120, 120), bool)
  mask[top : top + side, left : left + side] = True
  return mask


def test_first_prompts():
  mask, rng = square(30, 60, 20), np.random.default_rng(0)
  for _ in range(20):
    points, labels = first_prompt(mask, "click", rng)
    x, y = np.round(points[0] * 120).astype(int)
    assert mask[y, x] and labels.tolist() == [1, -10]
    points, labels = first_prompt(mask, "box", rng)
    assert np.abs(points * 120 - [[60, 30], [80, 50]]).max() <= 0.06 * 20 + 1e-4
    assert labels.tolist() == [2, 3]
  assert first_prompt(mask, "mask", rng)[1].tolist() == [-10, -10]


def test_batches_of_clicks():
  """Prompts are on the object that is the answer, or on none and there is no answer."""
  scenes = [draw_scene(i, SceneConfig(min_objects=3)) for i in range(3)]
  owner = np.stack([tracker_data.owners(s) for s in scenes])
  batches = ClickBatches(np.zeros((3, 10, 10, 4), np.float16), owner, images=4, prompts=8, seed=1)
  absent = 0
  for step in range(4):
    batch = batches[step]
    chex.assert_trees_all_equal(batch, batches[step])
    for masks, points, labels in zip(batch["masks"], batch["points"], batch["labels"]):
      for mask, point, label in zip(masks, points, labels):
        absent += not mask.any()
        if mask.any() and label[0] == 1:
          x, y = np.round(point[0] * 120).astype(int)
          assert mask[y, x]
  assert 0 < absent < 4 * 4 * 8 / 3


def test_batches_of_clips():
  clip = np.zeros((2, 8, 120, 120), np.uint8)
  for t in range(8):
    clip[:, t][:, square(10 + 5 * t, 20, 20)] = 1
  clip[:, :, 100:, 100:] = 2
  trunk = np.zeros((2, 8, 10, 10, 4), np.float16)
  batch = ClipBatches(trunk, clip, clips=2, frames=4, objects=2, seed=1)[0]
  assert batch["masks"].shape == (2, 2, 4, 120, 120) and batch["trunk"].shape == (2, 4, 10, 10, 4)
  for masks in batch["masks"]:
    assert masks[:, 0].any(axis=(1, 2)).all()
    assert {bool((of_one[0] == of_one[-1]).all()) for of_one in masks} == {True, False}  # both, one moves


def test_a_correction_is_where_a_mask_is_wrong():
  mask, others, rng = square(30, 30, 40), square(30, 80, 20), np.random.default_rng(0)
  more = less = 0
  for _ in range(20):
    wrong = tracker_data.wrong_mask(mask, others, rng)
    more, less = more + (wrong & ~mask).any(), less + (mask & ~wrong).any()
    assert (wrong != mask).any() and not ((wrong & ~mask).any() and (mask & ~wrong).any())
  assert more > 3 and less > 3
  owner = (mask + 2 * others).astype(np.uint8)[None]
  batches = ClickBatches(np.zeros((1, 10, 10, 4), np.float16), owner, images=1, prompts=40, seed=1)
  batch = {name: x[0] for name, x in batches[0].items()}
  corrections = np.flatnonzero(batch["has_mask"] & (batch["labels"][:, 0] >= 0))
  assert len(corrections) > 3
  for i in corrections:
    x, y = np.round(batch["points"][i, 0] * 120).astype(int)
    assert batch["labels"][i, 0] == batch["masks"][i, y, x]


def test_the_loss_of_right_and_wrong_answers():
  truth = jnp.zeros((2, 120, 120)).at[0, 30:60, 30:60].set(1.0)  # the second object is not there
  mask = jnp.full((40, 40), -60.0).at[10:20, 10:20].set(60.0)
  right = Decoded(
    jnp.stack([mask[None].repeat(4, 0)] * 2), jnp.array([[1.0] * 4, [0.0] * 4]), jnp.array([[30.0], [-30.0]]),
    jnp.zeros((2, 4, 8)),
  )  # fmt: skip
  loss, found = answer_loss(right, truth)
  assert loss < 0.1 and found["iou"] == 1 and found["there"] == 1
  unsure = right._replace(object_score_logits=-right.object_score_logits)
  assert answer_loss(unsure, truth)[0] > loss + 0.5 * 29
  worse = right._replace(masks=-right.masks)
  assert answer_loss(worse, truth)[0] > loss + 1
  # One good mask of three is enough, beside the single one.
  one = right._replace(masks=right.masks.at[:, 2:].multiply(-1))
  np.testing.assert_allclose(answer_loss(one, truth)[0] - jnp.square(1.0) * 2 / 4 / 2, loss, atol=1e-5)


def test_next_click():
  truth, found = square(30, 30, 30), square(30, 30, 30)
  found[30:60, 30:33] = False  # a strip is missing, a larger square too much
  found[90:110, 90:110] = True
  at, label = tracker_evaluation.next_click(found, truth)
  assert label == 0 and max(abs(at[0] - 99.5), abs(at[1] - 99.5)) <= 1
  assert tracker_evaluation.next_click(truth, truth)[1] == 1


def test_the_bundled_tracker_answers_clicks_and_outlines():
  """On five scenes that nobody trained on; floors under what 100 of them gave (docs/clicks.md)."""
  predictor = Predictor.from_pretrained("shapes", tracker=True, compile_ahead=False)
  scenes = [draw_scene(HELD_OUT_SEED + i, SceneConfig(min_objects=1)) for i in range(5)]
  ious = {"click": [], "box": []}
  for scene in scenes:
    predictor.set_image(scene.image)
    for thing in scene.objects:
      x, y = tracker_evaluation.centre(thing.mask)
      for kind, prompt in (("click", {"points": [x, y]}), ("box", {"box": list(thing.box)})):
        (mask,) = predictor.predict(**prompt).masks
        ious[kind].append((mask & thing.mask).sum() / (mask | thing.mask).sum())
  assert len(ious["click"]) > 10
  assert np.mean(ious["click"]) > FLOORS["click"] and np.mean(ious["box"]) > FLOORS["box"]


@pytest.fixture(scope="module")
def video():
  return VideoPredictor.from_pretrained("shapes", tracker=True, compile_ahead=False)


@pytest.mark.full  # compiles what follows objects; tests/video does it on recordings
def test_the_bundled_tracker_follows(video):
  """Objects that are clicked on once, on clips that nobody trained on."""
  found = tracker_evaluation.clips(video.engine, count=2, frames=12)
  assert found["frames"] > 40 and found["J"] > FLOORS["clip"], found


@pytest.mark.full  # compiles the detector as well
def test_the_bundled_model_keeps_its_numbers(video):
  """What a phrase finds on the first frame of a clip has the same id on the last one."""
  same = []
  for seed in (HELD_OUT_SEED, HELD_OUT_SEED + 3):
    drawn = draw_clip(seed, 12)
    first, *_, last = video.track([scene.image for scene in drawn], text="shape")
    for start, end in zip(drawn[0].objects, drawn[-1].objects):
      i, j = (number(frame, thing.mask) for frame, thing in ((first, start), (last, end)))
      same += [i == j] if i is not None and j is not None else []
  assert len(same) > 3 and np.mean(same) > FLOORS["ids"], same


def number(frame, truth: np.ndarray) -> int | None:
  """The id of what covers an object by more than half, if anything does."""
  for i, mask in zip(frame.ids, frame.masks):
    if (mask & truth).sum() > 0.5 * (mask | truth).sum():
      return int(i)
  return None


@pytest.mark.full
def test_both_stages(tmp_path):
  clicks, clips = tracker.ClicksRun(), tracker.ClipsRun()
  short, quick = {"steps": 2, "scenes": 6}, {"total_steps": 2, "warmup_steps": 1}
  clicks = dataclasses.replace(
    clicks, **short, images=2, prompts=2, optimizer=dataclasses.replace(clicks.optimizer, **quick)
  )
  clips = dataclasses.replace(
    clips, **short, length=4, frames=3, clips=1, optimizer=dataclasses.replace(clips.optimizer, **quick)
  )
  with tiny.hurry():
    tracker.train(clicks, clips, str(tmp_path))
  model, variables = tracker_from_pretrained(tmp_path / "tracker", progress=False)
  assert model.config == tracker.tracker_config()
  # Killed and started again at the very end: nothing is trained again, and the same tracker comes out.
  with tiny.hurry():
    tracker.train(clicks, clips, str(tmp_path))
  again = tracker_from_pretrained(tmp_path / "tracker", progress=False)[1]
  chex.assert_trees_all_equal(again, variables)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(again))
