"""Prompts in training: the split, and batches by step."""

import sys

import numpy as np
import pytest

from sam3lt_jax.processing.tokenizer import ClipTokenizer
from sam3lt_jax.training import prompts as P

PHRASES = ["red circle", "small striped red square", "a dog", "wooden chair next to the window", "cat"]


@pytest.fixture(scope="module")
def tokenizer():
  return ClipTokenizer()


def test_split_is_stable_and_blind_to_case_and_word_order():
  phrases = [f"thing number {i}" for i in range(4000)]
  train, held = P.split_prompts(phrases, 0.1)
  assert sorted(train + held) == sorted(phrases) and train == [p for p in phrases if p in set(train)]
  assert 330 < len(held) < 470  # 400, standard deviation 19
  fewer = P.split_prompts(phrases[::3], 0.1)
  assert set(fewer[0]) <= set(train) and set(fewer[1]) <= set(held)
  more_held = set(P.split_prompts(phrases, 0.2)[1])
  assert set(held) < more_held
  assert P.split_prompts([f"NUMBER  {i} thing" for i in range(4000)], 0.1)[1] == [
    f"NUMBER  {p.split()[-1]} thing" for p in held
  ]
  assert set(P.split_prompts(phrases, 0.1, seed=1)[1]) != set(held)
  assert P.split_prompts(phrases, 0)[1] == []
  with pytest.raises(ValueError, match="held_out"):
    P.split_prompts(phrases, 1.0)


def test_what_stands_for_boxes_alone_is_never_held_out():
  phrases = ["visual", *(f"thing {i}" for i in range(50))]
  assert all("visual" in P.split_prompts(phrases, 0.9, seed)[0] for seed in range(5))


def test_split_of_known_phrases():
  """A hash that changed between versions would leak held-out phrases into training."""
  assert P.split_prompts(PHRASES, 0.5) == (PHRASES[:3], PHRASES[3:])


@pytest.mark.parametrize("profile", ["original", "transformers"])
@pytest.mark.filterwarnings("ignore:text .* the rest was cut off")
def test_token_rows_are_the_tokenizers(profile):
  tokenizer = ClipTokenizer(profile=profile)
  phrases = [*PHRASES, "", "wow!!! " * 20, "a ! b", "one two three four five six"]
  for length in (4, 8, 32):
    for got, wanted in zip(
      P.token_rows(phrases, tokenizer, length), tokenizer(phrases, context_length=length)
    ):
      assert got.dtype == np.int32
      np.testing.assert_array_equal(got, wanted)


def test_batches_hold_each_phrase_once_an_epoch(tokenizer):
  data = P.prompt_batches(PHRASES, tokenizer, 2, 12, seed=3)
  batches = [data[step] for step in range(10)]  # 20 rows: four epochs of 5
  ids = np.concatenate([b["id"] for b in batches]).reshape(4, 5)
  assert (np.sort(ids, axis=1) == np.arange(5)).all()
  assert len({tuple(row) for row in ids}) > 1  # another order each epoch
  arrays = ("input_ids", "attention_mask", "shuffled_ids", "shuffled_attention_mask")
  for b in batches:
    assert {k: (v.dtype, v.shape) for k, v in b.items()} == {
      **{k: (np.int32, (2, 12)) for k in arrays},
      "id": (np.int64, (2,)),
    }
    wanted = tokenizer([PHRASES[i] for i in b["id"]], context_length=12)
    np.testing.assert_array_equal(b["input_ids"], wanted[0])
    np.testing.assert_array_equal(b["attention_mask"], wanted[1])
    for row, i in zip(b["shuffled_ids"], b["id"]):  # the same tokens in another order; 0 is padding
      assert sorted(row[row > 0]) == sorted(tokenizer.encode(PHRASES[i]))


