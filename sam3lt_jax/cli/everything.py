"""`sam3lt everything`: all that can be told apart in photos, without a phrase or a click."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

import numpy as np

from sam3lt_jax.cli import UserError
from sam3lt_jax.cli.arguments import add_model, add_out, add_tracker, filled, load, make_folder
from sam3lt_jax.cli.kinds import count, fraction, whole
from sam3lt_jax.cli.photos import each_photo, output_names
from sam3lt_jax.errors import shown

_SHOWN = 2048  # pixels of the longer side of an overlay, which holds a mask of each thing at that size

_EPILOG = """\
examples:
  everything in a photo:
    sam3lt everything street.jpg --tracker facebook/sam3
  smaller things too: a finer grid, and crops looked at beside the whole photo
    sam3lt everything street.jpg --tracker facebook/sam3 --points-per-side 48 --crop-n-layers 1

written to the output folder for photo.jpg:
  photo_everything.jpg    the photo with every mask (at most 2048 pixels a side)
  photo_everything.json   COCO data set: RLE masks, boxes, scores, stability, the point that each came from
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.usage = "%(prog)s PHOTO... --tracker SOURCE [options]"
  parser.epilog = _EPILOG
  add = parser.add_argument
  add("photos", nargs="+", metavar="PHOTO", help="image files")
  add_model(parser)
  add_tracker(parser, required=True)
  add_out(parser)
  add("--top-k", type=count, metavar="N", help="keep the best N of each photo (default: all)")
  add("--points-per-side", type=count, default=32, metavar="N", help="of the grid of points")
  add("--pred-iou-thresh", type=fraction, default=0.88, metavar="T",
      help="keep masks whose expected IoU is above T")  # fmt: skip
  add("--stability-score-thresh", type=fraction, default=0.95, metavar="T",
      help="keep masks that hardly depend on their threshold: of a stability of at least T",
  )  # fmt: skip
  add("--box-nms-thresh", type=fraction, default=0.7, metavar="T",
      help="of masks whose boxes overlap by more than T keep the best")  # fmt: skip
  add("--crop-n-layers", type=whole, default=0, metavar="N",
      help="look at 2 x 2, 4 x 4, ... crops as well, N layers of them")  # fmt: skip
  add("--min-mask-region-area", type=whole, default=0, metavar="PIXELS",
      help="take out holes and islands of fewer pixels")  # fmt: skip


def run(args: argparse.Namespace) -> int:
  from sam3lt_jax.everything import Options

  options = {**filled(Options, args), "output_mode": "coco_rle"}
  for photo in args.photos:
    if not os.path.isfile(photo):
      raise UserError(f"no such photo: {shown(photo)}")
  make_folder(args.out)
  predictor, names = load(args), output_names(args.photos)
  base = os.path.join(args.out, "")
  return each_photo(names, lambda photo: _one(predictor, photo, base + names[photo], args.top_k, options))


def _one(predictor: Any, photo: str, base: str, top_k: int | None, options: dict[str, Any]) -> str:
  """Segments a photo and writes what is found; returns what to print. base: of the files' names."""
  from sam3lt_jax.data import rle
  from sam3lt_jax.processing.images import load_image
  from sam3lt_jax.processing.results import Results, hold_masks

  start = time.perf_counter()
  image = load_image(photo)
  records = predictor.generate_masks(image, **options)[:top_k]
  seconds = time.perf_counter() - start
  height, width = image.shape[:2]
  data = {
    "images": [{"id": 1, "file_name": photo, "height": height, "width": width}],
    "categories": [{"id": 1, "name": "object"}],
    "annotations": [
      {
        "id": i, "image_id": 1, "category_id": 1, "iscrowd": 0, "score": record["predicted_iou"],
        **{k: v for k, v in record.items() if k != "predicted_iou"},
      }
      for i, record in enumerate(records, 1)
    ],
  }  # fmt: skip
  with open(f"{base}_everything.json", "w", encoding="utf-8") as f:
    json.dump(data, f)
    f.write("\n")
  n, size, scale = len(records), (height, width), _SHOWN / max(height, width)
  masks = hold_masks((rle.decode(record["segmentation"]) for record in records), n, size)
  scores, names = [record["predicted_iou"] for record in records], tuple(map(str, range(1, n + 1)))
  found = Results(np.zeros((n, 4)), scores, masks, names, size)
  found.save(f"{base}_everything.jpg", image, scale=scale if scale < 1 else "auto")
  return (
    f"{shown(photo)}  {width}x{height}  {seconds:.1f} s  {n} found\n"
    f"  wrote {shown(base)}_everything.jpg, {shown(base)}_everything.json"
  )
