"""SA-Co annotations as records: image-phrase pairs, present or absent.

Source: the description of the format in SAM 3's repository (scripts/eval/gold/README.md): each entry of
"images" is one pair of an image and a phrase (`text_input`), so several entries name one file; an entry
without annotations is a negative; `is_instance_exhaustive` says whether every instance is annotated one by
one; `bbox` is in units of the image's sides; `segmentation` is an RLE.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from sam3lt_jax.data import annotations as annotation_ops
from sam3lt_jax.data.annotations import ImageEntry, LeftOut
from sam3lt_jax.data.numbers import brief, flag, numbers
from sam3lt_jax.data.records import Prompt, Record
from sam3lt_jax.errors import shown

_MOST_NORMALISED = 1.5  # a bbox value above it is in pixels


class SaCoRecords(Sequence):
  """One record an image file, with all its phrases, made when it is asked for. Use `load_saco`.

  In order of first appearance. Entries of one `file_name` become one record with a prompt each; their ids
  stay as `Prompt.image_id`, the record has the first one's. Crowd annotations are left out, and so are
  objects without a pixel or an area; the pair then counts as not exhaustive.

  Attributes:
    name: the file.
    pairs: how many image-phrase pairs there are.
    has_masks: an annotation has a mask.
    left_out: reason to how many objects or parts of them were left out of the records made so far.
  """

  def __init__(self, dataset: Mapping[str, Any], images: str | os.PathLike, name: str = "annotations"):
    self.name, self._folder = name, os.fspath(images)
    entries = annotation_ops.images_of(dataset, name)
    self._annotations = annotation_ops.annotations_by_image(dataset, entries, name)
    self._files: dict[tuple[str, ...], list[tuple[ImageEntry, str, bool]]] = {}
    for entry in entries:
      phrase = entry.fields.get("text_input")
      if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError(f"{name}: image {entry.id} has no text_input, got {brief(phrase)}")
      exhaustive = flag(
        entry.fields.get("is_instance_exhaustive", True), f"{name}: image {entry.id}: is_instance_exhaustive"
      )
      pairs = self._files.setdefault(entry.names, [])
      if pairs and pairs[0][0].size != entry.size:
        (h, w), (height, width) = entry.size, pairs[0][0].size
        raise ValueError(
          f"{name}: image {entry.id} says {shown(entry.names[0])} is {w}x{h} pixels, an entry before it "
          f"says {width}x{height}"
        )
      pairs.append((entry, phrase.strip(), exhaustive))
    self._names = list(self._files)
    self.pairs = len(entries)
    self._normalised = _is_normalised(dataset["annotations"])
    self.has_masks = annotation_ops.has_masks(dataset)
    self._left_out = LeftOut()
    self.left_out = self._left_out.counts

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> Record:
    """Raises RecordError ("annotation damaged") where an annotation makes no sense."""
    pairs = self._files[self._names[index]]
    first = pairs[0][0]
    left_out: list[tuple[str, str]] = []
    prompts = tuple(self._prompt(*pair, left_out) for pair in pairs)
    self._left_out.add(first.id, left_out)
    return Record(first.id, first.path(self._folder), first.size, prompts, self._source(first))

  def _source(self, entry: ImageEntry) -> str:
    return f"{self.name}, image {entry.id} ({shown(entry.names[-1])})"

  def _prompt(
    self, entry: ImageEntry, phrase: str, exhaustive: bool, left_out: list[tuple[str, str]]
  ) -> Prompt:
    annotations, source = self._annotations[entry.id], self._source(entry)
    objects = annotation_ops.objects_of(annotations, entry.size, source, self._normalised)
    left_out += objects.left_out
    return Prompt(phrase, objects.boxes, objects.masks, exhaustive and objects.complete, image_id=entry.id)


def _is_normalised(annotations: Sequence[Mapping[str, Any]]) -> bool:
  """Whether boxes are in units of the image's sides: no value of the whole file says otherwise."""
  for annotation in annotations:
    try:
      box = numbers(annotation.get("bbox"), "bbox")
    except ValueError:  # named when its record is made
      continue
    if (box > _MOST_NORMALISED).any():
      return False
  return True


def load_saco(annotations: str | os.PathLike | Mapping[str, Any], images: str | os.PathLike) -> SaCoRecords:
  """Reads SA-Co annotations; arguments and errors as `load.load_records`."""
  data, name = annotation_ops.read_dataset(annotations, images)
  return SaCoRecords(data, images, name)
