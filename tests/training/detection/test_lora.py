"""LoRA adapters: which kernels, what they compute, what learns, what is exported."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sam3lt_jax.checkpoints.engine import flatten, unflatten
from sam3lt_jax.training.detection import lora
from sam3lt_jax.training.detection.lora import LoraConfig
from tests import tiny

SMALL = {
  "mlp": {"fc1": {"kernel": np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32), "bias": np.zeros(3)}},
  "conv": {"kernel": np.zeros((3, 3, 2, 2), np.float32)},
}


def size(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_by_hand():
  """kernel + 6 / 2 * a @ b, rank 2."""
  config = LoraConfig(rank=2, alpha=6.0, targets=("fc1",))
  a = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
  b = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], np.float32)
  adapters = {"mlp": {"fc1": {"kernel": {"a": a, "b": b}}}}
  expected = [[4.0, 5.0, 3.0], [4.0, 5.0, 12.0]]
  for adapt in (lora.apply_lora, lora.merge_lora):
    out = adapt(SMALL, adapters, config)
    np.testing.assert_array_equal(out["mlp"]["fc1"]["kernel"], expected)
    assert out["mlp"]["fc1"]["bias"] is SMALL["mlp"]["fc1"]["bias"]
    assert out["conv"]["kernel"] is SMALL["conv"]["kernel"]
  np.testing.assert_array_equal(SMALL["mlp"]["fc1"]["kernel"], [[1, 2, 3], [4, 5, 6]])  # left alone
  assert size(adapters) == 4 + 6


def test_default_targets_of_the_real_model():
  """Per ViT block 6 matrices, per fusion layer 2 x 4 + 2, per decoder layer 3 x 4 + 2."""
  model, variables = tiny.load(tiny.config())
  config = LoraConfig(rank=2)
  paths = lora.target_paths(variables["params"], config)
  c = model.config
  expected = 6 * c.vision.num_hidden_layers + 10 * c.detr_encoder.num_layers + 14 * c.detr_decoder.num_layers
  assert len(paths) == expected
  assert "vision_encoder/backbone/layers_1/attention/o_proj/kernel" in paths
  assert "detr_encoder/layers_0/mlp/fc2/kernel" in paths
  assert "detr_decoder/layers_1/text_cross_attn/q_proj/kernel" in paths
  assert not any(p.startswith(("text_encoder", "geometry_encoder", "mask_decoder")) for p in paths)
  adapters = lora.init_lora(variables["params"], config, jax.random.key(0))
  kernels = flatten(variables["params"])
  assert size(adapters) == sum(2 * sum(kernels[p].shape) for p in paths)
  assert set(flatten(adapters)) == {f"{p}/{part}" for p in paths for part in "ab"}


@pytest.mark.full  # 3 s
def test_full_size_count():
  """S0, rank 16: 16 x (in + out) a matrix. ViT: 4 of 1024 x 1024 and two of 1024 x 4736 in 32 layers."""
  from sam3lt_jax import Sam3LiteText, Sam3LiteTextConfig
  from sam3lt_jax.checkpoints.pretrained import abstract_leaves

  shapes = unflatten(abstract_leaves(Sam3LiteText(Sam3LiteTextConfig.s0())))["params"]
  adapters = jax.eval_shape(lambda p: lora.init_lora(p, LoraConfig(), jax.random.key(0)), shapes)
  trunk = 32 * (4 * 2048 + 2 * 5760)
  fusion = 6 * (8 * 512 + 2 * 2304)
  decoder = 6 * (12 * 512 + 2 * 2304)
  assert size(adapters) == 16 * (trunk + fusion + decoder) == 11_960_320


def test_step_zero_is_the_base_model_exactly():
  _, variables = tiny.load(tiny.config())
  config = LoraConfig(rank=2)
  adapters = lora.init_lora(variables["params"], config, jax.random.key(0))
  adapted = tiny.jit(lambda p, adapters: lora.apply_lora(p, adapters, config))(variables["params"], adapters)
  for (path, value), same in zip(flatten(variables["params"]).items(), flatten(adapted).values()):
    np.testing.assert_array_equal(same, value, err_msg=path)


def test_init_depends_on_key_and_path_only():
  config = LoraConfig(rank=1, targets=("fc1",))
  a = lora.init_lora(SMALL, config, jax.random.key(0))["mlp"]["fc1"]["kernel"]["a"]
  more = {**SMALL, "other": {"fc1": SMALL["mlp"]["fc1"]}}
  again = lora.init_lora(more, config, jax.random.key(0))
  np.testing.assert_array_equal(again["mlp"]["fc1"]["kernel"]["a"], a)
  assert np.all(again["other"]["fc1"]["kernel"]["a"] != a)
  assert np.all(lora.init_lora(SMALL, config, jax.random.key(1))["mlp"]["fc1"]["kernel"]["a"] != a)
  wide = {"fc1": {"kernel": jax.ShapeDtypeStruct((400, 9), jnp.float32)}}
  values = np.asarray(
    lora.init_lora(wide, LoraConfig(rank=9, targets=("fc1",)), jax.random.key(0))["fc1"]["kernel"]["a"]
  )
  assert 0.045 < np.abs(values).max() <= 0.05  # 1 / sqrt(400)
  np.testing.assert_allclose(values.mean(), 0, atol=0.002)


def test_gradients_reach_a_and_b_and_learn():
  """x (k + a b) is to become x goal: the adapters get there alone."""
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(6, 5)).astype(np.float32)
  goal = kernel + np.outer(rng.normal(size=6), rng.normal(size=5)).astype(np.float32)  # a change of rank 1
  params = {"fc1": {"kernel": kernel}}
  config = LoraConfig(rank=1, alpha=1.0, targets=("fc1",))
  adapters = lora.init_lora(params, config, jax.random.key(0))
  x = rng.normal(size=(32, 6)).astype(np.float32)
  tx = optax.adam(0.05)

  def loss(adapters):
    return jnp.mean((x @ lora.apply_lora(params, adapters, config)["fc1"]["kernel"] - x @ goal) ** 2)

  gradient = jax.grad(loss)(adapters)["fc1"]["kernel"]
  assert float(jnp.abs(gradient["a"]).max()) == 0  # b is zero, so only b learns in the first step
  assert float(jnp.abs(gradient["b"]).max()) > 0.01

  def step(carry, _):
    adapters, state = carry
    value, grads = jax.value_and_grad(loss)(adapters)
    updates, state = tx.update(grads, state)
    return (optax.apply_updates(adapters, updates), state), value

  train = tiny.jit(lambda carry: jax.lax.scan(step, carry, None, length=400))
  (adapters, _), losses = train((adapters, tx.init(adapters)))
  assert losses[0] > 1 and losses[-1] < 1e-4 * losses[0]
  np.testing.assert_allclose(lora.merge_lora(params, adapters, config)["fc1"]["kernel"], goal, atol=0.05)


def test_bfloat16_kernels():
  """In the step the sum is float32 (a small change would vanish in bfloat16); merged, the kernel's dtype."""
  params = {"fc1": {"kernel": jnp.ones((2, 2), jnp.bfloat16)}}
  config = LoraConfig(rank=1, alpha=1.0, targets=("fc1",))
  adapters = {"fc1": {"kernel": {"a": jnp.full((2, 1), 1e-3), "b": jnp.ones((1, 2))}}}
  inside = lora.apply_lora(params, adapters, config)["fc1"]["kernel"]
  assert inside.dtype == jnp.float32
  np.testing.assert_allclose(inside, 1.001, rtol=1e-6)
  assert lora.merge_lora(params, adapters, config)["fc1"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.full  # 3 s
def test_merged_model_is_the_adapted_model():
  model, variables = tiny.load(tiny.config())
  config = LoraConfig(rank=2, alpha=4.0)
  adapters = lora.init_lora(variables["params"], config, jax.random.key(0))
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(lambda x: x + rng.normal(0, 0.05, x.shape).astype(np.float32), adapters)

  @tiny.jit
  def run(params, adapters=None):
    params = params if adapters is None else lora.apply_lora(params, adapters, config)
    out = model.apply({**variables, "params": params}, **tiny.inputs())
    return {name: getattr(out, name) for name in tiny.OUTPUTS}

  merged = lora.merge_lora(variables["params"], adapters, config)
  adapted, exported, base = run(variables["params"], adapters), run(merged), run(variables["params"])
  for name in tiny.OUTPUTS:
    np.testing.assert_allclose(exported[name], adapted[name], atol=2e-5, err_msg=name)
  assert np.abs(adapted["pred_masks"] - base["pred_masks"]).max() > 0.01
  assert jax.tree.map(lambda x: (x.shape, x.dtype), merged) == jax.tree.map(
    lambda x: (x.shape, x.dtype), variables["params"]
  )


def test_split_adapters():
  adapters = {"x": {"kernel": {"a": 1, "b": 2}}}
  rest = {"x": {"bias": 3}, "y": {"kernel": 4}}
  both = {"x": {"kernel": {"a": 1, "b": 2}, "bias": 3}, "y": {"kernel": 4}}
  assert lora.split_adapters(both) == (adapters, rest)
  assert lora.split_adapters(rest) == ({}, rest)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"rank": 0}, "rank=0; accepted: 1 or more"),
    ({"alpha": 0.0}, "alpha=0.0; accepted: a number above 0"),
    ({"targets": ()}, r"targets=\(\); accepted: one or more"),
    ({"targets": "fc1"}, "targets='fc1'; accepted: one or more"),
  ],
)
def test_config_errors(kwargs, message):
  with pytest.raises(ValueError, match=message):
    LoraConfig(**kwargs)


