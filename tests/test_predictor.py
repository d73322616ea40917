"""Predictor: the same results as the model by hand, nothing compiled twice, and clear errors."""

import dataclasses
import inspect
import json
from concurrent import futures

import jax
import numpy as np
import pytest
from PIL import Image

from sam3lt_jax import Predictor, Profile, Results, Sam3Processor, phrase_table, save_pretrained
from tests import tiny

compilations = []
jax.monitoring.register_event_duration_secs_listener(
  lambda event, _duration, **_: compilations.append(event) if "backend_compile" in event else None
)
CONFIG = tiny.config(vocab_size=49408)


@pytest.fixture(scope="module")
def base():
  """A predictor and its compiled functions, shared by most tests. On the CPU masks are enlarged by numpy."""
  loaded = tiny.load(CONFIG)
  with tiny.hurry():
    return Predictor(*loaded)


@pytest.fixture
def sibling(base):
  """Makes predictors with other options on the same model and the same compiled functions."""

  def make(**options):
    with tiny.hurry():
      other = Predictor(base.model, base.variables, **{"processor": base.processor, "fuse": False} | options)
    for name in ("_encode", "_detect", "_read"):
      setattr(other.engine, name, getattr(base.engine, name))
    other.engine.phrases._read = base.engine._read
    return other

  return make


def photo(height=60, width=90, seed=0):
  """uint8 [height, width, 3], smooth enough that a resize keeps something."""
  small = np.random.default_rng(seed).integers(0, 256, (6, 9, 3)).astype(np.uint8)
  return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


PHOTO = photo()
BOXES = [[10, 5, 40, 30], [50, 20, 80, 55.5]]
ALL = {"threshold": 0.0}  # random weights score low: keep every query


def assert_same(a, b, atol=1e-5):
  assert a.labels == b.labels
  assert a.size == b.size
  np.testing.assert_allclose(a.scores, b.scores, atol=atol)
  np.testing.assert_allclose(a.boxes, b.boxes, atol=atol * 100)  # pixels
  assert a.masks.shape == b.masks.shape
  # A logit within rounding of the threshold falls on either side.
  assert np.mean(a.masks != b.masks) <= (0 if atol == 0 else 1e-3)


# The same as by hand


IDLE = {"compile_ahead": False}  # what is looked at and asked nothing
MIXED_BATCH = dataclasses.replace(Profile.transformers(), name="mixed batch", geometry_cls="with_any_boxes")


@pytest.mark.parametrize(
  "profile, boxes, labels",
  [
    (Profile.original(), None, None),
    (Profile.original(), BOXES, [1, 0]),
    # These compile all again; tests/parity compares the profile of transformers with theirs.
    pytest.param(Profile.transformers(), None, None, marks=pytest.mark.full),
    pytest.param(MIXED_BATCH, None, None, marks=pytest.mark.full),
  ],
)
def test_equals_processor_model_and_post_processing(base, profile, boxes, labels):
  """The model as it was loaded, not fused, its call unpadded."""
  config = CONFIG.replace(profile=profile)
  model, variables = tiny.load(config)
  processor = Sam3Processor(config)
  predictor = base
  if config != CONFIG:
    with tiny.hurry():
      predictor = Predictor(model, variables)
  phrases = ["a dog", "two yellow cats"]
  given = {} if boxes is None else {"input_boxes": [boxes] * 2, "input_boxes_labels": [labels] * 2}
  inputs = processor(images=PHOTO, text=phrases, **given)
  out = tiny.jit(lambda v, inputs: model.apply(v, **inputs))(variables, inputs.model_inputs)
  threshold = float(np.median(processor.post_process_object_detection(out, 0.0)[0]["scores"]))
  wanted = processor.post_process_instance_segmentation(
    out, threshold, 0.4, target_sizes=[PHOTO.shape[:2]] * 2
  )
  results = predictor(PHOTO, phrases, boxes, labels, threshold, 0.4)
  assert isinstance(results, Results)
  assert 0 < len(results) < 2 * tiny.QUERIES
  parts = [
    Results(**row, labels=[phrase] * len(row["scores"]), size=PHOTO.shape[:2])
    for row, phrase in zip(wanted, phrases)
  ]
  assert_same(results, Results.concatenate(parts).sort())
  assert 0 < results.masks.mean() < 1


