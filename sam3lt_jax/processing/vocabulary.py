"""What a model of few words can be asked, as data beside its checkpoint: `vocabulary.json`.

    {"about": "It knows shapes.", "instead": "For photos take s0.", "slots": [["red", "blue"], ["star"]]}

A phrase has at most one word of each slot, in their order, and exactly one of the last.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterable

from sam3lt_jax.config import BOX_ONLY_PHRASE
from sam3lt_jax.errors import ArgumentError

FILE = "vocabulary.json"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """slots: the words, see the module. about: what the model knows. instead: what to do otherwise."""

  slots: tuple[tuple[str, ...], ...]
  about: str
  instead: str

  @classmethod
  def beside(cls, directory: str) -> Vocabulary | None:
    """The one that lies in a checkpoint's directory, or None."""
    path = os.path.join(directory, FILE)
    if not os.path.isfile(path):
      return None
    with open(path, encoding="utf-8") as f:
      data = json.load(f)
    return cls(tuple(map(tuple, data["slots"])), data["about"], data["instead"])

  def check(self, phrases: Iterable[str]) -> None:
    """Raises ValueError (of the argument `text`) for a phrase that the model cannot know."""
    slot = {word: i for i, words in enumerate(self.slots) for word in words}
    for phrase in phrases:
      words = phrase.lower().split()
      if not words or phrase == BOX_ONLY_PHRASE:
        continue
      unknown = [word for word in words if word not in slot]
      if unknown:
        close = difflib.get_close_matches(unknown[0], slot, 1, 0.8)
        hint = f"; there is {close[0]!r}" if close else ""
        raise self._error("have words that this model knows", phrase, f"{unknown[0]!r} is not one{hint}")
      order = [slot[word] for word in words]
      if len(set(order)) < len(order):
        raise self._error("have at most one word of each group", phrase, "two are of the same")
      known = sorted(words, key=slot.__getitem__)
      if len(self.slots) - 1 not in order:
        raise self._error("say what it is", phrase, f"say {' '.join([*known, self.slots[-1][-1]])!r}")
      if words != known:
        raise self._error(
          "have its words in the order that this model knows", phrase, f"say {' '.join(known)!r}"
        )

  def _error(self, wanted: str, phrase: str, why: str) -> ArgumentError:
    groups = "; ".join(", ".join(words) for words in self.slots)
    rule = "A phrase has up to one word of each group, in this order, and one of the last"
    return ArgumentError(
      "text", f" must {wanted}, got {phrase!r}: {why}. {self.about} {rule}: {groups}. {self.instead}"
    )
