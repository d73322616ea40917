"""`remat=True`: the plain model's function and gradients, from the same parameters, in less memory."""

from __future__ import annotations

import dataclasses

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.nn import repeat
from sam3lt_jax.nn.detr_decoder import DetrDecoder
from sam3lt_jax.nn.fusion_encoder import FusionEncoder
from sam3lt_jax.nn.vision_encoder import VitTrunk
from sam3lt_jax.ops import attention
from tests import tiny

pytestmark = pytest.mark.full  # long: CI runs it


def trunk_fields(**changes):
  fields = {
    "features": 8, "num_layers": 6, "num_heads": 2, "mlp_hidden": 12, "patch": 2, "window": 2,
    "global_layers": (2, 5), "pretrain_grid": 2, "rope_theta": 1e4, "epsilon": 1e-5,
  }  # fmt: skip
  return fields | changes


def flat(tree):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(actual, expected, atol):
  actual, expected = flat(actual), flat(expected)
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    largest = max(1.0, float(jnp.abs(value).max()))
    np.testing.assert_allclose(actual[name], value, atol=atol * largest, rtol=0, err_msg=name)


def test_stack_casts_kernels_only():
  layers = [{"d": {"kernel": jnp.full((2, 3), i + 0.5)}, "scale": jnp.full((3,), i + 0.1)} for i in range(4)]
  out = repeat.stack(layers, jnp.bfloat16)
  assert out["d"]["kernel"].shape == (4, 2, 3) and out["d"]["kernel"].dtype == jnp.bfloat16
  assert out["scale"].dtype == jnp.float32
  np.testing.assert_array_equal(out["scale"][:, 0], np.float32([0.1, 1.1, 2.1, 3.1]))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_head_by_head(masked):
  """Values and gradients, with mask and bias as the detector has them."""
  rng = np.random.default_rng(0)
  q, k, v = (rng.normal(size=(2, t, 3, 4)).astype(np.float32) for t in (5, 7, 7))
  extra = {}
  if masked:
    extra["mask"] = rng.random((2, 1, 1, 7)) < 0.7
    extra["bias"] = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
  weigh = rng.normal(size=(2, 5, 3, 4)).astype(np.float32)

  def loss(q, k, v, remat):
    return jnp.vdot(attention.attend(q, k, v, remat=remat, **extra), weigh)

  results = [
    tiny.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), static_argnums=3)(q, k, v, r) for r in (False, True)
  ]
  assert_close(results[1], results[0], atol=1e-5)


def test_attention_head_by_head_drops_weights():
  """Equal scores over S keys with values 1: the output of a row is kept / (S * (1 - rate)), on average 1."""
  shape = (2, 64, 4, 8)
  q, v = jnp.zeros(shape), jnp.ones(shape)
  run = tiny.jit(lambda key: attention.attend(q, q, v, dropout_rate=0.25, dropout_key=key, remat=True))
  out = np.asarray(run(jax.random.key(0)))[..., 0]  # [B, T, N]
  np.testing.assert_allclose(out.mean(), 1, atol=0.015)  # 4 deviations of 32768 draws
  np.testing.assert_allclose(out.std(), (0.25 / 0.75 / 64) ** 0.5, rtol=0.15)
  assert np.abs(out[:, :, 0] - out[:, :, 1]).max() > 0.05  # every head draws its own


def trunk():
  return VitTrunk(**trunk_fields()), (tiny.pixels(1, 8),)


def fusion_encoder():
  rng = np.random.default_rng(0)
  image, place, prompt = (rng.normal(size=s).astype(np.float32) for s in ((2, 9, 8), (9, 8), (2, 3, 8)))
  mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
  return FusionEncoder(3, 2, 8, 12), (image, place, prompt, mask)


def decoder():
  rng = np.random.default_rng(0)
  image, place, prompt = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 3, 8), (3, 3, 8), (2, 3, 8)))
  mask = np.array([[1, 1, 1], [1, 1, 0]], bool)
  return DetrDecoder(8, 2, 4, 2, 12, None, one_to_many=True), (image, place, prompt, mask)


