"""A pruned vocabulary: the same features for what it knows, an error for what it does not."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from sam3lt_jax import Sam3Processor, from_pretrained, save_pretrained
from sam3lt_jax.processing.tokenizer import ClipTokenizer
from sam3lt_jax.pruning import needed_tokens, prune_tokenizer, prune_vocabulary
from tests import tiny

PHRASES = ["small red square", "a striped umbrella", "unbelievably long-winded phrase"]


@pytest.mark.parametrize("profile", ["original", "transformers"])
def test_pruned_ids_are_the_old_ones_renumbered(profile):
  full = ClipTokenizer(profile=profile)
  kept = needed_tokens(full, PHRASES)
  pruned = prune_tokenizer(full, kept)
  old, old_mask = full(PHRASES)
  new, new_mask = pruned(PHRASES)
  np.testing.assert_array_equal(np.array(kept)[new], old)
  np.testing.assert_array_equal(new_mask, old_mask)
  assert new.max() < len(kept) < 30 and pruned.pruned and not full.pruned
  # Other phrases of the same words need no token of their own.
  np.testing.assert_array_equal(np.array(kept)[pruned("red umbrella")[0]], full("red umbrella")[0])


def test_pieces_on_the_way_to_a_token_lie_beyond_the_table():
  full = ClipTokenizer()
  kept = needed_tokens(full, ["umbrella"])
  pruned = prune_tokenizer(full, kept)
  assert max(pruned.encode("umbrella")) < len(kept)
  assert max(pruned.encode("um")) >= len(kept)  # spelled from pieces of "umbrella"
  assert max(pruned.encode("π")) >= len(kept)  # cannot be spelled at all


@pytest.mark.full  # 3 s
def test_a_pruned_model_gives_the_same_features_and_survives_saving(tmp_path):
  model, variables = from_pretrained("random:tiny")
  small, fewer, tokenizer = prune_vocabulary(model, variables, PHRASES)
  rows = small.config.text.vocab_size
  table = variables["params"]["text_encoder"]["embeddings"]["token_embedding"]["embedding"]
  assert table.shape[0] == model.config.text.vocab_size == 49408, "the original was changed"
  assert fewer["params"]["text_encoder"]["embeddings"]["token_embedding"]["embedding"].shape[0] == rows < 30

  def features(model, variables, tokenizer):
    ids, mask = tokenizer(PHRASES)
    run = tiny.jit(lambda v: model.apply(v, ids, mask, method="get_text_features"))
    return np.asarray(run(variables).pooler_output)

  want = features(model, variables, ClipTokenizer(profile=model.config.profile))
  np.testing.assert_array_equal(features(small, fewer, tokenizer), want)
  save_pretrained(tmp_path / "pruned", small, fewer, format="transformers", tokenizer=tokenizer)
  back, loaded = from_pretrained(tmp_path / "pruned", profile=small.config.profile)
  processor = Sam3Processor.from_pretrained(tmp_path / "pruned")
  np.testing.assert_array_equal(features(back, jax.tree.map(np.asarray, loaded), processor.tokenizer), want)


@pytest.mark.parametrize("format", [pytest.param("orbax", marks=pytest.mark.full), "transformers"])  # 3 s
def test_the_vocabulary_goes_with_a_pruned_model(tmp_path, format):
  """Nobody has to name the tokenizer: not to save, to load, to save again, or to ask."""
  model, variables, tokenizer = prune_vocabulary(*from_pretrained("random:tiny"), PHRASES)
  for name in ("once", "twice"):
    save_pretrained(tmp_path / name, model, variables, format=format)
    model, variables = from_pretrained(tmp_path / name, profile=model.config.profile)
    for processor in (Sam3Processor(model.config), Sam3Processor.from_pretrained(tmp_path / name)):
      assert processor.tokenizer.pruned and processor.tokenizer.to_json() == tokenizer.to_json()
      processor(text=["visual"])  # boxes alone ask for it, and a predictor that is loaded, before anyone does
  assert model.config == model.config.replace(tokenizer=None) and "merges" not in repr(model.config)


def test_unknown_words_are_named():
  model, variables = from_pretrained("random:tiny")
  small, _, tokenizer = prune_vocabulary(model, variables, PHRASES)
  processor = Sam3Processor(small.config, tokenizer=tokenizer)
  with pytest.raises(ValueError, match=r"'red cat': the model's vocabulary was pruned .* 'cat' is not among"):
    processor(text=["small square", "red cat"])


def test_bad_arguments():
  full = ClipTokenizer()
  with pytest.raises(ValueError, match="at least one phrase"):
    needed_tokens(full, [])
  with pytest.raises(ValueError, match="end token 49407"):
    prune_tokenizer(full, [0, 5, 49406])
  with pytest.raises(ValueError, match=r"does not have: \[50000\]"):
    prune_tokenizer(full, [0, 49406, 49407, 50000])
