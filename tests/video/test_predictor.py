"""A video and phrases in, masks out: a tiny detector, the recorded tracker; whole clips, resumed, live."""

from __future__ import annotations

import io
import itertools
import json

import jax
import numpy as np
import pytest

from sam3lt_jax import Predictor, VideoPredictor
from sam3lt_jax.video import overlay
from sam3lt_jax.video.writing import Files, write_tracks
from tests import tiny
from tests.parity import tracker as reference
from tests.video import clips
from tests.video.test_writing import contents

TEXT = ["red square", "blue square"]
# Random weights find anything on any frame; some of it is found often enough to stay.
OPTIONS = {"threshold": 0.0, "max_objects": 2}  # of one kind: each compiles
COUNT = 20


@pytest.fixture(scope="module")
def predictor():
  config = tiny.config(vocab_size=49408)
  with tiny.hurry():
    photos = Predictor(*tiny.load(config), tracker=reference.load(), image_buckets=(1, 4))
    yield VideoPredictor(photos)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  return clips.write(tmp_path_factory.mktemp("clips") / "clip.mp4", COUNT)


def track(predictor, source, **options):
  return predictor.track(source, TEXT, **OPTIONS | {"batch": 1} | options)


@pytest.fixture(scope="module")
def whole(predictor, clip):
  return list(track(predictor, clip))


def assert_same(found, wanted):
  assert [f.index for f in found] == [f.index for f in wanted]
  for a, b in zip(found, wanted):
    np.testing.assert_array_equal(a.ids, b.ids)
    assert a.labels == b.labels and a.time == b.time
    np.testing.assert_array_equal(a.masks, b.masks)
    np.testing.assert_array_equal(a.scores, b.scores)
    np.testing.assert_array_equal(a.boxes, b.boxes)


def test_a_clip(whole):
  assert [f.index for f in whole] == list(range(COUNT))
  assert max(map(len, whole)) == 2, "nothing was found: this test and those below say nothing"
  for f in whole:
    assert f.image.shape == (clips.HEIGHT, clips.WIDTH, 3)
    assert f.masks.shape == (len(f), clips.HEIGHT, clips.WIDTH) and f.masks.any(axis=(1, 2)).all()
    assert f.ids.tolist() == sorted(set(f.ids.tolist())) and set(f.labels) <= set(TEXT)
    for mask, box in zip(f.results.masks, f.boxes):  # before pixels went to others of the phrase
      ys, xs = np.nonzero(mask)
      assert box[0] <= xs.min() and xs.max() < box[2] and box[1] <= ys.min() and ys.max() < box[3]
    for phrase in TEXT:
      of_phrase = f.masks[[label == phrase for label in f.labels]]
      assert (of_phrase.sum(axis=0) <= 1).all()
    assert f.results.to_coco() == [] or f.results.to_coco()[0]["track_id"] == f.ids[0]
    assert f.render().size == (clips.WIDTH, clips.HEIGHT)


def test_live_frames_give_the_same_masks(predictor, clip, whole):
  images = (f.image for f in whole)
  assert_same(list(track(predictor, images, rate=clips.RATE)), whole)


def test_frames_are_held_back(predictor, clip):
  tracking = track(predictor, clip)
  first = next(tracking)
  assert (first.index, tracking.newest) == (0, 14)
  tracking.close()
  tracking = track(predictor, clip, latency=0)
  assert (next(tracking).index, tracking.newest) == (0, 0)
  tracking.close()


@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.full)])  # which compiles all again
def test_going_on_from_a_saved_state(predictor, clip, tmp_path, batch):
  wanted = list(track(predictor, clip, batch=batch))
  tracking = track(predictor, clip, batch=batch)
  found = [next(tracking) for _ in range(4)]
  assert tracking.newest == 17  # in the middle of a batch
  tracking.save(tmp_path / "state.npz")
  tracking.close()
  later = track(predictor, clip, batch=batch, state=tmp_path / "state.npz")
  assert later.newest == 17
  assert_same(found + list(later), wanted)


@pytest.mark.full
def test_a_batch_changes_rounding_at_most(predictor, clip, whole):
  found = list(track(predictor, clip, batch=4))
  assert [f.ids.tolist() for f in found] == [f.ids.tolist() for f in whole]
  for a, b in zip(found, whole):
    assert (a.masks != b.masks).mean() < 1e-3 if len(a) else True


@pytest.mark.full  # compiles for every number of objects; test_phrases clicks, adds and removes
def test_stepping_in(predictor, clip):
  tracking = predictor.track(clip, TEXT[0], latency=0, batch=1, **OPTIONS)
  with pytest.raises(ValueError, match="clicks are about a frame: track one first"):
    tracking.click(points=[[10, 10]])
  next(tracking)
  tracking.add(TEXT[1])
  assert tracking.phrases == TEXT
  labels = set()
  frame = next(tracking)
  labels |= set(frame.labels)
  tracking.remove(int(frame.ids[0]))  # to have room
  before = set(frame.ids.tolist())
  clicked = tracking.click(points=[[20.0, 16.0], [50.0, 40.0]], point_labels=[1, 0])
  (new,) = set(clicked.ids.tolist()) - before
  assert clicked.index == 1 and clicked.labels[clicked.ids.tolist().index(new)] == "object"
  corrected = tracking.click(points=[[30.0, 30.0]], object_id=new)
  assert new in corrected.ids
  later = next(tracking)
  assert TEXT[1] in labels | set(later.labels)
  tracking.remove(new)
  assert new not in next(tracking).ids
  with pytest.raises(ValueError, match="text must be a new phrase, got 'red square'"):
    tracking.add(TEXT[0])
  with pytest.raises(ValueError, match="label must be one of"):
    tracking.click(points=[[1, 1]], label="cat")
  with pytest.raises(ValueError, match=f"object_id must be one of .*, got {new}"):
    tracking.click(points=[[1, 1]], object_id=new)
  tracking.finish()
  assert [f.index for f in tracking] == []
  with pytest.raises(ValueError, match="read to its end"):
    tracking.save(io.BytesIO())


