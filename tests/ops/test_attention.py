"""The one attention function: against numpy in float64, against torch, and against itself in blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.ops import amx, attention, target
from tests import tiny

# B, T, S, N, H. 192 queries make three blocks of 64 under the fixture below.
# Rows of the first go one by one, of the last two by two, of the rest together.
SHAPES = [(2, 192, 20, 3, 8), (1, 128, 128, 2, 4), (3, 5, 7, 2, 8), (1, 1, 4, 1, 4), (4, 128, 12, 2, 8)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(attention, "MAX_QUERY_BLOCK", 64)
  monkeypatch.setattr(attention, "MAX_BLOCK_BYTES", 8000)
  monkeypatch.setattr(amx, "available", lambda: False)


@pytest.fixture
def on_amx(monkeypatch):
  """The path of CPUs with AMX; any CPU computes it."""
  monkeypatch.setattr(amx, "available", lambda: True)


def inputs(shape, *, mask=None, bias=False, seed=0, dtype=np.float32):
  """q, k, v, mask, bias. mask: "keys" [B, 1, 1, S], "pairs" [1, 1, T, S] or None; bias: True/"grid"."""
  B, T, S, N, H = shape
  rng = np.random.default_rng(seed)
  q, k, v = (rng.normal(size=(B, n, N, H)).astype(np.float32) for n in (T, S, S))
  shapes = {"keys": (B, 1, 1, S), "pairs": (1, 1, T, S)}
  allowed = None
  if mask is not None:
    allowed = rng.random(shapes[mask]) < 0.6
    allowed[..., 0] = True
  added = rng.normal(size=(B, N, T, S)).astype(np.float32) if bias else None
  if bias == "grid":  # of two rows of keys, or one
    rows = 2 if S % 2 == 0 else 1
    added = attention.GridBias(added[..., :rows], added[..., : S // rows])
  return (*(jnp.asarray(a, dtype) for a in (q, k, v)), allowed, added)


def attend(q, k, v, mask=None, bias=None, blocked=False):
  """`attention.attend`, compiled as a whole."""
  mask = None if mask is None else jnp.asarray(mask)
  return tiny.jit(functools.partial(attention.attend, blocked=blocked))(q, k, v, mask=mask, bias=bias)


def by_hand(q, k, v, mask=None, bias=None):
  """The definition, in float64."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
  if isinstance(bias, attention.GridBias):
    width = bias.horizontal.shape[-1]
    for s in range(logits.shape[-1]):
      logits[..., s] += bias.vertical[..., s // width] + bias.horizontal[..., s % width]
  elif bias is not None:
    logits = logits + bias
  if mask is not None:
    logits = np.where(mask, logits, -np.inf)
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return np.einsum("bnts,bsnh->btnh", weights / weights.sum(axis=-1, keepdims=True), v)


def test_two_keys_by_hand():
  """Scores 0 and ln 3 weigh the values 1/4 and 3/4; the scale is 1 / sqrt(4)."""
  q = jnp.full((1, 1, 1, 4), 1.0)
  k = jnp.stack([jnp.zeros(4), jnp.full(4, np.log(3) / 2)]).reshape(1, 2, 1, 4)
  v = jnp.stack([jnp.zeros(4), jnp.full(4, 8.0)]).reshape(1, 2, 1, 4)
  np.testing.assert_allclose(attention.attend(q, k, v), np.full((1, 1, 1, 4), 6.0), rtol=1e-6)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize(
  "shape, mask, bias",
  [(SHAPES[0], mask, bias) for mask in (None, "keys", "pairs") for bias in (False, True, "grid")]
  + [(shape, "pairs", bias) for shape in SHAPES[1:] for bias in (True, "grid")]
  + [(SHAPES[-1], "keys", True)],
)
def test_is_the_definition(shape, mask, bias, blocked):
  q, k, v, allowed, added = inputs(shape, mask=mask, bias=bias)
  out = attend(q, k, v, allowed, added, blocked)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, by_hand(q, k, v, allowed, added), atol=2e-6)


@pytest.mark.parametrize("blocked", [False, True])
def test_bfloat16_keeps_its_dtype_and_a_float32_softmax(blocked):
  q, k, v, allowed, added = inputs(SHAPES[0], mask="keys", bias=True, dtype=jnp.bfloat16)
  out = attend(q, k, v, allowed, added, blocked)
  assert out.dtype == jnp.bfloat16
  # Rounded once on the way in (weights) and once on the way out: two units of 2^-8, values of order 1.
  wanted = by_hand(*(np.asarray(a, np.float32) for a in (q, k, v)), allowed, added)
  np.testing.assert_allclose(np.asarray(out, np.float32), wanted, atol=0.02)


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 2e-6), (jnp.bfloat16, 0.02)])
@pytest.mark.parametrize("shape", SHAPES)
def test_amx_is_the_definition(shape, dtype, atol, on_amx):
  q, k, v, _, _ = inputs(shape, dtype=dtype)
  out = attend(q, k, v, blocked=True)
  assert out.dtype == dtype
  wanted = by_hand(*(np.asarray(a, np.float32) for a in (q, k, v)))
  np.testing.assert_allclose(np.asarray(out, np.float32), wanted, atol=atol)


