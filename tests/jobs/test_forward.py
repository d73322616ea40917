"""Many images and questions at once: what comes out is what `Predictor` gives for each of them alone."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from sam3lt_jax import Profile
from sam3lt_jax.jobs import forward as forward_module
from sam3lt_jax.jobs import results
from sam3lt_jax.jobs.forward import Forward, choose_batch
from sam3lt_jax.jobs.questions import Question
from sam3lt_jax.predictor import Predictor
from sam3lt_jax.processing import images
from tests import tiny
from tests.jobs import pictures

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools

DOG, CAT = Question("a dog"), Question("two yellow cats")
BOXES = Question(None, ((5, 5, 30, 28), (40, 10, 60, 33)), (1, 0))
BOTH = Question("a dog", ((5, 5, 30, 28),), (1,))
QUESTIONS = [(DOG, CAT), (BOXES,), (CAT, BOTH, DOG, DOG, CAT), (DOG,), ()]
PHOTOS = [pictures.photo(i) for i in range(len(QUESTIONS))]


@pytest.fixture(scope="module")
def predictor():
  return pictures.predictor()


@pytest.fixture(scope="module")
def three(predictor):
  """Three images a batch, up to four questions together."""
  return Forward(predictor, batch=3, buckets=(1, 4), devices=jax.local_devices()[:1])


def run(forward, photos, questions, threshold=0.0):
  """Results per image, as a job makes them, and what the calls found."""
  records, found = [], []
  for start in range(0, len(photos), forward.rows):
    some, asked = photos[start : start + forward.rows], questions[start : start + forward.rows]
    maps = forward.encode([images.resize_image(p, tiny.SIDE) for p in some])
    arrays = [[forward.box_arrays(q, p.shape[:2]) for q in qs] for qs, p in zip(asked, some)]
    calls = forward.calls(arrays)
    batch = [forward.kept(forward.detect(maps, call, asked, arrays), call, threshold) for call in calls]
    found += batch
    for row, (photo, qs) in enumerate(zip(some, asked)):
      kept = [
        (one.question[k], one.query[k], one, k) for one in batch for k in np.flatnonzero(one.image == row)
      ]
      instances = [
        results.instance(
          qs[i], i, one.scores[k], one.boxes[k], one.masks()[k], photo.shape[:2], 0.5, "upsample_then_sigmoid"
        )
        for i, _, one, k in sorted(kept, key=lambda entry: entry[:2])
      ]
      size = photo.shape[:2]
      records.append({"height": size[0], "width": size[1], "results": instances})
  return [results.to_results(record) for record in records], found


def by_predictor(predictor, photo, questions, threshold=0.0):
  parts = [results.Results.empty(photo.shape[:2])]
  for q in questions:
    boxes = [list(box) for box in q.boxes] or None
    parts.append(predictor(photo, q.text, boxes, list(q.labels) if boxes else None, threshold))
  return results.Results.concatenate(parts)


def test_equals_the_predictor(three, predictor):
  found, _ = run(three, PHOTOS, QUESTIONS)
  for photo, questions, one in zip(PHOTOS, QUESTIONS, found):
    assert len(one) == tiny.QUERIES * len(questions)
    pictures.assert_same_results(one, by_predictor(predictor, photo, questions))


def test_only_what_is_kept_is_fetched(three, predictor):
  wanted = by_predictor(predictor, PHOTOS[0], QUESTIONS[0])
  threshold = float(np.median(wanted.scores))
  found, calls = run(three, PHOTOS[:1], QUESTIONS[:1], threshold)
  assert 0 < len(found[0]) < len(wanted)
  assert sum(len(call.masks()) for call in calls) == len(found[0])
  pictures.assert_same_results(found[0], wanted[wanted.scores > threshold])
  none, _ = run(three, PHOTOS[:1], QUESTIONS[:1], 1.0)
  assert len(none[0]) == 0


def test_masks_gathered_on_the_device_are_the_same(three, monkeypatch):
  """As an accelerator does it; on a CPU they are read where they lie."""
  wanted, _ = run(three, PHOTOS[:3], QUESTIONS[:3])
  monkeypatch.setattr(three, "_host_views", False)
  monkeypatch.setattr(forward_module, "_TAKE", (2, 8))  # 6 to 24 masks a call: one gather and several
  found, _ = run(three, PHOTOS[:3], QUESTIONS[:3])
  for a, b in zip(found, wanted):
    np.testing.assert_array_equal(a.masks, b.masks)
    assert a.masks.any()


def test_neighbours_and_padding_change_nothing(three):
  """The same program: to the last bit."""
  photos, questions = PHOTOS[:3], [(DOG, CAT), (CAT, DOG), (DOG, DOG)]
  together, _ = run(three, photos, questions)
  others = [PHOTOS[0], 255 - PHOTOS[1], PHOTOS[4]]
  with_others, _ = run(three, others, [questions[0], (CAT, CAT), ()])
  alone, _ = run(three, photos[:1], questions[:1])
  for other in (with_others[0], alone[0]):
    np.testing.assert_array_equal(together[0].scores, other.scores)
    np.testing.assert_array_equal(together[0].boxes, other.boxes)
    np.testing.assert_array_equal(together[0].masks, other.masks)
  assert not np.allclose(together[0].scores, together[1].scores, atol=1e-4)


def test_another_bucket_and_batch_give_the_same(three, predictor):
  one = Forward(predictor, batch=1, buckets=(2,), devices=jax.local_devices()[:1])
  for a, b in zip(run(three, PHOTOS, QUESTIONS)[0], run(one, PHOTOS, QUESTIONS)[0]):
    pictures.assert_same_results(a, b)


def test_questions_become_few_calls(three):
  plain, boxed = three.box_arrays(DOG, (10, 10)), (np.zeros((32, 4)), np.zeros(32))
  calls = three.calls([[plain] * 6, [plain], [boxed]])
  assert [call.index.tolist() for call in calls] == [
    [[0, 1, 2, 3], [0, -1, -1, -1], [-1] * 4],
    [[4, 5, -1, -1], [-1] * 4, [-1] * 4],
    [[-1], [-1], [0]],
  ]
  assert [call.index.tolist() for call in three.calls([[plain]])] == [[[0], [-1], [-1]]]
  assert three.calls([[], []]) == []


def test_where_boxes_bring_a_token_they_run_apart():
  """In this profile a row without boxes reads another prompt if any row beside it has some."""
  profile = dataclasses.replace(Profile.transformers(), name="mixed batch", geometry_cls="with_any_boxes")
  config = pictures.CONFIG.replace(profile=profile)
  forward = Forward(Predictor(*tiny.load(config)), batch=2, devices=jax.local_devices()[:1])
  arrays = [[forward.box_arrays(q, (40, 70))] for q in (DOG, BOTH)]
  assert [len(labels) for [(_, labels)] in arrays] == [0, 8]
  assert len(forward.calls(arrays)) == 2


def test_a_phrase_is_encoded_once(three, predictor, monkeypatch):
  asked = []
  counted = {n: lambda *a, p=p: asked.append(a) or p(*a) for n, p in predictor.phrases.programs.items()}
  monkeypatch.setattr(predictor.phrases, "programs", counted)
  new = [(Question("never seen"),)] * 3
  run(three, PHOTOS[:3], new)
  run(three, PHOTOS[:3], new)
  run(three, PHOTOS[:1], new[:1])
  assert len(asked) == 1


def test_a_wrong_box_is_one_sentence(three):
  with pytest.raises(ValueError, match=r"box 0 .* is inverted"):
    three.box_arrays(Question(None, ((9, 9, 3, 3),), (1,)), (10, 10))


def test_data_parallel_programs_have_no_collective(three):
  run(three, PHOTOS[:1], QUESTIONS[:1])
  assert len(three.hlo()) >= 2
  for text in three.hlo():
    assert "HloModule" in text and not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)


def test_batch_is_what_memory_holds():
  asked = []

  def needed(batch):
    asked.append(batch)
    return 100 + 10 * batch

  assert choose_batch(needed, None) == 1 and asked == []
  assert choose_batch(needed, 105) == 1
  assert choose_batch(needed, 185) == 8
  assert choose_batch(needed, 10_000) == 16
  # The estimate was too good: the program itself is asked.
  assert choose_batch(lambda b: 100 + 10 * b + (1000 if b > 4 else 0), 260) == 4
  assert choose_batch(lambda b: float("inf") if b > 1 else 50, 260) == 1


def test_memory_grows_with_the_batch(three):
  needed = three._memory_needed(3)
  one, two = needed(1), needed(2)
  weights = sum(x.nbytes for x in jax.tree.leaves(three._variables))
  assert weights < one < two
  # One more image has four questions' masks more, twice: in the making and being fetched.
  grid = 4 * tiny.SIDE // 14
  assert two - one > 2 * 4 * tiny.QUERIES * grid**2 * 4


def test_a_device_that_tells_its_memory_gets_a_batch(predictor, monkeypatch):
  monkeypatch.setattr(forward_module, "_memory_limit", lambda devices: 1000.0)
  monkeypatch.setattr(
    Forward, "_memory_needed", lambda self, questions: lambda batch: 100.0 * batch * questions
  )
  assert Forward(predictor, devices=jax.local_devices()[:1], questions=1).batch == 8
  assert Forward(predictor, devices=jax.local_devices()[:1], questions=5).batch == 2
  assert Forward(predictor, devices=jax.local_devices()[:1], batch=3).rows == 3


@pytest.mark.parametrize(
  "given, message",
  [
    ({"batch": 0}, "batch must be at least 1, got 0"),
    ({"pmap": True, "model_parallel": 2}, "pmap keeps a copy"),
    ({"buckets": (4, 1)}, r"buckets must be ascending positive sizes, got \(4, 1\)"),
    ({"model_parallel": 3}, "model=3 does not divide the 1 devices"),
  ],
)
def test_bad_arguments(predictor, given, message):
  with pytest.raises(ValueError, match=message):
    Forward(predictor, devices=jax.local_devices()[:1], **given)
