"""`sam3lt prompts`: what a set of prompts asks of a text encoder."""

from __future__ import annotations

import argparse
import json
import os

from sam3lt_jax.cli.arguments import add_device, add_out, load, make_folder, note
from sam3lt_jax.cli.kinds import number
from sam3lt_jax.cli.progress import busy

_EPILOG = """\
examples:
  lengths, context and vocabulary of a file of phrases, a phrase a line:
    sam3lt prompts phrases.txt
  several at once: {"text_annotations": [...]}, COCO or LVIS categories, SA-Co annotations, a folder:
    sam3lt prompts noun_phrases.json lvis_v1_val.json --synonyms gold/ --out prompt_report
  with a model, how many dimensions its features of these phrases fill:
    sam3lt prompts phrases.txt --model s0
  one number, in a script:
    sam3lt prompts phrases.txt --json | jq .vocabulary.used

written to the output folder:
  report.json   everything measured
  report.png    the plots (needs matplotlib, which the extra [train] brings)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.epilog = _EPILOG
  add = parser.add_argument
  add("files", nargs="+", metavar="FILE", help="text, JSON or JSON lines, told by content; folders, too")
  add("--synonyms", action="store_true", help="take the synonyms of LVIS categories, too")
  add("--context", dest="context_length", metavar="T",
      type=number(int, lambda n: n >= 2, "a number of tokens, at least 2"),
      help="context length in tokens to judge (default: the profile's)")  # fmt: skip
  add("-m", "--model", metavar="s0|s1|l|shapes|ID|DIR|FILE",
      help="measure the dimension of this model's text features as well (default: no model)",
  ).fills = ("source",)  # fmt: skip
  add("--profile", choices=("original", "transformers"),
      help="whose cleaning and context (default: the model's own, original without one)")  # fmt: skip
  add_device(parser)
  add_out(parser, "sam3lt_prompts")
  add("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
  from sam3lt_jax.analysis.plots import save_plots
  from sam3lt_jax.analysis.prompts import prompt_report, table
  from sam3lt_jax.data.prompts import read_prompts
  from sam3lt_jax.processing.tokenizer import ClipTokenizer

  make_folder(args.out)
  model = variables = None
  if args.model is None:  # then no jax is imported
    tokenizer = ClipTokenizer(profile=args.profile or "original")
  else:
    warning = "RANDOM WEIGHTS: the dimensions below are of no trained model"
    predictor = load(args, warning, compile_ahead=False)
    tokenizer, model, variables = predictor.processor.tokenizer, predictor.model, predictor.variables
  with busy("reading the prompts") as progress:
    prompts = read_prompts(args.files, tokenizer.profile, synonyms=args.synonyms)
    progress.describe(f"measuring {len(prompts.phrases):,} phrases")
    given = {"model": model, "variables": variables, "model_name": args.model or "model"}
    report = prompt_report(prompts, tokenizer, args.context_length, **given)
    progress.describe("writing the report")
    paths = [os.path.join(args.out, "report.json"), os.path.join(args.out, "report.png")]
    with open(paths[0], "w", encoding="utf-8") as f:
      f.write(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    try:
      save_plots(report, paths[1])
    except ImportError as e:
      note(f"warning: {e}")
      del paths[1]
  if args.json:
    print(json.dumps(report, ensure_ascii=False))
  else:
    print(f"{table(report)}\n\nwrote {', '.join(paths)}")
  return 0
