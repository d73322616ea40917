"""The reference that everything is compared with: does it run, is every tensor of it alive?"""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests import reference

pytestmark = pytest.mark.torch

# Tensors that no output of the detector depends on: unused layers, and what is equal for all keys of a query
# and so cancels in the softmax (a key's bias, except in the ViT, where RoPE rotates it).
_INERT = re.compile(
  r"text_encoder\.(text_)?projection\.|attn\.k_proj\.bias|neck\.fpn_layers\.3\.|pixel_decoder\.(conv_layers|norms)\.2\.|"
  r"box_rpb_embed_[xy]\.layer2\.bias"
)


def _inputs(size=168, vocab=300, prompts=2, tokens=16):
  rng = np.random.default_rng(0)
  mask = np.ones((prompts, tokens), np.int64)
  mask[0, 9:] = 0
  return {
    "pixel_values": rng.uniform(-1, 1, (prompts, size, size, 3)).astype(np.float32),
    "input_ids": rng.integers(1, vocab, (prompts, tokens)),
    "attention_mask": mask,
    "input_boxes": np.array([[[0.5, 0.5, 0.3, 0.4], [0.3, 0.6, 0.2, 0.2]]] * prompts, np.float32),
    "input_boxes_labels": np.array([[1, 0]] * prompts),
  }


@pytest.mark.full  # 5 s each, and only another transformers can break it
@pytest.mark.parametrize("variant", ["s0", "s1", "l", "sam3"])
def test_randomised_reference_is_alive(variant):
  ref = reference.import_torch_reference()
  config = reference.tiny_config(variant)
  model = reference.random_torch_model(config, seed=1)
  state = {k: v.clone() for k, v in model.state_dict().items()}
  again = reference.random_torch_model(config, seed=1).state_dict()
  other = reference.random_torch_model(config, seed=2).state_dict()
  for name, value in state.items():
    if "num_batches_tracked" in name:
      continue
    assert ref.torch.equal(value, again[name]), name
    assert not ref.torch.equal(value, other[name]), name
    assert value.abs().mean() > 1e-3, name
    if "running_var" in name:
      assert value.min() >= 0.5 and value.max() <= 2.0, name
    if "layer_scale" in name:
      assert 0.4 < value.mean() < 0.6, name

  inputs = {k: ref.torch.from_numpy(v) for k, v in _inputs().items()}
  inputs["pixel_values"] = inputs["pixel_values"].permute(0, 3, 1, 2)
  out = model(**inputs)
  outputs = (out.pred_masks, out.pred_boxes, out.pred_logits, out.presence_logits, out.semantic_seg)
  sum((x * x).sum() for x in outputs).backward()
  dead = [n for n, p in model.named_parameters() if p.grad is None or (p.grad * p).abs().max() < 1e-4]
  assert [n for n in dead if not _INERT.search(n)] == []


def test_stages_agree_with_the_outputs():
  config = reference.tiny_config("s0", image_size=140)  # a grid of 10, which the window of 4 does not divide
  model = reference.random_torch_model(config, seed=3)
  stages = reference.run_stages(model, _inputs(size=140))
  np.testing.assert_array_equal(stages["decoder_logits"][-1], stages["pred_logits"])
  np.testing.assert_array_equal(stages["decoder_presence_logits"][-1], stages["presence_logits"])
  x, y, w, h = np.moveaxis(stages["decoder_boxes"][-1], -1, 0)
  corners = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
  np.testing.assert_allclose(corners, stages["pred_boxes"], atol=1e-6)
  assert stages["prompt_tokens"].shape == (2, 16 + 2 + 1, 32)
  assert stages["prompt_mask"].sum(-1).tolist() == [9 + 3, 16 + 3]
  assert [stages[f"neck_{i}"].shape[1:] for i in range(4)] == [(g, g, 32) for g in (40, 20, 10, 5)]
  assert [stages[f"vit_block_{i}"].shape for i in range(4)] == [(2, 10, 10, 64)] * 4
  for name, value in stages.items():
    if name != "prompt_mask":
      assert 0.01 < value.std() < 6 and np.abs(value).max() < 30, (name, value.std(), np.abs(value).max())


def test_saved_as_transformers_saves(tmp_path):
  ref = reference.import_torch_reference()
  model = reference.random_torch_model(reference.tiny_config("s0"), seed=4)
  directory = reference.save_torch(model, tmp_path / "model")
  loaded = ref.Sam3LiteTextModel.from_pretrained(directory)
  for name, value in model.state_dict().items():
    assert ref.torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.full  # what the full-size comparison rests on
def test_deleting_makes_room():
  model = reference.random_torch_model(reference.tiny_config("s1"), seed=5)
  reference.run_stages(model, _inputs(), delete=True)
  assert all(p.is_meta for p in model.parameters())
