"""No inert tensor: a leaf that no output depends on is a leaf whose conversion no comparison checks.

Every leaf of a tiny model is set to zero in turn, on a prompt with text, a positive and a negative box. All
weights are random with every parameter active, so zero is a perturbation everywhere. What cannot move an
output is listed with the reason, and compared with its source tensor instead.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sam3lt_jax.checkpoints import from_pretrained
from sam3lt_jax.checkpoints.engine import flatten, unflatten
from sam3lt_jax.config import Profile
from tests.checkpoints.common import expected_tree
from tests.parity import fixtures
from tests.parity.tolerances import OUTPUTS, tolerance
from tests.reference import random_torch_model, save_torch, tiny_config

pytestmark = pytest.mark.full  # 12 s

Leaves = dict[str, np.ndarray]

_KEY_BIAS = "adds the same score to every key of a query, which the softmax cancels"
INERT = {
  r"params/text_encoder/projection/kernel": "CLIP's pooled head; the detector reads every token instead",
  r"params/vision_encoder/neck/fpn_layers_3/.*": "the x0.5 level, which the detector drops",
  r"params/mask_decoder/pixel_decoder/(conv_layers|norms)_2/.*": "a third stage; with three maps two run",
  r"params/detr_decoder/box_rpb_embed_[xy]/layer2/bias": _KEY_BIAS,
  # Not in the ViT, where RoPE turns the bias by the key's position.
  r"params/(text_encoder|geometry_encoder|detr_encoder|detr_decoder)/layers_\d+/\w+/k_proj/bias": _KEY_BIAS,
  r"params/mask_decoder/prompt_cross_attn/k_proj/bias": _KEY_BIAS,
}


def _reason(leaf: str) -> str | None:
  return next((why for pattern, why in INERT.items() if re.fullmatch(pattern, leaf)), None)


# Where the inert leaves lie in the authors' file, spelled out here and not taken from the loader's tables.
_NECK = "backbone.vision_backbone.convs.3"
_PIXEL = "segmentation_head.pixel_decoder"


def _same(x: np.ndarray) -> np.ndarray:
  return x


def _conv(x: np.ndarray) -> np.ndarray:
  return np.einsum("oihw->hwio", x)


def _middle_third(x: np.ndarray) -> np.ndarray:
  return x[len(x) // 3 : 2 * len(x) // 3]


_SOURCES: tuple[tuple[str, str, Callable[[np.ndarray], np.ndarray]], ...] = (
  (r"text_encoder/projection/kernel", "backbone.language_backbone.encoder.projection_layer", _same),
  (r"text_encoder/projection/kernel", "backbone.language_backbone.encoder.text_projection", _same),  # SAM 3
  (r"vision_encoder/neck/fpn_layers_3/proj1/kernel", f"{_NECK}.conv_1x1.weight", _conv),
  (r"vision_encoder/neck/fpn_layers_3/proj1/bias", f"{_NECK}.conv_1x1.bias", _same),
  (r"vision_encoder/neck/fpn_layers_3/proj2/kernel", f"{_NECK}.conv_3x3.weight", _conv),
  (r"vision_encoder/neck/fpn_layers_3/proj2/bias", f"{_NECK}.conv_3x3.bias", _same),
  (r"mask_decoder/pixel_decoder/conv_layers_2/kernel", f"{_PIXEL}.conv_layers.2.weight", _conv),
  (r"mask_decoder/pixel_decoder/conv_layers_2/bias", f"{_PIXEL}.conv_layers.2.bias", _same),
  (r"mask_decoder/pixel_decoder/norms_2/scale", f"{_PIXEL}.norms.2.weight", _same),
  (r"mask_decoder/pixel_decoder/norms_2/bias", f"{_PIXEL}.norms.2.bias", _same),
  (
    r"detr_decoder/box_rpb_embed_([xy])/layer2/bias",
    r"transformer.decoder.boxRPB_embed_\1.layers.1.bias",
    _same,
  ),
  (
    r"text_encoder/layers_(\d+)/self_attn/k_proj/bias",
    r"backbone.language_backbone.encoder.transformer.\1.pre_norm_mha.1.qkv_proj.bias",
    _middle_third,
  ),
  (
    r"text_encoder/layers_(\d+)/self_attn/k_proj/bias",  # SAM 3
    r"backbone.language_backbone.encoder.transformer.resblocks.\1.attn.in_proj_bias",
    _middle_third,
  ),
  (
    r"geometry_encoder/layers_(\d+)/self_attn/k_proj/bias",
    r"geometry_encoder.encode.\1.self_attn.in_proj_bias",
    _middle_third,
  ),
  (
    r"geometry_encoder/layers_(\d+)/cross_attn/k_proj/bias",
    r"geometry_encoder.encode.\1.cross_attn_image.in_proj_bias",
    _middle_third,
  ),
  (
    r"detr_encoder/layers_(\d+)/self_attn/k_proj/bias",
    r"transformer.encoder.layers.\1.self_attn.in_proj_bias",
    _middle_third,
  ),
  (
    r"detr_encoder/layers_(\d+)/cross_attn/k_proj/bias",
    r"transformer.encoder.layers.\1.cross_attn_image.in_proj_bias",
    _middle_third,
  ),
  (
    r"detr_decoder/layers_(\d+)/self_attn/k_proj/bias",
    r"transformer.decoder.layers.\1.self_attn.in_proj_bias",
    _middle_third,
  ),
  (
    r"detr_decoder/layers_(\d+)/text_cross_attn/k_proj/bias",
    r"transformer.decoder.layers.\1.ca_text.in_proj_bias",
    _middle_third,
  ),
  (
    r"detr_decoder/layers_(\d+)/vision_cross_attn/k_proj/bias",
    r"transformer.decoder.layers.\1.cross_attn.in_proj_bias",
    _middle_third,
  ),
  (
    r"mask_decoder/prompt_cross_attn/k_proj/bias",
    "segmentation_head.cross_attend_prompt.in_proj_bias",
    _middle_third,
  ),
)


def _source_of(leaf: str, state: Leaves) -> np.ndarray:
  """What `leaf` must hold, out of the authors' state dict."""
  name = leaf.removeprefix("params/")
  values = []
  for pattern, key, change in _SOURCES:
    match = re.fullmatch(pattern, name)
    if match and (found := state.get(f"detector.{match.expand(key)}")) is not None:
      values.append(change(found))
  assert len(values) == 1, f"{leaf} is said to be inert, and {len(values)} source tensors are known for it"
  return values[0]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """(model, leaves, what inert leaves must hold) from the authors' layout."""
  state = fixtures.detector_state_dict()
  path = tmp_path_factory.mktemp("inert") / "detector.safetensors"
  # RoPE tables are complex, which safetensors has no type for; the loader ignores them anyway.
  save_file({k: np.ascontiguousarray(v) for k, v in state.items() if v.dtype != np.complex64}, path)
  model, variables = from_pretrained(path, config=fixtures.detector_config(), profile="original")
  leaves = flatten(variables)
  return model, leaves, {leaf: _source_of(leaf, state) for leaf in leaves if _reason(leaf)}


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
  """The same of transformers' layout, and of the random weights that the live comparisons use."""
  reference = random_torch_model(tiny_config("s0", vocab_size=256, context=77), seed=11)
  directory = save_torch(reference, tmp_path_factory.mktemp("inert"))
  model, variables = from_pretrained(directory, profile=Profile.original())
  expected = expected_tree(reference)
  return model, flatten(variables), {leaf: expected[leaf] for leaf in expected if _reason(leaf)}


