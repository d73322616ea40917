"""Files of tensors, opened without reading them: safetensors (one file or shards) and torch's `.pt`.

safetensors files are memory-mapped and need no torch. A `.pt` is a pickle: it is read by torch's weights-only
loader, memory-mapped, and never by an unrestricted unpickler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from sam3lt_jax.checkpoints.errors import CheckpointError, reason
from sam3lt_jax.config import read_json

SAFETENSORS_NAME = "model.safetensors"
SAFETENSORS_INDEX_NAME = "model.safetensors.index.json"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
_SHARD = re.compile(r"-\d+-of-\d+\.")
_LFS = b"version https://git-lfs"
_STATE = ("model", "state_dict", "model_state_dict", "module")  # where trainers put the model's tensors
_DEPTH = 4  # of these in each other


@dataclasses.dataclass(frozen=True)
class LazyTensor:
  """A tensor in a file.

  `read()` brings it into memory (or maps it); treat what it returns as read-only. `release()` when it was
  copied: the pages of a mapping otherwise count as this process's memory until the file is closed.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]
  release: Callable[[], None] = lambda: None

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator[Mapping[str, LazyTensor]]:
  """The tensors of a file, or of a directory in transformers' layout; valid inside the `with`.

  Raises:
    CheckpointError: no weights there, a missing shard, a truncated or corrupted file, an unsafe pickle.
    ImportError: a `.pt` without torch installed.
  """
  path = os.fspath(path)
  if os.path.isdir(path):
    path = weights_file(path)
  with contextlib.ExitStack() as stack:
    if os.path.basename(path) == SAFETENSORS_INDEX_NAME:
      yield _open_shards(os.path.dirname(path), path, stack)
    elif path.endswith(TORCH_SUFFIXES):
      yield _open_torch(path)
    else:
      yield _open_safetensors(path, stack)


def weights_file(directory: str) -> str:
  """What a directory's weights are read from: `model.safetensors`, an index of shards, or a lone file.

  A lone file may have any name: the only `.safetensors`, or, where there is none, the only torch file.

  Raises:
    CheckpointError: none, or several of which none is the model; a link that leads nowhere.
  """
  names = sorted(os.listdir(directory))
  tensors = [name for name in names if name.endswith(".safetensors")]
  shards = [name for name in tensors if _SHARD.search(name)]
  torch = [name for name in names if name.endswith(TORCH_SUFFIXES)]
  for name in (SAFETENSORS_NAME, SAFETENSORS_INDEX_NAME):
    if name in names:
      break
  else:
    if len(tensors or torch) == 1 and not shards:
      (name,) = tensors or torch
    elif not names:
      raise CheckpointError(f"{directory} is an empty directory")
    elif shards:
      raise CheckpointError(
        f"{directory} holds shards of safetensors but no {SAFETENSORS_INDEX_NAME}, which says what lies where"
      )
    elif tensors or torch:
      kind = "safetensors" if tensors else "torch"
      raise CheckpointError(
        f"{directory} holds several {kind} files, name the one to load: {', '.join(tensors or torch)}"
      )
    else:
      shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
      expected = f"{SAFETENSORS_NAME} or {SAFETENSORS_INDEX_NAME}"
      raise CheckpointError(f"{directory} holds no weights: expected {expected}, found {shown}")
  file = os.path.join(directory, name)
  check_file(file)
  return file


def check_file(path: str) -> None:
  """Raises CheckpointError, which says what is there instead, unless `path` is a regular file."""
  if os.path.isfile(path):
    return
  if os.path.islink(path) and not os.path.exists(path):
    raise CheckpointError(f"{path} is a link to {os.readlink(path)}, which is not there")
  raise CheckpointError(f"{path} is no regular file")


def _open_shards(path: str, index: str, stack: contextlib.ExitStack) -> dict[str, LazyTensor]:
  try:
    weight_map = dict(read_json(index)["weight_map"])
    shards = sorted({os.fspath(name) for name in weight_map.values()})
  except (ValueError, KeyError, TypeError) as e:
    raise CheckpointError(f"{index} is not an index of safetensors shards ({reason(e)})") from e
  if strange := [s for s in shards if s != os.path.basename(s)]:
    raise CheckpointError(f"{index} names shards outside its directory: {', '.join(strange)}")
  for shard in shards:
    if os.path.lexists(os.path.join(path, shard)):
      check_file(os.path.join(path, shard))
  if absent := [s for s in shards if not os.path.isfile(os.path.join(path, s))]:
    raise CheckpointError(
      f"{path}: {len(absent)} of {len(shards)} shards are missing: {', '.join(absent)}; download them again"
    )
  tensors: dict[str, LazyTensor] = {}
  for shard in shards:
    opened = _open_safetensors(os.path.join(path, shard), stack)
    expected = {key for key, name in weight_map.items() if name == shard}
    if lost := sorted(expected - opened.keys()):
      raise CheckpointError(f"{os.path.join(path, shard)} lacks what the index puts there: {', '.join(lost)}")
    if twice := sorted(tensors.keys() & opened.keys()):
      raise CheckpointError(f"{path}: tensors that lie in more than one shard: {', '.join(twice)}")
    tensors |= opened
  return tensors


