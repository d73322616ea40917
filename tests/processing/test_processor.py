"""Sam3Processor: beside transformers' own, and everything a user may get wrong."""

import dataclasses
import json
import types
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sam3lt_jax.config import Profile, Sam3LiteTextConfig, TextConfig, VisionConfig
from sam3lt_jax.processing.processor import ProcessorOutput, Sam3Processor
from sam3lt_jax.processing.tokenizer import ClipTokenizer

SIZE = 56
_PROFILES = ("original", "transformers")


def photo(height, width, seed=0):
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
  return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def photos():
  return [photo(60, 90, 0), photo(120, 40, 1)]


@pytest.fixture(scope="module", params=_PROFILES)
def processor(request):
  return Sam3Processor(request.param, image_size=SIZE)


def test_it_says_what_it_is():
  assert repr(Sam3Processor("transformers", 84)) == "Sam3Processor(84 pixels, profile transformers)"


def model_outputs(prompts=3, queries=10, side=24, seed=0):
  """What a model gives, with scores on both sides of the thresholds; the last prompt finds nothing."""
  rng = np.random.default_rng(seed)
  corners = rng.uniform(-0.1, 1.1, (prompts, queries, 2, 2))
  masks = np.kron(rng.normal(0, 6, (prompts, queries, side // 4, side // 4)), np.ones((4, 4)))
  presence = np.full((prompts, 1), 3.0)
  presence[-1] = -9
  arrays = {
    "pred_masks": masks + rng.normal(0, 0.5, masks.shape),
    "pred_boxes": np.concatenate([corners.min(2), corners.max(2)], -1),
    "pred_logits": rng.normal(0, 2, (prompts, queries)),
    "presence_logits": presence,
    "semantic_seg": rng.normal(0, 3, (prompts, 1, side, side)),
  }
  return {k: v.astype(np.float32) for k, v in arrays.items()}


# Calls that both processors take, as (text, input_boxes, input_boxes_labels) for the two photos.
_BOX_A, _BOX_B, BOX_C = [10.0, 5.0, 40.0, 50.0], [1.5, 2.5, 30.0, 20.25], [0, 0, 40, 120]
CALLS = {
  "text": (["a red truck", "dog"], None, None),
  "text and boxes": (["truck", "dog"], [[_BOX_A], [_BOX_B]], [[1], [0]]),
  "boxes alone": (None, [[_BOX_A, _BOX_B], [BOX_C]], [[1, 0], [1]]),
  "boxes without labels": (["truck", "dog"], [[_BOX_A, _BOX_B], [BOX_C]], None),
  "mixed": (["truck", None], [None, [BOX_C, _BOX_B]], [None, [1, 0]]),
  "mixed without labels": (["truck", None], [None, [BOX_C]], None),
  "an empty list": (["truck", "dog"], [[_BOX_A], []], [[1], []]),
  "an array": (
    "dog",
    np.asarray([[_BOX_A, _BOX_B], [BOX_C, _BOX_B]]),
    np.asarray([[1, 0], [1, 1]]),
  ),
  "beyond the edge": (["truck", "dog"], [[[-5, -3, 95, 70]], [[20, 20, 20, 20]]], None),
}


@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.replace(" ", "_"))
def test_shapes_and_types(processor, photos, call):
  text, boxes, labels = CALLS[call]
  out = processor(images=photos, text=text, input_boxes=boxes, input_boxes_labels=labels)
  context = processor.profile.context_length
  assert out.pixel_values.shape == (2, SIZE, SIZE, 3) and out.pixel_values.dtype == np.float32
  assert -1 <= out.pixel_values.min() < out.pixel_values.max() <= 1
  assert out.original_sizes.dtype == np.int64 and out.original_sizes.tolist() == [[60, 90], [120, 40]]
  assert out.input_ids.shape == out.attention_mask.shape == (2, context)
  assert out.input_ids.dtype == out.attention_mask.dtype == np.int32
  keys = {"pixel_values", "original_sizes", "input_ids", "attention_mask"}
  if boxes is not None:
    keys |= {"input_boxes", "input_boxes_labels"}
    assert out.input_boxes.dtype == np.float32 and out.input_boxes_labels.dtype == np.int32
    assert out.input_boxes.shape[:2] == out.input_boxes_labels.shape
  assert set(out) == keys and set(out.model_inputs) == keys - {"original_sizes"}


def test_boxes_by_hand(processor, photos):
  out = processor(
    images=photos, text=["a", None], input_boxes=[[[9, 6, 45, 30]], [[0, 0, 40, 120], [10, 30, 20, 60]]],
    input_boxes_labels=[[0], [1, -10]],
  )  # fmt: skip
  expected = [
    [[0.3, 0.3, 0.4, 0.4], [-10, -10, 0, 0]],
    [[0.5, 0.5, 1, 1], [-10, -10, 0, 0]],
  ]
  np.testing.assert_allclose(out.input_boxes, expected, atol=1e-6)
  assert out.input_boxes_labels.tolist() == [[0, -10], [1, -10]]


def test_a_box_with_a_coordinate_of_minus_10_is_a_box(processor, photos):
  out = processor(images=photos[0], text="dog", input_boxes=[[[-10, 6, 26, 30]]])
  np.testing.assert_allclose(out.input_boxes, [[[8 / 90, 0.3, 0.4, 0.4]]], atol=1e-6)
  assert out.input_boxes_labels.tolist() == [[1]]


def test_visual_stands_for_boxes_alone(processor, photos):
  alone = processor(images=photos, input_boxes=[[_BOX_A], [_BOX_B]])
  named = processor(images=photos, text=["visual", None], input_boxes=[[_BOX_A], [_BOX_B]])
  written = processor.tokenizer("visual")[0][0]
  for out in (alone, named):
    np.testing.assert_array_equal(out.input_ids, [written, written])


def test_one_phrase_for_several_images_and_several_for_one(processor, photos):
  out = processor(images=photos, text="dog")
  np.testing.assert_array_equal(out.input_ids[0], out.input_ids[1])
  assert out.input_ids.shape[0] == 2
  out = processor(images=photos[0], text=["dog", "cat", None], input_boxes=[None, None, [_BOX_A]])
  assert out.pixel_values.shape[0] == 1 and out.input_ids.shape[0] == 3
  np.testing.assert_allclose(out.input_boxes[2], processor(photos[0], input_boxes=[[_BOX_A]]).input_boxes[0])


def test_parts_alone(processor, photos):
  assert set(processor(images=photos)) == {"pixel_values", "original_sizes"}
  assert set(processor(text="dog")) == {"input_ids", "attention_mask"}
  full = processor(images=photos, text=["dog", "cat"], input_boxes=[[_BOX_A], [_BOX_B]])
  out = processor(text=["dog", "cat"], input_boxes=[[_BOX_A], [_BOX_B]], original_sizes=[(60, 90), (120, 40)])
  assert set(out) == set(full) - {"pixel_values"}
  for key in out:
    np.testing.assert_array_equal(out[key], full[key])
  none = processor(images=photos, text=["dog", "cat"], input_boxes=[None, []])
  assert "input_boxes" not in none and "input_boxes_labels" not in none


def test_images_in_every_form_give_the_same_pixels(processor, photos, tmp_path):
  photo = photos[0]
  Image.fromarray(photo).save(tmp_path / "a.png")
  expected = processor(images=photo).pixel_values
  batch = np.stack([photo, photo])
  for images in (
    Image.fromarray(photo),
    tmp_path / "a.png",
    str(tmp_path / "a.png"),
    [photo],
    jnp.asarray(photo),
  ):
    np.testing.assert_array_equal(processor(images=images).pixel_values, expected)
  np.testing.assert_array_equal(processor(images=batch).pixel_values, np.concatenate([expected] * 2))


def test_prompts_do_not_depend_on_their_neighbours(processor, photos):
  text, boxes = ["truck", None, "a small dog"], [None, [_BOX_A, _BOX_B], [_BOX_B]]
  out = processor(photos[0], text=text, input_boxes=boxes)
  for i in range(3):
    alone = processor(photos[0], text=[text[i]], input_boxes=[boxes[i]])
    np.testing.assert_array_equal(out.input_ids[i], alone.input_ids[0])
    count = len(boxes[i] or [])
    if count:
      np.testing.assert_array_equal(out.input_boxes[i, :count], alone.input_boxes[0])
    assert (out.input_boxes_labels[i, count:] == -10).all()


def test_return_tensors(processor, photos):
  plain = processor(photos, text=["a", "b"], input_boxes=[[_BOX_A], None])
  as_numpy = processor(photos, text=["a", "b"], input_boxes=[[_BOX_A], None], return_tensors="np")
  as_jax = processor(photos, text=["a", "b"], input_boxes=[[_BOX_A], None], return_tensors="jax")
  for key, value in plain.items():
    assert type(value) is type(as_numpy[key]) is np.ndarray
    np.testing.assert_array_equal(value, as_jax[key])
    assert isinstance(as_jax[key], np.ndarray if key == "original_sizes" else jnp.ndarray)
    assert as_jax[key].dtype == value.dtype
  for other in ("pt", "tf", True):
    with pytest.raises(ValueError, match="numpy is what comes"):
      processor(photos, return_tensors=other)


def test_the_output_is_a_dictionary_with_attributes():
  out = ProcessorOutput(a=1)
  assert out.a == out["a"] == 1 and dict(**out) == {"a": 1}
  with pytest.raises(AttributeError, match="no 'b' here; there are: a"):
    _ = out.b
  assert not hasattr(out, "b")


def test_a_phrase_over_the_context(photos):
  phrase = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
  processor = Sam3Processor("original", image_size=SIZE)
  with pytest.warns(UserWarning, match="one two three"):
    assert processor(text=phrase).input_ids.shape == (1, 16)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert processor(text=phrase, truncation=False).input_ids.shape == (1, 17)


def test_empty_phrases_emoji_and_control_characters(processor):
  with pytest.warns(UserWarning, match="text '' is empty"):
    out = processor(text=["", "dog"])
  tokenizer = processor.tokenizer
  assert out.input_ids[0, :2].tolist() == [tokenizer.sot_token_id, tokenizer.eot_token_id]
  assert out.attention_mask[0].sum() == 2
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert processor(text="🐶 \x00\x1b").attention_mask.sum() > 2


@pytest.mark.parametrize("kind", ["mapping", "object", "jax"])
def test_post_processing(processor, kind):
  arrays = model_outputs()
  outputs = {
    "mapping": arrays,
    "object": types.SimpleNamespace(**arrays),
    "jax": types.SimpleNamespace(**{k: jnp.asarray(v) for k, v in arrays.items()}),
  }[kind]
  sizes = [(60, 90), (120, 40), (33, 77)]
  scores = 1 / (1 + np.exp(-arrays["pred_logits"])) / (1 + np.exp(-arrays["presence_logits"]))
  keep = scores > processor.profile.score_threshold
  results = processor.post_process_instance_segmentation(outputs, target_sizes=sizes)
  assert keep[0].any() and keep[1].any() and not keep[2].any()
  for i, (result, (height, width)) in enumerate(zip(results, sizes)):
    count = keep[i].sum()
    assert list(result) == ["scores", "boxes", "masks"]
    assert [result[k].dtype for k in result] == [np.float32, np.float32, bool]
    assert result["masks"].shape == (count, height, width)
    assert result["boxes"].shape == (count, 4)
    np.testing.assert_allclose(result["scores"], scores[i][keep[i]], rtol=1e-5)
    expected = arrays["pred_boxes"][i][keep[i]] * [width, height, width, height]
    np.testing.assert_allclose(result["boxes"], expected, rtol=1e-5, atol=1e-4)
  low = processor.post_process_instance_segmentation(outputs, threshold=0.0)
  np.testing.assert_array_equal(low[1]["masks"], arrays["pred_masks"][1] > 0)
  np.testing.assert_array_equal(low[1]["boxes"], arrays["pred_boxes"][1])
  detections = processor.post_process_object_detection(outputs, target_sizes=np.asarray(sizes))
  for detection, result in zip(detections, results):
    assert list(detection) == ["scores", "boxes"]
    for key in detection:
      np.testing.assert_array_equal(detection[key], result[key])


def test_default_threshold_and_missing_presence():
  arrays = model_outputs()
  arrays["presence_logits"] = None
  arrays["pred_logits"][:] = -0.4  # score 0.40
  kept = {p: len(Sam3Processor(p).post_process_object_detection(arrays)[0]["scores"]) for p in _PROFILES}
  assert kept == {"original": 0, "transformers": 10}
  del arrays["presence_logits"]
  assert len(Sam3Processor().post_process_object_detection(arrays, 0.3)[0]["scores"]) == 10


def test_semantic_segmentation(processor):
  outputs = model_outputs()
  for sizes in (None, [(60, 90), (120, 40), (33, 77)]):
    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
    scored = processor.post_process_semantic_segmentation(
      outputs, sizes, 0.5, return_segmentation_scores=True
    )
    for i, (segmentation, both) in enumerate(zip(maps, scored)):
      assert segmentation.dtype == np.uint8 and set(np.unique(segmentation)) == {0, 1}
      assert segmentation.shape == ((24, 24) if sizes is None else sizes[i])
      np.testing.assert_array_equal(segmentation, both.segmentation)
      assert both.segmentation_scores.shape == (1, *segmentation.shape)
      np.testing.assert_array_equal(segmentation, both["segmentation_scores"][0] > 0.5)
  low = processor.post_process_semantic_segmentation(outputs)
  np.testing.assert_array_equal(low[0], outputs["semantic_seg"][0, 0] > 0)


def test_bad_post_processing_arguments(processor):
  outputs = model_outputs()
  for threshold in (-0.1, 1.5, np.nan, "0.5"):
    with pytest.raises(ValueError, match=r"^threshold must be .*\[0, 1\]"):
      processor.post_process_instance_segmentation(outputs, threshold=threshold)
    with pytest.raises(ValueError, match=r"^threshold must be .*\[0, 1\]"):
      processor.post_process_object_detection(outputs, threshold)
    with pytest.raises(ValueError, match=r"^threshold must be .*\[0, 1\]"):
      processor.post_process_semantic_segmentation(outputs, threshold=threshold)
    with pytest.raises(ValueError, match=r"^mask_threshold must be .*\[0, 1\]"):
      processor.post_process_instance_segmentation(outputs, mask_threshold=threshold)
  for method in ("instance_segmentation", "object_detection", "semantic_segmentation"):
    with pytest.raises(ValueError, match=r"target_sizes must have one .* 3 expected, got 2"):
      getattr(processor, f"post_process_{method}")(outputs, target_sizes=[(60, 90)] * 2)
  with pytest.raises(ValueError, match="outputs has no semantic_seg"):
    processor.post_process_semantic_segmentation({"pred_logits": outputs["pred_logits"]})


def _tiny_config(profile="original", **text):
  return Sam3LiteTextConfig(
    vision=VisionConfig(image_size=112), text=TextConfig(**text), profile=Profile.named(profile)
  )


def test_construction(photos):
  assert Sam3Processor().profile == Profile.original() and Sam3Processor().image_size == 1008
  assert Sam3Processor(_tiny_config("transformers")).profile == Profile.transformers()
  assert Sam3Processor(_tiny_config()).image_size == 112
  assert Sam3Processor(_tiny_config(), image_size=28)(photos[0]).pixel_values.shape == (1, 28, 28, 3)
  for bad in (0, -14, 10.5, True, "1008"):
    with pytest.raises(ValueError, match="image_size must be a positive whole number"):
      Sam3Processor(image_size=bad)
  with pytest.raises(ValueError, match="profile must be one of"):
    Sam3Processor("s0")
  with pytest.raises(ValueError, match="config must be"):
    Sam3Processor({"model_type": "sam3"})
  with pytest.raises(ValueError, match="id 49407, but the model's vocabulary has 300"):
    Sam3Processor(_tiny_config(vocab_size=300))(text="dog")


def test_from_pretrained(tmp_path, photos):
  config = _tiny_config("transformers")
  model = types.SimpleNamespace(config=config)
  for source in (config, model):
    assert Sam3Processor.from_pretrained(source).profile == config.profile
    assert Sam3Processor.from_pretrained(source, profile="original").profile == Profile.original()

  directory = tmp_path / "model"
  directory.mkdir()
  config.to_json(directory / "config.json")
  loaded = Sam3Processor.from_pretrained(directory)
  assert (loaded.profile, loaded.image_size) == (config.profile, 112)
  assert Sam3Processor.from_pretrained(directory, "original").profile == Profile.original()

  profile = dataclasses.replace(Profile.transformers(), pad_token_id=0)
  config.replace(profile=profile).to_json(directory / "config.json")
  ClipTokenizer(profile=profile).save(directory)
  (directory / "processor_config.json").write_text(
    json.dumps({"image_processor": {"size": {"height": 56, "width": 56}}, "target_size": 56})
  )
  loaded = Sam3Processor.from_pretrained(str(directory))
  assert loaded.image_size == 56 and loaded.tokenizer.profile == profile
  assert loaded(text="dog").input_ids[0].tolist() == [49406, 1929, 49407] + [0] * 29
  (directory / "processor_config.json").unlink()
  (directory / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 28, "width": 28}}))
  assert Sam3Processor.from_pretrained(directory).image_size == 28

  (tmp_path / "weights.pt").write_bytes(b"")
  assert Sam3Processor.from_pretrained(tmp_path / "weights.pt").profile == Profile.original()
  empty = tmp_path / "empty"
  empty.mkdir()
  assert Sam3Processor.beside(empty, config).image_size == 112
  assert Sam3Processor.from_pretrained(empty).profile == Profile.transformers()


def test_from_pretrained_mistakes(tmp_path):
  with pytest.raises(FileNotFoundError, match="no file, directory or hub id"):
    Sam3Processor.from_pretrained(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="source must be"):
    Sam3Processor.from_pretrained(3)
  (tmp_path / "processor_config.json").write_text("{")
  with pytest.raises(ValueError, match=r"processor_config\.json is not valid JSON"):
    Sam3Processor.from_pretrained(tmp_path)
  (tmp_path / "processor_config.json").write_text(json.dumps({"size": {"height": 28, "width": 56}}))
  with pytest.raises(ValueError, match="only square sizes"):
    Sam3Processor.from_pretrained(tmp_path)


def test_from_pretrained_downloads_released_names(tmp_path, monkeypatch):
  from sam3lt_jax.checkpoints import hub

  _tiny_config("transformers").to_json(tmp_path / "config.json")
  asked = []
  monkeypatch.setattr(hub, "download", lambda source: asked.append(source) or str(tmp_path))
  monkeypatch.chdir(tmp_path)
  for source in ("s0", "someone/some-model"):
    assert Sam3Processor.from_pretrained(source).image_size == 112
  assert asked == ["Simon7108528/sam3-litetext-s0", "someone/some-model"]
