"""COCO instance annotations as records: a phrase a category, or one an annotation.

Source: the COCO data format (cocodataset.org/#format-data); LVIS (lvisdataset.org) for the two lists of
categories that its images carry.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sam3lt_jax.data import records as record_ops
from sam3lt_jax.data.records import Prompt, Record

_PHRASE_KEYS = ("phrase", "caption")


class CocoRecords(Sequence):
  """One record an image, made when it is asked for. Use `load_coco`.

  Attributes:
    name: the file.
    dataset: what the file holds; `coco_ap` takes it.
    by_category: phrases are categories, so that COCO's AP is defined. False where annotations bring their
      own.
    phrases: category id to phrase, of the categories that are asked for.
    negatives: absent categories are asked for as well.
  """

  def __init__(
    self,
    dataset: Mapping[str, Any],
    images: str | os.PathLike,
    name: str = "annotations",
    *,
    negatives: bool = True,
    phrases: Mapping[str, str] | None = None,
  ):
    record_ops.check_dataset(dataset, name)
    self.name, self.dataset = name, dataset
    self._folder, self.negatives = os.fspath(images), negatives
    self._entries = [(entry, *record_ops.image_entry(entry, name)) for entry in dataset["images"]]
    self._annotations = record_ops.annotations_by_image(dataset, name)
    self.phrases, self.by_category = self._category_phrases(phrases or {})

  def _category_phrases(self, given: Mapping[str, str]) -> tuple[dict[int, str], bool]:
    """The phrases of categories, without those whose every annotation has a phrase of its own."""
    categories = self.dataset.get("categories") or []
    names: dict[int, str] = {}
    for i, category in enumerate(categories):
      if not isinstance(category, Mapping) or not isinstance(category.get("name"), str):
        raise ValueError(f"{self.name}: category {i} has no name")
      if not isinstance(category.get("id"), int) or category["id"] in names:
        raise ValueError(f"{self.name}: category {category['name']!r} has no id of its own")
      names[category["id"]] = category["name"]
    unknown = sorted(set(given) - set(names.values()))
    if unknown:
      raise ValueError(f"phrases are given for {unknown}, which {self.name} has no category of")
    plain, own = set(), set()
    for annotation in self.dataset["annotations"]:
      category = annotation.get("category_id")
      if _own_phrase(annotation, self.name) is not None:
        own.add(category)
      elif category in names:
        plain.add(category)
      else:
        raise ValueError(
          f"{self.name}: annotation {annotation.get('id', '?')} has neither a phrase nor a category that is "
          f"listed (category_id {category!r})"
        )
    phrases: dict[int, str] = {}
    taken: dict[str, str] = {}
    for i, category in names.items():
      if i in own and i not in plain:
        continue
      phrase = given.get(category, category.replace("_", " ")).strip()
      if not phrase or phrase in taken:
        clash = f"the phrase of category {taken[phrase]!r}" if phrase else "an empty phrase"
        raise ValueError(f"{self.name}: category {category!r} has {clash}; give phrases={{name: phrase}}")
      taken[phrase] = category
      phrases[i] = phrase
    return phrases, not own

  def __len__(self) -> int:
    return len(self._entries)

  def __getitem__(self, index: int) -> Record:
    """Raises RecordError ("annotation damaged") where an annotation makes no sense."""
    entry, file_name, size = self._entries[index]
    source = f"{self.name}, image {entry['id']} ({file_name})"
    by_category: dict[int, list] = {}
    by_phrase: dict[str, list] = {}
    for annotation in self._annotations[entry["id"]]:
      own = _own_phrase(annotation, self.name)
      if own is None:
        by_category.setdefault(annotation["category_id"], []).append(annotation)
      else:
        by_phrase.setdefault(own, []).append(annotation)
    prompts = [
      self._prompt(self.phrases[i], annotations, entry, size, source, i)
      for i, annotations in by_category.items()
    ]
    prompts += [self._prompt(p, annotations, entry, size, source) for p, annotations in by_phrase.items()]
    if self.negatives:
      present = {a.get("category_id") for a in self._annotations[entry["id"]]}
      allowed = entry.get("neg_category_ids", self.phrases)
      prompts += [
        Prompt(phrase, [], image_id=entry["id"], category_id=i)
        for i, phrase in self.phrases.items()
        if i not in present and i in allowed and phrase not in by_phrase
      ]
    return Record(entry["id"], os.path.join(self._folder, file_name), size, tuple(prompts), source)

  def _prompt(self, phrase, annotations, entry, size, source, category: int | None = None) -> Prompt:
    single = [a for a in annotations if not record_ops.is_crowd(a)]
    boxes, masks = record_ops.objects_of(single, size, source)
    exhaustive = len(single) == len(annotations) and category not in entry.get(
      "not_exhaustive_category_ids", ()
    )
    kind = {"all_of_kind": False} if category is None else {"category_id": category}
    return Prompt(phrase, boxes, masks, exhaustive, image_id=entry["id"], **kind)


def _own_phrase(annotation: Mapping[str, Any], name: str) -> str | None:
  for key in _PHRASE_KEYS:
    phrase = annotation.get(key)
    if phrase is not None:
      if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError(f"{name}: annotation {annotation.get('id', '?')} has an empty {key}: {phrase!r}")
      return phrase.strip()
  return None


def load_coco(
  annotations: str | os.PathLike | Mapping[str, Any],
  images: str | os.PathLike,
  *,
  negatives: bool = True,
  phrases: Mapping[str, str] | None = None,
) -> CocoRecords:
  """Reads COCO instance annotations.

  A category's phrase is its name with underscores as spaces; all its objects in an image answer it. An
  annotation that has a "phrase" (or "caption") answers that one instead, together with others of the same
  phrase. `iscrowd` annotations are left out, and their prompt then counts as not exhaustive.

  Args:
    annotations: the JSON file, or what it holds.
    images: the folder that `file_name` is relative to.
    negatives: also ask for the categories that an image has none of. Where an image lists
      `neg_category_ids` (LVIS), for those alone; `not_exhaustive_category_ids` are followed as well.
    phrases: category name to phrase, where the name is not what one would say.

  Returns:
    A sequence of `Record`s, one an image, in file order. Polygons are drawn when a record is asked for, which
    raises RecordError where one of its annotations is damaged.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: not COCO's format; the message names the file and the entry.
  """
  data, name = record_ops.read_dataset(annotations, images)
  return CocoRecords(data, images, name, negatives=negatives, phrases=phrases)