def test_set_image_then_predict_equals_a_call(base):
  assert base.set_image(PHOTO) is base
  for prompt in (
    {"text": "a dog"},
    {"text": ["a", "b"], "boxes": BOXES},
    {"boxes": BOXES, "box_labels": [0, 1]},
  ):
    assert_same(base.predict(**prompt, **ALL), base(PHOTO, **prompt, **ALL), atol=0)
  base.set_image(photo(seed=1))
  assert not np.allclose(base.predict("a dog", **ALL).scores, base(PHOTO, "a dog", **ALL).scores, atol=1e-4)


def test_results_remember_what_was_given(base, tmp_path, monkeypatch):
  path = tmp_path / "photo.png"
  Image.fromarray(PHOTO).save(path)
  assert base(path, "a dog").image == path and base(PHOTO, "a dog").image is PHOTO
  assert [found.image is PHOTO for found in base([PHOTO, PHOTO], "a dog")] == [True, True]
  assert base.set_image(PHOTO).predict("a dog").image is PHOTO
  # An iterator may hand out one array again and again, with another picture in it.
  assert [found.image for found in base.stream([path, PHOTO], "a dog")] == [path, None]
  monkeypatch.setattr(base, "remember_images", False)
  assert base(path, "a dog").image is None and base.set_image(path).predict("a dog").image is None


def test_several_phrases_are_asked_each_for_itself(base):
  together = base(PHOTO, ["a dog", "a cat", "a dog"], **ALL)
  dog, cat = base(PHOTO, "a dog", **ALL), base(PHOTO, "a cat", **ALL)
  assert_same(together, Results.concatenate([dog, dog, cat]).sort(), atol=0)
  assert (np.diff(together.scores) <= 0).all()
  assert not np.allclose(dog.scores, cat.scores, atol=1e-4)


def test_boxes_alone_ask_for_visual(base):
  results = base(PHOTO, boxes=BOXES, **ALL)
  assert set(results.labels) == {"visual"}
  assert_same(results, base(PHOTO, "visual", BOXES, **ALL), atol=0)
  assert not np.allclose(results.scores, base(PHOTO, "visual", **ALL).scores, atol=1e-4)


def test_labels_default_to_positive_and_a_single_box_needs_no_list(base):
  two = base(PHOTO, boxes=BOXES, **ALL)
  assert_same(two, base(PHOTO, boxes=BOXES, box_labels=[1, 1], **ALL), atol=0)
  assert not np.allclose(two.scores, base(PHOTO, boxes=BOXES, box_labels=[1, 0], **ALL).scores, atol=1e-5)
  one = base(PHOTO, boxes=BOXES[:1], box_labels=[0], **ALL)
  assert_same(base(PHOTO, boxes=BOXES[0], box_labels=0, **ALL), one, atol=0)
  assert_same(base(PHOTO, boxes=np.array(BOXES[:1]), box_labels=np.array([0]), **ALL), one, atol=0)


def test_paths_pil_images_and_arrays_are_the_same(base, tmp_path):
  path = tmp_path / "photo.png"
  Image.fromarray(PHOTO).save(path)
  wanted = base(PHOTO, "a dog", **ALL)
  for image in (path, str(path), Image.open(path), path.read_bytes(), PHOTO / np.float32(255)):
    assert_same(base(image, "a dog", **ALL), wanted, atol=0)


def test_lists_of_images(base):
  images = [PHOTO, Image.fromarray(photo(40, 50, seed=1))]
  one = [[base(image, phrase, **ALL) for phrase in ("a", "b")] for image in images]
  shared = base(images, ["a", "b"], **ALL)
  assert isinstance(shared, list)
  assert [r.size for r in shared] == [(60, 90), (40, 50)]
  for results, parts in zip(shared, one):
    assert_same(results, Results.concatenate(parts).sort(), atol=0)
  for results, wanted in zip(base(images, "a", **ALL), (one[0][0], one[1][0])):
    assert_same(results, wanted, atol=0)
  for results, wanted in zip(base(images, [["a"], ["b"]], **ALL), (one[0][0], one[1][1])):
    assert_same(results, wanted, atol=0)
  batch = base(np.stack([PHOTO, PHOTO]), "a", **ALL)
  assert_same(batch[1], one[0][0], atol=0)
  assert len(base([PHOTO], "a", **ALL)) == 1


