import dataclasses
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
  hub,
  orbax_io,
  pretrained,
  random_init,
  save,
  save_pretrained,
  tables,
)
from sam3lt_jax.config import Profile, Sam3LiteTextConfig
from tests import reference
from tests.checkpoints.common import VARIANTS, expected_tree, original_config, original_state_dict, save_pt

STUDENTS = ("s0", "s1", "l")


def flat(variables):
  return {k: np.asarray(v) for k, v in engine.flatten(variables).items()}


def assert_equal(found, expected):
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    assert found[key].dtype == value.dtype, key
    np.testing.assert_array_equal(found[key], value, err_msg=key)


@pytest.fixture(scope="module")
def tiny():
  return from_pretrained("random:tiny")


@pytest.fixture(scope="module")
def tiny_s1():
  return from_pretrained("random:tiny-s1")


def split3(x):
  return [np.asarray(part) for part in np.split(x, 3)]


# --- original files


@pytest.mark.torch
@pytest.mark.parametrize("variant", VARIANTS)
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
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("short_table", [False, True])
def test_configuration_is_inferred(tmp_path, variant, short_table):
  pytest.importorskip("torch")
  state = original_state_dict(variant, short_table=short_table and variant != "sam3")
  expected = original_config(variant, short_table=short_table)
  file = save_pt(state, tmp_path / "m.pt")
  if variant == "l":
    with pytest.raises(CheckpointError, match=r"head count of the text encoder .* width 96; pass config="):
      from_pretrained(file)
    return
  with pytest.warns(UserWarning, match=r"text encoder of width 64; heads of 64 are assumed, so 1"):
    model, variables = from_pretrained(file)
  # Everything but the text encoder's heads can be read off, the ViT's heads and windows by their RoPE tables.
  text = dataclasses.replace(expected.text, num_attention_heads=1)
  profile = expected.profile
  if variant == "sam3":
    profile = dataclasses.replace(profile, context_length=32)
  assert model.config == expected.replace(text=text, profile=profile)
  assert_equal(flat(variables), flat(from_pretrained(file, config=expected)[1]))


@pytest.mark.torch
def test_inference_without_rope_tables_asks_for_the_configuration(tmp_path):
  pytest.importorskip("torch")
  state = {k: v for k, v in original_state_dict("s0").items() if "freqs_cis" not in k}
  with pytest.raises(CheckpointError, match=r"window, image size and global layers .* pass config="):
    from_pretrained(save_pt(state, tmp_path / "m.pt"))
  no_queries = {k: v for k, v in original_state_dict("s0").items() if "boxRPB" not in k}
  with pytest.raises(CheckpointError, match=r"there is no detr_decoder/box_rpb_embed_x.*pass config="):
    from_pretrained(save_pt(no_queries, tmp_path / "n.pt"))


