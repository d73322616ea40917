import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.checkpoints import (
  CheckpointError,
  CheckpointMismatchError,
  engine,
  from_pretrained,
  pretrained,
  save_pretrained,
  tables,
)
from sam3lt_jax.config import Profile, Sam3LiteTextConfig
from tests import reference
from tests.checkpoints.common import (
  VARIANTS,
  assert_equal,
  expected_tree,
  flat,
  original_config,
  original_state_dict,
  save_pt,
)


def split3(x):
  return [np.asarray(part) for part in np.split(x, 3)]


# --- original files


@pytest.mark.torch
# L is S1 but for its width.
@pytest.mark.parametrize("variant", ["s0", "s1", pytest.param("l", marks=pytest.mark.full), "sam3"])
def test_original_file(tmp_path, variant):
  pytest.importorskip("torch")
  state = original_state_dict(variant)
  extra = {"tracker.maskmem_tpos_enc": np.zeros((7, 1, 1, 4), np.float32)}
  file = save_pt(state | extra, tmp_path / "m.pt")
  model, variables = from_pretrained(file, config=original_config(variant))
  assert model.config.profile == Profile.original()
  leaves = flat(variables)
  assert leaves.keys() == pretrained.abstract_leaves(model).keys()

  trunk = "detector.backbone.vision_backbone.trunk."
  np.testing.assert_array_equal(
    leaves["params/vision_encoder/backbone/embeddings/position_embeddings"], state[f"{trunk}pos_embed"][:, 1:]
  )
  for name, part in zip("qkv", split3(state[f"{trunk}blocks.3.attn.qkv.weight"])):
    np.testing.assert_array_equal(
      leaves[f"params/vision_encoder/backbone/layers_3/attention/{name}_proj/kernel"], part.T
    )
  decoder = "detector.transformer.decoder.layers.1."
  for name, part in zip("qkv", split3(state[f"{decoder}ca_text.in_proj_bias"])):
    np.testing.assert_array_equal(
      leaves[f"params/detr_decoder/layers_1/text_cross_attn/{name}_proj/bias"], part
    )
  np.testing.assert_array_equal(
    leaves["params/detr_decoder/layers_1/self_attn_layer_norm/scale"], state[f"{decoder}norm2.weight"]
  )
  encoder = "detector.backbone.language_backbone.encoder."
  projection = state[encoder + ("text_projection" if variant == "sam3" else "projection_layer")]
  np.testing.assert_array_equal(leaves["params/text_encoder/projection/kernel"], projection)

  # Back: bit-equal, but for the classification row that was dropped and what nothing reads.
  entries = engine.export_tensors(tables.layout("original", model.config.text.kind), leaves)
  for key, entry in entries.items():
    value, expected = entry.build(), state[key]
    if key.endswith("pos_embed") and "trunk" in key:
      value, expected = value[:, 1:], expected[:, 1:]
    if not key.endswith("num_batches_tracked"):
      np.testing.assert_array_equal(value, expected, err_msg=key)
  unused = ("freqs_cis", "sam2_convs", "points_")
  assert entries.keys() == {k for k in state if not any(u in k for u in unused)}


@pytest.mark.torch
def test_original_file_forms(tmp_path):
  torch = pytest.importorskip("torch")
  state, config = original_state_dict("s0", short_table=True), original_config("s0", short_table=True)
  expected = flat(from_pretrained(save_pt(state, tmp_path / "a.pt"), config=config)[1])
  assert expected["params/text_encoder/embeddings/position_embedding"].shape == (16, 64)
  # The fixtures hold what bfloat16 can, so nothing is lost.
  for name, kwargs in (("b.pt", {"wrap": None}), ("c.pth", {"wrap": "state_dict", "dtype": torch.bfloat16})):
    assert_equal(flat(from_pretrained(save_pt(state, tmp_path / name, **kwargs), config=config)[1]), expected)
  bare = {k.removeprefix("detector."): v for k, v in state.items()}
  assert_equal(flat(from_pretrained(save_pt(bare, tmp_path / "d.pt"), config=config)[1]), expected)


