"""`sam3lt merge`: the shards of a batch job to one COCO file, Parquet, a list of failures."""

from __future__ import annotations

import argparse
import sys

from sam3lt_jax.cli import PROGRAM, UserError
from sam3lt_jax.cli.progress import busy

_EPILOG = """\
examples:
  one COCO data set that pycocotools loads:
    sam3lt merge results --out results.json
  results to evaluate against annotations, by COCO.loadRes:
    sam3lt merge results --out detections.json --results-only
  a table a row an image, and the images that failed:
    sam3lt merge results --parquet results.parquet --failures failures.jsonl
  what is there, before the job is finished:
    sam3lt merge results --out so_far.json --partial
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.usage = "%(prog)s DIR --out FILE [options]"
  parser.epilog = _EPILOG
  add = parser.add_argument
  add("directory", metavar="DIR", help="the job's output folder, or its URL")
  add(
    "-o", "--out", metavar="FILE", help="COCO JSON to write: images, categories, annotations with RLE masks"
  )
  add("--results-only", action="store_true", help="--out holds a list of COCO results instead, for loadRes")
  add("--parquet", metavar="FILE", help="Parquet to write, a row an image (needs pyarrow)")
  add("--failures", metavar="FILE", help="JSON lines to write: the images that failed and why")
  add("--partial", action="store_true", help="merge the shards that are done, although others are missing")


def run(args: argparse.Namespace) -> int:
  from sam3lt_jax.jobs.merge import merge
  from sam3lt_jax.jobs.plan import Plan

  paths = [path for path in (args.out, args.parquet, args.failures) if path is not None]
  if not paths:
    raise UserError(f"nothing to write: give --out, --parquet or --failures (see {PROGRAM} merge --help)")
  if args.results_only and args.out is None:
    raise UserError("--results-only says what --out holds: give --out FILE")
  with busy("merging", total=len(Plan.load(args.directory).committed())) as progress:
    merged = merge(
      args.directory,
      args.out,
      parquet=args.parquet,
      failures=args.failures,
      partial=args.partial,
      results_only=args.results_only,
      on_shard=progress.advance,
    )
  for note in merged.notes:
    print(f"{PROGRAM}: warning: {note}", file=sys.stderr)
  missing = f", {merged.missing:,} shards missing" if merged.missing else ""
  print(f"{merged.images:,} images, {merged.results:,} results, {merged.failures:,} failures{missing}")
  print(f"  wrote {', '.join(paths)}")
  return 0
