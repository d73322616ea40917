"""Live against transformers 5.23.0 at tiny sizes: stage by stage and end to end, through save and load.

Weights are random with every parameter and buffer active, written by transformers and read by
`from_pretrained`. S0-, S1- and L-like text towers; a grid that the window divides and ones that it does not.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from sam3lt_jax import Predictor, Sam3Processor, from_pretrained, save_pretrained
from tests.parity import queries, tolerances
from tests.reference import import_torch_reference, random_torch_model, run_stages, save_torch, tiny_config

pytestmark = [pytest.mark.torch, pytest.mark.full]

# variant, image size, tokens: grids of 12 (three windows of 4), 10 (padded windows) and 5.
SIZES = [("s0", 168, 16), ("s1", 140, 16), ("l", 70, 32)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
  """(torch model, our jitted apply) of a variant and size, built once."""

  @functools.cache
  def build(variant: str, size: int):
    reference = random_torch_model(tiny_config(variant, image_size=size), seed=size)
    directory = save_torch(reference, tmp_path_factory.mktemp(variant))
    model, variables = from_pretrained(directory)
    apply = jax.jit(functools.partial(model.apply, output_intermediates=True))
    return reference, functools.partial(apply, variables)

  return build


def _inputs(size: int, tokens: int, boxes: str | None, seed: int = 0) -> dict[str, np.ndarray]:
  """A batch of two with padded phrases; boxes: None, "one", or "several" with padding and a negative."""
  rng = np.random.default_rng(seed)
  mask = np.ones((2, tokens), bool)
  mask[0, 5:] = mask[1, tokens - 3 :] = False
  inputs = {
    "pixel_values": rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32),
    "input_ids": rng.integers(1, 299, (2, tokens)).astype(np.int32),
    "attention_mask": mask,
  }
  if boxes == "one":
    inputs["input_boxes"] = np.array([[[0.5, 0.4, 0.4, 0.3]], [[0.2, 0.7, 0.1, 0.6]]], np.float32)
    inputs["input_boxes_labels"] = np.array([[1], [0]], np.int32)
  elif boxes == "several":
    inputs["input_boxes"] = np.array(
      [[[0.4, 0.5, 0.3, 0.2], [0.6, 0.6, 0.5, 0.7]], [[0.1, 0.2, 0.15, 0.25], [0.5, 0.5, 0.2, 0.2]]],
      np.float32,
    )
    inputs["input_boxes_labels"] = np.array([[1, 0], [1, -10]], np.int32)
  return inputs


def _align_geometry(stages: dict[str, np.ndarray], tokens: int) -> dict[str, np.ndarray]:
  """Box tokens in one order: the reference packs valid boxes and CLS to the left, we keep the slots."""
  stages = dict(tolerances.without_padding(stages))
  prompt, mask = stages["prompt_tokens"], stages["prompt_mask"]
  order = np.argsort(~mask[:, tokens:], axis=1, kind="stable") + tokens
  order = np.concatenate([np.broadcast_to(np.arange(tokens), (len(mask), tokens)), order], axis=1)
  stages["prompt_mask"] = np.take_along_axis(mask, order, axis=1)
  stages["prompt_tokens"] = np.take_along_axis(prompt, order[..., None], axis=1)
  return stages


@pytest.mark.parametrize("boxes", [None, "one", "several"])
@pytest.mark.parametrize("variant, size, tokens", SIZES)
def test_every_stage(pairs, variant, size, tokens, boxes):
  reference, apply = pairs(variant, size)
  inputs = _inputs(size, tokens, boxes)
  expected = _align_geometry(run_stages(reference, inputs), tokens)
  got = _align_geometry(tolerances.flat(apply(**inputs)), tokens)
  rows = tolerances.compare(expected, got)
  assert {"vit_block_3", "neck_3", "prompt_tokens", "decoder_boxes", "pixel_embed", "pred_masks"} <= {
    row.stage for row in rows
  }
  tolerances.assert_close(rows, f"{variant} at {size} px, boxes {boxes}")


def test_presence_beyond_ten_is_clamped(pairs):
  """The only output that random weights leave untested: presence logits rarely pass 10."""
  import torch

  reference, apply = pairs("s1", 140)
  inputs = _inputs(140, 16, "one")
  leaf = ("params", "detr_decoder", "presence_head", "layer3", "bias")
  variables = jax.tree.map(lambda x: x, apply.args[0])
  node = variables
  for key in leaf[:-1]:
    node = node[key]
  before = reference.detr_decoder.presence_head.layer3.bias.detach().clone()
  node[leaf[-1]] = node[leaf[-1]] + 30.0
  with torch.no_grad():
    reference.detr_decoder.presence_head.layer3.bias += 30.0
    expected = run_stages(reference, inputs)
    reference.detr_decoder.presence_head.layer3.bias.copy_(before)
  got = tolerances.flat(apply.func(variables, **inputs))
  assert (expected["presence_logits"] == 10.0).all()
  tolerances.assert_close(tolerances.compare({"presence_logits": expected["presence_logits"]}, got))


def test_mixed_batch_rows_equal_the_reference_run_alone(pairs):
  """A text-only row beside a row with boxes: transformers changes it, we do not (difference 10)."""
  reference, apply = pairs("s0", 168)
  inputs = _inputs(168, 16, "one")
  inputs["input_boxes_labels"] = np.array([[-10], [1]], np.int32)
  got = tolerances.flat(apply(**inputs))
  for row in range(2):
    alone = {name: value[row : row + 1] for name, value in inputs.items()}
    if row == 0:
      del alone["input_boxes"], alone["input_boxes_labels"]
    expected = run_stages(reference, alone)
    rows = tolerances.compare(
      {name: expected[name] for name in tolerances.OUTPUTS},
      {name: got[name][row : row + 1] for name in tolerances.OUTPUTS},
    )
    tolerances.assert_close(rows, f"row {row}")


def test_many_prompts_on_one_image(pairs):
  """`image_index`: three prompts over two images in one call equal three calls of the reference."""
  reference, apply = pairs("s1", 140)
  inputs = _inputs(140, 16, "one")
  index = np.array([1, 0, 1], np.int32)
  rng = np.random.default_rng(4)
  prompts = {
    "input_ids": rng.integers(1, 299, (3, 16)).astype(np.int32),
    "attention_mask": np.arange(16)[None] < np.array([[4], [9], [16]]),
    "input_boxes": rng.uniform(0.2, 0.6, (3, 1, 4)).astype(np.float32),
    "input_boxes_labels": np.array([[1], [0], [1]], np.int32),
  }
  got = tolerances.flat(apply(pixel_values=inputs["pixel_values"], image_index=index, **prompts))
  for p, image in enumerate(index):
    alone = {name: value[p : p + 1] for name, value in prompts.items()}
    expected = run_stages(reference, {"pixel_values": inputs["pixel_values"][image : image + 1]} | alone)
    rows = tolerances.compare(
      {name: expected[name] for name in tolerances.OUTPUTS},
      {name: got[name][p : p + 1] for name in tolerances.OUTPUTS},
    )
    tolerances.assert_close(rows, f"prompt {p} on image {image}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A directory that we wrote in transformers' layout: tiny sizes, the real vocabulary, random weights."""
  directory = tmp_path_factory.mktemp("checkpoint")
  model, variables = from_pretrained("random:tiny-s1", profile="transformers")
  save_pretrained(directory / "model", model, variables, format="transformers")
  return directory / "model"


