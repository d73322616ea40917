import json
import os
import pickle
import types

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from sam3lt_jax.checkpoints import readers
from sam3lt_jax.checkpoints.errors import CheckpointError

TENSORS = {
  "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
  "f16": np.arange(4, dtype=np.float16),
  "bf16": np.arange(3).astype(ml_dtypes.bfloat16),
  "count": np.array(5, np.int64),
}


def read_all(path):
  with readers.open_tensors(path) as tensors:
    out = {}
    for key, tensor in tensors.items():
      out[key] = np.array(tensor.read())
      assert (out[key].shape, out[key].dtype) == (tensor.shape, tensor.dtype)
      assert out[key].nbytes == tensor.nbytes
    return out


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    assert found[key].dtype == value.dtype
    np.testing.assert_array_equal(found[key], value)


def error(path):
  with pytest.raises(CheckpointError) as caught, readers.open_tensors(path) as _:
    pass
  assert str(path) in str(caught.value)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def write_shards(path, shards, weight_map=None):
  for name, tensors in shards.items():
    save_file(tensors, path / name)
  weight_map = weight_map or {key: name for name, tensors in shards.items() for key in tensors}
  index = {"metadata": {}, "weight_map": weight_map}
  (path / readers.SAFETENSORS_INDEX_NAME).write_text(json.dumps(index))


# --- safetensors


def test_single_file(tmp_path):
  save_file(TENSORS, tmp_path / "model.safetensors")
  assert_same(read_all(tmp_path / "model.safetensors"), TENSORS)
  assert_same(read_all(tmp_path), TENSORS)


def test_no_torch_is_needed(tmp_path, monkeypatch):
  import sys

  monkeypatch.setitem(sys.modules, "torch", None)
  save_file(TENSORS, tmp_path / "model.safetensors")
  assert_same(read_all(tmp_path), TENSORS)


def test_shards(tmp_path):
  a = {k: TENSORS[k] for k in ("f32", "count")}
  b = {k: TENSORS[k] for k in ("f16", "bf16")}
  write_shards(tmp_path, {"model-00001-of-00002.safetensors": a, "model-00002-of-00002.safetensors": b})
  assert_same(read_all(tmp_path), TENSORS)


@pytest.mark.parametrize("keep", [0.999, 0.3, 0.01])
def test_truncated_safetensors(tmp_path, keep):
  file = tmp_path / "model.safetensors"
  save_file({"x": np.zeros(5000, np.float32)} | TENSORS, file)
  data = file.read_bytes()
  file.write_bytes(data[: int(len(data) * keep)])
  assert "truncated or corrupted" in error(file)


def test_corrupted_header(tmp_path):
  file = tmp_path / "model.safetensors"
  save_file(TENSORS, file)
  data = bytearray(file.read_bytes())
  data[8:20] = b"garbage here"
  file.write_bytes(data)
  assert "truncated or corrupted" in error(file)


def test_empty_file(tmp_path):
  for name in ("model.safetensors", "model.pt"):
    (tmp_path / name).write_bytes(b"")
    if name.endswith(".pt"):
      pytest.importorskip("torch")
    assert error(tmp_path / name).endswith("is an empty file")


def test_lfs_pointer(tmp_path):
  file = tmp_path / "model.safetensors"
  file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
  assert "Git LFS pointer" in error(file)


def test_missing_shards_are_named(tmp_path):
  write_shards(tmp_path, {"a.safetensors": {"f32": TENSORS["f32"]}, "b.safetensors": {"f16": TENSORS["f16"]}})
  (tmp_path / "b.safetensors").unlink()
  text = error(tmp_path)
  assert "1 of 2 shards are missing: b.safetensors" in text


def test_shard_without_its_tensors(tmp_path):
  write_shards(tmp_path, {"a.safetensors": TENSORS}, {"f32": "a.safetensors", "gone": "a.safetensors"})
  assert "lacks what the index puts there: gone" in error(tmp_path)


def test_tensor_in_two_shards(tmp_path):
  a, b = {"f32": TENSORS["f32"]}, {"f32": TENSORS["f32"], "f16": TENSORS["f16"]}
  write_shards(
    tmp_path, {"a.safetensors": a, "b.safetensors": b}, {"f32": "a.safetensors", "f16": "b.safetensors"}
  )
  assert "more than one shard: f32" in error(tmp_path)


def test_index_may_not_leave_its_directory(tmp_path):
  write_shards(tmp_path, {}, {"f32": "../other/a.safetensors"})
  assert "outside its directory" in error(tmp_path)


