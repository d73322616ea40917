"""The one attention function. Masks are boolean and True means attend.

Axes: B batch, T queries, S keys, N heads, H head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp

from sam3lt_jax.ops import amx, kernels, target

# Score matrices up to this many bytes are computed in one piece; larger ones are computed head by head
# and in blocks of queries, which XLA:CPU needs to stay in its caches and which bounds the memory everywhere.
# In float32 on 2 cores of an AMD EPYC with 32 MB of last-level cache: 5184 tokens, 16 heads, 3.4 s in one
# piece, 0.74 s blocked; 201 queries to 5184 tokens, 8 heads (32 MB), 25 ms and 6 ms; 576 tokens, 16 heads
# (20 MB), 15 ms and 7 ms; 5184 queries to 32 tokens, 8 heads (5 MB), 2.2 ms and 2.8 ms.
BLOCK_ABOVE_BYTES = 8 << 20
MAX_QUERY_BLOCK = 864
# Rows of a batch share a block as long as its scores are no larger than this. On the same machine: 9 windows
# of 576 tokens, 16 heads, 63 ms in threes, 72 ms together, 76 ms one by one; 4 images of 5184 tokens, 8
# heads, 0.43 s one by one, 1.5 s together.
MAX_BLOCK_BYTES = 8 << 20
# Scores of a block on CPUs with AMX, one head of one row. On one core of an Intel Xeon with 2 MB of L2,
# bfloat16, 5184 tokens, 16 heads: 694 ms in blocks of 96 queries (2 MB), 588 in 192 (4 MB), 695 in 432 (9).
AMX_BLOCK_BYTES = 4 << 20
# Scores of a block of `attend_in_parts` where there is no CPU: a product that fills an accelerator, and stays
# in the second level of a GPU's caches (50 MB) or in a TPU's fast memory (128 MB).
PART_BYTES = 32 << 20
# Finite, so that a row whose keys are all masked gives an average of its values and not NaN.
MASKED_LOGIT = -1e30


class GridBias(flax.struct.PyTreeNode):
  """A bias that is a sum over the two axes of a grid of keys, S = H * W in rows of W.

  Key h * W + w gets vertical[..., h] + horizontal[..., w]. Written out for 201 queries, 8 heads and 72 x 72
  keys it is 33 MB; blocks write out their own part only, where it stays in the caches.

  Attributes:
    vertical: float32 [B, N, T, H].
    horizontal: float32 [B, N, T, W].
  """

  vertical: jax.Array
  horizontal: jax.Array

  def dense(self) -> jax.Array:
    """float32 [B, N, T, H * W]."""
    bias = self.vertical[..., :, None] + self.horizontal[..., None, :]
    return bias.reshape(*bias.shape[:-2], bias.shape[-2] * bias.shape[-1])


def _dense(bias: jax.Array | GridBias) -> jax.Array:
  return bias.dense() if isinstance(bias, GridBias) else bias


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  bias: jax.Array | GridBias | None = None,
  dropout_rate: float = 0.0,
  dropout_key: jax.Array | None = None,
  blocked: bool | None = None,
  remat: bool = False,
) -> jax.Array:
  """softmax(q k^T / sqrt(H) + bias) v, with the softmax in float32.

  Args:
    q: [B, T, N, H]. k, v: [B, S, N, H]; all of one dtype.
    mask: bool, broadcastable to [B, 1, T, S] (four axes, the second of size 1); True = attend.
    bias: float32 [B, N, T, S], or a `GridBias` that stands for one; added to the scaled scores.
    dropout_rate: share of attention weights dropped, applied when `dropout_key` is given.
    blocked: head by head and in query blocks (True), in one piece (False), or chosen by size and
      platform (None), kernels of `ops.kernels` among them. All give the same result up to rounding.
    remat: one head after the other, each computed again in the backward pass, which then holds the weights of
      one head and not of all. `blocked` has no effect then. A platform's kernel holds none anyway.

  Returns:
    [B, T, N, H] in the dtype of `v`.

  Raises:
    ValueError: mask is not boolean [B, 1, T, S]; `blocked=True` with dropout, which has no blocked form.
  """
  if mask is not None and (mask.dtype != jnp.bool_ or mask.ndim != 4 or mask.shape[1] != 1):
    raise ValueError(f"mask must be boolean [B, 1, T, S], got {mask.dtype} with shape {mask.shape}")
  B, T, N, H = q.shape
  S = k.shape[1]
  dropping = dropout_rate > 0.0 and dropout_key is not None
  where = target.current()
  if blocked is None and mask is None and bias is None and not dropping:
    kernel = kernels.chosen(q, k, where)
    if kernel is not None:
      return kernel(q, k, v)
  if blocked is None and mask is None and isinstance(bias, GridBias) and not dropping:
    kernel = kernels.chosen_with_bias(q, k, where)
    if kernel is not None:
      return kernel(q, k, v, bias.vertical, bias.horizontal)
  if remat:
    return _attend_by_head(q, k, v, mask, bias, dropout_rate, dropout_key if dropping else None)
  if blocked and dropping:
    raise ValueError("blocked=True cannot drop attention weights; use blocked=False or None")
  if blocked is None:
    blocked = where.has_cpu and not dropping and _is_large(4 * B * N * T * S)
    if blocked and len(where.platforms) > 1:
      plain, in_blocks = (functools.partial(_attend_with, blocked=b) for b in (False, True))
      return jax.lax.platform_dependent(q, k, v, mask, bias, cpu=in_blocks, default=plain)
  q = q * jnp.asarray(H**-0.5, q.dtype)
  if blocked and mask is None and bias is None and amx.chosen():
    return _attend_by_amx(q, k, v)
  if blocked:
    return _attend_blocked(q, k, v, mask, bias)
  logits = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
  if bias is not None:
    logits = logits + _dense(bias)
  if mask is not None:
    logits = jnp.where(mask, logits, MASKED_LOGIT)
  weights = jax.nn.softmax(logits, axis=-1)
  if dropping:
    keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
    weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0)
  kind = jnp.float32 if where.has_cpu else None  # elsewhere the float32 inside is rounded by the product
  out = jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v, preferred_element_type=kind)
  return out.astype(v.dtype)


Part = tuple[jax.Array, jax.Array, jax.Array]  # keys [P, S, H], values [P, S, C], mask bool [P, S]


def attend_in_parts(
  q: jax.Array,
  first: Sequence[Part],
  part: Callable[[jax.Array], Part] | None = None,
  parts: jax.Array | int = 0,
) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v of one head, over keys that come one part after the other.

  The scores of one part and some queries are all that is held; the softmax is kept up to date as parts come
  ("online"), in float32. Values may be narrower or wider than keys.

  Args:
    q: [P, T, H].
    first: parts that are there, see `Part`; True in the mask = attend.
    part: int32 [] -> the part of this number, made in a loop; all of one shape.
    parts: int32 [], how many of those, known only when it runs: no more than these are made and paid for.

  Returns:
    float32 [P, T, C]. An average of anything where all keys are masked.
  """
  P, T, H = q.shape
  where = target.current()
  at_once = (AMX_BLOCK_BYTES if where.has_cpu else PART_BYTES) // (4 * P * T)
  size = query_block(T, max(64, min(T, at_once)))
  blocked = lambda x: x.reshape(P, T // size, size, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
  q = blocked(q * jnp.asarray(H**-0.5, q.dtype))

  def joined(state, keys: Part):
    k, v, mask = keys

    def one_block(block):
      q_b, (out, most, total) = block
      logits = jnp.einsum("pth,psh->pts", q_b, k, preferred_element_type=jnp.float32)
      logits = jnp.where(mask[:, None], logits, MASKED_LOGIT)
      now = jnp.maximum(most, logits.max(axis=-1))
      weights, kept = jnp.exp(logits - now[..., None]), jnp.exp(most - now)
      own = jnp.einsum("pts,psc->ptc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
      return out * kept[..., None] + own, now, total * kept + weights.sum(axis=-1)

    return jax.lax.map(one_block, (q, state))

  C = first[0][1].shape[-1]
  state = (
    jnp.zeros((*q.shape[:3], C), jnp.float32), jnp.full(q.shape[:3], MASKED_LOGIT, jnp.float32),
    jnp.zeros(q.shape[:3], jnp.float32),
  )  # fmt: skip
  for keys in first:
    state = joined(state, keys)
  if part is not None:
    state = jax.lax.fori_loop(0, parts, lambda i, state: joined(state, part(i)), state)
  out, _, total = state
  return (out / total[..., None]).swapaxes(0, 1).reshape(P, T, C)


def _attend_with(q, k, v, mask, bias, blocked):
  return attend(q, k, v, mask=mask, bias=bias, blocked=blocked)


def _is_large(size: int) -> bool:
  """Whether a score matrix of `size` bytes is for blocks; with a symbolic batch: of any batch."""
  try:
    return size > BLOCK_ABOVE_BYTES
  except jax.errors.InconclusiveDimensionOperation:
    return False


def _attend_blocked(q, k, v, mask, bias):
  """`attend` on scaled queries: one head, some rows of the batch and one block of queries at a time."""
  B, T, N, H = q.shape
  S = k.shape[1]
  size = query_block(T)
  blocks = T // size
  rows = row_block(B, 4 * size * S)
  split = lambda x: x.reshape(B // rows, rows, *x.shape[1:])  # noqa: E731
  # [N * B / rows, blocks, rows, size, H] and [N * B / rows, rows, S, H]: leading axes are walked by lax.map.
  q = split(q).reshape(B // rows, rows, blocks, size, N, H).transpose(4, 0, 2, 1, 3, 5)
  k, v = (split(x).transpose(3, 0, 1, 2, 4) for x in (k, v))
  if bias is not None:
    by_query = lambda x: split(x).reshape(B // rows, rows, N, blocks, size, x.shape[-1])  # noqa: E731
    bias = jax.tree.map(lambda x: by_query(x).transpose(2, 0, 3, 1, 4, 5), bias)
  if mask is not None:
    mask = jnp.broadcast_to(mask[:, 0], (B, mask.shape[2], S))
    if mask.shape[1] == T and T > 1:
      mask = split(mask).reshape(B // rows, rows, blocks, size, S).transpose(0, 2, 1, 3, 4)
    else:
      mask = jnp.broadcast_to(split(mask)[:, None], (B // rows, blocks, rows, 1, S))
    mask = jnp.broadcast_to(mask, (N, *mask.shape))
  together = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731

  def one_head(head):
    q_h, k_h, v_h, bias_h, mask_h = head

    def one_block(block):
      q_b, bias_b, mask_b = block
      logits = jnp.einsum("bth,bsh->bts", q_b, k_h, preferred_element_type=jnp.float32)
      if bias_b is not None:
        logits = logits + _dense(bias_b)
      if mask_b is not None:
        logits = jnp.where(mask_b, logits, MASKED_LOGIT)
      weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
      total = weights.sum(axis=-1, keepdims=True)
      out = jnp.einsum("bts,bsh->bth", weights.astype(v_h.dtype), v_h, preferred_element_type=jnp.float32)
      return (out / total).astype(v_h.dtype)

    return jax.lax.map(one_block, (q_h, bias_h, mask_h))

  out = jax.lax.map(one_head, jax.tree.map(together, (q, k, v, bias, mask)))
  out = out.reshape(N, B // rows, blocks, rows, size, H)
  return out.transpose(1, 3, 2, 4, 0, 5).reshape(B, T, N, H)


@jax.custom_jvp
def _attend_by_amx(q, k, v):
  """`attend` on scaled queries without mask and bias: one head of one row, one block of queries at a time."""
  (B, T, N, H), dtype = q.shape, q.dtype
  size = query_block(T, min(MAX_QUERY_BLOCK, max(64, AMX_BLOCK_BYTES // (4 * k.shape[1]))))
  # Leading axes are walked by lax.map: [N * B, blocks, size, H] and [N * B, S, H].
  q, k, v = (amx.bits(x).transpose(2, 0, 1, 3).reshape(N * B, x.shape[1], H) for x in (q, k, v))
  q = q.reshape(N * B, T // size, size, H)

  def one_head(head):
    q_h, k_h, v_h = head
    k_h, v_h = amx.of_bits(k_h, dtype), amx.of_bits(v_h, dtype)

    def one_block(q_b):
      logits = jnp.einsum("th,sh->ts", amx.of_bits(q_b, dtype), k_h, preferred_element_type=jnp.float32)
      weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True)).astype(dtype)
      if dtype != jnp.float32:
        weights = jax.lax.optimization_barrier(weights)  # or they are written in float32 as well, for the sum
      total = weights.astype(jnp.float32).sum(axis=-1, keepdims=True)
      out = jnp.einsum("ts,sh->th", weights, v_h, preferred_element_type=jnp.float32)
      return amx.bits((out / total).astype(dtype))

    return jax.lax.map(one_block, q_h)

  out = jax.lax.map(one_head, (q, k, v))
  return amx.of_bits(out.reshape(N, B, T, H).transpose(1, 2, 0, 3), dtype)


@_attend_by_amx.defjvp
def _attend_by_amx_jvp(primals, tangents):
  """Integers have no derivative; the plain blocks have."""
  return jax.jvp(lambda q, k, v: _attend_blocked(q, k, v, None, None), primals, tangents)


def _attend_by_head(q, k, v, mask, bias, dropout_rate, dropout_key):
  """`attend`, one head at a time, under `jax.checkpoint`."""
  heads = {name: jnp.moveaxis(x, 2, 0)[:, :, :, None] for name, x in (("q", q), ("k", k), ("v", v))}
  if bias is not None:
    heads["bias"] = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], bias)
  if dropout_key is not None:
    heads["dropout_key"] = jax.random.split(dropout_key, q.shape[2])

  def one_head(head):
    return attend(**head, mask=mask, dropout_rate=dropout_rate, blocked=False)[:, :, 0]

  # prevent_cse inserts barriers that a loop does not need.
  out = jax.lax.map(jax.checkpoint(one_head, prevent_cse=False), heads)  # [N, B, T, H]
  return jnp.moveaxis(out, 0, 2)


def row_block(batch: int, bytes_each: int) -> int:
  """Rows of a batch that are computed together: the largest divisor within `MAX_BLOCK_BYTES`, at least 1.

  All of a symbolic batch.
  """
  if not isinstance(batch, int):
    return batch
  most = max(1, min(batch, MAX_BLOCK_BYTES // bytes_each))
  return next(n for n in range(most, 0, -1) if batch % n == 0)


def query_block(num_queries: int, most: int | None = None) -> int:
  """The largest divisor of `num_queries` up to `most` (`MAX_QUERY_BLOCK`); all of them where that is tiny."""
  most = min(num_queries, most or MAX_QUERY_BLOCK)
  size = next(s for s in range(most, 0, -1) if num_queries % s == 0)
  return size if size >= 64 else num_queries