def _picture() -> np.ndarray:
  rng = np.random.default_rng(1)
  coarse = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
  return np.kron(coarse, np.ones((25, 20, 1), np.uint8))


def test_from_file_to_results(checkpoint):
  """The user's whole path on both sides: processor, model, post-processing."""
  ref = import_torch_reference()
  picture, phrases = _picture(), ["yellow school bus", "a wheel"]
  boxes, labels = [[20, 30, 90, 110], [100.5, 10, 170, 60]], [1, 0]
  torch_model = ref.transformers.Sam3LiteTextModel.from_pretrained(checkpoint).eval()
  torch_processor = ref.transformers.AutoProcessor.from_pretrained(checkpoint)
  predictor = Predictor.from_pretrained(checkpoint).set_image(picture)
  assert isinstance(predictor.processor, Sam3Processor)
  # A threshold in the widest gap between scores, so that rounding cannot decide what is kept.
  for given in ({}, {"boxes": boxes, "box_labels": labels}):
    probe = predictor(picture, text=phrases, threshold=0.0, **given)
    ranked = np.sort(probe.scores)
    gaps = np.diff(ranked[5:-5])
    threshold = float(ranked[5:-5][np.argmax(gaps)] + gaps.max() / 2)
    got = queries.predict(predictor, threshold, text=phrases, **given)
    np.testing.assert_array_equal(
      got.sort().boxes, predictor.predict(phrases, threshold=threshold, **given).boxes
    )
    assert 5 <= len(got) <= len(probe) - 5
    found = 0
    for phrase in phrases:
      kwargs = {"input_boxes": [given["boxes"]], "input_boxes_labels": [labels]} if given else {}
      inputs = torch_processor(images=[picture], text=[phrase], return_tensors="pt", **kwargs)
      with ref.torch.no_grad():
        out = torch_model(**{k: v for k, v in inputs.items() if k != "original_sizes"})
      want = torch_processor.post_process_instance_segmentation(
        out, threshold=threshold, target_sizes=inputs["original_sizes"].tolist()
      )[0]
      mine = got.with_label(phrase)
      assert len(mine) == len(want["scores"])
      found += len(mine)
      # Pillow's resize is one level (of 255) off at 1% of the values at most; that is what is seen here.
      np.testing.assert_allclose(mine.scores, want["scores"].numpy(), atol=2e-3)
      inside = np.clip(want["boxes"].numpy(), 0, np.tile(np.shape(picture)[1::-1], 2))  # as ours are
      np.testing.assert_allclose(mine.boxes, inside, atol=0.2)
      assert np.mean(mine.masks != want["masks"].numpy().astype(bool)) < 5e-3
    assert found == len(got)
