"""A job's shards to one COCO file, a Parquet file and a list of what failed.

Written as a stream, a shard at a time, in the order of the plan: memory does not grow with the number of
images, and the files do not depend on how often the job was killed or on how many hosts it ran.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import sam3lt_jax
from sam3lt_jax.config import BOX_ONLY_PHRASE
from sam3lt_jax.errors import needed
from sam3lt_jax.jobs import files, ledger
from sam3lt_jax.jobs.plan import Plan
from sam3lt_jax.jobs.sources import Item, split_member

# Takes an image: its id, its item and its record.
_Add = Callable[[int, Item, dict[str, Any]], None]
_ROWS, _RESULTS = 256, 2000  # images and results that wait as Python's objects, of ten times Arrow's size
_GROUP = 1 << 25  # bytes of a row group of Parquet, uncompressed


@dataclasses.dataclass
class Merged:
  """What was merged: numbers of `images` (without failures), `results`, `failures`, shards `missing`."""

  images: int = 0
  results: int = 0
  failures: int = 0
  missing: int = 0
  notes: list[str] = dataclasses.field(default_factory=list)


def merge(
  directory: str | os.PathLike,
  out: str | os.PathLike | None = None,
  *,
  parquet: str | os.PathLike | None = None,
  failures: str | os.PathLike | None = None,
  partial: bool = False,
  results_only: bool = False,
  on_shard: Callable[[], None] = lambda: None,
) -> Merged:
  """Merges the committed shards of a job; each file is written aside and whole or not at all.

  Args:
    directory: the job's folder or URL.
    out: a COCO data set that pycocotools loads: "images" (id: COCO's own where the source had one, else
      numbered from 1; file_name, width, height), "categories" (from 1: the job's phrases in their order,
      others as they turn up; "visual" for boxes alone), "annotations" (id, image_id, category_id, bbox (x, y,
      width, height in pixels), segmentation (compressed RLE), area (pixels of the mask), score, iscrowd 0).
      Images that failed are not in it.
    parquet: a row an image, failures included: the records as they are, and image_id.
    failures: JSON lines: the records of the images that failed.
    partial: leave out shards that are not done yet, instead of refusing.
    results_only: `out` is a list of COCO results, for `COCO.loadRes`, instead of a data set.
    on_shard: called after every shard.

  Raises:
    ValueError: no file to write, no job, shards that are not done, or a damaged one (named).
    CannotWrite: a file cannot be written.
    ImportError: `parquet` without pyarrow.
  """
  paths = [os.fspath(path) for path in (out, parquet, failures) if path is not None]
  if not paths:
    raise ValueError("nothing to write: give out, parquet or failures a path")
  if len({files.absolute(path) for path in paths}) < len(paths):
    raise ValueError(f"the files must be different ones, got {', '.join(paths)}")
  plan = Plan.load(directory)
  if plan.fingerprint.get("video"):
    clips = files.join(plan.directory, "clips")
    raise ValueError(f"{plan.directory} is a job of clips: what was found stands in {clips}, a folder a clip")
  there = ledger.committed(plan.directory)
  missing = [i for i in range(len(plan.sizes)) if i not in there]
  if missing and not partial:
    names = ", ".join(map(ledger.shard_name, missing[:3])) + (", ..." if len(missing) > 3 else "")
    raise ValueError(
      f"{len(missing)} of {len(plan.sizes)} shards are not done ({names}): run the job to its end, "
      "or merge what there is (--partial)"
    )
  strays = plan.strays(there).values()
  merged = Merged(missing=len(missing), notes=[f"{what}, and is left out" for what in strays])
  with contextlib.ExitStack() as stack:
    adds = []
    if out is not None:
      coco = _results(out, plan) if results_only else _data_set(out, plan, len(missing))
      adds.append(stack.enter_context(coco))
    if parquet is not None:
      adds.append(stack.enter_context(_parquet(parquet)))
    if failures is not None:
      adds.append(stack.enter_context(_failures(failures)))
    _pour(plan, there, adds, merged, on_shard)
  return merged


def _pour(plan: Plan, done: set[int], adds: list[_Add], merged: Merged, on_shard: Callable[[], None]) -> None:
  # Images without a COCO id are numbered by their place in the plan, above all ids there are.
  image = max((item.coco_id or 0 for shard in plan.shards for item in shard.items), default=0)
  settings = set()
  for index, size in enumerate(plan.sizes):
    if index in done:
      try:
        about, records = plan.read(index)
        settings.add(about.get("settings"))
        for number, (item, record) in enumerate(records, image + 1):
          failed = "error" in record
          merged.failures += failed
          merged.images += not failed
          merged.results += len(record.get("results", ()))
          for add in adds:
            try:
              add(number if item.coco_id is None else item.coco_id, item, record)
            except (KeyError, TypeError, ValueError, AttributeError) as e:
              what = f"{ledger.shard_name(index)} is damaged: the record of {item.id!r} is none ({e!r})"
              raise ledger.Damaged(what) from e
      except ledger.Damaged as e:
        remedy = f"sam3lt status {plan.directory} --repair sets it aside; start the job again to redo it"
        raise ledger.Damaged(f"{e}. {remedy}") from e
      on_shard()
    image += size
  if len(settings) > 1:
    merged.notes.append(
      f"the settings were changed during the job: {len(settings)} kinds of shards were merged"
    )


def _dump(value: Any) -> bytes:
  return json.dumps(value, separators=(",", ":")).encode("ascii")


@contextlib.contextmanager
def _failures(path: str | os.PathLike) -> Iterator[_Add]:
  """JSON lines: the records of the images that failed."""
  with files.atomic(os.fspath(path)) as f:

    def add(image_id: int, item: Item, record: dict[str, Any]) -> None:
      if "error" in record:
        f.write(_dump(record) + b"\n")

    yield add


def _category_ids(plan: Plan) -> dict[str, int]:
  phrases = plan.fingerprint.get("phrases")
  phrases = [p for p in phrases if isinstance(p, str)] if isinstance(phrases, list) else []
  return {phrase: i for i, phrase in enumerate(dict.fromkeys(phrases), 1)}


def _result(image_id: int, result: dict[str, Any], categories: dict[str, int]) -> dict[str, Any]:
  """A COCO result; a phrase that is new becomes a category."""
  x1, y1, x2, y2 = result["box"]
  return {
    "image_id": image_id,
    "category_id": categories.setdefault(result["phrase"] or BOX_ONLY_PHRASE, len(categories) + 1),
    "bbox": [x1, y1, x2 - x1, y2 - y1],
    "segmentation": result["segmentation"],
    "score": result["score"],
  }


@contextlib.contextmanager
def _results(path: str | os.PathLike, plan: Plan) -> Iterator[_Add]:
  """A list of COCO results."""
  categories = _category_ids(plan)
  with files.atomic(os.fspath(path)) as f:
    between = b"[\n"

    def add(image_id: int, item: Item, record: dict[str, Any]) -> None:
      nonlocal between
      for result in record.get("results", ()):
        f.write(between + _dump(_result(image_id, result, categories)))
        between = b",\n"

    yield add
    f.write(b"\n]\n" if between == b",\n" else b"[\n]\n")


@contextlib.contextmanager
def _data_set(path: str | os.PathLike, plan: Plan, missing: int) -> Iterator[_Add]:
  """A COCO data set. Its images, far fewer than its annotations, wait in a temporary file."""
  categories, annotations, images = _category_ids(plan), 0, 0
  # What made the results; the phrases stand in the categories.
  info: dict[str, Any] = {"description": f"sam3lt_jax {sam3lt_jax.__version__}"}
  info |= {key: value for key, value in plan.fingerprint.items() if key != "phrases"}
  info |= {"missing_shards": missing} if missing else {}
  with files.atomic(os.fspath(path)) as f, tempfile.TemporaryFile() as waiting:
    f.write(b'{"info":' + _dump(info) + b',\n"annotations":[')

    def add(image_id: int, item: Item, record: dict[str, Any]) -> None:
      nonlocal annotations, images
      if "error" in record:
        return
      image = {"id": image_id, "file_name": _file_name(item)}
      image |= {"width": record["width"], "height": record["height"]}
      waiting.write((b",\n" if images else b"\n") + _dump(image))
      images += 1
      for result in record["results"]:
        own = {"id": annotations + 1, "area": result["area"], "iscrowd": 0}
        one = _dump(_result(image_id, result, categories) | own)
        f.write((b",\n" if annotations else b"\n") + one)
        annotations += 1

    yield add
    f.write(b'\n],\n"images":[')
    waiting.seek(0)
    shutil.copyfileobj(waiting, f, 1 << 20)
    names = [{"id": i, "name": phrase} for phrase, i in categories.items()]
    f.write(b'\n],\n"categories":' + _dump(names) + b"}\n")


def _file_name(item: Item) -> str:
  """COCO's own; a tar's member; else the id, which is the path in the source."""
  if "offset" in item.meta:
    return split_member(item)[1]
  return item.meta.get("file_name", item.id)


def _utf8(text: str) -> str:
  """File names need not be UTF-8, Parquet's strings must be: what is not becomes U+FFFD."""
  return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


