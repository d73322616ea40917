"""Images for the tests of jobs, a predictor they share, and how records are compared."""

from __future__ import annotations

import functools
import json
import os
import pathlib

import numpy as np
from PIL import Image

from sam3lt_jax import Predictor
from sam3lt_jax.jobs import results
from tests import tiny

CONFIG = tiny.config(vocab_size=49408)
PHRASES = ("a dog", "two yellow cats")
BAD = {"broken/empty.jpg": "empty", "broken/text.jpg": "not_an_image", "broken/cut.jpg": "truncated"}


@functools.cache
def predictor() -> Predictor:
  loaded = tiny.load(CONFIG)
  with tiny.hurry():
    return Predictor(*loaded)


def photo(number: int, height: int | None = None, width: int | None = None) -> np.ndarray:
  """uint8 [H, W, 3], smooth enough that a resize keeps something; sizes differ from number to number."""
  height, width = height or 40 + 3 * (number % 7), width or 70 - 4 * (number % 5)
  small = np.random.default_rng(number).integers(0, 256, (6, 9, 3)).astype(np.uint8)
  return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def folder(path: pathlib.Path, count: int, bad: bool = True) -> pathlib.Path:
  """`count` PNG files under `path`, every third in a subfolder, and, if `bad`, one of each kind in BAD."""
  for i in range(count):
    file = path / ("sub" if i % 3 == 0 else "") / f"{i:03d}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(i)).save(file)
  if bad:
    (path / "broken").mkdir()
    (path / "broken/empty.jpg").touch()
    (path / "broken/text.jpg").write_text("hello")
    Image.fromarray(photo(0)).save(path / "broken/whole.jpg")
    whole = (path / "broken/whole.jpg").read_bytes()
    (path / "broken/whole.jpg").unlink()
    (path / "broken/cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
  return path


def records(out: str | os.PathLike) -> dict[str, dict]:
  """id -> record of all committed shards. An id that stands there twice is an error."""
  found: dict[str, dict] = {}
  for shard in sorted(pathlib.Path(out).glob("shards/*.jsonl")):
    for line in shard.read_text().splitlines():
      record = json.loads(line)
      assert record["id"] not in found, f"{record['id']} twice"
      found[record["id"]] = record
  return found


def assert_same_records(found: dict[str, dict], wanted: dict[str, dict]) -> None:
  assert sorted(found) == sorted(wanted)
  for key, record in wanted.items():
    assert found[key].get("error") == record.get("error"), key
    assert found[key].get("coco_id") == record.get("coco_id")
    if "error" not in record:
      numbers = [[r["question"] for r in one["results"]] for one in (found[key], record)]
      assert numbers[0] == numbers[1], key
      assert_same_results(results.to_results(found[key]), results.to_results(record))


def assert_same_results(a, b, atol: float = 1e-5) -> None:
  assert a.labels == b.labels and a.size == b.size
  np.testing.assert_allclose(a.scores, b.scores, atol=atol)
  np.testing.assert_allclose(a.boxes, b.boxes, atol=100 * atol)  # pixels
  # A logit within rounding of the threshold falls on either side.
  assert np.sum(a.masks != b.masks) <= 1e-3 * a.masks.size
