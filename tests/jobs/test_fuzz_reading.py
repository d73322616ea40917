"""Damaged and hostile images, tar shards, lists and questions: read, or refused in a documented error.

As in `tests/fuzz.py`, a case is made from its seed: those kept, then 0, 1, ... until time is
up. To look for more: `SAM3LT_FUZZ_SECONDS=600 python -m pytest tests/jobs/test_fuzz_reading.py`.
"""

import functools
import io
import json
import random
import tarfile

import numpy as np
import pytest
from PIL import Image, features

from sam3lt_jax.jobs.questions import Questions
from sam3lt_jax.jobs.reading import Failure, Pixels, pixel_limit, read_image
from sam3lt_jax.jobs.sources import Item, list_items
from sam3lt_jax.processing.images import load_image
from tests import fuzz
from tests.fuzz import check, json_file, mutate_bytes
from tests.jobs.work import read_bytes

SECONDS = fuzz.seconds(0.6)
KEPT = {"image": (), "tar": (), "list": (), "coco": (), "questions": (1909,)}
cases = functools.partial(fuzz.cases, KEPT, SECONDS)
SIDE, MOST = 28, 1 << 20  # pixels

FORMATS = [
  ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("TIFF", {}), ("BMP", {}),
  ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("TGA", {"compression": "tga_rle"}), ("DDS", {}),
  ("ICO", {}), ("ICNS", {}), ("SGI", {}), ("PCX", {}), ("MPO", {}), ("XBM", {}), ("IM", {}), ("SPIDER", {}),
  ("MSP", {}),
]  # fmt: skip
FORMATS += [
  (name, {})
  for name, has in (("WEBP", "webp"), ("AVIF", "avif"), ("JPEG2000", "jpg_2000"))
  if features.check(has)
]


def encoded():
  """A small picture in every format that Pillow writes and reads, some with EXIF."""
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
  exif = Image.Exif()
  exif[0x0112], exif[0x011A] = 6, 72.0
  found = []
  for name, options in FORMATS:
    out = io.BytesIO()
    mode = {"XBM": "1", "MSP": "1", "SPIDER": "F"}.get(name, "RGB")
    more = {"exif": exif} if name in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    picture.convert(mode).save(out, name, **options, **more)
    found.append(out.getvalue())
  return found


@pytest.mark.filterwarnings("ignore")
def test_images(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", MOST)
  wholes, path = encoded(), tmp_path / "a.jpg"
  for seed in cases("image"):
    rng = random.Random(seed)
    data = mutate_bytes(rng, rng.choice(wholes))
    path.write_bytes(data)
    for source in (data, path):
      check(seed, functools.partial(load_image, source), ValueError)
    with pixel_limit(MOST):
      found = read_image(Item("a.jpg", str(path)), SIDE)
    assert isinstance(found, (Pixels, Failure)), f"seed {seed}"
    assert isinstance(found, Pixels) or (found.message and found.message.isprintable()), (
      f"seed {seed}: {found}"
    )


def odd_tar(rng):
  """A tar of members with odd names and kinds, in one of two formats, then damaged."""
  out, kinds = io.BytesIO(), (tarfile.REGTYPE, tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, b"S", b"7")
  form = rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
  with tarfile.open(fileobj=out, mode="w", format=form) as tar:
    for i in range(rng.randrange(1, 4)):
      info = tarfile.TarInfo(
        rng.choice((f"{i}.jpg", f"a{i}.b.jpg", "é" * 60 + f"{i}.png", f"./x/{i}.txt", "y.jpg/"))
      )
      info.type, info.linkname = rng.choice(kinds), rng.choice(("0.jpg", "", "../x"))
      if form == tarfile.PAX_FORMAT and rng.random() < 0.3:
        info.pax_headers = {rng.choice(("size", "path", "GNU.sparse.map", "GNU.sparse.major")): rng.choice(
          ("1", "-5", "9" * 30, "x", "1,2", "\n")
        )}  # fmt: skip
      info.size = rng.randrange(3) * 300 if info.isreg() else 0
      tar.addfile(info, io.BytesIO(bytes(info.size)) if info.size else None)
  return mutate_bytes(rng, out.getvalue()) if rng.random() < 0.8 else out.getvalue()


def read_all(source):
  for item in list_items(source):
    try:
      read_bytes(item)
    except (OSError, EOFError):  # of the one image
      pass


def test_tars(tmp_path):
  for seed in cases("tar"):
    (tmp_path / "s.tar").write_bytes(odd_tar(random.Random(seed)))
    check(seed, lambda: read_all(tmp_path / "s.tar"), ValueError)


def test_lists_and_coco(tmp_path):
  (tmp_path / "a.jpg").write_bytes(b"x")
  coco = {"images": [{"id": i, "file_name": "a.jpg", "width": 4, "height": 3} for i in (1, 2)]}
  for seed in cases("list"):
    rng = random.Random(seed)
    (tmp_path / "l.txt").write_bytes(mutate_bytes(rng, b"a.jpg\nb/c.png\r\n\n  gs://bucket/d.jpg\n"))
    check(seed, lambda: list(list_items(tmp_path / "l.txt")), ValueError)
    json_file(rng, tmp_path / "c.json", coco)
    check(seed, lambda: list(list_items(tmp_path / "c.json")), ValueError)


def test_questions(tmp_path):
  lines = [
    {"id": "a/1.jpg", "text": ["red car", "wheel"]}, {"image": "b", "text": "x", "boxes": [[1, 2.5, 3, 4]]},
    {"id": 5, "boxes": [[10, 20, 110, 90], [0, 0, 1, 1]], "box_labels": [1, 0]},
  ]  # fmt: skip
  path = tmp_path / "q.jsonl"

  def read():
    questions = Questions.from_file(path)
    return [questions.for_item(name) for name in ("a/1.jpg", "b", "5")]

  for seed in cases("questions"):
    rng = random.Random(seed)
    json_file(rng, path, rng.choice(lines))
    if rng.random() < 0.5:
      path.write_bytes(json.dumps(lines[0]).encode() + b"\n" + path.read_bytes())
    check(seed, read, ValueError)
