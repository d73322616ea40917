"""`sam3lt eval`: how good a model is on annotated images."""

from __future__ import annotations

import argparse
import json
import os

from sam3lt_jax.cli import UserError
from sam3lt_jax.cli.arguments import add_model, add_out, load, make_folder
from sam3lt_jax.cli.kinds import count, fraction
from sam3lt_jax.cli.progress import busy

_EPILOG = """\
examples:
  COCO, every category asked of every image, the first 500 images:
    sam3lt eval --annotations instances_val2017.json --images val2017 --metrics cgf1 ap --limit 500
  LVIS (its federated AP), of the categories that each image has or lists as absent:
    sam3lt eval --annotations lvis_v1_val.json --images coco --metrics cgf1 ap
  SA-Co/Gold with its three annotators (of a pair the most favourable one counts):
    sam3lt eval --annotations gold_a.json gold_b.json gold_c.json --images metaclip --out gold
  boxes alone, of a fine-tuned model:
    sam3lt eval --model my_model --annotations boxes.json --images photos --iou bbox
  one number, in a script:
    sam3lt eval --annotations a.json --images photos --json | jq .cgf1.segm.cgF1

written to the output folder, where one is given:
  predictions.jsonl   one line an image-phrase pair, as they come: phrase, ids, results in COCO's format
  report.json         everything that is measured, and what was left out
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.usage = "%(prog)s --annotations FILE... --images DIR [options]"
  parser.epilog = _EPILOG
  add = parser.add_argument
  add_model(parser)
  add("--annotations", nargs="+", required=True, metavar="FILE",
      help="COCO, LVIS or SA-Co JSON; several files: further annotators of the same SA-Co pairs")  # fmt: skip
  add("--images", required=True, metavar="DIR", help="the folder that the annotations' file names are in")
  add("--metrics", nargs="+", choices=("cgf1", "ap"), default=["cgf1"], help="(default: cgf1)")
  add("--iou", nargs="+", choices=("segm", "bbox"), default=["segm", "bbox"],
      help="compare masks, boxes or both (default)")  # fmt: skip
  add("--only-present", action="store_true",
      help="do not ask for categories that an image has none of (AP is then not the published figure)",
  )  # fmt: skip
  add("--limit", type=count, metavar="N", help="only the first N images")
  add("--threshold", type=fraction, default=0.5, metavar="T", help="of cgF1: results scored at least T count")
  add_out(parser, None, required=False, help="folder for predictions.jsonl and report.json")
  add("--json", action="store_true", help="print the report as JSON instead of the table")


def run(args: argparse.Namespace) -> int:
  records, *annotators = _load(args)
  if args.out is not None:
    make_folder(args.out)
  predictor = load(args)
  from sam3lt_jax.evaluation.run import evaluate, table

  total = min(len(records), args.limit or len(records))
  with busy("", total=total) as progress:
    done = 0

    def on_image(name: str) -> None:
      nonlocal done
      progress.describe(name if done else f"{name} (the first image compiles the model, too)")
      if done:
        progress.advance()
      done += 1

    report = evaluate(
      predictor,
      records,
      metrics=args.metrics,
      iou_types=args.iou,
      annotators=annotators,
      limit=args.limit,
      score_threshold=args.threshold,
      out=args.out,
      on_image=on_image,
    )
  print(json.dumps(report) if args.json else table(report))
  if args.out is not None and not args.json:
    print(f"  wrote {os.path.join(args.out, 'predictions.jsonl')}, {os.path.join(args.out, 'report.json')}")
  return 0


def _load(args: argparse.Namespace) -> list:
  from sam3lt_jax.data.load import load_records
  from sam3lt_jax.data.saco import SaCoRecords

  with busy("reading the annotations"):
    loaded = [load_records(path, args.images, negatives=not args.only_present) for path in args.annotations]
  if len(loaded) > 1:
    for path, records in zip(args.annotations, loaded):
      if not isinstance(records, SaCoRecords):
        raise UserError(
          f"--annotations: several files must all be SA-Co annotations of the same pairs; {path} is not"
        )
  return loaded