@pytest.fixture(params=["original", pytest.param("transformers", marks=pytest.mark.torch)])
def loaded(request):
  return request.getfixturevalue(request.param)


@functools.cache
def _apply(model):
  rng = np.random.default_rng(5)
  ids = rng.integers(1, 255, (1, 16)).astype(np.int32)
  ids[0, 6:] = 0
  inputs = {
    "pixel_values": rng.uniform(-1, 1, (1, 84, 84, 3)).astype(np.float32),
    "input_ids": ids,
    "attention_mask": ids != 0,
    "input_boxes": np.array([[[0.4, 0.5, 0.3, 0.2], [0.65, 0.6, 0.5, 0.7]]], np.float32),
    "input_boxes_labels": np.array([[1, 0]], np.int32),
  }

  @jax.jit
  def run(leaves):
    output = model.apply(unflatten(leaves), **inputs)
    return {name: getattr(output, name) for name in OUTPUTS}

  return run


def _check_every_leaf(run, leaves: Leaves) -> None:
  """Fails where zeroing a leaf leaves every output within its tolerance, or moves one though listed."""
  leaves = {name: np.asarray(value) for name, value in leaves.items()}
  before = {name: np.asarray(value) for name, value in run(leaves).items()}
  dead, alive = [], []
  for leaf, value in leaves.items():
    assert np.abs(value).max() > 0.01, f"{leaf}: zero is no perturbation"
    after = run(leaves | {leaf: np.zeros_like(value)})
    # In units of the tolerance. NaN, which compares False, counts as moved: it is not what was there.
    moved = max(float(np.abs(np.asarray(after[n]) - before[n]).max()) / tolerance(n) for n in before)
    if moved <= 1 and _reason(leaf) is None:
      dead.append(f"{leaf}: {moved:.2g} tolerances")
    if not moved <= 1 and _reason(leaf) is not None:
      alive.append(f"{leaf}: {moved:.2g} tolerances")
  assert not dead, "no output depends on:\n" + "\n".join(dead)
  assert not alive, "listed as inert, but an output moves:\n" + "\n".join(alive)


def test_every_leaf_moves_an_output(loaded):
  model, leaves, _ = loaded
  _check_every_leaf(_apply(model), leaves)


def test_inert_leaves_hold_their_source(loaded):
  _, leaves, expected = loaded
  assert expected.keys() == {leaf for leaf in leaves if _reason(leaf)}
  for pattern in INERT:
    assert any(re.fullmatch(pattern, leaf) for leaf in expected), f"no leaf is called {pattern}"
  _check_values(leaves, expected)


def _check_values(leaves: Leaves, expected: Leaves) -> None:
  for leaf, value in expected.items():
    np.testing.assert_array_equal(np.asarray(leaves[leaf]), value, err_msg=leaf)


@pytest.mark.parametrize("variant", ["s1", "l", "sam3"])
def test_text_encoders(variant):
  """The other text encoders, the teacher's included; the detector behind them is the same."""
  case = next(c for c in fixtures.text_cases() if c.variant == variant)
  model, variables = fixtures.text_model(case)
  ids = fixtures.fixture(case.file)[f"{case.name}/token_ids"][:3]

  @jax.jit
  def run(leaves):
    stages = model.apply(unflatten(leaves), ids, ids != 0, method=fixtures.text_stages)
    return {"text_features": stages["text_features"]}

  leaves = flatten(variables)
  _check_every_leaf(run, leaves)
  state = {k.removeprefix("sd/"): v for k, v in fixtures.fixture(case.file).items()}
  _check_values(leaves, {leaf: _source_of(leaf, state) for leaf in leaves if _reason(leaf)})
