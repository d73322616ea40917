"""Students: configurations, and where their weights start."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sam3lt_jax import from_pretrained
from sam3lt_jax.checkpoints import CheckpointError, CheckpointMismatchError, engine, save_pretrained
from sam3lt_jax.config import Profile, Sam3LiteTextConfig, TextConfig
from sam3lt_jax.model import Sam3LiteText
from sam3lt_jax.training.distillation.student import make_student, student_config
from tests.checkpoints.common import TEXT, fixture, original_config, original_state_dict

pytestmark = pytest.mark.full  # long: CI runs it

TEACHER = original_config("sam3")  # width 32, 256 ids, a CLIP tower

RESAMPLED = dataclasses.replace(Profile.original(), position_policy="interpolate")


def recorded_student(**changes):
  """The configuration of the recorded S0-like text encoder (4 blocks, 64 wide), with a table of 16 rows."""
  return dataclasses.replace(original_config("s0", short_table=True).text, **changes)


def text_state(variant="s0", prefix="encoder.", projector=True):
  """The recorded text encoder under another prefix, as its files carry it."""
  state = {k.removeprefix(TEXT): v for k, v in original_state_dict(variant).items() if k.startswith(TEXT)}
  return {
    k.replace("encoder.", prefix, 1) if k.startswith("encoder.") else k: np.ascontiguousarray(v)
    for k, v in state.items()
    if projector or k.startswith("encoder.")
  }


def features(model, variables, ids, mask):
  return np.asarray(model.apply(variables, ids, mask, method="get_text_features").pooler_output)


def test_config_is_the_teachers_detector_with_the_students_text():
  config = student_config("s0", Sam3LiteTextConfig.sam3("transformers"))
  assert config.text == Sam3LiteTextConfig.s0().text
  teacher, profile = Sam3LiteTextConfig.sam3("transformers").profile, config.profile
  assert (profile.pad_token_id, profile.context_length, profile.mask_text_padding) == (0, 16, False)
  assert profile.text_cleaning == "original" and profile.position_policy == "slice"
  assert profile.geometry_cls == teacher.geometry_cls and profile.mask_order == teacher.mask_order
  assert config.vision == Sam3LiteTextConfig.sam3().vision
  assert student_config("l", TEACHER, context_length=8).text.max_position_embeddings == 8
  assert student_config("l", TEACHER).text.vocab_size == 256


@pytest.mark.parametrize(
  ("student", "options", "said"),
  [
    ("s9", {}, r"student='s9'; accepted: s0, s1, l"),
    (recorded_student(vocab_size=300), {}, r"its vocabulary has 300 tokens, the teacher's 256"),
    (recorded_student(), {"context_length": 20}, r"context_length: the student's position table has 16 rows"),
    (recorded_student(fused=True), {}, r"config.text.fused has no BatchNorm to train"),
  ],
)
def test_students_that_cannot_be(student, options, said):
  with pytest.raises(ValueError, match=said):
    student_config(student, TEACHER, **options)


def test_random():
  model, variables, report = make_student(recorded_student(), teacher=TEACHER, seed=1)
  assert sorted(variables["params"]) == ["text_encoder", "text_projection"]
  assert report.loaded == () and len(report.random) == len(jax.tree.leaves(variables))
  assert variables["params"]["text_projection"]["kernel"].shape == (64, 32)
  again = make_student(recorded_student(), teacher=TEACHER, seed=1)[1]
  other = make_student(recorded_student(), teacher=TEACHER, seed=2)[1]
  same = jax.tree.map(np.array_equal, variables, again)
  assert all(jax.tree.leaves(same))
  assert not np.array_equal(variables["params"]["text_projection"]["kernel"],
                            other["params"]["text_projection"]["kernel"])  # fmt: skip
  assert isinstance(model, Sam3LiteText) and model.config.detr_encoder.hidden_size == 32


@pytest.mark.parametrize("prefix", ["text_encoder.", "module.text_encoder.", ""])
def test_mobileclip_file(tmp_path, prefix):
  """77 position rows, an image encoder beside it, no projection: what Apple's files look like."""
  state = text_state(prefix=prefix, projector=False)
  state |= {
    "image_encoder.model.patch_embed.0.weight": np.zeros((2, 3), np.float32),
    "logit_scale": np.zeros(1),
  }
  save_file(state, tmp_path / "mobileclip_s0.safetensors")
  init = tmp_path / "mobileclip_s0.safetensors"
  _, variables, report = make_student(recorded_student(), init, teacher=TEACHER)
  assert {p.rpartition("/")[0] for p in report.random} == {"params/text_projection"}
  assert any("position table cut from 77 to 16 rows" in note for note in report.notes)
  assert "text_projection" in str(report) and "cut from 77" in str(report)
  encoder = variables["params"]["text_encoder"]
  key = f"{prefix}transformer.1.pre_norm_mha.1.qkv_proj.weight"
  np.testing.assert_array_equal(encoder["layers_1"]["self_attn"]["k_proj"]["kernel"], state[key][64:128].T)
  table = state[f"{prefix}positional_embedding.pos_embed.pos_embed"][0, 0]
  np.testing.assert_array_equal(encoder["embeddings"]["position_embedding"], table[:16])
  mean = state[f"{prefix}transformer.3.convffn.conv.bn.running_mean"]
  stats = variables["batch_stats"]["text_encoder"]["layers_3"]["conv_feed_forward"]["depthwise_batchnorm"]
  np.testing.assert_array_equal(stats["mean"], mean)


