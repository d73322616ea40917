"""A handful of drawn images with their annotations in COCO's format."""

from __future__ import annotations

import json
import pathlib

import numpy as np
from PIL import Image, ImageDraw

SIDE = 84


def write(folder: pathlib.Path, images: int = 6, seed: int = 0) -> tuple[pathlib.Path, pathlib.Path]:
  """(annotation file, image folder): each image has a red circle, a blue square, or both, on grey."""
  rng = np.random.default_rng(seed)
  (folder / "images").mkdir(parents=True, exist_ok=True)
  data = {
    "images": [],
    "annotations": [],
    "categories": [{"id": 1, "name": "red circle"}, {"id": 2, "name": "blue square"}],
  }
  for i in range(images):
    picture = Image.new("RGB", (SIDE, SIDE), (190, 190, 190))
    canvas = ImageDraw.Draw(picture)
    shown = [(1,), (2,), (1, 2)][i % 3]
    for category in shown:
      side = int(rng.integers(20, 32))
      x = int(rng.integers(2, 40 - side // 2)) + (40 if category == 2 else 0) * (len(shown) > 1)
      x, y = min(x, SIDE - side - 2), int(rng.integers(2, SIDE - side - 2))
      box = (x, y, x + side, y + side)
      corners = [x, y, x + side, y, x + side, y + side, x, y + side]
      if category == 1:
        canvas.ellipse(box, fill=(210, 30, 30))
        turn = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        circle = np.stack([x + side / 2 + side / 2 * np.cos(turn), y + side / 2 + side / 2 * np.sin(turn)], 1)
        corners = circle.ravel().round(2).tolist()
      else:
        canvas.rectangle(box, fill=(40, 60, 210))
      data["annotations"].append({
        "id": len(data["annotations"]) + 1, "image_id": i + 1, "category_id": category, "iscrowd": 0,
        "bbox": [x, y, side, side], "area": side * side, "segmentation": [corners],
      })  # fmt: skip
    picture.save(folder / "images" / f"{i}.png")
    data["images"].append({"id": i + 1, "file_name": f"{i}.png", "height": SIDE, "width": SIDE})
  path = folder / "annotations.json"
  path.write_text(json.dumps(data))
  return path, folder / "images"
