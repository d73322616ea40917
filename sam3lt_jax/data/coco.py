"""COCO instance annotations as records: a phrase a category, or one an annotation.

Source: the COCO data format (cocodataset.org/#format-data); LVIS (lvisdataset.org) for the two lists of
categories that its images carry, and for what they mean: nothing is known of a category that an image has no
object of and does not list.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sam3lt_jax.data import annotations as annotation_ops
from sam3lt_jax.data.annotations import LeftOut
from sam3lt_jax.data.numbers import brief
from sam3lt_jax.data.records import Prompt, Record
from sam3lt_jax.errors import shown

_PHRASE_KEYS = ("phrase", "caption")
_NONE = np.zeros((0, 4), np.float32)


class CocoRecords(Sequence):
  """One record an image, in file order, made when it is asked for. Use `load_coco`.

  A category's phrase is its name as words (`annotations.category_words`); all its objects in an image answer
  it. Categories of one phrase are one. An annotation that has a "phrase" (or "caption") answers that one
  instead, together with others of the same phrase. `iscrowd` annotations are left out, and so are objects
  without a pixel or an area; their prompt then counts as not exhaustive. So does that of a supercategory in
  an image that has one of its kinds, and there it is not asked as absent either.

  Attributes:
    name: the file.
    dataset: what the file holds; `coco_ap` takes it.
    by_category: phrases are categories, so that COCO's AP is defined. False where annotations bring their
      own.
    federated: images list the categories that they are known not to have, as LVIS's do.
    phrases: category id to phrase, of the categories that are asked for. Several may have one phrase.
    answers: `Prompt.category_id`, the first category of a phrase, to all of different names that have it.
    negatives: absent categories are asked for as well.
    has_masks: an annotation has a mask.
    left_out: reason to how many objects or parts of them were left out of the records made so far.
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
    self.name, self.dataset = name, dataset
    self._folder, self.negatives = os.fspath(images), negatives
    self._images = annotation_ops.images_of(dataset, name)
    self._lists = [annotation_ops.lists_of(image, name) for image in self._images]
    self.federated = any(absent is not None for absent, _ in self._lists)
    self._annotations = annotation_ops.annotations_by_image(dataset, self._images, name)
    self.has_masks = annotation_ops.has_masks(dataset)
    self._left_out = LeftOut()
    self.left_out = self._left_out.counts
    categories = annotation_ops.categories_of(dataset, name)
    own, plain = self._labels(categories)
    self.by_category = not own
    asked = self._phrases_of(categories, phrases or {}, own - plain)
    self._kinds = _kinds(categories, asked)
    # A root that others only name, as in Roboflow's exports, is nobody's label: it is not asked at all.
    roots = self._kinds.keys() - {_key(asked[i]) for i in plain}
    self.phrases = {i: phrase for i, phrase in asked.items() if _key(phrase) not in roots}
    ids: dict[str, list[int]] = {}
    for i, phrase in self.phrases.items():
      ids.setdefault(_key(phrase), []).append(i)
    self._keys = {i: key for key, same in ids.items() for i in same}
    self._ids = {key: frozenset(same) for key, same in ids.items()}
    self._first = {key: same[0] for key, same in ids.items()}
    named = annotation_ops.first_of_name(categories)
    self.answers = {same[0]: tuple(dict.fromkeys(named[i] for i in same)) for same in ids.values()}

  def _labels(self, categories: Mapping[int, Mapping[str, Any]]) -> tuple[set[int], set[int]]:
    """The categories of annotations that bring their own phrase, and those of annotations that do not."""
    plain, own = set(), set()
    for annotation in itertools.chain.from_iterable(self._annotations.values()):
      category = annotation.get("category_id")
      if _own_phrase(annotation, self.name) is not None:
        own.add(category)
      elif category in categories:
        plain.add(category)
      else:
        raise ValueError(
          f"{self.name}: annotation {brief(annotation.get('id', '?'))} has neither a phrase nor a category "
          f"that is listed (category_id {category!r})"
        )
    return own, plain

  def _phrases_of(
    self, categories: Mapping[int, Mapping[str, Any]], given: Mapping[str, str], without: set[int]
  ) -> dict[int, str]:
    """The phrases of all categories but some; those that mean the same are written as the first one."""
    unknown = sorted(set(given) - {category["name"] for category in categories.values()})
    if unknown:
      raise ValueError(f"phrases are given for {unknown}, which {self.name} has no category of")
    phrases: dict[int, str] = {}
    written: dict[str, str] = {}
    for i, category in categories.items():
      if i in without:
        continue
      name = category["name"]
      phrase = given.get(name, annotation_ops.category_words(name)).strip()
      if not phrase:
        raise ValueError(
          f"{self.name}: category {brief(name)} has an empty phrase; give phrases={{name: phrase}}"
        )
      phrases[i] = written.setdefault(_key(phrase), phrase)
    return phrases

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Record:
    """Raises RecordError ("annotation damaged") where an annotation makes no sense."""
    image = self._images[index]
    absent, not_listed = self._lists[index]
    source = f"{self.name}, image {image.id} ({shown(image.names[-1])})"
    groups: dict[str, list[Mapping[str, Any]]] = {}
    written: dict[str, str] = {}
    described: set[int] = set()  # categories of annotations under a phrase of their own
    for annotation in self._annotations[image.id]:
      own, category = _own_phrase(annotation, self.name), annotation.get("category_id")
      key = _key(own) if own else self._keys[category]
      written.setdefault(key, own or self.phrases[category])
      groups.setdefault(key, []).append(annotation)
      if own and self._keys.get(category) != key:
        described.add(category)
    there = groups.keys() | {self._keys[i] for i in described if i in self._keys}
    listed = {a.get("category_id") for a in self._annotations[image.id]} | (absent or frozenset())
    doubtful = not_listed | described

    def complete(key: str) -> bool:
      """Whether nothing of this phrase can be there beside its annotations."""
      ids = self._ids.get(key, frozenset())
      known = not self.federated or ids <= listed
      return known and ids.isdisjoint(doubtful) and there.isdisjoint(self._kinds.get(key, ()))

    prompts, left_out = [], []
    for key, group in groups.items():
      objects = annotation_ops.objects_of(group, image.size, source)
      left_out += objects.left_out
      exhaustive = objects.complete and complete(key)
      kind = {"category_id": self._first[key]} if key in self._first else {"all_of_kind": False}
      prompts.append(
        Prompt(written[key], objects.boxes, objects.masks, exhaustive, image_id=image.id, **kind)
      )
    if self.negatives:
      prompts += [
        Prompt(self.phrases[i], _NONE, image_id=image.id, category_id=i)
        for key, i in self._first.items()
        if key not in groups and complete(key)
      ]
    self._left_out.add(image.id, left_out)
    return Record(image.id, image.path(self._folder), image.size, tuple(prompts), source)


