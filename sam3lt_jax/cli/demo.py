"""`sam3lt demo`: draws a scene and segments it with the bundled model; nothing is downloaded.

With --data it draws a small data set instead, to try the other verbs on.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from sam3lt_jax.cli import UserError
from sam3lt_jax.cli.arguments import add_device, add_out, load, make_folder
from sam3lt_jax.cli.kinds import count, whole
from sam3lt_jax.cli.progress import busy

if TYPE_CHECKING:
  from sam3lt_jax.processing.results import Results

_EPILOG = """\
examples:
  the default scene and four questions about it:
    sam3lt demo
  another scene and your own phrases:
    sam3lt demo "striped shape" "shape" --seed 2000000005
  drawn scenes with annotations, a clip, and phrases, to try the other verbs on:
    sam3lt demo --data drawn
    sam3lt eval --model shapes --annotations drawn/val.json --images drawn/images
    sam3lt track drawn/clip "shape" --model shapes --tracker same --out tracked

The model knows shapes only. A phrase has a shape and up to three words before it, in this order:
  small, large - plain, striped, dotted, checked - red, orange, yellow, green, blue, purple, white, black -
  circle, ring, square, triangle, star, cross, or shape for any of them
"""
SEED = 1_000_000_007  # no training scene has such a number
PHRASES = 4
SIDE = 480  # pixels of the picture; the model looks at it at a quarter of that
SCENES = 32
VALIDATION = 4  # every fourth scene of --data
CLIP, FRAMES = 1_000_000_003, 24  # of --data: a scene that moves


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.usage = '%(prog)s ["a phrase" ...] [options]'
  parser.epilog = _EPILOG
  add = parser.add_argument
  add("phrases", nargs="*", metavar="PHRASE", help="what to find (default: phrases about the scene)")
  add("--seed", type=whole, default=SEED, metavar="N", help="which scene, 0 or more")
  add_device(parser)
  add_out(parser)
  add("--data", metavar="DIR",
      help="draw a data set into DIR instead: images/, train.json and val.json (COCO), phrases.txt, clip/",
  )  # fmt: skip
  add("--scenes", type=count, metavar="N",
      help=f"of --data, a quarter of them for val.json (default: {SCENES})")  # fmt: skip


def run(args: argparse.Namespace) -> int:
  if args.data is not None:
    if args.phrases:
      raise UserError("--data draws scenes and asks nothing: leave the phrases out")
    return _write_data(args.data, args.scenes or SCENES, args.seed)
  if args.scenes is not None:
    raise UserError("--scenes without --data")
  from PIL import Image

  from sam3lt_jax.checkpoints import sources
  from sam3lt_jax.shapes.scenes import SceneConfig, draw_scene

  sources.check_phrases("shapes", args.phrases)
  make_folder(args.out)
  picture, overlay = (os.path.join(args.out, f"demo_{name}.png") for name in ("scene", "overlay"))
  with busy("drawing a scene"):
    scene = draw_scene(args.seed, SceneConfig(side=SIDE))
    phrases = args.phrases or _phrases_about(scene)
  args.model, args.profile = "shapes", None
  predictor = load(args)
  with busy("compiling and segmenting"):
    results = predictor(scene.image, text=phrases)
  Image.fromarray(scene.image).save(picture)
  results.save(overlay, scene.image)
  for phrase in phrases:
    scores = [f"{score:.2f}" for score, label in zip(results.scores, results.labels) if label == phrase]
    print(f"{phrase}: {len(scores)} found" + (f", scores {', '.join(scores)}" if scores else ""))
  print(f"wrote {overlay} (the scene: {picture})")
  return 0


def _phrases_about(scene) -> list[str]:
  """Phrases that match something in the scene, and last one that matches nothing."""
  import numpy as np

  from sam3lt_jax.shapes.phrases import absent_phrase, phrase_about

  rng = np.random.default_rng(scene.seed)
  phrases = dict.fromkeys(str(phrase_about(t, rng)) for t in reversed(scene.objects))
  return [*list(phrases)[: PHRASES - 1], str(absent_phrase(scene.objects, rng))]


def _write_data(folder: str, scenes: int, seed: int) -> int:
  """Scenes with a category a kind of shape; every `VALIDATION`th is for val.json."""
  from PIL import Image

  from sam3lt_jax.shapes.phrases import all_phrases
  from sam3lt_jax.shapes.scenes import KINDS, SceneConfig, draw_clip, draw_scene

  if scenes < VALIDATION:
    raise UserError(f"--scenes: must be at least {VALIDATION}, so that val.json has one, got {scenes}")
  for name in ("images", "clip"):
    make_folder(os.path.join(folder, name), "data")
  categories = [{"id": i, "name": kind} for i, kind in enumerate(KINDS, 1)]
  ids = {category["name"]: category["id"] for category in categories}
  parts = {n: {"images": [], "categories": categories, "annotations": []} for n in ("train", "val")}
  with busy("drawing", total=scenes + FRAMES) as progress:
    for i in range(scenes):
      name = f"{i:03d}.png"
      scene = draw_scene(seed + i, SceneConfig(side=SIDE, min_objects=2))
      Image.fromarray(scene.image).save(os.path.join(folder, "images", name))
      part = parts["train" if (i + 1) % VALIDATION else "val"]
      part["images"].append({"id": i + 1, "file_name": name, "height": SIDE, "width": SIDE})
      first = len(part["annotations"]) + 1
      part["annotations"] += _results(scene).to_coco(i + 1, ids, first)
      progress.advance()
    for i, scene in enumerate(draw_clip(CLIP, FRAMES, SceneConfig(side=SIDE, min_objects=2, max_objects=5))):
      Image.fromarray(scene.image).save(os.path.join(folder, "clip", f"{i:03d}.png"))
      progress.advance()
  for name, part in parts.items():
    with open(os.path.join(folder, f"{name}.json"), "w", encoding="utf-8") as f:
      json.dump(part, f)
  with open(os.path.join(folder, "phrases.txt"), "w", encoding="utf-8") as f:
    f.writelines(f"{phrase}\n" for phrase in all_phrases())
  train, val = (len(part["images"]) for part in parts.values())
  files = ", ".join(os.path.join(folder, n) for n in ("train.json", "val.json", "phrases.txt"))
  images, clip = (os.path.join(folder, name) for name in ("images", "clip"))
  print(f"wrote {files} ({train} and {val} scenes in {images}), and a clip of {FRAMES} frames in {clip}")
  return 0


def _results(scene) -> Results:
  """What a model that makes no mistake finds in a scene."""
  from sam3lt_jax.processing.results import Results

  things, size = scene.objects, scene.image.shape[:2]
  return Results(
    [t.box for t in things], [1.0] * len(things), [t.mask for t in things], [t.kind for t in things], size
  )
