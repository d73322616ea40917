"""Segments what a phrase names and writes the photo with masks, boxes and scores over it.

    python examples/segment_photo.py [MODEL [PHOTO [PHRASE]]]

MODEL is "s0", "s1", "l" (downloaded, about 2 GB), a checkpoint, or "shapes", which comes with the package and
knows drawn shapes only.
"""

import sys

import scene

from sam3lt_jax import Predictor

MODEL = "s0"
OUTPUT = "segment_photo.png"


def main(model: str = MODEL, photo: str | None = None, phrase: str = "red circle") -> None:
  image = scene.draw() if photo is None else photo
  threshold = 0.0 if model.startswith("random:") else None  # None: the profile's

  predictor = Predictor.from_pretrained(model)
  results = predictor(image, text=phrase, threshold=threshold)
  results.top_k(5).render(image).save(OUTPUT)

  print(results)
  print(f"wrote {OUTPUT}")


if __name__ == "__main__":
  main(*sys.argv[1:])
