"""The square convolution of a map, in the form that suits what it runs on.

Axes: B batch, H, W rows and columns, D width of the input, F of the output.
"""

from __future__ import annotations

import functools

import einops
import jax
import jax.numpy as jnp

from sam3lt_jax.ops import amx, target

# Patches of a convolution that lie in memory at once. 288 x 288 cells of 256 channels, 3 x 3, on one core of
# an Intel Xeon: 815 ms whole (382 MB), 607 in 127 MB, 405 in 32 MB, 449 in 11 MB; as a convolution 767.
_PATCH_BYTES = 32 << 20

# From so many images on the TPU's compiler has a batch of its own. 288 x 288 cells of 256 channels, 3 x 3, by
# its own estimate for a v5e in million cycles: 1 image 3.1, by columns 1.1; 4 images 14.0 and 7.6; 8 are 9.1.
_MANY = 8


def convolve(x: jax.Array, kernel: jax.Array, padding: int) -> jax.Array:
  """x [B, H, W, D] by kernel [k, k, D, F], zeros on each side, in their dtype: [B, H', W', F]."""
  B, where = x.shape[0], target.current()
  if x.dtype.itemsize == 2 and amx.chosen():
    return _by_products(x, kernel, padding)
  if isinstance(B, int) and where.on_tpus(B) and B // where.devices < _MANY:  # a symbolic batch is not known
    return _by_columns(x, kernel, padding, where.devices)
  return _plain(x, kernel, padding)


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
  cells = jax.lax.optimization_barrier(jnp.pad(amx.bits(x), sides))
  flat = kernel.reshape(k * k * D, F)

  def block(number):
    seen = jax.lax.dynamic_slice_in_dim(cells, number * rows, rows + k - 1, 1)
    patches = [seen[:, i : i + rows, j : j + w] for i in range(k) for j in range(k)]
    patches = amx.of_bits(jax.lax.optimization_barrier(jnp.concatenate(patches, axis=-1)), x.dtype)
    y = jnp.einsum("bhwd,df->bhwf", patches, flat, preferred_element_type=jnp.float32)
    return amx.bits(y.astype(x.dtype))

  y = jax.lax.map(block, jnp.arange(blocks)).swapaxes(0, 1)  # [B, blocks, rows, w, F]
  return amx.of_bits(y.reshape(B, blocks * rows, w, F)[:, :h], x.dtype)


@_by_products.defjvp
def _by_products_jvp(padding, primals, tangents):
  """Integers have no derivative; the convolution has."""
  return jax.jvp(lambda x, kernel: _plain(x, kernel, padding), primals, tangents)


def _by_columns(x, kernel, padding, devices):
  """A map's columns as a batch, which is convolved along the rows, once for each column of the kernel.

  The TPU's compiler makes a batch of pieces of a map where there are few maps, and lays these out anew before
  and after. The columns lie as a batch has to.
  """
  k = len(kernel)
  w = x.shape[2] + 2 * padding - k + 1
  along = functools.partial(
    jax.lax.conv_general_dilated, window_strides=(1,), padding=((padding, padding),),
    dimension_numbers=("WNC", "WIO", "WNC"),
  )  # fmt: skip

  def of_image(image):  # [H, W, D]
    image = jnp.pad(image, ((0, 0), (padding, padding), (0, 0)))
    # Each product is rounded to x's dtype: in float32 they are the largest map of the image encoder twice.
    products = [along(image[:, j : j + w], kernel[:, j]) for j in range(k)]
    return sum(product.astype(jnp.float32) for product in products).astype(x.dtype)

  of_each_device = einops.rearrange(x, "(m n) h w d -> n m h w d", m=devices)
  return einops.rearrange(
    [jax.vmap(of_image)(images) for images in of_each_device], "n m h w f -> (m n) h w f"
  )
