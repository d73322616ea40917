"""Files of prompts: every accepted format, what is skipped and why."""

import json
import logging

import hypothesis
import hypothesis.strategies as st
import pytest

from sam3lt_jax.data import prompts as P
from sam3lt_jax.data.annotations import category_words
from sam3lt_jax.processing.tokenizer import ClipTokenizer, clean_original


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
  assert found.sources[0]["format"] == kind and found.sources[0]["phrases"] == len(wanted)


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
  assert found.duplicates == 0 and [s["records"] for s in found.sources] == [7, 8, 3]
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
  assert [s["phrases"] for s in found.sources] == [3, 1]
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
