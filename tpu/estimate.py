"""Images a second, hours and cost to expect of a batch job, from compiled programs: an estimate, unmeasured.

    python -m tpu.estimate --model s0 --images 1000000 --phrases 10 --chip v6e --chips 16 --price 2.70

FLOPs and bytes are those that the TPU's compiler counts in the full-size programs (compiled.json, written
by `python -m tpu.compile`). A chip is taken to reach `--utilisation` of the peak that its maker states, or to
move the bytes at the stated bandwidth, whichever takes longer. The share is the weak point: the default is an
assumption, and decoding, transfers and writing are taken to hide behind the devices. Run a thousand images
first and put in what they reached.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from tpu.chips import CHIPS, COMPILED

UTILISATION = 0.35
MODELS = ("s0", "s1", "l", "sam3")
# Which programs of S0 the figures come from, and how many images or phrases each is for.
IMAGES, PHRASES = ("vision, 8 images", 8), ("detection, 16 prompts", 16)


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What is expected of a job.

  Attributes:
    image_flops, phrase_flops: of encoding an image once, and of asking it one phrase.
    image_bytes, phrase_bytes: likewise what is read and written.
    images_per_second: of all chips together.
    hours: for all images.
    cost: in the currency of the price, None without one.
  """

  image_flops: float
  phrase_flops: float
  image_bytes: float
  phrase_bytes: float
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
) -> Estimate:
  """The estimate of one job.

  Args:
    model: "s0", "s1", "l" or "sam3", at 1008 px. Their text encoders differ, and phrases are encoded once a
      job, which is left out: they all come out alike.
    images, phrases: how many images, and how many phrases each is asked.
    chip, chips: one of `CHIPS`, and how many.
    utilisation: share of the stated peak that is reached, over 0 to 1.
    price: of one chip for an hour, in any currency.

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
  (image, image_bytes), (phrase, phrase_bytes) = _each(*IMAGES), _each(*PHRASES)
  computing = (image + phrases * phrase) / (utilisation * CHIPS[chip].tflops * 1e12)
  moving = (image_bytes + phrases * phrase_bytes) / (CHIPS[chip].bandwidth * 1e9)
  rate = chips / max(computing, moving)
  hours = images / rate / 3600
  cost = None if price is None else hours * chips * price
  return Estimate(image, phrase, image_bytes, phrase_bytes, rate, hours, cost)


def _each(program: str, count: int) -> tuple[float, float]:
  """FLOPs and bytes of each of the `count` images or phrases that the program is for."""
  rows = json.loads(COMPILED.read_text())
  wanted = {"size": "s0", "topology": "v5e:2x2", "chips": 1, "program": program}
  (row,) = (r for r in rows if wanted.items() <= r.items())
  return row["flops"] / count, row["accessed"] / count


def report(args: argparse.Namespace, found: Estimate) -> str:
  chip = CHIPS[args.chip]
  image, phrase = found.image_flops / 1e12, found.phrase_flops / 1e12
  lines = [
    f"ESTIMATE, not a measurement: {args.model} in bfloat16 on {args.chips} x {args.chip}",
    f"  FLOPs            {image:.2f} T an image, {phrase:.2f} T a phrase",
    f"  bytes            {found.image_bytes / 1e9:.2f} G an image, {found.phrase_bytes / 1e9:.2f} G a phrase",
    f"  peak             {chip.tflops:g} TFLOP/s and {chip.bandwidth:g} GB/s a chip ({chip.source})",
    f"  utilisation      {args.utilisation:.0%} of the FLOP/s: an assumption; measure on a thousand images",
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
  args = parser.parse_args(argv)
  try:
    found = estimate(**vars(args))
  except ValueError as e:
    parser.error(str(e))
  print(report(args, found))
  return 0


if __name__ == "__main__":
  sys.exit(main())