def test_lists_of_images_with_boxes_of_their_own(base):
  images = [PHOTO, PHOTO]
  with_box, without = base(PHOTO, "a", BOXES, [1, 0], **ALL), base(PHOTO, "a", **ALL)
  results = base(images, "a", [BOXES, None], [[1, 0], None], **ALL)
  assert_same(results[0], with_box, atol=0)
  assert_same(results[1], without, atol=0)
  results = base(images, [["a"], None], [None, BOXES[:1]], **ALL)
  assert_same(results[0], without, atol=0)
  assert_same(results[1], base(PHOTO, boxes=BOXES[:1], **ALL), atol=0)


# Thresholds and empty results


def test_thresholds(base, sibling):
  everything = base(PHOTO, "a dog", **ALL)
  assert len(everything) == tiny.QUERIES
  middle = float(np.median(everything.scores))
  kept = base(PHOTO, "a dog", threshold=middle)
  assert_same(kept, everything[everything.scores > middle], atol=0)
  areas = [base(PHOTO, "a dog", **ALL, mask_threshold=t).masks.sum() for t in (0.0, 0.3, 0.5, 1.0)]
  assert areas[0] == everything.masks.size and areas[1] > areas[2] > areas[3] == 0
  # None is the profile's.
  profile = dataclasses.replace(CONFIG.profile, score_threshold=middle)
  other = sibling(processor=Sam3Processor(CONFIG.replace(profile=profile)))
  assert_same(other(PHOTO, "a dog"), kept, atol=0)
  assert_same(other.set_image(PHOTO).predict("a dog"), kept, atol=0)


def test_nothing_found_keeps_its_shapes(base, sibling):
  for predictor in (base, sibling(masks_on_device=True)):
    results = predictor(PHOTO, ["a", "b"], threshold=1.0)
    assert len(results) == 0
    assert results.masks.shape == (0, 60, 90) and results.masks.dtype == bool
    assert results.boxes.shape == (0, 4) and results.scores.shape == (0,)
    assert results.labels == () and results.size == (60, 90)


# Compiled shapes, caches, buckets


def test_another_phrase_box_count_or_photo_size_compiles_nothing(sibling):
  """Masks on the device included, in images of one tile and of several."""
  predictor = sibling(masks_on_device=True)
  predictor(PHOTO, "a dog", BOXES, **ALL)
  assert compilations
  compilations.clear()
  predictor(photo(75, 40, seed=1), ["another phrase", "and one more"], threshold=0.01, mask_threshold=0.4)
  predictor(photo(30, 700, seed=2), boxes=BOXES + BOXES[:1], box_labels=[1, 0, 1], **ALL)
  predictor.set_image(photo(600, 20, seed=3)).predict([f"phrase {i}" for i in range(9)], **ALL)
  predictor([PHOTO, photo(1, 1)], "a cat", **ALL)
  predictor(PHOTO, "nothing", threshold=1.0)
  assert compilations == []


def test_a_phrase_is_encoded_once(base, sibling, monkeypatch):
  predictor, calls, read = sibling(), [], base.engine._read
  monkeypatch.setattr(predictor.engine.phrases, "_read", lambda *args: calls.append(1) or read(*args))
  first = predictor(PHOTO, ["a dog", "a dog", "a cat"], **ALL)
  assert len(calls) == 1
  assert_same(predictor(PHOTO, ["a dog", "a dog", "a cat"], **ALL), first, atol=0)
  predictor.set_image(PHOTO).predict("a cat", **ALL)
  assert len(calls) == 1
  predictor(PHOTO, [f"phrase {i}" for i in range(9)], **ALL)  # two batches of 8
  assert len(calls) == 3


def test_more_phrases_than_are_kept(base, sibling, monkeypatch):
  monkeypatch.setattr(phrase_table, "ROWS", (2,))
  predictor = sibling()
  wanted = base(PHOTO, ["a", "b", "c"], **ALL)
  assert_same(predictor(PHOTO, ["a", "b", "c"], **ALL), wanted, atol=1e-5)
  assert list(predictor.engine.phrases) == ["b", "c"]
  predictor(PHOTO, ["b", "d"], **ALL)
  assert list(predictor.engine.phrases) == ["b", "d"]
  assert_same(predictor(PHOTO, ["a", "b", "c"], **ALL), wanted, atol=1e-5)


