"""Phrase video: whole clips of the authors' code with their detections, and what must not change a result."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref

import jax
import numpy as np
import pytest

from sam3lt_jax.features import Detections
from sam3lt_jax.kept import MaskSource
from sam3lt_jax.processing.clicks import ClickArrays
from sam3lt_jax.video import decisions
from sam3lt_jax.video.phrases import Found, FrameObjects, PhraseTracks, frame_results
from tests.video import replay
from tests.video.common import StubEngine, engine, recorded

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


@pytest.mark.full  # 10 s
@pytest.mark.parametrize("name", CLIPS)
def test_recorded_clip(name, monkeypatch):
  """Every decision and every counter; masks as they are tracked; ids, boxes and pixels that are put out."""
  clip, plans = clip_of(name), []
  decide = decisions.decide
  monkeypatch.setattr(decisions, "decide", lambda *a: plans.append((decide(*a), a[1])) or plans[-1][0])
  monkeypatch.setattr(
    decisions.Counters, "forget", lambda self, gone: None
  )  # what was recorded forgets nothing
  tracks, released, final = start(clip, group_rules=True, slots=8), [], iter(clip.final_masks)
  for step, frame in enumerate(clip.frames):
    out = advance(tracks, clip, frame["frame"])
    if name == "add_prompt_first" and not step:  # is put out at once, and runs again
      out = [tracks._delay.waiting.pop()]
    released += [(objects, frame["frame"]) for objects in out]
    plan, counters = plans[-1]
    replay.check_plan(plan, counters, np.array(frame["kept_detections"]), frame)
    check_masks(tracks._last.objects, plan, clip, step)
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


# ---------------------------------------------------------------- what must not change a result


def run(tracks: PhraseTracks, clip: replay.Clip, frames=range(24), **options) -> list[FrameObjects]:
  out = [objects for t in frames for objects in advance(tracks, clip, t, **options)]
  return out + tracks.finish()


def same(one: list[FrameObjects], other: list[FrameObjects]) -> None:
  """To the bit."""
  assert len(one) == len(other)
  for a, b in zip(one, other):
    assert (a.frame, a.ids, a.phrases, a.scores, a.removed) == (
      b.frame,
      b.ids,
      b.phrases,
      b.scores,
      b.removed,
    )
    assert a.tracker_scores == b.tracker_scores
    np.testing.assert_array_equal(a.masks(), b.masks())


@functools.cache
def whole(name: str = "strict") -> list[FrameObjects]:
  """What must come of a clip however it is run."""
  return run(start(clip_of(name)), clip_of(name))


@pytest.mark.full  # 4 s
def test_a_camera_as_a_file():
  """Nobody knows the length, frames come one at a time: the same to the bit, from one code path."""
  same(run(start(clip_of("strict"), frames=None), clip_of("strict")), whole())


def test_at_once_with_removals_told():
  """Without latency: what is put out is the same but for objects that are removed later, which are named."""
  clip = clip_of("strict")
  tracks = start(clip, latency=0)
  out = []
  for t in range(24):
    (objects,) = advance(tracks, clip, t)
    assert objects.frame == t
    out.append(objects)
  assert tracks.finish() == []
  removed = [i for objects in out for i in objects.removed]
  assert removed and len(removed) == len(set(removed))
  for t, objects in enumerate(out):
    for i in objects.removed:
      assert any(i in before.ids for before in out[:t]) and not any(i in after.ids for after in out[t:])
  late = [o.only([k for k, i in enumerate(o.ids) if i not in removed]) for o in out]
  soon = [o.only(range(len(o.ids))) for o in whole()]
  assert not any(o.removed for o in whole())
  same(late, soon)


def test_slots_in_any_order_with_anything_beside():
  clip = clip_of("strict")
  tracks, out = start(clip), []
  for t in range(24):
    if t in (3, 9):
      shuffle(tracks, np.roll(np.arange(4), t - 2))
    out += advance(tracks, clip, t)
  same(out + tracks.finish(), whole())


def shuffle(tracks: PhraseTracks, order: np.ndarray) -> None:
  """Slots in another order, NaN and nonsense in those that hold no object."""
  dead = ~np.asarray(tracks.tracks.bank.live)

  def spoiled(x):
    x = np.array(x)
    if x.dtype == np.float32 or x.dtype.name == "bfloat16":
      x[dead] = np.nan
    return jax.device_put(x[order])

  live = tracks.tracks.bank.live
  tracks.tracks.bank = jax.tree.map(spoiled, tracks.tracks.bank).replace(live=live[order])
  tracks._last = tracks._last._replace(tracked=jax.tree.map(spoiled, tracks._last.tracked))
  place = np.argsort(order)
  tracks.tracks.slots = {i: int(place[s]) for i, s in tracks.tracks.slots.items()}


@pytest.mark.full  # compiles for one and two; test_tracks grows
def test_slots_that_grow_in_mid_clip():
  tracks = start(clip_of("strict"), slots=1)
  same(run(tracks, clip_of("strict")), whole())
  assert tracks.tracks.size == 4


@pytest.mark.full  # compiles for eight; test_predictor tracks two phrases
def test_two_phrases_are_each_as_if_alone():
  """In one pass, one of them late; objects have other numbers."""
  one, other = clip_of("strict"), clip_of("add_prompt_first")
  tracks, out = start(one, slots=8), []
  for t in range(24):
    detections = jax.tree.map(
      lambda *x: np.concatenate(x, axis=1), found(one, [t]).detections, found(other, [t]).detections
    )
    out += tracks.step(t, recorded((t,)), 0, [Found(np.array([[0, 1 if t >= 4 else -1]]), detections)])
  out += tracks.finish()
  late = start(one)
  for phrase, alone in ((0, whole()), (1, run(late, other, range(4, 24), phrases=[1]))):
    numbers: dict[int, int] = {}
    for a, b in zip([o for o in out if o.frame >= 4 * phrase], alone, strict=True):
      mine = a.only([k for k, n in enumerate(a.phrases) if n == phrase])
      assert (mine.frame, len(mine.ids), mine.scores) == (b.frame, len(b.ids), b.scores)
      assert [numbers.setdefault(i, j) for i, j in zip(mine.ids, b.ids)] == b.ids
      np.testing.assert_array_equal(mine.masks(), b.masks())
    assert len(set(numbers.values())) == len(numbers) > 1


def test_killed_and_gone_on(tmp_path):
  """State in a file, read by another that knows nothing: the same to the bit."""
  clip = clip_of("strict")
  tracks, out = start(clip), []
  for t in range(24):
    if t in (1, 7, 15):
      np.savez(tmp_path / "state.npz", **tracks.state())
      tracks = start(clip, slots=1)
      with np.load(tmp_path / "state.npz", allow_pickle=False) as data:
        tracks.load_state(dict(data))
    out += advance(tracks, clip, t)
  same(out + tracks.finish(), whole())


def test_forked_and_tried_again():
  clip = clip_of("strict")
  tracks = start(clip)
  out = [objects for t in range(9) for objects in advance(tracks, clip, t)]
  other = tracks.fork()
  run(other, clip_of("default"), range(9, 14))
  for t in range(9, 24):
    with pytest.raises(RuntimeError, match="no room"):
      spoil = found(clip, [t])
      tracks._commit, kept = failing, tracks._commit
      try:
        tracks.step(t, recorded((t,)), 0, [spoil])
      finally:
        tracks._commit = kept
    out += advance(tracks, clip, t)
  same(out + tracks.finish(), whole())


def failing(*_):
  raise RuntimeError("no room")


@pytest.mark.full  # 3 s
def test_state_does_not_grow_with_the_clip():
  clip = clip_of("strict")
  config = dataclasses.replace(clip.config, max_num_objects=4)
  tracks, sizes = PhraseTracks(engine(group_rules=False), replay.SIZE, config, slots=4), []
  for t in range(72):
    tracks.step(t, recorded((t % 24,)), 0, [found(clip, [t % 24])])
    sizes.append(sum(x.nbytes for x in tracks.state().values()))
  assert max(sizes[48:]) <= max(sizes[24:48]) * 1.1
  assert len(tracks.counters.ids) == 4 < tracks.counters.next_id
  assert set(tracks.counters.first_frame) == set(tracks.counters.ids)


# ---------------------------------------------------------------- what the user does


def click(x: float, y: float, label: int = 1) -> ClickArrays:
  one = np.ones((1, 1), bool)
  return ClickArrays(np.array([[[x, y]]], np.float32), np.array([[label]], np.int32), one)


def test_a_click_corrects_an_object():
  """Its mask changes on this frame and later ones, its score is 1, and it is not removed any more."""
  clip = clip_of("strict")
  tracks, out = start(clip), []
  for t in range(24):
    out += advance(tracks, clip, t)
    if t == 3:
      before = tracks._last.objects
      objects = tracks.click(click(0.3, 0.4), recorded((t,)), 0, object_id=1)
      assert objects.frame == t and objects.ids == before.ids
      changed = abs(objects.masks() - before.masks()).max((1, 2)) > 0.01
      assert changed.tolist() == [False, True, False]
  out += tracks.finish()
  assert 1 in tracks.counters.ids and not any(1 in o.ids for o in whole())
  assert [1 in o.ids for o in out] == [True] * 24
  assert {o.scores[o.ids.index(1)] for o in out if o.frame >= 3} == {1.0}
  assert [2 in o.ids for o in out] == [False] * 24  # goes as before


def test_a_click_begins_an_object():
  clip = clip_of("strict")
  tracks = start(clip)
  with pytest.raises(ValueError, match="let one run first"):
    tracks.click(click(0.5, 0.5), recorded((0,)), 0)
  out = [o for t in range(3) for o in advance(tracks, clip, t)]
  objects = tracks.click(click(0.85, 0.88), recorded((2,)), 0)
  assert objects.ids == [0, 1, 2, 3] and objects.phrases[3] == decisions.CLICKED and objects.scores[3] == 1.0
  out += run(tracks, clip, range(3, 24))
  assert all((3 in o.ids) == (o.frame >= 2) for o in out)
  names = results(out[10]).labels
  assert names[out[10].ids.index(3)] == "object" and "thing" in names
  with pytest.raises(ValueError, match=r"object_id must be one of \[.*got 77"):
    tracks.click(click(0.5, 0.5), recorded((23,)), 0, object_id=77)
  with pytest.raises(ValueError, match="must be of one object, got 2"):
    tracks.click(ClickArrays(*(np.repeat(x, 2, axis=0) for x in click(0.5, 0.5)[:3])), recorded((23,)), 0)


def test_removed_by_the_user():
  """From the frames that wait as well; its slot is used again."""
  clip = clip_of("strict")
  tracks, out = start(clip), []
  for t in range(24):
    out += advance(tracks, clip, t)
    if t == 8:
      tracks.remove(0)
  out += tracks.finish()
  assert not any(0 in o.ids for o in out if o.frame > 3) and any(0 in o.ids for o in out)
  assert [o.removed for o in out if o.removed] == [(0,)]
  with pytest.raises(ValueError, match="object_id must be one of"):
    tracks.remove(0)


def test_object_limit():
  clip = clip_of("default")
  tracks = PhraseTracks(
    engine(group_rules=False), replay.SIZE, dataclasses.replace(clip.config, max_num_objects=2), slots=4
  )
  for t in range(8):
    advance(tracks, clip, t)
    assert len(tracks.counters.ids) == 2
  with pytest.raises(ValueError, match="there are 2 objects already, which is max_num_objects"):
    tracks.click(click(0.5, 0.5), recorded((7,)), 0)


def test_an_engine_that_nobody_uses_goes_with_its_programs():
  like = engine()
  one = StubEngine(like.tracker, like.tracker_variables, like.processor.image_size, like.encode_frames)
  PhraseTracks(one, replay.SIZE)
  left = weakref.ref(one)
  del one
  gc.collect()
  assert left() is None


@pytest.mark.parametrize("latency", [-1, True, 1.5])
def test_wrong_latency(latency):
  with pytest.raises(ValueError, match="latency must be a whole number of at least 0, got"):
    start(clip_of("strict"), latency=latency)


def test_wrong_state():
  with pytest.raises(ValueError, match=r"state must be what PhraseTracks.state gave"):
    start(clip_of("strict")).load_state({"x": np.zeros(1)})
