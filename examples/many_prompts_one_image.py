"""One image, many prompts: the image is encoded once. Ends in a sheet of pictures, one a prompt.

    python examples/many_prompts_one_image.py [MODEL]

MODEL is "s0" (downloaded, about 2 GB) by default; "shapes" comes with the package and knows drawn shapes.

First with the predictor (`set_image`, then `predict` as often as you like), then with the model itself, which
answers several prompts about several images in one call (`image_index`).
"""

import sys

import jax
import numpy as np
import scene
from PIL import Image, ImageDraw

from sam3lt_jax import Predictor

MODEL = "s0"
OUTPUT = "many_prompts.png"
CAPTION = 40  # pixels above each picture
STAR, SQUARE = scene.ORANGE_STARS[0], scene.BLACK_SQUARES[0]
PROMPTS = {
  **{phrase: {"text": phrase} for phrase in scene.PHRASES},
  "shape": {"text": "shape"},
  "like the star": {"boxes": [STAR]},
  "shape, but not like the square": {"text": "shape", "boxes": [SQUARE], "box_labels": [0]},
}


def main(model: str = MODEL) -> None:
  image = scene.draw()
  threshold = 0.1 if model.startswith("random:") else None  # None: the profile's

  predictor = Predictor.from_pretrained(model)
  predictor.set_image(image)
  sheet = Image.new("RGB", (3 * scene.SIDE, 2 * (scene.SIDE + CAPTION)), "white")
  for i, (name, prompt) in enumerate(PROMPTS.items()):
    results = predictor.predict(**prompt, threshold=threshold)
    print(f"{name}: {len(results)} found")
    x, y = i % 3 * scene.SIDE, i // 3 * (scene.SIDE + CAPTION)
    sheet.paste(results.render(labels=False), (x, y + CAPTION))
    ImageDraw.Draw(sheet).text((x + 8, y + 5), name, fill="black", font_size=26)
  sheet.save(OUTPUT)
  print(f"wrote {OUTPUT}")

  # The same in one call: three phrases about the photo, one about its mirror image.
  network, processor = predictor.model, predictor.processor
  images = processor(images=[image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
  prompts = processor(text=[*scene.PHRASES, scene.PHRASES[0]])
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
