"""The decisions of phrase video: recorded clips of the authors' code, replayed, and rules by hand."""

import collections
import json

import numpy as np
import pytest

from sam3lt_jax.config import PhraseVideoConfig
from sam3lt_jax.ops import overlap
from sam3lt_jax.processing.masks import mask_bounds
from sam3lt_jax.processing.postprocess import resize_masks, sigmoid
from sam3lt_jax.video import decisions
from sam3lt_jax.video.decisions import Counters, Delay, Observed
from tests.checkpoints.common import fixture
from tests.tiny import jit
from tests.video import replay

Waiting = collections.namedtuple("Waiting", "frame hidden unconfirmed content")
CLIPS = replay.names("video_decisions")
MEMORY_SIDE = 128  # of masks as the recorded memory takes them
areas_of = jit(lambda *arrays: overlap.areas_among_others(*arrays, MEMORY_SIDE))
keeps = jit(
  lambda m, group, rank: overlap.keeps_area(*overlap.areas_among_others(m, group, rank), group, 0.3)
)


def put_out(waiting, never):
  """(ids, relative boxes, masks) as the authors' code puts a frame out."""
  masks, ids, scores = waiting.content
  there = np.array([mask.any() for mask in masks])
  chosen = decisions.choose_outputs(ids, there, never)
  masks = [masks[k].copy() for k in chosen]
  boxes = [mask_bounds(mask) for mask in masks]
  decisions.without_overlap(masks, [scores[k] for k in chosen], [0] * len(chosen))
  return [ids[k] for k in chosen], boxes, masks


def check_output(released, expected, masks):
  """ids, scores, boxes and pixels of one frame that is put out."""
  (ids, boxes, found), counters = released
  assert ids == expected["ids"]
  np.testing.assert_allclose([counters.score[i] for i in ids], expected["probs"], atol=2e-7)
  for box, (x, y, w, h) in zip(boxes, expected["boxes_xywh"]):
    # the authors' boxes end on the last pixel, ours after it
    np.testing.assert_allclose(box, [x * 60, y * 45, (x + w) * 60 + 1, (y + h) * 45 + 1], atol=1e-4)
  for mine, theirs in zip(found, masks):
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", CLIPS)
def test_recorded_clip(name):
  """Every decision, every counter, every pixel put out."""
  clip = replay.Clip("video_decisions", name)
  counters, delay = Counters(), Delay(clip.config)
  before_filter, released = iter(clip.output_masks), []
  final = iter(clip.final_masks)
  for step, frame in enumerate(clip.frames):
    if step == 12:  # as if the program was killed here
      counters = Counters.from_json(json.loads(json.dumps(counters.to_json())))
    kept, seen = replay.observed(clip, step)
    plan = decisions.decide(clip.config, counters, frame["frame"], seen, clip.reverse)
    replay.check_plan(plan, counters, kept, frame)
    detections = clip.detection_masks[frame["frame"]][kept]
    for chosen, recorded in ((plan.new, "new_mask_area"), (plan.reconditioned, "reconditioned")):
      large = resize_masks(detections[list(chosen.values())], (MEMORY_SIDE, MEMORY_SIDE)) > 0
      assert [[i, n] for i, n in zip(chosen, large.sum((1, 2)))] == frame[recorded]
    ids = frame["object_ids_before"]
    tracks = clip.cleaned[clip.tracks(step)].copy()
    tracks[np.isin(ids, plan.suppressed)] = -10
    check_memory_areas(tracks, frame, plan.suppressed)
    scores = [*sigmoid(seen.object_scores), *(counters.score[i] for i in plan.new)]
    ids = [*ids, *plan.new]
    assert ids == frame["output_ids_before_filter"]
    assert dict(zip(map(str, ids), scores)) == pytest.approx(frame["tracker_scores_of_frame"], abs=2e-7)
    masks = []
    for logits in (*tracks, *replay.clean(detections[list(plan.new.values())])):
      large, recorded = resize_masks(logits, replay.SIZE), next(before_filter)
      masks.append(np.where(abs(large) < 1e-6, recorded, large > 0))  # one is 0 but for rounding
      np.testing.assert_array_equal(masks[-1], recorded)
    waiting = Waiting(frame["frame"], plan.hidden, plan.unconfirmed, (masks, ids, scores))
    if clip.settings["add_prompt_first"] and not step:  # is put out at once, and not remembered as such
      out = [(waiting, plan.hidden)]
    else:
      out = delay.push(waiting, counters.removed)
    released += [(*one, frame["frame"]) for one in out]
  released += [(*one, frame["frame"]) for one in delay.finish(counters.removed)]
  assert next(before_filter, None) is None
  assert [w.frame for w, *_ in released] == [o["frame"] for o in clip.outputs]
  assert [after for *_, after in released] == [o["released_after"] for o in clip.outputs]
  for (waiting, never, _), expected in zip(released, clip.outputs):
    masks = [next(final) for _ in expected["ids"]]
    check_output((put_out(waiting, never), counters), expected, masks)
  assert next(final, None) is None


