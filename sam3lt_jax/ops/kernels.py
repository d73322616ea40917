"""Attention kernels that a platform brings: cuDNN's on NVIDIA GPUs, JAX's splash attention on TPUs.

They never hold the score matrix, 1.7 GB for a global layer of the image encoder in float32. Both are held to
the same tests as the plain formulation, splash attention in Pallas' TPU interpreter; neither has run on its
hardware yet, so they are asked for: `use("auto")`, or SAM3LT_ATTENTION=auto in the environment.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

CHOICES = ("xla", "auto", "cudnn", "splash")
VARIABLE = "SAM3LT_ATTENTION"
# Below, scores are small and the plain formulation, which XLA fuses, has nothing to lose.
MIN_TOKENS = 512
_LANES = 128  # splash attention's blocks are multiples of it
_MAX_BLOCK = 1024
_asked_for: str | None = None

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def use(name: str) -> None:
  """Chooses the kernel of attention layers without mask, bias or dropout, for programs traced from now on.

  Args:
    name: "xla" (the default): none. "auto": the platform's. "cudnn": on GPUs; float16 and bfloat16, heads of
      a multiple of 8 up to 128 wide. "splash": on TPUs; programs of one device, or under pmap or shard_map,
      since XLA cannot split a Pallas kernel over a mesh by itself. What a kernel is not for goes through XLA.

  Raises:
    ValueError: another name.
  """
  global _asked_for
  _asked_for = _checked("name", name)


def chosen(q: jax.Array, k: jax.Array, platforms: Sequence[str]) -> Kernel | None:
  """The kernel for q [B, T, N, H] and k [B, S, N, H] in a program for `platforms`; None: the plain one."""
  name = _asked_for or _checked(VARIABLE, os.environ.get(VARIABLE, "xla"))
  if name == "xla" or len(platforms) != 1 or not _enough(q.shape[1]) or not _enough(k.shape[1]):
    return None
  (platform,) = platforms
  if platform in ("gpu", "cuda") and name in ("auto", "cudnn"):
    fits = q.dtype in (jnp.float16, jnp.bfloat16) and q.shape[3] % 8 == 0 and q.shape[3] <= 128
    return cudnn if fits and _has_cudnn() else None
  if platform == "tpu" and name in ("auto", "splash"):
    return splash
  return None


def _checked(argument: str, name: str) -> str:
  if name not in CHOICES:
    raise ValueError(f"{argument} must be one of {', '.join(CHOICES)}, got {name!r}")
  return name


def _enough(tokens: int) -> bool:
  return isinstance(tokens, int) and tokens >= MIN_TOKENS


@functools.cache
def _has_cudnn() -> bool:
  """Whether this process's GPU and libraries have it: a small call is compiled."""
  x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
  try:
    jax.jit(cudnn).lower(x, x, x).compile()
  except Exception:  # an old GPU, no cuDNN, no GPU at all: each has an error of its own
    return False
  return True


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v by cuDNN's flash attention. Shapes as `attention.attend`."""
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v by splash attention (jax.experimental.pallas). Shapes as `attention.attend`.

  Rows are padded to whole blocks, 5184 to 5376; padding is a segment of its own, to which no query attends.
  Images are more heads to the kernel.
  """
  from jax.experimental.pallas.ops.tpu import splash_attention

  B, T, N, H = q.shape
  S = k.shape[1]
  block_q, block_k = _block(T), _block(S)
  q, k, v = (
    _by_head(x, b) for x, b in ((q * jnp.asarray(H**-0.5, q.dtype), block_q), (k, block_k), (v, block_k))
  )
  sizes = splash_attention.BlockSizes(
    block_q=block_q, block_kv=block_k, block_kv_compute=block_k, block_q_dkv=block_q, block_kv_dkv=block_k,
    block_kv_dkv_compute=block_k, block_q_dq=block_q, block_kv_dq=block_k,
  )  # fmt: skip
  every = splash_attention.FullMask((q.shape[1], k.shape[1]))
  kernel = splash_attention.make_splash_mha_single_device(
    splash_attention.MultiHeadMask([every] * (B * N)), block_sizes=sizes
  )
  segments = splash_attention.SegmentIds(
    q=jnp.zeros(q.shape[1], jnp.int32), kv=(jnp.arange(k.shape[1]) >= S).astype(jnp.int32)
  )
  out = kernel(q, k, v, segment_ids=segments)
  return out.reshape(B, N, -1, H)[:, :, :T].transpose(0, 2, 1, 3)


def _block(tokens: int) -> int:
  """The block size with the least padding; of equal ones the largest."""
  if tokens <= _MAX_BLOCK:
    return -(-tokens // _LANES) * _LANES
  sizes = range(_MAX_BLOCK // 2, _MAX_BLOCK + 1, _LANES)
  return min(sizes, key=lambda size: (-(-tokens // size) * size, -size))


def _by_head(x: jax.Array, block: int) -> jax.Array:
  """[B, T, N, H] -> [B * N, T', H], T' the next multiple of `block`."""
  B, T, N, H = x.shape
  x = jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, -T % block), (0, 0)))
  return x.reshape(B * N, T + -T % block, H)
