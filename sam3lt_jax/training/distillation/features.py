"""A teacher's features of many phrases, computed once, kept on disk and read memory-mapped.

A directory of features holds `manifest.json` and shards `features-00000.npy`, ..., float16 [rows, T, D]: row
i of all shards together is phrase i. The manifest says whose features they are and lists the shards that are
written so far; an export that was cut off goes on with the first one it lacks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sam3lt_jax import storage
from sam3lt_jax.checkpoints.engine import flatten
from sam3lt_jax.errors import check
from sam3lt_jax.training.distillation.teacher import Teacher
from sam3lt_jax.training.prompts import token_rows

MANIFEST = "manifest.json"
_VERSION = 1
_KEPT = "the shards before it are kept: make room and run the export again, which goes on with this one"


class FeatureError(ValueError):
  """Exported features that are damaged, or belong to another teacher or other phrases."""


def phrases_digest(phrases: Sequence[str]) -> str:
  """sha256 of the phrases and their order."""
  digest = hashlib.sha256()
  for phrase in phrases:
    digest.update(json.dumps(phrase).encode() + b"\n")
  return digest.hexdigest()


def shard_name(index: int) -> str:
  return f"features-{index:05d}.npy"


class TeacherFeatures:
  """Features of phrases by their number. `features[ids]`: int [B] -> float16 [B, T, D], a copy.

  A shard's checksum is compared when it is first read.

  Attributes:
    directory: where they lie.
    manifest: what `export_features` wrote: teacher, phrases, shapes, shards.
  """

  def __init__(self, directory: str | os.PathLike):
    """Opens finished features.

    Raises:
      FeatureError: no features there, an unfinished export, a missing or damaged shard (named).
    """
    self.directory = os.fspath(directory)
    self.manifest = _read_manifest(self.directory)
    self._shards: dict[int, np.ndarray] = {}
    if len(self.manifest["shards"]) * self.manifest["rows_per_shard"] < len(self):
      raise FeatureError(f"{self.directory} holds an unfinished export; run the export again")
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
      if not _intact(self.directory, entry):
        raise FeatureError(
          f"{path} is damaged (its checksum differs); run the export again, which makes this shard anew"
        )
      self._shards[index] = np.load(path, mmap_mode="r", allow_pickle=False)
    return self._shards[index]


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
  check(batch_size >= 1, "batch_size", batch_size, "1 or more phrases")
  check(rows_per_shard >= 1, "rows_per_shard", rows_per_shard, "1 or more phrases")
  ids, mask = token_rows(list(phrases[:256]), tokenizer, teacher.context_length)
  plan = {
    "version": _VERSION,
    "teacher": teacher.identity(),
    "context_length": teacher.context_length,
    "width": teacher.width,
    "phrases": len(phrases),
    "phrases_sha256": phrases_digest(phrases),
    # Another vocabulary or cleaning shows in the first tokens.
    "token_ids_sha256": hashlib.sha256(np.where(mask, ids, -1).astype("<i4").tobytes()).hexdigest(),
    "rows_per_shard": rows_per_shard,
  }
  target, shards = check_target(directory), []
  if os.path.isfile(os.path.join(target, MANIFEST)):
    there = _read_manifest(target)
    _compare(target, there, json.loads(json.dumps(plan)))
    shards = there["shards"]
  else:
    os.makedirs(target, exist_ok=True)
    _write_manifest(target, plan | {"shards": shards})
  run = encoder(teacher, tokenizer, batch_size)
  count = -(-len(phrases) // rows_per_shard)
  for index in range(count):
    if index < len(shards) and _intact(target, shards[index]):
      continue
    start = index * rows_per_shard
    entry = _write_shard(target, index, run(phrases[start : start + rows_per_shard]), start)
    shards[index : index + 1] = [entry]
    _write_manifest(target, plan | {"shards": shards})
    if report is not None:
      report(f"teacher features: shard {index + 1} of {count} written")
  return TeacherFeatures(target)


def check_target(directory: str | os.PathLike) -> str:
  """The directory's path. FeatureError where `export_features` could not put its files, whatever they are."""
  target = os.path.abspath(os.path.expanduser(os.fspath(directory)))
  if os.path.lexists(target) and not os.path.isdir(target):
    raise FeatureError(f"directory: {target} is no directory")
  if os.path.isdir(target) and not os.path.isfile(os.path.join(target, MANIFEST)):
    if not all(name.startswith(".") for name in os.listdir(target)):  # a kill may leave half of a manifest
      raise FeatureError(f"directory: {target} is not empty and holds no teacher features")
  return target


def _intact(directory: str, entry: dict[str, Any]) -> bool:
  path = os.path.join(directory, entry["file"])
  return os.path.isfile(path) and os.path.getsize(path) == entry["bytes"] and _digest(path) == entry["sha256"]


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


def _write_shard(directory: str, index: int, features: np.ndarray, start: int) -> dict[str, Any]:
  with np.errstate(over="ignore"):
    half = features.astype(np.float16)
  if not np.isfinite(half).all():
    row = int(np.argmin(np.isfinite(half).all(axis=(1, 2))))
    raise FeatureError(f"the teacher's features of phrase {start + row} are not finite in float16")
  path = os.path.join(directory, shard_name(index))
  with storage.writing(path, _KEPT, FeatureError), storage.atomic(path, alone=True) as f:
    np.save(f, half, allow_pickle=False)
  return {
    "file": shard_name(index), "rows": len(half), "bytes": os.path.getsize(path), "sha256": _digest(path)
  }  # fmt: skip


def _compare(where: str, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  found_there = flatten(stored)
  for key, value in flatten(wanted).items():
    if (found := found_there.get(key)) != value:
      raise FeatureError(
        f"{where} belongs to another export: {key} is {found!r} there and {value!r} here; name another"
        " directory or delete it"
      )


def _write_manifest(directory: str, manifest: Mapping[str, Any]) -> None:
  path = os.path.join(directory, MANIFEST)
  with storage.writing(path, _KEPT, FeatureError):
    storage.write(path, json.dumps(manifest, indent=2, sort_keys=True) + "\n")


def _read_manifest(directory: str) -> dict[str, Any]:
  path = os.path.join(directory, MANIFEST)
  if not os.path.isfile(path):
    raise FeatureError(f"{directory} holds no teacher features (no {MANIFEST})")
  try:
    with open(path, encoding="utf-8") as f:
      manifest = dict(json.load(f))
  except (ValueError, TypeError) as e:
    raise FeatureError(f"{path} is damaged: it is no JSON object ({e})") from e
  if manifest.get("version") != _VERSION:
    raise FeatureError(f"{path} is of version {manifest.get('version')}, this code reads {_VERSION}")
  return manifest


def _digest(path: str) -> str:
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()
