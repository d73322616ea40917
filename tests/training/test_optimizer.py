import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.checkpoints.engine import flatten
from sam3lt_jax.training.optimizer import (
  OptimizerConfig,
  layer_factors,
  make_optimizer,
  make_schedule,
  rate_factors,
)
from tests import tiny


def constant(**kwargs):
  """A rate of 0.5 throughout, no clipping and no weight decay."""
  return OptimizerConfig(
    **{"peak_lr": 0.5, "end_lr": 0.5, "warmup_init_lr": 0.5, "total_steps": 10, "weight_decay": 0.0}
    | {"clip_norm": None}
    | kwargs
  )


def first_update(config, params, grads):
  tx, _ = make_optimizer(config, params)
  return tx.update(grads, tx.init(params), params)[0]


def test_schedule_rises_in_a_line_and_falls_along_a_cosine():
  config = OptimizerConfig(peak_lr=1.0, end_lr=0.2, warmup_init_lr=0.0, warmup_steps=4, total_steps=12)
  schedule = make_schedule(config)
  got = [float(schedule(count)) for count in (0, 2, 4, 8, 12, 500)]
  # Half of the warm-up, then half of the cosine: (1 + 0.2) / 2.
  np.testing.assert_allclose(got, [0, 0.5, 1, 0.6, 0.2, 0.2], atol=1e-6)
  # A third of the cosine: cos(60 degrees) = 1/2, so 0.2 + 0.8 * 0.75.
  config = OptimizerConfig(peak_lr=1.0, end_lr=0.2, total_steps=3)
  assert float(make_schedule(config)(1)) == pytest.approx(0.8, abs=1e-6)


def test_the_authors_cosine_runs_under_the_warm_up():
  config = OptimizerConfig(
    peak_lr=1.0, end_lr=0.2, warmup_init_lr=0.0, warmup_steps=4, total_steps=12, whole_cosine=True
  )
  got = [float(make_schedule(config)(count)) for count in (0, 2, 3, 4, 6, 12, 500)]
  # At 4 of 12 updates a third of the cosine is over: cos(60 degrees) = 1/2, so 0.2 + 0.8 * 0.75.
  np.testing.assert_allclose(got, [0, 0.5, 0.75, 0.8, 0.6, 0.2, 0.2], atol=1e-6)


def test_schedule_without_warm_up_starts_at_the_peak_and_may_be_all_warm_up():
  assert float(make_schedule(OptimizerConfig(peak_lr=3e-3, total_steps=5))(0)) == pytest.approx(3e-3)
  all_warm = make_schedule(OptimizerConfig(peak_lr=1.0, warmup_init_lr=0.0, warmup_steps=4, total_steps=4))
  assert [float(all_warm(i)) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]


def test_schedule_takes_an_array_and_is_float32():
  rate = make_schedule(OptimizerConfig(peak_lr=1.0, total_steps=4))(jnp.arange(3))
  assert rate.shape == (3,) and rate.dtype == jnp.float32


@pytest.mark.parametrize(
  "name, value",
  [
    ("peak_lr", 0.0), ("peak_lr", float("nan")), ("end_lr", -1.0), ("total_steps", 0), ("warmup_steps", 11),
    ("b1", 1.0), ("b2", -0.1), ("eps", 0.0), ("clip_norm", 0.0), ("accumulate", 0), ("layer_decay", 1.5),
    ("layer_decay", 0.0), ("ema_decay", 1.0), ("weight_decay", -0.1), ("muon_rms", 0.0),
    ("lr_scale", (("a", -1.0),)), ("moment_dtype", "float16"),
  ],
)  # fmt: skip
def test_a_number_out_of_range_is_named(name, value):
  with pytest.raises(ValueError, match=rf"^{name}=.*accepted: "):
    OptimizerConfig(**{"peak_lr": 1.0, "total_steps": 10} | {name: value})


def test_first_update_of_adam_is_the_rate_times_the_sign():
  params = {"a": {"kernel": np.ones((2, 2), np.float32)}}
  grads = {"a": {"kernel": np.array([[3.0, -0.1], [20, -7]], np.float32)}}
  np.testing.assert_allclose(
    first_update(constant(), params, grads)["a"]["kernel"], [[-0.5, 0.5], [-0.5, 0.5]], rtol=1e-5
  )


