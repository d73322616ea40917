"""Damaged and hostile annotations: each public reader reads them or says in a ValueError what is wrong.

As in `tests/fuzz.py`, a case is made from its seed: those kept, then 0, 1, ... until time is
up. To look for more: `SAM3LT_FUZZ_SECONDS=600 python -m pytest tests/data/test_fuzz.py`.
"""

import functools
import json
import logging
import random

import numpy as np
import pytest

from sam3lt_jax.config import parse_json
from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.data.annotations import images_of
from sam3lt_jax.data.load import load_records
from sam3lt_jax.evaluation.cgf1 import CgF1
from sam3lt_jax.evaluation.coco_ap import coco_ap
from tests import fuzz
from tests.data import scenes
from tests.fuzz import mutate_bytes, mutate_json

SECONDS = fuzz.seconds(0.6)
KEPT = {
  "coco": (3, 24, 28, 66, 136, 186, 318, 342, 349, 537, 644, 1106, 1192),
  "lvis": (2, 3, 6, 19, 38, 48, 66, 138, 186, 319, 349, 443, 549, 644, 696, 1106),
  "saco": (3, 9, 26, 40, 218, 318, 349, 644, 1043, 1099),
  "results": (35, 67, 70),
  "rle": (146, 174, 566),
}
cases = functools.partial(fuzz.cases, KEPT, SECONDS)
SIZES = (2**16, 2**31, 2**32, 2**32 + 20, 2**64 + 60, -60, 60.5, "60", "6e1", 1e300)


def check(seed, read, *arguments, **options):
  """What `read` gives; None where it raises a ValueError that says something in printable text."""
  try:
    return read(*arguments, **options)
  except ValueError as e:
    assert str(e) and str(e).isprintable(), f"seed {seed}: {str(e)!r}"
  except Exception as e:
    raise AssertionError(f"seed {seed}: {type(e).__name__}: {e}") from e


def mutated(rng, data):
  """`data` changed somewhere, in sizes and masks more often than chance would have it."""
  data = mutate_json(rng, data)
  if rng.random() < 0.3 and isinstance(data, dict):
    entries = data.get(rng.choice(("images", "annotations")))
    entry = rng.choice(entries) if isinstance(entries, list) and entries else None
    if isinstance(entry, dict):
      key = rng.choice(("height", "width", "segmentation", "bbox", "iscrowd"))
      entry[key] = rng.choice(SIZES) if key in ("height", "width") else mutate_json(rng, entry.get(key))
  return data


@pytest.fixture
def files(tmp_path, caplog):
  caplog.set_level(logging.ERROR)
  return scenes.write_images(tmp_path), tmp_path / "annotations.json"


DATA = {"coco": scenes.coco_dataset, "lvis": scenes.lvis_dataset, "saco": scenes.saco_dataset}


@pytest.mark.parametrize("reader", DATA)
def test_annotation_files(files, reader):
  images, path = files
  data = DATA[reader]()
  data["annotations"][1]["segmentation"] = [[5, 10, 25, 10, 25, 40], [30, 30, 40, 30, 40, 40]]
  for seed in cases(reader):
    rng = random.Random(seed)
    text = json.dumps(mutated(rng, data)).encode()
    path.write_bytes(mutate_bytes(rng, text) if rng.random() < 0.1 else text)
    records = check(seed, load_records, path, images) or ()
    for k in range(len(records)):
      record = check(seed, records.__getitem__, k)
      if record is not None:
        check(seed, record.load_image)
        assert all(np.isfinite(p.boxes).all() and (p.boxes >= 0).all() for p in record.prompts)
    read = check(seed, parse_json, path.read_bytes(), "x")
    check(seed, images_of, read, "x", sizes=False)
    check(seed, coco_ap, path, [])


def test_results():
  data = scenes.coco_dataset()
  results = [
    {key: a[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"score": 0.5}
    for a in data["annotations"]
  ]
  for seed in cases("results"):
    rng = random.Random(seed)
    found = mutate_json(rng, results)
    found = found if isinstance(found, list) else [found]
    check(seed, coco_ap, data, found)
    masks = [r.get("segmentation") if isinstance(r, dict) else r for r in found]
    check(seed, CgF1().update, masks, [0.5] * len(masks), [a["segmentation"] for a in data["annotations"]])


def test_masks():
  """What is read is sound: its pixels are those of its runs, and not what the memory happened to hold."""
  rng = np.random.default_rng(0)
  mask = rng.random((60, 80)) < 0.3
  forms = [
    rle_ops.jsonable(rle_ops.encode(mask)),
    rle_ops.jsonable(rle_ops.encode(scenes.mask_of("disc", 20, 20, 60, 50))),
    {"size": [60, 80], "counts": [2400, *([30, 30] * 40)]},
    [[5, 10, 25, 10, 25, 40], [30, 30, 40, 30, 40, 40]],
  ]
  for seed in cases("rle"):
    rng = random.Random(seed)
    form = mutate_json(rng, rng.choice(forms))
    if isinstance(form, dict) and isinstance(form.get("counts"), str) and rng.random() < 0.7:
      form["counts"] = mutate_bytes(rng, form["counts"].encode("utf-8", "replace"))
    found = check(seed, rle_ops.read, form, (60, 80))
    if found and found[0] is not None:
      decoded = rle_ops.decode(found[0])
      assert decoded.shape == (60, 80) and decoded.sum() == rle_ops.area(found[0])
      np.testing.assert_array_equal(decoded, rle_ops.decode(found[0]))
