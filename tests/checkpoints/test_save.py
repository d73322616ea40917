import dataclasses
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.checkpoints import (
  CheckpointError,
  CheckpointMismatchError,
  from_pretrained,
  orbax_io,
  save,
  save_pretrained,
)
from sam3lt_jax.config import Profile
from tests.checkpoints.common import (
  assert_equal,
  flat,
)

# --- our own directories


# Without statistics of BatchNorm all tests below save and load.
@pytest.mark.parametrize("name", ["tiny", pytest.param("tiny-s1", marks=pytest.mark.full)])
def test_orbax_round_trip(tmp_path, name):
  profile = dataclasses.replace(Profile.transformers(), name="mine", score_threshold=0.125)
  model, variables = from_pretrained(f"random:{name}", profile=profile)
  save_pretrained(tmp_path / "m", model, variables)
  assert sorted(os.listdir(tmp_path / "m")) == ["checkpoint.json", "config.json", "variables"]
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


@pytest.mark.full  # 3 s
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


@pytest.mark.full  # 3 s
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


@pytest.mark.full  # 4 s
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


@pytest.mark.full  # 3 s
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


@pytest.mark.full  # 4 s
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


def test_weights_are_readable_as_the_rest_is(tmp_path, tiny_s1):
  save_pretrained(tmp_path / "m", *tiny_s1, format="transformers")
  modes = {os.stat(tmp_path / "m" / name).st_mode for name in ("config.json", "model.safetensors")}
  assert len(modes) == 1


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


@pytest.mark.parametrize(
  ("damage", "told"),
  [
    (lambda file: file.write_bytes(flipped(file.read_bytes())), "is not what was written"),
    # Three loads each; training's checkpoints are cut off and lose files in test_checkpoints.
    pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-5]), "bytes", marks=pytest.mark.full),
    pytest.param(lambda file: file.unlink(), "", marks=pytest.mark.full),
  ],
)
def test_each_damaged_file_of_the_variables_is_found(tmp_path, tiny_s1, saved_s1, damage, told):
  files = [f for f in sorted((saved_s1 / "variables").rglob("*")) if f.is_file()]
  largest = max(files, key=lambda f: f.stat().st_size)
  for file in {largest, files[0], files[-1]}:
    copy = tmp_path / file.name
    shutil.copytree(saved_s1, copy)
    damage(copy / file.relative_to(saved_s1))
    with pytest.raises(CheckpointError, match=re.escape(str(copy))) as caught:
      from_pretrained(copy)
    if file == largest:
      assert isinstance(caught.value, orbax_io.Damaged) or not told
      assert told in str(caught.value)


def flipped(data):
  data = bytearray(data)
  data[len(data) // 2] ^= 4
  return bytes(data)


@pytest.mark.full  # 7 s
@pytest.mark.parametrize(
  "text",
  [
    "{", "[]", "{}", '{"files": 1}', '{"files": {"a": 1}}', '{"files": {"a": ["x", 1]}}',
    '{"files": {"../a": [1, 2]}}',
  ],
)  # fmt: skip
def test_a_damaged_list_of_checksums(tmp_path, saved_s1, text):
  shutil.copytree(saved_s1, tmp_path / "m")
  (tmp_path / "m" / "checkpoint.json").write_text(text)
  with pytest.raises(orbax_io.Damaged, match="is damaged: its part"):
    from_pretrained(tmp_path / "m")


def test_directories_of_older_versions_have_no_checksums(tmp_path, tiny_s1, saved_s1):
  shutil.copytree(saved_s1, tmp_path / "m")
  (tmp_path / "m" / "checkpoint.json").unlink()
  assert_equal(flat(from_pretrained(tmp_path / "m")[1]), flat(tiny_s1[1]))