@contextlib.contextmanager
def _parquet(path: str | os.PathLike) -> Iterator[_Add]:
  """A row an image."""
  with needed("Parquet needs", "pyarrow", "jobs"):
    import pyarrow as arrow
    import pyarrow.parquet as pq
  mask = {"size": arrow.list_(arrow.int32()), "counts": arrow.string()}
  result = {
    "phrase": arrow.string(), "question": arrow.int32(), "score": arrow.float32(),
    "box": arrow.list_(arrow.float32()), "area": arrow.int64(), "segmentation": arrow.struct(mask),
  }  # fmt: skip
  row = {
    "image_id": arrow.int64(), "id": arrow.string(), "uri": arrow.string(), "width": arrow.int32(),
    "height": arrow.int32(), "error": arrow.string(), "message": arrow.string(),
    "results": arrow.list_(arrow.struct(result)),
  }  # fmt: skip
  schema = arrow.schema(row)
  rows: list[dict[str, Any]] = []
  tables: list[Any] = []
  waiting = 0
  with files.atomic(os.fspath(path)) as f, pq.ParquetWriter(f, schema, compression="zstd") as writer:

    def flush() -> None:
      if tables:
        writer.write_table(arrow.concat_tables(tables).combine_chunks())
        tables.clear()

    def convert() -> None:
      tables.append(arrow.Table.from_pylist(rows, schema=schema))
      rows.clear()
      if sum(table.nbytes for table in tables) >= _GROUP:
        flush()

    def add(image_id: int, item: Item, record: dict[str, Any]) -> None:
      nonlocal waiting
      texts = {key: _utf8(record[key]) for key in ("id", "uri", "message") if key in record}
      rows.append({"image_id": image_id} | record | texts)
      waiting += len(record.get("results", ()))
      if len(rows) >= _ROWS or waiting >= _RESULTS:
        convert()
        waiting = 0

    yield add
    convert()
    flush()
