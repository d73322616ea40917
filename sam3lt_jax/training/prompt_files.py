"""Files of prompts: what a file is, told by its content, and the texts in it, each with its place.

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
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sam3lt_jax.data.annotations import category_words

SUFFIXES = (".txt", ".json", ".jsonl")  # what is read of a folder
LIST_FIELDS = ("text_annotations", "prompts", "phrases", "texts", "noun_phrases")
TEXT_FIELDS = ("text", "text_input", "noun_phrase", "phrase", "prompt", "caption", "name")
ANNOTATION_FIELDS = ("noun_phrase", "phrase", "text_input", "text", "caption")


class Bad(NamedTuple):
  """In place of a text that cannot be used."""

  reason: str


class Section(NamedTuple):
  """Texts of a file in order. `place.format(number)` says where one is; numbers count from `first`."""

  place: str
  first: int
  values: Iterable[str | Bad | list[Any]]


class PromptFile(NamedTuple):
  """What a file is ("text", "JSON lines", "JSON", "SA-Co", "SA-Co video", "COCO") and what it holds."""

  format: str
  sections: list[Section]


def find_files(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
  """Files as given; a folder becomes its `SUFFIXES` files, those of its subfolders included, by name.

  Raises:
    FileNotFoundError: a path that does not exist.
    ValueError: no path, or a folder without such a file.
  """
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


def open_file(path: str, synonyms: bool = False) -> PromptFile:
  """Reads a file and tells what it is. `synonyms`: those of LVIS categories as well.

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
  start = data[:64].lstrip()[:1] or data.lstrip()[:1]
  if start in (b"{", b"[") or (start == b'"' and _is_json(_first_line(data))):
    return _json_file(path, data, synonyms)
  return PromptFile("text", [Section("line {}", 1, _lines(data))])


def _lines(data: bytes) -> list[str | Bad]:
  """Lines end in a line feed alone: str.splitlines would also cut at U+2028 and its like."""
  try:
    lines = data.decode("utf-8").split("\n")
  except UnicodeDecodeError:
    lines = [_decoded(line) for line in data.split(b"\n")]
  if lines and lines[-1] == "":
    lines.pop()  # what follows the last line feed is no line
  return lines


def _decoded(line: bytes) -> str | Bad:
  try:
    return line.decode("utf-8")
  except UnicodeDecodeError:
    return Bad("not UTF-8")


def _first_line(data: bytes) -> bytes:
  return data.lstrip().partition(b"\n")[0]


def _is_json(data: bytes) -> bool:
  try:
    json.loads(data)
  except (ValueError, RecursionError):
    return False
  return True


def _json_file(path: str, data: bytes, synonyms: bool) -> PromptFile:
  try:
    root = json.loads(data.decode("utf-8"))
  except (ValueError, RecursionError) as e:
    if _is_json(_first_line(data)):
      return PromptFile("JSON lines", [Section("line {}", 1, map(_json_line, _lines(data)))])
    raise ValueError(_json_mistake(path, data, e)) from None
  if isinstance(root, (str, list)):
    records = [root] if isinstance(root, str) else root
    return PromptFile("JSON", [Section("record {}", 0, map(_record, records))])
  return _json_object(path, root, synonyms)


def _json_mistake(path: str, data: bytes, e: Exception) -> str:
  if isinstance(e, json.JSONDecodeError):
    return f"{path}, line {e.lineno}, column {e.colno}: not valid JSON: {e.msg}"
  if isinstance(e, UnicodeDecodeError):
    line = data.count(b"\n", 0, e.start) + 1
    return f"{path}, line {line}: not UTF-8, which JSON has to be"
  return f"{path}: nested too deeply to be a list of prompts"


def _json_line(line: str | Bad) -> str | Bad | list[Any]:
  if isinstance(line, Bad) or not line.strip():
    return line
  try:
    return _record(json.loads(line))
  except (ValueError, RecursionError):
    return Bad("not valid JSON")


def _record(record: Any, fields: Sequence[str] = TEXT_FIELDS) -> str | Bad | list[Any]:
  """A record's text, or its list of texts."""
  if isinstance(record, dict):
    for field in fields:
      if field in record:
        record = record[field]
        break
    else:
      return Bad("no text field")
  if isinstance(record, str):
    return record
  if isinstance(record, list):
    return [v if isinstance(v, str) else Bad("not a string") for v in record]
  return Bad("not a string")


def _json_object(path: str, root: dict[str, Any], synonyms: bool) -> PromptFile:
  for field in LIST_FIELDS:
    if field in root:
      return PromptFile("JSON", [Section(f"{field}[{{}}]", 0, map(_record, _entries(path, root, field)))])
  images = root.get("images")
  if isinstance(images, list) and any(isinstance(image, dict) and "text_input" in image for image in images):
    return PromptFile("SA-Co", [_field_section("images", images, ("text_input",))])
  if "video_np_pairs" in root:
    pairs = _entries(path, root, "video_np_pairs")
    return PromptFile("SA-Co video", [_field_section("video_np_pairs", pairs, ("noun_phrase",))])
  sections = []
  if "categories" in root:
    names = [_category(c, synonyms) for c in _entries(path, root, "categories")]
    sections.append(Section("categories[{}]", 0, names))
  annotations = root.get("annotations")
  if isinstance(annotations, list):
    # Most annotations carry no phrase, and are none the worse for it: they are not counted.
    fields = [f for f in ANNOTATION_FIELDS if any(isinstance(a, dict) and f in a for a in annotations)]
    if fields:
      sections.append(_field_section("annotations", annotations, fields))
  if not sections and any(field in root for field in TEXT_FIELDS if field != "name"):
    return PromptFile("JSON", [Section("record {}", 0, [_record(root)])])
  if not sections:
    keys = ", ".join(map(repr, list(root)[:8])) or "none"
    raise ValueError(
      f"{path}: a JSON object without prompts; its keys are {keys}, one of "
      f"{', '.join(map(repr, LIST_FIELDS))}, 'images' with 'text_input', 'video_np_pairs', 'categories' or "
      "'annotations' with a phrase each is needed"
    )
  return PromptFile("COCO", sections)


def _entries(path: str, root: dict[str, Any], field: str) -> list[Any]:
  entries = root[field]
  if isinstance(entries, dict):
    return list(entries.values())
  if not isinstance(entries, list):
    raise ValueError(f"{path}: {field!r} must be a list of records, got {type(entries).__name__}")
  return entries


def _field_section(name: str, entries: list[Any], fields: Sequence[str]) -> Section:
  values = [_record(entry, fields) if isinstance(entry, dict) else Bad("not an object") for entry in entries]
  return Section(f"{name}[{{}}]", 0, values)


def _category(category: Any, synonyms: bool) -> str | Bad | list[Any]:
  """A category's name as words, LVIS's synonyms after it."""
  name = _record(category, ("name",))
  if not isinstance(name, str):
    return name
  others = category.get("synonyms") if synonyms and isinstance(category, dict) else None
  if not isinstance(others, list):
    return category_words(name)
  texts = [category_words(v) if isinstance(v, str) else Bad("not a string") for v in (name, *others)]
  return list(dict.fromkeys(texts))
