"""`sam3lt status`: how far a batch job is."""

from __future__ import annotations

import argparse
import json
import sys
import time

from sam3lt_jax.cli import UserError
from sam3lt_jax.cli.kinds import number
from sam3lt_jax.cli.progress import busy

_EPILOG = """\
examples:
  how far the job in a folder is, and what failed:
    sam3lt status results
  look again every 10 seconds, until it is finished:
    sam3lt status results --watch 10
  read every shard that is done, and do damaged ones again (then start the job once more):
    sam3lt status results --repair
  the share done, in a script:
    sam3lt status results --json | jq '.images.done / .images.total'

A job in a bucket (gs://, s3://) shows what is done; what is in work is known in folders alone.

exit codes: 0; 1 where a shard is damaged, as far as sizes and digest files tell, or, with --verify, its whole
content; 2 no job is there, or its plan is damaged.
"""


SECONDS = number(float, lambda x: 0.1 <= x <= 86400, "a number of seconds from 0.1 to 86400")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.usage = "%(prog)s DIR [options]"
  parser.epilog = _EPILOG
  add = parser.add_argument
  add("directory", metavar="DIR", help="the job's output folder, or its URL")
  add("--json", action="store_true", help="print JSON; with --watch an object a line")
  add("--watch", nargs="?", type=SECONDS, const=5.0, metavar="SECONDS",
      help="look again every SECONDS (default: 5) until the job is finished")  # fmt: skip
  add("--verify", action="store_true", help="read every shard that is done and compare it with its digest")
  add("--repair", action="store_true", help="set damaged shards aside, so that the job does them again")


def run(args: argparse.Namespace) -> int:
  from sam3lt_jax.jobs.ledger import SHARDS
  from sam3lt_jax.jobs.plan import Plan
  from sam3lt_jax.jobs.status import Watcher, table

  if args.watch is not None and (args.verify or args.repair):
    raise UserError("--watch looks again and again; --verify and --repair read everything: give one of them")
  watcher = Watcher(args.directory)
  if args.repair:
    with busy("reading the shards"):
      repaired = Plan.load(args.directory).set_damaged_aside(strays=True)
    for what in repaired:
      print(f"{what}; set aside as {SHARDS}/*.damaged", file=sys.stderr)
  while True:
    with busy("reading the shards"):
      status = watcher.look(verify=args.verify)
    if args.json:
      text = json.dumps(status.to_json(), indent=None if args.watch else 1)
    else:
      text = table(status)
    if args.watch and not args.json and sys.stdout.isatty():
      text = f"\x1b[H\x1b[2J{text}"  # a clean screen
    print(text, flush=True)
    if args.watch is None or status.finished:
      return 1 if status.damaged else 0
    time.sleep(args.watch)
