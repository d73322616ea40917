"""Layers: the defaults on which flax and torch disagree, and torch's own layers."""

import einops
import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.nn import layers, text_encoder
from sam3lt_jax.ops import amx, target
from tests import tiny


def normal(*shape, seed=0, scale=1.0):
  return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def randomised(module, *args, seed=0):
  """Parameters of `module`, all of them active."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(tree, [rng.normal(0, 0.3, x.shape).astype(x.dtype) for x in leaves])


def run(module, params, *args):
  return tiny.jit(module.apply)({"params": params}, *args)


def test_gelu_is_exact():
  """x Phi(x): at 1, 0.841345 by tables; the tanh approximation gives 0.841192."""
  np.testing.assert_allclose(layers.gelu(jnp.asarray([1.0, -2.0])), [0.8413447, -0.0455003], atol=1e-6)


def test_gelu_in_bfloat16_is_rounded_once():
  x = jnp.linspace(-6, 6, 4001).astype(jnp.bfloat16)
  wanted = layers.gelu(x.astype(jnp.float32)).astype(jnp.bfloat16)
  np.testing.assert_array_equal(layers.gelu(x), wanted)


def test_layer_norm_is_the_same_in_two_pieces(monkeypatch):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)
  params = {"scale": jnp.linspace(0.5, 2, 64), "bias": jnp.linspace(-1, 1, 64)}

  def result(has_it):
    monkeypatch.setattr(amx, "available", lambda: has_it)
    norm = lambda x: layers.LayerNorm().apply({"params": params}, x)  # noqa: E731, a new one: traces are kept
    assert ("optimization_barrier" in str(jax.make_jaxpr(norm)(x))) == has_it
    return norm(x), jax.grad(lambda x: jnp.sum(jnp.sin(norm(x))))(x)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), result(False), result(True))


def test_layer_norm_epsilon_is_torchs():
  """Values +-e with e^2 = 1e-5 = the default epsilon: variance and epsilon weigh the same, so 1 / sqrt(2)."""
  e = np.sqrt(1e-5)
  x = jnp.asarray([e, -e], jnp.float32)
  params = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
  np.testing.assert_allclose(run(layers.LayerNorm(), params, x), [np.sqrt(0.5), -np.sqrt(0.5)], rtol=1e-5)
  np.testing.assert_allclose(run(layers.LayerNorm(3e-5), params, x), [0.5, -0.5], rtol=1e-5)


def test_layer_norm_statistics_are_float32_in_bfloat16():
  """bfloat16 cannot hold the mean of 256..258 (its step there is 2); float32 statistics can."""
  x = jnp.asarray([[256.0, 256.0, 256.0, 258.0]], jnp.bfloat16)
  norm = layers.LayerNorm(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  out = run(norm, {"scale": jnp.ones(4, jnp.bfloat16), "bias": jnp.zeros(4, jnp.bfloat16)}, x)
  assert out.dtype == jnp.bfloat16
  third = 1 / np.sqrt(3)
  np.testing.assert_allclose(np.asarray(out[0], np.float32), [-third, -third, -third, 3 * third], rtol=4e-3)


def test_layer_norm_does_not_cancel():
  """A mean a thousand times the deviation: E[x^2] - E[x]^2 in float32 would be off by percents."""
  x = 1000 + normal(4, 64)
  out = run(layers.LayerNorm(), {"scale": jnp.ones(64), "bias": jnp.zeros(64)}, x)
  exact = np.asarray(x, np.float64)
  exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(out, exact, atol=2e-4)


@pytest.mark.parametrize(
  "module, kernel, shape",
  [
    (layers.Dense, (4096, 2), (1, 4096)),
    (layers.PatchConv, (32, 32, 4, 2), (1, 32, 32, 4)),
    (layers.DoublingConv, (2, 2, 4096, 2), (1, 1, 1, 4096)),
    (layers.Conv, (1, 1, 4096, 2), (1, 1, 1, 4096)),
  ],
)
def test_products_accumulate_in_float32(module, kernel, shape):
  """4096 ones: a bfloat16 sum would stop at 256, where the step becomes 2."""
  bf16 = jnp.bfloat16
  extra = {layers.PatchConv: (32,), layers.Conv: (1,)}.get(module, ())
  params = {"kernel": jnp.ones(kernel, bf16)}
  if module is not layers.PatchConv:
    params["bias"] = jnp.zeros(2, bf16)
  layer = module(2, *extra, dtype=bf16, param_dtype=bf16)
  out = run(layer, params, jnp.ones(shape, bf16))
  assert out.dtype == bf16
  np.testing.assert_array_equal(np.asarray(out, np.float32), np.full(out.shape, 4096))
  if module is layers.Dense:
    jaxpr = str(jax.make_jaxpr(layer.apply)({"params": params}, jnp.ones(shape, bf16)))
    assert "preferred_element_type=float32" in jaxpr


def test_parameters_are_stored_and_computed_as_asked():
  x = jnp.ones((1, 3))
  layer = layers.Dense(2, dtype=jnp.bfloat16, param_dtype=jnp.float32)
  variables = layer.init(jax.random.key(0), x)
  assert variables["params"]["kernel"].dtype == jnp.float32
  assert layer.apply(variables, x).dtype == jnp.bfloat16
  layer = layers.Dense(2, dtype=jnp.float32, param_dtype=jnp.bfloat16)
  variables = layer.init(jax.random.key(0), x)
  assert variables["params"]["kernel"].dtype == jnp.bfloat16
  assert layer.apply(variables, x).dtype == jnp.float32


def test_what_is_read_is_checked_without_tracing_its_initialiser(monkeypatch):
  monkeypatch.setattr(layers.nn.initializers, "xavier_uniform", lambda: lambda *_: pytest.fail("traced"))
  params = {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}
  module = layers.Dense(4)
  with pytest.raises(flax.errors.ScopeParamShapeError, match=r"shape \(2, 4\), .* shape \(3, 4\)"):
    module.apply({"params": params}, jnp.ones((1, 2)))
  assert module.apply({"params": params}, jnp.ones((1, 3))).shape == (1, 4)


def test_relu_mlp_names_its_layers_and_has_no_activation_at_the_end():
  mlp = layers.ReluMlp((2, 1), prefix="layers_", first=0)
  params = {
    "layers_0": {"kernel": jnp.asarray([[1.0, -1.0]]), "bias": jnp.zeros(2)},
    "layers_1": {"kernel": jnp.asarray([[-1.0], [5.0]]), "bias": jnp.asarray([-1.0])},
  }
  np.testing.assert_array_equal(run(mlp, params, jnp.asarray([[2.0]])), [[-3.0]])  # 5 * relu(-2) is 0
  assert set(layers.ReluMlp((2, 1)).init(jax.random.key(0), jnp.ones((1, 1)))["params"]) == {
    "layer1",
    "layer2",
  }


def test_depthwise_convolution_by_hand():
  """Taps 1, 10, 100 over 1, 2, 3: correlation, as torch, with a zero on either side."""
  params = {"kernel": jnp.asarray([1.0, 10.0, 100.0]).reshape(3, 1, 1)}
  out = run(text_encoder.DepthwiseConv(3), params, jnp.asarray([1.0, 2.0, 3.0]).reshape(1, 3, 1))
  np.testing.assert_allclose(out[0, :, 0], [210, 321, 32])


def test_doubling_convolution_by_hand():
  params = {"kernel": jnp.asarray([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1), "bias": jnp.asarray([0.5])}
  out = run(layers.DoublingConv(1), params, jnp.asarray([[1.0, 10.0]]).reshape(1, 1, 2, 1))
  np.testing.assert_allclose(out[0, 0, :, :, 0], [[1.5, 2.5, 3.5, 4.5], [10.5, 20.5, 30.5, 40.5]])


def test_attention_heads_must_divide_the_width():
  with pytest.raises(ValueError, match="5 heads for width 16"):
    layers.Attention(5).init(jax.random.key(0), *[jnp.ones((1, 2, 16))] * 3)


def test_taps_collect_only_when_asked():
  collected = {}
  layers.tap(None, "x", 1)
  layers.tap(collected, "x", 2)
  assert collected == {"x": 2}


def to_torch(torch, a):
  return torch.from_numpy(np.array(a))


@pytest.mark.torch
def test_convolutions_equal_torch():
  torch = pytest.importorskip("torch")
  F = torch.nn.functional
  x = normal(2, 6, 6, 5)
  nchw = to_torch(torch, x).permute(0, 3, 1, 2)

  def compare(layer, wanted):
    params = randomised(layer, x)
    kernel = to_torch(torch, params["kernel"])
    bias = to_torch(torch, params["bias"]) if "bias" in params else None
    out = run(layer, params, x)
    if out.ndim == 5:
      out = einops.rearrange(out, "b h w (a c) d -> b (h a) (w c) d", a=2, c=2)
    np.testing.assert_allclose(out, wanted(kernel, bias).permute(0, 2, 3, 1), atol=2e-5)

  oihw, iohw = (3, 2, 0, 1), (2, 3, 0, 1)
  compare(layers.Conv(4, 3), lambda w, b: F.conv2d(nchw, w.permute(oihw), b, padding=1))
  compare(layers.Conv(4, 1), lambda w, b: F.conv2d(nchw, w.permute(oihw), b))
  compare(layers.Conv(4, 5, padding="VALID"), lambda w, b: F.conv2d(nchw, w.permute(oihw), b))
  compare(layers.PatchConv(4, 3), lambda w, b: F.conv2d(nchw, w.permute(oihw), stride=3))
  compare(layers.DoublingConv(4), lambda w, b: F.conv_transpose2d(nchw, w.permute(iohw), b, stride=2))


@pytest.mark.torch
@pytest.mark.parametrize("use_bias", [False, True])
def test_depthwise_convolution_equals_torch(use_bias):
  torch = pytest.importorskip("torch")
  x = normal(2, 7, 6)
  layer = text_encoder.DepthwiseConv(11, use_bias=use_bias)
  params = randomised(layer, x)
  weight = to_torch(torch, params["kernel"]).permute(2, 1, 0)  # [K, 1, D] -> [D, 1, K]
  bias = to_torch(torch, params["bias"]) if use_bias else None
  wanted = torch.nn.functional.conv1d(to_torch(torch, x).transpose(1, 2), weight, bias, padding=5, groups=6)
  np.testing.assert_allclose(run(layer, params, x), wanted.transpose(1, 2), atol=1e-5)


@pytest.mark.torch
def test_norms_and_gelu_equal_torch():
  torch = pytest.importorskip("torch")
  F = torch.nn.functional
  x = normal(3, 4, 8, scale=2)
  params = randomised(layers.LayerNorm(), x)
  scale, bias = (to_torch(torch, params[k]) for k in ("scale", "bias"))
  wanted = F.layer_norm(to_torch(torch, x), (8,), scale, bias)
  np.testing.assert_allclose(run(layers.LayerNorm(), params, x), wanted, atol=1e-6)
  np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), F.gelu(to_torch(torch, x)), atol=1e-6)


@pytest.mark.torch
def test_attention_equals_torch():
  torch = pytest.importorskip("torch")
  q, k, v = normal(2, 5, 8), normal(2, 7, 8, seed=1), normal(2, 7, 8, seed=2)
  mask = np.arange(7) < np.array([[7], [4]])
  layer = layers.Attention(2)
  params = randomised(layer, q, k, v)
  theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
  names = ("q_proj", "k_proj", "v_proj")
  with torch.no_grad():
    theirs.in_proj_weight.copy_(torch.cat([to_torch(torch, params[n]["kernel"]).T for n in names]))
    theirs.in_proj_bias.copy_(torch.cat([to_torch(torch, params[n]["bias"]) for n in names]))
    theirs.out_proj.weight.copy_(to_torch(torch, params["o_proj"]["kernel"]).T)
    theirs.out_proj.bias.copy_(to_torch(torch, params["o_proj"]["bias"]))
    hidden = to_torch(torch, ~mask)  # torch: True = do not attend
    wanted, _ = theirs(*(to_torch(torch, a) for a in (q, k, v)), key_padding_mask=hidden)
  np.testing.assert_allclose(run(layer, params, q, k, v, mask[:, None, None]), wanted, atol=1e-5)


def test_group_norm_of_the_pixel_decoder_is_torchs():
  """Epsilon 1e-5 (flax: 1e-6), groups over neighbouring channels and the whole map, no fast variance."""
  from sam3lt_jax.nn.mask_decoder import PixelDecoder

  decoder = PixelDecoder(features=8, num_stages=1, num_groups=2)
  maps = (100 + normal(1, 4, 4, 8), normal(1, 2, 2, 8, seed=1))
  params = randomised(decoder, maps[:1], maps[1])
  delta = np.zeros((3, 3, 8, 8), np.float32)
  delta[1, 1] = np.eye(8)
  params["conv_layers_0"] = {"kernel": delta, "bias": np.zeros(8, np.float32)}
  x = maps[0].astype(np.float64) + maps[1].repeat(2, axis=1).repeat(2, axis=2)
  groups = x.reshape(1, 16, 2, 4)
  mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
  normed = ((groups - mean) / np.sqrt(var + 1e-5)).reshape(1, 4, 4, 8)
  wanted = np.maximum(normed * params["norms_0"]["scale"] + params["norms_0"]["bias"], 0)
  np.testing.assert_allclose(run(decoder, params, maps[:1], maps[1]), wanted, atol=1e-4)


def test_convolution_of_a_doubled_map_by_amx(monkeypatch):
  from sam3lt_jax.nn.layers import Conv

  conv, x = Conv(5, 3, dtype=jnp.bfloat16), normal(2, 3, 4, 4)
  params = conv.init(jax.random.key(0), x)["params"]
  double = lambda has_it: (  # noqa: E731, a new one: traces are kept
    monkeypatch.setattr(amx, "available", lambda: has_it)
    or conv.apply({"params": params}, x, method="of_doubled").astype(np.float32)
  )
  wanted = double(False)
  assert np.abs(wanted).max() > 1
  np.testing.assert_allclose(double(True), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (4, 1)])
def test_convolution_of_a_doubled_map(shape, platform):
  """2x2 kernels of sums on the small map = the 3x3 kernel on the doubled one, borders and gradients too."""
  from sam3lt_jax.nn.layers import Conv

  conv, x = Conv(5, 3), normal(2, *shape, 4)
  params = conv.init(jax.random.key(0), x)["params"]  # with a bias of zeros
  plain = lambda x: conv.apply({"params": params}, x.repeat(2, axis=1).repeat(2, axis=2))  # noqa: E731
  form = lambda x: conv.apply({"params": params}, x, method="of_doubled")  # noqa: E731
  weights = normal(2, 2 * shape[0], 2 * shape[1], 5, seed=1)
  x = jnp.asarray(x)
  with target.traced_for([platform]):
    got, back = form(x), jax.jit(jax.grad(lambda x: (form(x) * weights).sum()))(x)
  assert got.shape == weights.shape
  np.testing.assert_allclose(got, plain(x), atol=1e-5)
  np.testing.assert_allclose(back, jax.grad(lambda x: (plain(x) * weights).sum())(x), atol=1e-4)


def test_batch_norm_moves_by_a_tenth():
  """torch's momentum 0.1 of the new value is flax's 0.9 of the old one."""
  block = text_encoder.MobileOneBlock(3, 1e-5)
  x = normal(4, 5, 2, scale=2) + 1
  variables = block.init(jax.random.key(0), x, True)
  _, updated = block.apply(variables, x, False, mutable=["batch_stats"])
  skip = updated["batch_stats"]["batchnorm_skip"]
  np.testing.assert_allclose(skip["mean"], 0.1 * x.mean((0, 1)), atol=1e-6)
  unbiased = x.var((0, 1), ddof=1)  # torch's choice, see test_batch_norm
  np.testing.assert_allclose(skip["var"], 0.9 + 0.1 * unbiased, atol=1e-5)


def test_no_layer_relies_on_flaxs_own_defaults():
  """Every LayerNorm and Dense of the library is ours, with its defaults spelled out."""
  import pathlib

  import sam3lt_jax

  for file in (pathlib.Path(sam3lt_jax.__file__).parent / "nn").glob("*.py"):
    source = file.read_text(encoding="utf-8")
    for name in ("nn.LayerNorm", "nn.Dense(", "nn.Conv(", "nn.gelu(x)", "nn.MultiHead"):
      assert name not in source, f"{file.name} uses flax's {name}"
  assert nn.LayerNorm().epsilon != layers.LayerNorm().epsilon


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.1)])
def test_queries_that_read_a_convolved_map_need_not_convolve_it(dtype, tolerance):
  from sam3lt_jax.nn.layers import Conv

  x, queries = normal(2, 4, 5, 3), normal(2, 7, 6, seed=1)
  params = {"kernel": normal(1, 1, 3, 6, seed=2), "bias": normal(6, seed=3)}
  wanted = np.einsum("bqf,bhwf->bqhw", queries, Conv(6, 1).apply({"params": params}, x))
  got = Conv(6, 1, dtype=dtype).apply({"params": params}, queries, x, method="read_by")
  assert got.dtype == np.float32 and got.shape == (2, 7, 4, 5)
  np.testing.assert_allclose(got, wanted, atol=tolerance)
