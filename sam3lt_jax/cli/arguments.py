"""Kinds of numbers on the command line, for argparse's `type`; a mistake says what is accepted."""

from __future__ import annotations

import argparse
import math


def count(text: str) -> int:
  """A whole number of at least 1."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
  return int(text)


def positive(text: str) -> float:
  """A number above 0."""
  value = _number(text)
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
  return value


def fraction(text: str) -> float:
  """A number within 0 and 1."""
  value = _number(text)
  if not 0 <= value <= 1:
    raise argparse.ArgumentTypeError(f"must be a number within [0, 1], got {text!r}")
  return value


def _number(text: str) -> float:
  """NaN, which compares false, for what is no number."""
  try:
    return float(text)
  except ValueError:
    return math.nan
