"""A model of few words says which, before anything is compiled."""

import numpy as np
import pytest
from PIL import Image

from sam3lt_jax import Sam3Processor, cli
from sam3lt_jax.checkpoints.sources import bundled, check_phrases
from sam3lt_jax.predictor import Predictor
from sam3lt_jax.processing.vocabulary import Vocabulary
from sam3lt_jax.shapes.phrases import all_phrases


@pytest.fixture(scope="module")
def words():
  return Vocabulary.beside(bundled("shapes"))


def test_the_bundled_model_knows_what_it_was_trained_on(words):
  words.check(all_phrases())
  words.check(["  Large RED  star ", "visual", ""])
  count = 1
  for slot in words.slots[:-1]:
    count *= 1 + len(slot)
  assert count * len(words.slots[-1]) == len(all_phrases())


@pytest.mark.parametrize(
  "phrase, said",
  [
    ("dog", "text must have words that this model knows, got 'dog': 'dog' is not one. It knows drawn shapes"),
    ("red stars", "got 'red stars': 'stars' is not one; there is 'star'. "),
    (
      "star red",
      "text must have its words in the order that this model knows, got 'star red': say 'red star'",
    ),
    ("red large striped circle", "say 'large striped red circle'"),
    ("red", "text must say what it is, got 'red': say 'red shape'"),
    ("red blue star", "text must have at most one word of each group, got 'red blue star'"),
    ("star shape", "at most one word of each group"),
  ],
)
def test_other_phrases_are_refused(words, phrase, said):
  with pytest.raises(ValueError) as caught:
    words.check(["star", phrase])
  assert said in str(caught.value)
  assert "circle, ring, square" in str(caught.value) and "--model s0" in str(caught.value)


def test_the_processor_of_the_bundled_model_refuses_them():
  processor = Sam3Processor.from_pretrained(bundled("shapes"))
  assert processor(text=["star", "red star"]).input_ids.shape[0] == 2
  with pytest.raises(ValueError, match="'dog' is not one"):
    processor(text="dog")
  Sam3Processor("original").check_phrases(["dog"])


def test_a_model_without_a_vocabulary_may_be_asked_anything(tmp_path):
  for source in ("s0", "random:tiny", tmp_path, "owner/name"):
    check_phrases(source, ["dog"])
  with pytest.raises(ValueError, match="'dog' is not one"):
    check_phrases(bundled("shapes"), ["dog"])


@pytest.mark.parametrize(
  "argv",
  [
    ["demo", "dog"],
    ["segment", "scene.png", "dog", "--model", "shapes"],
    ["batch", ".", "--prompts", "dog", "--model", "shapes", "--out", "found"],
  ],
)
def test_verbs_refuse_them_before_the_model_is_loaded(argv, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("scene.png")
  for name in ("from_pretrained", "without_weights"):
    monkeypatch.setattr(Predictor, name, lambda *a, **k: pytest.fail("loaded"))
  assert cli.main(argv) == 2
  assert "text must have words that this model knows, got 'dog'" in capsys.readouterr().err


def test_a_model_that_is_trained_may_learn_other_words():
  from sam3lt_jax.training.detection import run
  from sam3lt_jax.training.detection.setup import FinetuneConfig

  run._load("shapes", FinetuneConfig(), None, None).processor.check_phrases(["half circle"])