def test_threads_share_a_predictor(base, sibling, monkeypatch):
  """With room for few phrases, so that they push out each other's."""
  monkeypatch.setattr(phrase_table, "ROWS", (2,))
  predictor, phrases = sibling(), ["a", "b", "c", "d"]
  wanted = {phrase: base(PHOTO, phrase, **ALL) for phrase in phrases}

  def ask(i):
    phrase = phrases[i % len(phrases)]
    assert_same(predictor(PHOTO, phrase, **ALL), wanted[phrase])

  with futures.ThreadPoolExecutor(4) as pool:
    list(pool.map(ask, range(40)))


def test_other_weights_take_the_place_of_the_first(base, sibling):
  """As after training: compiled programs stay, the features of phrases go; folded or not."""
  predictor = sibling()
  first = predictor(PHOTO, "a dog", **ALL)
  model, variables = tiny.load(CONFIG)
  changed = jax.tree.map(lambda x: x * 1.1, variables)
  compilations.clear()
  predictor._loaded = model
  predictor.use_variables(changed)
  second = predictor(PHOTO, "a dog", **ALL)
  assert not [event for event in compilations if "detect" in event]
  assert not np.allclose(first.scores, second.scores, atol=1e-4)
  with tiny.hurry():
    assert_same(Predictor(model, changed)(PHOTO, "a dog", **ALL), second)


# Many images


def test_a_stream_is_one_image_after_the_other(base, sibling):
  images = [photo(40 + 3 * i, 50, seed=i) for i in range(7)]
  wanted = [base(image, ["a", "b"], **ALL) for image in images]
  for predictor in (base, sibling(image_buckets=(1, 3))):
    found = list(predictor.stream(iter(images), ["a", "b"], **ALL))
    assert len(found) == 7
    for a, b in zip(found, wanted):
      assert_same(a, b)
    for a, b in zip(predictor(images[:4], ["a", "b"], **ALL), wanted):
      assert_same(a, b)


def test_a_stream_holds_few_images(base, monkeypatch):
  """What was taken from the source beyond what was given out stays within a batch and the readers."""
  monkeypatch.setattr("sam3lt_jax.processing.images.default_workers", lambda: 2)
  taken = [0]

  def source():
    for i in range(40):
      taken[0] += 1
      yield photo(20, 20, seed=i)

  ahead = [taken[0] - i for i, _ in enumerate(base.stream(source(), "a", threshold=1.0))]
  assert len(ahead) == 40 and max(ahead) <= 1 + 2 * 2 + 3


def test_an_image_that_cannot_be_read_ends_the_stream_in_its_place(base, tmp_path):
  (tmp_path / "bad.png").write_text("no image")
  stream = base.stream([PHOTO, PHOTO, str(tmp_path / "bad.png"), PHOTO], "a", threshold=1.0)
  with pytest.raises(ValueError, match=r"bad\.png"):
    list(stream)
  with pytest.raises(ValueError, match="text must be"):
    base.stream([PHOTO], ["a", 3])


def test_prompt_buckets_change_nothing(base, sibling):
  """Five phrases: one by one, or 4 and a bucket of 4 for the fifth; two: padded to 4."""
  phrases = ["a dog", "a cat", "two birds", "a red car", "sky"]
  batched = sibling(prompt_buckets=(1, 4))
  assert_same(batched(PHOTO, phrases, BOXES, **ALL), base(PHOTO, phrases, BOXES, **ALL))
  assert_same(batched(PHOTO, phrases[:2], **ALL), base(PHOTO, phrases[:2], **ALL))


def test_more_boxes_than_a_bucket(base, sibling):
  """Nine boxes: the bucket of 32, or five times the largest where that is 2."""
  boxes = [[x, 5, x + 12, 40] for x in range(0, 72, 8)]
  assert len(boxes) == 9
  wanted = base(PHOTO, "a dog", boxes, **ALL)
  assert_same(sibling(box_buckets=(2,))(PHOTO, "a dog", boxes, **ALL), wanted)
  assert not np.allclose(wanted.scores, base(PHOTO, "a dog", boxes[:8], **ALL).scores, atol=1e-5)


@pytest.mark.parametrize("order", ["upsample_then_sigmoid", "sigmoid_then_upsample"])
@pytest.mark.parametrize("size", [(60, 90), (530, 50), (20, 1030)])
def test_masks_on_the_device_are_the_hosts(sibling, order, size):
  processor = Sam3Processor(CONFIG.replace(profile=dataclasses.replace(CONFIG.profile, mask_order=order)))
  host, device = (
    sibling(processor=processor, masks_on_device=on)(photo(*size), ["a", "b"], **ALL) for on in (False, True)
  )
  assert host.masks.shape == (2 * tiny.QUERIES, *size)
  assert_same(device, host)
  assert 0 < host.masks.mean() < 1


