"""Prompts: every accepted format, what is skipped and why, the split, and batches by step."""

import json
import logging
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from sam3lt_jax.data.annotations import category_words
from sam3lt_jax.processing.tokenizer import ClipTokenizer, clean_original
from sam3lt_jax.training import prompts as P

PHRASES = ["red circle", "small striped red square", "a dog", "wooden chair next to the window", "cat"]


@pytest.fixture(scope="module")
def tokenizer():
  return ClipTokenizer()


@pytest.fixture
def write(tmp_path):
  def write(name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else (
      content if isinstance(content, str) else json.dumps(content)).encode())  # fmt: skip
    return str(path)

  return write


COCO = {
  "images": [{"id": 1, "file_name": "a.jpg"}],
  "annotations": [{"id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}],
  "categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "traffic light"}],
}
LVIS = {
  "categories": [
    {
      "id": 1,
      "name": "mouse_(computer_equipment)",
      "synonyms": ["mouse_(computer_equipment)", "computer_mouse"],
    },
    {"id": 2, "name": "baseball_bat", "synonyms": ["baseball_bat"]},
  ]
}
SACO = {
  "images": [
    {"id": 7, "text_input": "chili", "is_instance_exhaustive": 1},
    {"id": 8, "text_input": "the fish ball"},
    {"id": 9, "file_name": "no phrase.jpg"},
  ],
  "annotations": [],
  "categories": [{"id": 1, "name": "object"}],
}
SACO_VIDEO = {
  "videos": [],
  "annotations": [{"id": 1, "noun_phrase": "a monkey"}],
  "categories": [{"id": 1, "name": "a monkey"}],
  "video_np_pairs": [{"id": 1, "noun_phrase": "thick gold chain", "num_masklets": 0}],
}


@pytest.mark.parametrize(
  "content, kind, wanted",
  [
    ("red circle\r\n  a dog \n", "text", ["red circle", "a dog"]),
    ("\ufeffcafé table\nline\u2028separator", "text", ["café table", "line\u2028separator"]),
    ("red\nhund".encode("utf-16"), "text", ["red", "hund"]),
    ('"quoted" phrase\ncat', "text", ['"quoted" phrase', "cat"]),
    ({"text_annotations": ["a", {"text": "b"}, {"noun_phrase": "c"}, ["d", "e"]]}, "JSON", list("abcde")),
    ({"info": {}, "text_annotations": {"7": "a", "8": {"phrase": "b"}}}, "JSON", ["a", "b"]),
    ({"prompts": [{"text": ["a", "b"]}]}, "JSON", ["a", "b"]),
    (["a", {"caption": "b"}, {"text": "c", "name": "not this"}], "JSON", ["a", "b", "c"]),
    ({"text": "a lone record"}, "JSON", ["a lone record"]),
    ('{"text": "a"}\n\n{"phrase": "b"}\n"c"\n', "JSON lines", ["a", "b", "c"]),
    ('"a"\n"b"\n', "JSON lines", ["a", "b"]),
    (COCO, "COCO", ["person", "traffic light"]),
    ({**COCO, "annotations": [{"id": 1, "phrase": "tall person"}, {"id": 2}]}, "COCO",
     ["person", "traffic light", "tall person"]),
    ({"annotations": [{"caption": "a man rides"}]}, "COCO", ["a man rides"]),
    (LVIS, "COCO", ["mouse", "baseball bat"]),
    (SACO, "SA-Co", ["chili", "the fish ball"]),
    (SACO_VIDEO, "SA-Co video", ["thick gold chain"]),
  ],
)  # fmt: skip
def test_formats_are_told_by_content(content, kind, wanted, write):
  found = P.read_prompts(write("prompts.dat", content))
  assert found.phrases == wanted
  assert found.sources[0].format == kind and found.sources[0].phrases == len(wanted)


def test_lvis_synonyms_and_names(write):
  path = write("lvis.json", LVIS)
  assert P.read_prompts(path, synonyms=True).phrases == ["mouse", "computer mouse", "baseball bat"]
  assert category_words("person (walking)") == "person (walking)"
  assert category_words("first-aid_kit") == "first-aid kit"


def test_bad_records_are_counted_by_reason_and_logged(write, caplog):
  text = write("a.txt", b"red circle\n\n  \nbr\xffken\n" + b"x" * 1001 + b"\n&nbsp;\ncat\n")
  records = write("b.json", {"text_annotations": ["", None, 3, {"txt": "a"}, {"text": None}, ["dog", 5], []]})
  lines = write("c.jsonl", '{"text": "bird"}\n{"text": "fi\n{"text": "fish"}\n')
  with caplog.at_level(logging.WARNING):
    found = P.read_prompts([text, records, lines])
  assert found.phrases == ["red circle", "cat", "dog", "bird", "fish"]
  assert found.skipped == {
    "empty": 3 + 1 + 1, "not UTF-8": 1, "over 1000 characters": 1, "not a string": 4, "no text field": 1,
    "not valid JSON": 1,
  }  # fmt: skip
  assert found.duplicates == 0 and [s.records for s in found.sources] == [7, 8, 3]
  assert f"{text}: 3 skipped: empty (first: line 2)" in caplog.messages
  assert f"{text}: 1 skipped: not UTF-8 (first: line 4)" in caplog.messages
  assert f"{records}: 4 skipped: not a string (first: text_annotations[1])" in caplog.messages
  assert f"{lines}: 1 skipped: not valid JSON (first: line 2)" in caplog.messages


def test_saco_images_without_a_phrase_are_counted(write):
  assert P.read_prompts(write("gold.json", SACO)).skipped == {"no text field": 1}


def test_duplicates_after_cleaning_first_kept(write):
  first = write("1.txt", "Red  Circle\nred circle\nzebra\ncaf\u00e9\n")
  second = write("2.txt", "RED CIRCLE\nant &amp; bee\nant & bee\ncafe\u0301")
  found = P.read_prompts([first, second])
  assert found.phrases == ["Red  Circle", "zebra", "café", "ant &amp; bee"] and found.duplicates == 4
  assert [s.phrases for s in found.sources] == [3, 1]
  # transformers' cleaning leaves HTML alone: there the two are different phrases
  assert P.read_prompts([first, second], "transformers").duplicates == 3
  assert P.read_prompts([second, first]).phrases == ["RED CIRCLE", "ant &amp; bee", "cafe\u0301", "zebra"]


@pytest.fixture(scope="module")
def transformers_tokenizer():
  return ClipTokenizer(profile="transformers")


TEXTS = st.text(st.characters(max_codepoint=0x3FF), max_size=12) | st.text(max_size=6)


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(TEXTS)
@hypothesis.example("a\x1fb")
@hypothesis.example("ΑΣ")
@hypothesis.example("&amp;lt; ﬁ \x85\u3000")
def test_clean_phrase_is_what_the_tokenizer_reads(transformers_tokenizer, text):
  assert P.clean_phrase(text) == clean_original(text)
  encode = transformers_tokenizer.encode
  assert encode(P.clean_phrase(text, "transformers")) == encode(text)


def test_folders_are_read_by_name(write, tmp_path):
  write("set/b.txt", "second")
  write("set/a.json", ["first"])
  write("set/notes.md", "# not read")
  write("set/.hidden.txt", "not read")
  assert P.read_prompts(tmp_path / "set").phrases == ["first", "second"]
  assert len(P.read_prompts([tmp_path / "set", tmp_path / "set" / "b.txt"]).sources) == 2  # a file once


@pytest.mark.parametrize(
  "content, says",
  [
    ('{"text_annotations": [\n"a",\n"b"\n"c"]}', "line 4, column 1: not valid JSON"),
    ('{"text_annotations": ["a", "b', "line 1, column 28: not valid JSON: Unterminated string"),
    (b'["a",\n"\xff"]', "line 2: not UTF-8"),
    ("[" * 100_000, "nested too deeply"),
    (b"a\nb\0c", "line 2: a zero byte; this is no text file"),
    ({"weights": {}, "name": "x"}, "without prompts; its keys are 'weights', 'name'"),
    ({"text_annotations": "red"}, "'text_annotations' must be a list of records, got str"),
    ({"categories": 3}, "'categories' must be a list of records, got int"),
    ("", "no usable phrase in .*there are no records"),
    ("\n \n", "no usable phrase in .*empty: 2"),
    ([1, 2], "no usable phrase in .*not a string: 2"),
  ],
)
def test_files_that_are_no_prompts(content, says, write):
  path = write("bad.json", content)
  with pytest.raises(ValueError, match=says) as e:
    P.read_prompts(path)
  assert path in str(e.value)


def test_missing_paths(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
    P.read_prompts(tmp_path / "gone.txt")
  with pytest.raises(ValueError, match=r"holds no \.txt, \.json, \.jsonl"):
    P.read_prompts(tmp_path)
  with pytest.raises(ValueError, match="at least one file"):
    P.read_prompts([])


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
  two = P.prompt_batches([*long, long[0].upper()], tokenizer, 2, 16, shuffle=False)[0]["shuffled_ids"]
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


def test_one_ordered_pass_for_evaluation(tokenizer):
  data = P.prompt_batches(PHRASES, tokenizer, 2, 8, epochs=1, shuffle=False, word_shuffle=False)
  batches = [data[i] for i in range(len(data))]
  assert [b["id"].tolist() for b in batches] == [[0, 1], [2, 3], [4]]
  assert set(batches[0]) == {"input_ids", "attention_mask", "id"}


def test_processes_share_a_batch(tokenizer):
  whole = P.prompt_batches(PHRASES, tokenizer, 4, 8)
  parts = [P.prompt_batches(PHRASES, tokenizer, 4, 8, process_index=i, process_count=2) for i in (0, 1)]
  for step in (0, 7):
    for key, value in whole[step].items():
      np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), value)


@pytest.mark.parametrize(
  "change, says",
  [
    ({"phrases": []}, "phrases must hold at least one"),
    ({"phrases": [b"dog"]}, "phrases must be strings, got bytes"),
    ({"context_length": 1}, "context_length must be at least 2, got 1"),
    ({"batch_size": 0}, "batch_size must be a positive multiple"),
    (
      {"batch_size": 3, "process_count": 2},
      "batch_size must be a positive multiple of process_count .2., got 3",
    ),
    ({"seed": -1}, "seed must be at least 0"),
    ({"epochs": 0}, "epochs must be at least 1"),
    ({"process_index": 1}, "process_index must be"),
    ({"process_count": 2, "epochs": 1}, "epochs must be None"),
  ],
)
def test_batch_mistakes(change, says, tokenizer):
  with pytest.raises(ValueError, match=says):
    P.prompt_batches(**{"phrases": PHRASES, "tokenizer": tokenizer, "batch_size": 2} | change)


def test_without_grain(monkeypatch, tokenizer):
  monkeypatch.setitem(sys.modules, "grain", None)
  with pytest.raises(ImportError, match=r"pip install 'sam3lt_jax\[train\]'"):
    P.prompt_batches(PHRASES, tokenizer, 2)