@pytest.mark.parametrize(
  "text",
  [
    "{",
    "[]",
    "{}",
    '{"weight_map": 3}',
    '{"weight_map": {"a": ["b"]}}',
    '{"weight_map": {"a": 1}}',
    "[" * 9**5,
  ],
)
def test_broken_index(tmp_path, text):
  (tmp_path / readers.SAFETENSORS_INDEX_NAME).write_text(text)
  assert "is not an index" in error(tmp_path)


def test_directories_without_weights(tmp_path):
  assert error(tmp_path).endswith("is an empty directory")
  (tmp_path / "config.json").write_text("{}")
  assert "holds no weights" in error(tmp_path)
  save_file(TENSORS, tmp_path / "model-00001-of-00002.safetensors")
  assert "no model.safetensors.index.json" in error(tmp_path)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "sam3-litetext.safetensors"])
def test_a_lone_file_of_another_name(tmp_path, name):
  save_file(TENSORS, tmp_path / name)
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "optimizer.pt").write_bytes(b"not looked at")
  assert_same(read_all(tmp_path), TENSORS)
  save_file(TENSORS, tmp_path / "zzz.safetensors")
  assert f"several safetensors files, name the one to load: {name}, zzz.safetensors" in error(tmp_path)
  save_file(TENSORS, tmp_path / "model.safetensors")  # the one that is the model's by its name
  assert_same(read_all(tmp_path), TENSORS)


def test_links_that_lead_nowhere(tmp_path):
  (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "ab12")
  assert "is a link to" in error(tmp_path) and "ab12, which is not there" in error(tmp_path)
  (tmp_path / "model.safetensors").unlink()
  write_shards(tmp_path, {}, {"f32": "a.safetensors"})
  (tmp_path / "a.safetensors").symlink_to("a.safetensors")
  assert "a.safetensors is a link to a.safetensors, which is not there" in error(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_what_is_no_file_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "model.safetensors")
  assert error(tmp_path).endswith("is no regular file")


def test_several_torch_files(tmp_path):
  for name in ("a.pt", "b.pth"):
    (tmp_path / name).write_bytes(b"x")
  assert "a.pt, b.pth" in error(tmp_path)


# --- torch


@pytest.fixture
def torch():
  return pytest.importorskip("torch")


def as_torch(torch, tensors):
  out = {}
  for key, value in tensors.items():
    bf16 = value.dtype == ml_dtypes.bfloat16
    tensor = torch.from_numpy(np.array(value, np.float32 if bf16 else value.dtype))
    out[key] = tensor.bfloat16() if bf16 else tensor
  return out


@pytest.mark.torch
@pytest.mark.parametrize("wrap", [None, "model", "state_dict"])
@pytest.mark.parametrize("modern", [True, False])
def test_torch_file(tmp_path, torch, wrap, modern):
  expected = TENSORS | {"freqs_cis": (np.arange(6) * (1 + 2j)).astype(np.complex64).reshape(3, 2)}
  state = as_torch(torch, expected)
  file = tmp_path / "model.pt"
  torch.save(
    state if wrap is None else {wrap: state, "epoch": 3, "note": "text"},
    file,
    _use_new_zipfile_serialization=modern,  # before torch 1.6, a bare pickle that cannot be mapped
  )
  assert_same(read_all(file), expected)
  assert_same(read_all(tmp_path), expected)  # the only one in its directory


@pytest.mark.torch
@pytest.mark.parametrize(
  "path", [("state_dict", "model"), ("model", "state_dict", "module"), ("model_state_dict",), ("module",)]
)
def test_tensors_within_dictionaries(tmp_path, torch, path):
  content = as_torch(torch, TENSORS)
  for name in reversed(path):
    content = {name: content, "epoch": 3, "best": torch.zeros(1), "optimizer": {"state": {0: torch.ones(2)}}}
  torch.save(content, tmp_path / "m.pt")
  assert_same(read_all(tmp_path / "m.pt"), TENSORS)


@pytest.mark.torch
def test_a_dictionary_that_holds_itself(tmp_path, torch):
  content = {"epoch": 3}
  content["model"] = content
  torch.save(content, tmp_path / "m.pt")
  assert "holds no tensors" in error(tmp_path / "m.pt")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
  ("make", "told"),
  [
    (lambda t: t.zeros(3).to_sparse(), "tensor x is sparse, nested or without values"),
    (lambda t: t.eye(3).to_sparse_csr(), "tensor x is sparse, nested or without values"),
    (lambda t: t.zeros(3, device="meta"), "tensor x is sparse, nested or without values"),
    (lambda t: t.zeros(3).to(t.float8_e4m3fn), "tensor x has dtype float8_e4m3fn"),
    (lambda t: t.zeros(3).to(t.complex128), "tensor x has dtype complex128"),
    (lambda t: t.quantize_per_tensor(t.zeros(3), 0.1, 0, t.quint8), "m.pt"),
  ],
)
def test_tensors_that_cannot_be_read_are_named(tmp_path, torch, make, told):
  torch.save({"x": make(torch)}, tmp_path / "m.pt")
  assert told in error(tmp_path / "m.pt")


