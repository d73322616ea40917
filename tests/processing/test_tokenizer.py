"""Phrases to ids: every row of the reference table in both profiles, and what users type by mistake."""

import dataclasses
import json
import pathlib
import subprocess
import sys
import warnings

import chex
import numpy as np
import pytest

from sam3lt_jax.config import Profile
from sam3lt_jax.processing.tokenizer import ClipTokenizer, bundled_merges, clean_original

_TABLE = json.loads((pathlib.Path(__file__).parents[1] / "fixtures" / "tokenizer.json").read_text("utf-8"))
_ROWS = _TABLE["rows"]
_SOT, _EOT = 49406, 49407


@pytest.fixture(scope="module")
def original():
  return ClipTokenizer(profile="original")


@pytest.fixture(scope="module")
def transformers():
  return ClipTokenizer(profile="transformers")


def test_the_table_is_whole():
  assert len(_ROWS) == 117
  assert sum(not row["same_tokens"] for row in _ROWS) == 22


def test_vocabulary(original, transformers):
  assert len(bundled_merges()) == 48894
  for tokenizer in (original, transformers):
    assert (tokenizer.vocab_size, tokenizer.sot_token_id, tokenizer.eot_token_id) == (49408, _SOT, _EOT)


@pytest.mark.parametrize("row", _ROWS, ids=lambda row: ascii(row["text"])[1:30])
def test_every_row_of_the_reference_table(row, original, transformers):
  text = row["text"]
  assert clean_original(text) == row["original_cleaned"]
  assert original.encode(text) == row["original_full"]
  assert transformers.encode(text) == row["transformers_full"]
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # some are over the context, see test_truncation
    for context in (16, 32):
      ids, mask = original(text, context_length=context)
      assert ids.dtype == mask.dtype == np.int32
      assert ids.tolist() == [row[f"original_ctx{context}"]]
      np.testing.assert_array_equal(mask, ids != 0)
      ids, mask = transformers(text, context_length=context)
      assert ids.tolist() == [row[f"transformers_ctx{context}"]]
      length = row[f"transformers_ctx{context}_attention"]
      assert mask.tolist() == [[1] * length + [0] * (context - length)]
    ids, _ = transformers(text, truncation=False)
    assert ids.shape == (1, row["transformers_processor_length"])


def test_the_profile_decides_length_and_padding(original, transformers):
  ids, mask = original(["truck", "a big red truck"])
  chex.assert_shape([ids, mask], (2, 16))
  assert ids[0].tolist() == [_SOT, 4629, _EOT] + [0] * 13
  assert mask.sum(1).tolist() == [3, 6]
  ids, mask = transformers(["truck", "a big red truck"])
  chex.assert_shape([ids, mask], (2, 32))
  assert ids[0].tolist() == [_SOT, 4629] + [_EOT] * 30
  assert mask.sum(1).tolist() == [3, 6]


def test_an_id_0_inside_a_phrase_is_padding_to_the_original_only(original, transformers):
  assert original.encode("!~") == transformers.encode("!~") == [_SOT, 0, 349, _EOT]
  assert original("!~")[1][0, :5].tolist() == [1, 0, 1, 1, 0]
  assert transformers("!~")[1][0, :5].tolist() == [1, 1, 1, 1, 0]
  # Padded with the end token, ids alone cannot tell: real tokens are counted.
  mixed = ClipTokenizer(profile=dataclasses.replace(Profile.original(), pad_token_id=_EOT))
  assert mixed("!~")[1][0, :5].tolist() == [1, 1, 1, 1, 0]


def test_truncation_warns_and_names_the_phrase(original):
  phrase = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
  full = original.encode(phrase)
  assert len(full) == 17
  with pytest.warns(UserWarning, match=r"one two three.*17 tokens.*16"):
    ids, mask = original([phrase, "dog"])
  assert ids[0].tolist() == full[:15] + [_EOT]
  assert mask.sum(1).tolist() == [16, 3]
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    original("one two three four five six seven eight nine ten eleven twelve thirteen fourteen")  # 16, fits
    ids, mask = original([phrase, "dog"], truncation=False)
  assert ids.shape == (2, 17) and ids[0].tolist() == full
  assert ids[1].tolist() == [_SOT, 1929, _EOT] + [0] * 14


def test_a_very_long_phrase_is_shortened_in_the_warning(original):
  with pytest.warns(UserWarning) as caught:
    ids, _ = original("word " * 20000)
  assert ids.shape == (1, 16) and len(str(caught[0].message)) < 400


def test_empty_control_characters_and_emoji(original, transformers):
  for tokenizer in (original, transformers):
    for empty in ("", " ", "\t\n"):
      assert tokenizer.encode(empty) == [_SOT, _EOT]
    ids, mask = tokenizer("👩‍👩‍👧‍👦 🇯🇵 \x00\x07\x1b[31m")
    assert mask.any() and ids.min() >= 0 and ids.max() < 49408
    for surrogate in ("\ud800", "dog \udc80 cat"):
      assert tokenizer.encode(surrogate) == tokenizer.encode(
        surrogate.replace("\ud800", "�").replace("\udc80", "�")
      )
  assert original.encode("nul\x00byte") == original.encode("nulbyte")
  assert original.encode("🐶") == transformers.encode("🐶") == [_SOT, 10631, _EOT]