@pytest.mark.torch
def test_wrapped_and_nested_original_files(tmp_path):
  torch = pytest.importorskip("torch")
  state, config = original_state_dict("s0", short_table=True), original_config("s0", short_table=True)
  expected = flat(from_pretrained(save_pt(state, tmp_path / "a.pt"), config=config)[1])
  wrapped = {f"module._orig_mod.{k}": torch.from_numpy(np.array(v)) for k, v in state.items()}
  wrapped["n_averaged"] = torch.tensor(5)
  torch.save({"state_dict": {"model": wrapped, "step": torch.tensor(3)}, "epoch": 1}, tmp_path / "b.pt")
  assert_equal(flat(from_pretrained(tmp_path / "b.pt", config=config)[1]), expected)


@pytest.mark.torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_sizes_ask_for_the_configuration(tmp_path, variant):
  pytest.importorskip("torch")
  file = save_pt(original_state_dict(variant), tmp_path / "m.pt")
  with pytest.raises(CheckpointError) as caught:
    from_pretrained(file)
  text = str(caught.value)
  assert "\n" not in text and text.startswith(f"{file} is no released model")
  looks = {"s0": "4 layers of 64 with RepMixer blocks", "l": "2 layers of 96", "sam3": "3 layers of 64"}
  assert f"{looks.get(variant, '3 layers of 64')}), compared with SAM3-LiteText-S0 (" in text
  for name in ("SAM3-LiteText-S1 (", "SAM3-LiteText-L (", "SAM 3 (the teacher) (", "pass config="):
    assert name in text


@pytest.mark.torch
def test_a_file_without_a_text_encoder(tmp_path):
  pytest.importorskip("torch")
  state = {k: v for k, v in original_state_dict("s0").items() if "language" not in k}
  with pytest.raises(CheckpointError, match=r"no released model: it has no text encoder.*pass config="):
    from_pretrained(save_pt(state, tmp_path / "m.pt"))


@pytest.mark.torch
def test_wrong_variant_is_one_sentence(tmp_path):
  pytest.importorskip("torch")
  file = save_pt(original_state_dict("s0", short_table=True), tmp_path / "m.pt")
  for variant, words in (
    ("s1", "3 layers of 64); leave config= out"),
    ("l", "2 layers of 96); leave config= out"),
    ("sam3", "CLIP text encoder, 3 layers of 64); leave config= out"),
  ):
    with pytest.raises(CheckpointError) as caught:
      from_pretrained(file, config=original_config(variant, short_table=True))
    text = str(caught.value)
    assert "\n" not in text
    assert "looks like an unreleased variant (MobileCLIP text encoder, 4 layers of 64 with RepMixer" in text
    assert words in text and "the given config" in text
  with pytest.raises(CheckpointError, match=r"has 16 rows .*max_position_embeddings=77; set it to 16"):
    from_pretrained(file, config=original_config("s0"))


def test_released_variants_are_named():
  from sam3lt_jax.checkpoints import infer

  facts = infer.TextFacts.of(Sam3LiteTextConfig.s0().text)
  shapes = {
    "params/text_encoder/embeddings/token_embedding/embedding": (49408, 512),
    "params/text_encoder/embeddings/position_embedding": (16, 512),
    "params/text_encoder/layers_0/token_mixer/layer_scale": (512,),
    "params/text_encoder/layers_5/token_mixer/layer_scale": (512,),
  }
  assert infer.text_facts(shapes, "mobileclip") == facts
  infer.check_variant(Sam3LiteTextConfig.s0(), shapes, "mobileclip", "m.pt", given=True)
  with pytest.raises(CheckpointError, match=r"looks like SAM3-LiteText-S0 \(.*is for SAM3-LiteText-S1 \("):
    infer.check_variant(Sam3LiteTextConfig.s1(), shapes, "mobileclip", "m.pt", given=True)
  assert "SAM 3 (the teacher)" in str(infer.TextFacts.of(Sam3LiteTextConfig.sam3().text))
  assert "SAM3-LiteText-L" in str(infer.TextFacts.of(Sam3LiteTextConfig.l().text))


