"""PhraseEncoder: short phrases take short programs, and nobody can tell from the features."""

import dataclasses

import numpy as np
import pytest

from sam3lt_jax import Profile, Sam3Processor
from sam3lt_jax.phrase_encoder import PhraseEncoder
from tests import tiny

CONFIG = tiny.config("transformers", vocab_size=49408)
SHORT, MIDDLE = "a dog", "the small brown dog on the old wooden bench"  # 4 and 11 tokens
LONG = " ".join(["dog"] * 40)  # more than a context holds


@pytest.fixture(scope="module")
def loaded():
  return tiny.load(CONFIG)


@pytest.fixture(scope="module")
def encoder(loaded):
  with tiny.hurry():
    return PhraseEncoder(loaded[0], Sam3Processor(CONFIG))


def whole(loaded, phrases):
  model, variables = loaded
  inputs = Sam3Processor(CONFIG)(text=phrases)
  ids, mask = np.asarray(inputs.input_ids), np.asarray(inputs.attention_mask)
  run = tiny.jit(lambda v: model.apply(v, ids, mask, method="get_text_features").pooler_output)
  return np.asarray(run(variables)), mask.astype(bool)


def test_features_are_those_of_the_whole_context(loaded, encoder):
  phrases = [SHORT, LONG, MIDDLE, "cat", SHORT]
  features, mask = encoder(loaded[1], phrases)
  wanted, wanted_mask = whole(loaded, phrases)
  np.testing.assert_array_equal(mask, wanted_mask)
  assert features.shape == wanted.shape == (5, 32, 16)
  np.testing.assert_allclose(features[mask], wanted[mask], atol=1e-5)
  assert not features[0, 8:].any() and features[0, 7].any()  # 8 tokens were computed
  assert not features[2, 16:].any() and features[2, 15].any()
  assert mask[1].all()


def test_each_phrase_takes_the_shortest_program_that_holds_it(loaded, encoder, monkeypatch):
  calls = []
  counted = {
    n: lambda *args, n=n, p=p: calls.append((n, len(args[1]))) or p(*args)
    for n, p in encoder.programs.items()
  }
  monkeypatch.setattr(encoder, "programs", counted)
  encoder.forget()
  assert list(encoder) == []
  phrases = [*(f"{n} dogs" for n in "abcdefghi"), LONG, MIDDLE]  # nine short ones: two batches of 8
  encoder(loaded[1], phrases)
  assert sorted(calls) == [(8, 8), (8, 8), (16, 8), (32, 8)]
  encoder(loaded[1], phrases[::-1])
  assert len(calls) == 4
  assert list(encoder) == phrases[::-1]


def test_a_phrase_does_not_depend_on_what_is_asked_with_it(loaded, encoder):
  encoder.forget()
  alone = encoder(loaded[1], [SHORT])[0]
  encoder.forget()
  beside = encoder(loaded[1], [LONG, MIDDLE, SHORT])[0]
  np.testing.assert_array_equal(beside[2:], alone)


def test_lengths_follow_the_profile(loaded):
  def lengths(**changes):
    profile = dataclasses.replace(CONFIG.profile, **changes)
    return PhraseEncoder(loaded[0], Sam3Processor(CONFIG.replace(profile=profile))).lengths

  assert lengths() == (8, 16, 32)
  assert lengths(context_length=16) == (8, 16)
  assert lengths(context_length=6) == (6,)
  assert lengths(mask_text_padding=False) == (32,)  # padding takes part: all of it is computed
  original = tiny.config(Profile.original(), vocab_size=49408)
  assert PhraseEncoder(tiny.load(original)[0], Sam3Processor(original)).lengths == (16,)
  text = dataclasses.replace(CONFIG.text, kind="clip", use_repmixer_blocks=False)
  sam3 = original.replace(text=text)
  assert PhraseEncoder(tiny.load(sam3)[0], Sam3Processor(sam3)).lengths == (8, 16)  # causal
