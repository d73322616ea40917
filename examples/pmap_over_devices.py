"""The model on every device of this machine by `jax.pmap`: a copy of the weights each, the images shared out.

    python examples/pmap_over_devices.py [MODEL]

MODEL is "s0" (downloaded, about 2 GB) by default; "shapes" comes with the package and knows drawn shapes.
A CPU is one device; JAX_NUM_CPU_DEVICES=4 makes four of it, to try this out.
"""

import sys

import jax
import scene
from PIL import ImageOps

from sam3lt_jax import Sam3Processor, from_pretrained
from sam3lt_jax.parallel import pmap_forward

MODEL = "s0"


def main(model: str = MODEL) -> None:
  network, variables = from_pretrained(model)
  # Random weights have no files, so the configuration has to do.
  processor = Sam3Processor.from_pretrained(network if model.startswith("random:") else model)
  forward = pmap_forward(network, variables)

  # Two images a device. The number of rows has to be a multiple of the number of devices.
  image = scene.draw()
  images = [image, ImageOps.mirror(image)] * jax.local_device_count()
  inputs = processor(images=images, text=["orange star"] * len(images))
  output = forward(**inputs.model_inputs)
  shards = {str(shard.device): shard.data.shape for shard in output.pred_masks.addressable_shards}
  print(f"pred_masks {output.pred_masks.shape}, by device: {shards}")

  threshold = 0.1 if model.startswith("random:") else None
  found = processor.post_process_instance_segmentation(output, threshold, target_sizes=inputs.original_sizes)
  for result in found:
    print(f"{len(result['scores'])} found, masks {result['masks'].shape}")


if __name__ == "__main__":
  main(*sys.argv[1:])
