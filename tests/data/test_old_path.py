"""Scripts written for `sam3lt_jax.training.data`, where annotation data once was."""

import importlib
import sys

import pytest

NAMES = ("augment", "batches", "coco", "examples", "load", "records", "rle", "saco")


def test_the_old_path_is_the_new_one():
  for name in [name for name in sys.modules if name.startswith("sam3lt_jax.training.data")]:
    del sys.modules[name]
  with pytest.warns(DeprecationWarning, match=r"sam3lt_jax\.training\.data is sam3lt_jax\.data now"):
    from sam3lt_jax.training.data.coco import load_coco
  from sam3lt_jax.data import coco
  from sam3lt_jax.training.data import rle

  assert load_coco is coco.load_coco and rle is importlib.import_module("sam3lt_jax.data.rle")
  for name in NAMES:
    old = importlib.import_module(f"sam3lt_jax.training.data.{name}")
    assert old is importlib.import_module(f"sam3lt_jax.data.{name}")
