"""Files of prompts: what a file is, told by its content; its phrases, each once.

    prompts = read_prompts(["noun_phrases.json", "lvis_v1_val.json"])

Accepted (UTF-8 with or without a byte-order mark; UTF-16 with one):

- text: a phrase a line;
- JSON lines: a line a record;
- JSON, a list of records, or an object with one of
  - "text_annotations" (also "prompts", "phrases", "texts", "noun_phrases"): a list, or an object whose values
    are the records. This is what the authors' stage 1 reads;
  - "images" of which some have "text_input": SA-Co/Gold and SA-Co/Silver, image annotations;
  - "video_np_pairs" with "noun_phrase": SA-Co/VEval, video annotations;
  - "categories" (COCO, LVIS): their names, and LVIS's synonyms if asked for;
  - "annotations" with a phrase each (`ANNOTATION_FIELDS`), beside categories or alone.

A record is a string, a list of strings, or an object with one of `TEXT_FIELDS`, the first that is there (a
string or a list of strings). An object that is itself a record is a list of one.

Sources: the annotation formats described in facebookresearch/sam3 (scripts/eval/{gold,silver,veval}) and at
cocodataset.org and lvisdataset.org; REFERENCE section 4 of this project for "text_annotations".
"""

from __future__ import annotations

import codecs
import collections
import dataclasses
import json
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sam3lt_jax.config import Profile
from sam3lt_jax.data.annotations import category_words
from sam3lt_jax.processing.tokenizer import clean_original

SUFFIXES = (".txt", ".json", ".jsonl")  # what is read of a folder
LIST_FIELDS = ("text_annotations", "prompts", "phrases", "texts", "noun_phrases")
TEXT_FIELDS = ("text", "text_input", "noun_phrase", "phrase", "prompt", "caption", "name")
ANNOTATION_FIELDS = ("noun_phrase", "phrase", "text_input", "text", "caption")
MAX_CHARACTERS = 1000  # a longer "phrase" is something else: a page, or a file without line ends
_BLANKS = re.compile(r"[^\S\x1c-\x1f]+")  # the tokenizers package's \s: without four that Python counts in
_log = logging.getLogger(__name__)

Texts = Iterator[tuple[str, "str | _Bad"]]  # (where in the file, the text)


class _Bad(str):
  """The reason, in place of a text that cannot be used."""


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """What `read_prompts` found.

  Attributes:
    phrases: distinct phrases in the order they were first met, as written but for blank ends.
    skipped: reason -> number of records left out for it: "empty", "not UTF-8", "not valid JSON", "not a
      string", "no text field", "not an object", "over 1000 characters".
    duplicates: texts left out because an earlier one reads the same to the tokenizer.
    sources: the files in the order read, each with "path", "format" ("text", "JSON lines", "JSON", "SA-Co",
      "SA-Co video", "COCO"), "records" (texts in it, usable or not), "phrases" (that it was the first to
      bring).
  """

  phrases: list[str]
  skipped: dict[str, int] = dataclasses.field(default_factory=dict)
  duplicates: int = 0
  sources: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def clean_phrase(text: str, profile: str | Profile = "original") -> str:
  """The text as the tokenizer of `profile` reads it: two phrases with one result have the same token ids."""
  if text.isascii() and text.isprintable() and "&" not in text:
    return " ".join(text.split()).lower()  # both cleanings come to this, and ftfy takes 25 microseconds
  if Profile.named(profile).text_cleaning == "original":
    return clean_original(text)
  text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  text = _BLANKS.sub(" ", unicodedata.normalize("NFC", text)).strip(" ")
  return "".join(c.lower() for c in text)  # a letter at a time: str.lower ends Greek words in another sigma


