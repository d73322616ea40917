"""Phrases about scenes: "circle", "red shape", "small striped red square".

A phrase is up to three attributes and a noun, always in the order size, pattern, colour, noun. The noun is a
kind, or "shape" for any kind. It matches an object that has every attribute named. An object of medium size
matches no size word.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from sam3lt_jax.shapes.scenes import COLOURS, KINDS, PATTERNS, SceneObject

ANY_KIND = "shape"
SIZE_WORDS = ("small", "large")


@dataclasses.dataclass(frozen=True)
class Phrase:
  """What is asked for; None leaves an attribute open."""

  kind: str | None = None
  colour: str | None = None
  pattern: str | None = None
  size: str | None = None

  def __str__(self) -> str:
    return " ".join(w for w in (self.size, self.pattern, self.colour, self.kind or ANY_KIND) if w)

  def matches(self, thing: SceneObject) -> bool:
    return all(
      wanted is None or wanted == getattr(thing, name) for name, wanted in dataclasses.asdict(self).items()
    )


def all_phrases() -> list[str]:
  """Every phrase there is (945), in a fixed order."""
  return [
    str(Phrase(kind, colour, pattern, size))
    for kind, colour, pattern, size in itertools.product(
      (None, *KINDS), (None, *COLOURS), (None, *PATTERNS), (None, *SIZE_WORDS)
    )
  ]


def phrase_about(thing: SceneObject, rng: np.random.Generator) -> Phrase:
  """A phrase that matches `thing`: its kind in 85% of cases, each other attribute in a third."""
  size = thing.size if thing.size in SIZE_WORDS else None
  kind = thing.kind if rng.random() < 0.85 else None
  colour, pattern, size = (
    value if rng.random() < share else None
    for value, share in ((thing.colour, 0.45), (thing.pattern, 0.3), (size, 0.3))
  )
  return Phrase(kind, colour, pattern, size)


def absent_phrase(objects: Sequence[SceneObject], rng: np.random.Generator) -> Phrase:
  """A phrase that matches none of `objects`.

  Two thirds are near misses: a phrase about an object with one attribute changed. The rest are drawn freely.
  """
  for _ in range(20):
    if objects and rng.random() < 0.67:
      phrase = phrase_about(objects[rng.integers(len(objects))], rng)
      named = [name for name, value in dataclasses.asdict(phrase).items() if value is not None]
      name = str(rng.choice(named)) if named else "kind"
    else:
      phrase = Phrase(
        _pick(KINDS, 0.9, rng),
        _pick(COLOURS, 0.5, rng),
        _pick(PATTERNS, 0.3, rng),
        _pick(SIZE_WORDS, 0.3, rng),
      )
      name = None
    if name is not None:
      phrase = dataclasses.replace(phrase, **{name: str(rng.choice(_VALUES[name]))})
    if not any(phrase.matches(thing) for thing in objects):
      return phrase
  kinds = sorted(set(KINDS) - {thing.kind for thing in objects})
  if kinds:
    return Phrase(str(rng.choice(kinds)))
  free = [Phrase(k, c) for k in KINDS for c in COLOURS]
  return next(p for p in free if not any(p.matches(thing) for thing in objects))


_VALUES = {"kind": KINDS, "colour": tuple(COLOURS), "pattern": PATTERNS, "size": SIZE_WORDS}


def _pick(values, share: float, rng: np.random.Generator) -> str | None:
  return str(rng.choice(list(values))) if rng.random() < share else None
