"""Whether the files of a checkpoint are those that were written: sizes and checksums, kept beside them."""

from __future__ import annotations

import json
import os
import zlib
from typing import Any

from sam3lt_jax import storage
from sam3lt_jax.checkpoints.errors import CheckpointError

MANIFEST = "checkpoint.json"


class Damaged(CheckpointError):
  """A checkpoint of which a part is missing or is not what was written; the message names the part."""


def write_manifest(folder: str, about: dict[str, Any]) -> None:
  """Writes checkpoint.json: `about`, and size and CRC-32 of every file under `folder`. Waits for the disk."""
  manifest = about | {"files": {name: _fingerprint(os.path.join(folder, name)) for name in _files(folder)}}
  storage.write(os.path.join(folder, MANIFEST), json.dumps(manifest, indent=1, sort_keys=True))


def read_manifest(path: str) -> dict[str, Any]:
  """{"metrics": ..., "files": name -> [bytes, CRC-32]} of a checkpoint. Raises Damaged."""
  try:
    with open(os.path.join(path, MANIFEST)) as f:
      manifest = json.load(f)
    return {"metrics": dict(manifest["metrics"]), "files": dict(manifest["files"])}
  except FileNotFoundError:
    raise Damaged(f"{path} is damaged: its part {MANIFEST} is missing") from None
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise Damaged(f"{path} is damaged: its part {MANIFEST} cannot be read") from e


def verify(path: str) -> None:
  """Reads every file of a checkpoint. Raises Damaged for the first that differs from its entry."""
  for name, known in read_manifest(path)["files"].items():
    part = os.path.join(path, name)
    if not os.path.isfile(part):
      raise Damaged(f"{path} is damaged: its part {name} is missing")
    size, crc = _fingerprint(part)
    if size != known[0]:
      raise Damaged(f"{path} is damaged: its part {name} has {size} of {known[0]} bytes")
    if crc != known[1]:
      raise Damaged(f"{path} is damaged: its part {name} is not what was written")


def _files(folder: str) -> list[str]:
  """Every file under `folder`, relative to it, sorted."""
  found = [
    os.path.relpath(os.path.join(where, name), folder)
    for where, _, names in os.walk(folder)
    for name in names
  ]
  return sorted(name.replace(os.sep, "/") for name in found)


def _fingerprint(path: str) -> list[int]:
  """[bytes, CRC-32]."""
  size = crc = 0
  with open(path, "rb") as f:
    while block := f.read(1 << 22):
      size, crc = size + len(block), zlib.crc32(block, crc)
  return [size, crc]