@pytest.mark.torch
def test_all_that_does_not_fit_is_listed(tmp_path):
  pytest.importorskip("torch")
  state = original_state_dict("s0", short_table=True)
  del state["detector.transformer.decoder.norm.bias"]
  del state["detector.dot_prod_scoring.hs_proj.weight"]
  state["detector.surprise"] = np.zeros(3, np.float32)
  state["detector.segmentation_head.cross_attn_norm.bias"] = np.zeros(7, np.float32)
  state["detector.transformer.encoder.layers.9.norm1.bias"] = np.zeros(32, np.float32)
  with pytest.raises(CheckpointMismatchError) as caught:
    from_pretrained(save_pt(state, tmp_path / "m.pt"), config=original_config("s0", short_table=True))
  p = caught.value.problems
  assert sorted(p.missing) == [
    "params/detr_decoder/output_layer_norm/bias [32]",
    "params/dot_product_scoring/query_proj/kernel [32, 32]",
  ]
  assert p.unmapped == ["detector.surprise"]
  assert len(p.unexpected) == len(p.wrong_shape) == 1
  assert "m.pt (layout 'original')" in str(caught.value)


# --- transformers directories


@pytest.fixture(scope="module", params=VARIANTS)
def torch_model(request):
  return reference.random_torch_model(reference.tiny_config(request.param))


@pytest.mark.torch
def test_transformers_directory(tmp_path, torch_model):
  source = reference.save_torch(torch_model, tmp_path / "a")
  model, variables = from_pretrained(source)
  assert model.config.profile.name == "transformers"
  expected = expected_tree(torch_model)
  assert_equal(flat(variables), expected)

  # And back: transformers loads it with nothing missing or unexpected, bit-equal.
  target = tmp_path / "b"
  save_pretrained(target, model, variables, format="transformers")
  loaded, info = type(torch_model).from_pretrained(target, output_loading_info=True)
  for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not info[name], (name, info[name])
  ours, theirs = loaded.state_dict(), torch_model.state_dict()
  assert ours.keys() == theirs.keys()
  for key, value in theirs.items():
    assert ours[key].dtype == value.dtype
    if not key.endswith("num_batches_tracked"):
      assert ours[key].equal(value), key
  again, variables_again = from_pretrained(target)
  assert again.config == model.config
  assert_equal(flat(variables_again), expected)


@pytest.mark.torch
def test_exported_keys_are_those_of_transformers_files(tmp_path, torch_model):
  from safetensors import safe_open

  source = reference.save_torch(torch_model, tmp_path / "a")
  save_pretrained(tmp_path / "b", *from_pretrained(source), format="transformers")
  found = []
  for folder in (source, str(tmp_path / "b")):
    with safe_open(os.path.join(folder, "model.safetensors"), framework="numpy") as f:
      found.append({k: (f.get_slice(k).get_shape(), f.get_slice(k).get_dtype()) for k in f.keys()})
  assert found[0] == found[1]


