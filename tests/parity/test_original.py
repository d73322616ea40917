"""Against the authors' code: every array of every fixture that our model produces.

The weights come in as they would from a released file: a torch state dict in a `.pt`, read by
`from_pretrained` under the profile "original".
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from sam3lt_jax.checkpoints import from_pretrained
from tests.checkpoints.common import save_pt
from tests.parity import fixtures
from tests.parity.tolerances import assert_close, compare

FUSED_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
  pytest.importorskip("torch")
  path = save_pt(fixtures.detector_state_dict(), tmp_path_factory.mktemp("original") / "detector.pt")
  model, variables = from_pretrained(path, config=fixtures.detector_config(), profile="original")
  assert model.config.text.max_position_embeddings == 77  # sliced to the 16 tokens of the cases
  assert model.config.profile.position_policy == "slice"
  return model, variables


@pytest.fixture(scope="module")
def results(detector):
  return fixtures.run_detector(*detector)


@pytest.mark.torch
@pytest.mark.parametrize("case", fixtures.DETECTOR_CASES)
def test_detector_case(results, case):
  want, parts = fixtures.expected(case)
  assert_close(compare(want, fixtures.select(results[case], parts)), case)


def test_no_case_is_left_out():
  found = {key.split("/")[1] for key in fixtures.fixture("detector_tiny") if key.startswith("case/")}
  assert found == set(fixtures.DETECTOR_CASES)


@pytest.mark.torch
def test_image_taps(results):
  stages = fixtures.image_taps(results["text_only"])
  last = max(int(name.rpartition("_")[2]) for name in stages if name.startswith("vit_block_"))
  want, parts = fixtures.expected_image_taps(last)
  assert_close(compare(want, fixtures.select(stages, parts)), "image taps")


@pytest.mark.torch
def test_padded_windows(detector):
  want, got = fixtures.padded_windows(*detector)
  assert_close(compare(want, got), "grid 10, window 4")


@pytest.mark.torch
def test_the_other_vit_epsilon_is_noticed(detector):
  """The smallest of the differences between the references: too small for the outputs' tolerances."""
  model, variables = detector
  profile = dataclasses.replace(model.config.profile, vit_layer_norm_eps=1e-6)
  want, got = fixtures.padded_windows(model.clone(config=model.config.replace(profile=profile)), variables)
  with pytest.raises(AssertionError, match="vit_block_3"):
    assert_close(compare(want, got))


@pytest.mark.torch
def test_presence_is_not_clamped(detector):
  """The original drops the result of its clamp. A last layer ten times as large gives ten times the logit."""
  model, variables = detector
  decoder = variables["params"]["detr_decoder"]
  head = decoder["presence_head"]
  larger = head | {"layer3": jax.tree.map(lambda x: 10 * x, head["layer3"])}
  params = variables["params"] | {"detr_decoder": decoder | {"presence_head": larger}}
  results = fixtures.run_detector(model, variables | {"params": params})
  for case in fixtures.DETECTOR_CASES:
    want = 10 * fixtures.expected(case)[0]["presence_logits"]
    assert (want > 10).all()
    np.testing.assert_allclose(results[case]["presence_logits"], want, rtol=0, atol=1e-3, err_msg=case)


@pytest.mark.parametrize("case", fixtures.text_cases(), ids=str)
def test_text_encoder(case):
  want, got = fixtures.text_pair(case, *fixtures.text_model(case))
  assert_close(compare(want, got), str(case))


def test_interpolated_and_sliced_tables_differ():
  """The two policies must not be mistaken for each other by the comparison above."""
  cases = {case.name: case for case in fixtures.text_cases() if case.variant == "s1"}
  sliced, interpolated = cases["ctx16_trunc77"], cases["ctx16_interp77"]
  want, _ = fixtures.text_pair(interpolated, *fixtures.text_model(interpolated))
  _, got = fixtures.text_pair(sliced, *fixtures.text_model(sliced))
  with pytest.raises(AssertionError, match="text_features"):
    assert_close(compare({"text_features": want["text_features"]}, got))


@pytest.mark.parametrize("name", ["ctx16_trunc77", "ctx32_trunc77"])
def test_fused_text_encoder(name):
  case = next(c for c in fixtures.text_cases() if c.variant == "s0" and c.name == name)
  model, variables = fixtures.text_model(case)
  want, unfused = fixtures.text_pair(case, model, variables)
  fused_model, fused_variables = model.fuse(variables)
  assert fused_model.config.text.fused and "batch_stats" not in fused_variables
  _, fused = fixtures.text_pair(case, fused_model, fused_variables)
  np.testing.assert_allclose(fused["text_features"], unfused["text_features"], rtol=0, atol=FUSED_TOLERANCE)
  assert_close(compare({"text_features": want["text_features"]}, fused), f"{name}, fused")
