"""Fine-tunes the detector on a few pictures with masks, and shows what it finds before and after.

    python examples/finetune_detector.py [MODEL [STEPS]]

By default the bundled model, which knows drawn shapes, learns one that it does not know: half circles, under
the word "ring". It ends within a few minutes with nothing downloaded. Your own records come from a COCO or
SA-Co file: `load_records("annotations.json", "photos")`. To train all of the model, leave `lora` and `train`
out.
"""

import sys

import numpy as np
from PIL import Image, ImageDraw

from sam3lt_jax import Predictor
from sam3lt_jax.data.batches import BatchConfig
from sam3lt_jax.data.records import Prompt, Record
from sam3lt_jax.training.detection.lora import LoraConfig
from sam3lt_jax.training.detection.run import finetune
from sam3lt_jax.training.detection.setup import FinetuneConfig

MODEL, STEPS = "shapes", 100
OUTPUT = "finetuned"
SIDE = 168


def draw(seed: int) -> Record:
  """A picture with one or two half circles, and two questions: for them, and for what is not there."""
  rng = np.random.default_rng(seed)
  picture, masks = Image.new("RGB", (SIDE, SIDE), (190, 190, 190)), []
  for left in (8, 88)[: rng.integers(1, 3)]:
    radius, x, y = rng.integers(18, 34), left + 36, rng.integers(40, 128)
    circle = tuple(int(v) for v in (x - radius, y - radius, x + radius, y + radius))
    ImageDraw.Draw(picture).pieslice(circle, 180, 360, fill=(206, 44, 44))
    mask = Image.new("1", (SIDE, SIDE))
    ImageDraw.Draw(mask).pieslice(circle, 180, 360, fill=1)
    masks.append(np.array(mask))
  prompts = (Prompt.from_masks("ring", np.stack(masks)), Prompt("blue square", np.zeros((0, 4))))
  return Record(seed, np.array(picture), (SIDE, SIDE), prompts)


def main(model=MODEL, steps=STEPS) -> None:
  config = FinetuneConfig(
    steps=int(steps),
    data=BatchConfig(batch_size=2, prompts=2, objects=2),
    lora=LoraConfig(rank=8),
    train=("scoring", "masks"),  # beside the adapters
    lora_lr=2e-3 if model == MODEL else 2e-4,  # the figures for SAM 3 would take longer here
    lr=1e-3 if model == MODEL else 8e-5,
  )
  result = finetune(
    model,
    [draw(seed) for seed in range(8)],
    OUTPUT,
    config,
    validation=[draw(seed) for seed in range(100, 104)],
  )

  print(f"{result.trained_parameters:,} parameters trained")
  print(f"cgF1 {result.before['cgF1']:.1f} -> {result.after['cgF1']:.1f}")
  predictor = Predictor.from_pretrained(
    result.written["model"]
  )  # or Predictor(result.model, result.variables)
  print(predictor(draw(100).image, text="ring"))
  print(f"wrote {', '.join(result.written.values())}")


if __name__ == "__main__":
  main(*sys.argv[1:])