@pytest.mark.torch
def test_transformers_shards(tmp_path):
  torch_model = reference.random_torch_model(reference.tiny_config("s0"))
  source = reference.save_torch(torch_model, tmp_path / "a", max_shard_size="200KB")
  assert len([n for n in os.listdir(source) if n.endswith(".safetensors")]) > 2
  model, variables = from_pretrained(source)
  assert_equal(flat(variables), expected_tree(torch_model))
  save_pretrained(tmp_path / "b", model, variables, format="transformers", max_shard_size="250KB")
  names = sorted(n for n in os.listdir(tmp_path / "b") if n.endswith(".safetensors"))
  assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
  assert all(os.path.getsize(tmp_path / "b" / n) < 270_000 for n in names)
  loaded, info = type(torch_model).from_pretrained(tmp_path / "b", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  for key, value in torch_model.state_dict().items():
    if not key.endswith("num_batches_tracked"):
      assert loaded.state_dict()[key].equal(value), key
  assert_equal(flat(from_pretrained(tmp_path / "b")[1]), flat(variables))


@pytest.mark.torch
def test_half_precision_files(tmp_path):
  torch = reference.import_torch_reference().torch
  torch_model = reference.random_torch_model(reference.tiny_config("s0")).to(torch.bfloat16)
  source = reference.save_torch(torch_model, tmp_path / "a")
  _, variables = from_pretrained(source)
  assert_equal(flat(variables), expected_tree(torch_model))  # widened to float32
  model, narrow = from_pretrained(source, dtype="bfloat16", param_dtype=jnp.bfloat16)
  assert model.dtype == model.param_dtype == jnp.bfloat16
  assert {x.dtype for x in jax.tree.leaves(narrow["params"])} == {jnp.dtype("bfloat16")}
  assert {x.dtype for x in jax.tree.leaves(narrow["batch_stats"])} == {jnp.dtype("float32")}
  save_pretrained(tmp_path / "b", model, narrow, format="transformers")
  loaded, info = type(torch_model).from_pretrained(tmp_path / "b", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"]
  assert loaded.dtype == torch.bfloat16
  for key, value in torch_model.named_parameters():
    assert dict(loaded.named_parameters())[key].equal(value), key
  half = reference.save_torch(torch_model.to(torch.float16), tmp_path / "c")
  assert_equal(flat(from_pretrained(half)[1]), expected_tree(torch_model))


@pytest.mark.torch
def test_video_checkpoint(tmp_path):
  """`facebook/sam3` is one: the detector behind a prefix, the tracker beside it, the configuration nested."""
  from safetensors.numpy import load_file, save_file

  torch_model = reference.random_torch_model(reference.tiny_config("sam3"))
  source = reference.save_torch(torch_model, tmp_path / "a")
  tensors = {f"detector_model.{k}": v for k, v in load_file(f"{source}/model.safetensors").items()}
  tensors |= {"tracker_model.x": np.zeros(2, np.float32), "tracker_neck.y.z": np.zeros(2, np.float32)}
  save_file(tensors, f"{source}/model.safetensors")
  with open(f"{source}/config.json") as f:
    config = json.load(f)
  with open(f"{source}/config.json", "w") as f:
    json.dump({"model_type": "sam3_video", "detector_config": config}, f)
  assert_equal(flat(from_pretrained(source)[1]), expected_tree(torch_model))


@pytest.mark.torch
def test_transformers_weights_as_a_lone_file(tmp_path):
  torch_model = reference.random_torch_model(reference.tiny_config("s0"))
  source = reference.save_torch(torch_model, tmp_path / "a")
  file = os.path.join(source, "model.safetensors")
  with_config = from_pretrained(file)  # takes the config.json beside it
  assert_equal(flat(with_config[1]), expected_tree(torch_model))
  config = with_config[0].config
  alone = shutil.copy(file, tmp_path / "alone.safetensors")
  assert_equal(flat(from_pretrained(alone, config=config)[1]), expected_tree(torch_model))
  with pytest.raises(CheckpointError, match=r"alone\.safetensors is no released model.*pass config="):
    from_pretrained(alone)
  wrong = json.loads((tmp_path / "a" / "config.json").read_text())
  wrong["text_config"]["num_hidden_layers"] = 3
  (tmp_path / "a" / "config.json").write_text(json.dumps(wrong))
  with pytest.raises(
    CheckpointError, match=r"looks like .*4 layers.* but its config\.json is for .*3 layers.*do not belong"
  ):
    from_pretrained(source)


@pytest.mark.torch
def test_saved_processor_loads_in_transformers(tmp_path, tiny):
  ref = reference.import_torch_reference()
  save_pretrained(tmp_path / "m", *tiny, format="transformers")
  processor = ref.Sam3Processor.from_pretrained(tmp_path / "m")
  assert processor.image_processor.size["height"] == 168
  assert processor.target_size == 168
  ids = processor.tokenizer("a photo of a cat").input_ids
  assert ids[0] == 49406 and ids[-1] == 49407 and len(ids) == 7


# --- without torch


@pytest.fixture
def directory(tmp_path, tiny_s1):
  """A model in transformers' layout, to be changed."""
  save_pretrained(tmp_path / "m", *tiny_s1, format="transformers")
  return tmp_path / "m"


def change_tensors(directory, change):
  from safetensors.numpy import load_file, save_file

  save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors")


def change_config(directory, part, **values):
  data = json.loads((directory / "config.json").read_text())
  data[part].get("backbone_config", data[part]).update(values)
  (directory / "config.json").write_text(json.dumps(data))


def test_a_wrapped_directory_with_a_file_of_another_name(directory, tiny_s1):
  change_tensors(directory, lambda tensors: {f"_orig_mod.module.{k}": v for k, v in tensors.items()})
  (directory / "model.safetensors").rename(directory / "model.fp32.safetensors")
  model, variables = from_pretrained(directory)
  assert model.config == tiny_s1[0].config
  assert_equal(flat(variables), flat(tiny_s1[1]))


def test_nan_weights_are_refused(directory):
  def spoil(tensors):
    tensors["text_projection.weight"][3, 1] = np.nan
    tensors["detr_decoder.query_embed.weight"][0, 0] = np.inf
    return tensors

  change_tensors(directory, spoil)
  with pytest.raises(CheckpointMismatchError, match="NaN or infinity in") as caught:
    from_pretrained(directory)
  assert [line.split(" ")[0] for line in sorted(caught.value.problems.not_finite)] == [
    "detr_decoder.query_embed.weight", "text_projection.weight",
  ]  # fmt: skip


def test_nan_weights_of_our_own_format_are_refused(tmp_path, tiny_s1):
  model, variables = tiny_s1
  bad = engine.flatten(variables)
  bad["params/text_projection/bias"] = bad["params/text_projection/bias"].at[2].set(np.nan)
  save_pretrained(tmp_path / "m", model, engine.unflatten(bad))
  with pytest.raises(CheckpointMismatchError, match="NaN or infinity in") as caught:
    from_pretrained(tmp_path / "m")
  assert caught.value.problems.not_finite == ["params/text_projection/bias"]


@pytest.mark.parametrize(
  ("part", "field", "format"),
  [
    ("vision_config", "num_hidden_layers", "transformers"),
    ("text_config", "num_hidden_layers", "transformers"),
    ("detr_encoder_config", "num_layers", "transformers"),
    ("detr_decoder_config", "num_layers", "orbax"),
  ],
)
def test_a_million_layers_are_refused_unbuilt(tmp_path, tiny_s1, monkeypatch, part, field, format):
  save_pretrained(tmp_path / "m", *tiny_s1, format=format)
  change_config(tmp_path / "m", part, **{field: 10**6})
  monkeypatch.setattr(pretrained, "build", None)
  with pytest.raises(CheckpointError, match="1000000"):
    from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, -1, "4", [4, 5], {"a": 1}, True])
@pytest.mark.parametrize(
  ("part", "field"), [("vision_config", "hidden_size"), ("detr_decoder_config", "num_queries")]
)
def test_numbers_of_a_config_that_are_none(directory, part, field, value):
  change_config(directory, part, **{field: value})
  with pytest.raises(ValueError, match=field) as caught:
    from_pretrained(directory)
  assert "\n" not in str(caught.value)


def test_a_dangling_link_is_called_that(directory, tmp_path):
  (directory / "config.json").rename(tmp_path / "aside.json")
  (directory / "config.json").symlink_to(tmp_path / "gone.json")
  with pytest.raises(CheckpointError, match=r"config\.json is a link to .*gone\.json, which is not there"):
    from_pretrained(directory)
  (tmp_path / "link").symlink_to(tmp_path / "nowhere")
  with pytest.raises(CheckpointError, match=r"link is a link to .*nowhere, which is not there"):
    from_pretrained(tmp_path / "link")
