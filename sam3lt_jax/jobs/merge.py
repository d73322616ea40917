"""A job's shards to one COCO file, a Parquet file and a list of what failed.

Written as a stream, a shard at a time, in the order of the plan: memory does not grow with the number of
images, and the files do not depend on how often the job was killed or on how many hosts it ran.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import sam3lt_jax
from sam3lt_jax.config import BOX_ONLY_PHRASE
from sam3lt_jax.jobs import files, shard_files
from sam3lt_jax.jobs.plan import Plan
from sam3lt_jax.jobs.sources import Item, split_member


@dataclasses.dataclass
class Merged:
  """What was merged: numbers of `images` (without failures), `results`, `failures`, shards `missing`."""

  images: int = 0
  results: int = 0
  failures: int = 0
  missing: int = 0
  notes: list[str] = dataclasses.field(default_factory=list)


class Categories:
  """Phrase -> COCO category id, from 1: the job's phrases in their order, others as they turn up."""

  def __init__(self, phrases: Sequence[str]):
    self._ids = {phrase: i for i, phrase in enumerate(dict.fromkeys(phrases), 1)}

  def id(self, phrase: str | None) -> int:
    """A question of boxes alone has no phrase; its category is "visual"."""
    return self._ids.setdefault(phrase or BOX_ONLY_PHRASE, len(self._ids) + 1)

  def to_coco(self) -> list[dict[str, Any]]:
    return [{"id": i, "name": phrase} for phrase, i in self._ids.items()]


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
      numbered from 1; file_name, width, height), "categories" (see `Categories`), "annotations" (id,
      image_id, category_id, bbox (x, y, width, height in pixels), segmentation (compressed RLE), area (pixels
      of the mask), score, iscrowd 0). Images that failed are not in it.
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
  done = plan.committed()
  missing = [i for i in range(len(plan.shards)) if i not in done]
  if missing and not partial:
    names = ", ".join(map(shard_files.shard_name, missing[:3])) + (", ..." if len(missing) > 3 else "")
    raise ValueError(
      f"{len(missing)} of {len(plan.shards)} shards are not done ({names}): run the job to its end, "
      "or merge what there is (--partial)"
    )
  merged = Merged(missing=len(missing), notes=[f"{what}, and is left out" for what in plan.strays()])
  phrases = plan.fingerprint.get("phrases")
  categories = Categories([p for p in phrases if isinstance(p, str)] if isinstance(phrases, list) else [])
  with contextlib.ExitStack() as stack:
    sinks: list[_Sink] = []

    def open_sink(kind: type[_Sink], path: str | os.PathLike | None, *more: Any) -> None:
      if path is not None:
        sinks.append(kind(stack.enter_context(files.atomic(os.fspath(path))), *more))
        stack.callback(sinks[-1].close)

    if results_only:
      open_sink(_ResultsSink, out, categories)
    else:
      open_sink(_CocoSink, out, categories, _info(plan, missing))
    open_sink(_ParquetSink, parquet)
    open_sink(_FailuresSink, failures)
    _pour(plan, done, sinks, merged, on_shard)
    for sink in sinks:
      sink.end()
  return merged


def _info(plan: Plan, missing: Sequence[int]) -> dict[str, Any]:
  """COCO's "info": what made the results. The phrases stand in the categories."""
  settings = {key: value for key, value in plan.fingerprint.items() if key != "phrases"}
  partial = {"missing_shards": len(missing)} if missing else {}
  return {"description": f"sam3lt_jax {sam3lt_jax.__version__}"} | settings | partial


def _pour(plan: Plan, done: set[int], sinks: list, merged: Merged, on_shard: Callable[[], None]) -> None:
  first = _first_number(plan)
  settings = set()
  position = 0
  for index in range(len(plan.shards)):
    if index in done:
      about, records = _records(plan, index)
      settings.add(about.get("settings"))
      for i, (item, record) in enumerate(records):
        image_id = item.coco_id if item.coco_id is not None else first + position + i
        failed = "error" in record
        merged.failures += failed
        merged.images += not failed
        merged.results += len(record.get("results", ()))
        try:
          for sink in sinks:
            sink.add(image_id, item, record)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
          name = shard_files.shard_name(index)
          raise _with_remedy(plan, f"{name} is damaged: the record of {item.id!r} is none ({e!r})") from e
      on_shard()
    position += plan.shards.size(index)
  if len(settings) > 1:
    merged.notes.append(
      f"the settings were changed during the job: {len(settings)} kinds of shards were merged"
    )


def _first_number(plan: Plan) -> int:
  """Images without a COCO id are numbered by their place in the plan, above all ids there are."""
  return max((item.coco_id or 0 for shard in plan.shards for item in shard.items), default=0) + 1


def _records(plan: Plan, index: int) -> tuple[dict[str, Any], list[tuple[Item, dict[str, Any]]]]:
  try:
    return plan.read(index)
  except shard_files.Damaged as e:
    raise _with_remedy(plan, str(e)) from None


def _with_remedy(plan: Plan, what: str) -> shard_files.Damaged:
  remedy = f"sam3lt status {plan.directory} --repair sets it aside; start the job again to redo it"
  return shard_files.Damaged(f"{what}. {remedy}")


def _dump(value: Any) -> bytes:
  return json.dumps(value, separators=(",", ":")).encode("ascii")


class _Sink:
  """A file that images are poured into; `end` completes it, `close` is called in any case."""

  def __init__(self, file: BinaryIO):
    self._file = file

  def add(self, image_id: int, item: Item, record: dict[str, Any]) -> None:
    raise NotImplementedError

  def end(self) -> None:
    pass

  def close(self) -> None:
    pass


