"""One image, many prompts: the image is encoded once.

    python examples/many_prompts_one_image.py [MODEL [PHOTO]]

MODEL is "s0" (downloaded, about 2 GB) by default; "shapes" comes with the package and knows drawn shapes.

First with the predictor (`set_image`, then `predict` as often as you like), then with the model itself, which
answers several prompts about several images in one call (`image_index`).
"""

import sys

import jax
import numpy as np
import scene
from PIL import Image

from sam3lt_jax import Predictor
from sam3lt_jax.processing.images import load_image

MODEL = "s0"
PHRASES = ["red circle", "blue square", "shape"]


def main(model: str = MODEL, photo: str | None = None) -> None:
  image = scene.draw() if photo is None else Image.fromarray(load_image(photo))
  threshold = 0.1 if model.startswith("random:") else None

  predictor = Predictor.from_pretrained(model)
  predictor.set_image(image)
  for phrase in PHRASES:
    print(f"{phrase}: {len(predictor.predict(phrase, threshold=threshold))} found")
  like_this = predictor.predict(boxes=[scene.RED_CIRCLES[0]], threshold=threshold)
  print(f"like the box: {len(like_this)} found")
  but_not_that = predictor.predict(
    boxes=[scene.RED_CIRCLES[0], scene.BLUE_SQUARES[0]], box_labels=[1, 0], threshold=threshold
  )
  print(f"like the first box, not the second: {len(but_not_that)} found")

  # The same in one call: three phrases about the photo, one about its mirror image.
  network, processor = predictor.model, predictor.processor
  images = processor(images=[image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
  prompts = processor(text=[*PHRASES, PHRASES[0]])
  output = jax.jit(network.apply)(
    predictor.variables,
    images.pixel_values,
    prompts.input_ids,
    prompts.attention_mask,
    image_index=np.array([0, 0, 0, 1], np.int32),
  )
  found = processor.post_process_object_detection(output, threshold)
  print("all at once:", [len(row["scores"]) for row in found])


if __name__ == "__main__":
  main(*sys.argv[1:])
