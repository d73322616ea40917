"""What a prediction is: the instances found in one image, as numpy arrays that belong together."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from sam3lt_jax.errors import needed
from sam3lt_jax.processing import masks as masks_module
from sam3lt_jax.processing import postprocess
from sam3lt_jax.processing.arrays import to_numpy

if TYPE_CHECKING:
  from PIL import Image

_MAX_PALETTE = 255  # instances an 8-bit palette PNG can hold beside the background
_REPR_ROWS = 10
PACKED_ABOVE = 1 << 28  # bytes of masks that results hold as they are; of more, an eighth


class Instance(NamedTuple):
  """One found instance: `box` float32 [4] xyxy pixels, `score`, `mask` bool [H, W], `label`."""

  box: np.ndarray
  score: float
  mask: np.ndarray
  label: str

  def __repr__(self) -> str:
    return (
      f"Instance({_line(self.label, self.score, self.box)}, mask of {np.count_nonzero(self.mask)} pixels)"
    )


class PackedMasks:
  """Masks [N, H, W], a bit a pixel.

  Attributes:
    bits: uint8 [N, H, ceil(W / 8)], see `numpy.packbits`.
    size: (H, W).
  """

  def __init__(self, bits: np.ndarray, size: tuple[int, int]):
    self.bits, self.size = bits, size

  def __len__(self) -> int:
    return len(self.bits)

  def __getitem__(self, index: Any) -> np.ndarray | PackedMasks:
    """A mask, bool [H, W], by its number; of several numbers they stay packed."""
    if np.ndim(index):
      return PackedMasks(self.bits[index], self.size)
    return np.unpackbits(self.bits[index], axis=-1, count=self.size[1]).view(bool)


def hold_masks(masks: Iterable[np.ndarray], count: int, size: tuple[int, int]) -> np.ndarray | PackedMasks:
  """`count` masks, bool [H, W], one at a time, for `Results`: 20 of 180 megapixels would take 3.6 GB."""
  packed = count * size[0] * size[1] > PACKED_ABOVE
  held = np.empty((count, size[0], -(-size[1] // 8)), np.uint8) if packed else np.empty((count, *size), bool)
  for row, mask in zip(held, masks):
    row[...] = np.packbits(mask, axis=-1) if packed else mask
  return PackedMasks(held, size) if packed else held


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Results:
  """The instances found in one image, for one or several prompts.

  Axes: N instances, H image height, W image width. N may be 0: every array then keeps its other axes.
  A list of results: `len(results)`, `results[0]` is an `Instance`, iteration yields them. A slice, a boolean
  mask [N] or a list of indices gives `Results` again: `results[results.scores > 0.7]`.

  Attributes:
    boxes: float32 [N, 4], (x1, y1, x2, y2) in pixels, clipped to the image.
    scores: float32 [N], 0 to 1.
    masks: bool [N, H, W], True on the instance. Instances may overlap. Of a huge picture (together above 256
      MB) `Predictor` keeps them a bit a pixel, and this is made when it is first asked for. Each for itself,
      by index or in a loop, is made for the moment, as all that draws, counts or writes them does.
    labels: tuple of N strings, the phrase each instance answers; "visual" for prompts of boxes alone.
    size: (height, width) of the image.
    logits: float32 [N, h, w], the masks as the tracker gave them, to start from in a next round; None where
      they do not come from clicks.
    ids: int64 [N], which object of a video each instance is, the same in every frame; None for a photo.
    image: the picture, or where it lies: what `Predictor` was given, not a copy of it. `render`, `show`,
      `plot`, `save` and a notebook's display draw on it. None: not remembered; each of them takes a picture.

  Raises:
    ValueError: the arrays' shapes do not fit each other. (Of no instance, [0] is accepted for any shape.)
  """

  boxes: np.ndarray
  scores: np.ndarray
  masks: np.ndarray
  labels: tuple[str, ...]
  size: tuple[int, int]
  logits: np.ndarray | None = None
  ids: np.ndarray | None = None
  image: Any = None

  def __post_init__(self):
    size = tuple(map(int, self.size))
    if len(size) != 2 or min(size) < 1:
      raise ValueError(f"size must be (height, width), both positive, got {self.size!r}")
    if isinstance(self.labels, str):
      raise ValueError(
        f"labels must be a sequence of strings, one an instance, got the string {self.labels!r}"
      )
    labels = tuple(str(label) for label in self.labels)
    n = len(labels)
    wanted = {"boxes": (n, 4), "scores": (n,), "masks": (n, *size)}
    if isinstance(self.masks, PackedMasks):
      self.__dict__["_packed"] = self.__dict__.pop("masks")
      if (len(self._packed), *self._packed.size) != wanted.pop("masks"):
        raise ValueError(f"masks must be {n} of size {size}, got {len(self._packed)} of {self._packed.size}")
    for name, shape in wanted.items():
      array = to_numpy(getattr(self, name), name).astype(bool if name == "masks" else np.float32, copy=False)
      if array.size == 0 and n == 0 and array.shape[:1] in ((), (0,)):
        array = array.reshape(shape)
      if array.shape != shape:
        raise ValueError(
          f"{name} must have shape {shape} for {n} labels and an image of size {size}, got {array.shape}"
        )
      self.__dict__[name] = array
    self.__dict__.update(boxes=postprocess.clip_boxes(self.boxes, size), labels=labels, size=size)
    if self.logits is not None and (np.ndim(self.logits) != 3 or len(self.logits) != n):
      raise ValueError(f"logits must have shape ({n}, h, w), got {np.shape(self.logits)}")
    if self.ids is not None:
      ids = to_numpy(self.ids, "ids")
      if ids.shape != (n,) or (n and ids.dtype.kind not in "iu"):
        raise ValueError(
          f"ids must be {n} integers, one an instance, or None, got {ids.dtype} of shape {ids.shape}"
        )
      self.__dict__["ids"] = ids.astype(np.int64, copy=False)

  def _unpacked(self, name: str) -> Any:
    if name != "masks" or "_packed" not in self.__dict__:
      raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
    masks = np.unpackbits(self._packed.bits, axis=-1, count=self.size[1]).view(bool)
    self.__dict__["masks"] = masks
    return masks

  if not TYPE_CHECKING:  # a checker would take any name for one of ours
    __getattr__ = _unpacked

  @property
  def _held(self) -> np.ndarray | PackedMasks:
    """The masks as they lie in memory."""
    return self.__dict__["masks"] if "masks" in self.__dict__ else self._packed

  @classmethod
  def empty(cls, size: tuple[int, int]) -> Results:
    """No instance in an image of `size` (height, width)."""
    return cls(np.zeros((0, 4)), np.zeros(0), np.zeros((0, *size), bool), (), size)

  @classmethod
  def concatenate(cls, results: Iterable[Results]) -> Results:
    """All instances of several results of the same image, in the order given.

    `ids` stay if all that hold an instance have them, `image` the first one's; `logits` do not stay.

    Raises:
      ValueError: no results, or results of images of different sizes.
    """
    parts = list(results)
    if not parts:
      raise ValueError("results must hold at least one Results; use Results.empty(size) for none")
    sizes = sorted({part.size for part in parts})
    if len(sizes) > 1:
      raise ValueError(f"results must belong to images of one size, got (height, width) {sizes}")
    ids = [part.ids for part in parts if len(part)]
    return cls(
      np.concatenate([part.boxes for part in parts]),
      np.concatenate([part.scores for part in parts]),
      hold_masks((one.mask for part in parts for one in part), sum(map(len, parts)), parts[0].size),
      tuple(label for part in parts for label in part.labels),
      parts[0].size,
      ids=None if not ids or any(i is None for i in ids) else np.concatenate(ids),
      image=next((part.image for part in parts if part.image is not None), None),
    )

  @classmethod
  def from_coco(
    cls, coco: Mapping[str, Any] | str | os.PathLike, image_id: int | str | None = None
  ) -> Results:
    """The annotations of one image of a COCO data set, as `to_json` writes one.

    Args:
      coco: the data set, as a dictionary or the path of its JSON file.
      image_id: which of its images; None if it has one.

    Returns:
      Labels are the categories' names, scores 1 where there are none, boxes the masks' where there are none.
      Annotations without a mask are left out. `ids` are the `track_id`s, if all have one.

    Raises:
      ValueError: no such image, or what is wrong with an annotation.
    """
    from sam3lt_jax.data import rle

    if not isinstance(coco, Mapping):
      with open(coco, encoding="utf-8") as f:
        coco = json.load(f)
    try:
      images = {image["id"]: image for image in coco["images"]}
      if image_id is None:
        if len(images) != 1:
          raise ValueError(f"image_id must be given for a data set of {len(images)} images")
        (image_id,) = images
      if image_id not in images:
        raise ValueError(f"image_id must be the id of one of {len(images)} images, got {image_id!r}")
      size = int(images[image_id]["height"]), int(images[image_id]["width"])
      names = {category["id"]: category["name"] for category in coco.get("categories", ())}
      rows, masks, boxes = [], [], []
      for row in coco.get("annotations", ()):
        if row["image_id"] != image_id:
          continue
        try:
          mask, _ = rle.read(row.get("segmentation"), size)
        except ValueError as e:
          raise ValueError(f"annotation {row.get('id')!r}: {e}") from e
        if mask is None:
          continue
        rows.append(row)
        masks.append(mask)
        boxes.append(rle.bounds(mask))
        if "bbox" in row:
          x, y, width, height = row["bbox"]
          boxes[-1] = x, y, x + width, y + height
      return cls(
        np.reshape(np.array(boxes, np.float32), (len(rows), 4)),
        [row.get("score", 1.0) for row in rows],
        hold_masks(map(rle.decode, masks), len(rows), size),
        [names.get(row["category_id"], row["category_id"]) for row in rows],
        size,
        ids=[row["track_id"] for row in rows] if rows and all("track_id" in row for row in rows) else None,
      )
    except KeyError as e:
      raise ValueError(f"coco must be a COCO data set: an entry of it has no {e}") from e

  def __len__(self) -> int:
    return len(self.labels)

  def __iter__(self) -> Iterator[Instance]:
    return (self[i] for i in range(len(self)))

  @overload
  def __getitem__(self, key: int | np.integer) -> Instance: ...

  @overload
  def __getitem__(self, key: slice | np.ndarray | Sequence[int] | Sequence[bool]) -> Results: ...

  def __getitem__(self, key):
    """An `Instance` for an integer; `Results` for a slice, a boolean mask [N] or a sequence of integers.

    Raises:
      IndexError: an integer out of range.
      ValueError: a mask of another length, or a key of another kind.
    """
    if isinstance(key, (bool, np.bool_, str)):
      # `results.labels == "truck"` is False, not a mask: labels is a tuple.
      raise ValueError(
        f"an index must be an integer, a slice, a boolean mask [N] or a list of integers, got {key!r}; "
        "to choose by label use results.with_label('...')"
      )
    if isinstance(key, (int, np.integer)):
      i = int(key)
      if not -len(self) <= i < len(self):
        raise IndexError(f"index {i} is out of range for {len(self)} instances")
      return Instance(self.boxes[i], float(self.scores[i]), self._held[i], self.labels[i])
    if not isinstance(key, slice):
      key = to_numpy(key, "index")
      if key.shape == (0,) and key.dtype != bool:
        key = key.astype(np.int64)  # an empty list has dtype float
      if key.ndim != 1 or key.dtype.kind not in "biu":
        raise ValueError(
          "an index must be an integer, a slice, a boolean mask [N] or a list of integers, "
          f"got {key.dtype} of shape {key.shape}"
        )
      if key.dtype == bool and len(key) != len(self):
        raise ValueError(f"a boolean mask must have one value an instance ({len(self)}), got {len(key)}")
    return self._take(np.arange(len(self))[key])

  def _take(self, index: np.ndarray) -> Results:
    taken = {"masks": self._held[index], "labels": tuple(self.labels[i] for i in index)}
    for name in ("boxes", "scores", "logits", "ids"):
      rows = getattr(self, name)
      taken[name] = None if rows is None else rows[index]
    return dataclasses.replace(self, **taken)

  def with_image(self, image: Any) -> Results:
    """The same instances, remembering `image` (see the attribute); None forgets it, and frees it."""
    return dataclasses.replace(self, masks=self._held, image=image)

  def with_label(self, *labels: str) -> Results:
    """The instances whose label is one of `labels`, order kept."""
    return self[np.array([label in labels for label in self.labels], bool)]

  def sort(self) -> Results:
    """The same instances, highest score first; equal scores keep their order."""
    return self._take(np.argsort(-self.scores, kind="stable"))

  def top_k(self, k: int) -> Results:
    """The `k` instances of highest score (all, if there are fewer), highest first."""
    if k < 0:
      raise ValueError(f"k must not be negative, got {k}")
    return self.sort()[:k]

  @property
  def areas(self) -> np.ndarray:
    """Mask areas in pixels, int64 [N]."""
    return np.array([np.count_nonzero(one.mask) for one in self], np.int64)  # with axis= it is slow

  def __repr__(self) -> str:
    height, width = self.size
    head = f"Results({len(self)} instance{'' if len(self) == 1 else 's'}, size={height}x{width})"
    rows = []
    for i in range(min(len(self), _REPR_ROWS)):
      name = "" if self.ids is None else f"#{self.ids[i]} "
      rows.append(f"  {i}: {name}{_line(self.labels[i], self.scores[i], self.boxes[i])}")
    if len(self) > _REPR_ROWS:
      rows.append(f"  ... {len(self) - _REPR_ROWS} more")
    return "\n".join([head, *rows])

  def _repr_html_(self) -> str:
    """What a notebook shows: the picture with the instances, and a table."""
    from sam3lt_jax.processing.show import html

    return html(self)

  def clean(self, hole_area: int = 0, speck_area: int = 0) -> Results:
    """The same instances, with holes filled and specks taken out of their masks.

    Args:
      hole_area: holes of up to so many pixels are filled.
      speck_area: parts of up to so many pixels go; a mask's largest part stays whatever its size.

    Boxes stay as they are.
    """
    for name, area in (("hole_area", hole_area), ("speck_area", speck_area)):
      if area < 0:
        raise ValueError(f"{name} must be a number of pixels, 0 or more, got {area}")
    masks = (masks_module.cleaned(one.mask, hole_area, speck_area) for one in self)
    return dataclasses.replace(self, masks=hold_masks(masks, len(self), self.size))

  def categories(self) -> list[dict[str, Any]]:
    """COCO categories of the labels that occur, `[{"id": 1, "name": ...}, ...]` in order of appearance."""
    return [{"id": i, "name": label} for label, i in self._numbers("", None, 1).items()]

  def _numbers(self, name: str, given: Mapping[str, int] | None, first: int) -> Mapping[str, int]:
    """Label -> number: the argument `name`, or from `first` on in order of appearance."""
    if given is None:
      return {label: i for i, label in enumerate(dict.fromkeys(self.labels), first)}
    if missing := sorted(set(self.labels) - set(given)):
      raise ValueError(f"{name} must hold every label, missing {missing}, got {dict(given)}")
    return given

  def to_coco(
    self,
    image_id: int | str = 1,
    category_ids: Mapping[str, int] | None = None,
    first_id: int = 1,
  ) -> list[dict[str, Any]]:
    """The instances as COCO annotations: plain Python values, so `json.dumps` takes them.

    Each holds `id`, `image_id`, `category_id`, `bbox` (x, y, width, height in pixels, from `boxes`),
    `segmentation` (compressed RLE, `counts` a string), `area` (of the mask), `iscrowd` 0, `score` and, where
    there are `ids`, `track_id`:
    annotations of a data set and, by `pycocotools.coco.COCO.loadRes`, results to evaluate. `loadRes` replaces
    the area by that of `bbox` where there is one: drop that key to evaluate masks by their own area.

    Args:
      image_id: the image's id in the data set.
      category_ids: label to category id. Default: numbered from 1 in order of appearance, as `categories()`
        does; give it when several images belong to one data set.
      first_id: the first annotation's `id`. COCO reserves 0.

    Raises:
      ValueError: `category_ids` lacks a label that occurs.
    """
    from sam3lt_jax.data import rle

    category_ids = self._numbers("category_ids", category_ids, 1)
    annotations = []
    for i, (box, score, mask, label) in enumerate(self):
      x1, y1, x2, y2 = (float(v) for v in box)
      annotations.append(
        {
          "id": first_id + i,
          "image_id": image_id,
          "category_id": int(category_ids[label]),
          "bbox": [x1, y1, x2 - x1, y2 - y1],
          "iscrowd": 0,
          "score": score,
        }
        | rle.described(mask)
      )
      if self.ids is not None:
        annotations[-1]["track_id"] = int(self.ids[i])
    return annotations

  def to_json(self, image_id: int | str = 1, **options: Any) -> str:
    """A whole COCO data set of this one image, which `from_coco`, `sam3lt eval` and pycocotools read.

    Args:
      image_id: the image's id.
      options: of `json.dumps`, like `indent=2`.

    Raises:
      ValueError: image_id is the name of a file to write.
    """
    if str(image_id).endswith(".json"):
      raise ValueError(f"image_id must be no file's name, got {image_id!r}: to_json returns the text")

    image = {"id": image_id, "height": self.size[0], "width": self.size[1]}
    if isinstance(self.image, (str, os.PathLike)):
      image["file_name"] = os.fspath(self.image)
    data = {"images": [image], "annotations": self.to_coco(image_id), "categories": self.categories()}
    return json.dumps(data, **options)

  def to_yolo(self, class_ids: Mapping[str, int] | None = None) -> str:
    """Lines of a YOLO segmentation file: the class, then the outline as x y x y ..., in shares of the sides.

    An instance is one polygon there: parts and holes are joined to it by bridges of no width. An instance
    without a pixel has no line.

    Args:
      class_ids: label to class; default: numbered from 0 in order of appearance.

    Raises:
      ValueError: `class_ids` lacks a label that occurs.
      ImportError: contourpy is not installed.
    """
    class_ids, lines = self._numbers("class_ids", class_ids, 0), []
    for one in self:
      outline = masks_module.outline(one.mask) / np.array(self.size[::-1])
      if len(outline):
        lines.append(" ".join([str(class_ids[one.label]), *(f"{v:.6g}" for v in outline.ravel())]) + "\n")
    return "".join(lines)

  def to_pandas(self):
    """A `pandas.DataFrame`, a row an instance: label, score, x1, y1, x2, y2, area; and id, if there are ids.

    Raises:
      ImportError: pandas is not installed.
    """
    with needed("to_pandas needs", "pandas", "viz"):
      import pandas
    columns = {"label": list(self.labels), "score": self.scores}
    columns |= dict(zip(("x1", "y1", "x2", "y2"), self.boxes.T)) | {"area": self.areas}
    return pandas.DataFrame(columns if self.ids is None else {"id": self.ids} | columns)

  def to_supervision(self):
    """A `supervision.Detections`: xyxy, mask, confidence, class_id (order of appearance), `class_name`, and
    tracker_id where there are `ids`.

    Raises:
      ImportError: supervision is not installed.
    """
    with needed("to_supervision needs", "supervision", "viz"):
      import supervision
    class_ids = self._numbers("", None, 0)
    return supervision.Detections(
      xyxy=self.boxes.copy(),
      mask=self.masks.copy(),
      confidence=self.scores.copy(),
      class_id=np.array([class_ids[label] for label in self.labels], dtype=int),
      tracker_id=None if self.ids is None else self.ids.copy(),
      data={"class_name": np.array(self.labels, dtype=str)},
    )

  def label_map(self) -> np.ndarray:
    """One number a pixel: 0 where there is no instance, i + 1 on instance i. int32 [H, W].

    Where instances overlap the smaller one shows: a wheel stays visible on its truck.
    """
    out = np.zeros(self.size, np.int32)
    for i in masks_module.drawing_order(self.areas):
      out[self[i].mask] = i + 1
    return out

  def save_png(self, path: str | os.PathLike, separate: bool = False) -> list[str]:
    """Writes the masks as PNG.

    By default one label map (see `label_map`): pixel value 0 is background and i + 1 is instance i, with a
    palette of `render`'s colours, so any viewer makes it visible and `numpy.asarray(Image.open(path))` gives
    the numbers back. Above 255 instances it is a 16-bit grey PNG with the same numbers.

    Args:
      path: the file, ending in .png. Its folder must exist.
      separate: write every mask whole (a label map hides what lies under a smaller instance) to its own
        black-and-white file instead: masks.png becomes masks_000.png, masks_001.png, ...

    Returns:
      The paths written; none if `separate` and there is no instance.

    Raises:
      ValueError: `path` does not end in .png, or more than 65535 instances.
    """
    from PIL import Image

    from sam3lt_jax.processing.render import instance_colors

    path = os.fspath(path)
    root, suffix = os.path.splitext(path)
    if suffix.lower() != ".png":
      raise ValueError(f"path must end in .png, got {path!r}")
    if separate:
      paths = [f"{root}_{i:03d}{suffix}" for i in range(len(self))]
      for one, name in zip(self, paths):
        Image.fromarray(one.mask).save(name)
      return paths
    if len(self) > np.iinfo(np.uint16).max:
      raise ValueError(f"a PNG label map holds at most 65535 instances, got {len(self)}; use separate=True")
    small = len(self) <= _MAX_PALETTE
    image = Image.fromarray(self.label_map().astype(np.uint8 if small else np.uint16))
    if small:
      colors = instance_colors(self.labels, ids=self.ids)
      image.putpalette([0, 0, 0, *(v for color in colors for v in color)])
    image.save(path)
    return [path]

  def render(self, image: Any = None, **options: Any) -> Image.Image:
    """The image with the instances drawn on it.

    Args:
      image: the picture (anything `load_image` takes); default: the one that is remembered.
      options: of `sam3lt_jax.processing.render.render`.

    Raises:
      ValueError: no image is given or remembered, or see `sam3lt_jax.processing.render.render`.
    """
    from sam3lt_jax.processing.render import render

    image = self.image if image is None else image
    if image is None:
      raise ValueError("image must be given: these results do not remember theirs")
    return render(image, self, **options)

  def save(self, path: str | os.PathLike, image: Any = None, **options: Any) -> str:
    """Writes the image with the instances drawn on it, in the format of the path's ending; returns the path.

    image, options: as in `render`.

    Raises:
      ValueError: the path has no ending, or one that Pillow does not know.
    """
    path = os.fspath(path)
    good = {"quality": 92, "subsampling": 0} if path.lower().endswith((".jpg", ".jpeg")) else {}
    drawn = self.render(image, **options)
    try:
      drawn.save(path, **good)
    except ValueError as e:  # Pillow's
      raise ValueError(f"path must end as a picture's name does (overlay.png), got {path!r}: {e}") from e
    return path

  def show(self, image: Any = None, **options: Any) -> None:
    """Shows the image with the instances drawn on it, in the notebook or in a window; as `render`."""
    from sam3lt_jax.processing.show import show

    show(self.render(image, **options))

  def plot(self, ax: Any = None, image: Any = None, **options: Any):
    """Draws on matplotlib axes, the current ones by default, and returns them; the rest as in `render`."""
    if ax is None:
      with needed("plot needs", "matplotlib", "viz"):
        import matplotlib.pyplot as plt
      ax = plt.gca()
    ax.imshow(np.asarray(self.render(image, **options)))
    ax.set_axis_off()
    return ax


def _line(label: str, score: float, box: np.ndarray) -> str:
  return f"{label!r} {score:.3f} box=({', '.join(f'{v:.1f}' for v in box)})"