def test_mobileclip_resampled_under_the_profile_that_resamples(tmp_path):
  save_file(text_state(prefix="text_encoder.", projector=False), tmp_path / "m.safetensors")
  report = make_student(recorded_student(), tmp_path / "m.safetensors", teacher=TEACHER, profile=RESAMPLED)[2]
  assert any("resampled from 77 to 16" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["student file", "whole model", "safetensors of ours"])
def test_litetext_checkpoints_give_the_recorded_features(tmp_path, kind):
  """The authors' student file (encoder + projector), and whole detectors, in 16 tokens."""
  if kind == "student file":
    state, name = text_state(), "student.safetensors"
    save_file(state, tmp_path / name)
  elif kind == "whole model":
    state = {
      k: np.ascontiguousarray(v) for k, v in original_state_dict("s0").items() if v.dtype != np.complex64
    }
    name = "whole.safetensors"
    save_file(state, tmp_path / name)
  else:
    state = {
      k: np.ascontiguousarray(v) for k, v in original_state_dict("s0").items() if v.dtype != np.complex64
    }
    save_file(state, tmp_path / "w.safetensors")
    model, variables = from_pretrained(tmp_path / "w.safetensors", original_config("s0"), progress=False)
    name = "saved"
    save_pretrained(tmp_path / name, model, variables)
  model, variables, report = make_student(recorded_student(), tmp_path / name, teacher=TEACHER)
  assert report.random == ()
  recorded = fixture("text_mct")
  ids = recorded["ctx16_trunc77/token_ids"].astype(np.int32)
  got = features(model, variables, ids, ids != 0)
  np.testing.assert_allclose(got, recorded["ctx16_trunc77/text_memory"].transpose(1, 0, 2), atol=2e-5)


def test_transformers_directory_and_random_names(tmp_path):
  model, variables = from_pretrained("random:tiny", progress=False)
  save_pretrained(tmp_path / "t", model, variables, format="transformers")
  for init in (tmp_path / "t", "random:tiny"):
    _, got, report = make_student("tiny", init, teacher=model.config)
    assert report.random == ()
    for path, leaf in engine.flatten(got).items():
      np.testing.assert_array_equal(leaf, engine.flatten(variables)[path])


def test_a_projection_to_another_width_stays_random(tmp_path):
  state = text_state()
  state["projector.weight"], state["projector.bias"] = (
    np.zeros((48, 64), np.float32),
    np.zeros(48, np.float32),
  )
  save_file(state, tmp_path / "wide.safetensors")
  report = make_student(recorded_student(), tmp_path / "wide.safetensors", teacher=TEACHER)[2]
  assert {p for p in report.random} == {"params/text_projection/bias", "params/text_projection/kernel"}
  assert any("text_projection/kernel of shape [64, 48] was left out" in note for note in report.notes)


def test_files_that_do_not_fit(tmp_path):
  save_file(text_state("s1"), tmp_path / "plain.safetensors")
  with pytest.raises(
    CheckpointMismatchError, match=r"(?s)init: .*plain.*the model has no place for.*nothing fills"
  ):
    make_student(recorded_student(), tmp_path / "plain.safetensors", teacher=TEACHER)
  save_file(text_state(), tmp_path / "narrow.safetensors")
  wide = recorded_student(hidden_size=128, intermediate_size=512, projection_dim=128)
  with pytest.raises(CheckpointMismatchError, match="wrong shape"):
    make_student(wide, tmp_path / "narrow.safetensors", teacher=TEACHER)
  save_file(
    {k: np.ascontiguousarray(v) for k, v in original_state_dict("sam3").items() if v.dtype != np.complex64},
    tmp_path / "clip.safetensors",
  )
  with pytest.raises(CheckpointError, match=r"text encoder of kind 'clip', the student's is 'mobileclip'"):
    make_student(recorded_student(), tmp_path / "clip.safetensors", teacher=TEACHER)
  save_file({"other.weight": np.zeros(3, np.float32)}, tmp_path / "strange.safetensors")
  with pytest.raises(CheckpointError, match="holds no SAM3-LiteText detector"):
    make_student(recorded_student(), tmp_path / "strange.safetensors", teacher=TEACHER)
  with pytest.raises(CheckpointError, match="unknown model"):
    make_student(recorded_student(), "mobileclip_s7", teacher=TEACHER)


def test_custom_clip_student():
  text = TextConfig(
    kind="clip", vocab_size=256, hidden_size=32, intermediate_size=64, projection_dim=32, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=16,
  )  # fmt: skip
  model, variables, _ = make_student(text, teacher=TEACHER)
  ids = np.ones((1, 16), np.int32)
  assert features(model, variables, ids, ids).shape == (1, 16, 32) and "batch_stats" not in variables