def test_the_mean_of_gradients_may_be_bfloat16():
  params = {"a": {"kernel": np.ones((2, 2), np.float32)}}
  grads = {"a": {"kernel": np.array([[3.0, -0.1], [20, -7]], np.float32)}}
  states, updates = {}, {}
  for dtype in ("float32", "bfloat16"):
    tx, _ = make_optimizer(constant(moment_dtype=dtype), params)
    updates[dtype], states[dtype] = tx.update(grads, tx.init(params), params)
  small, large = (
    [x for x in jax.tree.leaves(states[d]) if jnp.ndim(x) == 2] for d in ("bfloat16", "float32")
  )
  assert [x.dtype for x in small] == [jnp.bfloat16, jnp.float32]  # the mean, the mean of squares
  assert [x.dtype for x in large] == [jnp.float32, jnp.float32]
  for a, b in zip(jax.tree.leaves(updates["bfloat16"]), jax.tree.leaves(updates["float32"]), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=2**-8)


def test_muon_makes_the_matrices_of_layers_orthogonal():
  rng = np.random.default_rng(0)
  grads = {
    "layers_0": {"kernel": rng.normal(size=(6, 12)), "bias": rng.normal(size=12)},
    "head": {"kernel": rng.normal(size=(4, 4))},
  }
  grads = jax.tree.map(np.float32, grads)
  params = jax.tree.map(np.ones_like, grads)
  update = first_update(constant(muon_rms=0.2), params, grads)
  kernel = np.array(update["layers_0"]["kernel"], np.float64)
  assert np.sqrt((kernel**2).mean()) == pytest.approx(0.5 * 0.2, rel=0.2)  # Newton-Schulz is rough
  singular = np.linalg.svd(kernel, compute_uv=False)
  assert (
    singular.max() / singular.min() < 2 < np.divide(*np.linalg.svd(grads["layers_0"]["kernel"])[1][[0, -1]])
  )
  assert np.sum(kernel * grads["layers_0"]["kernel"]) < 0  # downhill
  np.testing.assert_allclose(update["layers_0"]["bias"], -0.5 * np.sign(grads["layers_0"]["bias"]), rtol=1e-5)
  np.testing.assert_allclose(update["head"]["kernel"], -0.5 * np.sign(grads["head"]["kernel"]), rtol=1e-5)


def test_muon_is_for_the_paths_that_are_named():
  matrix = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
  grads = {"detr_encoder": {"layers_0": {"kernel": matrix}}, "text_encoder": {"layers_0": {"kernel": matrix}}}
  params = jax.tree.map(np.ones_like, grads)
  update = first_update(constant(muon_rms=0.2, muon_for="detr_.*/layers_"), params, grads)
  adam, muon = (update[name]["layers_0"]["kernel"] for name in ("text_encoder", "detr_encoder"))
  np.testing.assert_allclose(adam, -0.5 * np.sign(matrix), rtol=1e-5)
  assert np.sqrt((muon**2).mean()) == pytest.approx(0.1, rel=0.2)


def test_weight_decay_is_for_matrices_only():
  params = {"kernel": np.full((2, 3), 4.0, np.float32), "bias": np.full(3, 4.0, np.float32)}
  update = first_update(constant(weight_decay=0.1), params, {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)})
  np.testing.assert_allclose(update["kernel"], -0.5 * 0.1 * 4.0, rtol=1e-6)
  assert not np.any(update["bias"])


def test_clipping_is_by_the_global_norm():
  # b1 = b2 = 0 and eps = 1 make Adam g / (|g| + 1). (3, 4) has norm 5 and becomes (0.6, 0.8).
  config = constant(clip_norm=1.0, b1=0.0, b2=0.0, eps=1.0)
  grads = {"a": np.array([3.0], np.float32), "b": np.array([4.0], np.float32)}
  update = first_update(config, {"a": np.zeros(1), "b": np.zeros(1)}, grads)
  np.testing.assert_allclose(
    [update["a"][0], update["b"][0]], [-0.5 * 0.6 / 1.6, -0.5 * 0.8 / 1.8], rtol=1e-5
  )