@pytest.mark.parametrize(
  "kwargs, message",
  [
    ({"targets": ("fc1", "fc3")}, "targets: 'fc3' matches no parameter; near names: .*mlp/fc1"),
    ({"targets": ("bias",)}, "targets: 'bias' matches no parameter"),
    ({"targets": ("fc1(",)}, r"targets: 'fc1\(' is no regular expression"),
    (
      {"targets": ("fc1", "conv")},
      r"targets: 'conv' finds kernels that are no matrices .*conv/kernel \(3, 3, 2, 2\)",
    ),
    ({"targets": ("fc1",), "rank": 3}, r"rank=3 is more than mlp/fc1/kernel has: \(2, 3\)"),
  ],
)
def test_target_errors(kwargs, message):
  with pytest.raises(ValueError, match=message):
    lora.init_lora(SMALL, LoraConfig(**{"rank": 1} | kwargs), jax.random.key(0))


def test_adapters_of_another_model():
  config = LoraConfig(rank=1, targets=("fc1",))
  adapters = lora.init_lora(SMALL, config, jax.random.key(0))
  with pytest.raises(ValueError, match="lora: mlp/fc1/kernel is in the adapters and not in the parameters"):
    lora.apply_lora({"conv": SMALL["conv"]}, adapters, config)
  other = {"mlp": {"fc1": {"kernel": np.zeros((2, 4))}}}
  with pytest.raises(ValueError, match=r"adapter of mlp/fc1/kernel is for \[2, 3\], the kernel is \(2, 4\)"):
    lora.merge_lora(other, adapters, config)
