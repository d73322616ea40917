"""What a `source` string stands for: random weights, a file, a directory, or a repository on the hub."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import os
from collections.abc import Iterable
from typing import Literal

from sam3lt_jax.checkpoints import hub, orbax_io, readers
from sam3lt_jax.checkpoints.errors import CheckpointError
from sam3lt_jax.checkpoints.random_init import RANDOM_CONFIGS
from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.processing.vocabulary import Vocabulary

ALIASES = {
  "s0": "Simon7108528/sam3-litetext-s0",
  "s1": "Simon7108528/sam3-litetext-s1",
  "l": "Simon7108528/sam3-litetext-l",
}
BUNDLED = ("shapes",)  # directories in `assets`: nothing to download
_RANDOM = "random:"


class SourceError(ArgumentError, CheckpointError):
  """A source that names no checkpoint."""


@dataclasses.dataclass(frozen=True)
class Located:
  """`kind`: "random" (`path` is then the name of a configuration), "orbax" or "tensors" (a path)."""

  kind: Literal["random", "orbax", "tensors"]
  path: str


def locate(
  source: str | os.PathLike,
  *,
  revision: str | None = None,
  token: str | bool | None = None,
  cache_dir: str | os.PathLike | None = None,
  local_files_only: bool = False,
) -> Located:
  """Finds a checkpoint, downloading it where it lies on the hub. See `from_pretrained`.

  Raises:
    CheckpointError: an unknown name (with suggestions), a path that does not exist or holds no weights.
  """
  name = os.path.expanduser(os.fspath(source))
  if not name:
    raise SourceError("source", f" must name a checkpoint, got an empty string; accepted: {_ACCEPTED}")
  if name.startswith(_RANDOM):
    if name not in random_sources():
      raise SourceError("source", _unknown(name))
    return Located("random", name.removeprefix(_RANDOM))
  if name in BUNDLED:
    return _local(bundled(name))
  if os.path.lexists(name):
    return _local(name)
  if "://" in name:
    raise SourceError("source", f": {name!r} is an address; copy the checkpoint to a local directory first")
  repository = ALIASES.get(name.lower(), name)
  if hub.parse_source(repository) is None or _looks_local(name):
    raise SourceError("source", _unknown(name))
  return _local(
    os.fspath(
      hub.download(
        repository, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
      )
    )
  )


def bundled(name: str) -> str:
  """The directory of a model that comes with the package."""
  return os.fspath(importlib.resources.files("sam3lt_jax") / "assets" / name)


def check_phrases(source: str | os.PathLike, phrases: Iterable[str]) -> None:
  """Before a model is loaded: raises ValueError for a phrase that it cannot know, see `Vocabulary`.

  Of a model that is not on this machine yet nothing is known, and of most others there is nothing to know.
  """
  name = os.path.expanduser(os.fspath(source))
  vocabulary = Vocabulary.beside(bundled(name) if name in BUNDLED else name)
  if vocabulary is not None:
    vocabulary.check(phrases)


def random_sources() -> list[str]:
  return [_RANDOM + name for name in RANDOM_CONFIGS]


def _local(path: str) -> Located:
  if os.path.isdir(path):
    for folder in (path, os.path.join(path, "model")):  # the second: of a training run
      if orbax_io.is_saved(folder):
        return Located("orbax", folder)
    file = readers.weights_file(path)
    return Located("tensors", file if file.endswith(readers.TORCH_SUFFIXES) else path)
  readers.check_file(path)
  if not path.endswith((".safetensors", *readers.TORCH_SUFFIXES)):
    raise CheckpointError(
      f"{path} is no checkpoint: expected .safetensors, .pt, .pth or .bin, or a directory"
    )
  return Located("tensors", path)


def _looks_local(name: str) -> bool:
  """A path that does not exist, rather than `owner/name` on the hub."""
  return name.startswith((".", os.sep)) or os.path.isdir(name.split("/")[0])


_ACCEPTED = (
  "'s0', 's1', 'l', 'shapes' (bundled), a hub id 'owner/name', a directory, a .safetensors or .pt file, or "
  "'random:s0' for untrained weights"
)


def _unknown(name: str) -> str:
  if _looks_local(name) or os.sep in name or name.endswith((".safetensors", *readers.TORCH_SUFFIXES)):
    parent, base = os.path.split(name.rstrip(os.sep))
    here = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    known, what = {os.path.join(parent, n): n for n in here}, "no such file or directory"
    near = [k for k, n in known.items() if n in difflib.get_close_matches(base, here, n=3)]
  else:
    names = [*ALIASES, *BUNDLED, *random_sources(), *hub.KNOWN_REPOSITORIES]
    short = {n.rpartition("/")[2].lower(): n for n in reversed(names)}  # people leave the owner out
    close = difflib.get_close_matches(name.lower(), [*map(str.lower, names), *short], n=4, cutoff=0.5)
    near = list(dict.fromkeys(short.get(c) or next(n for n in names if n.lower() == c) for c in close))[:3]
    what = "unknown model"
  hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
  return f": {what} {name!r}; {hint}accepted: {_ACCEPTED}"
