"""What CPUs with Intel's matrix unit for bfloat16 (AMX) take in another form than other CPUs.

XLA:CPU has its products by that unit, and nothing else; what it moves in bfloat16 it moves in float32. Axes:
B batch, H, W rows and columns, D width of the input, F of the output.
"""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp

from sam3lt_jax.ops import target

# Patches of a convolution that lie in memory at once. 288 x 288 cells of 256 channels, 3 x 3, on one core of
# an Intel Xeon: 815 ms whole (382 MB), 607 in 127 MB, 405 in 32 MB, 449 in 11 MB; as a convolution 767.
_PATCH_BYTES = 32 << 20


@functools.cache
def available() -> bool:
  """Whether this process runs on a CPU with the unit; Linux alone says so."""
  if jax.default_backend() != "cpu":
    return False
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return False
  return "amx_bf16" in next((line.split() for line in lines if line.startswith("flags")), ())


def chosen() -> bool:
  """Whether the traced program will run on this process's CPU alone, and that has the unit.

  A program that is traced for other machines must not depend on this one.
  """
  where = target.current()
  return where.here and where.is_for("cpu") and available()


def apart(*values: jax.Array) -> tuple[jax.Array, ...]:
  """The same values; XLA:CPU does not compute what reads them in one piece with them.

  Its library of kernels takes over sums with all that follows, up to the next product and the bias behind
  it, and has every broadcast written out first: 98 MB for one bias of the image encoder.
  """
  return tuple(jax.lax.optimization_barrier(values)) if chosen() else values


def bits(x: jax.Array) -> jax.Array:
  """16-bit numbers as integers, which XLA:CPU moves as they are.

  It slices and transposes bfloat16 in float32, and then takes the float32 copies for the product, which the
  matrix unit is not for.
  """
  return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def of_bits(x: jax.Array, dtype) -> jax.Array:
  """What `bits` was given, of this dtype."""
  return jax.lax.bitcast_convert_type(x, dtype) if dtype.itemsize == 2 else x


def convolution(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
  """x [B, H, W, D] by kernel [k, k, D, F], zeros on each side, in their dtype: [B, H', W', F]."""
  return (_by_products if x.dtype.itemsize == 2 and chosen() else _plain)(x, kernel, padding)


def _plain(x, kernel, padding):
  layout = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((padding, padding),) * 2, dimension_numbers=layout)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _by_products(x, kernel, padding):
  """Products of some rows' patches at a time. XLA:CPU convolves in float32, whatever the dtype."""
  B, H, W, D = x.shape
  k, F = kernel.shape[0], kernel.shape[-1]
  h, w = H + 2 * padding - k + 1, W + 2 * padding - k + 1
  blocks = -(-B * h * w * k * k * D * x.dtype.itemsize // _PATCH_BYTES)
  rows = -(-h // blocks)
  blocks = -(-h // rows)
  below = padding + blocks * rows - h  # so that all blocks are whole
  sides = ((0, 0), (padding, below), (padding, padding), (0, 0))
  cells = jax.lax.optimization_barrier(jnp.pad(bits(x), sides))
  flat = kernel.reshape(k * k * D, F)

  def block(number):
    seen = jax.lax.dynamic_slice_in_dim(cells, number * rows, rows + k - 1, 1)
    patches = [seen[:, i : i + rows, j : j + w] for i in range(k) for j in range(k)]
    patches = of_bits(jax.lax.optimization_barrier(jnp.concatenate(patches, axis=-1)), x.dtype)
    y = jnp.einsum("bhwd,df->bhwf", patches, flat, preferred_element_type=jnp.float32)
    return bits(y.astype(x.dtype))

  y = jax.lax.map(block, jnp.arange(blocks)).swapaxes(0, 1)  # [B, blocks, rows, w, F]
  return of_bits(y.reshape(B, blocks * rows, w, F)[:, :h], x.dtype)


@_by_products.defjvp
def _by_products_jvp(padding, primals, tangents):
  """Integers have no derivative; the convolution has."""
  return jax.jvp(lambda x, kernel: _plain(x, kernel, padding), primals, tangents)
