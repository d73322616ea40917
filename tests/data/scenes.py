"""Small images of coloured rectangles and ellipses with their exact masks, as COCO and SA-Co files."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from PIL import Image

from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.processing.masks import mask_bounds

HEIGHT, WIDTH = 60, 80
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
# name of the file -> [(phrase, shape, x1, y1, x2, y2)]; the second image has nothing red, the third nothing.
SCENES = {
  "a.png": [
    ("red box", "box", 5, 10, 25, 40),
    ("red box", "box", 50, 30, 70, 50),
    ("green disc", "disc", 30, 5, 50, 25),
  ],
  "b.png": [("blue box", "box", 40, 0, 80, 30)],
  "c.png": [],
}
PHRASES = ("red box", "green disc", "blue box")


def mask_of(shape: str, x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
  """bool [HEIGHT, WIDTH]."""
  y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
  if shape == "box":
    return (x >= x1) & (x < x2) & (y >= y1) & (y < y2)
  return ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 <= 1


def picture(objects) -> np.ndarray:
  """uint8 [HEIGHT, WIDTH, 3], objects on grey."""
  image = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
  for phrase, *shape in objects:
    image[mask_of(*shape)] = COLOURS[phrase.split()[0]]
  return image


def write_images(folder: pathlib.Path) -> pathlib.Path:
  images = folder / "images"
  images.mkdir()
  for name, objects in SCENES.items():
    Image.fromarray(picture(objects)).save(images / name)
  return images


def rle_json(mask: np.ndarray) -> dict[str, Any]:
  return rle_ops.jsonable(rle_ops.encode(mask))


def coco_dataset() -> dict[str, Any]:
  """Category ids 1, 2, 3 in the order of `PHRASES`; image ids 10, 11, 12; names with underscores."""
  data: dict[str, Any] = {
    "images": [],
    "annotations": [],
    "categories": [{"id": i, "name": phrase.replace(" ", "_")} for i, phrase in enumerate(PHRASES, 1)],
  }
  for image_id, (name, objects) in enumerate(SCENES.items(), 10):
    data["images"].append({"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH})
    for phrase, *shape in objects:
      mask = mask_of(*shape)
      x1, y1, x2, y2 = mask_bounds(mask).tolist()
      data["annotations"].append(
        {
          "id": len(data["annotations"]) + 1,
          "image_id": image_id,
          "category_id": PHRASES.index(phrase) + 1,
          "bbox": [x1, y1, x2 - x1, y2 - y1],
          "area": int(mask.sum()),
          "iscrowd": 0,
          "segmentation": rle_json(mask),
        }
      )
  return data


def lvis_dataset() -> dict[str, Any]:
  """As `coco_dataset`, as LVIS writes it. The first image lists green as not exhaustive, the second red as
  absent, the third nothing."""
  data = coco_dataset()
  data["categories"][0]["name"] = "box_(red)"
  for entry, (absent, unfinished) in zip(data["images"], (([], [2]), ([1], []), ([], []))):
    entry["coco_url"] = f"http://images.cocodataset.org/val2017/{entry.pop('file_name')}"
    entry |= {"neg_category_ids": absent, "not_exhaustive_category_ids": unfinished}
  for category, frequency in zip(data["categories"], "rcf"):
    category["frequency"] = frequency
  for annotation in data["annotations"]:
    del annotation["iscrowd"]
  return data


def saco_dataset() -> dict[str, Any]:
  """Every phrase asked of every image; ids from 100, image by image; boxes normalised as SA-Co's are."""
  data: dict[str, Any] = {
    "images": [], "annotations": [], "categories": [{"id": 1, "name": "visual"}]
  }  # fmt: skip
  for name, objects in SCENES.items():
    for phrase in PHRASES:
      pair = 100 + len(data["images"])
      data["images"].append(
        {
          "id": pair,
          "file_name": name,
          "text_input": phrase,
          "height": HEIGHT,
          "width": WIDTH,
          "is_instance_exhaustive": 1,
        }
      )
      for given, *shape in objects:
        if given == phrase:
          mask = mask_of(*shape)
          x1, y1, x2, y2 = mask_bounds(mask).tolist()
          data["annotations"].append(
            {
              "id": len(data["annotations"]) + 1,
              "image_id": pair,
              "category_id": 1,
              "bbox": [x1 / WIDTH, y1 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT],
              "area": mask.mean(),
              "iscrowd": 0,
              "segmentation": rle_json(mask),
            }
          )
  return data


def write_json(folder: pathlib.Path, data: Any, name: str = "annotations.json") -> pathlib.Path:
  path = folder / name
  path.write_text(json.dumps(data))
  return path