class _FailuresSink(_Sink):
  """JSON lines: the records of the images that failed."""

  def add(self, image_id: int, item: Item, record: dict[str, Any]) -> None:
    if "error" in record:
      self._file.write(_dump(record) + b"\n")


class _ResultsSink(_Sink):
  """A list of COCO results."""

  def __init__(self, file: BinaryIO, categories: Categories):
    super().__init__(file)
    self._categories = categories
    self._count = 0
    self._file.write(self._beginning())

  def _beginning(self) -> bytes:
    return b"["

  def add(self, image_id: int, item: Item, record: dict[str, Any]) -> None:
    for result in record.get("results", ()):
      self._file.write((b",\n" if self._count else b"\n") + _dump(self._annotation(image_id, result)))
      self._count += 1

  def _annotation(self, image_id: int, result: dict[str, Any]) -> dict[str, Any]:
    x1, y1, x2, y2 = result["box"]
    return {
      "image_id": image_id,
      "category_id": self._categories.id(result["phrase"]),
      "bbox": [x1, y1, x2 - x1, y2 - y1],
      "segmentation": result["segmentation"],
      "score": result["score"],
    }

  def end(self) -> None:
    self._file.write(b"\n]\n")


class _CocoSink(_ResultsSink):
  """A COCO data set. Its images, far fewer than its annotations, wait in a temporary file."""

  def __init__(self, file: BinaryIO, categories: Categories, info: dict[str, Any]):
    self._info, self._images = info, 0
    self._waiting = tempfile.TemporaryFile()
    super().__init__(file, categories)

  def _beginning(self) -> bytes:
    return b'{"info":' + _dump(self._info) + b',\n"annotations":['

  def add(self, image_id: int, item: Item, record: dict[str, Any]) -> None:
    if "error" in record:
      return
    image = {
      "id": image_id, "file_name": _file_name(item), "width": record["width"], "height": record["height"]
    }  # fmt: skip
    self._waiting.write((b",\n" if self._images else b"\n") + _dump(image))
    self._images += 1
    super().add(image_id, item, record)

  def _annotation(self, image_id: int, result: dict[str, Any]) -> dict[str, Any]:
    own = {"id": self._count + 1, "area": result["area"], "iscrowd": 0}
    return super()._annotation(image_id, result) | own

  def end(self) -> None:
    self._file.write(b'\n],\n"images":[')
    self._waiting.seek(0)
    while block := self._waiting.read(1 << 20):
      self._file.write(block)
    self._file.write(b'\n],\n"categories":' + _dump(self._categories.to_coco()) + b"}\n")

  def close(self) -> None:
    self._waiting.close()


def _file_name(item: Item) -> str:
  """COCO's own; a tar's member; else the id, which is the path in the source."""
  if "offset" in item.meta:
    return split_member(item)[1]
  return item.meta.get("file_name", item.id)


def _utf8(text: str) -> str:
  """File names need not be UTF-8, Parquet's strings must be: what is not becomes U+FFFD."""
  return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


class _ParquetSink(_Sink):
  """A row an image. Python's objects take ten times the room of Arrow's arrays and wait for short only."""

  _ROWS, _RESULTS, _GROUP = 256, 2000, 1 << 25  # images, results; bytes of a row group, uncompressed

  def __init__(self, file: BinaryIO):
    try:
      import pyarrow
      import pyarrow.parquet
    except ImportError as e:
      raise ImportError(f"Parquet needs the package pyarrow: pip install 'sam3lt_jax[jobs]' ({e})") from e
    super().__init__(file)
    self._arrow = pyarrow
    self._rows: list[dict[str, Any]] = []
    self._waiting = 0
    self._tables: list[Any] = []
    self._schema = self._columns()
    self._writer = pyarrow.parquet.ParquetWriter(file, self._schema, compression="zstd")

  def _columns(self):
    a = self._arrow
    mask = a.struct([("size", a.list_(a.int32())), ("counts", a.string())])
    result = a.struct(
      [
        ("phrase", a.string()), ("question", a.int32()), ("score", a.float32()),
        ("box", a.list_(a.float32())), ("area", a.int64()), ("segmentation", mask),
      ]
    )  # fmt: skip
    return a.schema(
      [
        ("image_id", a.int64()), ("id", a.string()), ("uri", a.string()), ("width", a.int32()),
        ("height", a.int32()), ("error", a.string()), ("message", a.string()), ("results", a.list_(result)),
      ]
    )  # fmt: skip

  def add(self, image_id: int, item: Item, record: dict[str, Any]) -> None:
    texts = {key: _utf8(record[key]) for key in ("id", "uri", "message") if key in record}
    self._rows.append({"image_id": image_id} | record | texts)
    self._waiting += len(record.get("results", ()))
    if len(self._rows) >= self._ROWS or self._waiting >= self._RESULTS:
      self._convert()

  def _convert(self) -> None:
    self._tables.append(self._arrow.Table.from_pylist(self._rows, schema=self._schema))
    self._rows, self._waiting = [], 0
    if sum(table.nbytes for table in self._tables) >= self._GROUP:
      self._flush()

  def _flush(self) -> None:
    if self._tables:
      self._writer.write_table(self._arrow.concat_tables(self._tables).combine_chunks())
    self._tables = []

  def end(self) -> None:
    self._convert()
    self._flush()
    self.close()

  def close(self) -> None:
    self._writer.close()
