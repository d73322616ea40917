"""Attention for TPUs: one kernel of our own, and JAX's splash attention where that does not fit.

Splash attention wants each head in an array of its own, [N, T, H]: heads of 64 fill half of a TPU's 128 lanes
and heads of 32 a quarter, and every window is cut out, padded to whole blocks and put back. That moves
several times the bytes which attention itself needs. Our kernel takes the 128 lanes of two heads of 64 (or
four of 32) as they lie in a map [B, H, W, D], of one window or of all of it, rotates queries and keys (RoPE),
and holds the scores of one block of queries in fast memory. No array is transposed, padded or copied.

Axes: B batch, H, W rows and columns of tokens, D width = heads side by side, T tokens of a window.
"""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sam3lt_jax.ops import rope, windows

LANES = 128
_SUBLANES = 8
# Keys and values of a window, their table and the scores stay within the 16 MB that each TPU gives a kernel.
# Compiled for v5e, a step takes 3440 cycles for 72 queries in blocks of 144 and 4030 in blocks of 72.
_SCORES_BYTES = 3 << 20
_MAX_TOKENS = 5184
_MIN_QUERIES = 64
# Of splash attention: blocks are whole multiples of the lanes.
_MAX_BLOCK = 1024


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v for q [B, T, N, H], k, v [B, S, N, H]: [B, T, N, H] in their dtype."""
  B, T, N, H = q.shape
  flat = (B, T // _SUBLANES, _SUBLANES, N * H)
  if k.shape != q.shape or T % _SUBLANES or not fits(flat, q.dtype, N):
    return _with_gradient_of(splash, splash)(q, k, v)
  return attend_in_windows(*(x.reshape(flat) for x in (q, k, v)), num_heads=N).reshape(q.shape)


def fits(shape: tuple[int, ...], dtype: jnp.dtype, num_heads: int, window: int = 0) -> bool:
  """Whether `attend_in_windows` is for maps of this shape [B, H, W, D]: whole windows and registers."""
  _, height, width, features = shape
  head = features // num_heads
  rows, columns = window or height, window or width
  return (
    jnp.dtype(dtype).itemsize == 2
    and features % LANES == 0
    and head in (16, 32, 64)
    and height % rows == 0
    and width % columns == 0
    and columns % _SUBLANES == 0
    and rows * columns <= _MAX_TOKENS
    and _rows_of_a_block(rows, columns, rows * columns) * columns >= _MIN_QUERIES
  )


def attend_in_windows(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  tables: rope.Tables | None = None,
  *,
  num_heads: int,
  window: int = 0,
) -> jax.Array:
  """softmax(q k^T / sqrt(head width)) v within windows, q and k rotated first. The maps must fit, see `fits`.

  Args:
    q, k, v: [B, H, W, D] of one dtype, heads side by side in D.
    tables: (cos, sin) of `rope.axial_rope` for a window, each float32 [T, head width / 2]; None: no rotation.
    window: side of the windows; 0: the whole map is one.

  Returns:
    [B, H, W, D] in that dtype. Gradients are those of splash attention.
  """

  by_splash = functools.partial(_by_splash, tables=tables, num_heads=num_heads, window=window)
  shared = () if tables is None else (_by_lane(*tables),)
  kernel = lambda q, k, v: _forward(q, k, v, shared, num_heads=num_heads, window=window)  # noqa: E731
  return _with_gradient_of(by_splash, kernel)(q, k, v)


def fits_bias(q_shape: tuple[int, ...], k_shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
  """Whether `attend_with_bias` is for queries and keys of these shapes [B, T, N, H] and [B, S, N, H]."""
  _, S, N, H = k_shape
  return S % _SUBLANES == 0 and fits((1, S // _SUBLANES, _SUBLANES, N * H), dtype, N) and q_shape[3] == H


def attend_with_bias(
  q: jax.Array, k: jax.Array, v: jax.Array, vertical: jax.Array, horizontal: jax.Array
) -> jax.Array:
  """softmax(q k^T / sqrt(H) + bias) v, the bias a sum over rows and columns of the keys. See `fits_bias`.

  Args:
    q: [B, T, N, H]. k, v: [B, S, N, H], S = rows * columns.
    vertical: [B, N, T, rows], horizontal: [B, N, T, columns], float32. They are rounded to the dtype of q, in
      which the detector computes them.

  Returns:
    [B, T, N, H] in that dtype.
  """
  return _with_gradient_of(_plain_with_bias, _forward_with_bias)(q, k, v, vertical, horizontal)


def _forward_with_bias(q, k, v, vertical, horizontal):
  B, T, N, H = q.shape
  rows, columns = vertical.shape[3], horizontal.shape[3]
  pad = -T % (2 * _SUBLANES)
  bias = jnp.concatenate([vertical, horizontal], axis=-1).astype(q.dtype)
  bias = jnp.pad(bias, ((0, 0), (0, 0), (0, pad), (0, 0)))
  q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
  # Which row and which column a key is in: the bias is a product as well, and the matrix unit's work.
  key = np.arange(rows * columns)
  place = np.concatenate(
    [key // columns == np.arange(rows)[:, None], key % columns == np.arange(columns)[:, None]]
  )
  flat = [x.reshape(B, -1, _SUBLANES, N * H) for x in (q, k, v)]
  out = _forward(*flat, (), bias, jnp.asarray(place, q.dtype), num_heads=N)
  return out.reshape(B, T + pad, N, H)[:, :T]


def _plain_with_bias(q, k, v, vertical, horizontal):
  logits = jnp.einsum("btnh,bsnh->bnts", q * q.shape[3] ** -0.5, k, preferred_element_type=jnp.float32)
  bias = vertical[..., :, None] + horizontal[..., None, :]
  weights = jax.nn.softmax(logits + bias.reshape(logits.shape), axis=-1)
  return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)


def _with_gradient_of(plain, kernel):
  """`kernel` with the gradient of `plain`, which is the same function.

  Products of 16 bits are exact as they are, and Mosaic refuses to be asked for more of them: JAX's default
  precision, which may be "highest", does not reach a kernel in 16 bits, forward nor backward.
  """

  def precise(function, like):
    exact = jnp.dtype(like.dtype).itemsize == 2
    with jax.default_matmul_precision("default") if exact else contextlib.nullcontext():
      return function()

  @jax.custom_vjp
  def run(*inputs):
    return precise(lambda: kernel(*inputs), inputs[0])

  def backward(inputs, gradient):
    return precise(lambda: jax.vjp(plain, *inputs)[1](gradient), inputs[0])

  run.defvjp(lambda *inputs: (run(*inputs), inputs), backward)
  return run


def _by_splash(q, k, v, tables, num_heads, window):
  """The same function of the same arguments, through splash attention."""
  B, H, W, D = q.shape
  parts = (windows.partition(x, window) if window else x.reshape(B, H * W, D) for x in (q, k, v))
  q, k, v = (x.reshape(*x.shape[:2], num_heads, D // num_heads) for x in parts)
  if tables is not None:
    q, k = (rope.apply_rope(x, *tables) for x in (q, k))
  out = splash(q, k, v)
  out = out.reshape(*out.shape[:2], D)
  return windows.merge(out, window, H, W) if window else out.reshape(B, H, W, D)


def _forward(q, k, v, table, bias=None, place=None, *, num_heads, window=0):
  """Maps q [B, H, W, D] and k, v, whose rows may be others where there is one window; see `_kernel`."""
  B, H, W, D = q.shape
  head, group = D // num_heads, LANES * num_heads // D
  rows, columns, keys = window or H, window or W, (window or k.shape[1]) * (window or W)
  block = _rows_of_a_block(rows, columns, keys)
  # A program: image b, window (i, j), lanes h, block t of its queries.
  part = pl.BlockSpec((1, block, columns, LANES), lambda b, i, j, h, t: (b, i * (rows // block) + t, j, h))
  whole = pl.BlockSpec((1, keys // columns, columns, LANES), lambda b, i, j, h, t: (b, i, j, h))
  extra, specs = list(table), [pl.BlockSpec(x.shape, lambda b, i, j, h, t: (0, 0)) for x in table]
  if bias is not None:
    extra += [bias, place]
    specs.append(pl.BlockSpec((1, group, block * columns, bias.shape[3]), lambda b, i, j, h, t: (b, h, t, 0)))
    specs.append(pl.BlockSpec(place.shape, lambda b, i, j, h, t: (0, 0)))
  return pl.pallas_call(
    functools.partial(_kernel, head=head, rotated=bool(table), biased=bias is not None),
    grid=(B, H // rows, W // columns, D // LANES, rows // block),
    in_specs=[part, whole, whole, *specs],
    out_specs=part,
    out_shape=jax.ShapeDtypeStruct(q.shape, v.dtype),
    scratch_shapes=[pltpu.VMEM((keys, LANES), x.dtype) for x in (k, v)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 4 + ("arbitrary",)),
    cost_estimate=pl.CostEstimate(
      flops=4 * q.size * keys,
      transcendentals=q.size // head * keys,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (q, k, v, q, *extra)),
    ),
    name="biased_attention" if bias is not None else "windowed_attention",
  )(q, k, v, *extra)


def _rows_of_a_block(rows: int, columns: int, keys: int) -> int:
  """Rows of queries that a program takes: the most that divide and whose scores are within bounds."""
  most = max(1, _SCORES_BYTES // (4 * columns * keys))
  return next(n for n in range(min(most, rows), 0, -1) if rows % n == 0)


def _by_lane(cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
  """float32 [T, 128]: in 64 lanes the cosines, in 64 the sines with the sign that the rotation gives them."""
  cos, sin = (np.asarray(x, np.float32) for x in (cos, sin))
  signed = np.stack([-sin, sin], axis=-1).reshape(len(sin), -1)
  times = LANES // 2 // signed.shape[1]
  return np.concatenate([np.tile(x, (1, times)) for x in (np.repeat(cos, 2, axis=-1), signed)], axis=-1)


def _rotate(x, table):
  """x: float32 [T, 128], pairs (x0, x1) -> (x0 cos - x1 sin, x1 cos + x0 sin); table: of `_by_lane`."""
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  turned = pltpu.roll(table, LANES // 2, 1)
  cos, sin = (jnp.where(lane < LANES // 2, *pair) for pair in ((table, turned), (turned, table)))
  other = jnp.where(lane & 1 == 0, pltpu.roll(x, LANES - 1, 1), pltpu.roll(x, 1, 1))
  return x * cos + other * sin


def _kernel(q_ref, k_ref, v_ref, *rest, head: int, rotated: bool, biased: bool):
  """One block of queries. q, out: [1, rows, W, 128]; k, v: [1, H, W, 128]; table, keys, values: [T, 128].

  bias: [1, heads, rows * W, places]; place: [places, T], which of them a key is in.
  """
  *rest, out_ref, keys_ref, values_ref = rest
  table_ref = rest.pop(0) if rotated else None
  bias_ref, place_ref = rest if biased else (None, None)
  _, block, columns, _ = q_ref.shape

  def read(ref, start, count):
    """`count` rows as float32 [count * W, 128]; in 16 bits a row of 24 tokens would end within a register."""
    return ref[0, pl.ds(start, count)].astype(jnp.float32).reshape(count * columns, LANES)

  def turned(x, tokens):
    return _rotate(x, table_ref[tokens]) if rotated else x

  def tokens(start, count):
    return pl.ds(start * columns, count * columns)

  @pl.when(pl.program_id(4) == 0)  # the first of the programs that share these keys
  def _():
    rows = k_ref.shape[1]
    some = _rows_of_a_block(rows, columns, rows * columns)

    @pl.loop(0, rows, step=some)
    def _(start):
      at = tokens(start, some)
      keys_ref[at] = turned(read(k_ref, start, some), at).astype(keys_ref.dtype)
      values_ref[at] = read(v_ref, start, some).astype(values_ref.dtype)

  q = turned(read(q_ref, 0, block), tokens(pl.program_id(4) * block, block)).astype(keys_ref.dtype)
  q = q * jnp.asarray(head**-0.5, q.dtype)
  k, v = keys_ref[...], values_ref[...]
  # Not the operators // and %, whose lowering asks which TPU the process has.
  head_of_lane = jax.lax.broadcasted_iota(jnp.int32, q.shape, 1) >> (head.bit_length() - 1)
  out = jnp.zeros(q.shape, jnp.float32)
  for i in range(LANES // head):
    # The other heads' lanes are zero in the queries and left out of the result; the matrix unit is 128 wide.
    one = jnp.where(head_of_lane == i, q, jnp.zeros_like(q))
    logits = jax.lax.dot_general(one, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if biased:
      logits = logits + jnp.dot(bias_ref[0, i], place_ref[...], preferred_element_type=jnp.float32)
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jax.lax.dot_general(
      weights.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    out = jnp.where(head_of_lane == i, mixed / total, out)
  out_ref[0] = out.reshape(block, columns, LANES).astype(out_ref.dtype)


# -------------------------------------------------------------------- splash attention


def splash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v by splash attention (jax.experimental.pallas). Shapes as `attend`.

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
    return -(-tokens // LANES) * LANES
  sizes = range(_MAX_BLOCK // 2, _MAX_BLOCK + 1, LANES)
  return min(sizes, key=lambda size: (-(-tokens // size) * size, -size))


def _by_head(x: jax.Array, block: int) -> jax.Array:
  """[B, T, N, H] -> [B * N, T', H], T' the next multiple of `block`."""
  B, T, N, H = x.shape
  x = jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, -T % block), (0, 0)))
  return x.reshape(B * N, T + -T % block, H)