def test_amx_multiplies_bfloat16_and_moves_integers(on_amx):
  """Slices and transposes of bfloat16 become float32 on XLA:CPU, and the products with them."""
  q, k, v, _, _ = inputs(SHAPES[0], dtype=jnp.bfloat16)
  jaxpr = str(jax.make_jaxpr(functools.partial(attention.attend, blocked=True))(q, k, v))
  assert jaxpr.count("preferred_element_type=float32") == 2
  assert "u16[6,3,64,8]" in jaxpr and "bf16[6,3,64,8]" not in jaxpr


def test_amx_has_the_derivative_of_the_plain_blocks(on_amx):
  q, k, v, _, _ = inputs(SHAPES[0])
  loss = lambda args, blocked: jnp.sum(jnp.sin(attention.attend(*args, blocked=blocked)))  # noqa: E731
  plain, by_amx = (tiny.jit(jax.grad(functools.partial(loss, blocked=b)))((q, k, v)) for b in (False, True))
  for a, b in zip(plain, by_amx, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(a).max())


def test_amx_is_left_out_of_programs_for_other_machines(on_amx):
  q, k, v, _, _ = inputs(SHAPES[0], dtype=jnp.bfloat16)
  with target.traced_for(("cpu",)):
    assert "u16" not in str(jax.make_jaxpr(functools.partial(attention.attend, blocked=True))(q, k, v))


def test_large_scores_are_blocked_on_a_cpu_and_agree(monkeypatch):
  q, k, v, _, _ = inputs(SHAPES[0])
  plain = attention.attend(q, k, v)
  monkeypatch.setattr(attention, "BLOCK_ABOVE_BYTES", 0)
  jaxpr = str(jax.make_jaxpr(attention.attend)(q, k, v))
  assert ("scan" in jaxpr) == (jax.default_backend() == "cpu")
  np.testing.assert_allclose(attention.attend(q, k, v), plain, atol=1e-6)


@pytest.mark.parametrize("bias", [True, "grid"])
def test_gradients_agree_in_blocks(bias):
  q, k, v, allowed, added = inputs(SHAPES[0], mask="keys", bias=bias)
  allowed = jnp.asarray(allowed)

  def loss(args, blocked):
    q, k, v, bias = args
    return jnp.sum(jnp.sin(attention.attend(q, k, v, mask=allowed, bias=bias, blocked=blocked)))

  args = (q, k, v, jax.tree.map(jnp.asarray, added))
  plain, blocks = (tiny.jit(jax.grad(functools.partial(loss, blocked=b)))(args) for b in (False, True))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(blocks), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(a).max())


@pytest.mark.parametrize("bias", [True, "grid"])
def test_head_by_head_agrees(bias):
  q, k, v, allowed, added = inputs(SHAPES[0], mask="keys", bias=bias)
  one_head = attention.attend(q, k, v, mask=jnp.asarray(allowed), bias=added, remat=True)
  np.testing.assert_allclose(one_head, attend(q, k, v, allowed, added), atol=1e-6)


@pytest.mark.parametrize("blocked", [False, True])
def test_padding_slots_cannot_change_the_output(blocked):
  q, k, v, _, _ = inputs(SHAPES[0])
  mask = jnp.arange(20)[None, None, None, :] < 13
  run = tiny.jit(functools.partial(attention.attend, blocked=blocked))
  clean = run(q, k, v, mask=mask)
  k, v = np.array(k), np.array(v)
  k[:, 13:], v[:, 13:] = 1e6, -1e6
  np.testing.assert_array_equal(run(q, k, v, mask=mask), clean)
  assert not np.allclose(run(q, k, v, mask=jnp.ones_like(mask)), clean)
  shorter = run(q, k[:, :13], v[:, :13])
  np.testing.assert_allclose(clean, shorter, atol=1e-6)


@pytest.mark.parametrize("blocked", [False, True])
def test_a_row_without_keys_is_the_average_of_its_values(blocked):
  q, k, v, _, _ = inputs(SHAPES[0])
  mask = jnp.asarray([[False] * 20, [True] * 20])[:, None, None, :]

  def run(q):
    return attention.attend(q, k, v, mask=mask, blocked=blocked)

  out, back = tiny.jit(lambda q: jax.vjp(run, q))(q)
  np.testing.assert_allclose(out[0], np.broadcast_to(np.mean(v[0], axis=0), out[0].shape), atol=1e-6)
  assert np.isfinite(back(out)[0]).all()