def test_mask_orders_differ(sibling):
  """So that the test above can tell them apart."""
  masks = []
  for name in ("upsample_then_sigmoid", "sigmoid_then_upsample"):
    processor = Sam3Processor(CONFIG.replace(profile=dataclasses.replace(CONFIG.profile, mask_order=name)))
    masks.append(sibling(processor=processor)(photo(300, 300), "a dog", **ALL, mask_threshold=0.4).masks)
  assert 1e-3 < np.mean(masks[0] != masks[1]) < 0.2


# Loading


def test_from_pretrained_with_a_tokenizer_of_its_own(tmp_path):
  """A directory whose tokenizer has cat and dog exchanged."""
  bundled = Sam3Processor(CONFIG).tokenizer
  bundled.save(tmp_path / "tokenizer.json")
  data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
  vocabulary = data["model"]["vocab"]
  vocabulary["cat</w>"], vocabulary["dog</w>"] = vocabulary["dog</w>"], vocabulary["cat</w>"]
  (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
  model, variables = tiny.load(tiny.config("transformers", vocab_size=49408))
  save_pretrained(tmp_path / "model", model, variables, tokenizer=tmp_path)
  loaded = Predictor.from_pretrained(tmp_path / "model", **IDLE)
  assert loaded.processor.tokenizer.encode("a cat") == bundled.encode("a dog") != bundled.encode("a cat")
  assert loaded.processor.profile == Profile.transformers()
  assert loaded.processor.image_size == loaded.model.config.vision.image_size == tiny.SIDE
  assert loaded.model.config.text.fused
  original = Predictor.from_pretrained(
    tmp_path / "model", profile="original", image_size=56, fuse=False, **IDLE
  )
  assert original.processor.profile == Profile.original()
  assert original.processor.tokenizer.profile == Profile.original()
  assert original.processor.image_size == 56
  assert not original.model.config.text.fused


def test_the_saved_image_size_counts(tmp_path):
  model, variables = tiny.load(CONFIG)
  save_pretrained(tmp_path / "model", model, variables, format="transformers")
  path = tmp_path / "model" / "processor_config.json"
  path.write_text(path.read_text().replace(str(tiny.SIDE), "56"))
  assert Predictor.from_pretrained(tmp_path / "model", **IDLE).processor.image_size == 56
  assert Predictor.from_pretrained(tmp_path / "model", image_size=28, **IDLE).processor.image_size == 28


def test_from_pretrained_options():
  given = {"config": CONFIG, **IDLE}
  loaded = Predictor.from_pretrained("random:tiny", **given, dtype="bfloat16", box_buckets=(4,))
  assert loaded.model.dtype == loaded.model.param_dtype == "bfloat16"
  leaves = jax.tree.leaves(loaded.variables["params"])
  assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}
  mixed = Predictor.from_pretrained("random:tiny", **given, dtype="bfloat16", param_dtype="float32")
  assert (mixed.model.dtype, mixed.model.param_dtype) == ("bfloat16", "float32")
  for size in (100, 14, 0, -28):
    with pytest.raises(ValueError, match=f"image_size must be .*got {size}"):
      Predictor.from_pretrained("random:tiny", **given, image_size=size)


def test_another_image_size_runs(base, sibling):
  small = sibling(processor=Sam3Processor(CONFIG, image_size=28))
  results = small(PHOTO, "a dog", **ALL)
  assert results.masks.shape == (tiny.QUERIES, 60, 90)
  assert np.isfinite(results.boxes).all()


def test_warnings_point_at_the_users_line(base, recwarn):
  """Whatever way the call takes inside."""
  line = inspect.currentframe().f_lineno
  base(PHOTO, boxes=[[0.1, 0.1, 0.5, 0.5]])
  base([PHOTO, PHOTO], "a dog", boxes=[[[0.1, 0.1, 0.5, 0.5]], None])
  list(base.stream([PHOTO], "a dog " * 30))
  base.processor(text="a dog " * 30)
  base.processor.tokenizer("a dog " * 30)
  assert [(w.filename, w.lineno - line) for w in recwarn] == [(__file__, k) for k in range(1, 6)]
