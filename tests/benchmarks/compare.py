"""This library beside the PyTorch reference on this machine: seconds, memory, scaling, profile.

  python -m tests.benchmarks.compare --size s0 --json s0.json --write docs/benchmarks.md
  python -m tests.benchmarks.compare --parts vision text --dtype bfloat16 --repeats 3
  python -m tests.benchmarks.compare --load a.json b.json --write docs/benchmarks.md     # measures nothing

Tables go to stdout, progress to stderr. --json is rewritten after every row, so a run that is cut short
keeps what it had; --load puts a page together from several runs of fewer --parts.
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence

from tests.benchmarks import workload as workloads
from tests.benchmarks.timing import say

PARTS = ("memory", "start", "vision", "text", "detect", "clicks", "end_to_end", "scaling", "profile")
DTYPES = ("float32", "bfloat16")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  formatter = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(prog="compare", description=__doc__, formatter_class=formatter)
  parser.add_argument("--size", default="s0", choices=workloads.SIZES, help="the model (default s0)")
  parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES, help="default: both")
  parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="default: all")
  parser.add_argument("--repeats", type=int, default=5, help="rounds after the warm-up (default 5)")
  parser.add_argument("--json", metavar="FILE", help="write all samples there")
  parser.add_argument("--load", metavar="FILE", nargs="+", help="show these --json files; measure nothing")
  parser.add_argument("--write", metavar="PAGE", help="put the tables into this page (docs/benchmarks.md)")
  args = parser.parse_args(arguments)
  if args.repeats < 1:
    parser.error(f"--repeats must be at least 1, got {args.repeats}")
  return args


def measure(args: argparse.Namespace, command: str):
  """Everything that was asked for, as a `report.Run`."""
  # jax would otherwise take most of a GPU's memory for itself, and torch needs its share.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  from tests.benchmarks import machine, processes, report

  run = report.Run(command, args.size, args.repeats, machine.describe())

  def add(rows):
    run.rows += rows
    if args.json:
      run.save(args.json)

  with tempfile.TemporaryDirectory() as directory:
    say(f"writing a random checkpoint, {args.size}")
    workload = workloads.prepare(args.size, directory)
    if {"memory", "start"} & set(args.parts):
      for dtype in args.dtype:  # first, while this process holds no model
        add(processes.measure(workload, dtype, args.repeats, args.parts))
    if "profile" in args.parts:
      run.peaks = machine.matrix_peaks(workload.scale.peak_side, args.dtype)
    for dtype in args.dtype:
      _one_process(workload, dtype, args, run, add)
      gc.collect()
  run.complete = True
  add([])
  return run


def _one_process(workload, dtype: str, args: argparse.Namespace, run, add) -> None:
  """The parts that hold both sides in this process."""
  from tests.benchmarks import parts, sides

  chosen = [part for part in parts.PARTS if part in args.parts]
  if not chosen and "profile" not in args.parts:
    return
  loaded = sides.load(workload, dtype)
  for part in chosen:
    for row in parts.run(part, workload, loaded, dtype, args.repeats, run.rows):
      add([row])
  if "profile" in args.parts:
    from tests.benchmarks import breakdown

    ours = loaded[0]
    del loaded
    gc.collect()
    run.profile += breakdown.measure(workload, ours, dtype, args.repeats)
    add([])


def main(arguments: Sequence[str] | None = None) -> int:
  args = parse(arguments)
  given = sys.argv[1:] if arguments is None else arguments
  from tests.benchmarks import report

  try:  # mistakes are said now, not after an hour of measuring
    if args.write:
      report.around_tables(args.write)
    if args.json and not os.path.isdir(os.path.dirname(os.path.abspath(args.json))):
      raise ValueError(f"--json: there is no folder for {args.json}")
    runs = [report.Run.load(path) for path in args.load or []]
  except (ValueError, OSError) as e:
    print(f"compare: {e}", file=sys.stderr)
    return 2
  if not args.load:
    runs = [measure(args, f"python -m tests.benchmarks.compare {shlex.join(given)}".rstrip())]
  print("\n\n".join(report.markdown(run) for run in runs))
  if args.write:
    report.write_page(args.write, runs)
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
