"""What a job writes of an image: a line of JSON, with its instances as COCO RLE or the reason it has none.

A record is

    {"id": "a/b.jpg", "uri": "/photos/a/b.jpg", "width": 640, "height": 480,
     "results": [{"phrase": "a dog", "question": 0, "score": 0.91, "box": [x1, y1, x2, y2], "area": 5210,
                  "segmentation": {"size": [480, 640], "counts": "..."}}, ...]}

with "coco_id" where the source has ids of its own, or {"id", "uri", "error": code, "message"}. Results stand
as `Predictor` gives them: highest score first, boxes within the image. Scores and boxes are float32's
shortest decimals, so nothing is lost, and the same image gives the same line again.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.errors import shown
from sam3lt_jax.jobs import files, reading
from sam3lt_jax.processing.prompts import Prompt
from sam3lt_jax.processing.results import Results, hold_masks

Record = dict[str, Any]
_log = logging.getLogger(__name__)


def record(item: Any, **found: Any) -> Record:
  """Of an image: `width`, `height` in pixels and `results`, of `instance`; or `error` and `message`."""
  head = {"id": item.id, "uri": item.uri} | ({} if item.coco_id is None else {"coco_id": item.coco_id})
  return head | found


def instance(prompt: Prompt, number: int, score: float, box: np.ndarray, mask: np.ndarray) -> Record:
  """One found instance.

  Args:
    prompt, number: what it answers, and which of the image's prompts that is.
    score: 0 to 1.
    box: float32 [4], (x1, y1, x2, y2) in pixels.
    mask: bool [H, W].
  """
  return {
    "phrase": prompt.phrase,
    "question": int(number),
    "score": _short(score),
    "box": [_short(v) for v in box],
  } | rle_ops.described(mask)


def _short(value: Any) -> float:
  return float(str(np.float32(value)))


def to_results(record: Record) -> Results:
  """The record of an image as `Results`, masks decoded.

  Raises:
    ValueError: the record is of a failure, or was edited into none.
  """
  if "error" in record:
    raise ValueError(
      f"record: image {record.get('id')!r} has no results ({record['error']}: {record.get('message')})"
    )
  try:
    size, found = (record["height"], record["width"]), record["results"]
    masks = (rle_ops.decode(rle_ops.from_segmentation(r["segmentation"], size)) for r in found)
    return Results(
      np.array([r["box"] for r in found], np.float32),
      np.array([r["score"] for r in found], np.float32),
      hold_masks(masks, len(found), size),
      tuple(r["phrase"] for r in found),
      size,
    )
  except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as e:
    raise ValueError(f"record: that of image {record.get('id')!r} is not as it was written ({e!r})") from e


class Overlays:
  """Draws `count` images, spread evenly over `items`: the same ones in every run and on every host."""

  def __init__(self, directory: str, items: Sequence[Any], count: int):
    count = min(count, len(items))
    self._ids = frozenset(items[i * len(items) // count].id for i in range(count))
    self._folder = files.join(directory, "overlays")
    if count:
      files.make_folder(self._folder)

  def draw(self, item: Any, record: dict[str, Any]) -> None:
    """Writes the overlay of an image's record, if it is one of the sample. Raises CannotWrite.

    One that cannot be drawn (its file is gone meanwhile, say) is left out and logged.
    """
    if item.id not in self._ids:
      return
    out = io.BytesIO()
    try:
      image = reading.load_item(item)
      drawn = to_results(record).render(image, scale="auto")
      drawn.save(out, "JPEG", quality=92, subsampling=0)
    except (OSError, ValueError, EOFError, MemoryError) as e:
      _log.warning("no overlay of %s: %s", shown(item.uri), shown(e))
      return
    files.write_atomic(files.join(self._folder, _file_name(item.id)), out.getvalue())


def _file_name(item_id: str) -> str:
  """A file's name for an id: different ids have different names."""
  plain = re.sub(r"[^\w.-]+", "_", item_id)[-100:]
  if plain != item_id:
    plain += f"-{hashlib.sha256(item_id.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
  return f"{plain}.overlay.jpg"
