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

from sam3lt_jax.data import records as record_ops
from sam3lt_jax.data.records import Prompt, Record

_MOST_NORMALISED = 1.5  # a bbox value above it is in pixels


class SaCoRecords(Sequence):
  """One record an image file, with all its phrases, made when it is asked for. Use `load_saco`.

  Attributes:
    name: the file.
    pairs: how many image-phrase pairs there are.
  """

  def __init__(self, dataset: Mapping[str, Any], images: str | os.PathLike, name: str = "annotations"):
    record_ops.check_dataset(dataset, name)
    self.name, self._folder = name, os.fspath(images)
    self._annotations = record_ops.annotations_by_image(dataset, name)
    self._files: dict[str, list[Mapping[str, Any]]] = {}
    self._sizes: dict[str, tuple[int, int]] = {}
    for entry in dataset["images"]:
      file_name, size = record_ops.image_entry(entry, name)
      phrase = entry.get("text_input")
      if not isinstance(phrase, str) or not phrase.strip():
        raise ValueError(f"{name}: image {entry['id']} has no text_input, got {phrase!r}")
      if self._sizes.setdefault(file_name, size) != size:
        raise ValueError(
          f"{name}: image {entry['id']} says {file_name} is {size[1]}x{size[0]} pixels, an entry before it "
          f"says {self._sizes[file_name][1]}x{self._sizes[file_name][0]}"
        )
      self._files.setdefault(file_name, []).append(entry)
    self._names = list(self._files)
    self.pairs = len(dataset["images"])
    self._normalised = _is_normalised(dataset["annotations"])

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> Record:
    """Raises RecordError ("annotation damaged") where an annotation makes no sense."""
    file_name = self._names[index]
    size, entries = self._sizes[file_name], self._files[file_name]
    source = f"{self.name}, image {entries[0]['id']} ({file_name})"
    prompts = tuple(self._prompt(entry, size, file_name) for entry in entries)
    return Record(entries[0]["id"], os.path.join(self._folder, file_name), size, prompts, source)

  def _prompt(self, entry: Mapping[str, Any], size: tuple[int, int], file_name: str) -> Prompt:
    annotations = self._annotations[entry["id"]]
    single = [a for a in annotations if not record_ops.is_crowd(a)]
    source = f"{self.name}, image {entry['id']} ({file_name})"
    boxes, masks = record_ops.objects_of(single, size, source, self._normalised)
    exhaustive = bool(entry.get("is_instance_exhaustive", True)) and len(single) == len(annotations)
    return Prompt(entry["text_input"].strip(), boxes, masks, exhaustive, image_id=entry["id"])


def _is_normalised(annotations: Sequence[Mapping[str, Any]]) -> bool:
  """Whether boxes are in units of the image's sides: no value of the whole file says otherwise."""
  for annotation in annotations:
    box = annotation.get("bbox")
    if isinstance(box, (list, tuple)) and any(
      isinstance(v, (int, float)) and v > _MOST_NORMALISED for v in box
    ):
      return False
  return True


def load_saco(annotations: str | os.PathLike | Mapping[str, Any], images: str | os.PathLike) -> SaCoRecords:
  """Reads SA-Co annotations.

  Entries of one `file_name` become one record with a prompt each; their ids stay as `Prompt.image_id`, the
  record has the first one's. Crowd annotations are left out, and the pair then counts as not exhaustive.

  Args:
    annotations: the JSON file, or what it holds.
    images: the folder that `file_name` is relative to.

  Returns:
    A sequence of `Record`s, one an image file, in order of first appearance.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: not SA-Co's format; the message names the file and the entry.
  """
  data, name = record_ops.read_dataset(annotations, images)
  return SaCoRecords(data, images, name)
