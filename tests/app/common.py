"""A tiny model with a tracker, and its photos."""

from __future__ import annotations

import functools

import numpy as np

from sam3lt_jax import Predictor
from tests import tiny
from tests.parity import tracker as reference
from tests.test_predictor import photo

HEIGHT, WIDTH = 60, 90
ON, OTHER = (30.0, 20.0), (70.0, 45.0)


@functools.cache
def predictor() -> Predictor:
  with tiny.hurry():
    return Predictor(*tiny.load(tiny.config(vocab_size=49408)), tracker=reference.load())


def image(seed: int = 0) -> np.ndarray:
  return photo(HEIGHT, WIDTH, seed)