@pytest.mark.torch
def test_wrong_variant_is_one_sentence(tmp_path):
  pytest.importorskip("torch")
  file = save_pt(original_state_dict("s0", short_table=True), tmp_path / "m.pt")
  for variant, words in (
    ("s1", "3 layers of 64); use"),
    ("l", "2 layers of 96); use"),
    ("sam3", "CLIP text encoder, 3 layers of 64); use"),
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
  infer.check_variant(Sam3LiteTextConfig.s0(), shapes, "mobileclip", "m.pt", "config")
  with pytest.raises(CheckpointError, match=r"looks like SAM3-LiteText-S0 \(.*is for SAM3-LiteText-S1 \("):
    infer.check_variant(Sam3LiteTextConfig.s1(), shapes, "mobileclip", "m.pt", "config")
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
  with pytest.raises(CheckpointError, match="cannot be inferred; pass config="):
    from_pretrained(alone)
  wrong = json.loads((tmp_path / "a" / "config.json").read_text())
  wrong["text_config"]["num_hidden_layers"] = 3
  (tmp_path / "a" / "config.json").write_text(json.dumps(wrong))
  with pytest.raises(
    CheckpointError, match=r"looks like .*4 layers.* but its config\.json is for .*3 layers"
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


# --- our own directories


@pytest.mark.parametrize("name", ["tiny", "tiny-s1"])
def test_orbax_round_trip(tmp_path, name):
  profile = dataclasses.replace(Profile.transformers(), name="mine", score_threshold=0.125)
  model, variables = from_pretrained(f"random:{name}", profile=profile)
  save_pretrained(tmp_path / "m", model, variables)
  assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "variables"]
  again, loaded = from_pretrained(tmp_path / "m")
  assert again.config == model.config and again.config.profile == profile
  assert_equal(flat(loaded), flat(variables))
  assert ("batch_stats" in loaded) == (name == "tiny")
  assert jax.tree.structure(loaded) == jax.tree.structure(variables)
  narrow = from_pretrained(tmp_path / "m", param_dtype=jnp.bfloat16)[1]
  assert {x.dtype for x in jax.tree.leaves(narrow["params"])} == {jnp.dtype("bfloat16")}
  np.testing.assert_array_equal(
    narrow["params"]["text_projection"]["kernel"],
    variables["params"]["text_projection"]["kernel"].astype(jnp.bfloat16),
  )


def test_fused_models_are_saved_as_ours_only(tmp_path, tiny):
  model, variables = tiny
  fused, folded = model.fuse(variables)
  save_pretrained(tmp_path / "m", fused, folded)
  again, loaded = from_pretrained(tmp_path / "m")
  assert again.config.text.fused
  assert_equal(flat(loaded), flat(folded))
  with pytest.raises(CheckpointError, match="has no place for fused RepMixer blocks"):
    save_pretrained(tmp_path / "t", fused, folded, format="transformers")
  assert not (tmp_path / "t").exists()
  save_pretrained(tmp_path / "t", model, variables, format="transformers")
  with pytest.raises(CheckpointError, match="load it unfused"):
    from_pretrained(tmp_path / "t", config=fused.config)


def test_broken_directories_of_ours(tmp_path, tiny_s1):
  model, variables = tiny_s1
  save_pretrained(tmp_path / "m", model, variables)
  other = dataclasses.replace(model.config.detr_decoder, num_queries=7)
  with pytest.raises(
    CheckpointMismatchError, match=r"query_embed/embedding: \[20, 32\], the model has \[7, 32\]"
  ):
    from_pretrained(tmp_path / "m", config=model.config.replace(detr_decoder=other))
  shutil.copytree(tmp_path / "m", tmp_path / "n")
  (tmp_path / "n" / "config.json").unlink()
  with pytest.raises(CheckpointError, match=r"has no config\.json"):
    from_pretrained(tmp_path / "n")
  assert_equal(flat(from_pretrained(tmp_path / "n", config=model.config)[1]), flat(variables))
  for root, _, files in os.walk(tmp_path / "m" / "variables"):
    for name in files:
      if os.path.basename(root) == "d":  # the data
        path = os.path.join(root, name)
        with open(path, "r+b") as f:
          f.truncate(os.path.getsize(path) // 2)
  with pytest.raises(CheckpointError, match="incomplete or corrupted"):
    from_pretrained(tmp_path / "m")
  shutil.rmtree(tmp_path / "n" / "variables")
  (tmp_path / "n" / "variables").mkdir()
  with pytest.raises(CheckpointError, match="incomplete or corrupted"):
    from_pretrained(tmp_path / "n", config=model.config)


# --- saving


@pytest.mark.parametrize("format", save.FORMATS)
def test_a_crash_leaves_nothing(tmp_path, tiny_s1, monkeypatch, format):
  def crash(*args, **kwargs):
    raise OSError("disk full")

  save_pretrained(tmp_path / "old", *tiny_s1, format=format)
  before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
  monkeypatch.setattr(save, "_write_tokenizer", crash)
  for target in ("new", "old"):
    with pytest.raises(OSError, match="disk full"):
      save_pretrained(tmp_path / target, *tiny_s1, format=format, overwrite=True)
  assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_existing_targets(tmp_path, tiny_s1):
  model, variables = tiny_s1
  target = tmp_path / "deep" / "m"
  target.mkdir(parents=True)
  save_pretrained(target, model, variables)  # empty: taken
  (target / "mine.txt").write_text("x")
  with pytest.raises(CheckpointError, match="is not empty; pass overwrite=True"):
    save_pretrained(target, model, variables)
  assert (target / "mine.txt").exists()
  zeros = jax.tree.map(jnp.zeros_like, variables)
  save_pretrained(target, model, zeros, overwrite=True)
  assert not (target / "mine.txt").exists()
  assert_equal(flat(from_pretrained(target)[1]), flat(zeros))
  assert os.listdir(tmp_path / "deep") == ["m"]
  (tmp_path / "file").write_text("x")
  with pytest.raises(CheckpointError, match="exists and is no directory"):
    save_pretrained(tmp_path / "file", model, variables, overwrite=True)
  with pytest.raises(CheckpointError, match="is an address"):
    save_pretrained("gs://bucket/m", model, variables)


def test_a_failed_rename_restores_the_old(tmp_path, tiny_s1, monkeypatch):
  save_pretrained(tmp_path / "m", *tiny_s1)
  rename = os.rename

  def failing(a, b):
    if b == str(tmp_path / "m") and a.rpartition(".")[2] != "replaced":
      raise OSError("busy")
    rename(a, b)

  monkeypatch.setattr(save.os, "rename", failing)
  with pytest.raises(OSError, match="busy"):
    save_pretrained(tmp_path / "m", *tiny_s1, overwrite=True)
  assert os.listdir(tmp_path) == ["m"]
  assert_equal(flat(from_pretrained(tmp_path / "m")[1]), flat(tiny_s1[1]))


@pytest.mark.parametrize("format", save.FORMATS)
def test_only_the_model_s_own_variables_are_saved(tmp_path, tiny_s1, format):
  model, variables = tiny_s1
  params = dict(variables["params"])
  del params["text_projection"]
  extra = {"params": params | {"teacher": {"kernel": np.zeros((2, 2), np.float32)}}}
  with pytest.raises(CheckpointMismatchError) as caught:
    save_pretrained(tmp_path / "m", model, extra, format=format)
  assert caught.value.problems.unexpected == ["params/teacher/kernel [2, 2]"]
  assert len(caught.value.problems.missing) == 2
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("size", "count"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), (7, 7), ("8k", 8000)])
def test_shard_sizes(size, count):
  assert save._shard_bytes(size) == count