def _dtypes() -> dict[str, np.dtype]:
  import ml_dtypes

  return {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
    "C64": np.dtype(np.complex64),
  }  # fmt: skip


def _open_safetensors(path: str, stack: contextlib.ExitStack) -> dict[str, LazyTensor]:
  import safetensors

  _check_pointer(path)
  try:
    stack.enter_context(safetensors.safe_open(path, framework="numpy"))
  except safetensors.SafetensorError as e:
    size = os.path.getsize(path)
    raise CheckpointError(
      f"{path} is truncated or corrupted ({e}; {size} bytes on disk); download or copy it again"
    ) from e
  # The library has found the header sound; of its own readers all copy.
  with open(path, "rb") as f:
    data = 8 + int.from_bytes(f.read(8), "little")
    header = json.loads(f.read(data - 8))
  header.pop("__metadata__", None)
  dtypes, mapping, tensors = _dtypes(), np.memmap(path, np.uint8, "r"), {}
  for key, entry in header.items():
    if entry["dtype"] not in dtypes:
      raise CheckpointError(f"{path}: tensor {key} has dtype {entry['dtype']}, which cannot be read")
    shape, dtype = tuple(entry["shape"]), dtypes[entry["dtype"]]
    start, stop = (data + at for at in entry["data_offsets"])
    read = functools.partial(_view, mapping, start, stop, shape, dtype)
    tensors[key] = LazyTensor(shape, dtype, read, functools.partial(_drop_pages, mapping))
  return tensors


def _view(mapping: np.ndarray, start: int, stop: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  part = mapping[start:stop].view(np.ndarray)
  if start % dtype.itemsize:  # the format allows it, numpy does not
    part = part.copy()
  return part.view(dtype).reshape(shape)


def _drop_pages(mapping: np.memmap) -> None:
  if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
    mapping._mmap.madvise(mmap.MADV_DONTNEED)


def _check_pointer(path: str) -> None:
  with open(path, "rb") as f:
    head = f.read(len(_LFS))
  if head == _LFS:
    raise CheckpointError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` beside it")
  if not head:
    raise CheckpointError(f"{path} is an empty file")


def _open_torch(path: str) -> dict[str, LazyTensor]:
  try:
    import torch
  except ImportError as e:
    raise ImportError(
      f"reading {path} needs PyTorch, which is not installed: a build for the CPU is enough (0.8 GB);"
      " pip install 'sam3lt_jax[convert]' brings it too, on Linux with gigabytes of CUDA libraries"
    ) from e
  _check_pointer(path)
  state = _tensors(_load_pickle(torch, path), torch, _DEPTH)
  if not state:
    raise CheckpointError(
      f"{path} holds no tensors: a dictionary of tensors was expected, at the top or under 'model' or "
      "'state_dict'"
    )
  return {
    key: LazyTensor(tuple(t.shape), _torch_dtype(torch, t, key, path), functools.partial(_to_numpy, torch, t))
    for key, t in state.items()
  }


def _load_pickle(torch: Any, path: str) -> Any:
  import pickle

  # Files of the format before torch 1.6 cannot be mapped; they are told by not being zip archives.
  with open(path, "rb") as f:
    mapped = f.read(4) == b"PK\x03\x04"
  try:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
  except pickle.UnpicklingError as e:
    if (refused := re.search(r"GLOBAL ([\w.]*\w\.\w+)", str(e))) is not None:
      raise CheckpointError(
        f"{path} holds Python objects beside its tensors ({refused[1]}), and loading those would run code of "
        "the file; it is refused. Ask for a file with tensors only, or save its state dict alone"
      ) from e
    raise CheckpointError(f"{path} is truncated or corrupted, or no torch file ({reason(e)})") from e
  except (PermissionError, MemoryError):
    raise
  except Exception as e:  # torch raises a dozen kinds
    raise CheckpointError(f"{path} is truncated or corrupted, or no torch file ({reason(e)})") from e


def _tensors(loaded: Any, torch: Any, depth: int) -> dict[str, Any]:
  """Those of a file's top level, or of what lies under `model`, `state_dict` and the like."""
  if not isinstance(loaded, Mapping) or depth == 0:
    return {}
  for name in _STATE:
    if inner := _tensors(loaded.get(name), torch, depth - 1):
      return inner
  return {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor)}


def _torch_dtype(torch: Any, tensor: Any, key: str, path: str) -> np.dtype:
  name = str(tensor.dtype).removeprefix("torch.")
  if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
    raise CheckpointError(f"{path}: tensor {key} is sparse, nested or without values, which cannot be read")
  known = {dtype.name: dtype for dtype in _dtypes().values()}
  if name not in known:
    raise CheckpointError(f"{path}: tensor {key} has dtype {name}, which cannot be read")
  return known[name]


def _to_numpy(torch: Any, tensor: Any) -> np.ndarray:
  tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
  if tensor.dtype == torch.bfloat16:  # numpy knows it through ml_dtypes only
    return tensor.view(torch.int16).numpy().view(_dtypes()["BF16"])
  return tensor.numpy()
