"""Images a second, hours and cost to expect of a batch job, from the model's FLOPs: an estimate, unmeasured.

    python -m tpu.estimate --model s0 --images 1000000 --phrases 10 --chip v6e --chips 16 --price 2.70

FLOPs are counted from the configuration (matrix products and convolutions, a multiplication and an addition
counting two). A chip is taken to reach `--utilisation` of the peak that its maker states. That is the weak
point: the default is an assumption, and decoding, transfers and writing are taken to hide behind the devices.
Run a thousand images first and put in what they reached.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import NamedTuple

from sam3lt_jax.config import Sam3LiteTextConfig
from tests.benchmarks import flops

UTILISATION = 0.35
MODELS = ("s0", "s1", "l", "sam3")
PHRASE_PARTS = (flops.GEOMETRY, flops.FUSION, flops.DECODER, flops.SCORES, flops.MASKS)
IMAGE_PARTS = (flops.PATCHES, flops.WINDOWED, flops.GLOBAL, flops.NECK)


class Chip(NamedTuple):
  """What its maker states: dense bfloat16 peak in TFLOP/s, memory in GB, and where that is said."""

  tflops: float
  memory: int
  source: str


CHIPS = {
  "v5e": Chip(197, 16, "Google Cloud, TPU v5e: peak compute per chip (bf16)"),
  "v6e": Chip(918, 32, "Google Cloud, TPU v6e (Trillium): peak compute per chip (bf16)"),
  "v5p": Chip(459, 95, "Google Cloud, TPU v5p: peak compute per chip (bf16)"),
  "a100": Chip(312, 80, "NVIDIA A100 data sheet: BFLOAT16 Tensor Core, dense"),
  "h100": Chip(989, 80, "NVIDIA H100 SXM data sheet: BFLOAT16 Tensor Core, without sparsity"),
  "l4": Chip(121, 24, "NVIDIA L4 data sheet: BFLOAT16 Tensor Core, without sparsity"),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What is expected of a job.

  Attributes:
    image_flops, phrase_flops: of encoding an image once, and of asking it one phrase.
    images_per_second: of all chips together.
    hours: for all images.
    cost: in the currency of the price, None without one.
  """

  image_flops: float
  phrase_flops: float
  images_per_second: float
  hours: float
  cost: float | None


def estimate(
  model: str = "s0",
  *,
  images: int,
  phrases: int,
  chip: str,
  chips: int,
  utilisation: float = UTILISATION,
  price: float | None = None,
  image_size: int | None = None,
  box_slots: int = 8,
) -> Estimate:
  """The estimate of one job.

  Args:
    model: "s0", "s1", "l" or "sam3". Their text encoders differ, and phrases are encoded once a job, which
      is left out: they all come out alike.
    images, phrases: how many images, and how many phrases each is asked.
    chip, chips: one of `CHIPS`, and how many.
    utilisation: share of the stated peak that is reached, over 0 to 1.
    price: of one chip for an hour, in any currency.
    image_size: side of the model's input in pixels; default 1008.
    box_slots: example boxes a phrase is padded to.

  Raises:
    ValueError: a number or name that is not as above.
  """
  if model not in MODELS:
    raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
  if chip not in CHIPS:
    raise ValueError(f"chip must be one of {', '.join(CHIPS)}, got {chip!r}")
  for name, value in (("images", images), ("phrases", phrases), ("chips", chips)):
    if value < 1:
      raise ValueError(f"{name} must be at least 1, got {value}")
  if not 0 < utilisation <= 1:
    raise ValueError(f"utilisation must be over 0 and at most 1, got {utilisation}")
  if price is not None and not price >= 0:
    raise ValueError(f"price must not be negative, got {price}")
  config = getattr(Sam3LiteTextConfig, model)()
  patch = config.vision.patch_size
  if image_size is not None and (image_size % patch or image_size < 2 * patch):
    raise ValueError(f"image_size must be a multiple of {patch}, at least {2 * patch}, got {image_size}")
  parts = flops.by_part(config, config.profile.context_length, box_slots, image_size)
  image = float(sum(parts[p] for p in IMAGE_PARTS))
  phrase = float(sum(parts.get(p, 0) for p in PHRASE_PARTS))
  rate = chips * utilisation * CHIPS[chip].tflops * 1e12 / (image + phrases * phrase)
  hours = images / rate / 3600
  return Estimate(image, phrase, rate, hours, None if price is None else hours * chips * price)


def report(args: argparse.Namespace, found: Estimate) -> str:
  chip = CHIPS[args.chip]
  image, phrase = found.image_flops / 1e12, found.phrase_flops / 1e12
  lines = [
    f"ESTIMATE, not a measurement: {args.model} in bfloat16 on {args.chips} x {args.chip}",
    f"  FLOPs            {image:.2f} T an image, {phrase:.2f} T a phrase",
    f"  peak             {chip.tflops:g} TFLOP/s a chip ({chip.source})",
    f"  utilisation      {args.utilisation:.0%} of it: an assumption; measure yours on a thousand images",
    f"  throughput       {found.images_per_second:,.1f} images/s with {args.phrases} phrases each",
    f"  {args.images:,} images  {found.hours:,.2f} hours",
  ]
  if found.cost is not None:
    lines.append(f"  cost             {found.cost:,.2f} at the given {args.price:g} per chip and hour")
  else:
    lines.append("  cost             give --price, of one chip for an hour, from the provider's price list")
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tpu.estimate", description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--model", default="s0", choices=MODELS, help="(default: s0)")
  add("--images", type=int, required=True, metavar="N")
  add("--phrases", type=int, required=True, metavar="N", help="each image is asked")
  add("--chip", required=True, choices=list(CHIPS))
  add("--chips", type=int, required=True, metavar="N")
  add("--utilisation", type=float, default=UTILISATION, metavar="SHARE",
      help=f"of the stated peak that is reached (default: {UTILISATION}, an assumption)")  # fmt: skip
  add("--price", type=float, metavar="P", help="of one chip for an hour, in any currency")
  add("--image-size", type=int, metavar="S", help="side of the model's input in pixels (default: 1008)")
  args = parser.parse_args(argv)
  try:
    found = estimate(**vars(args))
  except ValueError as e:
    parser.error(str(e))
  print(report(args, found))
  return 0


if __name__ == "__main__":
  sys.exit(main())
