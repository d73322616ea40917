"""PhraseTable: features of phrases are computed once, stay on the devices, and no thread loses its own."""

import threading

import jax
import numpy as np
import pytest

from sam3lt_jax import Sam3Processor, engine, parallel, phrase_table
from sam3lt_jax.phrase_table import PhraseTable
from sam3lt_jax.programs import Program
from tests import tiny

CONFIG = tiny.config("transformers", vocab_size=49408)


@pytest.fixture(scope="module")
def loaded():
  return tiny.load(CONFIG)


@pytest.fixture(scope="module")
def read(loaded):
  mesh = parallel.make_mesh(devices=jax.local_devices()[:1])
  with tiny.hurry():
    return Program("read", lambda *a: engine.read(loaded[0], *a), mesh, parallel.replicated(mesh))


@pytest.fixture
def table(read):
  def make(counted=None, batches=(8,)):
    calls = read if counted is None else lambda *a: counted.append(len(a[1])) or read(*a)
    with tiny.hurry():
      return PhraseTable(calls, Sam3Processor(CONFIG), read._mesh, batches)

  return make


def wanted(loaded, phrases):
  model, variables = loaded
  inputs = Sam3Processor(CONFIG)(text=phrases)
  ids, mask = np.asarray(inputs.input_ids), np.asarray(inputs.attention_mask)
  run = tiny.jit(lambda v: model.apply(v, ids, mask, method="get_text_features").pooler_output)
  return np.asarray(run(variables)), mask.astype(bool)


def test_features_are_the_models(loaded, table):
  phrases = ["a dog", " ".join(["dog"] * 40), "the small brown dog", "a dog"]
  tokens, mask = table().tokens(loaded[1], [phrases[:2], phrases[2:]])
  features, mask_wanted = wanted(loaded, phrases)
  assert tokens.shape == (2, 2, 32, 16)
  np.testing.assert_allclose(tokens.reshape(4, 32, 16), features, atol=1e-5)
  np.testing.assert_array_equal(mask.reshape(4, 32), mask_wanted)


def test_each_is_encoded_once_in_batches_and_new_weights_forget(loaded, table):
  calls = []
  one = table(calls, (2, 8))
  many = [f"{i} dogs" for i in range(11)]
  one.add(loaded[1], many)
  assert calls == [8, 8]  # the last three are more than 2
  one.tokens(loaded[1], [many[::-1]])
  assert len(calls) == 2 and list(one) == many[::-1]
  one.tokens(loaded[1], [["another"]])
  assert calls == [8, 8, 2]
  one.forget()
  assert list(one) == []
  one.tokens(loaded[1], [["another"]])
  assert len(calls) == 4


def test_the_table_grows_and_then_the_oldest_make_room(loaded, table, monkeypatch):
  monkeypatch.setattr(phrase_table, "ROWS", (2, 5))
  calls = []
  one = table(calls)
  phrases = list("abcdefgh")
  features, _ = wanted(loaded, phrases)

  def check(asked):
    tokens, _ = one.tokens(loaded[1], [asked])
    at = [phrases.index(phrase) for phrase in asked]
    np.testing.assert_allclose(tokens[0], features[at], atol=1e-5)

  check(["a", "b"])
  check(["c", "a", "d"])
  check(["e"])
  assert list(one) == ["b", "c", "a", "d", "e"]
  check(["b", "f", "g"])  # c and a are gone
  assert list(one) == ["d", "e", "b", "f", "g"]
  before = len(calls)
  check(["d", "e", "g"])
  assert len(calls) == before
  check(["a"])
  assert len(calls) == before + 1
  one.add(loaded[1], phrases)  # more than there is room for: as many as there is
  check(["a", "e"])


def test_threads_that_fill_the_table_get_their_own_phrases(loaded, table, monkeypatch):
  monkeypatch.setattr(phrase_table, "ROWS", (4,))
  one, wrong = table(), []
  phrases = [f"{i} dogs" for i in range(12)]
  features, _ = wanted(loaded, phrases)

  def ask(seed):
    rng = np.random.default_rng(seed)
    for _ in range(15):
      i = int(rng.integers(len(phrases)))
      try:
        tokens, _ = one.tokens(loaded[1], [[phrases[i]]])
        if not np.allclose(tokens[0, 0], features[i], atol=1e-5):
          wrong.append(i)
      except Exception as e:
        wrong.append(e)

  threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert wrong == []
