"""`sam3lt demo`: draws a scene and segments it with the bundled model; nothing is downloaded."""

from __future__ import annotations

import argparse
import os

from sam3lt_jax.cli.arguments import check_writable
from sam3lt_jax.cli.progress import busy

_EPILOG = """\
examples:
  the default scene and four questions about it:
    sam3lt demo
  another scene and your own phrases:
    sam3lt demo "striped shape" "small red circle" --seed 7

The model knows shapes only. A phrase has a shape and up to three words before it, in this order:
  small, large - plain, striped, dotted, checked - red, orange, yellow, green, blue, purple, white, black -
  circle, ring, square, triangle, star, cross, or shape for any of them
"""
SEED = 1_000_000_007  # no training scene has such a number
PHRASES = 4
SIDE = 480  # pixels of the picture; the model looks at it at a quarter of that


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.usage = '%(prog)s ["a phrase" ...] [options]'
  parser.epilog = _EPILOG
  add = parser.add_argument
  add("phrases", nargs="*", metavar="PHRASE", help="what to find (default: phrases about the scene)")
  add("--seed", type=_seed, default=SEED, metavar="N", help=f"which scene, 0 or more (default: {SEED})")
  add("--out", default="sam3lt_out", metavar="DIR", help="output folder (default: sam3lt_out)")


def run(args: argparse.Namespace) -> int:
  from PIL import Image

  from sam3lt_jax.predictor import Predictor
  from sam3lt_jax.shapes.scenes import SceneConfig, draw_scene

  check_writable(args.out)
  picture, overlay = (os.path.join(args.out, f"demo_{name}.png") for name in ("scene", "overlay"))
  with busy("drawing a scene and loading the bundled model"):
    scene = draw_scene(args.seed, SceneConfig(side=SIDE))
    phrases = args.phrases or _phrases_about(scene)
    predictor = Predictor.from_pretrained("shapes")
  with busy("compiling and segmenting"):
    results = predictor(scene.image, text=phrases)
  Image.fromarray(scene.image).save(picture)
  results.render(scene.image).save(overlay)
  for phrase in phrases:
    scores = [f"{score:.2f}" for score, label in zip(results.scores, results.labels) if label == phrase]
    print(f"{phrase}: {len(scores)} found" + (f", scores {', '.join(scores)}" if scores else ""))
  print(f"wrote {overlay} (the scene: {picture})")
  return 0


def _seed(text: str) -> int:
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"must be a whole number of 0 or more, got {text!r}")
  return int(text)


def _phrases_about(scene) -> list[str]:
  """Phrases that match something in the scene, and last one that matches nothing."""
  import numpy as np

  from sam3lt_jax.shapes.phrases import absent_phrase, phrase_about

  rng = np.random.default_rng(scene.seed)
  phrases = dict.fromkeys(str(phrase_about(t, rng)) for t in reversed(scene.objects))
  return [*list(phrases)[: PHRASES - 1], str(absent_phrase(scene.objects, rng))]
