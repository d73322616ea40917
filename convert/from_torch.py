"""Converts a PyTorch checkpoint (original .pt, or transformers' safetensors) to a directory of this library.

  python -m convert.from_torch s0 ./s0                                  # from the hub, to Orbax
  python -m convert.from_torch efficient_sam3_..._ctx16.pt ./s0 --format transformers
  python -m convert.from_torch model.pt ./tiny --config tiny.json --dtype bfloat16

`sam3lt_jax.from_pretrained(OUT)` loads what it writes. Every tensor is accounted for: keys that are missing,
unexpected, doubled or of a wrong shape are all listed, and nothing is written then.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import convert


def main(argv: Sequence[str] | None = None) -> int:
  parser = convert.parser("from_torch", __doc__)
  convert.add_source(parser)
  parser.add_argument("out", metavar="OUT", help="directory to write")
  parser.add_argument(
    "--format", choices=("orbax", "transformers"), default="orbax", help="default: %(default)s"
  )
  parser.add_argument(
    "--profile",
    choices=("original", "transformers"),
    help="which reference's conventions the result follows (default: those the file was made for)",
  )
  parser.add_argument("--dtype", choices=convert.DTYPES, default="float32", help="of the weights written")
  parser.add_argument("--overwrite", action="store_true", help="replace a directory that is not empty")
  args = parser.parse_args(argv)
  return convert_checkpoint(args, args.format, args.profile)


def convert_checkpoint(args: Any, layout: str, profile: str | None) -> int:
  """Loads `args.source`, writes `args.out` in `layout` and prints what it holds."""
  convert.check_out(args.out, args.overwrite)
  from sam3lt_jax.checkpoints import from_pretrained, parameter_summary, save_pretrained, sources

  start = time.perf_counter()
  options = convert.source_options(args)
  config = {"config": options.pop("config")} if "config" in options else {}
  found = sources.locate(args.source, **options)
  source = args.source if found.kind == "random" else found.path
  model, variables = from_pretrained(source, profile=profile, param_dtype=args.dtype, **config)
  # A vocabulary of its own goes along; without one, the writer adds CLIP's where it fits.
  tokenizer = source if os.path.isfile(os.path.join(source, "tokenizer.json")) else None
  save_pretrained(args.out, model, variables, format=layout, tokenizer=tokenizer, overwrite=args.overwrite)
  print(f"{args.source} -> {args.out} ({layout}, {args.dtype}, profile {model.config.profile.name})")
  for part in parameter_summary(variables):
    print(f"  {part.name:16} {part.parameters:>13,} parameters {part.bytes / 1e6:>10,.1f} MB")
  print(f"  {time.perf_counter() - start:.1f} s")
  return 0


if __name__ == "__main__":
  sys.exit(convert.run(main))