def test_bad_arguments_of_save(tmp_path, tiny_s1):
  for size in (0, -1, "big", "0MB"):
    with pytest.raises(ValueError, match="max_shard_size must be"):
      save_pretrained(tmp_path / "m", *tiny_s1, format="transformers", max_shard_size=size)
  with pytest.raises(ValueError, match="format must be one of 'orbax', 'transformers', got 'h5'"):
    save_pretrained(tmp_path / "m", *tiny_s1, format="h5")
  assert os.listdir(tmp_path) == []


def test_tokenizer_files(tmp_path, tiny_s1):
  source = tmp_path / "source"
  source.mkdir()
  (source / "tokenizer.json").write_text('{"mine": 1}')
  (source / "tokenizer_config.json").write_text('{"also": 2}')
  (source / "weights.bin").write_text("x")
  save_pretrained(tmp_path / "a", *tiny_s1, tokenizer=source)
  assert json.loads((tmp_path / "a" / "tokenizer.json").read_text()) == {"mine": 1}
  assert json.loads((tmp_path / "a" / "tokenizer_config.json").read_text()) == {"also": 2}
  assert not (tmp_path / "a" / "weights.bin").exists()
  other = shutil.copy(source / "tokenizer.json", tmp_path / "other.json")
  save_pretrained(tmp_path / "b", *tiny_s1, format="transformers", tokenizer=other)
  assert json.loads((tmp_path / "b" / "tokenizer.json").read_text()) == {"mine": 1}
  assert (tmp_path / "b" / "tokenizer_config.json").exists()
  with pytest.raises(CheckpointError, match="has no tokenizer files"):
    save_pretrained(tmp_path / "c", *tiny_s1, format="transformers", tokenizer=tmp_path / "nowhere")


# --- sources and arguments


