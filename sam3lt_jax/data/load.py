"""Either kind of annotation file to records."""

from __future__ import annotations

import os
from collections.abc import Mapping

from sam3lt_jax.data.annotations import read_dataset
from sam3lt_jax.data.coco import CocoRecords
from sam3lt_jax.data.saco import SaCoRecords


def load_records(
  annotations: str | os.PathLike,
  images: str | os.PathLike,
  *,
  negatives: bool = True,
  phrases: Mapping[str, str] | None = None,
) -> CocoRecords | SaCoRecords:
  """Reads a file of COCO's or SA-Co's format; that its images have a `text_input` makes it SA-Co's.

  Args:
    annotations: the JSON file, or what it holds.
    images: the folder that `file_name` is relative to.
    negatives: of COCO's: also ask for the categories that an image has none of. Where an image lists
      `neg_category_ids` (LVIS), for those alone; `not_exhaustive_category_ids` are followed as well.
    phrases: of COCO's: category name to phrase, where the name is not what one would say.

  Returns:
    A sequence of `Record`s. Polygons are drawn when one is asked for, which raises RecordError where one of
    its annotations is damaged.

  Raises:
    FileNotFoundError: no such file or folder.
    ValueError: neither format, the message names the file and the entry; or `phrases` for an SA-Co file.
  """
  data, name = read_dataset(annotations, images)
  if not any("text_input" in entry for entry in data["images"][:1]):
    return CocoRecords(data, images, name, negatives=negatives, phrases=phrases)
  if phrases:
    raise ValueError(f"phrases are for categories; {name} is an SA-Co file, which brings its own")
  return SaCoRecords(data, images, name)
