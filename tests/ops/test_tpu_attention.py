"""The TPU's attention kernels in Pallas' TPU interpreter, against the plain formulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental.pallas import tpu as pltpu

from sam3lt_jax.ops import attention, rope, tpu_attention, windows


def qkv(B, T, S, N, H, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(B, n, N, H)), dtype) for n in (T, S, S))


def maps(*shape, dtype=jnp.float32):
  rng = np.random.default_rng(1)
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))


def plain(q, k, v, tables, num_heads, window):
  """Partition, rotate, attend, merge: as `RopeAttention` does it without the kernel."""
  _, H, W, D = q.shape
  window = window or H
  q, k, v = (windows.partition(x, window) for x in (q, k, v))
  q, k, v = (x.reshape(-1, window**2, num_heads, D // num_heads) for x in (q, k, v))
  if tables is not None:
    q, k = (rope.apply_rope(x, *tables) for x in (q, k))
  out = attention.attend(q, k, v, blocked=False)
  return windows.merge(out.reshape(*out.shape[:2], D), window, H, W)


@pytest.mark.parametrize(
  "shape, heads, window, rotated, dtype, tolerance",
  [
    ((2, 16, 16, 128), 2, 8, True, jnp.float32, 2e-6),
    ((1, 16, 24, 256), 4, 8, True, jnp.float32, 2e-6),  # heads of 64, two groups of lanes, 2 x 3 windows
    ((2, 24, 24, 128), 4, 0, True, jnp.float32, 2e-6),  # heads of 32
    ((1, 16, 16, 128), 8, 0, False, jnp.float32, 2e-6),  # heads of 16
    ((1, 16, 16, 128), 2, 8, True, jnp.bfloat16, 0.02),
  ],
)
def test_attention_in_windows(shape, heads, window, rotated, dtype, tolerance, monkeypatch):
  monkeypatch.setattr(tpu_attention, "_SCORES_BYTES", 4 * 576 * 100)  # several blocks of queries
  tables = rope.axial_rope(window or shape[1], shape[3] // heads, 1e4) if rotated else None
  q, k, v = maps(*shape, dtype=dtype)
  attend = functools.partial(tpu_attention.attend_in_windows, tables=tables, num_heads=heads, window=window)
  with pltpu.force_tpu_interpret_mode():
    got = jax.jit(attend)(q, k, v)
  assert got.dtype == dtype and got.shape == shape
  wanted = plain(q, k, v, tables, heads, window)
  np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wanted, np.float32), atol=tolerance)


@pytest.mark.full  # 3 s
def test_attention_in_windows_has_the_gradient_of_attention():
  tables = rope.axial_rope(8, 64, 1e4)
  args = maps(1, 8, 16, 128)

  def loss(attend, *args):
    return jnp.sum(jnp.sin(attend(*args)))

  ours = functools.partial(tpu_attention.attend_in_windows, tables=tables, num_heads=2, window=8)
  theirs = functools.partial(plain, tables=tables, num_heads=2, window=8)
  with pltpu.force_tpu_interpret_mode():
    got = jax.jit(jax.grad(functools.partial(loss, ours), argnums=(0, 1, 2)))(*args)
  wanted = jax.grad(functools.partial(loss, theirs), argnums=(0, 1, 2))(*args)
  for a, b in zip(got, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype, asked", [(jnp.bfloat16, False), (jnp.float32, True)])
def test_the_precision_that_jax_is_set_to_is_not_asked_of_16_bits(dtype, asked):
  """Mosaic refuses it: "Bad lhs type"."""

  def gradient(attend, *args):
    return str(jax.make_jaxpr(jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum(), argnums=0))(*args))

  windows_of_8 = functools.partial(tpu_attention.attend_in_windows, num_heads=2, window=8)
  with jax.default_matmul_precision("highest"):
    for text in (
      gradient(windows_of_8, *maps(1, 16, 16, 128, dtype=dtype)),
      gradient(tpu_attention.attend, *qkv(1, 100, 100, 2, 64, dtype)),  # by splash attention
    ):
      assert "pallas_call" in text and ("HIGHEST" in text) == asked


def test_attention_without_a_grid_takes_the_same_kernel_where_it_fits():
  q, k, v = qkv(1, 128, 128, 4, 32, jnp.bfloat16)
  text = str(jax.make_jaxpr(tpu_attention.attend)(q, k, v))
  assert "windowed_attention" in text and "splash" not in text
  with pltpu.force_tpu_interpret_mode():
    got = jax.jit(tpu_attention.attend)(q, k, v)
  wanted = attention.attend(q, k, v, blocked=False)
  np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wanted, np.float32), atol=0.02)
  for other in (qkv(1, 128, 128, 4, 32), qkv(1, 128, 256, 4, 32, jnp.bfloat16), qkv(1, 100, 100, 4, 32)):
    assert "splash" in str(jax.make_jaxpr(tpu_attention.attend)(*other))


@pytest.mark.parametrize("window", [24, 0])
def test_attention_in_windows_lowers_for_a_tpu(window):
  x = jax.ShapeDtypeStruct((2, 72, 72, 1024), jnp.bfloat16)
  tables = rope.axial_rope(window or 72, 64, 1e4)
  attend = functools.partial(tpu_attention.attend_in_windows, tables=tables, num_heads=16, window=window)
  text = export.export(jax.jit(attend), platforms=["tpu"])(x, x, x).mlir_module()
  assert text.count("tpu_custom_call") == 1
  assert "transpose" not in text and "stablehlo.pad" not in text


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
    got = jax.jit(tpu_attention.splash)(q, k, v)
  assert got.dtype == dtype
  wanted = attention.attend(q, k, v, blocked=False)
  np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wanted, np.float32), atol=tolerance)


@pytest.mark.full  # 2 s
def test_splash_attention_has_the_gradient_of_attention():
  q, k, v = qkv(1, 70, 130, 1, 32)

  def loss(attend, *args):
    return jnp.sum(jnp.sin(attend(*args)))

  with pltpu.force_tpu_interpret_mode():
    got = jax.jit(jax.grad(functools.partial(loss, tpu_attention.splash), argnums=(0, 1, 2)))(q, k, v)
  wanted = jax.grad(functools.partial(loss, attention.attend), argnums=(0, 1, 2))(q, k, v)
  for a, b in zip(got, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("tokens", [576, 5184])  # a window and the whole image
def test_splash_attention_lowers_for_a_tpu(tokens):
  x = jax.ShapeDtypeStruct((2, tokens, 16, 64), jnp.bfloat16)
  text = export.export(jax.jit(tpu_attention.splash), platforms=["tpu"])(x, x, x).mlir_module()
  assert "tpu_custom_call" in text
  assert f"32x{5376 if tokens == 5184 else 640}x64" in text


def test_splash_blocks_pad_little():
  assert [tpu_attention._block(n) for n in (1, 128, 576, 1024, 5184)] == [128, 128, 640, 1024, 896]
  assert all(-n % tpu_attention._block(n) <= 0.14 * n + 128 for n in range(1, 9000, 37))


def biased(T, N, H, dtype=jnp.float32):
  """q, k, v, vertical, horizontal for keys on a grid of 12 x 16."""
  q, k, v = qkv(2, T, 192, N, H, dtype)
  rng = np.random.default_rng(2)
  rows, columns = (jnp.asarray(rng.normal(size=(2, N, T, n)), dtype).astype(jnp.float32) for n in (12, 16))
  return q, k, v, rows, columns


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 0.03)])
def test_attention_with_the_bias_of_a_grid(dtype, tolerance, monkeypatch):
  monkeypatch.setattr(tpu_attention, "_SCORES_BYTES", 4 * 192 * 40)  # several blocks of queries
  q, k, v, rows, columns = biased(45, 4, 64, dtype)
  with pltpu.force_tpu_interpret_mode():
    got = jax.jit(tpu_attention.attend_with_bias)(q, k, v, rows, columns)
  assert got.dtype == dtype and got.shape == q.shape
  wanted = attention.attend(q, k, v, bias=attention.GridBias(rows, columns), blocked=False)
  np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wanted, np.float32), atol=tolerance)


@pytest.mark.full  # 2 s
def test_attention_with_the_bias_of_a_grid_has_its_gradient():
  args = biased(9, 4, 32)

  def loss(attend, *args):
    return jnp.sum(jnp.sin(attend(*args)))

  def plain(q, k, v, rows, columns):
    return attention.attend(q, k, v, bias=attention.GridBias(rows, columns), blocked=False)

  with pltpu.force_tpu_interpret_mode():
    got = jax.jit(jax.grad(functools.partial(loss, tpu_attention.attend_with_bias), argnums=range(5)))(*args)
  wanted = jax.grad(functools.partial(loss, plain), argnums=range(5))(*args)
  for a, b in zip(got, wanted, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
