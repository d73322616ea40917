"""Sessions over a clip: what the authors' recordings do not show."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from sam3lt_jax import Predictor
from sam3lt_jax.processing import images as image_ops
from sam3lt_jax.video.interactive import InteractiveVideo
from tests import tiny
from tests.parity import tracker as reference
from tests.test_predictor import photo
from tests.video.common import clip, engine

POINTS = {1: [[51, 40]], 2: [[30, 9]]}
ROUNDING = 2e-3  # as in test_tracks


@pytest.fixture(scope="module", autouse=True)
def precision():
  with jax.default_matmul_precision("highest"):
    yield


def session(ids=(1,), frame: int = 0, **options):
  video = InteractiveVideo(engine(), **options)
  state = video.init_state(clip())
  for i in ids:
    video.add_new_points_or_box(state, frame, i, POINTS[i], [1])
  return video, state


def run(video, state, *args, **kwargs) -> dict[int, np.ndarray]:
  return {t: shown for t, _, shown in video.propagate_in_video(state, *args, **kwargs)}


@functools.cache
def alone(i: int) -> dict[int, np.ndarray]:
  return run(*session([i]), 0, 6)


@pytest.mark.full  # compiles for two; of the state test_tracks says it, of a session the test below
def test_objects_of_one_session_are_each_on_their_own():
  video, state = session([1, 2])
  for t, shown in run(video, state, 0, 6).items():
    for row, i in enumerate((1, 2)):
      np.testing.assert_allclose(shown[row], alone(i)[t][0], rtol=0, atol=ROUNDING)


@pytest.mark.full  # 5 s
def test_an_object_may_come_and_go_in_mid_clip():
  video, state = session([1])
  run(video, state, 0, 2)
  frame, ids, shown = video.add_new_points_or_box(state, 2, 2, POINTS[2], [1])
  assert (frame, ids, shown.shape) == (2, [1, 2], (2, 1, 45, 60))
  np.testing.assert_allclose(shown[0], alone(1)[2][0], rtol=0, atol=ROUNDING)  # not asked about, still shown
  both = run(video, state, 2, 2)
  for t, shown in both.items():
    np.testing.assert_allclose(shown[0], alone(1)[t][0], rtol=0, atol=ROUNDING)
  ids, frames = video.remove_object(state, 2)
  assert ids == [1] and [t for t, _ in frames] == [2] and frames[0][1].shape[0] == 1
  for t, shown in run(video, state, 5, 1).items():
    np.testing.assert_allclose(shown, alone(1)[t], rtol=0, atol=ROUNDING)


def test_a_correction_stays_and_taking_it_back_undoes_it():
  video, state = session([1])
  before = run(video, state, 0, 6)
  _, _, corrected = video.add_new_points_or_box(state, 3, 1, [[8, 15]], [1])
  assert np.abs(corrected - before[3]).max() > 0.1
  after = run(video, state, 0, 6)
  np.testing.assert_array_equal(after[3], corrected)
  assert np.abs(after[4] - before[4]).max() > 1e-2
  _, _, shown = video.clear_all_points_in_frame(state, 3, 1)
  assert shown.shape == corrected.shape and state.objects[1].cond_frames() == [0]
  for t, shown in run(video, state, 0, 6).items():
    np.testing.assert_allclose(shown, before[t], rtol=0, atol=ROUNDING)


@pytest.mark.full  # compiles for three; test_phrases goes on from a file and from a fork
def test_a_state_is_saved_forked_and_goes_on_bit_for_bit(tmp_path):
  """With a mask and a correction that were not followed yet, backward as well."""
  video, state = session([1, 2])
  run(video, state, 0, 3)
  mask = np.zeros((45, 60), bool)
  mask[10:30, 20:40] = True
  video.add_new_mask(state, 2, 3, mask)
  video.add_new_points_or_box(state, 3, 1, [[20, 20]], [0])
  fork = state.fork()
  state.save(tmp_path / "at_3.npz")
  loaded = video.init_state(clip(), state=tmp_path / "at_3.npz")
  assert loaded.obj_ids == fork.obj_ids == [1, 2, 3]
  for order in ((2, 4, False), (5, 3, True)):
    wanted = run(video, state, *order)
    for other in (fork, loaded):
      found = run(video, other, *order)
      assert found.keys() == wanted.keys()
      for t, shown in wanted.items():
        np.testing.assert_array_equal(found[t], shown)


@pytest.mark.parametrize("content", [b"no archive", b"", b"PK\x03\x04cut off"])
def test_what_is_no_state_is_refused(content, tmp_path):
  file = tmp_path / "state.npz"
  file.write_bytes(content)
  with pytest.raises(ValueError, match=r"state=.*is not what InferenceState.save wrote"):
    session()[0].init_state(clip(), state=str(file))
  video, state = session()
  state.save(file)
  with pytest.raises(ValueError, match=r"state must be of this clip: .*\(45, 60, 1\), got \(45, 60, 24\)"):
    video.init_state(clip()[:1], state=file)


@pytest.mark.parametrize("name", ["logits", "pointer", "memory"])
def test_a_state_of_another_tracker_is_refused(name, tmp_path):
  video, state = session()
  run(video, state, 0, 2)
  record = state.objects[1].records[1]
  setattr(record, name, getattr(record, name)[:-1])
  state.save(tmp_path / "state.npz")
  with pytest.raises(ValueError, match=rf"state must be of this tracker, whose {name} has shape"):
    video.init_state(clip(), state=tmp_path / "state.npz")


def test_without_any_prompt_left_nothing_is_followed():
  video, state = session([1])
  run(video, state, 0, 2)
  _, ids, shown = video.clear_all_points_in_frame(state, 0, 1)
  assert ids == [1] and (shown == -1024).all()
  with pytest.raises(ValueError, match="there is nothing to follow: add points, a box or a mask first"):
    run(video, state)
  video.reset_state(state)
  assert state.obj_ids == []


def test_a_short_history_is_as_good_going_forward_and_bounded():
  video, state = session([1], history=16)
  found = run(video, state, 0, 20)
  records = state.objects[1].records
  assert len(records) == 1 + 16 and 0 in records  # the frame with the prompt stays
  whole = run(*session([1]), 0, 20)
  for t in found:
    np.testing.assert_array_equal(found[t], whole[t])


def test_a_mask_of_any_size_is_shown_as_it_was_given():
  video, state = session([])
  mask = np.zeros((90, 120), bool)
  mask[20:60, 30:90] = True
  _, ids, shown = video.add_new_mask(state, 4, 9, mask)
  assert ids == [9]
  np.testing.assert_array_equal(shown[0, 0] > 0, mask[::2, ::2])
  frames = run(video, state, reverse=True)
  assert list(frames) == [4, 3, 2, 1, 0]


def test_a_clip_of_one_frame():
  video = InteractiveVideo(engine())
  state = video.init_state(clip([0]))
  _, _, shown = video.add_new_points_or_box(state, 0, 1, POINTS[1], [1])
  (only,) = run(video, state).values()
  np.testing.assert_array_equal(only, shown)


def points(*args, **kwargs):
  return lambda video, state: video.add_new_points_or_box(state, *args, **kwargs)


def mask(value):
  return lambda video, state: video.add_new_mask(state, 0, 1, value)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda v, s: v.init_state([]), "the list holds no frames"),
    (lambda v, s: InteractiveVideo(engine(), history=-1), "history must be a whole number of at least 0"),
    (points(24, 1, [[1, 1]], [1]), "frame_idx must be a frame from 0 to 23, got 24"),
    (points(0, 1), "give points or box, got neither"),
    (points(0, 1, [[1, 1]]), "points and labels must be given together"),
    (points(0, 1, [[61, 1]], [1]), "points must lie in the image of 60x45 pixels"),
    (points(0, 1, box=[1, 1, 5, 5], clear_old_points=False), "box must be given before any points"),
    (mask(np.zeros((1, 45, 60))), r"mask must be \[H, W\] of one object"),
    (mask(np.full((45, 60), 2)), "mask must hold values from 0 to 1"),
    (lambda v, s: v.clear_all_points_in_frame(s, 0, 5), r"obj_id must be one of \[\], got 5"),
    (lambda v, s: v.remove_object(s, 5, strict=True), r"obj_id must be one of \[\], got 5"),
    (lambda v, s: run(v, s), "there is nothing to follow"),
  ],
)  # fmt: skip
def test_mistakes_are_told(call, message):
  video, state = session([])
  with pytest.raises(ValueError, match=message):
    call(video, state)
  assert state.obj_ids == []


def test_frames_must_be_of_one_size():
  video = InteractiveVideo(engine())
  state = video.init_state([clip()[0], np.zeros((44, 60, 3), np.uint8)])
  with pytest.raises(ValueError, match="frame 1 of the list is 60x44 pixels and the frames before it 60x45"):
    video.add_new_points_or_box(state, 1, 1, [[1, 1]], [1])


@pytest.mark.full  # compiles a whole engine; test_predictor clicks on one
def test_on_an_engine_frames_are_encoded_for_the_tracker_alone():
  config = tiny.config(vocab_size=49408)
  with tiny.hurry():
    predictor = Predictor(*tiny.load(config), tracker=reference.load())
    video = InteractiveVideo(predictor.engine)
    state = video.init_state([photo(60, 90, seed) for seed in range(3)])
    video.add_new_points_or_box(state, 0, 1, [[30, 20]], [1])
    assert list(run(video, state)) == [0, 1, 2]
    made = {name: len(compiled) for name, compiled in predictor.engine.programs().items()}
    assert made["encode_frames"] == made["advance"] == 1
    assert not made["encode"] and not made["neck"]
    frame = image_ops.resize_image(photo(60, 90, 0), tiny.SIDE)
    alone = predictor.engine.encode_frames([frame])
    both = predictor.engine.encode([frame]).tracker
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), alone, both)
  assert predictor.engine.waited_s > 0
