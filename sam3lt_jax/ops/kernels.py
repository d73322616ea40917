"""Which attention kernel a program gets: on TPUs those of `ops.tpu_attention`, on NVIDIA GPUs cuDNN's.

They never hold the score matrix, 1.7 GB for a global layer of the image encoder in float32.
SAM3LT_ATTENTION=xla in the environment, or `use("xla")`, leaves every program with the plain formulation.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from sam3lt_jax.ops import rope
from sam3lt_jax.ops.target import GPUS, Target

CHOICES = ("auto", "xla")
VARIABLE = "SAM3LT_ATTENTION"
# Below, scores are small and the plain formulation, which XLA fuses, has nothing to lose.
MIN_TOKENS = 512
_asked_for: str | None = None

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def use(name: str | None) -> None:
  """Chooses for programs traced from now on: "auto" (the default) the platform's kernels, "xla" none.

  None: what the environment says. Raises ValueError for another name.
  """
  global _asked_for
  _asked_for = None if name is None else _checked("name", name)


def chosen(q: jax.Array, k: jax.Array, target: Target) -> Kernel | None:
  """The kernel for attention without mask, bias or dropout; None: the plain formulation.

  q: [B, T, N, H]; k: [B, S, N, H]; the kernel takes q, k, v and gives what `attention.attend` gives.
  """
  tokens = (q.shape[1], k.shape[1])
  if not _asked_for_kernels() or not _known(*q.shape, *k.shape) or min(tokens) < MIN_TOKENS:
    return None
  if target.is_for(*GPUS):
    fits = q.dtype in (jnp.float16, jnp.bfloat16) and q.shape[3] % 8 == 0 and q.shape[3] <= 128
    return _split(cudnn, target) if fits and q.shape[0] % target.devices == 0 and _has_cudnn() else None
  if target.on_tpus(q.shape[0]):
    from sam3lt_jax.ops import tpu_attention  # Pallas takes a second to import

    return _split(tpu_attention.attend, target)
  return None


def chosen_with_bias(q: jax.Array, k: jax.Array, target: Target) -> Callable | None:
  """The same for a `GridBias`: the kernel takes q, k, v and the bias's two arrays."""
  if not _asked_for_kernels() or not _known(*q.shape, *k.shape) or k.shape[1] < MIN_TOKENS:
    return None
  if not target.on_tpus(q.shape[0]):
    return None
  from sam3lt_jax.ops import tpu_attention

  fits = tpu_attention.fits_bias(q.shape, k.shape, q.dtype)
  return _split(tpu_attention.attend_with_bias, target) if fits else None


def chosen_for_windows(
  x: jax.Array, num_heads: int, window: int, tables: rope.Tables, target: Target
) -> Kernel | None:
  """The same for self-attention with RoPE within the windows of a map x [B, H, W, D], window 0: all of it.

  The kernel takes q, k, v of x's shape and dtype, heads side by side and not yet rotated.
  """
  _, height, width, _ = x.shape
  if not _asked_for_kernels() or not _known(*x.shape) or not target.on_tpus(x.shape[0]):
    return None
  from sam3lt_jax.ops import tpu_attention

  enough = (window or height) * (window or width) >= MIN_TOKENS
  if not enough or not tpu_attention.fits(x.shape, x.dtype, num_heads, window):
    return None
  kernel = functools.partial(
    tpu_attention.attend_in_windows, tables=tables, num_heads=num_heads, window=window
  )
  return _split(kernel, target)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v by cuDNN's flash attention. Shapes as `attention.attend`."""
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _asked_for_kernels() -> bool:
  return (_asked_for or _checked(VARIABLE, os.environ.get(VARIABLE, "auto"))) == "auto"


def _checked(argument: str, name: str) -> str:
  if name not in CHOICES:
    raise ValueError(f"{argument} must be one of {', '.join(CHOICES)}, got {name!r}")
  return name


def _known(*sizes: int) -> bool:
  """False where one is symbolic, which no kernel takes."""
  return all(isinstance(size, int) for size in sizes)


def _split(kernel: Kernel, target: Target) -> Kernel:
  """Each device of the mesh runs the kernel on its own rows: XLA does not split a Pallas kernel, and need not
  be left to find out how cuDNN's is.
  """
  if target.mesh is None:
    return kernel
  rows = P("data")
  return jax.shard_map(kernel, mesh=target.mesh, in_specs=rows, out_specs=rows, check_vma=False)


@functools.cache
def _has_cudnn() -> bool:
  """Whether this process's GPU and libraries have it: a small call is compiled."""
  x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
  try:
    jax.jit(cudnn).lower(x, x, x).compile()
  except Exception:  # an old GPU, no cuDNN, no GPU at all: each has an error of its own
    return False
  return True


def described(platform: str, dtype: str) -> str:
  """How large attentions are computed on a platform, for a reader: "by Pallas kernels"."""
  if platform == "cpu":
    return "in blocks"
  if _asked_for_kernels():
    if platform == "tpu":
      return "by Pallas kernels"
    if platform in GPUS and dtype != "float32" and _has_cudnn():
      return "by cuDNN"
  return "by XLA"
