"""Padding that no token of a phrase depends on is left out: the same features from less work."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from sam3lt_jax.config import TextConfig
from sam3lt_jax.nn.text_encoder import TextEncoder
from tests import tiny

TOKENS, LENGTH = 40, 6
KINDS = {
  "s0": {"use_repmixer_blocks": True, "num_hidden_layers": 4},
  "s1": {"num_hidden_layers": 2},
  "sam3": {"kind": "clip", "num_hidden_layers": 2},
}


def phrases():
  """Three phrases of up to `LENGTH` tokens, padded to `TOKENS` with an id that means something."""
  ids = np.random.default_rng(0).integers(1, 300, (3, TOKENS)).astype(np.int32)
  mask = (np.arange(TOKENS) < np.array([[LENGTH], [2], [LENGTH - 1]])).astype(np.int32)
  return np.where(mask == 1, ids, 7), mask


def load(kind, profile, fused=False):
  text = TextConfig(
    vocab_size=300, hidden_size=16, intermediate_size=16, projection_dim=16, num_attention_heads=2,
    max_position_embeddings=TOKENS, **({"num_hidden_layers": 2} | KINDS[kind]),
  )  # fmt: skip
  model, variables = tiny.load(tiny.config(profile, text=text))
  return model.fuse(variables) if fused else (model, variables)


def features(model, variables, length, **options):
  ids, mask = phrases()
  run = lambda v: model.apply(v, ids, mask, method="get_text_features", length=length)  # noqa: E731
  return jax.tree.map(np.asarray, tiny.jit(run, **options)(variables))


@pytest.mark.parametrize("profile", ["transformers", "original"])
@pytest.mark.parametrize("kind, fused", [("s0", False), ("s0", True), ("s1", False), ("sam3", False)])
def test_the_first_tokens_are_the_same(kind, fused, profile):
  model, variables = load(kind, profile, fused)
  whole, mask = features(model, variables, None), phrases()[1].astype(bool)
  for length in (LENGTH, 20, TOKENS):
    short = features(model, variables, length)
    chex.assert_shape([short.pooler_output, short.attention_mask], [(3, length, 16), (3, length)])
    for name in ("last_hidden_state", "pooler_output"):
      got, wanted = (getattr(x, name)[:, :length][mask[:, :length]] for x in (short, whole))
      np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_array_equal(short.attention_mask, whole.attention_mask[:, :length])


def flops(model, variables, length):
  ids, mask = phrases()
  run = jax.jit(lambda v: model.apply(v, ids, mask, method="get_text_features", length=length))
  return run.lower(variables).cost_analysis()["flops"]


def test_it_is_less_work_where_attention_does_not_see_padding():
  share = {
    (kind, profile): flops(*load(kind, profile), LENGTH) / flops(*load(kind, profile), TOKENS)
    for kind in KINDS
    for profile in ("transformers", "original")
  }
  assert share["s1", "transformers"] < 0.2 and share["sam3", "transformers"] < 0.2
  assert share["s0", "transformers"] < 0.7
  assert share["sam3", "original"] < 0.2  # causal: what comes later is not seen either
  assert share["s1", "original"] > 0.85 and share["s0", "original"] > 0.85


def test_convolutions_look_as_far_as_is_said(monkeypatch):
  """One token less, and the features are others."""
  model, variables = load("s0", "transformers")
  whole, mask = features(model, variables, None), phrases()[1].astype(bool)
  reach = TextEncoder._reach
  assert [reach(model.bind(variables).text_encoder, i) for i in range(5)] == [20, 10, 10, 10, 0]
  monkeypatch.setattr(TextEncoder, "_reach", lambda self, i: max(reach(self, i) - 1, 0))
  short = features(model, variables, LENGTH)
  change = np.abs(short.pooler_output - whole.pooler_output[:, :LENGTH])[mask[:, :LENGTH]].max()
  assert change > 1e-4


def test_mistakes():
  model, variables = load("s0", "transformers")
  for length in (0, TOKENS + 1):
    with pytest.raises(ValueError, match=f"length must be 1 to {TOKENS}, .* got {length}"):
      features(model, variables, length)
  ids, mask = phrases()
  with pytest.raises(ValueError, match="None with update_batch_stats"):
    model.apply(variables, ids, mask, True, length=4, method="get_text_features", mutable=["batch_stats"])


def test_positions_are_those_of_the_whole_context():
  """Interpolated to the padded phrase, not to the tokens that are computed."""
  model, variables = load("s1", "transformers")
  text = dataclasses.replace(model.config.text, max_position_embeddings=16)
  model, variables = tiny.load(model.config.replace(text=text))
  whole, short = features(model, variables, None), features(model, variables, LENGTH)
  mask = phrases()[1].astype(bool)[:, :LENGTH]
  np.testing.assert_allclose(short.pooler_output[mask], whole.pooler_output[:, :LENGTH][mask], atol=1e-5)
