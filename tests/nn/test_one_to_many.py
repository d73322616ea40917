"""The second run of the queries in training leaves the first as it is."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests import tiny


@pytest.mark.full  # 6 s
def test_one_to_many_rows_change_no_other_output_and_hear_no_other_query():
  plain, variables = tiny.load(tiny.config())
  rng = np.random.default_rng(0)
  pixels = rng.uniform(-1, 1, (1, tiny.SIDE, tiny.SIDE, 3)).astype(np.float32)
  ids = rng.integers(1, 200, (2, 5)).astype(np.int32)

  def program(model):
    return tiny.jit(lambda v: model.apply(v, pixels, ids, output_intermediates=True))

  once, twice = program(plain), program(plain.clone(one_to_many=True))
  a, b = once(variables), twice(variables)
  for name in tiny.OUTPUTS:
    np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=2e-5, err_msg=name)
  many = np.asarray(b.intermediates["one_to_many_boxes"])
  assert many.shape == a.intermediates["decoder_boxes"].shape
  assert np.abs(many - a.intermediates["decoder_boxes"]).max() > 1e-4
  # Another query 0 moves the others' boxes through self-attention; in the second run only its own.
  changed = jax.tree.map(lambda x: x, variables)
  table = changed["params"]["detr_decoder"]["query_embed"]
  table["embedding"] = table["embedding"] + np.eye(tiny.QUERIES, dtype=np.float32)[:, :1]
  c = twice(changed).intermediates
  assert np.abs(c["decoder_boxes"] - b.intermediates["decoder_boxes"])[:, :, 1:].max() > 1e-6
  np.testing.assert_array_equal(c["one_to_many_boxes"][:, :, 1:], many[:, :, 1:])