@pytest.mark.full  # compiles the detector for boxes; test_predictor.py of photos asks by boxes
def test_boxes_on_a_frame(predictor, clip):
  tracking = predictor.track(clip, boxes=[10, 10, 30, 25], boxes_frame=2, latency=0, batch=1, **OPTIONS)
  found = list(tracking)
  assert not len(found[0]) and not len(found[1]) and 1 <= len(found[2]) <= 2
  assert set(found[2].labels) == {"visual"} and len(found) == COUNT


def test_files_are_the_same_after_a_stop(predictor, clip, tmp_path, monkeypatch):
  monkeypatch.setattr(overlay, "PIECE", 8)
  steps, options = itertools.count(), OPTIONS | {"batch": 1}
  write_tracks(predictor, clip, Files(str(tmp_path / "whole"), davis=True, every=5), TEXT, **options)
  files = Files(str(tmp_path / "halves"), davis=True, every=5)
  written = write_tracks(predictor, clip, files, TEXT, stop=lambda: next(steps) > 16, **options)
  assert written.stopped and 0 < written.frames < COUNT
  write_tracks(predictor, clip, files, TEXT, **options)
  assert contents(tmp_path / "whole") == contents(tmp_path / "halves")


def test_sam2s_names_take_any_source(predictor, clip):
  state = predictor.init_state(clip)
  predictor.add_new_points_or_box(state, frame_idx=3, obj_id=1, points=[[20, 16]], labels=[1])
  found = list(predictor.propagate_in_video(state, max_frame_num_to_track=2))
  assert [frame for frame, _, _ in found] == [3, 4, 5] and found[0][2].shape[2:] == (
    clips.HEIGHT,
    clips.WIDTH,
  )
  with pytest.raises(ValueError, match="frame_idx must be a frame from 0 to 19, got 20"):
    predictor.add_new_points_or_box(state, frame_idx=20, obj_id=1, points=[[20, 16]], labels=[1])


@pytest.mark.parametrize(
  ("message", "options"),
  [
    ("nothing to look for: give text, boxes or both", {"text": None}),
    ("text must be different phrases, got 'a' twice", {"text": ["a", "b", "a"]}),
    ("threshold must be", {"threshold": 2}),
    ("max_objects must be a whole number of at least 1, got 0", {"max_objects": 0}),
    ("batch must be a whole number from 1 to 4, got 9", {"batch": 9}),
    ("latency must be", {"latency": -1}),
    ("boxes_frame must be a frame of .*, which has 20, got 20", {"boxes": [1, 1, 9, 9], "boxes_frame": 20}),
    (
      "boxes_frame must be a whole number of at least 0, got -1",
      {"boxes": [1, 1, 9, 9], "boxes_frame": -1},
    ),
    ("boxes", {"boxes": [[9, 9, 1, 1]]}),
    ("state=.*nothing.npz.* is not what Tracking.save wrote, or damaged", {"state": "nothing.npz"}),
    ("state=.*cut.npz.* is not what Tracking.save wrote, or damaged", {"state": "cut.npz"}),
  ],
)
def test_mistakes(predictor, clip, tmp_path, monkeypatch, message, options):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "nothing.npz").write_bytes(b"nothing")
  (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04cut off")
  with pytest.raises(ValueError, match=message):
    predictor.track(clip, **{"text": "a"} | options)


def test_a_frame_that_a_live_source_never_reaches(predictor):
  tracking = predictor.track(iter(clips.frames(3)), boxes=[[1, 1, 9, 9]], boxes_frame=5, **OPTIONS)
  found = []
  with pytest.raises(ValueError, match="boxes_frame=5: the iterator has 3 frames"):
    found.extend(tracking)


def test_fingerprint(predictor):
  first = predictor.fingerprint()
  assert first == json.loads(json.dumps(first)) and len(set(first["weights"])) == 2
  before = predictor.engine.tracker_variables
  predictor.engine.tracker_variables = jax.tree.map(lambda x: x + 1, before)
  other = predictor.fingerprint()
  predictor.engine.tracker_variables = before
  assert other["weights"][0] == first["weights"][0] and other["weights"][1] != first["weights"][1]
  assert predictor.fingerprint() == first


def test_no_tracker():
  photos = Predictor(*tiny.load(tiny.config(vocab_size=49408)))
  with pytest.raises(ValueError, match="no tracker is loaded"):
    VideoPredictor(photos)
