"""What a prediction is: the instances found in one image, as numpy arrays that belong together."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

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


class PackedMasks:
  """Masks [N, H, W], a bit a pixel.

  Attributes:
    bits: uint8 [N, H, ceil(W / 8)], see `numpy.packbits`.
    size: (H, W).
  """

  def __init__(self, bits: np.ndarray, size: tuple[int, int]):
    self.bits, self.size = bits, size

  @classmethod
  def of(cls, masks: Iterable[np.ndarray], count: int, size: tuple[int, int]) -> PackedMasks:
    """`count` masks, bool [H, W], each let go before the next one comes."""
    bits = np.empty((count, size[0], -(-size[1] // 8)), np.uint8)
    for row, mask in zip(bits, masks):
      row[...] = np.packbits(mask, axis=-1)
    return cls(bits, size)

  def __len__(self) -> int:
    return len(self.bits)

  def __getitem__(self, i: int) -> np.ndarray:
    """bool [H, W]."""
    return np.unpackbits(self.bits[i], axis=-1, count=self.size[1]).view(bool)

  def take(self, index: np.ndarray) -> PackedMasks:
    return PackedMasks(self.bits[index], self.size)


def hold_masks(masks: Iterable[np.ndarray], count: int, size: tuple[int, int]) -> np.ndarray | PackedMasks:
  """`count` masks, bool [H, W] each, for `Results`: 20 of 180 megapixels would take 3.6 GB as they are."""
  if count * size[0] * size[1] > PACKED_ABOVE:
    return PackedMasks.of(masks, count, size)
  held = np.empty((count, *size), bool)
  for row, mask in zip(held, masks):
    row[...] = mask
  return held


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Results:
  """The instances found in one image, for one or several prompts.

  Axes: N instances, H image height, W image width. N may be 0: every array then keeps its other axes.
  A list of results: `len(results)`, `results[0]` is an `Instance`, iteration yields them. A slice, a boolean
  mask [N] or a list of indices gives `Results` again: `results[results.scores > 0.7]`.

  Attributes:
    boxes: float32 [N, 4], (x1, y1, x2, y2) in pixels of the image.
    scores: float32 [N], 0 to 1.
    masks: bool [N, H, W], True on the instance. Instances may overlap. Of a huge picture (together above 256
      MB) `Predictor` keeps them a bit a pixel, and this is made when it is first asked for. Each for itself,
      by index or in a loop, is made for the moment, as all that draws, counts or writes them does.
    labels: tuple of N strings, the phrase each instance answers; "visual" for prompts of boxes alone.
    size: (height, width) of the image.
    logits: float32 [N, h, w], the masks as the tracker gave them, to start from in a next round; None where
      they do not come from clicks.

  Raises:
    ValueError: the arrays' shapes do not fit each other. (Of no instance, [0] is accepted for any shape.)
  """

  boxes: np.ndarray
  scores: np.ndarray
  masks: np.ndarray
  labels: tuple[str, ...]
  size: tuple[int, int]
  logits: np.ndarray | None = None

  def __post_init__(self):
    size = tuple(int(s) for s in self.size)
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
      object.__setattr__(self, name, array)
    if self.logits is not None and (np.ndim(self.logits) != 3 or len(self.logits) != n):
      raise ValueError(f"logits must have shape ({n}, h, w), got {np.shape(self.logits)}")
    object.__setattr__(self, "labels", labels)
    object.__setattr__(self, "size", size)

  def _unpacked(self, name: str) -> Any:
    if name != "masks" or "_packed" not in self.__dict__:
      raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
    masks = np.empty((len(self), *self.size), bool)
    for i in range(len(self)):
      masks[i] = self._packed[i]
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

    Raises:
      ValueError: no results, or results of images of different sizes.
    """
    parts = list(results)
    if not parts:
      raise ValueError("results must hold at least one Results; use Results.empty(size) for none")
    sizes = sorted({part.size for part in parts})
    if len(sizes) > 1:
      raise ValueError(f"results must belong to images of one size, got (height, width) {sizes}")
    return cls(
      np.concatenate([part.boxes for part in parts]),
      np.concatenate([part.scores for part in parts]),
      hold_masks((one.mask for part in parts for one in part), sum(map(len, parts)), parts[0].size),
      tuple(label for part in parts for label in part.labels),
      parts[0].size,
    )

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
    if isinstance(key, slice):
      return self._take(np.arange(len(self))[key])
    index = to_numpy(key, "index")
    if index.ndim == 1 and index.size == 0 and index.dtype != bool:
      index = index.astype(np.int64)  # an empty list has dtype float
    if index.ndim != 1 or index.dtype.kind not in "biu":
      raise ValueError(
        "an index must be an integer, a slice, a boolean mask [N] or a list of integers, "
        f"got {index.dtype} of shape {index.shape}"
      )
    if index.dtype == bool:
      if len(index) != len(self):
        raise ValueError(f"a boolean mask must have one value an instance ({len(self)}), got {len(index)}")
      index = np.flatnonzero(index)
    elif index.size and not (-len(self) <= index.min() and index.max() < len(self)):
      raise IndexError(f"indices {index.tolist()} are out of range for {len(self)} instances")
    return self._take(index)

  def _take(self, index: np.ndarray) -> Results:
    labels, held = tuple(self.labels[i] for i in index), self._held
    masks = held.take(index) if isinstance(held, PackedMasks) else held[index]
    logits = None if self.logits is None else self.logits[index]
    return Results(self.boxes[index], self.scores[index], masks, labels, self.size, logits)

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
    rows = [
      f"  {i}: {self.labels[i]!r} {self.scores[i]:.3f} box=({', '.join(f'{v:.1f}' for v in self.boxes[i])})"
      for i in range(min(len(self), _REPR_ROWS))
    ]
    if len(self) > _REPR_ROWS:
      rows.append(f"  ... {len(self) - _REPR_ROWS} more")
    return "\n".join([head, *rows])

  def categories(self) -> list[dict[str, Any]]:
    """COCO categories of the labels that occur, `[{"id": 1, "name": ...}, ...]` in order of appearance."""
    return [{"id": i, "name": label} for i, label in enumerate(dict.fromkeys(self.labels), 1)]

  def to_coco(
    self,
    image_id: int | str = 1,
    category_ids: Mapping[str, int] | None = None,
    first_id: int = 1,
  ) -> list[dict[str, Any]]:
    """The instances as COCO annotations: plain Python values, so `json.dumps` takes them.

    Each holds `id`, `image_id`, `category_id`, `bbox` (x, y, width, height in pixels, from `boxes`),
    `segmentation` (compressed RLE, `counts` a string), `area` (of the mask), `iscrowd` 0 and `score`:
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
    from pycocotools import mask as coco_mask

    if category_ids is None:
      category_ids = {category["name"]: category["id"] for category in self.categories()}
    missing = sorted(set(self.labels) - set(category_ids))
    if missing:
      raise ValueError(f"category_ids must hold every label, missing {missing}, got {dict(category_ids)}")
    annotations = []
    for i, (box, score, mask, label) in enumerate(self):
      rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
      x1, y1, x2, y2 = (float(v) for v in box)
      annotations.append(
        {
          "id": first_id + i,
          "image_id": image_id,
          "category_id": int(category_ids[label]),
          "bbox": [x1, y1, x2 - x1, y2 - y1],
          "segmentation": {"size": list(self.size), "counts": rle["counts"].decode("ascii")},
          "area": int(coco_mask.area(rle)),
          "iscrowd": 0,
          "score": score,
        }
      )
    return annotations

  def to_supervision(self):
    """A `supervision.Detections`: xyxy, mask, confidence, class_id (order of appearance) and `class_name`.

    Raises:
      ImportError: supervision is not installed.
    """
    try:
      import supervision
    except ImportError as e:
      raise ImportError(
        f"to_supervision needs the package supervision: pip install 'sam3lt_jax[viz]' ({e})"
      ) from e
    class_ids = {label: i for i, label in enumerate(dict.fromkeys(self.labels))}
    return supervision.Detections(
      xyxy=self.boxes.copy(),
      mask=self.masks.copy(),
      confidence=self.scores.copy(),
      class_id=np.array([class_ids[label] for label in self.labels], dtype=int),
      data={"class_name": np.array(self.labels, dtype=str)},
    )

  def label_map(self) -> np.ndarray:
    """One number a pixel: 0 where there is no instance, i + 1 on instance i. int32 [H, W].

    Where instances overlap the smaller one shows: a wheel stays visible on its truck.
    """
    out = np.zeros(self.size, np.int32)
    for i in drawing_order(self.areas):
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
        Image.fromarray(one.mask.astype(np.uint8) * 255).convert("1").save(name)
      return paths
    if len(self) > np.iinfo(np.uint16).max:
      raise ValueError(f"a PNG label map holds at most 65535 instances, got {len(self)}; use separate=True")
    numbers = self.label_map()
    if len(self) > _MAX_PALETTE:
      Image.fromarray(numbers.astype(np.uint16)).save(path)
      return [path]
    image = Image.fromarray(numbers.astype(np.uint8))
    image.putpalette([0, 0, 0, *(v for colour in instance_colors(self.labels) for v in colour)])
    image.save(path)
    return [path]

  def render(self, image, **options) -> Image.Image:
    """The image with the instances drawn on it; options as in `sam3lt_jax.processing.render.render`."""
    from sam3lt_jax.processing.render import render

    return render(image, self, **options)


def drawing_order(areas: Sequence[int] | np.ndarray) -> list[int]:
  """Indices from the largest area to the smallest, so that what is drawn last, on top, is the smaller."""
  return [int(i) for i in np.argsort(-np.asarray(areas, np.int64), kind="stable")]
