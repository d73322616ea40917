"""`sam3lt export`: a model as programs that run without this package."""

from __future__ import annotations

import argparse
import os

from sam3lt_jax.cli import UserError
from sam3lt_jax.cli.arguments import add_model, add_out, load
from sam3lt_jax.cli.kinds import number
from sam3lt_jax.cli.progress import busy

_EPILOG = """\
examples:
  one artefact for CPU, NVIDIA GPUs and TPUs, any number of images and prompts a call:
    sam3lt export --model s0 --out exported
  for one kind of device, four images and sixteen prompts a call, in bfloat16:
    sam3lt export --model s0 --out exported --platforms tpu --batch 4 --prompts 16 --dtype bfloat16
  with the token ids of phrases, so that the reader needs no tokenizer:
    sam3lt export --model s0 --out exported --phrases "truck" "traffic light"

written to the output folder:
  vision.jaxexport, text.jaxexport, detection.jaxexport   StableHLO, by jax.export
  weights.safetensors                                     what the three read
  manifest.json                                           shapes, names, thresholds, digests, versions
  loader.py                                               runs it all with jax and numpy alone; see its head
  tokenizer.json, vendor/                                 the tokenizer; a copy of flatbuffers for the loader
"""


_size = number(
  lambda text: text if text == "symbolic" else int(text),
  lambda n: n == "symbolic" or n >= 1,
  "a whole number of at least 1, or 'symbolic'",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.epilog = _EPILOG
  add = parser.add_argument
  add_model(parser, "of weights and layers")
  add_out(parser, None, help="output folder, new or empty")
  add("--platforms", nargs="+", default=["cpu", "cuda", "tpu"], metavar="P",
      help="what it is to run on: cpu, cuda, tpu, rocm (default: cpu cuda tpu)")  # fmt: skip
  add("--batch", type=_size, default="symbolic", metavar="N|symbolic",
      help="images a call, a fixed number or any")  # fmt: skip
  add("--prompts", type=_size, default="symbolic", metavar="N|symbolic",
      help="prompts a call, a fixed number or any")  # fmt: skip
  add("--boxes", type=int, default=8, metavar="N", help="slots for example boxes a prompt, 0 for none")
  add("--phrases", nargs="+", default=[], metavar="PHRASE", help="keep the token ids of these phrases")


def run(args: argparse.Namespace) -> int:
  if os.path.isdir(args.out) and os.listdir(args.out):
    raise UserError(f"--out: {args.out} is not empty; give a new folder")
  predictor = load(args, compile_ahead=False)
  from sam3lt_jax import exporting

  with busy(f"exporting for {', '.join(args.platforms)}"):
    manifest = exporting.export_model(
      predictor,
      args.out,
      platforms=args.platforms,
      batch=args.batch,
      prompts=args.prompts,
      boxes=args.boxes,
      phrases=args.phrases,
      name=args.model if not os.path.exists(args.model) else os.path.basename(os.path.abspath(args.model)),
    )
  for name, file in manifest["files"].items():
    print(f"  {name:<22} {file['bytes'] / 1e6:10,.2f} MB")
  print(f"wrote {args.out}: run it with {os.path.join(args.out, 'loader.py')} (jax and numpy)")
  return 0