@pytest.mark.parametrize("make", [trunk, fusion_encoder, decoder])
def test_values_and_gradients_of_each_scanned_part(make):
  """Gradients of parameters and of what comes in; the tolerance is rounding."""
  module, inputs = make()
  params = tiny.jit(module.init)(jax.random.key(0), *inputs)["params"]
  noise = np.random.default_rng(1)
  params = jax.tree.map(lambda p: p + noise.normal(0, 0.1, p.shape).astype(np.float32), params)

  def loss(params, first, module):
    out = module.apply({"params": params}, first, *inputs[1:])
    return sum(jnp.vdot(v, jnp.sin(1.0 + jnp.arange(v.size))) for v in jax.tree.leaves(out)), out

  def value_and_gradients(module):
    run = jax.value_and_grad(lambda p, x: loss(p, x, module), argnums=(0, 1), has_aux=True)
    return tiny.jit(run)(params, inputs[0])

  expected = value_and_gradients(module)
  assert_close(value_and_gradients(module.clone(remat=True)), expected, atol=1e-5)
  for name, gradient in flat(expected[1][0]).items():  # the comparison is not one of zeros
    if "k_proj']['bias" not in name and "layer2']['bias" not in name:  # may not move a softmax
      assert float(jnp.abs(gradient).max()) > 1e-3, name


def test_whole_model():
  vision = dataclasses.replace(tiny.config().vision, num_hidden_layers=4, global_attn_indexes=(1, 3))
  model, variables = tiny.load(tiny.config(vision=vision))
  model = model.clone(one_to_many=True)
  pixels, inputs = tiny.pixels(2), tiny.inputs()
  del inputs["pixel_values"]

  def run(model):
    # As in training: the image first, then the prompts with the decoder's intermediates.
    features = model.apply(variables, pixels, method="get_vision_features")
    return model.apply(variables, **inputs, vision_embeds=features, output_intermediates=True)

  plain, remat = (tiny.jit(lambda m=m: run(m))() for m in (model, model.clone(remat=True)))
  assert_close(dict(vars(remat)), dict(vars(plain)), atol=2e-4)


def test_parameters_have_the_same_names_and_shapes():
  model, _ = tiny.load(tiny.config())
  shapes = [
    flat(jax.tree.map(lambda x: x.shape, jax.eval_shape(m.init_variables, jax.random.key(0))))
    for m in (model, model.clone(remat=True))
  ]
  assert shapes[0] == shapes[1]


@pytest.mark.parametrize("layers, global_layers", [(6, (2, 5)), (5, (1, 4)), (2, ())])
def test_any_pattern_of_windowed_and_global_layers(layers, global_layers):
  trunk = VitTrunk(**trunk_fields(num_layers=layers, global_layers=global_layers))
  x = tiny.pixels(1, 8)
  variables = tiny.jit(trunk.init)(jax.random.key(0), x)
  plain = tiny.jit(trunk.apply)(variables, x)
  remat = tiny.jit(trunk.clone(remat=True).apply)(variables, x)
  np.testing.assert_allclose(remat, plain, atol=2e-6)


def test_order_of_layers_matters_to_the_test():
  """Had the scan run the layers in another order, the tests above would see it."""
  trunk = VitTrunk(**trunk_fields(), remat=True)
  x = tiny.pixels(1, 8)
  variables = tiny.jit(trunk.init)(jax.random.key(0), x)
  swapped = dict(variables["params"])
  swapped["layers_0"], swapped["layers_3"] = swapped["layers_3"], swapped["layers_0"]
  run = tiny.jit(trunk.apply)
  assert np.abs(run(variables, x) - run({"params": swapped}, x)).max() > 1e-2


