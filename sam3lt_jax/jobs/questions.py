"""What a job asks: the same phrases of every image, or each image its own phrases and example boxes.

A file of questions is one of two, told by its content:

- text: a phrase a line, asked of every image; blank lines and repetitions are left out;
- JSON lines: one object a line, about one image; several lines about an image add up.

      {"id": "a/1.jpg", "text": ["red car", "wheel"]}
      {"id": "a/2.jpg", "boxes": [[10, 20, 110, 90]], "box_labels": [1]}

  "id" (or "image") is the item's id, see `sources`. "text" is a phrase or a list of them, "boxes" are
  [x1, y1, x2, y2] in pixels of the image, "box_labels" 1 (like this, the default) or 0 (not like this) for
  each. Boxes go with every phrase of their line; without a phrase they are a question of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

from sam3lt_jax.errors import shown
from sam3lt_jax.jobs import files
from sam3lt_jax.processing.prompts import Prompt, prompts_of

_KEYS = ("id", "image", "text", "boxes", "box_labels")


class Questions:
  """What to ask of each image. Use `of_phrases` or `from_file`.

  Attributes:
    digest: hex SHA-256 of what is asked; the order of a file's lines about different images does not matter.
    phrases: every different phrase, in order of first appearance: each is encoded once.
    per_image: whether images have their own questions.
  """

  def __init__(self, common: tuple[Prompt, ...], lines: dict[str, tuple[str, ...]] | None, digest: str):
    self._common, self._lines, self.digest = common, lines, digest
    self.per_image = lines is not None
    self.phrases: tuple[str, ...] = tuple(q.text for q in common)

  @classmethod
  def of_phrases(cls, phrases: Iterable[str]) -> Questions:
    """The same phrases for every image; repetitions are left out.

    Raises:
      ValueError: no phrase, an empty one, or something that is not a string.
    """
    if isinstance(phrases, str):
      raise ValueError(f"phrases must be a list of strings, got the string {phrases!r}")
    phrases = list(phrases)
    for phrase in phrases:
      _check_phrase(phrase, "phrases")
    if not phrases:
      raise ValueError("nothing to look for: give at least one phrase")
    kept = list(dict.fromkeys(phrase.strip() for phrase in phrases))
    digest = hashlib.sha256(json.dumps(kept).encode()).hexdigest()
    return cls(tuple(Prompt(phrase) for phrase in kept), None, digest)

  @classmethod
  def from_file(cls, path: str | os.PathLike) -> Questions:
    """Reads a file of questions, see the module; local or a URL.

    Raises:
      ValueError: a bad line (the message names its number), or a file without questions.
      OSError: it cannot be read.
    """
    lines = list(files.read_lines(os.fspath(path)))
    if not lines:
      raise ValueError(f"{path} holds no phrase; accepted: a phrase a line, or JSON lines with ids")
    if lines[0][1].startswith(("{", "[")):
      return cls._from_json_lines(lines)
    return cls.of_phrases(text for _, text in lines)

  @classmethod
  def _from_json_lines(cls, lines: Iterable[tuple[str, str]]) -> Questions:
    """Lines are kept as they are: a million images' questions as objects would take gigabytes."""
    found: dict[str, tuple[str, ...]] = {}
    phrases: dict[str, None] = {}
    total = 0
    for place, line in lines:
      item_id, questions = _parse(line, place)
      earlier = found.get(item_id, ())
      found[item_id] = (*earlier, line)
      phrases.update((q.text, None) for q in questions if q.text is not None)
      # A sum: the same for any order of the images, but not of the lines about one.
      plain = [[q.text, q.boxes, q.labels] for q in questions]
      content = json.dumps([item_id, len(earlier), plain]).encode()
      total += int.from_bytes(hashlib.sha256(content).digest(), "big")
    self = cls((), found, f"{total % (1 << 256):064x}")
    self.phrases = tuple(phrases)
    return self

  def for_item(self, item_id: str) -> tuple[Prompt, ...]:
    """The questions about an image, in order; () where the file has none about it."""
    if self._lines is None:
      return self._common
    lines = self._lines.get(item_id, ())
    return tuple(question for line in lines for question in _parse(line, "")[1])

  def check_items(self, ids: Iterable[str]) -> int:
    """How many of the images `ids` nothing is asked of.

    Raises:
      ValueError: a question is about an image that is not among `ids`: a typing mistake in the file, or
        another source.
    """
    if self._lines is None:
      return 0
    there = asked = 0
    for item_id in ids:
      there += 1
      asked += item_id in self._lines
    if asked < len(self._lines):
      unknown = set(self._lines).difference(ids)
      raise ValueError(
        f"questions are asked about {len(unknown)} images that the source does not have, "
        f"such as {min(unknown)!r}"
      )
    return there - asked


def _check_phrase(phrase: Any, place: str) -> str:
  if not isinstance(phrase, str):
    raise ValueError(f"{place}: a phrase must be a string, got {phrase!r}")
  if not phrase.strip():
    raise ValueError(f"{place}: a phrase is empty")
  return phrase.strip()


def _parse(line: str, place: str) -> tuple[str, tuple[Prompt, ...]]:
  """A line of JSON to (item id, questions)."""
  try:
    entry = json.loads(line)
  except (ValueError, RecursionError) as e:
    raise ValueError(f"{place} is not JSON: {e}") from None
  if not isinstance(entry, dict):
    raise ValueError(f"{place}: an object is expected, got {shown(line.strip()[:60])}")
  if unknown := sorted(set(entry) - set(_KEYS)):
    raise ValueError(f"{place}: unknown key {unknown[0]!r}; accepted: {', '.join(_KEYS)}")
  item_id = entry.get("id", entry.get("image"))
  if isinstance(item_id, int) and not isinstance(item_id, bool):
    item_id = str(item_id)  # COCO's ids are numbers
  if not isinstance(item_id, str) or not item_id:
    raise ValueError(f'{place}: "id" (or "image") must name an image, got {item_id!r}')
  try:
    prompts = prompts_of(entry.get("text"), entry.get("boxes"), entry.get("box_labels"))
  except ValueError as e:
    raise ValueError(f"{place}: {e}") from None
  phrases = {None if p.text is None else _check_phrase(p.text, place): None for p in prompts}
  boxes = prompts[0].boxes
  labels = (1,) * len(boxes) if prompts[0].labels is None else prompts[0].labels
  return item_id, tuple(Prompt(phrase, boxes, labels) for phrase in phrases)
