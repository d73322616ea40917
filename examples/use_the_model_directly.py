"""The model as a JAX function: processor, jit, raw outputs, intermediates, post-processing.

    python examples/use_the_model_directly.py [MODEL [PHOTO]]

MODEL is "s0" (downloaded, about 2 GB) by default; "shapes" comes with the package and knows drawn shapes.
"""

import sys

import jax
import scene

from sam3lt_jax import Sam3Processor, from_pretrained
from sam3lt_jax.processing.images import load_image

MODEL = "s0"


def main(model: str = MODEL, photo: str | None = None) -> None:
  image = scene.draw() if photo is None else load_image(photo)
  network, variables = from_pretrained(model)
  network, variables = network.fuse(variables)  # the same function, a little faster
  # Random weights have no files, so the configuration has to do.
  processor = Sam3Processor.from_pretrained(network if model.startswith("random:") else model)

  inputs = processor(images=image, text="orange star", input_boxes=[[scene.ORANGE_STARS[0]]])
  for name, value in inputs.items():
    print(f"{name}: {value.dtype} {value.shape}")

  @jax.jit
  def forward(variables, inputs):
    return network.apply(variables, **inputs, output_intermediates=True)

  output = forward(variables, inputs.model_inputs)
  print(f"pred_masks: {output.pred_masks.shape}, pred_boxes: {output.pred_boxes.shape}")
  print(f"prompt tokens: {output.intermediates['prompt_tokens'].shape}")

  threshold = 0.1 if model.startswith("random:") else None
  (found,) = processor.post_process_instance_segmentation(
    output, threshold, target_sizes=inputs.original_sizes
  )
  print(f"{len(found['scores'])} found, masks {found['masks'].shape}")


if __name__ == "__main__":
  main(*sys.argv[1:])