@pytest.mark.torch
def test_views_and_parameters(tmp_path, torch):
  base = torch.arange(12.0).reshape(3, 4)
  conjugate = torch.complex(base, base).conj()
  content = {"t": base.T, "part": base[1:, 2], "p": torch.nn.Parameter(base), "c": conjugate}
  torch.save(content, tmp_path / "m.pt")
  found = read_all(tmp_path / "m.pt")
  np.testing.assert_array_equal(found["c"], base.numpy() * (1 - 1j))
  np.testing.assert_array_equal(found["t"], base.numpy().T)
  np.testing.assert_array_equal(found["part"], [6, 10])
  np.testing.assert_array_equal(found["p"], base.numpy())


@pytest.mark.torch
@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("keep", [0.99, 0.5, 0.01])
def test_truncated_torch_file(tmp_path, torch, modern, keep):
  file = tmp_path / "model.pt"
  torch.save({"x": torch.zeros(5000)}, file, _use_new_zipfile_serialization=modern)
  data = file.read_bytes()
  file.write_bytes(data[: int(len(data) * keep)])
  assert "truncated or corrupted" in error(file)


@pytest.mark.torch
def test_not_a_torch_file(tmp_path, torch):
  (tmp_path / "m.pt").write_bytes(b"hello, this is no checkpoint")
  assert "no torch file" in error(tmp_path / "m.pt")


@pytest.mark.torch
def test_python_objects_are_refused(tmp_path, torch):
  torch.save({"model": {"x": torch.zeros(2)}, "args": types.SimpleNamespace(lr=1)}, tmp_path / "m.pt")
  text = error(tmp_path / "m.pt")
  assert "refused" in text and "SimpleNamespace" in text


class _Exploit:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (self.path, "w"))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("plain_pickle", [False, True])
def test_code_in_a_pickle_never_runs(tmp_path, torch, plain_pickle):
  file, mark = tmp_path / "m.pt", tmp_path / "ran"
  if plain_pickle:
    file.write_bytes(pickle.dumps(_Exploit(str(mark))))
  else:
    torch.save({"model": _Exploit(str(mark))}, file)
  error(file)
  assert not mark.exists()


@pytest.mark.torch
@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": {"a": "text"}}, {"model": {}}, None, "text"])
def test_no_tensors(tmp_path, torch, content):
  torch.save(content, tmp_path / "m.pt")
  assert "holds no tensors" in error(tmp_path / "m.pt")


def test_without_torch(tmp_path, monkeypatch):
  import sys

  monkeypatch.setitem(sys.modules, "torch", None)
  (tmp_path / "m.pt").write_bytes(b"x")
  with (
    pytest.raises(
      ImportError, match=r"needs PyTorch.*for the CPU is enough.*pip install 'sam3lt_jax\[convert\]"
    ),
    readers.open_tensors(tmp_path / "m.pt"),
  ):
    pass


def test_what_was_released_takes_no_memory_and_can_be_read_again(tmp_path):
  values = {"a": np.arange(4 << 20, dtype=np.float32), "b": np.arange(3, dtype=np.float32)}
  save_file(values, tmp_path / "model.safetensors")

  def resident():  # pages of files in this process, in bytes
    with open("/proc/self/status") as f:
      return next(int(line.split()[1]) << 10 for line in f if line.startswith("RssFile"))

  if not os.path.exists("/proc/self/status"):
    pytest.skip("needs Linux")
  with readers.open_tensors(tmp_path) as tensors:
    before = resident()
    assert tensors["a"].read().sum() > 0
    assert resident() - before > 12 << 20
    tensors["a"].release()
    assert resident() - before < 4 << 20
    np.testing.assert_array_equal(tensors["a"].read(), values["a"])


def test_tensors_may_lie_at_any_byte(tmp_path):
  """The format does not promise alignment."""
  byte, four = np.array([7], np.uint8), np.array([1.5, -2.0], np.float32)
  header = {
    "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    "four": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
  }
  head = json.dumps(header).encode()
  data = len(head).to_bytes(8, "little") + head + byte.tobytes() + four.tobytes()
  (tmp_path / "odd.safetensors").write_bytes(data)
  assert_same(read_all(tmp_path / "odd.safetensors"), {"byte": byte, "four": four})