def test_drop_path_grows_with_depth_and_keeps_the_mean():
  """Rate 0.8 over 3 layers: 0, 0.4, 0.8. Each layer adds exactly 1 twice, or nothing, over 1 - rate."""
  trunk = VitTrunk(**trunk_fields(num_layers=3, global_layers=()), drop_path=0.8, remat=True)
  x = np.zeros((256, 4, 4, 3), np.float32)
  variables = jax.tree.map(jnp.zeros_like, tiny.jit(trunk.init)(jax.random.key(0), x))
  for i in range(3):  # each branch is its output's bias, a power of ten of its own
    for part, power in (("attention", 2 * i), ("mlp", 2 * i + 1)):
      name = "o_proj" if part == "attention" else "fc2"
      variables["params"][f"layers_{i}"][part][name]["bias"] = jnp.full(8, 10.0**power)
  run = tiny.jit(lambda v, key: trunk.apply(v, x, False, rngs={"dropout": key}))
  out = np.asarray(run(variables, jax.random.key(1)))
  assert np.ptp(out, axis=(1, 2, 3)).max() == 0  # whole samples
  left, kept = out[:, 0, 0, 0].astype(np.float64), []
  for i in (2, 1, 0):
    keep = 1 - 0.4 * i
    for power in (2 * i + 1, 2 * i):
      step = 10.0**power / keep
      there = left > 0.5 * step
      kept.insert(0, there.mean())
      left = left - there * step
  np.testing.assert_allclose(left, 0, atol=0.3)  # float32 sums up to 6e5
  np.testing.assert_allclose(kept, [1, 1, 0.6, 0.6, 0.2, 0.2], atol=0.13)  # 4 deviations of 256 samples
  assert kept[0] == kept[1] == 1


def test_dropout_draws_anew_in_every_layer_and_needs_a_key():
  plain, inputs = fusion_encoder()
  # Two equal layers that add a constant: under dropout 0.5 a layer adds twice that, or nothing.
  encoder = plain.clone(num_layers=2, remat=True, dropout=0.5)
  params = jax.tree.map(jnp.zeros_like, tiny.jit(encoder.init)(jax.random.key(0), *inputs)["params"])
  for layer in params.values():
    layer["mlp"]["fc2"]["bias"] = jnp.ones(8)
  run = tiny.jit(lambda key: encoder.apply({"params": params}, *inputs, False, rngs={"dropout": key}))
  added = np.round(run(jax.random.key(0)) - inputs[0], 3)
  shares = [(added == value).mean() for value in (0, 2, 4)]  # 1/4, 1/2, 1/4 of 144; one draw for both: no 2
  np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.17)
  np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))
  assert np.any(run(jax.random.key(0)) != run(jax.random.key(1)))
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    jax.eval_shape(lambda: encoder.apply({"params": params}, *inputs, False))


def test_gradient_with_dropout_is_that_of_the_same_draw():
  """The backward pass must repeat the forward's random bits: compare with a difference quotient.

  The median of seven draws: a single one can lie so near a ReLU's kink that the quotient crosses it.
  """
  plain, inputs = fusion_encoder()
  encoder = plain.clone(remat=True, dropout=0.3, attention_dropout=0.3, mlp_dropout=0.3)
  params = tiny.jit(plain.init)(jax.random.key(0), *inputs)["params"]
  weigh = np.random.default_rng(2).normal(size=inputs[0].shape).astype(np.float32)

  def loss(params, key):
    out = encoder.apply({"params": params}, *inputs, False, rngs={"dropout": key})
    return jnp.vdot(out, weigh)

  run, gradient_of = tiny.jit(loss), tiny.jit(jax.grad(loss))
  ratios = []
  for key in jax.random.split(jax.random.key(3), 7):
    gradient = gradient_of(params, key)
    length = np.sqrt(sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(gradient)))
    step = 2e-3 / length
    ahead = jax.tree.map(lambda p, g, step=step: p + step * g, params, gradient)
    behind = jax.tree.map(lambda p, g, step=step: p - step * g, params, gradient)
    ratios.append(float(run(ahead, key) - run(behind, key)) / 4e-3 / length)
  np.testing.assert_allclose(np.median(ratios), 1, rtol=0.003)


def test_taps_still_come_out():
  model, variables = tiny.load(tiny.config())
  model = model.clone(remat=True)
  out = jax.eval_shape(lambda: model.apply(variables, **tiny.inputs(), output_intermediates=True))
  assert {"vit_block_0", "vit_block_1", "decoder_boxes"} <= set(out.intermediates)


def test_memory_of_the_backward_pass():
  """16 layers: the plain gradient keeps everything in between, the scan one input a layer."""
  fields = trunk_fields(features=32, mlp_hidden=128, num_layers=16, window=4, global_layers=(7, 15))
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  temp = {}
  for remat in (False, True):
    trunk = VitTrunk(**fields, remat=remat)
    variables = jax.eval_shape(trunk.init, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda v, x, trunk=trunk: trunk.apply(v, x).sum()))
    temp[remat] = gradient.lower(variables, x).compile().memory_analysis().temp_size_in_bytes
  assert temp[True] < temp[False] / 3
