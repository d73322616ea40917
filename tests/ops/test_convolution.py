"""The forms of a convolution, for CPUs with AMX and for TPUs; any CPU computes them."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.nn.layers import Conv
from sam3lt_jax.ops import amx, convolution, target
from tests import tiny


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(convolution, "_PATCH_BYTES", 1500)


def normal(*shape, dtype=np.float32, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


SHAPES = pytest.mark.parametrize(
  "shape, k, padding",
  [
    ((1, 6, 5, 4), 3, 1),
    ((2, 7, 3, 4), 3, 1),
    ((1, 5, 5, 4), 2, 1),
    ((1, 9, 1, 4), 3, 1),
    ((3, 1, 1, 4), 3, 1),
  ],
)


@SHAPES
def test_products_are_the_convolution(shape, k, padding):
  """Blocks of rows that divide the map and that do not, of one row, of all of it."""
  x, kernel = normal(*shape, dtype=jnp.bfloat16), normal(k, k, 4, 6, dtype=jnp.bfloat16, seed=1)
  got = tiny.jit(lambda x, kernel: convolution._by_products(x, kernel, padding))(x, kernel)
  wanted = convolution._plain(x.astype(jnp.float32), kernel.astype(jnp.float32), padding)
  assert got.dtype == jnp.bfloat16 and got.shape == wanted.shape
  np.testing.assert_allclose(got.astype(np.float32), wanted, rtol=0.01, atol=0.01)


@SHAPES
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_columns_are_the_convolution(shape, k, padding, devices, dtype):
  """In bfloat16 up to one rounding of what each column of the kernel adds, and one of the sum."""
  x, kernel = normal(shape[0] * devices, *shape[1:], dtype=dtype), normal(k, k, 4, 6, dtype=dtype, seed=1)
  got = tiny.jit(lambda x, kernel: convolution._by_columns(x, kernel, padding, devices))(x, kernel)
  x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
  wanted = convolution._plain(x, kernel, padding)
  assert got.dtype == dtype and got.shape == wanted.shape
  rounding = 2**-8 if dtype == jnp.bfloat16 else 1e-6
  assert (abs(got - wanted) <= rounding * convolution._plain(abs(x), abs(kernel), padding)).all()


@pytest.mark.parametrize(
  "form", [convolution._by_products, functools.partial(convolution._by_columns, devices=1)]
)
def test_their_derivative_is_that_of_the_convolution(form):
  x, kernel = normal(1, 6, 5, 4, dtype=jnp.bfloat16), normal(3, 3, 4, 6, dtype=jnp.bfloat16, seed=1)
  loss = lambda how: lambda *xs: (how(*xs, 1).astype(jnp.float32) ** 2).sum()  # noqa: E731
  gradients = [tiny.jit(jax.grad(loss(how), (0, 1)))(x, kernel) for how in (form, convolution._plain)]
  for a, b in zip(*gradients, strict=True):
    assert np.abs(b).max() > 1
    np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=0.05, atol=0.5)


def test_which_programs_have_products(monkeypatch):
  """Those in bfloat16 for this process's CPU, if it has the unit: no other convolution of stride 1."""

  def convolutions(dtype, has_it=True, here=True, **fields):
    monkeypatch.setattr(amx, "available", lambda: has_it)
    conv = Conv(6, 3, dtype=dtype, **fields)
    x = jax.ShapeDtypeStruct((1, 6, 5, 4), dtype)
    variables = jax.eval_shape(conv.init, jax.random.key(0), x)
    with target.traced_for(("cpu",), here=here):
      return str(jax.make_jaxpr(lambda v, x: conv.apply(v, x))(variables, x)).count("conv_general_dilated")

  assert convolutions(jnp.bfloat16) == 0
  assert convolutions(jnp.float32) == convolutions(jnp.bfloat16, has_it=False) == 1
  assert convolutions(jnp.bfloat16, here=False) == convolutions(jnp.bfloat16, stride=2, padding=1) == 1


@pytest.mark.parametrize(
  "images, platforms, devices, columns",
  [
    (1, ("tpu",), None, True), (7, ("tpu",), None, True), (8, ("tpu",), None, False),
    (4, ("tpu",), 4, True), (28, ("tpu",), 4, True), (32, ("tpu",), 4, False), (2, ("tpu",), 4, False),
    ("b", ("tpu",), None, False), (1, ("cuda",), None, False), (1, ("cpu", "tpu"), None, False),
  ],
)  # fmt: skip
def test_which_programs_go_by_columns(images, platforms, devices, columns):
  """Those for TPUs, for few images on each."""
  mesh = None if devices is None else jax.sharding.AbstractMesh((devices,), ("data",))
  shape = jax.export.symbolic_shape(f"{images}, 6, 5, 4")
  x, kernel = jax.ShapeDtypeStruct(shape, jnp.bfloat16), normal(3, 3, 4, 6, dtype=jnp.bfloat16)
  with target.traced_for(platforms, mesh):
    program = str(jax.make_jaxpr(lambda x: convolution.convolve(x, kernel, 1))(x))
  assert program.count("conv_general_dilated[") == (3 * images // (devices or 1) if columns else 1)