def read_prompts(
  paths: str | os.PathLike | Sequence[str | os.PathLike],
  profile: str | Profile = "original",
  *,
  synonyms: bool = False,
) -> PromptSet:
  """Reads one or several files or folders of prompts.

  Records that cannot be used are counted by reason and left out, with one log line (WARNING) a file and
  reason that names the first of them.

  Args:
    paths: files in any of the formats above, found by content; of a folder, its .txt, .json and .jsonl files
      by name. The order decides which of two equal phrases is kept: the first.
    profile: whose cleaning tells which phrases are equal.
    synonyms: take the synonyms of LVIS categories, too.

  Raises:
    OSError: a file that does not exist or cannot be read.
    ValueError: a file that is no list of prompts (the message names file and line), or no usable phrase.
  """
  profile = Profile.named(profile)
  files = _find_files(paths)
  phrases: dict[str, str] = {}  # as the tokenizer reads it -> as written
  skipped: collections.Counter[str] = collections.Counter()
  duplicates, sources = 0, []
  for path in files:
    kind, texts = _open(path, synonyms)
    bad: collections.Counter[str] = collections.Counter()
    first_bad: dict[str, str] = {}
    records, before = 0, len(phrases)
    for place, text in texts:
      records += 1
      if not isinstance(text, _Bad):
        text = text.strip()
        if len(text) > MAX_CHARACTERS:
          text = _Bad(f"over {MAX_CHARACTERS} characters")
        elif key := clean_phrase(text, profile):
          duplicates += key in phrases
          phrases.setdefault(key, text)
          continue
        else:
          text = _Bad("empty")
      bad[text] += 1
      first_bad.setdefault(text, place)
    for reason, count in bad.items():
      _log.warning("%s: %d skipped: %s (first: %s)", path, count, reason, first_bad[reason])
    skipped += bad
    sources.append({"path": path, "format": kind, "records": records, "phrases": len(phrases) - before})
  if not phrases:
    why = "; ".join(f"{reason}: {count}" for reason, count in skipped.items()) or "there are no records"
    raise ValueError(f"no usable phrase in {', '.join(files[:5])}{', ...' if len(files) > 5 else ''} ({why})")
  return PromptSet(list(phrases.values()), dict(skipped), duplicates, sources)