def test_special_strings_belong_to_their_own_reference(original, transformers):
  assert original.encode("a<start_of_text>b") == [_SOT, 320, _SOT, 321, _EOT]
  assert _SOT not in original.encode("!!<start_of_text>")[1:]  # swallowed by the punctuation before it
  assert _SOT not in original.encode("<|startoftext|>")[1:]
  assert transformers.encode("a<|startoftext|>b") == [_SOT, 320, _SOT, 321, _EOT]
  assert _SOT not in transformers.encode("<start_of_text>")[1:]
  # The original ignores case in its contractions, and a long s is an s to it: one word, not two.
  assert original.encode("b'ſ") == [_SOT, 321, 6, 129, 379, _EOT]


def test_rows_do_not_depend_on_their_neighbours(original):
  phrases = ["dog", "a very old wooden door", "!~", ""]
  ids, mask = original(phrases)
  for i, phrase in enumerate(phrases):
    alone = original(phrase)
    np.testing.assert_array_equal(ids[i], alone[0][0])
    np.testing.assert_array_equal(mask[i], alone[1][0])


@pytest.mark.parametrize("profile", ["original", "transformers"])
def test_tokenizer_json_round_trip(tmp_path, profile, original, transformers):
  transformers.save(tmp_path)
  for source in (tmp_path, tmp_path / "tokenizer.json"):
    loaded = ClipTokenizer.from_file(source, profile)
    expected = original if profile == "original" else transformers
    for row in _ROWS:
      assert loaded.encode(row["text"]) == expected.encode(row["text"])
  # Saved from either profile, the file is the one transformers reads.
  ClipTokenizer.from_file(tmp_path, "original").save(tmp_path / "again.json")
  assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def _pruned(tmp_path, merges_kept=2000):
  """A smaller vocabulary in transformers' format, as a pruning tool would write it."""
  ClipTokenizer(profile="transformers").save(tmp_path)
  path = tmp_path / "tokenizer.json"
  data = json.loads(path.read_text("utf-8"))
  model = data["model"]
  model["merges"] = model["merges"][:merges_kept]
  tokens = sorted(model["vocab"], key=model["vocab"].get)[: 512 + merges_kept]
  model["vocab"] = {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
  ids = model["vocab"]["<|startoftext|>"], model["vocab"]["<|endoftext|>"]
  for token, token_id in zip(data["added_tokens"], ids):
    token["id"] = token_id
  data["post_processor"]["cls"][1], data["post_processor"]["sep"][1] = ids
  data["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
  path.write_text(json.dumps(data), "utf-8")
  return ids


def test_a_pruned_tokenizer(tmp_path):
  sot, eot = _pruned(tmp_path)
  tokenizer = ClipTokenizer.from_file(tmp_path, "original")
  assert (tokenizer.vocab_size, tokenizer.sot_token_id, tokenizer.eot_token_id) == (eot + 1, sot, eot)
  assert tokenizer.encode("<start_of_text> <end_of_text>") == [sot, sot, eot, eot]
  ids = tokenizer.encode("a dog, a supercalifragilistic word and 🐶")
  assert ids[0] == sot and ids[-1] == eot and len(ids) > 8 and max(ids[1:-1]) < sot
  # Frequent words keep their ids; the file's own truncation setting does not count.
  assert tokenizer.encode("the red dog")[1:-1] == ClipTokenizer().encode("the red dog")[1:-1]

  with pytest.raises(ValueError, match=r"pad_token_id is 49407.*2514 ids"):
    ClipTokenizer.from_file(tmp_path, "transformers")
  profile = dataclasses.replace(Profile.transformers(), pad_token_id=eot)
  ids, mask = ClipTokenizer.from_file(tmp_path, profile)("the red dog")
  assert ids[0, 5:].tolist() == [eot] * 27 and mask.sum() == 5


def test_files_that_are_no_tokenizer(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
    ClipTokenizer.from_file(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
    ClipTokenizer.from_file(tmp_path)
  from tokenizers import Tokenizer, models

  Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(ValueError, match=r"none of the tokens <\|startoftext\|>"):
    ClipTokenizer.from_file(tmp_path)


def test_what_is_no_phrase(original):
  for thing in (None, 3, b"dog", ["dog"]):
    with pytest.raises(ValueError, match=rf"text must be a string, got {type(thing).__name__}"):
      original.encode(thing)
  with pytest.raises(ValueError, match="must be a string, got NoneType"):
    original(["dog", None])
  with pytest.raises(ValueError, match="at least one phrase"):
    original([])
  with pytest.raises(ValueError, match="context_length must be at least 2"):
    original("dog", context_length=1)
  with pytest.raises(ValueError, match="profile must be one of"):
    ClipTokenizer(profile="clip")


def test_loading_is_fast_and_imports_nothing_heavy():
  code = """
import sys, time
import sam3lt_jax.processing.tokenizer as t
heavy = {"jax", "flax", "torch", "tokenizers", "ftfy", "transformers", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
import tokenizers
best = 9
for _ in range(3):
  t.bundled_merges.cache_clear()
  start = time.process_time()
  t.ClipTokenizer(profile="original")
  best = min(best, time.process_time() - start)
assert not {"jax", "torch", "transformers"} & set(sys.modules)
assert best < 0.5, best
"""
  root = pathlib.Path(__file__).parents[2]
  done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr


@pytest.mark.torch
def test_transformers_reads_what_we_save(tmp_path, transformers):
  hf = pytest.importorskip("transformers")
  transformers.save(tmp_path)
  reference = hf.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
  for row in _ROWS:
    assert reference(row["text"])["input_ids"] == row["transformers_full"]
