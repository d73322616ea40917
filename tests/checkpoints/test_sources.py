import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from sam3lt_jax.checkpoints import (
  CheckpointError,
  from_pretrained,
  hub,
  orbax_io,
  pretrained,
  random_init,
  save_pretrained,
  sources,
)
from sam3lt_jax.config import Profile, Sam3LiteTextConfig
from tests.checkpoints.common import (
  assert_equal,
  flat,
)


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
    ("zzzzzz", r"unknown model 'zzzzzz'; accepted: 's0', 's1', 'l', 'shapes' \(bundled\), a hub id"),
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


def test_a_training_run_s_folder_is_its_model(tmp_path, saved_s1):
  shutil.copytree(saved_s1, tmp_path / "tuned/model")
  (tmp_path / "tuned/config.json").write_text("{}")  # the run's, no model's
  assert sources.locate(tmp_path / "tuned") == sources.Located("orbax", str(tmp_path / "tuned/model"))


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


@pytest.mark.full  # 5 s
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
def test_hub_sources(tmp_path, tiny_s1, saved_s1, monkeypatch, source, asked):
  calls = []

  def download(*args, **kwargs):
    calls.append((args, kwargs))
    return str(saved_s1)

  monkeypatch.setattr(hub, "download", download)
  monkeypatch.chdir(tmp_path)
  _, variables = from_pretrained(
    source, revision="abc", token="t", cache_dir=tmp_path / "c", local_files_only=True
  )
  assert_equal(flat(variables), flat(tiny_s1[1]))
  kwargs = {"revision": "abc", "token": "t", "cache_dir": tmp_path / "c", "local_files_only": True}
  assert calls == [((asked,), kwargs)]


@pytest.mark.full  # 4 s
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


def test_device_and_sharding(saved_s1):
  device = jax.devices()[0]
  mesh = jax.sharding.Mesh(np.array([device]), ("data",))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  for source in ("random:tiny-s1", saved_s1):
    _, variables = from_pretrained(source, device=sharding)
    assert {x.sharding for x in jax.tree.leaves(variables)} == {sharding}
    _, variables = from_pretrained(source, device=device)
    assert {next(iter(x.devices())) for x in jax.tree.leaves(variables)} == {device}
  assert orbax_io.is_saved(str(saved_s1))
