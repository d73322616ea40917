"""Dropout: where it acts under each profile, and that it acts only when asked."""

import dataclasses

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.nn.vision_encoder import VitBlock
from tests import tiny

B = 2  # images and prompts
T, N = 5, 1  # tokens and boxes of a prompt
G = N + 1  # geometry tokens, CLS included
L = T + G  # prompt tokens
S = 4  # image tokens at 28 px
D, HIDDEN, HEADS = 16, 24, 2
R = 1 + tiny.QUERIES  # decoder rows, presence included
PROFILES = ("original", "transformers")


def inputs():
  ids, mask = tiny.phrases(B, T)
  boxes = np.full((B, N, 4), 0.5, np.float32)
  return {"pixel_values": tiny.pixels(B, 28), "input_ids": ids, "attention_mask": mask, "input_boxes": boxes}


def drawn_shapes(profile):
  """Shapes of every random mask that a training forward draws, read off its program: nothing is compiled."""
  model, variables = tiny.load(tiny.config(profile))

  def forward(key):
    return model.apply(variables, **inputs(), deterministic=False, rngs={"dropout": key})

  shapes = []

  def walk(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "random_bits":
        shapes.append(tuple(eqn.params["shape"]))
      for value in eqn.params.values():
        for sub in value if isinstance(value, (list, tuple)) else [value]:
          sub = getattr(sub, "jaxpr", sub)
          if hasattr(sub, "eqns"):
            walk(sub)

  walk(jax.make_jaxpr(forward)(jax.random.key(0)).jaxpr)
  return sorted(shapes)


RESIDUALS = (
  [(B, G, D)] * 3  # geometry encoder: self-attention, cross-attention, MLP
  + [(B, S, D)] * 3  # fusion encoder: the same
  + [(B, R, D)] * 4 * 2  # two decoder layers: self, prompt and image attention, MLP
)


def test_original_drops_attention_weights_branches_hidden_units_and_whole_paths():
  weights = [(B, HEADS, G, G), (B, HEADS, G, S), (B, HEADS, S, S), (B, HEADS, S, L)]
  weights += [(B, HEADS, R, R), (B, HEADS, R, L), (B, HEADS, R, S)] * 2
  hidden = [(B, G, HIDDEN), (B, S, HIDDEN)] + [(B, R, HIDDEN)] * 2
  scoring = [(B, L, HIDDEN)]
  paths = [(B, 1, 1, 1)] * 2  # the second ViT layer; the first has rate 0
  assert drawn_shapes("original") == sorted(RESIDUALS + weights + hidden + scoring + paths)


def test_transformers_drops_branches_and_the_scoring_mlps_output():
  assert drawn_shapes("transformers") == sorted(RESIDUALS + [(B, L, D)])


@pytest.mark.full  # 9 s
@pytest.mark.parametrize("profile", PROFILES)
def test_dropout_acts_when_asked_and_differs_with_the_key(profile):
  model, variables = tiny.load(tiny.config(profile))

  @tiny.jit
  def train(key):
    out = model.apply(variables, **inputs(), deterministic=False, rngs={"dropout": key})
    return out.pred_logits, out.pred_boxes, out.presence_logits

  first, again, other = train(jax.random.key(0)), train(jax.random.key(0)), train(jax.random.key(1))
  for a, b, c in zip(first, again, other):
    assert np.isfinite(a).all()
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c, atol=1e-4)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_training_forward_needs_a_key(profile):
  model, variables = tiny.load(tiny.config(profile))
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    jax.eval_shape(lambda: model.apply(variables, **inputs(), deterministic=False))


@pytest.mark.full
def test_without_rates_training_is_inference():
  """Also the proof that `deterministic` changes nothing else."""
  config = tiny.config("original")
  parts = ("geometry_encoder", "detr_encoder", "detr_decoder")
  still = {name: dataclasses.replace(getattr(config, name), dropout=0.0) for name in parts}
  still["vision"] = dataclasses.replace(config.vision, drop_path_rate=0.0)
  model, variables = tiny.load(config)

  def program(model, **kwargs):
    return jax.jit(lambda v: model.apply(v, **inputs(), **kwargs)).lower(variables).as_text()

  def run(model, **kwargs):
    return tiny.jit(lambda v: model.apply(v, **inputs(), **kwargs))(variables)

  inference = program(model)
  trained = run(model.clone(config=config.replace(**still)), deterministic=False)
  for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(run(model)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)  # inference shares a layer between prompts
  assert program(model, rngs={"dropout": jax.random.key(0)}) == inference  # a key alone does nothing
  assert "threefry" not in inference
  assert "threefry" in program(model, deterministic=False, rngs={"dropout": jax.random.key(0)})


def test_vision_features_for_training_drop_paths():
  model, variables = tiny.load(tiny.config("original"))
  with pytest.raises(flax.errors.InvalidRngError):
    jax.eval_shape(
      lambda: model.apply(variables, tiny.pixels(B, 28), deterministic=False, method="get_vision_features")
    )


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
  """A block at rate 0.5 on equal samples: each branch is twice itself or nothing, in all its tokens."""
  block = VitBlock(
    num_heads=2, mlp_hidden=8, window=2, rope_window=2, rope_theta=1e4, epsilon=1e-5, drop_path=0.5
  )
  x = jnp.broadcast_to(jnp.asarray(tiny.pixels(1, 2)[..., :1]), (64, 2, 2, 8)) * jnp.arange(1.0, 9.0)
  variables = tiny.jit(block.init)(jax.random.key(0), x)
  zeros = jax.tree.map(jnp.zeros_like, variables["params"]["mlp"]["fc2"])
  variables["params"]["mlp"]["fc2"] = zeros  # leaves the attention's branch
  variables["params"]["attention"]["o_proj"]["bias"] = jnp.ones(8)
  run = tiny.jit(lambda key: block.apply(variables, x, False, rngs={"dropout": key}) - x)
  branch = tiny.jit(block.apply)(variables, x) - x
  ratio = np.asarray(run(jax.random.key(1)) / branch)
  per_sample = ratio.reshape(64, -1)
  np.testing.assert_allclose(per_sample, np.broadcast_to(per_sample[:, :1], per_sample.shape), atol=1e-4)
  np.testing.assert_allclose(per_sample[:, 0] * (per_sample[:, 0] - 2), 0, atol=1e-3)
  assert 16 < (per_sample[:, 0] > 1).sum() < 48  # Binomial(64, 1/2), 4 deviations


def test_batch_statistics_update_only_when_asked():
  model, variables = tiny.load(tiny.config("original"))
  ids, mask = tiny.phrases(4)

  @tiny.jit
  def train(variables):
    return model.apply(
      variables, ids, mask, update_batch_stats=True, method="get_text_features", mutable=["batch_stats"]
    )

  features, updated = train(variables)
  inference = tiny.jit(lambda v: model.apply(v, ids, mask, method="get_text_features"))(variables)
  assert not np.allclose(features.pooler_output, inference.pooler_output, atol=1e-3)
  old, new = (jax.tree.leaves(tree["batch_stats"]) for tree in (variables, updated))
  assert jax.tree.structure(updated["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
  assert all(np.abs(a - b).max() > 1e-6 and a.dtype == jnp.float32 for a, b in zip(old, new))

  with pytest.raises(flax.errors.ModifyScopeVariableError):
    jax.eval_shape(
      lambda: model.apply(variables, ids, mask, update_batch_stats=True, method="get_text_features")
    )
