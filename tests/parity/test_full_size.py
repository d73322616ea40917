"""The released size, once a CI run: what a user gets equals what transformers gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.parity import full_size, full_size_clicks
from tests.reference import import_torch_reference

pytestmark = [pytest.mark.full, pytest.mark.large, pytest.mark.torch]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  """The rows of the command, run as users run it: without what conftest.py sets to compile faster."""
  import_torch_reference()
  path = tmp_path_factory.mktemp("full") / "rows.json"
  hurry = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR")
  env = {k: v for k, v in os.environ.items() if k not in hurry}
  subprocess.run([sys.executable, "-m", "tests.parity.full_size", "--json", path], check=True, env=env)
  return json.loads(path.read_text())


def test_float32_results_are_the_references(rows):
  checked = [row for row in _phrases(rows) if row.dtype == "float32"]
  assert [row.prompt for row in checked] == list(full_size.PROMPTS)
  for row in checked:
    assert 20 <= row.kept_reference <= 180  # the threshold separates
    assert row.kept_differently == 0
    assert row.box_difference <= 0.05  # pixels of the photo
    assert row.mask_difference <= 1e-4


def _phrases(rows):
  return [full_size.Row(**row) for row in rows["phrases"]]


def test_clicks_are_the_references(rows):
  checked = [full_size_clicks.ClickRow(**row) for row in rows["clicks"]]
  assert [row.prompt for row in checked] == list(full_size_clicks.CLICKS)
  assert checked[0].masks == 3
  for row in checked:
    assert 0.01 < row.area < 0.99  # there is something to differ
    assert row.iou_difference <= 1e-5
    assert row.mask_difference <= 1e-4


def test_bfloat16_is_reported_and_close(rows):
  """Random weights amplify rounding more than trained ones; a broken path would be far below this."""
  for row in (row for row in _phrases(rows) if row.dtype == "bfloat16"):
    assert row.mask_iou > 0.5