def test_dropout_drops_its_share_and_keeps_the_mean():
  S = 64
  q, k = jnp.zeros((1, 500, 2, 4)), jnp.zeros((1, S, 2, 4))  # equal weights 1 / S
  v = jnp.ones((1, S, 2, 4))
  drop = tiny.jit(lambda key: attention.attend(q, k, v, dropout_rate=0.25, dropout_key=key))
  out = drop(jax.random.key(0))
  kept = np.asarray(out[0, :, :, 0]) * 0.75 * S  # of each row's S weights
  np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
  # 1000 rows of Binomial(64, 0.75): mean 48, deviation 3.46; 5 deviations of the mean.
  assert abs(kept.mean() - 48) < 5 * 3.46 / np.sqrt(1000)
  assert 2.8 < kept.std() < 4.2
  np.testing.assert_array_equal(out, drop(jax.random.key(0)))
  assert not np.array_equal(out, drop(jax.random.key(1)))


def test_no_dropout_without_a_key_or_a_rate():
  q, k, v, _, _ = inputs(SHAPES[2])
  plain = attention.attend(q, k, v)
  np.testing.assert_array_equal(attention.attend(q, k, v, dropout_rate=0.5), plain)
  np.testing.assert_array_equal(attention.attend(q, k, v, dropout_key=jax.random.key(0)), plain)


@pytest.mark.parametrize(
  "mask",
  [
    np.ones((1, 1, 1, 7), np.int32),
    np.zeros((1, 1, 1, 7), np.float32),
    np.ones((1, 7), bool),
    np.ones((1, 4, 1, 7), bool),  # one a head: not a thing of this model
  ],
)
def test_other_masks_are_refused(mask):
  q, k, v, _, _ = inputs(SHAPES[2])
  with pytest.raises(ValueError, match="mask must be boolean"):
    attention.attend(q, k, v, mask=jnp.asarray(mask))


@pytest.mark.parametrize(
  "queries, block",
  [(5184, 1296), (576, 576), (201, 201), (1296, 1296), (1297, 1297), (2592, 1296), (2594, 2594)],
)
def test_query_block(queries, block, monkeypatch):
  """The largest divisor up to 1296; where there is none worth it (primes), all at once."""
  monkeypatch.setattr(attention, "MAX_QUERY_BLOCK", 1296)
  assert attention.query_block(queries) == block


@pytest.mark.torch
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("kind", ["plain", "mask", "bias"])
def test_equals_torch(kind, blocked):
  torch = pytest.importorskip("torch")
  q, k, v, mask, bias = inputs(SHAPES[0], mask="keys", bias=True)
  mask, bias = mask if kind == "mask" else None, bias if kind == "bias" else None
  added = next((torch.from_numpy(a) for a in (mask, bias) if a is not None), None)  # torch takes one of them
  heads_first = [torch.from_numpy(np.array(a)).transpose(1, 2) for a in (q, k, v)]
  wanted = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=added)
  np.testing.assert_allclose(attend(q, k, v, mask, bias, blocked), wanted.transpose(1, 2).numpy(), atol=2e-6)


def test_rows_share_a_block_within_its_size():
  assert [attention.row_block(B, 4 * 64 * S) for B, S in ((2, 20), (4, 12), (3, 7), (6, 6))] == [1, 2, 3, 3]
  assert attention.row_block(5, 10**9) == 1 and attention.row_block(7, 2000) == 1


def test_blocked_attention_refuses_dropout():
  q, k, v, _, _ = inputs(SHAPES[2])
  with pytest.raises(ValueError, match="blocked=True cannot drop"):
    attention.attend(q, k, v, dropout_rate=0.1, dropout_key=jax.random.key(0), blocked=True)


# ---------------------------------------------------------------- in parts


def _parts(rng, P, T, H, C, sizes):
  return [
    (rng.normal(size=(P, S, H)), rng.normal(size=(P, S, C)), rng.uniform(size=(P, S)) < 0.7) for S in sizes
  ]


def test_parts_of_the_keys_are_as_all_of_them_and_those_that_are_not_there_cost_nothing():
  rng = np.random.default_rng(0)
  P, T, H, C = 2, 192, 16, 8
  q = rng.normal(size=(P, T, H)).astype(np.float32)
  first, *others = (tuple(np.float32(x) if x.dtype != bool else x for x in p)
                    for p in _parts(rng, P, T, H, C, (5, T, T, T)))  # fmt: skip
  k, v, mask = (np.concatenate(x, axis=1) for x in zip(first, *others))
  logits = np.where(mask[:, None], np.einsum("pth,psh->pts", q, k) / 4, -np.inf)
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  want = np.einsum("pts,psc->ptc", weights / weights.sum(axis=-1, keepdims=True), v)
  stacked = [np.stack([*x, np.full_like(x[0], np.nan)]) for x in list(zip(*others))[:2]]
  masks = np.stack([*(p[2] for p in others), np.ones((P, T), bool)])

  @jax.jit
  def attended(count):
    part = lambda i: (*(jnp.asarray(x)[i] for x in stacked), jnp.asarray(masks)[i])  # noqa: E731
    return attention.attend_in_parts(jnp.asarray(q), [first], part, count)

  np.testing.assert_allclose(attended(3), want, atol=2e-6)
  assert jnp.isnan(attended(4)).all()  # the part that was not there