def test_random_weights_are_repeatable(tiny):
  _, variables = tiny
  assert_equal(flat(from_pretrained("random:tiny", seed=0)[1]), flat(variables))
  other = flat(from_pretrained("random:tiny", seed=1)[1])
  kernel = "params/text_projection/kernel"
  assert not np.array_equal(other[kernel], flat(variables)[kernel])
  assert all(np.isfinite(x).all() and (np.abs(x).max() > 0 or "mean" in k) for k, x in other.items())
  # A leaf depends on its own path only: known values, so that published numbers stay true.
  first = random_init.random_leaf("params/a/kernel", (4, 2), np.float32, 0)
  np.testing.assert_array_equal(first, random_init.random_leaf("params/a/kernel", (4, 2), np.float32, 0))
  assert not np.array_equal(first, random_init.random_leaf("params/b/kernel", (4, 2), np.float32, 0))


@pytest.mark.parametrize("name", ["s0", "s1", "l", "sam3"])
def test_random_names_are_the_released_sizes(name):
  assert random_init.RANDOM_CONFIGS[name]() == getattr(Sam3LiteTextConfig, name)()


def test_random_weights_with_other_sizes(tiny):
  config = tiny[0].config
  other = config.replace(detr_decoder=dataclasses.replace(config.detr_decoder, num_queries=3))
  model, variables = from_pretrained("random:tiny", config=other)
  assert model.config == other
  assert variables["params"]["detr_decoder"]["query_embed"]["embedding"].shape == (3, 32)


def test_random_model_runs(tiny):
  model, variables = tiny
  ids = np.ones((1, 16), np.int32)
  features = model.apply(variables, ids, ids, method="get_text_features")
  assert np.isfinite(features.pooler_output).all()
  assert 0.1 < np.std(features.pooler_output) < 10


@pytest.mark.parametrize(
  ("source", "words"),
  [
    ("s3", r"unknown model 's3'; did you mean .*'s[01]'"),
    ("S2", r"unknown model 'S2'; did you mean .*'s[01]'"),
    ("sam3-litetext-s0x", r"unknown model .*'Simon7108528/sam3-litetext-s0'"),
    ("random:s9", r"unknown model 'random:s9'; did you mean .*'random:s0'"),
    ("tiny", r"unknown model 'tiny'; did you mean 'random:tiny'"),
    ("zzzzzz", r"unknown model 'zzzzzz'; accepted: 's0', 's1', 'l', a hub id"),
    ("./nowhere", r"no such file or directory './nowhere'"),
    ("model.pt", r"no such file or directory 'model\.pt'"),
    ("", r"source must name a checkpoint"),
    ("gs://bucket/model", r"is an address"),
  ],
)
def test_unknown_sources(source, words, monkeypatch):
  def no_download(*args, **kwargs):
    raise AssertionError("the hub was asked")

  monkeypatch.setattr(hub, "download", no_download)
  with pytest.raises(CheckpointError, match=words) as caught:
    from_pretrained(source)
  assert isinstance(caught.value, ValueError)


def test_paths_are_suggested(tmp_path, monkeypatch):
  (tmp_path / "checkpoint").mkdir()
  monkeypatch.chdir(tmp_path)
  for source in (str(tmp_path / "chekpoint"), "./chekpoint"):
    with pytest.raises(CheckpointError, match=r"no such file or directory .*did you mean '.*/?checkpoint'"):
      from_pretrained(source)
  with pytest.raises(CheckpointError, match="no such file or directory 'checkpoint/s0'"):
    from_pretrained("checkpoint/s0")  # not a hub id: the directory is here
  with pytest.raises(CheckpointError, match="is an empty directory"):
    from_pretrained("checkpoint")
  (tmp_path / "photo.jpg").write_bytes(b"x")
  with pytest.raises(CheckpointError, match=r"photo\.jpg is no checkpoint"):
    from_pretrained("photo.jpg")


