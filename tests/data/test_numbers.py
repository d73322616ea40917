"""The numbers of annotation files: what is read as one, and that of the rest comes a ValueError alone."""

import numpy as np
import pytest

from sam3lt_jax.data import numbers as N

NAN, INFINITE = float("nan"), float("inf")


def test_whole_numbers_in_every_form():
  for value in (12, 12.0, "12", " 12 ", "12.0", "1.2e1", np.int32(12), np.float32(12)):
    read = N.whole(value, "x")
    assert read == 12 and type(read) is int
  assert N.whole(2**63 - 1, "x") == 2**63 - 1 and N.whole("-3", "x") == -3
  for value in (
    12.5,
    "12.5",
    "a",
    "",
    None,
    True,
    [12],
    {},
    NAN,
    INFINITE,
    2**63,
    10**5000,
    1e300,
    "9" * 5000,
  ):
    with pytest.raises(ValueError, match=r"^x must be a whole number, got ") as caught:
      N.whole(value, "x")
    assert len(str(caught.value)) < 100


def test_sizes_have_limits():
  assert N.image_size("60", 80.0, "x") == (60, 80)
  assert N.image_size(1, 1_500_000, "x") == (1, 1_500_000)
  for height, width in (
    (0, 5),
    (-1, 5),
    (2**32, 1),
    (2**32 + 20, 1),
    (2**16, 2**16),
    (None, 5),
    (INFINITE, 5),
  ):
    with pytest.raises(ValueError, match="x has no height and width in pixels"):
      N.image_size(height, width, "x")


def test_flags():
  for value in (True, 1, 1.0, "1", "true", "True"):
    assert N.flag(value, "x") is True
  for value in (None, False, 0, 0.0, "0", "false"):
    assert N.flag(value, "x") is False
  for value in (2, -1, "yes", "", [], NAN):
    with pytest.raises(ValueError, match="x must be 0 or 1, got"):
      N.flag(value, "x")


def test_lists():
  np.testing.assert_array_equal(N.numbers([1, "2.5", 3.0], "x"), [1, 2.5, 3])
  np.testing.assert_array_equal(N.wholes([1, 2.0, "3"], "x"), [1, 2, 3])
  assert (
    N.wholes([], "x").dtype == np.int64 and N.ids(["1", 2.0], "x") == {1, 2} and N.ids(None, "x") == set()
  )
  deep = [[]]
  for _ in range(5000):
    deep = [deep]
  for value in ("123", None, 5, {}, [[1], [2, 3]], [[1, 2]], deep, [{}], [10**400], [NAN], [INFINITE]):
    for read in (N.numbers, N.wholes, N.ids):
      if read is not N.ids or value is not None:
        with pytest.raises(ValueError, match=r"^x must be") as caught:
          read(value, "x")
        assert len(str(caught.value)) < 160
  with pytest.raises(ValueError, match="x must be finite and within 10,000,000, got"):
    N.numbers([1e8], "x")
  with pytest.raises(ValueError, match="x must be a list of whole numbers"):
    N.wholes([0.5], "x")


def test_what_is_shown_is_one_short_printable_line():
  for value in (
    "\x1b[31m\n",
    "\ud800",
    "a" * 1000,
    list(range(1000)),
    {1: {2: {3: {4: {5: 6}}}}},
    10**5000,
    b"x" * 99,
  ):
    assert N.brief(value).isprintable() and len(N.brief(value)) <= 60
