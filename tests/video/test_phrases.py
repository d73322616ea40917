"""Phrase video: whole clips of the authors' code with their detections, and what must not change a result."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from sam3lt_jax.features import Detections
from sam3lt_jax.kept import MaskSource
from sam3lt_jax.video import decisions
from sam3lt_jax.video.phrases import Found, FrameObjects, PhraseTracks, frame_results
from tests.video import replay
from tests.video.common import engine, recorded

CLIPS = ("default", "strict", "add_prompt_first")
TOLERANCE = 2e-3  # of logits to 30; a stored memory may differ by one step of bfloat16


@pytest.fixture(scope="module", autouse=True)
def precision():
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def clip_of(name: str) -> replay.Clip:
  return replay.Clip("phrase_video", name)


def found(clip: replay.Clip, frames: list[int], phrase: int = 0) -> Found:
  """The scripted detections of some frames."""
  scores, masks = clip.detection_scores[frames][:, None], clip.detection_masks[frames][:, None]
  boxes = np.zeros((*scores.shape, 4), np.float32)
  return Found(np.full((len(frames), 1), phrase), jax.device_put(Detections(scores, boxes, masks)))


def start(clip: replay.Clip, group_rules: bool = False, slots: int = 4, **options) -> PhraseTracks:
  """With room for all its objects, so that little is compiled."""
  options = {"frames": 24} | options
  return PhraseTracks(engine(group_rules=group_rules), replay.SIZE, clip.config, slots=slots, **options)


def advance(tracks: PhraseTracks, clip: replay.Clip, frame: int, phrases=(0,)) -> list[FrameObjects]:
  return tracks.step(frame, recorded((frame,)), 0, [found(clip, [frame], p) for p in phrases])


def results(objects: FrameObjects, texts=("thing",)):
  return frame_results(MaskSource(engine().mesh, False, "upsample_then_sigmoid"), objects, texts, replay.SIZE)


# ---------------------------------------------------------------- against the authors' code


@pytest.mark.parametrize("name", CLIPS)
def test_recorded_clip(name, monkeypatch):
  """Every decision and every counter; masks as they are tracked; ids, boxes and pixels that are put out."""
  clip, plans = clip_of(name), []
  decide = decisions.decide
  monkeypatch.setattr(decisions, "decide", lambda *a: plans.append((decide(*a), a[1])) or plans[-1][0])
  monkeypatch.setattr(
    decisions.Counters, "forget", lambda self, gone: None
  )  # what was recorded forgets nothing
  tracks, released, final = start(clip, group_rules=True), [], iter(clip.final_masks)
  for step, frame in enumerate(clip.frames):
    out = advance(tracks, clip, frame["frame"])
    if name == "add_prompt_first" and not step:  # is put out at once, and runs again
      out = [tracks._delay.waiting.pop().content]
    released += [(objects, frame["frame"]) for objects in out]
    plan, counters = plans[-1]
    replay.check_plan(plan, counters, np.array(frame["kept_detections"]), frame)
    check_masks(tracks._last.waiting.content, plan, clip, step)
  released += [(objects, frame["frame"]) for objects in tracks.finish()]
  assert [(o.frame, after) for o, after in released] == [
    (o["frame"], o["released_after"]) for o in clip.outputs
  ]
  for (objects, _), expected in zip(released, clip.outputs):
    check_results(results(objects), expected, [next(final) for _ in expected["ids"]])
  assert next(final, None) is None


def check_masks(objects: FrameObjects, plan: decisions.Plan, clip: replay.Clip, step: int):
  frame = clip.frames[step]
  expected = clip.cleaned[clip.tracks(step)].copy()
  expected[np.isin(frame["object_ids_before"], plan.suppressed)] = -10
  assert objects.ids == frame["output_ids_before_filter"]
  np.testing.assert_allclose(objects.masks()[: len(expected)], expected, rtol=1e-5, atol=TOLERANCE)
  scores = dict(zip(map(str, objects.ids), objects.tracker_scores))
  assert scores == pytest.approx(frame["tracker_scores_of_frame"], abs=1e-4)


def check_results(found, expected, masks):
  assert found.ids.tolist() == expected["ids"]
  np.testing.assert_allclose(found.scores, expected["probs"], atol=2e-7)
  x, y, w, h = np.array(expected["boxes_xywh"]).reshape(-1, 4).T
  boxes = np.stack(
    [x * 60, y * 45, (x + w) * 60 + 1, (y + h) * 45 + 1], axis=-1
  )  # theirs end on the last pixel
  np.testing.assert_allclose(found.boxes, boxes, atol=1e-4)
  np.testing.assert_array_equal(found.masks, np.array(masks).reshape(-1, *replay.SIZE))
