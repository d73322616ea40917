"""Every argument that takes an array takes every kind of array, through one converter."""

import ml_dtypes
import numpy as np
import pytest

from sam3lt_jax.processing import images, postprocess, prompts
from sam3lt_jax.processing.arrays import plain, to_numpy
from sam3lt_jax.processing.clicks import clicks_of
from sam3lt_jax.processing.processor import Sam3Processor
from sam3lt_jax.processing.results import Results

BOXES, LABELS = [[10.0, 5.0, 40.0, 50.0], [2.0, 3.0, 30.0, 20.0]], [1, 0]  # exact in bfloat16


def torch_kind(**options):
  torch = pytest.importorskip("torch")
  dtype = getattr(torch, options.pop("dtype", "float32"))
  return lambda values: torch.tensor(values, dtype=dtype, **options)


def jax_kind(dtype):
  import jax.numpy as jnp

  return lambda values: jnp.asarray(values, dtype)


def nested(kind):
  return lambda values: [nested(kind)(v) if isinstance(v, list) else kind(v) for v in values]


def tuples(values):
  return tuple(tuples(v) if isinstance(v, list) else v for v in values)


KINDS = {
  "lists": lambda: lambda values: values,
  "tuples": lambda: tuples,
  "numpy": lambda: np.asarray,
  "numpy float16": lambda: lambda values: np.asarray(values, np.float16),
  "bfloat16": lambda: lambda values: np.asarray(values, ml_dtypes.bfloat16),
  "lists of numpy's scalars": lambda: nested(np.float32),
  "lists of arrays": lambda: lambda values: list(map(np.asarray, values)),
  "jax": lambda: jax_kind("float32"),
  "jax bfloat16": lambda: jax_kind("bfloat16"),
  "torch": lambda: torch_kind(),
  "torch with gradient": lambda: torch_kind(requires_grad=True),
  "torch bfloat16 with gradient": lambda: torch_kind(dtype="bfloat16", requires_grad=True),
  "torch integers": lambda: torch_kind(dtype="int64"),
  "lists of torch scalars": lambda: nested(torch_kind(requires_grad=True)),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request):
  return KINDS[request.param]()


def test_prompts_of_the_predictor(kind):
  wanted = prompts.prompts_of("a dog", BOXES, LABELS)
  assert prompts.prompts_of("a dog", kind(BOXES), kind(LABELS)) == wanted
  assert prompts.prompts_of("a dog", kind(BOXES[0]), kind(LABELS[:1])) == prompts.prompts_of(
    "a dog", BOXES[:1], [1]
  )
  per_image = prompts.per_image("boxes", [kind(BOXES), None], 2, 2)
  assert prompts.prompts_of("a dog", per_image[0], kind(LABELS), image=0) == wanted


def test_clicks(kind):
  """Points, their labels, outlines and masks to start from."""
  points, box, mask = [[10.0, 5.0], [40.0, 50.0]], [2.0, 3.0, 30.0, 20.0], (np.eye(12, 16) > 0).astype(float)
  mask = mask.tolist()

  def clicks(kind, labels=LABELS):
    return clicks_of((60, 90), 8, kind(points), kind(labels), kind(box)) + clicks_of(
      (12, 16), 8, masks=kind(mask)
    )

  for got, wanted in zip(clicks(kind), clicks(np.asarray), strict=True):
    np.testing.assert_array_equal(got, wanted)
  one = clicks_of((60, 90), 8, kind(points)[0], kind(LABELS)[1])  # a point, and its label alone
  assert one.labels.tolist() == [[0]] and one.points.shape == (1, 1, 2)


def test_inputs_of_the_processor(kind):
  processor, image = Sam3Processor(image_size=56), np.zeros((60, 90, 3), np.uint8)
  wanted = processor(image, input_boxes=[BOXES], input_boxes_labels=[LABELS])
  got = processor(image, input_boxes=[kind(BOXES)], input_boxes_labels=[kind(LABELS)])
  np.testing.assert_array_equal(got.input_boxes, wanted.input_boxes)
  np.testing.assert_array_equal(got.input_boxes_labels, wanted.input_boxes_labels)
  got = processor(original_sizes=[kind([60.0, 90.0])], input_boxes=[kind(BOXES)])
  np.testing.assert_array_equal(got.input_boxes, wanted.input_boxes)


