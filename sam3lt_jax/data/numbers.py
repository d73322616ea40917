"""The numbers of annotation files: ids, counts, sizes, coordinates, flags. Every reader takes them from here.

Exporters write a number as they like: 12, 12.0, "12". All are read alike. What is no number, or one that no
image has, is a ValueError that says what was read. Limits come before anything is handed to pycocotools,
which counts in 32 bits and wraps around without a word.
"""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np

LARGEST_ID = 2**63 - 1  # what numpy, and so a batch, holds
MOST_PIXELS = 10**9  # of an image; for each pycocotools sets 4 bytes aside, unchecked
FARTHEST = 1e7  # pixels from the image's corner, of a coordinate
_EXACT = 2**53  # whole numbers up to here are exact as floats

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 60, 60, 60


def brief(value: Any) -> str:
  """What came, for a message: one short line of printable text, whatever it is."""
  try:
    text = _REPR.repr(value)
  except Exception:  # an int of ten thousand digits, say
    text = f"a value of type {type(value).__name__}"
  return text if len(text) <= 60 else f"{text[:57]}..."


def whole(value: Any, what: str) -> int:
  """A whole number: 12, 12.0 or "12".

  Raises:
    ValueError: "`what` must be a whole number, got ..."; it is none, or beyond `LARGEST_ID`.
  """
  number = value if type(value) is int else _whole(value)
  if number is None or abs(number) > LARGEST_ID:
    raise ValueError(f"{what} must be a whole number, got {brief(value)}")
  return number


def _whole(value: Any) -> int | None:
  if isinstance(value, str):
    try:
      return int(value)
    except ValueError:
      with contextlib.suppress(ValueError):
        value = float(value)
  if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
    return int(value)
  if isinstance(value, (float, np.floating)) and abs(value) <= _EXACT and value == int(value):
    return int(value)
  return None


def image_size(height: Any, width: Any, what: str) -> tuple[int, int]:
  """(height, width) in pixels.

  Raises:
    ValueError: "`what` must have a height and a width ..., got ...".
  """
  sides = tuple(side if type(side) is int else _whole(side) for side in (height, width))
  if None in sides or min(sides) < 1 or sides[0] * sides[1] > MOST_PIXELS:
    raise ValueError(
      f"{what} has no height and width in pixels (whole numbers, at most {MOST_PIXELS:,} pixels in all), "
      f"got {brief(height)} and {brief(width)}"
    )
  return sides


def flag(value: Any, what: str) -> bool:
  """Yes or no: true, 1, 1.0, "1", "true", and so on; nothing there (None) is no.

  Raises:
    ValueError: "`what` must be 0 or 1, got ...".
  """
  if value is None or isinstance(value, (bool, np.bool_)):
    return bool(value)
  if isinstance(value, str) and value.strip().lower() in ("true", "false"):
    return value.strip().lower() == "true"
  number = _whole(value)
  if number not in (0, 1):
    raise ValueError(f"{what} must be 0 or 1, got {brief(value)}")
  return bool(number)


def numbers(values: Any, what: str, limit: float = FARTHEST) -> np.ndarray:
  """A list of numbers, coordinates as a rule, as float64 [N].

  Raises:
    ValueError: "`what` must be a list of numbers, got ..."; or one is not finite or beyond `limit`.
  """
  found = _array(values, np.float64)
  if found is None:
    raise ValueError(f"{what} must be a list of numbers, got {brief(values)}")
  if not (np.abs(found) <= limit).all():  # written so that NaN fails
    raise ValueError(f"{what} must be finite and within {limit:,.0f}, got {brief(values)}")
  return found


def wholes(values: Any, what: str) -> np.ndarray:
  """A list of whole numbers as int64 [N]. ValueError "`what` must be a list of whole numbers, got ..."."""
  found = _array(values)
  if found is not None and found.dtype != np.int64:
    given = _array(values, np.float64)
    good = given is not None and ((np.abs(given) <= _EXACT) & (given == np.trunc(given))).all()
    found = given.astype(np.int64) if good else None
  if found is None:
    raise ValueError(f"{what} must be a list of whole numbers, got {brief(values)}")
  return found


def _array(values: Any, dtype: Any = None) -> np.ndarray | None:
  try:
    found = None if isinstance(values, (str, bytes)) else np.asarray(values, dtype)
  except (TypeError, ValueError, OverflowError, RecursionError):
    return None
  return None if found is None or found.ndim != 1 else found


def ids(values: Any, what: str) -> frozenset[int]:
  """A list of ids; nothing there (None) is an empty one. Raises ValueError, as `whole` does."""
  if values is None:
    return frozenset()
  if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
    raise ValueError(f"{what} must be a list of ids, got {brief(values)}")
  return frozenset(whole(value, what) for value in values)
