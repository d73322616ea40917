"""What a user is told: a mistake by the argument's name, a package that is missing, names from outside."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from typing import Any


class ArgumentError(ValueError):
  """A value that an argument does not accept: its message is `argument` and, right behind it, `said`.

  Attributes:
    argument: the name of the argument or field, "peak_lr".
    said: " must be ..., got 3", "=3; accepted: ..." or ": why".
  """

  def __init__(self, argument: str, said: str):
    super().__init__(argument, said)
    self.argument, self.said = argument, said

  def __str__(self) -> str:
    return f"{self.argument}{self.said}"


def check(good: bool, name: str, value: Any, accepted: str) -> None:
  """Raises ArgumentError "name=value; accepted: ..." unless `good`; NaN compares false, so it is refused."""
  if not good:
    raise ArgumentError(name, f"={value!r}; accepted: {accepted}")


@contextlib.contextmanager
def renamed(theirs: str, ours: str) -> Iterator[None]:
  """What a function inside calls `theirs` is called `ours` by who called this one."""
  try:
    yield
  except ArgumentError as e:
    if e.argument == theirs:
      e.argument = ours
    raise


@contextlib.contextmanager
def needed(by: str, package: str, extra: str) -> Iterator[None]:
  """Around an import: without the package, ImportError says who needs it ("plots need") and how to get it."""
  try:
    yield
  except ImportError as e:
    raise ImportError(f"{by} the package {package}: pip install 'sam3lt_jax[{extra}]' ({e})") from e


def warn(message: str, category: type[Warning] = UserWarning) -> None:
  """Warns at the user's own line: the innermost that is none of this package's."""
  frame, level = sys._getframe(1), 2
  while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
    frame, level = frame.f_back, level + 1
  warnings.warn(message, category, stacklevel=level)


def shown(name: object) -> str:
  """A name (of a file, a phrase) for a message, terminal or log: one line, whatever is in it.

  What would not be printed as a character stands as its escape: line ends, ESC, marks that turn the writing
  round, and the bytes of a file's name that are no UTF-8. Python's own `repr` does the same, in quotes.
  """
  text = str(name)
  if text.isprintable():
    return text
  return "".join(
    c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
    for c in text
  )
