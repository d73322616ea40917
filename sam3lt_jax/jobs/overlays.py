"""A sample of a job's images with what was found drawn on them."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Sequence
from typing import Any

from sam3lt_jax.errors import shown
from sam3lt_jax.jobs import files, reading, results

_log = logging.getLogger(__name__)


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
      drawn = results.to_results(record).sort().render(image, scale="auto")
      drawn.save(out, "JPEG", quality=92, subsampling=0)
    except (OSError, ValueError, EOFError, MemoryError) as e:
      _log.warning("no overlay of %s: %s", shown(item.uri), shown(e))
      return
    files.write_atomic(files.join(self._folder, file_name(item.id)), out.getvalue())


def file_name(item_id: str) -> str:
  """A file's name for an id: different ids have different names."""
  plain = re.sub(r"[^\w.-]+", "_", item_id)[-100:]
  if plain != item_id:
    plain += f"-{hashlib.sha256(item_id.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
  return f"{plain}.overlay.jpg"
