"""A teacher's features of many phrases, computed once, kept on disk and read memory-mapped.

A directory of features holds `manifest.json` and shards `features-00000.npy`, ..., float16 [rows, T, D]: row
i of all shards together is phrase i. It is written beside its name (`NAME.exporting`), shard by shard, and
renamed when all is there; an export that was cut off goes on with the first shard it lacks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from sam3lt_jax import storage
from sam3lt_jax.training.distillation.teacher import Teacher
from sam3lt_jax.training.prompts import token_rows

MANIFEST = "manifest.json"
_PLAN = "plan.json"
_VERSION = 1


class FeatureError(ValueError):
  """Exported features that are damaged, or belong to another teacher or other phrases."""


def phrases_digest(phrases: Sequence[str]) -> str:
  """sha256 of the phrases and their order."""
  digest = hashlib.sha256()
  for phrase in phrases:
    digest.update(json.dumps(phrase).encode() + b"\n")
  return digest.hexdigest()


def token_digest(phrases: Sequence[str], tokenizer: Any, context_length: int) -> str:
  """sha256 of the first 256 phrases' tokens: another vocabulary or cleaning shows there."""
  ids, mask = token_rows(list(phrases[:256]), tokenizer, context_length)
  return hashlib.sha256(np.where(mask, ids, -1).astype("<i4").tobytes()).hexdigest()


def shard_name(index: int) -> str:
  return f"features-{index:05d}.npy"


