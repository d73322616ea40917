"""What several verbs check: kinds of numbers, for argparse's `type`, and the output folder."""

from __future__ import annotations

import argparse
import math
import os
import tempfile

from sam3lt_jax.cli import UserError


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


def check_writable(folder: str) -> None:
  """Makes the folder of --out; UserError if nothing can be written there."""
  try:
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as e:
    raise UserError(f"--out: cannot write to {folder} ({e.strerror})") from e


def _number(text: str) -> float:
  """NaN, which compares false, for what is no number."""
  try:
    return float(text)
  except ValueError:
    return math.nan