def check_memory_areas(tracks, frame, hidden):
  """What is left of each object where the memory is made of its mask."""
  if not len(tracks):
    return
  n = len(tracks)
  group, rank = np.zeros(16, np.int32), np.arange(16, dtype=np.int32)
  group[n:] = rank[n:]  # slots that hold nothing
  logits = np.concatenate([tracks, np.full((16 - n, *tracks.shape[1:]), np.nan, np.float32)])
  before, after = (np.asarray(x)[:n] for x in areas_of(logits, group, rank))
  gone = after < np.float32(0.3) * np.maximum(before, 1)
  left = np.where(gone, 0, before)
  ids = [i for i, area in zip(frame["object_ids_before"], left) if not area]
  assert [i for i in ids if i not in hidden] == frame["shrink_suppressed"]
  assert left.tolist() == frame["memory_mask_area"]
  assert np.where(left > 0, 10, -10).tolist() == frame["memory_score"]


@pytest.mark.parametrize("name", ["default_0", "crowd"])
def test_recorded_cleaning_of_tracks(name):
  clip = replay.Clip("video_decisions", name)
  np.testing.assert_array_equal(replay.clean(clip.track_masks), clip.cleaned)
  assert (clip.track_masks != clip.cleaned).any()


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("iou", [0.1, 0.5])
def test_recorded_nms(case, iou):
  data = fixture("video_decisions")
  masks, scores = data[f"nms/{case}/masks_int8"] > 0, data[f"nms/{case}/probs"]
  areas = masks.sum((1, 2))
  overlaps = decisions.mask_iou(replay.shared_pixels(masks, masks), areas, areas)
  keep = decisions.keep_detections(scores, overlaps, 0.5, iou)
  np.testing.assert_array_equal(keep, data[f"nms/{case}/keep_iou{iou}"])
  assert keep.any()
  np.testing.assert_array_equal(decisions.keep_detections(scores, overlaps, 0.5, 0), scores > 0.5)


@pytest.mark.parametrize("case", range(4))
def test_recorded_overlap(case):
  data = {k.split("/")[2]: v for k, v in fixture("video_decisions").items() if f"overlap/{case}/" in k}
  masks, scores = data["masks"][:, 0], data["scores"][:, 0]
  rank = np.arange(len(masks), dtype=np.int32)
  kept = np.asarray(keeps(masks, np.zeros_like(rank), rank))
  limited = np.where(kept[:, None, None], masks, np.minimum(masks, -10))
  np.testing.assert_array_equal(limited, data["shrink_suppressed"][:, 0])
  _, after = overlap.areas_among_others(masks, np.zeros_like(rank), rank)
  np.testing.assert_array_equal(after, (data["pixelwise"] > 0).sum((1, 2, 3)))
  left = [mask.copy() for mask in masks > 0]
  decisions.without_overlap(left, scores, [0] * len(left))
  np.testing.assert_array_equal(left, data["objectwise_bool"][:, 0])


# ---------------------------------------------------------------- by hand


def seen(scores, phrases, iou, between=None, areas=None):
  """What `decide` gets, of masks of 100 pixels."""
  iou = np.array(iou, np.float32)
  M = iou.shape[1]
  shared = 200 * iou / (1 + iou)
  between = np.eye(M) * 100 if between is None else 200 * np.array(between) / (1 + np.array(between))
  return Observed(
    np.array(scores, np.float32), np.array(phrases, int), np.full(len(scores), 100), shared,
    np.full(M, 100) if areas is None else np.array(areas), between, np.full(M, 3.0),
  )  # fmt: skip


