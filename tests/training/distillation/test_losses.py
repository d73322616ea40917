"""The distillation losses: cases worked by hand, padding, and the formulas in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.training.distillation import losses
from sam3lt_jax.training.distillation.losses import (
  DistillationLossConfig,
  cosine_similarity,
  masked_cosine,
  masked_mse,
  shuffled_consistency,
)

# As one program: outside of one, every operation is compiled alone.
distillation_loss = jax.jit(losses.distillation_loss, static_argnums=5)


def features(seed, shape=(3, 4, 5)):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


MASK = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
OTHER_MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 0, 0]])


def test_by_hand():
  """Two prompts of one and two tokens, two channels."""
  student = jnp.array([[[3.0, 4.0], [9.0, 9.0]], [[1.0, 0.0], [0.0, 2.0]]])
  teacher = jnp.array([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 5.0]]])
  mask = jnp.array([[1, 0], [1, 1]])
  # Squared errors a token: (0 + 16) / 2 = 8; (1 + 1) / 2 = 1 and (0 + 9) / 2 = 4.5, mean 2.75.
  assert masked_mse(student, teacher, mask) == pytest.approx((8 + 2.75) / 2)
  # Cosines: 9 / (5 * 3) = 0.6; 0 and 1. Distances 0.4; (1 + 0) / 2.
  assert masked_cosine(student, teacher, mask) == pytest.approx((0.4 + 0.5) / 2)
  # Means over valid tokens: [3, 4] and [3, 0]; [0.5, 1] and [0, 3].
  assert shuffled_consistency(student, teacher, mask, mask) == pytest.approx((16 + 0.25 + 4) / 4)
  # Over all: [6, 6.5] and [1.5, 0]; the second prompt has no padding.
  everywhere = shuffled_consistency(student, teacher, mask, mask, "all")
  assert everywhere == pytest.approx((4.5**2 + 6.5**2 + 0.25 + 4) / 4)
  loss, metrics = distillation_loss(student, teacher, mask, teacher, mask)
  assert loss == pytest.approx(5.375 + 2 * 0.45 + 0.1 * 20.25 / 4)
  assert metrics["feature_cosine"] == pytest.approx(0.55)


def test_identical_features_cost_nothing():
  x = jnp.asarray(features(0))
  loss, metrics = distillation_loss(x, x, MASK, x, MASK)
  assert metrics["mse"] == 0 and metrics["consistency"] == 0
  assert abs(float(loss)) < 1e-6 and metrics["feature_cosine"] == pytest.approx(1, abs=1e-6)


def test_weights():
  args = jnp.asarray(features(1)), jnp.asarray(features(2)), MASK
  both, metrics = distillation_loss(
    *args, config=DistillationLossConfig(mse=3.0, cosine=0.0, consistency=0.0)
  )
  assert both == pytest.approx(3 * float(metrics["mse"])) and "consistency" not in metrics
  with pytest.raises(ValueError, match=r"shuffled and shuffled_mask are needed"):
    distillation_loss(*args)
  assert DistillationLossConfig() == DistillationLossConfig(1.0, 2.0, 0.1)


@pytest.mark.parametrize("poison", [1e3, np.nan, np.inf])
def test_padding_changes_neither_loss_nor_gradient(poison):
  def grads(student, teacher, shuffled):
    def loss(student, shuffled):
      return distillation_loss(student, teacher, MASK, shuffled, OTHER_MASK)[0]

    return jax.value_and_grad(loss, argnums=(0, 1))(student, shuffled)

  clean = [jnp.asarray(features(i)) for i in range(3)]
  dirty = [jnp.where(m[..., None], x, poison) for x, m in zip(clean, (MASK, MASK, OTHER_MASK))]
  (loss, slopes), (other, others) = grads(*clean), grads(*dirty)
  assert loss == other
  for a, b, mask in zip(slopes, others, (MASK, OTHER_MASK)):
    np.testing.assert_array_equal(a, b)
    assert np.all(np.asarray(a)[mask == 0] == 0) and np.all(np.asarray(a)[mask == 1] != 0)


def test_prompt_without_tokens_and_zero_features_are_finite():
  zeros = jnp.zeros((2, 3, 4))
  mask = jnp.array([[0, 0, 0], [1, 1, 0]])
  value, slope = jax.value_and_grad(lambda x: distillation_loss(x, zeros, mask, x, mask)[0])(zeros)
  assert value == pytest.approx(2 * 0.5)  # cosine 0 in the second prompt, nothing in the first
  assert np.isfinite(slope).all()


def test_teacher_gets_no_gradient():
  x, t = jnp.asarray(features(0)), jnp.asarray(features(1))
  slope = jax.grad(lambda t: distillation_loss(x, t, MASK, x, MASK)[0])(t)
  assert not np.any(slope)


def test_sums_are_float32_under_bfloat16():
  """In bfloat16 a sum of 512 squares of 1/16 would stall; 1 + 2**-9 of a mean would be lost."""
  student = jnp.full((1, 1, 512), 0.0625, jnp.bfloat16).at[0, 0, 0].set(1.0)
  teacher = jnp.zeros((1, 1, 512), jnp.bfloat16)
  got = masked_mse(student, teacher, jnp.ones((1, 1)))
  assert got.dtype == jnp.float32
  assert got == pytest.approx((1 + 511 * 0.0625**2) / 512, rel=1e-6)
  assert cosine_similarity(student, student).dtype == jnp.float32


@pytest.mark.torch
@pytest.mark.parametrize("pool", ["valid", "all"])
def test_against_torch(pool):
  torch = pytest.importorskip("torch")
  arrays = [features(i, (6, 7, 9)) for i in range(3)]
  lengths = [7, 5, 3, 2, 1, 4], [6, 5, 4, 2, 1, 3]
  mask, other = ((np.arange(7) < np.array(n)[:, None]) for n in lengths)
  config = DistillationLossConfig(consistency_pool=pool)

  def ours(student, shuffled):
    return distillation_loss(student, arrays[1], mask, shuffled, other, config)[0]

  loss, slopes = jax.value_and_grad(ours, argnums=(0, 1))(arrays[0], arrays[2])

  student, teacher, shuffled = (torch.tensor(a, requires_grad=True) for a in arrays)
  total = torch.zeros(())
  for p in range(6):  # a prompt at a time, over its own tokens only
    a, b = student[p, : lengths[0][p]], teacher[p, : lengths[0][p]]
    total = total + torch.nn.functional.mse_loss(a, b)
    total = total + 2.0 * (1 - torch.nn.functional.cosine_similarity(a, b, dim=-1)).mean()
    if pool == "valid":
      means = a.mean(0), shuffled[p, : lengths[1][p]].mean(0)
    else:
      means = student[p].mean(0), shuffled[p].mean(0)
    total = total + 0.1 * torch.nn.functional.mse_loss(*means)
  expected = total / 6
  expected.backward()
  assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
  np.testing.assert_allclose(slopes[0], student.grad, atol=1e-6)
  np.testing.assert_allclose(slopes[1], shuffled.grad, atol=1e-6)


@pytest.mark.parametrize(
  ("bad", "said"),
  [
    ({"mse": -1.0}, "mse=-1.0; accepted: a weight"),
    ({"cosine": float("nan")}, "cosine=nan; accepted: a weight"),
    ({"mse": 0.0, "cosine": 0.0}, "both 0"),
    ({"consistency_pool": "some"}, "'valid' or 'all'"),
  ],
)
def test_bad_weights(bad, said):
  with pytest.raises(ValueError, match=said):
    DistillationLossConfig(**bad)


def test_shapes_are_checked():
  x = jnp.zeros((2, 3, 4))
  with pytest.raises(ValueError, match=r"student and teacher must be \[P, T, D\] alike"):
    masked_mse(x, x[:, :2], jnp.ones((2, 3)))
  with pytest.raises(ValueError, match=r"mask must be \(2, 3\)"):
    masked_cosine(x, x, jnp.ones((2, 4)))
  with pytest.raises(ValueError, match=r"shuffled_mask must be \(2, 3\)"):
    shuffled_consistency(x, x, jnp.ones((2, 3)), jnp.ones((2, 4)))
