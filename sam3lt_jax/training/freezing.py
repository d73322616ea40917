"""Which parameters are trained: split a tree by patterns of names, and merge it again."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sam3lt_jax.checkpoints.engine import flatten, unflatten
from sam3lt_jax.errors import ArgumentError

Tree = dict[str, Any]


def split(
  params: Mapping[str, Any], freeze: Sequence[str] | None = None, train: Sequence[str] | None = None
) -> tuple[Tree, Tree]:
  """Splits parameters in those that are trained and those that are not.

  Args:
    params: nested dicts of arrays (or of anything).
    freeze: regular expressions; a parameter is frozen if one is found in its path (`re.search`), such as
      "^vision_encoder/" or "layers_[01]/" in "text_encoder/layers_0/mlp/fc1/kernel". All others are trained.
    train: the same, for what is trained; all others are frozen. Give one of the two; neither: all is trained.

  Returns:
    (trainable, frozen), nested dicts without empty branches; `merge` undoes it.

  Raises:
    ValueError: both given, a pattern that matches nothing (near names are shown) or is no regular expression,
      or nothing left to train.
  """
  if freeze is not None and train is not None:
    raise ValueError("split: give freeze or train, not both")
  flat = flatten(params)
  name = "freeze" if train is None else "train"
  patterns = (freeze or ()) if train is None else train
  if isinstance(patterns, str):
    raise ArgumentError(name, f"={patterns!r}; accepted: a list of regular expressions")
  found: set[str] = set()
  for pattern in patterns:
    found |= matches(name, pattern, flat)
  chosen = {path for path in flat if (path in found) == (train is not None)}
  if not chosen:
    raise ArgumentError(name, f"={list(patterns)!r}: nothing is left to train")
  return (
    unflatten({path: x for path, x in flat.items() if path in chosen}),
    unflatten({path: x for path, x in flat.items() if path not in chosen}),
  )


def matches(name: str, pattern: str, flat: Mapping[str, Any]) -> set[str]:
  """The paths of `flat` that a pattern of the argument `name` finds; ArgumentError where it finds none."""
  try:
    expression = re.compile(pattern)
  except re.error as e:
    raise ArgumentError(name, f": {pattern!r} is no regular expression ({e})") from e
  found = {path for path in flat if expression.search(path)}
  if not found:
    parts = [path.split("/") for path in flat]
    names = dict.fromkeys("/".join(p[:end]) for p in parts for end in range(1, len(p) + 1))
    near = difflib.get_close_matches(pattern.strip("^/$.*"), names, n=4, cutoff=0.4)
    raise ArgumentError(
      name, f": {pattern!r} matches no parameter; near names: {', '.join(near or list(names)[:4])}"
    )
  return found


def merge(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> Tree:
  """One tree of both, as before `split`. Arrays are not copied; works under `jax.jit`.

  Raises:
    ValueError: a parameter that is in both.
  """
  a, b = flatten(trainable), flatten(frozen)
  if both := a.keys() & b.keys():
    raise ValueError(f"merge: {min(both)} is in both trees")
  return unflatten(a | b)