def _find_files(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
  """Files as given; a folder becomes its `SUFFIXES` files, those of its subfolders included, by name."""
  paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
  if not paths:
    raise ValueError("paths must name at least one file or folder of prompts, got none")
  files: list[str] = []
  for path in map(os.fspath, paths):
    if not os.path.isdir(path):
      if not os.path.exists(path):
        raise FileNotFoundError(2, "no such file of prompts", path)
      files.append(path)
      continue
    found = sorted(
      os.path.join(folder, name)
      for folder, _, names in os.walk(path)
      for name in names
      if name.lower().endswith(SUFFIXES) and not name.startswith(".")
    )
    if not found:
      raise ValueError(f"the folder {path} holds no {', '.join(SUFFIXES)} file")
    files += found
  return list(dict.fromkeys(files))


def _open(path: str, synonyms: bool) -> tuple[str, Texts]:
  """(what a file is, its texts).

  Raises:
    OSError: it cannot be read.
    ValueError: it is neither text nor JSON, its JSON is damaged, or nothing in it is known to be prompts; the
      message names the file and, where there is one, the line.
  """
  with open(path, "rb") as f:
    data = f.read()
  if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
    try:
      data = data.decode("utf-16").encode("utf-8")
    except UnicodeError as e:
      raise ValueError(f"{path} begins as UTF-16 but is not: {e}") from None
  data = data.removeprefix(codecs.BOM_UTF8)
  if (nul := data.find(b"\0")) >= 0:
    line = data.count(b"\n", 0, nul) + 1
    raise ValueError(
      f"{path}, line {line}: a zero byte; this is no text file (accepted: text, JSON, JSON lines)"
    )
  start, first_line = data.lstrip()[:1], data.lstrip().partition(b"\n")[0]
  if start not in (b"{", b"[") and (start != b'"' or isinstance(_json(first_line), _Bad)):
    return "text", ((f"line {n}", line) for n, line in enumerate(_lines(data), 1))
  try:
    root = json.loads(data.decode("utf-8"))
  except (ValueError, RecursionError) as e:
    if not isinstance(_json(first_line), _Bad):
      return "JSON lines", _json_lines(data)
    raise ValueError(_json_mistake(path, data, e)) from None
  if isinstance(root, (str, list)):
    return "JSON", _records("record {}", [root] if isinstance(root, str) else root)
  return _json_object(path, root, synonyms)


def _json(data: bytes | str) -> Any:
  """What it says, or a `_Bad`."""
  try:
    return json.loads(data)
  except (ValueError, RecursionError):
    return _Bad("not valid JSON")


def _json_mistake(path: str, data: bytes, e: Exception) -> str:
  if isinstance(e, json.JSONDecodeError):
    return f"{path}, line {e.lineno}, column {e.colno}: not valid JSON: {e.msg}"
  if isinstance(e, UnicodeDecodeError):
    line = data.count(b"\n", 0, e.start) + 1
    return f"{path}, line {line}: not UTF-8, which JSON has to be"
  return f"{path}: nested too deeply to be a list of prompts"


def _lines(data: bytes) -> Iterator[str]:
  """Lines end in a line feed alone: str.splitlines would also cut at U+2028 and its like."""
  for line in data.removesuffix(b"\n").split(b"\n") if data else ():
    try:
      yield line.decode("utf-8")
    except UnicodeDecodeError:
      yield _Bad("not UTF-8")


def _json_lines(data: bytes) -> Texts:
  for n, line in enumerate(_lines(data), 1):
    unread = isinstance(line, _Bad) or not line.strip()
    yield from ((f"line {n}", text) for text in _record(line if unread else _json(line)))


def _records(place: str, entries: Iterable[Any], fields: Sequence[str] = TEXT_FIELDS) -> Texts:
  for n, entry in enumerate(entries):
    yield from ((place.format(n), text) for text in _record(entry, fields))


def _record(record: Any, fields: Sequence[str] = TEXT_FIELDS) -> list[str]:
  """A record's texts."""
  if isinstance(record, dict):
    field = next((field for field in fields if field in record), None)
    if field is None:
      return [_Bad("no text field")]
    record = record[field]
  texts = record or [""] if isinstance(record, list) else [record]
  return [text if isinstance(text, str) else _Bad("not a string") for text in texts]


def _json_object(path: str, root: dict[str, Any], synonyms: bool) -> tuple[str, Texts]:
  for field in LIST_FIELDS:
    if field in root:
      return "JSON", _records(f"{field}[{{}}]", _entries(path, root, field))
  images = root.get("images")
  if isinstance(images, list) and any(isinstance(image, dict) and "text_input" in image for image in images):
    return "SA-Co", _objects("images", images, ("text_input",))
  if "video_np_pairs" in root:
    return "SA-Co video", _objects("video_np_pairs", _entries(path, root, "video_np_pairs"), ("noun_phrase",))
  texts: list[Texts] = []
  if "categories" in root:
    names = [_category(c, synonyms) for c in _entries(path, root, "categories")]
    texts.append((f"categories[{n}]", text) for n, found in enumerate(names) for text in found)
  annotations = root.get("annotations")
  if isinstance(annotations, list):
    # Most annotations carry no phrase, and are none the worse for it: they are not counted.
    fields = [f for f in ANNOTATION_FIELDS if any(isinstance(a, dict) and f in a for a in annotations)]
    if fields:
      texts.append(_objects("annotations", annotations, fields))
  if not texts and any(field in root for field in TEXT_FIELDS if field != "name"):
    return "JSON", _records("record {}", [root])
  if not texts:
    keys = ", ".join(map(repr, list(root)[:8])) or "none"
    raise ValueError(
      f"{path}: a JSON object without prompts; its keys are {keys}, one of "
      f"{', '.join(map(repr, LIST_FIELDS))}, 'images' with 'text_input', 'video_np_pairs', 'categories' or "
      "'annotations' with a phrase each is needed"
    )
  return "COCO", (pair for section in texts for pair in section)


def _entries(path: str, root: dict[str, Any], field: str) -> list[Any]:
  entries = root[field]
  if isinstance(entries, dict):
    return list(entries.values())
  if not isinstance(entries, list):
    raise ValueError(f"{path}: {field!r} must be a list of records, got {type(entries).__name__}")
  return entries


def _objects(name: str, entries: list[Any], fields: Sequence[str]) -> Texts:
  return _records(
    f"{name}[{{}}]", (e if isinstance(e, dict) else _Bad("not an object") for e in entries), fields
  )


def _category(category: Any, synonyms: bool) -> list[str]:
  """A category's name as words, LVIS's synonyms after it."""
  texts = _record(category, ("name",))
  others = category.get("synonyms") if synonyms and isinstance(category, dict) else None
  if isinstance(others, list):
    texts += _record(others)
  return list(dict.fromkeys(t if isinstance(t, _Bad) else category_words(t) for t in texts))