class TeacherFeatures:
  """Features of phrases by their number. `features[ids]`: int [B] -> float16 [B, T, D], a copy.

  A shard's checksum is compared when it is first read.

  Attributes:
    directory: where they lie.
    manifest: what `export_features` wrote: teacher, phrases, shapes, shards.
  """

  def __init__(self, directory: str | os.PathLike, *, verify: bool = True):
    """Opens finished features. `verify` False: sizes are checked, checksums are not.

    Raises:
      FeatureError: no features there, an unfinished export, a missing or damaged shard (named).
    """
    self.directory = os.fspath(directory)
    self.manifest = _read_manifest(self.directory)
    self._verify = verify
    self._shards: dict[int, np.ndarray] = {}
    for entry in self.manifest["shards"]:
      path = os.path.join(self.directory, entry["file"])
      size = os.path.getsize(path) if os.path.isfile(path) else None
      if size != entry["bytes"]:
        what = "is missing" if size is None else f"has {size} bytes, {entry['bytes']} were written"
        raise FeatureError(f"{path} {what}; run the export again, which makes this shard anew")

  def __len__(self) -> int:
    return self.manifest["phrases"]

  @property
  def shape(self) -> tuple[int, int, int]:
    """(phrases, T, D)."""
    return (len(self), self.manifest["context_length"], self.manifest["width"])

  def __getitem__(self, ids: Any) -> np.ndarray:
    ids = np.asarray(ids, np.int64)
    if ids.ndim != 1:
      raise ValueError(f"ids must be int [B], got shape {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
      raise IndexError(f"ids must be within 0 to {len(self) - 1}, got {ids.min()} to {ids.max()}")
    out = np.empty((len(ids), *self.shape[1:]), np.float16)
    shard_of, row = np.divmod(ids, self.manifest["rows_per_shard"])
    for index in np.unique(shard_of):
      chosen = shard_of == index
      out[chosen] = self._shard(int(index))[row[chosen]]
    return out

  def _shard(self, index: int) -> np.ndarray:
    if index not in self._shards:
      entry = self.manifest["shards"][index]
      path = os.path.join(self.directory, entry["file"])
      if self._verify and file_digest(path) != entry["sha256"]:
        raise FeatureError(
          f"{path} is damaged (its checksum differs); run the export again, which makes this shard anew"
        )
      self._shards[index] = np.load(path, mmap_mode="r", allow_pickle=False)
    return self._shards[index]

  def check(
    self,
    teacher: Mapping[str, Any] | None = None,
    phrases: Sequence[str] | None = None,
    tokenizer: Any = None,
  ) -> None:
    """Compares with the teacher (its `identity()`), the phrases and the tokenizer that are about to be used.

    Raises:
      FeatureError: naming the first thing that differs.
    """
    if teacher is not None:
      _compare(self.directory, self.manifest["teacher"], json.loads(json.dumps(teacher)), "teacher")
    if phrases is not None:
      if len(phrases) != len(self):
        raise FeatureError(f"{self.directory} holds features of {len(self)} phrases, not {len(phrases)}")
      if phrases_digest(phrases) != self.manifest["phrases_sha256"]:
        raise FeatureError(
          f"{self.directory} holds features of other phrases, or of the same in another order; export again"
        )
      if tokenizer is not None:
        got = token_digest(phrases, tokenizer, self.manifest["context_length"])
        if got != self.manifest["token_ids_sha256"]:
          raise FeatureError(f"{self.directory} was exported with another tokenizer; export again")


class WithTeacherFeatures:
  """Batches with the features of their phrases: adds `teacher_features` float16 [B, T, D], found by `id`."""

  def __init__(self, batches: Any, features: TeacherFeatures):
    self._batches, self._features = batches, features

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    batch = dict(self._batches[step])
    return batch | {"teacher_features": self._features[batch["id"]]}

  def __len__(self) -> int:
    return len(self._batches)


def export_features(
  directory: str | os.PathLike,
  teacher: Teacher,
  phrases: Sequence[str],
  tokenizer: Any,
  *,
  batch_size: int = 256,
  rows_per_shard: int = 8192,
  report: Callable[[str], Any] | None = None,
) -> TeacherFeatures:
  """Computes the features of `phrases` into `directory`, or what an earlier call left undone of it.

  A finished directory of the same teacher and phrases is checked, and only shards that are missing or damaged
  are made anew. One process writes; in a job of several hosts let the first do it.

  Args:
    directory: the target on a local disk.
    teacher: its context length is T.
    phrases: phrase i becomes row i.
    tokenizer: called as a `ClipTokenizer`; the student must use the same one.
    batch_size: phrases a step.
    rows_per_shard: phrases a file; 8192 of 16 x 256 are 64 MiB.
    report: called with a sentence after each shard.

  Returns:
    The features, opened.

  Raises:
    ValueError: no phrases, or sizes below 1.
    FeatureError: the directory holds something else (named), a feature is beyond float16, or the disk is
      full: what was finished stays and is used by the next call.
  """
  if not len(phrases):
    raise ValueError("phrases must hold at least one phrase, got none")
  for name, value in (("batch_size", batch_size), ("rows_per_shard", rows_per_shard)):
    if value < 1:
      raise ValueError(f"{name} must be at least 1, got {value}")
  target = os.path.abspath(os.path.expanduser(os.fspath(directory)))
  plan = _plan(teacher, phrases, tokenizer, rows_per_shard)
  work, kept = _work_directory(target, plan)
  run = encoder(teacher, tokenizer, batch_size)
  shards = []
  count = -(-len(phrases) // rows_per_shard)
  for index in range(count):
    path = os.path.join(work, shard_name(index))
    start = index * rows_per_shard
    entry = kept(index)
    if entry is None:
      entry = _write_shard(path, run(phrases[start : start + rows_per_shard]), start)
      if report is not None:
        report(f"teacher features: shard {index + 1} of {count} written")
    shards.append(entry)
  _write_json(os.path.join(work, MANIFEST), plan | {"shards": shards})
  if work != target:
    os.rename(work, target)
    storage.sync_folder(os.path.dirname(target))
  for note in (_PLAN, *(f"{shard_name(index)}.json" for index in range(count))):
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(target, note))
  return TeacherFeatures(target)


def check_target(directory: str | os.PathLike) -> None:
  """FeatureError where `export_features` could not put its files, whatever the teacher and the phrases."""
  target = os.path.abspath(os.path.expanduser(os.fspath(directory)))
  if os.path.isfile(os.path.join(target, MANIFEST)):
    return
  if os.path.lexists(target) and not os.path.isdir(target):
    raise FeatureError(f"directory: {target} is no directory")
  if os.path.isdir(target) and os.listdir(target):
    raise FeatureError(f"directory: {target} is not empty and holds no teacher features")


def _plan(teacher: Teacher, phrases: Sequence[str], tokenizer: Any, rows_per_shard: int) -> dict[str, Any]:
  plan = {
    "version": _VERSION,
    "teacher_name": teacher.name,
    "teacher": teacher.identity(),
    "context_length": teacher.context_length,
    "width": teacher.width,
    "text_cleaning": tokenizer.profile.text_cleaning,
    "phrases": len(phrases),
    "phrases_sha256": phrases_digest(phrases),
    "token_ids_sha256": token_digest(phrases, tokenizer, teacher.context_length),
    "rows_per_shard": rows_per_shard,
  }
  return json.loads(json.dumps(plan))  # as it will be read back


def _work_directory(target: str, plan: dict[str, Any]) -> tuple[str, Callable[[int], dict | None]]:
  """Where shards are written, and which of them are there already: index -> its entry or None."""
  if os.path.isfile(os.path.join(target, MANIFEST)):
    manifest = _read_manifest(target)
    _compare(target, {k: v for k, v in manifest.items() if k != "shards"}, plan, "export")
    entries = dict(enumerate(manifest["shards"]))
    return target, lambda index: _intact(target, entries.get(index))
  check_target(target)
  if os.path.isdir(target):
    os.rmdir(target)  # empty; the finished export takes its name
  work = f"{target}.exporting"
  os.makedirs(work, exist_ok=True)
  begun = os.path.join(work, _PLAN)
  if os.path.isfile(begun):
    _compare(work, _read_json(begun), plan, "unfinished export")
  else:
    _write_json(begun, plan)

  def kept(index: int) -> dict | None:
    note = os.path.join(work, f"{shard_name(index)}.json")
    return _intact(work, _read_json(note)) if os.path.isfile(note) else None

  return work, kept


def _intact(directory: str, entry: dict | None) -> dict | None:
  if entry is None:
    return None
  path = os.path.join(directory, entry["file"])
  if not os.path.isfile(path) or os.path.getsize(path) != entry["bytes"]:
    return None
  return entry if file_digest(path) == entry["sha256"] else None


def encoder(teacher: Teacher, tokenizer: Any, batch_size: int) -> Callable[[Sequence[str]], np.ndarray]:
  """A function from phrases to their features float32 [P, T, D], computed `batch_size` at a time."""
  forward = jax.jit(teacher.features)
  variables = jax.device_put(teacher.variables, jax.local_devices()[0])  # they may wait on the host

  def run(phrases: Sequence[str]) -> np.ndarray:
    out = []
    for start in range(0, len(phrases), batch_size):
      batch = list(phrases[start : start + batch_size])
      short = batch_size - len(batch)  # one compiled shape
      ids, mask = token_rows([*batch, *[batch[0]] * short], tokenizer, teacher.context_length)
      out.append(np.asarray(forward(variables, ids, mask)[: len(batch)]).astype(np.float32))
    return np.concatenate(out)

  return run


def _write_shard(path: str, features: np.ndarray, start: int) -> dict[str, Any]:
  with np.errstate(over="ignore"):
    half = features.astype(np.float16)
  if not np.isfinite(half).all():
    row = int(np.argmin(np.isfinite(half).all(axis=(1, 2))))
    raise FeatureError(f"the teacher's features of phrase {start + row} are not finite in float16")
  with _whole(path) as f:
    np.save(f, half, allow_pickle=False)
  name = os.path.basename(path)
  entry = {
    "file": name, "rows": len(half), "bytes": os.path.getsize(path), "sha256": file_digest(path)
  }  # fmt: skip
  _write_json(f"{path}.json", entry)
  return entry


@contextlib.contextmanager
def _whole(path: str) -> Iterator[BinaryIO]:
  kept = "the shards before it are kept: make room and run the export again, which goes on with this one"
  with storage.writing(path, kept, FeatureError), storage.atomic(path, alone=True) as f:
    yield f


def _compare(where: str, stored: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
  found_there = flatten_dict(stored, sep=".")
  for key, value in flatten_dict(wanted, sep=".").items():
    found = found_there.get(key)
    if found != value and key != "teacher_name":
      raise FeatureError(
        f"{where} belongs to another {what}: {key} is {found!r} there and {value!r} here; name another"
        " directory or delete it"
      )


def _read_manifest(directory: str) -> dict[str, Any]:
  path = os.path.join(directory, MANIFEST)
  if not os.path.isfile(path):
    unfinished = os.path.isdir(f"{directory.rstrip(os.sep)}.exporting")
    hint = "; an unfinished export lies beside it: run the export again" if unfinished else ""
    raise FeatureError(f"{directory} holds no teacher features (no {MANIFEST}){hint}")
  manifest = _read_json(path)
  if manifest.get("version") != _VERSION:
    raise FeatureError(f"{path} is of version {manifest.get('version')}, this code reads {_VERSION}")
  return manifest


def _read_json(path: str) -> dict[str, Any]:
  try:
    with open(path, encoding="utf-8") as f:
      data = json.load(f)
  except ValueError as e:
    raise FeatureError(f"{path} is damaged: it is no JSON ({e})") from e
  if not isinstance(data, dict):
    raise FeatureError(f"{path} is damaged: an object was expected")
  return data


def _write_json(path: str, data: Mapping[str, Any]) -> None:
  with _whole(path) as f:
    f.write(json.dumps(data, indent=2, sort_keys=True).encode() + b"\n")


def file_digest(path: str) -> str:
  """sha256 of a file."""
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()
