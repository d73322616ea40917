"""Dense labels by hand, the loss on perfect answers, and batches that stay in their seeds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.shapes import models, pretraining
from examples.shapes.pretraining import DenseBatches, dense_labels, with_unit_maps
from sam3lt_jax.model import Sam3LiteText
from sam3lt_jax.shapes.scenes import Scene, SceneObject

# As one program: outside of one, every operation is compiled alone.
dense_loss = jax.jit(pretraining.dense_loss)


def scene() -> Scene:
  mask = np.zeros((160, 160), bool)
  mask[40:80, 80:160] = True  # x 80 to 160, y 40 to 80
  thing = SceneObject("square", "blue", "dotted", "large", mask, (80.0, 40.0, 160.0, 80.0))
  return Scene(0, np.zeros((160, 160, 3), np.uint8), (thing,))


def test_labels_by_hand():
  classes, edges = dense_labels(scene(), 4).values()  # cells of 40 pixels, centres at 20, 60, 100, 140
  inside = np.zeros((4, 4), bool)
  inside[1, 2:] = True
  np.testing.assert_array_equal(classes[..., 0] > 0, inside)
  # Kinds count from 1: circle, ring, square. Colours red, orange, yellow, green, blue.
  np.testing.assert_array_equal(classes[1, 2], [3, 4, 2, 2])
  # The pixel at (100, 60): 20 from the left edge, 20 from the top, 60 from the right, 20 from the bottom.
  np.testing.assert_allclose(edges[1, 2], np.array([20, 20, 60, 20]) / 160)
  assert not edges[~inside].any() and not classes[~inside].any()


@pytest.mark.full  # 3 s
def test_the_loss_of_right_and_wrong_answers():
  classes, edges = dense_labels(scene(), 4).values()
  classes, edges = jnp.array(classes)[None], jnp.array(edges)[None]
  right = [
    50.0 * jnp.eye(len(values))[classes[..., i]] for i, (_, values) in enumerate(pretraining.ATTRIBUTES)
  ]
  channels = jnp.concatenate([*right, edges], -1)
  loss, metrics = dense_loss([channels, channels], classes, edges)
  assert float(loss) == pytest.approx(0, abs=1e-5)
  assert all(float(v) == pytest.approx(1) for k, v in metrics.items() if k.endswith("accuracy"))
  # All edges off by 0.1, nothing known of the attributes: uniform cross entropies.
  blank = jnp.concatenate([jnp.zeros_like(jnp.concatenate(right, -1)), edges + 0.1], -1)
  loss, metrics = dense_loss([blank], classes, edges)
  expected = 3 * np.log(7) + np.log(8) + np.log(4) + np.log(3) + 5 * 0.1
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  assert float(metrics["edge_error"]) == pytest.approx(0.1, rel=1e-5)


def test_batches():
  batches = DenseBatches(images=2, side=40, seed=2)
  a = batches[3]
  np.testing.assert_array_equal(a["id"], [200_000_006, 200_000_007])
  np.testing.assert_array_equal(a["classes"], batches[3]["classes"])
  assert a["pixel_values"].shape == (2, 120, 120, 3) and a["edges"].shape == (2, 40, 40, 4)
  with pytest.raises(ValueError, match="held-out"):
    DenseBatches(images=2, side=40, seed=10)[0]


@pytest.mark.full
def test_maps_are_brought_to_one_scale():
  """Same directions, standard deviation 1, what the heads read stays, and so do the parameters given."""
  model = Sam3LiteText(models.teacher_config())
  # Compiled as one, what is not asked for is not drawn.
  vision = jax.jit(lambda key: model.init_variables(key)["params"]["vision_encoder"])(jax.random.key(0))
  vision = jax.tree.map(lambda x: np.asarray(x) * 3, vision)
  pixels = DenseBatches(images=2, side=40, seed=2)[0]["pixel_values"]

  @jax.jit
  def maps(vision):
    variables = {"params": {"vision_encoder": vision}}
    return model.apply(variables, pixels, method="neck_maps")

  before = maps(vision)
  heads = pretraining.DenseHeads(40).init(jax.random.key(1), before)["params"]
  scaled, scaled_heads = with_unit_maps(model, vision, heads, pixels)
  after = maps(scaled)
  for a, b in zip(before, after):
    assert abs(float(a.std()) - 1) > 0.2 and float(b.std()) == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(b, a / a.std(), atol=1e-4)
  read = pretraining.DenseHeads(40).apply
  for a, b in zip(read({"params": heads}, before), read({"params": scaled_heads}, after)):
    np.testing.assert_allclose(b, a, atol=1e-4 * float(abs(a).max()))
