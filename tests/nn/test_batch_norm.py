"""BatchNorm of the text encoder: torch's values, statistics and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.nn.text_encoder import BatchNorm

EPS = 1e-5


def test_running_statistics_by_hand():
  """Values 1, 2, 3 of one channel: mean 2, biased variance 2/3, unbiased 1."""
  x = jnp.array([[[1.0], [2.0], [3.0]]])
  norm = BatchNorm(EPS)
  variables = norm.init(jax.random.key(0), x, running=False)
  assert float(variables["batch_stats"]["mean"][0]) == 0 and float(variables["batch_stats"]["var"][0]) == 1
  y, changed = norm.apply(variables, x, running=False, mutable=["batch_stats"])
  assert float(changed["batch_stats"]["mean"][0]) == pytest.approx(0.1 * 2)
  assert float(changed["batch_stats"]["var"][0]) == pytest.approx(0.9 + 0.1 * 1)
  np.testing.assert_allclose(y[0, :, 0], np.array([-1, 0, 1]) / np.sqrt(2 / 3), rtol=1e-4)
  np.testing.assert_allclose(norm.apply(variables, x, running=True)[0, :, 0], [1, 2, 3], rtol=1e-4)


def test_one_value_a_channel_is_finite():
  x = jnp.ones((1, 1, 4))
  norm = BatchNorm(EPS)
  variables = norm.init(jax.random.key(0), x, running=True)
  y, changed = norm.apply(variables, x, running=False, mutable=["batch_stats"])
  assert np.isfinite(y).all() and np.isfinite(changed["batch_stats"]["var"]).all()


@pytest.mark.torch
def test_against_torch_over_three_steps():
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(0)
  channels = 6
  theirs = torch.nn.BatchNorm1d(channels, eps=EPS)  # momentum 0.1 is torch's default
  with torch.no_grad():
    theirs.weight.copy_(torch.tensor(rng.normal(1, 0.2, channels)))
    theirs.bias.copy_(torch.tensor(rng.normal(0, 0.2, channels)))
    theirs.running_mean.copy_(torch.tensor(rng.normal(0, 0.5, channels)))
    theirs.running_var.copy_(torch.tensor(rng.uniform(0.5, 2, channels)))
  params = {"scale": theirs.weight.detach().numpy(), "bias": theirs.bias.detach().numpy()}
  stats = {"mean": theirs.running_mean.numpy().copy(), "var": theirs.running_var.numpy().copy()}
  ours = BatchNorm(EPS)
  for _ in range(3):
    x = rng.normal(2, 3, (2, 3, channels)).astype(np.float32)  # n = 6: biased and unbiased differ by a fifth
    weights = rng.normal(size=x.shape).astype(np.float32)

    def loss(x, stats=stats, weights=weights):
      y, changed = ours.apply(
        {"params": params, "batch_stats": stats}, x, running=False, mutable=["batch_stats"]
      )
      return (y * weights).sum(), (y, changed["batch_stats"])

    (_, (y, stats)), slope = jax.value_and_grad(loss, has_aux=True)(x)
    given = torch.tensor(x.transpose(0, 2, 1), requires_grad=True)
    expected = theirs(given)
    (expected * torch.tensor(weights.transpose(0, 2, 1))).sum().backward()
    np.testing.assert_allclose(y, expected.detach().numpy().transpose(0, 2, 1), atol=2e-6)
    np.testing.assert_allclose(slope, given.grad.numpy().transpose(0, 2, 1), atol=2e-6)
    np.testing.assert_allclose(stats["mean"], theirs.running_mean.numpy(), rtol=1e-6)
    np.testing.assert_allclose(stats["var"], theirs.running_var.numpy(), rtol=1e-6)
  theirs.eval()
  y = ours.apply({"params": params, "batch_stats": stats}, x, running=True)
  expected = theirs(torch.tensor(x.transpose(0, 2, 1))).detach().numpy().transpose(0, 2, 1)
  np.testing.assert_allclose(y, expected, atol=2e-6)
