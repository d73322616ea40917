"""A user's mistake that names the argument."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


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


@contextlib.contextmanager
def renamed(theirs: str, ours: str) -> Iterator[None]:
  """What a function inside calls `theirs` is called `ours` by who called this one."""
  try:
    yield
  except ArgumentError as e:
    if e.argument == theirs:
      e.argument = ours
    raise