def _key(phrase: str) -> str:
  """What two phrases have in common that ask for the same: the tokenizer sees neither capitals nor spaces."""
  return " ".join(phrase.split()).casefold()


def _kinds(categories: Mapping[int, Mapping[str, Any]], phrases: Mapping[int, str]) -> dict[str, set[str]]:
  """Phrase (its key) to the phrases of its kinds: of the categories that name it as their supercategory, of
  those that name these, and so on. A category may name itself, as COCO's "person" does: that says nothing."""
  words = annotation_ops.category_words
  keys = {_key(words(categories[i]["name"])): _key(phrase) for i, phrase in phrases.items()}
  below: dict[str, set[str]] = {}
  for i, phrase in phrases.items():
    above = categories[i].get("supercategory")
    parent = keys.get(_key(words(above))) if isinstance(above, str) else None
    if parent is not None and parent != _key(phrase):
      below.setdefault(parent, set()).add(_key(phrase))
  found = {}
  for parent in below:
    kinds, todo = set(), [parent]
    while todo:
      new = below.get(todo.pop(), set()) - kinds
      kinds |= new
      todo += new
    found[parent] = kinds - {parent}
  return found


def _own_phrase(annotation: Mapping[str, Any], name: str) -> str | None:
  for key in _PHRASE_KEYS:
    phrase = annotation.get(key)
    if phrase is not None:
      if not isinstance(phrase, str) or not phrase.strip():
        where = f"{name}: annotation {brief(annotation.get('id', '?'))}"
        raise ValueError(f"{where} has an empty {key}: {brief(phrase)}")
      return phrase.strip()
  return None


def load_coco(
  annotations: str | os.PathLike | Mapping[str, Any],
  images: str | os.PathLike,
  *,
  negatives: bool = True,
  phrases: Mapping[str, str] | None = None,
) -> CocoRecords:
  """Reads COCO instance annotations; arguments and errors as `load.load_records`."""
  data, name = annotation_ops.read_dataset(annotations, images)
  return CocoRecords(data, images, name, negatives=negatives, phrases=phrases)
