"""Annotation files: what COCO, LVIS and SA-Co share, read in one place for training, evaluation and jobs.

A file is read as people have it: with a byte-order mark, ids and `iscrowd` as text, LVIS's images without a
`file_name`. What makes no sense is a ValueError that names the file and the entry.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sam3lt_jax.config import read_json
from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.data.numbers import brief, flag, ids, image_size, numbers, whole
from sam3lt_jax.data.records import RecordError
from sam3lt_jax.data.rle import Rle

_log = logging.getLogger(__name__)


class ImageEntry(NamedTuple):
  """An entry of "images".

  Attributes:
    id: of the image.
    names: where its file may be below the folder of images, the likeliest place first.
    size: (height, width) in pixels, or None where the entry does not say.
    fields: the entry.
  """

  id: int
  names: tuple[str, ...]
  size: tuple[int, int] | None
  fields: Mapping[str, Any]

  def path(self, folder: str) -> str:
    """The image's path: the first of `names` that exists, else the last."""
    paths = [os.path.join(folder, name) for name in self.names]
    return next((path for path in paths[:-1] if os.path.exists(path)), paths[-1])


def read_annotations(annotations: str | os.PathLike | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
  """An annotation file (or what it holds) and its name for messages; "images" and "annotations" are lists.

  Raises:
    FileNotFoundError: no such file.
    ValueError: not JSON, or without lists of images and annotations.
  """
  if isinstance(annotations, Mapping):
    data, name = annotations, "annotations"
  else:
    name = os.fspath(annotations)
    data = read_json(name)
  entries_of(data, "images", name)
  entries_of(data, "annotations", name)
  return data, name


def read_dataset(
  annotations: str | os.PathLike | Mapping[str, Any], images: str | os.PathLike
) -> tuple[Mapping[str, Any], str]:
  """As `read_annotations`, and FileNotFoundError where there is no folder `images`."""
  data, name = read_annotations(annotations)
  if not os.path.isdir(images):
    raise FileNotFoundError(2, "No such folder of images", os.fspath(images))
  return data, name


def entries_of(data: Any, key: str, name: str) -> list[Mapping[str, Any]]:
  """The list of objects under a key; ValueError where it is something else."""
  if not isinstance(data, Mapping):
    raise ValueError(f"{name} must hold an object with images and annotations, got {type(data).__name__}")
  if key in data and not isinstance(data[key], list):
    raise ValueError(f"{name}: {key!r} must be a list, got {brief(data[key])}")
  if key not in data:
    keys = ", ".join(map(brief, list(data)[:8])) or "nothing"
    raise ValueError(f"{name} has no list {key!r}; it has: {keys}")
  for i, entry in enumerate(data[key]):
    if type(entry) is not dict and not isinstance(entry, Mapping):
      raise ValueError(f"{name}: entry {i} of {key!r} must be an object, got {type(entry).__name__}")
  return data[key]


def images_of(data: Any, name: str, sizes: bool = True) -> list[ImageEntry]:
  """What "images" lists, in file order; the one reader of it, for jobs as well.

  Args:
    data: what the file holds.
    name: the file's, for messages.
    sizes: each must say its height and width. False: it may.

  Raises:
    ValueError: no list, an empty one, or an entry without an id of its own, a file name, a size; named.
  """
  found, seen = [], set()
  for i, entry in enumerate(entries_of(data, "images", name)):
    image_id = whole(entry.get("id"), f"{name}: the id of image {i}")
    if image_id in seen:
      raise ValueError(f"{name}: image {i} has an id of another image, {image_id}")
    seen.add(image_id)
    names = _file_names(entry)
    if not names:
      raise ValueError(f"{name}: image {image_id} has no file_name (and no coco_url, as LVIS has)")
    sides = entry.get("height"), entry.get("width")
    size = None if not sizes and None in sides else image_size(*sides, f"{name}: image {image_id}")
    found.append(ImageEntry(image_id, names, size, entry))
  if not found:
    raise ValueError(f"{name} lists no images")
  return found


def _file_names(entry: Mapping[str, Any]) -> tuple[str, ...]:
  name, url = entry.get("file_name"), entry.get("coco_url")
  if isinstance(name, str) and name.strip():
    return (name,)
  if not isinstance(url, str):
    return ()
  # ".../train2017/000000391895.jpg": an LVIS set takes images of several of COCO's folders.
  *_, split, base = ["", *url.partition("?")[0].split("/")]
  return tuple(dict.fromkeys((f"{split}/{base}" if split else base, base))) if base else ()


def annotations_by_image(
  data: Mapping[str, Any], images: Sequence[ImageEntry], name: str
) -> dict[int, list[Mapping[str, Any]]]:
  """The annotations under their image's id, in file order.

  Of each, `image_id` and `category_id` (where there is one) are ints, `iscrowd` is 0 or 1.

  Raises:
    ValueError: naming an annotation of an image that is not listed, or with an id or flag that is none.
  """
  grouped: dict[int, list[Mapping[str, Any]]] = {image.id: [] for image in images}
  for i, annotation in enumerate(entries_of(data, "annotations", name)):
    image_id = annotation.get("image_id")
    if not _is_plain(annotation) or image_id not in grouped:
      where = f"{name}: annotation {brief(annotation.get('id', f'number {i}'))}"
      annotation = _plain(annotation, where)
      image_id = annotation["image_id"]
      if image_id not in grouped:
        raise ValueError(f"{where} is of image {image_id}, which 'images' does not list")
    grouped[image_id].append(annotation)
  return grouped


def _is_plain(annotation: Mapping[str, Any]) -> bool:
  """Whether an annotation is written as COCO's own are: nearly all of them, and there may be a million."""
  get = annotation.get
  return type(get("image_id")) is type(get("category_id")) is type(get("iscrowd")) is int and (
    0 <= get("iscrowd") <= 1 and "is_crowd" not in annotation
  )


def _plain(annotation: Mapping[str, Any], where: str) -> Mapping[str, Any]:
  crowd = [flag(annotation.get(key), f"{where}: its {key}") for key in ("iscrowd", "is_crowd")]
  read = {"image_id": whole(annotation.get("image_id"), f"{where}: its image_id"), "iscrowd": int(any(crowd))}
  if annotation.get("category_id") is not None:
    read["category_id"] = whole(annotation["category_id"], f"{where}: its category_id")
  return {**annotation, **read}


def has_masks(data: Mapping[str, Any]) -> bool:
  """Whether any annotation has something for a mask."""
  found = (annotation.get("segmentation") for annotation in data["annotations"])
  return any(bool(s) and (not isinstance(s, list) or any(s)) for s in found)


def categories_of(data: Mapping[str, Any], name: str) -> dict[int, Mapping[str, Any]]:
  """The categories under their ids, each with a name, in file order; none where the file lists none.

  Raises:
    ValueError: naming one without a name or an id of its own.
  """
  found: dict[int, Mapping[str, Any]] = {}
  for i, category in enumerate(entries_of(data, "categories", name) if data.get("categories") else ()):
    called = category.get("name")
    if not isinstance(called, str):
      raise ValueError(f"{name}: category {i} has no name, got {brief(called)}")
    category_id = whole(category.get("id"), f"{name}: the id of category {brief(called)}")
    if category_id in found:
      raise ValueError(f"{name}: category {brief(called)} has no id of its own, got {category_id} again")
    found[category_id] = category
  return found


def category_words(name: str) -> str:
  """A category's name as words: "baseball_bat" is "baseball bat", "mouse_(computer_equipment)" is "mouse".

  A name with a space in it is left as it is: its author wrote words.
  """
  if any(c.isspace() for c in name.strip()):
    return name
  return re.sub(r"_\([^()]*\)", "", name).replace("_", " ")


def first_of_name(categories: Mapping[int, Mapping[str, Any]]) -> dict[int, int]:
  """Category id to that of the first category of its name: an export of several sets may list one twice."""
  first: dict[str, int] = {}
  return {
    i: first.setdefault(" ".join(category["name"].replace("_", " ").split()).casefold(), i)
    for i, category in categories.items()
  }


def lists_of(image: ImageEntry, name: str) -> tuple[frozenset[int] | None, frozenset[int]]:
  """LVIS's lists of an image: categories that are known to be absent (None: there is no such list), and those
  whose objects are not all annotated. Raises ValueError, naming the image."""
  lists = []
  for key in ("neg_category_ids", "not_exhaustive_category_ids"):
    given = image.fields.get(key)
    lists.append(None if given is None else ids(given, f"{name}: image {image.id}: {key}"))
  return lists[0], lists[1] or frozenset()


class Objects(NamedTuple):
  """Of annotations: boxes float32 [N, 4] (x1, y1, x2, y2) in pixels, N masks (None: only the box is known),
  whether all are among them, and a (reason, where) for each object or part of one that was left out."""

  boxes: np.ndarray
  masks: tuple[Rle | None, ...]
  complete: bool
  left_out: list[tuple[str, str]]


def objects_of(
  annotations: Sequence[Mapping[str, Any]], size: tuple[int, int], source: str, normalised: bool = False
) -> Objects:
  """The objects of annotations.

  A box is the one around the mask where there is a mask, else the annotation's `bbox` (x, y, width, height),
  in pixels or, if `normalised`, in units of the image's sides; clipped to the image. Left out are crowds,
  polygons of under three corners, and objects whose mask has no pixel or whose box has no area.

  Raises:
    RecordError: "annotation damaged", naming the annotation.
  """
  boxes, masks, left_out = [], [], []
  for annotation in annotations:
    if annotation.get("iscrowd"):
      continue
    where = f"{source}, annotation {brief(annotation.get('id', '?'))}"
    try:
      box, mask, reasons = _object(annotation, size, normalised)
    except ValueError as e:
      raise RecordError("annotation damaged", f"{where}: {e}") from e
    left_out += [(reason, where) for reason in reasons]
    if box is not None:
      boxes.append(box)
      masks.append(mask)
  complete = len(boxes) == len(annotations)
  return Objects(np.array(boxes, np.float32).reshape(-1, 4), tuple(masks), complete, left_out)


def _object(
  annotation: Mapping[str, Any], size: tuple[int, int], normalised: bool
) -> tuple[np.ndarray | None, Rle | None, list[str]]:
  """(box, mask, why a part of it or all was left out); no box: the object is left out."""
  mask, gone = rle_ops.read(annotation.get("segmentation"), size)
  reasons = ["a polygon of under three corners"] * gone
  if mask is not None:
    if rle_ops.area(mask):
      return rle_ops.bounds(mask), mask, reasons
    return None, None, [*reasons, "a mask without a pixel"]
  if gone and annotation.get("bbox") is None:
    return None, None, reasons
  values = numbers(annotation.get("bbox"), "it has no mask, and its bbox [x, y, width, height]")
  if len(values) != 4:
    raise ValueError(f"it has no mask, and its bbox must be [x, y, width, height], got {values.tolist()}")
  limits = np.array([size[1], size[0]] * 2, np.float64)
  if normalised:
    values = values * limits
  box = np.clip(np.concatenate([values[:2], values[:2] + values[2:]]), 0, limits)
  if not (box[2:] > box[:2]).all():
    return None, None, [*reasons, "a box without area in the image"]
  return box, None, reasons


class LeftOut:
  """Counts what was left out of records, each record once however often it is made, and logs it: the first of
  a reason, the tenth, the hundredth, ...

  Attributes:
    counts: reason to how many.
  """

  def __init__(self):
    self.counts: dict[str, int] = {}
    self._seen: set[int] = set()

  def add(self, record: int, found: Sequence[tuple[str, str]]) -> None:
    """`found`: (reason, where) of each part or object of the record."""
    if record in self._seen:
      return
    self._seen.add(record)
    for reason, where in found:
      count = self.counts[reason] = self.counts.get(reason, 0) + 1
      if str(count).strip("0") == "1":
        _log.warning("left out so far: %d x %s; now of %s", count, reason, where)