def test_outputs_for_the_processor(kind):
  rng = np.random.default_rng(0)
  arrays = {
    "pred_logits": rng.integers(-4, 4, (1, 2)), "presence_logits": rng.integers(0, 4, (1, 1)),
    "pred_boxes": rng.integers(0, 2, (1, 2, 4)), "pred_masks": rng.integers(-4, 4, (1, 2, 5, 5)),
    "semantic_seg": rng.integers(-4, 4, (1, 1, 5, 5)),
  }  # fmt: skip
  processor = Sam3Processor(image_size=56)

  def results(given):
    found = processor.post_process_instance_segmentation(given, 0.1, target_sizes=[(9, 7)])[0]
    return [*found.values(), *processor.post_process_semantic_segmentation(given)]

  wanted = results({key: value.astype(np.float32) for key, value in arrays.items()})
  got = results({key: kind(value.tolist()) for key, value in arrays.items()})
  for a, b in zip(got, wanted, strict=True):
    np.testing.assert_array_equal(a, b)


def test_results(kind):
  masks = np.arange(2 * 50 * 40).reshape(2, 50, 40) % 3 == 0
  results = Results(kind(BOXES), [0.5, 0.25], kind(masks.astype(int).tolist()), ("a", "b"), (50, 40))
  np.testing.assert_array_equal(results.boxes, BOXES)
  np.testing.assert_array_equal(results.masks, masks)
  assert results.boxes.dtype == np.float32


@pytest.mark.parametrize("value", [0.5, np.float16(0.5), np.asarray(0.5), ml_dtypes.bfloat16(0.5)])
def test_thresholds(value):
  assert postprocess.check_threshold("threshold", value) == 0.5
  assert postprocess.check_threshold("threshold", jax_kind("bfloat16")(0.5)) == 0.5


@pytest.mark.torch
def test_thresholds_of_torch():
  assert postprocess.check_threshold("threshold", torch_kind(requires_grad=True)(0.5)) == 0.5


@pytest.mark.parametrize("text", [np.array(["a", "b"]), ("a", "b"), [np.str_("a"), "b"]])
def test_phrases_as_arrays(text):
  assert [p.text for p in prompts.prompts_of(text, None, None)] == ["a", "b"]
  assert prompts.texts_per_image(text, 2) == [["a", "b"]] * 2
  assert Sam3Processor(image_size=56)(text=text).input_ids.shape[0] == 2


def test_images(kind):
  values = [[[0.0, 0.5, 1.0], [1.0, 1.0, 0.25]]]
  try:
    image = kind(values)
  except TypeError:
    return pytest.skip("has no such numbers")
  if isinstance(image, (list, tuple)):
    with pytest.raises(ValueError, match="image must be a path, a PIL image"):
      images.load_image(image)
  elif "int" in str(image.dtype):
    with pytest.raises(ValueError, match="uint8 or floating point"):
      images.load_image(image)
  else:
    assert images.load_image(image).tolist() == [[[0, 128, 255], [255, 255, 64]]]


def test_kinds_numpy_does_not_have():
  assert to_numpy(np.ones(2, ml_dtypes.float8_e4m3fn), "x").dtype == np.float32
  assert plain([np.ones(2, ml_dtypes.bfloat16), (np.int64(3), None)], "x")[1] == [3, None]


def test_what_cannot_be_read_is_named():
  class Odd:
    def __array__(self, *args, **kwargs):
      raise RuntimeError("deleted buffer")

  for call in (
    lambda: images.load_image(Odd()),
    lambda: prompts.prompts_of("a", Odd(), None),
    lambda: prompts.prompts_of("a", BOXES, [1, Odd()]),
    lambda: postprocess.check_threshold("threshold", Odd()),
    lambda: Results(Odd(), [], [], [], (1, 1)),
  ):
    with pytest.raises(
      ValueError, match=r"(image|boxes|box_labels|threshold) cannot be read as an array: deleted"
    ):
      call()
