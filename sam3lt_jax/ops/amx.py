"""What CPUs with Intel's matrix unit for bfloat16 (AMX) take in another form than other CPUs.

XLA:CPU has its products by that unit, and nothing else; what it moves in bfloat16 it moves in float32. For
convolutions see `ops.convolution`.
"""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp

from sam3lt_jax.ops import target


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
