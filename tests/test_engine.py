"""Many images and prompts at once: what comes out is what `Predictor` gives for each of them alone."""

import dataclasses
import re
import threading
import tracemalloc

import jax
import numpy as np
import pytest

from sam3lt_jax import Profile, engine, kept
from sam3lt_jax.engine import Engine
from sam3lt_jax.predictor import Predictor
from sam3lt_jax.processing import images, results
from sam3lt_jax.processing.prompts import Prompt
from sam3lt_jax.processing.results import Results
from tests import tiny
from tests.jobs import pictures

DOG, CAT = Prompt("a dog"), Prompt("two yellow cats")
BOXES = Prompt(None, ((5, 5, 30, 28), (40, 10, 60, 33)), (1, 0))
BOTH = Prompt("a dog", ((5, 5, 30, 28),), (1,))
PROMPTS = [(DOG, CAT), (BOXES,), (CAT, BOTH, DOG, DOG, CAT), (DOG,), ()]
PHOTOS = [pictures.photo(i) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def predictor():
  return pictures.predictor()


def make(predictor, **options):
  with tiny.hurry():
    options = {"devices": jax.local_devices()[:1]} | options
    return Engine(predictor.model, predictor.variables, predictor.processor, **options)


@pytest.fixture(scope="module")
def three(predictor):
  """Three images a batch, up to four prompts together."""
  return make(predictor, image_buckets=(3,), prompt_buckets=(1, 4))


@pytest.fixture(scope="module")
def accelerator(predictor):
  """Masks are enlarged by jax, as on a GPU or TPU."""
  return make(predictor, image_buckets=(1, 3), prompt_buckets=(1, 4), masks_on_device=True)


def batches(one, photos, prompts):
  for start in range(0, len(photos), one.rows):
    rows = [
      one.asked(images.resize_image(photo, tiny.SIDE), photo.shape[:2], asked)
      for photo, asked in zip(photos[start : start + one.rows], prompts[start : start + one.rows])
    ]
    yield [row.prompts for row in rows], rows


def run(one, photos, prompts, threshold=0.0):
  """Results of each photo."""
  found = []
  for asked, rows in one.run(batches(one, photos, prompts), threshold, 0.5):
    for mine, of_prompts in zip(rows, asked):
      labels = tuple(of_prompts[i].phrase for i in mine.prompt)
      found.append(Results(mine.boxes, mine.scores, mine.masks(), labels, mine.size))
  return found


def by_predictor(predictor, photo, prompts, threshold=0.0):
  parts = [Results.empty(photo.shape[:2])]
  for p in prompts:
    boxes = [list(box) for box in p.boxes] or None
    parts.append(predictor(photo, p.text, boxes, list(p.labels) if boxes else None, threshold))
  return Results.concatenate(parts).sort()


def test_equals_the_predictor(three, predictor):
  for photo, prompts, one in zip(PHOTOS, PROMPTS, run(three, PHOTOS, PROMPTS), strict=True):
    assert len(one) == tiny.QUERIES * len(prompts)
    pictures.assert_same_results(one, by_predictor(predictor, photo, prompts))


@pytest.mark.parametrize("calls", ["one", "several"])
def test_the_best_come_first_and_boxes_lie_within_the_image(three, monkeypatch, calls):
  """Of all prompts together, whether one call answers them or several."""
  boxes = np.array([-0.5, 0.25, 1.5, 0.5], np.float32)
  detect = three.detect
  monkeypatch.setattr(
    three, "detect", lambda *a: (found := detect(*a)).replace(boxes=np.broadcast_to(boxes, found.boxes.shape))
  )
  prompts = (DOG, CAT) if calls == "one" else (CAT, DOG, CAT, BOTH, DOG)
  assert len(three.calls([three.asked(None, (9, 9), prompts)])) == (1 if calls == "one" else 2)
  ((_, (found,)),) = three.run(batches(three, PHOTOS[:1], [prompts]), 0.0, 0.5)
  assert (np.diff(found.scores) <= 0).all()
  assert (np.diff(found.query) < 0).any(), "the queries are in the scores' order: nothing is shown"
  height, width = found.size
  assert (found.boxes == np.float32([0, height / 4, width, height / 2])).all()


def test_equal_scores_stand_by_prompt_and_query():
  def part(*prompt):
    score = np.full(len(prompt), 0.5, np.float32)
    own = [f"{p}.{q}" for q, p in enumerate(prompt)]
    return kept.Kept(
      np.array(prompt), np.arange(len(prompt)), score, np.zeros((len(prompt), 4)), (9, 9), own.__getitem__
    )

  joined = kept.Kept.join([part(1, 1), part(2, 0)], (9, 9))
  assert [joined.mask(k) for k in range(4)] == ["0.1", "1.0", "1.1", "2.0"]
  assert joined.prompt.tolist() == [0, 1, 1, 2] and joined.query.tolist() == [1, 0, 1, 0]


def test_only_what_is_kept_is_fetched(three, predictor, monkeypatch):
  wanted = by_predictor(predictor, PHOTOS[0], PROMPTS[0])
  threshold = float(np.median(wanted.scores))
  fetched, of = [], three._masks.of

  def watched(masks, at, *rest):
    fetched.append(len(at[0]))
    return of(masks, at, *rest)

  monkeypatch.setattr(three._masks, "of", watched)
  (found,) = run(three, PHOTOS[:1], PROMPTS[:1], threshold)
  assert 0 < len(found) < len(wanted) and sum(fetched) == len(found)
  pictures.assert_same_results(found, wanted[wanted.scores > threshold])
  assert len(run(three, PHOTOS[:1], PROMPTS[:1], 1.0)[0]) == 0


def test_masks_enlarged_on_the_device_are_the_hosts(three, accelerator, monkeypatch):
  """Several masks a tile and several tiles a mask; 6 to 30 masks an image."""
  monkeypatch.setattr(kept, "TILE", 32)
  wanted, found = (run(one, PHOTOS, PROMPTS) for one in (three, accelerator))
  for a, b in zip(found, wanted):
    pictures.assert_same_results(a, b)
  assert 0 < np.mean(np.concatenate([one.masks.ravel() for one in found])) < 1


def test_masks_of_a_huge_picture_come_one_by_one_and_are_held_a_bit_a_pixel(monkeypatch):
  """40 masks of 2 megapixels: one of them at a time, and an eighth of all."""
  size, count = (1000, 2000), 40
  monkeypatch.setattr(results, "PACKED_ABOVE", count * 2_000_000 - 1)
  none = np.zeros(count)
  found = kept.Kept(none, none, none, np.zeros((count, 4)), size, lambda k: np.full(size, k % 2 == 0))
  tracemalloc.start()
  found = Results(found.boxes, found.scores, found.masks(), ["a dog"] * count, size)
  assert found.areas.tolist() == [2_000_000, 0] * 20
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < count * 2_000_000 / 8 + 4 * 2_000_000, peak


def test_neighbours_and_padding_change_nothing(three):
  """The same program: to the last bit."""
  photos, prompts = PHOTOS[:3], [(DOG, CAT), (CAT, DOG), (DOG, DOG)]
  together = run(three, photos, prompts)
  others = [PHOTOS[0], 255 - PHOTOS[1], PHOTOS[4]]
  with_others = run(three, others, [prompts[0], (CAT, CAT), ()])
  alone = run(three, photos[:1], prompts[:1])
  for other in (with_others[0], alone[0]):
    np.testing.assert_array_equal(together[0].scores, other.scores)
    np.testing.assert_array_equal(together[0].boxes, other.boxes)
    np.testing.assert_array_equal(together[0].masks, other.masks)
  assert not np.allclose(together[0].scores, together[1].scores, atol=1e-4)


def test_another_bucket_and_batch_give_the_same(three, predictor):
  one = make(predictor, image_buckets=(1,), prompt_buckets=(2,))
  for a, b in zip(run(three, PHOTOS, PROMPTS), run(one, PHOTOS, PROMPTS), strict=True):
    pictures.assert_same_results(a, b)


def test_prompts_become_few_calls(three):
  size = (40, 70)
  many = Prompt("a dog", ((5, 5, 30, 28),) * 9)
  calls = three.calls([three.asked(None, size, p) for p in ([DOG] * 6, [CAT], [many])])
  assert [call.index.tolist() for call in calls] == [
    [[0, 1, 2, 3], [0, -1, -1, -1], [-1] * 4],
    [[4, 5, -1, -1], [-1] * 4, [-1] * 4],
    [[-1], [-1], [0]],
  ]
  assert [call.boxes.shape for call in calls] == [(3, 4, 0, 4), (3, 4, 0, 4), (3, 1, 32, 4)]
  assert calls[0].phrases[1] == ["two yellow cats"] + ["a dog"] * 3  # stands where nothing is asked
  assert [call.index.tolist() for call in three.calls([three.asked(None, size, [DOG])])] == [
    [[0], [-1], [-1]]
  ]
  assert three.calls([three.asked(None, size, [])] * 2) == []


def test_a_device_takes_so_many_prompts_at_once(predictor, monkeypatch):
  monkeypatch.setattr(engine, "MOST_PROMPTS", 6)
  one = make(predictor, image_buckets=(1, 3), prompt_buckets=(1, 2, 4, 8))
  asked = [one.asked(None, (40, 70), [DOG] * 5)]
  assert [call.index.shape for call in one.calls(asked)] == [(1, 4), (1, 1)]
  assert [call.index.shape for call in one.calls(asked * 3)] == [(3, 2), (3, 2), (3, 1)]


def test_where_boxes_bring_a_token_they_run_apart():
  """In this profile a row without boxes reads another prompt if any row beside it has some."""
  profile = dataclasses.replace(Profile.transformers(), name="mixed batch", geometry_cls="with_any_boxes")
  config = pictures.CONFIG.replace(profile=profile)
  one = make(Predictor(*tiny.load(config)), image_buckets=(2,))
  asked = [one.asked(None, (40, 70), [p]) for p in (DOG, BOTH)]
  assert [len(labels) for row in asked for _, labels in row.boxes] == [0, 8]
  assert len(one.calls(asked)) == 2


def test_a_phrase_is_encoded_once_and_new_ones_together(three, monkeypatch):
  asked, read = [], three._read
  monkeypatch.setattr(three.phrases, "_read", lambda *a: asked.append(len(a[1])) or read(*a))
  new = [(Prompt("never seen"), Prompt("nor this"))] * 3
  run(three, PHOTOS[:3], new)
  run(three, PHOTOS[:3], new)
  run(three, PHOTOS[:1], new[:1])
  assert asked == [8]


def test_a_wrong_box_is_one_sentence(three):
  with pytest.raises(ValueError, match=r"box 0 .* is inverted"):
    three.asked(None, (10, 10), [Prompt(None, ((9, 9, 3, 3),), (1,))])


def test_programs_have_no_collective(three):
  run(three, PHOTOS[:1], PROMPTS[:1])
  programs = three.programs()
  assert all(programs[name] for name in ("encode", "read", "detect"))
  for compiled in programs.values():
    for one in compiled:
      text = one.as_text()
      assert "HloModule" in text
      assert not re.search(r"all-gather|all-reduce|all-to-all|collective-permute", text)


def test_what_is_compiled_ahead_is_what_runs(predictor):
  """For one image and for a batch; nothing is compiled twice, whoever comes first."""
  one = make(predictor, image_buckets=(1, 3), prompt_buckets=(1, 2))
  for photos in (1, 3):
    one.compile_ahead(photos, 2)
  threads = [threading.Thread(target=run, args=(one, PHOTOS[:3], [(DOG, CAT)] * 3)) for _ in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  run(one, PHOTOS[:1], [(DOG, CAT)])
  assert {name: len(made) for name, made in one.programs().items()} == {"encode": 2, "detect": 2, "read": 1}


@pytest.mark.full  # compiles all twice
def test_the_precision_of_products_makes_another_program(predictor):
  one = make(predictor, image_buckets=(1,), prompt_buckets=(1,))
  for precision in ("highest", "default", "highest"):
    with jax.default_matmul_precision(precision):
      run(one, PHOTOS[:1], [(DOG,)])
  assert len(one.programs()["encode"]) == 2


def test_a_failed_compilation_shows_in_the_call_and_is_tried_again(predictor, monkeypatch):
  one = make(predictor, image_buckets=(1,), prompt_buckets=(1,))
  broken = {"on": True}
  lower = one._encode._jitted.lower

  class Jitted:
    def lower(self, *given):
      if broken["on"]:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
      return lower(*given)

  monkeypatch.setattr(one._encode, "_jitted", Jitted())
  one.compile_ahead()
  with pytest.raises(MemoryError, match="too little memory"):
    run(one, PHOTOS[:1], [(DOG,)])
  broken["on"] = False
  assert len(run(one, PHOTOS[:1], [(DOG,)])[0]) == tiny.QUERIES


def test_images_a_device_are_what_memory_holds(predictor, monkeypatch):
  def batch(limit, needed=lambda one, prompts: 100 + 10 * one.image_buckets[-1] * prompts):
    one = make(predictor, image_buckets=(8,))
    monkeypatch.setattr(Engine, "memory_needed", needed)
    device = type(
      "Device", (), {"memory_stats": lambda self: None if limit is None else {"bytes_limit": limit}}
    )
    monkeypatch.setattr(Engine, "devices", property(lambda self: [device()]))
    one.fit_memory(1)
    return one.image_buckets[-1]

  assert batch(None) == 8  # a device that does not tell its memory
  assert batch(180 / 0.85) == 8
  assert batch(150 / 0.85) == 4
  assert batch(1) == 1
  assert batch(1e9, lambda one, prompts: float("inf") if one.rows > 2 else 0) == 2


def test_memory_grows_with_the_batch(predictor):
  one, two = (make(predictor, image_buckets=(n,), prompt_buckets=(4,)) for n in (1, 2))
  weights = sum(x.nbytes for x in jax.tree.leaves(one.variables))
  assert weights < one.memory_needed(3) < two.memory_needed(3)
  # One more image has four prompts' masks more, twice: in the making and being fetched.
  grid = 4 * tiny.SIDE // 14
  assert two.memory_needed(3) - one.memory_needed(3) > 2 * 4 * tiny.QUERIES * grid**2 * 4


@pytest.mark.parametrize(
  "given, message",
  [
    ({"image_buckets": (0,)}, r"image_buckets must be ascending positive sizes, got \(0,\)"),
    ({"prompt_buckets": (4, 1)}, r"prompt_buckets must be ascending positive sizes, got \(4, 1\)"),
    ({"model_parallel": 3}, "model=3 does not divide the 1 devices"),
    ({"devices": []}, r"devices must be a list of at least one jax.Device, got \[\]"),
    ({"devices": ["cpu"]}, r"devices must be a list of at least one jax.Device, got \['cpu'\]"),
  ],
)
def test_bad_arguments(predictor, given, message):
  with pytest.raises(ValueError, match=message):
    make(predictor, **given)
