"""A detector that starts from nothing looks where its queries are."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.shapes import models
from examples.shapes.initialization import start_locally
from sam3lt_jax.model import Sam3LiteText
from sam3lt_jax.ops import boxes as box_ops

# Draws a whole teacher: 5 s, for what only the training of the bundled model uses.
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def decoders():
  """(as drawn, started locally) of the shapes' teacher: 20 queries, 10 x 10 cells."""
  model = Sam3LiteText(models.teacher_config())
  # Compiled as one, what is not asked for is not drawn.
  drawn = jax.jit(lambda key: model.init_variables(key)["params"]["detr_decoder"])(jax.random.key(0))
  before = jax.tree.map(np.array, drawn)
  after = start_locally(drawn)
  chex.assert_trees_all_equal(before, drawn)  # the tree given is not touched
  return before, after


def test_the_tree_keeps_its_form(decoders):
  before, after = decoders
  assert jax.tree.structure(before) == jax.tree.structure(after)
  jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(), before, after)
  same = [
    name for name in before if all(jax.tree.leaves(jax.tree.map(np.array_equal, before[name], after[name])))
  ]
  assert set(before) - set(same) == {"reference_points", "box_rpb_embed_x", "box_rpb_embed_y", "box_head"}


def test_queries_cover_the_image_evenly(decoders):
  boxes = np.array(jax.nn.sigmoid(decoders[1]["reference_points"]["embedding"]))
  np.testing.assert_allclose(boxes[:, 2:], 0.3, atol=1e-5)
  assert len({tuple(c) for c in boxes[:, :2].round(4)}) == len(boxes) == 20
  at = (np.arange(30) + 0.5) / 30
  covered = [
    np.any((np.abs(boxes[:, 0] - x) <= 0.15) & (np.abs(boxes[:, 1] - y) <= 0.15)) for x in at for y in at
  ]
  assert all(covered)


def test_attention_stays_near_the_box(decoders):
  """Most of the weight that the bias alone gives lies on cells of the box, and far cells have almost none."""
  box = jnp.array([0.45, 0.5, 0.3, 0.3])

  def bias(axis, name):
    mlp, x = decoders[1][f"box_rpb_embed_{name}"], box_ops.relative_position_log(box, 10, axis)
    hidden = jax.nn.relu(x @ mlp["layer1"]["kernel"] + mlp["layer1"]["bias"])
    return hidden @ mlp["layer2"]["kernel"] + mlp["layer2"]["bias"]  # [10, heads]

  both = bias(1, "y")[:, None] + bias(0, "x")[None, :]
  weights = np.array(jax.nn.softmax(both.reshape(100, -1), axis=0)).reshape(10, 10, -1)
  # x 0.3 to 0.6, y 0.35 to 0.65; a cell is where its left or upper edge is
  assert (weights[3:7, 2:7].sum((0, 1)) > 0.6).all()
  assert (weights[:, 9].sum(0) < 0.01).all() and (weights[0].sum(0) < 0.02).all()


def test_the_first_prediction_is_the_reference_box(decoders):
  last = decoders[1]["box_head"]["layer3"]
  assert not np.any(last["kernel"]) and not np.any(last["bias"])
  assert np.any(decoders[1]["box_head"]["layer2"]["kernel"])