def test_rates_by_name_multiply_and_hold_for_weight_decay():
  params = {"head": {"kernel": np.ones((1, 1), np.float32)}, "trunk": {"kernel": np.ones((1, 1), np.float32)}}
  config = constant(weight_decay=0.1, lr_scale=(("^head/", 0.1), ("kernel$", 2.0)))
  assert rate_factors(config, params) == {"head/kernel": pytest.approx(0.2), "trunk/kernel": 2.0}
  update = first_update(
    config, params, {"head": {"kernel": np.ones((1, 1))}, "trunk": {"kernel": np.ones((1, 1))}}
  )
  np.testing.assert_allclose(update["head"]["kernel"], -0.5 * 0.2 * 1.1, rtol=1e-5)
  np.testing.assert_allclose(update["trunk"]["kernel"], -0.5 * 2.0 * 1.1, rtol=1e-5)


def test_a_pattern_that_finds_nothing_is_an_error():
  with pytest.raises(ValueError, match=r"lr_scale: 'txet' finds none .*head/bias"):
    make_optimizer(constant(lr_scale=(("txet", 0.1),)), {"head": {"bias": np.zeros(1)}})
  with pytest.raises(ValueError, match=r"lr_scale: '\(' is no regular expression"):
    make_optimizer(constant(lr_scale=(("(", 0.1),)), {"head": {"bias": np.zeros(1)}})


def test_layer_decay_by_the_names_of_the_model():
  _, variables = tiny.load(tiny.config())
  factors = layer_factors(variables["params"], 0.5)
  assert set(factors) == set(flatten(variables["params"]))
  expected = {  # 3 text layers and 2 of the image: the top of each has depth 4 and 3
    "text_encoder/embeddings/token_embedding/embedding": 0.5**4,
    "text_encoder/layers_0/layer_scale": 0.5**3,
    "text_encoder/layers_1/self_attn/q_proj/kernel": 0.5**2,
    "text_encoder/layers_2/layer_scale": 0.5**1,
    "text_encoder/final_layer_norm/scale": 1.0,
    "text_encoder/projection/kernel": 1.0,
    "text_projection/kernel": 1.0,
    "vision_encoder/backbone/embeddings/patch_embeddings/projection/kernel": 0.5**3,
    "vision_encoder/backbone/embeddings/position_embeddings": 1.0,
    "vision_encoder/backbone/layers_0/attention/q_proj/kernel": 0.5**2,
    "vision_encoder/backbone/layers_1/mlp/fc1/bias": 0.5**1,
    "vision_encoder/backbone/layer_norm/scale": 0.5**3,
    "vision_encoder/neck/fpn_layers_0/proj1/kernel": 1.0,
    "detr_decoder/layers_0/mlp/fc1/kernel": 1.0,
    "mask_decoder/mask_embedder/layers_0/kernel": 1.0,
  }
  assert {path: factors[path] for path in expected} == expected


def test_layer_decay_of_an_encoder_alone_and_of_its_upper_layers():
  leaf = {"kernel": np.zeros((1, 1))}
  alone = {"embeddings": leaf, "layers_0": leaf, "layers_1": leaf, "projection": leaf}
  assert layer_factors(alone, 0.9) == {
    "embeddings/kernel": 0.9**3, "layers_0/kernel": 0.9**2, "layers_1/kernel": 0.9, "projection/kernel": 1.0
  }  # fmt: skip
  # Frozen below: the trained layers keep their factors.
  assert layer_factors({"text_encoder": {"layers_1": leaf}}, 0.9) == {"text_encoder/layers_1/kernel": 0.9}


def test_layer_decay_reaches_the_updates_and_needs_layers():
  leaf = {"kernel": np.zeros((1, 1), np.float32)}
  params = {"layers_0": leaf, "projection": leaf}
  grads = {"layers_0": {"kernel": np.ones((1, 1))}, "projection": {"kernel": np.ones((1, 1))}}
  update = first_update(constant(layer_decay=0.8), params, grads)
  ratio = update["layers_0"]["kernel"] / update["projection"]["kernel"]
  np.testing.assert_allclose(ratio, 0.8, rtol=1e-6)
  with pytest.raises(ValueError, match=r"layer_decay=0.9: none of the trainable .*: head"):
    make_optimizer(constant(layer_decay=0.9), {"head": leaf})