@pytest.mark.parametrize(
  ("source", "asked"),
  [
    ("s0", "Simon7108528/sam3-litetext-s0"),
    ("S1", "Simon7108528/sam3-litetext-s1"),
    ("l", "Simon7108528/sam3-litetext-l"),
    ("someone/a-model", "someone/a-model"),
    ("someone/a-model:sub/file.pt", "someone/a-model:sub/file.pt"),
  ],
)
def test_hub_sources(tmp_path, tiny_s1, monkeypatch, source, asked):
  save_pretrained(tmp_path / "m", *tiny_s1)
  calls = []

  def download(*args, **kwargs):
    calls.append((args, kwargs))
    return str(tmp_path / "m")

  monkeypatch.setattr(hub, "download", download)
  monkeypatch.chdir(tmp_path)
  _, variables = from_pretrained(
    source, revision="abc", token="t", cache_dir=tmp_path / "c", local_files_only=True
  )
  assert_equal(flat(variables), flat(tiny_s1[1]))
  kwargs = {"revision": "abc", "token": "t", "cache_dir": tmp_path / "c", "local_files_only": True}
  assert calls == [((asked,), kwargs)]


def test_profiles(tmp_path, tiny_s1):
  model, variables = tiny_s1
  assert model.config.profile == Profile.original()
  save_pretrained(tmp_path / "t", model, variables, format="transformers")
  assert from_pretrained(tmp_path / "t")[0].config.profile == Profile.original()  # what was saved
  changed = from_pretrained(tmp_path / "t", profile="transformers")[0].config
  assert changed == model.config.replace(profile="transformers")
  path = tmp_path / "t" / "config.json"
  data = json.loads(path.read_text())
  del data["sam3lt_jax"]  # as transformers writes it
  path.write_text(json.dumps(data))
  assert from_pretrained(tmp_path / "t")[0].config.profile.name == "transformers"
  assert from_pretrained(tmp_path / "t", profile="original")[0].config.profile == Profile.original()
  mine = dataclasses.replace(Profile.original(), name="mine", context_length=7)
  assert from_pretrained("random:tiny-s1", profile=mine)[0].config.profile == mine
  given = from_pretrained("random:tiny-s1", config=model.config, profile="transformers")[0].config
  assert given.profile == Profile.transformers()
  assert from_pretrained(tmp_path / "t", config=data)[0].config.text == model.config.text
  with pytest.raises(ValueError, match="profile must be one of"):
    from_pretrained("random:tiny-s1", profile="pytorch")


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
@pytest.mark.parametrize("value", ["int8", "nonsense", "float64"])
def test_bad_dtypes(name, value):
  with pytest.raises(ValueError, match=f"^{name} must be one of float32, bfloat16, float16, got '{value}'"):
    from_pretrained("random:tiny", **{name: value})


def test_no_permission(tmp_path, tiny_s1, monkeypatch):
  save_pretrained(tmp_path / "t", *tiny_s1, format="transformers")
  from sam3lt_jax.checkpoints import readers

  def refuse(path):
    raise PermissionError(13, "Permission denied", path)

  monkeypatch.setattr(readers, "_check_pointer", refuse)
  with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: permission denied"):
    from_pretrained(tmp_path / "t")


def test_quick_loads_show_no_bar(tmp_path, tiny_s1, capsys, monkeypatch):
  save_pretrained(tmp_path / "t", *tiny_s1, format="transformers")
  from_pretrained(tmp_path / "t")
  assert capsys.readouterr().err == ""
  monkeypatch.setattr(pretrained, "_QUIET_SECONDS", 0.0)
  from_pretrained(tmp_path / "t")
  assert "loading t" in capsys.readouterr().err
  from_pretrained(tmp_path / "t", progress=False)
  assert capsys.readouterr().err == ""


def test_device_and_sharding(tiny_s1, tmp_path):
  device = jax.devices()[0]
  mesh = jax.sharding.Mesh(np.array([device]), ("data",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  save_pretrained(tmp_path / "m", *tiny_s1)
  for source in ("random:tiny-s1", tmp_path / "m"):
    _, variables = from_pretrained(source, device=sharding)
    assert {x.sharding for x in jax.tree.leaves(variables)} == {sharding}
    _, variables = from_pretrained(source, device=device)
    assert {next(iter(x.devices())) for x in jax.tree.leaves(variables)} == {device}
  assert orbax_io.is_saved(str(tmp_path / "m"))