def test_shuffled_words_change_by_epoch_and_seed_only(tokenizer):
  long = ["one two three four five six seven"]
  data = P.prompt_batches(long, tokenizer, 1, 16)
  rows = [tuple(data[epoch]["shuffled_ids"][0]) for epoch in range(12)]
  assert len(set(rows)) >= 11  # of 5040 orders
  assert rows == [tuple(P.prompt_batches(long, tokenizer, 1, 16)[e]["shuffled_ids"][0]) for e in range(12)]
  assert rows[0] != tuple(P.prompt_batches(long, tokenizer, 1, 16, seed=1)[0]["shuffled_ids"][0])
  two = P.prompt_batches([*long, long[0].upper()], tokenizer, 2, 16)[0]["shuffled_ids"]
  assert two[0].tolist() != two[1].tolist()  # each phrase has its own order
  # A phrase's draw does not depend on what it is batched with.
  wide = P.prompt_batches(long, tokenizer, 4, 16)[2]["shuffled_ids"]
  assert [tuple(row) for row in wide] == rows[8:12]


def test_word_orders_are_level():
  orders = [P.shuffle_words("a b c", np.random.default_rng([0, 0, n])) for n in range(1200)]
  counts = np.unique(orders, return_counts=True)[1]
  assert len(counts) == 6 and counts.min() > 150  # 200, standard deviation 13
  assert P.shuffle_words("  circle ", np.random.default_rng(0)) == "circle"


def test_any_step_alone_is_the_step_of_a_whole_run(tokenizer):
  phrases = [f"{a} {b} {c}" for a in "small large".split() for b in PHRASES for c in "xyz"]
  whole = [P.prompt_batches(phrases, tokenizer, 8, seed=5)[s] for s in range(9)]
  resumed = P.prompt_batches(phrases, tokenizer, 8, seed=5)
  for step in (8, 3, 3, 0):
    for key, value in whole[step].items():
      np.testing.assert_array_equal(resumed[step][key], value)
  assert P.prompt_batches(phrases, tokenizer, 8, seed=6)[0]["id"].tolist() != whole[0]["id"].tolist()
  assert whole[0]["input_ids"].shape == (8, 16)  # the profile's context
  far = resumed[10**9]  # steps of a run far longer than any
  assert far["input_ids"].shape == (8, 16) and far["id"].max() < len(phrases)


def test_neighbouring_seeds_share_no_order(tokenizer):
  phrases = [str(i) for i in range(50)]
  epoch_1_of_seed_0 = P.prompt_batches(phrases, tokenizer, 50, 8, seed=0, word_shuffle=False)[1]["id"]
  epoch_0_of_seed_1 = P.prompt_batches(phrases, tokenizer, 50, 8, seed=1, word_shuffle=False)[0]["id"]
  assert epoch_1_of_seed_0.tolist() != epoch_0_of_seed_1.tolist()


def test_processes_share_a_batch(tokenizer):
  whole = P.prompt_batches(PHRASES, tokenizer, 4, 8)
  parts = [P.prompt_batches(PHRASES, tokenizer, 4, 8, process_index=i, process_count=2) for i in (0, 1)]
  for step in (0, 7):
    for key, value in whole[step].items():
      np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), value)


@pytest.mark.parametrize(
  "change, says",
  [
    ({"phrases": []}, "phrases=.*accepted: at least one"),
    ({"context_length": 1}, "context_length=1; accepted: at least 2"),
    ({"batch_size": 0}, "batch_size=0; accepted: a multiple"),
    ({"batch_size": 3, "process_count": 2}, "batch_size=3; accepted: a multiple of process_count, 2"),
    ({"seed": -1}, "seed=-1; accepted: 0 or more"),
    ({"process_index": 1}, "process_index=1; accepted: 0 to 0"),
  ],
)
def test_batch_mistakes(change, says, tokenizer):
  with pytest.raises(ValueError, match=says):
    P.prompt_batches(**{"phrases": PHRASES, "tokenizer": tokenizer, "batch_size": 2} | change)


def test_without_grain(monkeypatch, tokenizer):
  monkeypatch.setitem(sys.modules, "grain", None)
  with pytest.raises(ImportError, match=r"pip install 'sam3lt_jax\[train\]'"):
    P.prompt_batches(PHRASES, tokenizer, 2)