def test_phrases_do_not_meet():
  """A detection neither joins nor doubles nor hides an object of another phrase."""
  counters, config = Counters(), PhraseVideoConfig()
  first = decisions.decide(config, counters, 0, seen([0.9, 0.6], [0, 1], np.zeros((2, 0))))
  assert list(first.new) == [0, 1]
  everywhere = [[0.9, 0.9], [0.9, 0.9]]
  plan = decisions.decide(config, counters, 1, seen([0.9, 0.9], [0, 1], everywhere, everywhere))
  assert plan.matches.matched == {0: [0], 1: [1]} and not plan.new and not counters.pairs
  counters.last_occluded = {0: 3, 1: 5}
  plan = decisions.decide(config, counters, 6, seen([], [], np.zeros((0, 2)), [[1, 1], [1, 1]]))
  assert plan.suppressed == []
  counters.phrase[1] = 0
  plan = decisions.decide(config, counters, 7, seen([], [], np.zeros((0, 2)), [[1, 1], [1, 1]]))
  assert plan.suppressed == [1]


def test_a_late_phrase_takes_all_that_it_finds():
  """As on the first frame of a clip: objects of other phrases change nothing."""
  counters, config = Counters(), PhraseVideoConfig()
  decisions.decide(config, counters, 0, seen([0.9], [0], np.zeros((1, 0))))
  plan = decisions.decide(config, counters, 5, seen([0.6, 0.6], [0, 1], [[0.0], [0.0]]))
  assert plan.new == {1: 1}


def test_pinned_objects_stay():
  config = PhraseVideoConfig(suppress_unmatched_only_within_hotstart=False, init_trk_keep_alive=1)
  counters = Counters()
  decisions.decide(config, counters, 0, seen([0.9, 0.9], [0, 0], np.zeros((2, 0))))
  counters.pinned.add(1)
  for frame in range(1, 9):
    plan = decisions.decide(config, counters, frame, seen([], [], np.zeros((0, len(counters.ids)))))
  assert counters.ids == [1] and counters.removed == {0} and not plan.hidden


def test_forget_leaves_nothing_behind():
  counters, config = Counters(), PhraseVideoConfig()
  decisions.decide(config, counters, 0, seen([0.9, 0.8], [0, 0], np.zeros((2, 0))))
  decisions.decide(config, counters, 1, seen([0.9], [0], [[0.5, 0.5]]))
  assert counters.pairs == {(0, 1): 1}
  counters.remove({1})
  counters.forget({1})
  assert counters.ids == [0] and not counters.pairs
  text = json.dumps(counters.to_json())
  assert Counters.from_json(json.loads(text)) == counters
  for name in ("phrase", "score", "first_frame", "keep_alive", "last_occluded"):
    assert set(getattr(counters, name)) == {0}, name


def test_object_limit_of_a_full_clip():
  assert decisions.limit_new([0, 1, 2], np.array([0.7, 0.9, 0.8]), 2) == ([1, 2], 1)
  assert decisions.limit_new([0, 1], np.array([0.7, 0.9]), -3) == ([], 2)
  assert decisions.limit_new([2, 0], np.array([0.7, 0.9, 0.8]), 2) == ([2, 0], 0)


@pytest.mark.parametrize("latency", [0, 1, 20])
def test_delay(latency):
  delay = Delay(PhraseVideoConfig(), latency)
  out = []
  for frame in range(5):
    out += [(w.frame, gone) for w, gone in delay.push(Waiting(frame, set(), set(), None), {frame})]
  early = len(out)
  out += [(w.frame, gone) for w, gone in delay.finish({9})]
  assert early == max(5 - latency, 0) and [frame for frame, _ in out] == list(range(5))
  assert [gone for _, gone in out] == [{k + latency} for k in range(early)] + [{9}] * (5 - early)


def test_wrong_numbers_are_named():
  with pytest.raises(ValueError, match="hotstart_delay"):
    PhraseVideoConfig(hotstart_delay=-1)
  with pytest.raises(ValueError, match="profile must be one of 'original', 'transformers', got 'sam2'"):
    PhraseVideoConfig.named("sam2")
  assert PhraseVideoConfig.named("transformers").recondition_on_trk_masks
  assert PhraseVideoConfig.named(PhraseVideoConfig.original()) == PhraseVideoConfig()
