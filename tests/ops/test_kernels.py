"""Kernels of other platforms: splash attention in Pallas' TPU interpreter, cuDNN's by what it is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from sam3lt_jax.ops import attention, kernels


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch):
  monkeypatch.setattr(kernels, "_asked_for", None)
  monkeypatch.delenv(kernels.VARIABLE, raising=False)


def qkv(B, T, S, N, H, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(B, n, N, H)), dtype) for n in (T, S, S))


def shapes(B, T, S, N, H, dtype=jnp.bfloat16):
  return tuple(jax.ShapeDtypeStruct((B, n, N, H), dtype) for n in (T, S, S))


@pytest.mark.parametrize(
  "shape, dtype, tolerance",
  [
    ((2, 192, 192, 2, 64), jnp.float32, 2e-6),
    ((1, 70, 300, 3, 32), jnp.float32, 2e-6),
    ((1, 64, 130, 2, 64), jnp.bfloat16, 0.02),
  ],
)
def test_splash_attention_is_attention(shape, dtype, tolerance):
  q, k, v = qkv(*shape, dtype)
  with pltpu.force_tpu_interpret_mode():
    got = jax.jit(kernels.splash)(q, k, v)
  assert got.dtype == dtype
  wanted = attention.attend(q, k, v, blocked=False)
  np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wanted, np.float32), atol=tolerance)


def test_splash_attention_has_the_gradient_of_attention():
  q, k, v = qkv(1, 70, 130, 1, 32)

  def loss(attend, *args):
    return jnp.sum(jnp.sin(attend(*args)))

  with pltpu.force_tpu_interpret_mode():
    got = jax.jit(jax.grad(functools.partial(loss, kernels.splash), argnums=(0, 1, 2)))(q, k, v)
  wanted = jax.grad(functools.partial(loss, attention.attend), argnums=(0, 1, 2))(q, k, v)
  for a, b in zip(got, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("tokens", [576, 5184])  # a window and the whole image
def test_splash_attention_lowers_for_a_tpu(tokens):
  args = shapes(2, tokens, tokens, 16, 64)
  text = export.export(jax.jit(kernels.splash), platforms=["tpu"])(*args).mlir_module()
  assert "tpu_custom_call" in text
  assert f"32x{5376 if tokens == 5184 else 640}x64" in text


def test_blocks_pad_little():
  assert [kernels._block(n) for n in (1, 128, 576, 1024, 5184)] == [128, 128, 640, 1024, 896]
  assert all(-n % kernels._block(n) <= 0.14 * n + 128 for n in range(1, 9000, 37))


@pytest.mark.parametrize(
  "asked, platform, dtype, width, tokens, wanted",
  [
    ("xla", "gpu", "bfloat16", 64, 5184, None),
    ("auto", "cpu", "bfloat16", 64, 5184, None),
    ("auto", "gpu", "bfloat16", 64, 5184, kernels.cudnn),
    ("auto", "gpu", "float32", 64, 5184, None),
    ("auto", "gpu", "bfloat16", 60, 5184, None),
    ("auto", "gpu", "bfloat16", 64, 200, None),
    ("splash", "gpu", "bfloat16", 64, 5184, None),
    ("auto", "tpu", "float32", 64, 576, kernels.splash),
    ("cudnn", "tpu", "bfloat16", 64, 5184, None),
  ],
)
def test_chosen_by_platform_and_shape(asked, platform, dtype, width, tokens, wanted, monkeypatch):
  monkeypatch.setattr(kernels, "_has_cudnn", lambda: True)
  kernels.use(asked)
  q, k, _ = shapes(1, tokens, tokens, 2, width, jnp.dtype(dtype))
  assert kernels.chosen(q, k, [platform]) is wanted
  assert kernels.chosen(q, k, [platform, "cpu"]) is None


def test_the_environment_asks_as_well(monkeypatch):
  q, k, _ = shapes(1, 576, 576, 2, 64)
  assert kernels.chosen(q, k, ["tpu"]) is None
  monkeypatch.setenv(kernels.VARIABLE, "auto")
  assert kernels.chosen(q, k, ["tpu"]) is kernels.splash
  monkeypatch.setenv(kernels.VARIABLE, "flash")
  with pytest.raises(ValueError, match="SAM3LT_ATTENTION must be one of xla, auto"):
    kernels.chosen(q, k, ["tpu"])
  with pytest.raises(ValueError, match=r"name must be one of .* got 'flash'"):
    kernels.use("flash")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="here it may be there")
def test_no_cudnn_without_a_gpu():
  kernels._has_cudnn.cache_clear()
  assert not kernels._has_cudnn()


def test_cudnn_is_given_what_attention_means(monkeypatch):
  """The same call with JAX's own implementation in cuDNN's place."""
  asked = []
  library = jax.nn.dot_product_attention

  def stand_in(*args, implementation):
    asked.append(implementation)
    return library(*args, implementation="xla")

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  q, k, v = qkv(2, 30, 40, 2, 8)
  np.testing.assert_allclose(kernels.cudnn(q, k, v), attention.attend(q, k, v), atol=2e-6)
  assert asked == ["cudnn"]


def test_attention_goes_through_the_kernel(monkeypatch):
  monkeypatch.setattr(kernels, "MIN_TOKENS", 64)
  kernels.use("auto")
  q, k, v = qkv(1, 64, 64, 2, 32)
  with attention.traced_for(["tpu"]), pltpu.force_tpu_interpret_mode():
    got = jax.jit(lambda *args: attention.attend(*args))(q, k, v)
    plain = str(
      jax.make_jaxpr(lambda *args: attention.attend(*args, mask=jnp.ones((1, 1, 1, 64), bool)))(q, k, v)
    )
    kernel = str(jax.make_jaxpr(lambda *args: attention.attend(*args))(q, k, v))
  assert "pallas_call" in kernel and "pallas_call" not in plain
  np.testing.assert_allclose(got, attention.attend(q, k, v), atol=2e-6)
