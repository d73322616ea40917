"""Sam3Processor beside transformers' own, argument for argument."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from sam3lt_jax.processing.processor import Sam3Processor
from sam3lt_jax.processing.tokenizer import ClipTokenizer, bundled_merges
from tests.processing.test_processor import BOX_C, CALLS, SIZE, model_outputs, photo
from tests.reference import import_torch_reference


@pytest.fixture(scope="module")
def photos():
  return [photo(60, 90, 0), photo(120, 40, 1)]


@pytest.fixture(scope="module")
def reference():
  """transformers' own processor with the same vocabulary."""
  ref = import_torch_reference()
  from transformers import CLIPTokenizer
  from transformers.models.sam3.image_processing_sam3 import Sam3ImageProcessor

  vocabulary = json.loads(ClipTokenizer()._saved.to_str())["model"]["vocab"]
  tokenizer = CLIPTokenizer(vocab=vocabulary, merges=list(bundled_merges()))
  images = Sam3ImageProcessor(size={"height": SIZE, "width": SIZE})
  return types.SimpleNamespace(torch=ref.torch, processor=ref.Sam3Processor(images, tokenizer))


@pytest.mark.torch
@pytest.mark.parametrize("call", CALLS, ids=lambda c: c.replace(" ", "_"))
def test_inputs_equal_transformers(reference, photos, call):
  text, boxes, labels = CALLS[call]
  kwargs = {"text": text, "input_boxes": boxes, "input_boxes_labels": labels}
  ours = Sam3Processor("transformers", image_size=SIZE)(images=photos, **kwargs)
  theirs = reference.processor(images=photos, return_tensors="pt", **kwargs)
  assert set(ours) == set(theirs)
  difference = np.abs(ours.pixel_values - theirs["pixel_values"].permute(0, 2, 3, 1).numpy())
  assert difference.max() <= 2 / 255 + 1e-6 and difference.mean() < 2 / 255 * 0.02
  np.testing.assert_array_equal(ours.original_sizes, theirs["original_sizes"])
  for key in ("input_ids", "attention_mask"):
    rows = theirs[key].expand(2, -1)  # one "visual" for all, which their model repeats
    np.testing.assert_array_equal(ours[key], rows)
  if boxes is not None:
    np.testing.assert_array_equal(ours.input_boxes, theirs["input_boxes"])
    np.testing.assert_array_equal(ours.input_boxes_labels, theirs["input_boxes_labels"])


@pytest.mark.torch
def test_prompts_alone_equal_transformers(reference):
  kwargs = {"text": ["dog", None], "input_boxes": [None, [BOX_C]], "original_sizes": [[60, 90], [120, 40]]}
  ours = Sam3Processor("transformers", image_size=SIZE)(**kwargs)
  theirs = reference.processor(return_tensors="pt", **kwargs)
  assert set(ours) == set(theirs)
  for key in ours:
    np.testing.assert_array_equal(ours[key], theirs[key])


@pytest.mark.torch
def test_transparency_and_exif_as_transformers(reference):
  rgba = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
  pil = Image.fromarray(rgba)
  pil.getexif()[0x0112] = 6
  for image in (pil, rgba, pil.convert("LA"), pil.convert("L"), pil.convert("P")):
    ours = Sam3Processor("transformers", image_size=SIZE)(images=image)
    theirs = reference.processor(images=image, return_tensors="pt")
    np.testing.assert_array_equal(ours.original_sizes, theirs["original_sizes"])
    difference = np.abs(ours.pixel_values - theirs["pixel_values"].permute(0, 2, 3, 1).numpy())
    assert difference.max() <= 4 / 255 + 1e-6  # one level each from compositing and from resizing


@pytest.mark.torch
@pytest.mark.parametrize("sizes", [None, [(60, 90), (120, 40), (33, 77)]])
def test_post_processing_equals_transformers(reference, sizes):
  arrays = model_outputs()
  outputs = types.SimpleNamespace(**{k: reference.torch.from_numpy(v) for k, v in arrays.items()})
  processor = Sam3Processor("transformers")
  for method, arguments in (
    ("instance_segmentation", {}),
    ("instance_segmentation", {"threshold": 0.1, "mask_threshold": 0.3}),
    ("object_detection", {"threshold": 0.2}),
  ):
    name = f"post_process_{method}"
    ours = getattr(processor, name)(arrays, target_sizes=sizes, **arguments)
    theirs = getattr(reference.processor, name)(outputs, target_sizes=sizes, **arguments)
    for i, (a, b) in enumerate(zip(ours, theirs)):
      assert list(a) == list(b)
      np.testing.assert_allclose(a["scores"], b["scores"], rtol=1e-5)
      np.testing.assert_allclose(a["boxes"], b["boxes"], rtol=1e-6)
      if "masks" in a and len(a["masks"]):
        assert a["masks"].shape == tuple(b["masks"].shape)
        assert (a["masks"] != b["masks"].numpy()).mean() <= 1e-4
      elif "masks" in a:  # theirs keeps the low resolution
        assert a["masks"].shape == (0, *((24, 24) if sizes is None else sizes[i]))
  ours = processor.post_process_semantic_segmentation(arrays, sizes, return_segmentation_scores=True)
  theirs = reference.processor.post_process_semantic_segmentation(
    outputs, sizes, return_segmentation_scores=True
  )
  for a, b in zip(ours, theirs):
    np.testing.assert_allclose(a.segmentation_scores, b.segmentation_scores, atol=1e-5)
    assert (a.segmentation != b.segmentation.numpy()).mean() <= 1e-3
