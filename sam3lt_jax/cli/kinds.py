"""Kinds of numbers, for argparse's `type`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any


def number(kind: Callable[[str], Any], good: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
  """For argparse's `type`: `kind(text)`, if it is `good`. wanted: "a number above 0"."""

  def parse(text: str) -> Any:
    try:
      value = kind(text)
    except ValueError:
      value = math.nan  # compares false
    if not good(value):
      raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return value

  return parse


count = number(int, lambda n: n >= 1, "a whole number of at least 1")
whole = number(int, lambda n: n >= 0, "a whole number of at least 0")
positive = number(float, lambda x: 0 < x < math.inf, "a number above 0")
not_negative = number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")
fraction = number(float, lambda x: 0 <= x <= 1, "a number within [0, 1]")
below_one = number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
up_to_one = number(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
