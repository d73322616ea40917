"""The losses that tell the teacher attributes and fitting phrases, on numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.shapes import alignment, models
from examples.shapes.data import ATTRIBUTES, ShapesBatches, attribute_indices, named_attributes
from sam3lt_jax.shapes.phrases import all_phrases
from sam3lt_jax.shapes.scenes import SceneConfig, draw_scene

# As one program each: outside of one, every operation is compiled alone.
attribute_loss, fit_loss = jax.jit(alignment.attribute_loss), jax.jit(alignment.fit_loss)
SIZES = [len(values) for values in ATTRIBUTES.values()]


def test_named_attributes_of_every_phrase():
  """What is read from the words builds the words again."""
  for text in all_phrases():
    named = dict(zip(ATTRIBUTES, named_attributes(text)))
    words = [
      ATTRIBUTES[name][named[name]] for name in ("size", "pattern", "colour", "kind") if named[name] >= 0
    ]
    assert " ".join(words if named["kind"] >= 0 else [*words, "shape"]) == text


def test_attribute_indices():
  things = draw_scene(3, SceneConfig(min_objects=4)).objects
  assert len(things) >= 4
  for thing in things:
    read = [values[i] for values, i in zip(ATTRIBUTES.values(), attribute_indices(thing))]
    assert read == [thing.kind, thing.colour, thing.pattern, thing.size]


def test_attribute_loss():
  """Logits of zero cost log(values) an attribute; sure and right ones nothing; unmatched objects nothing."""
  has = np.array([[[1, 0, 2, 1], [0, 0, 0, 0]]])
  found = np.array([[[1.0, 0.0]], [[1.0, 0.0]]])  # two layers, one of two objects matched
  flat, _ = attribute_loss(jnp.zeros((2, 1, 2, sum(SIZES))), has, found)
  np.testing.assert_allclose(flat, 2 * sum(np.log(SIZES)), rtol=1e-6)
  sure = np.concatenate([30.0 * np.eye(n)[i] for n, i in zip(SIZES, has[0, 0])])
  loss, metrics = attribute_loss(jnp.broadcast_to(sure, (2, 1, 2, sum(SIZES))), has, found)
  assert loss < 1e-6
  assert {k: float(v) for k, v in metrics.items()} == {f"{name}_accuracy": 1.0 for name in ATTRIBUTES}


def test_fit_loss():
  """A phrase of kind and colour, one that leaves all open; an object that fits both, another colour."""
  named = np.array([[0, 1, -1, -1], [-1, -1, -1, -1]])
  has = np.array([[0, 1, 2, 0], [0, 2, 2, 0]])
  fits = np.array([[1, 0], [1, 1]])
  weight = np.ones((1, 2, 2))
  loss, metrics = fit_loss(jnp.asarray(20.0 * (2 * fits - 1))[None], named, has, weight)
  assert loss < 1e-6 and metrics["fit_f1"] == 1
  loss, metrics = fit_loss(jnp.full((1, 2, 2), 5.0), named, has, weight)  # "all fit"
  np.testing.assert_allclose(loss, (3 * np.log1p(np.exp(-5)) + 5 + np.log1p(np.exp(-5))) / 4, rtol=1e-5)
  np.testing.assert_allclose(metrics["fit_f1"], 2 * 3 / (4 + 3), rtol=1e-6)
  weight[0, 0, 1] = 0  # leaves out the pair that does not fit
  assert fit_loss(jnp.full((1, 2, 2), 20.0), named, has, weight)[0] < 1e-6


@pytest.mark.full
def test_alignment_inside_the_loss():
  """It adds to the model's loss and moves the heads, which are no parameters of the model."""
  from sam3lt_jax import from_pretrained
  from sam3lt_jax.training.detection.losses import make_detection_loss_fn

  model, variables = from_pretrained("random:tiny", models.teacher_config(), progress=False)
  model, params = model.clone(one_to_many=True), variables["params"]
  both = alignment.with_heads(params, models.WIDTH)
  assert set(both) - set(params) == {alignment.HEADS}
  data = ShapesBatches(
    models.tokenizer(), images=2, questions=4, mask_side=models.mask_side(), scene=SceneConfig(min_objects=3)
  )
  batch = {k: v for k, v in data[0].items() if k != "id"}

  def run(of, extra):
    loss_fn = make_detection_loss_fn(model, deterministic=True, extra=extra)
    return jax.jit(of(loss_fn))(both, None, {}, batch, jax.random.key(1))

  plain, _ = run(lambda loss_fn: loss_fn, None)
  (loss, (metrics, _)), gradient = run(
    lambda loss_fn: jax.value_and_grad(loss_fn, has_aux=True), alignment.make_alignment()
  )
  assert loss > plain and {"kind_accuracy", "fit_f1"} <= set(metrics)
  assert float(jnp.abs(gradient[alignment.HEADS]["kernel"]).max()) > 0
