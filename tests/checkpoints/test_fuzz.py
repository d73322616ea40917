"""Damaged and hostile files: each reader either reads them or says in a documented error what is wrong.

A case is made from its seed. `KEPT` are seeds that once found something; the others go on from 0 until the
time is up. To look for more: `SAM3LT_FUZZ_SECONDS=600 python -m pytest tests/checkpoints/test_fuzz.py`.
"""

import functools
import json
import pickle
import random
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from sam3lt_jax import Sam3Processor
from sam3lt_jax.checkpoints import CheckpointError, from_pretrained, readers, save_pretrained
from sam3lt_jax.config import Sam3LiteTextConfig
from tests import fuzz
from tests.fuzz import check, json_file, mutate_bytes, mutate_json

SECONDS = fuzz.seconds(1)
KEPT = {
  "config": (87, 187, 458, 710, 1069),
  "processor": (86, 187, 217, 307, 458),
  "directory": (3, 39, 63, 81),
  "index": (0, 4, 11, 81),
  "safetensors": (),
  "torch": (11, 49, 102, 243, 358),
}
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.ones(4, np.float16)}
cases = functools.partial(fuzz.cases, KEPT, SECONDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A tiny model in transformers' layout."""
  path = tmp_path_factory.mktemp("fuzz") / "m"
  save_pretrained(path, *from_pretrained("random:tiny-s1"), format="transformers")
  return path


def test_configurations(tmp_path, model):
  data = json.loads((model / "config.json").read_text())
  video = {"model_type": "sam3_video", "detector_config": data}
  for seed in cases("config"):
    rng = random.Random(seed)
    json_file(rng, tmp_path / "config.json", rng.choice((data, data, video)))
    check(seed, lambda: Sam3LiteTextConfig.from_json(tmp_path), ValueError)


def test_processor_files(tmp_path, model):
  names = ("processor_config.json", "preprocessor_config.json", "config.json", "tokenizer.json")
  for name in names[:3]:
    shutil.copy(model / name, tmp_path / name)
  data = {name: json.loads((model / name).read_text()) for name in names[:3]}
  small = json.loads((model / "tokenizer.json").read_text())
  small["model"] |= {"vocab": dict(list(small["model"]["vocab"].items())[-40:]), "merges": []}
  data["tokenizer.json"] = small
  for seed in cases("processor"):
    rng = random.Random(seed)
    name = rng.choice(names)
    json_file(rng, tmp_path / name, data[name])
    check(seed, lambda: Sam3Processor.from_pretrained(tmp_path), ValueError)
    (tmp_path / name).unlink() if name == names[3] else shutil.copy(model / name, tmp_path / name)


@pytest.mark.filterwarnings("ignore")
def test_directories(tmp_path, model):
  """A whole model: its configuration changed, or its tensors dropped, renamed, reshaped or spoilt."""
  data, tensors = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
  for seed in cases("directory"):
    rng = random.Random(seed)
    (tmp_path / "config.json").write_text(json.dumps(mutate_json(rng, data) if seed % 2 else data))
    changed = dict(tensors)
    for key in rng.sample(sorted(tensors), 0 if seed % 2 else 3):
      value, kind = changed.pop(key), rng.random()
      if kind < 0.3:
        changed[key] = value.reshape(-1)[: rng.randrange(value.size + 1)].copy()
      elif kind < 0.6:
        changed[rng.choice(("module.", "x", "")) + key + rng.choice(("", ".weight"))] = value
      elif kind < 0.8:
        changed[key] = np.full_like(value, rng.choice((np.nan, np.inf)))
      elif kind < 0.9:
        changed[key] = value.astype(rng.choice((np.int64, np.bool_, np.float64)))
    (tmp_path / "model.safetensors").write_bytes(save(changed))
    check(seed, lambda: from_pretrained(tmp_path, progress=False), ValueError)


def read_all(path):
  with readers.open_tensors(path) as tensors:
    for tensor in tensors.values():
      if tensor.nbytes < 1 << 20:
        value = tensor.read()
        assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype)


def test_indices(tmp_path):
  data = {"metadata": {"total_size": 10}, "weight_map": {"a": "1.safetensors", "b.c": "2.safetensors"}}
  for name, key in (("1.safetensors", "a"), ("2.safetensors", "b.c")):
    (tmp_path / name).write_bytes(save({key: TENSORS[key]}))
  for seed in cases("index"):
    json_file(random.Random(seed), tmp_path / readers.SAFETENSORS_INDEX_NAME, data)
    check(seed, lambda: read_all(tmp_path), CheckpointError)


def test_safetensors_files(tmp_path):
  whole = save(TENSORS)
  size = int.from_bytes(whole[:8], "little")
  header = json.loads(whole[8 : 8 + size])
  for seed in cases("safetensors"):
    rng = random.Random(seed)
    data = whole
    if rng.random() < 0.6:
      text = json.dumps(mutate_json(rng, header)).encode()
      data = len(text).to_bytes(8, "little") + text + whole[8 + size :]
    if rng.random() < 0.5:
      data = mutate_bytes(rng, data)
    (tmp_path / "m.safetensors").write_bytes(data)
    check(seed, lambda: read_all(tmp_path / "m.safetensors"), CheckpointError)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_torch_files(tmp_path):
  torch = pytest.importorskip("torch")
  state = {key: torch.from_numpy(value) for key, value in TENSORS.items()}
  a = state["a"]
  odd = (None, 1, "x", [state], b"x", a.to_sparse(), a.T, a[0, :0], a.to("meta"), torch.Size([2]))
  wholes, file = [], tmp_path / "m.pt"
  for modern in (True, False):
    torch.save({"model": state, "epoch": 3}, file, _use_new_zipfile_serialization=modern)
    wholes.append(file.read_bytes())
  for seed in cases("torch"):
    rng = random.Random(seed)
    if rng.random() < 0.25:
      content = {rng.choice((1, None, "a", ("t",), "model", "module")): rng.choice(odd) for _ in range(3)}
      for _ in range(rng.randrange(4)):
        content = {rng.choice(("model", "state_dict", "x")): content}
      torch.save(content, file)
    elif rng.random() < 0.1:
      file.write_bytes(mutate_bytes(rng, pickle.dumps({"a": [1, 2.5, "x"], 3: None})))
    else:
      file.write_bytes(mutate_bytes(rng, rng.choice(wholes)))
    check(seed, lambda: read_all(file), CheckpointError)
