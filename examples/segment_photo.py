"""Segments what phrases name and writes the picture with masks and scores over it.

    python examples/segment_photo.py [MODEL [PHOTO [PHRASE ...]]]

MODEL is "s0" by default, "s1", "l" (downloaded, about 2 GB), a checkpoint, or "shapes", which comes with the
package and knows drawn shapes. PHOTO is a drawn scene by default.
"""

import sys

import scene

from sam3lt_jax import Predictor

MODEL = "s0"
OUTPUT = "segment_photo.png"


def main(model: str = MODEL, photo: str | None = None, *phrases: str) -> None:
  image = scene.draw() if photo is None else photo
  threshold = 0.0 if model.startswith("random:") else None  # None: the profile's

  predictor = Predictor.from_pretrained(model)
  results = predictor(image, text=phrases or scene.PHRASES, threshold=threshold)
  results.top_k(20).save(OUTPUT)

  print(results)
  print(f"wrote {OUTPUT}")


if __name__ == "__main__":
  main(*sys.argv[1:])
