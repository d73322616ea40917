"""A user's mistake that names the argument."""

from __future__ import annotations


class ArgumentError(ValueError):
  """A value that an argument does not accept: its message is `argument` and, right behind it, `said`.

  Whoever gave the value under another name (the command line, a function around) can say it with that one.

  Attributes:
    argument: the name of the argument or field, "peak_lr".
    said: " must be ..., got 3", "=3; accepted: ..." or ": why".
  """

  def __init__(self, argument: str, said: str):
    super().__init__(argument, said)
    self.argument, self.said = argument, said

  def __str__(self) -> str:
    return f"{self.argument}{self.said}"
