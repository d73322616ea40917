"""The tracker's weights: where they are read from, what is refused, the round trip through our own format."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sam3lt_jax import Predictor, from_pretrained, save_pretrained, tracker_from_pretrained
from sam3lt_jax.checkpoints import CheckpointError, CheckpointMismatchError, engine, tables
from sam3lt_jax.checkpoints.tracker import tracker_leaves
from sam3lt_jax.config import TrackerConfig, TrackerProfile
from sam3lt_jax.config_schema import tracker_from_schema, tracker_to_schema
from sam3lt_jax.tracker import Sam3Tracker
from tests import tiny
from tests.checkpoints.common import FIXTURES, bundled_detector, original_state_dict
from tests.parity import tracker as reference


def write(path, state):
  save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path)
  return path


def test_an_authors_file_is_read_whole(tmp_path):
  """Beside the detector and under the wrappers that training puts around a model."""
  state = {f"module.{k}": v for k, v in (original_state_dict("s0") | reference.state_dict()).items()}
  _, weights = tracker_from_pretrained(write(tmp_path / "m.safetensors", state), reference.config())
  expected = jax.tree.leaves_with_path(reference.load()[1])
  for (path, want), (_, got) in zip(expected, jax.tree.leaves_with_path(weights), strict=True):
    np.testing.assert_array_equal(got, want, str(path))


def test_an_image_model_with_its_own_copy(tmp_path):
  state = {
    k.replace("tracker.", "inst_interactive_predictor.model."): v for k, v in reference.state_dict().items()
  }
  _, weights = tracker_from_pretrained(write(tmp_path / "m.safetensors", state), reference.config())
  np.testing.assert_array_equal(
    weights["params"]["no_memory_embedding"], reference.load()[1]["params"]["no_memory_embedding"]
  )


def test_both_layouts_fill_every_leaf_of_the_released_size():
  """Shapes alone: the authors' keys as they were recorded, transformers' as ours become them."""
  leaves = tracker_leaves(Sam3Tracker(), 1024)
  assert sum(int(np.prod(x.shape)) for x in leaves.values()) == 11_743_618 + 7_802_112
  entries = engine.export_tensors(tables.tracker_layout("transformers"), leaves)
  assert len(entries) == 307 + 22
  sources, problems = engine.assign(
    tables.tracker_layout("transformers"), {k: e.shape for k, e in entries.items()}
  )
  assert not problems and sources.keys() == leaves.keys()
  recorded = json.loads((FIXTURES / "key_layout_real_size.json").read_text())
  recorded = recorded["tracker"] | recorded["sam2_convs_when_interactive"]
  own = {key: tuple(shape) for key, (shape, _) in recorded.items()}
  sources, problems = engine.assign(tables.tracker_layout("original"), own)
  assert not problems and sources.keys() == leaves.keys()
  assert {leaf: s.shape for leaf, s in sources.items()} == {k: tuple(x.shape) for k, x in leaves.items()}


def test_no_tracker_says_where_one_is(tmp_path):
  file = write(tmp_path / "m.safetensors", original_state_dict("s0"))
  with pytest.raises(CheckpointError, match=r"holds no tracker.*the authors' \.pt files.*'facebook/sam3'"):
    tracker_from_pretrained(file, reference.config())
  with pytest.raises(CheckpointError, match=r"holds no tracker"):
    tracker_from_pretrained(bundled_detector(tmp_path / "shapes"))


def test_sam_3_1_is_refused_by_name(tmp_path):
  state = {k.replace("tracker.", "tracker.model."): v for k, v in reference.state_dict().items()}
  with pytest.raises(CheckpointError, match=r"holds SAM 3.1's tracker \(tracker\.model\."):
    tracker_from_pretrained(write(tmp_path / "m.safetensors", state), reference.config())


def test_every_tensor_that_is_missing_is_listed(tmp_path):
  state = reference.state_dict()
  gone = ["tracker.obj_ptr_proj.layers.1.bias", "tracker.sam_mask_decoder.conv_s0.weight"]
  for key in gone:
    del state[key]
  with pytest.raises(CheckpointMismatchError) as e:
    tracker_from_pretrained(write(tmp_path / "m.safetensors", state), reference.config())
  assert "object_pointer_proj/layers_1/bias" in str(e.value)
  assert "mask_decoder/conv_s0/kernel" in str(e.value)


def test_a_tracker_without_its_neck(tmp_path):
  state = {k: v for k, v in reference.state_dict().items() if "sam2_convs" not in k}
  with pytest.raises(CheckpointError, match="holds a tracker without its neck"):
    tracker_from_pretrained(write(tmp_path / "m.safetensors", state), reference.config())


@pytest.mark.full  # 8 s
def test_saved_with_its_model_it_comes_back(tmp_path):
  model, variables = tiny.load(tiny.config())
  tracker, weights = reference.load()
  save_pretrained(tmp_path / "out", model, variables, tracker=(tracker, weights))
  again, own = tracker_from_pretrained(tmp_path / "out")
  assert again.config == tracker.config
  jax.tree.map(np.testing.assert_array_equal, own, weights)
  alone, _ = tracker_from_pretrained(tmp_path / "out" / "tracker", profile="transformers")
  assert alone.config == tracker.config.replace(profile="transformers")
  assert from_pretrained(tmp_path / "out")[0].config == model.config
  # A flipped bit is found, as in the model.
  part = max(
    (p for p in (tmp_path / "out" / "tracker").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
  )
  data = bytearray(part.read_bytes())
  data[len(data) // 2] ^= 1
  part.write_bytes(data)
  with pytest.raises(CheckpointError, match="damaged"):
    tracker_from_pretrained(tmp_path / "out")


def test_of_another_model_it_is_not_saved(tmp_path):
  model, variables = tiny.load(tiny.config())
  other = tracker_from_pretrained("random:tiny", progress=False)
  with pytest.raises(CheckpointMismatchError, match="tracker"):
    save_pretrained(tmp_path / "out", model, variables, tracker=other)
  assert not (tmp_path / "out").exists()


def test_a_predictor_takes_both_from_where_they_are(tmp_path):
  with tiny.hurry():
    predictor = Predictor.from_pretrained("random:tiny", tracker="random:tiny", compile_ahead=False)
    same = Predictor.from_pretrained("random:tiny", tracker=True, compile_ahead=False)
  jax.tree.map(
    np.testing.assert_array_equal, predictor.engine.tracker_variables, same.engine.tracker_variables
  )
  with pytest.raises(CheckpointError, match="holds no tracker"):
    Predictor.from_pretrained(bundled_detector(tmp_path / "shapes"), tracker=True)


def test_the_configuration_goes_through_transformers_schema():
  model = tiny.config()
  config = reference.config(profile="transformers")
  schema = tracker_to_schema(config, model)
  assert tracker_from_schema(schema, memory=True) == config
  assert tracker_from_schema({"model_type": "sam3_video", "tracker_config": schema}, memory=True) == config
  assert tracker_from_schema(schema, memory=False) == config.replace(memory=None)
  assert tracker_from_schema({"model_type": "sam3_tracker"}, memory=True) == TrackerConfig()
  with pytest.raises(ValueError, match=re.escape("model_type 'sam2' has no tracker; accepted: sam3_tracker")):
    tracker_from_schema({"model_type": "sam2"}, memory=True)
  with pytest.raises(ValueError, match=r"tracker_config\.num_layers: expected int, got 'two'"):
    tracker_from_schema(
      {"model_type": "sam3_tracker", "mask_decoder_config": {"num_hidden_layers": "two"}}, True
    )


def test_profiles_by_name():
  assert TrackerProfile.named("original") == TrackerProfile.original()
  with pytest.raises(ValueError, match="profile must be one of 'original', 'transformers', got 'sam2'"):
    TrackerProfile.named("sam2")
  with pytest.raises(ValueError, match="hidden_size must be a multiple of 8"):
    TrackerConfig(hidden_size=20)
