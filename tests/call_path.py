"""How much of the library a call walks through: files and functions, counted while it runs.

    python -m tests.call_path            # the table of docs/architecture.md
    python -m tests.call_path --list     # and which they are

Counted are Python functions of `sam3lt_jax` that are entered at least once, in any thread, importing left
aside (a module's own body, and what it calls).
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

LIBRARY = str(pathlib.Path(__file__).parents[1] / "sam3lt_jax") + os.sep
PHRASE = "shape"


def walked(call: Callable[[], object]) -> set[tuple[str, str]]:
  """(file, function) of the library that `call` enters."""
  seen: set[tuple[str, str]] = set()
  importing = threading.local()

  def watch(frame, event, _):
    code = frame.f_code
    if not code.co_filename.startswith(LIBRARY):
      return
    depth = getattr(importing, "depth", 0)
    if code.co_name == "<module>":
      importing.depth = depth + {"call": 1, "return": -1}.get(event, 0)
    elif event == "call" and not depth:
      # A class body, a lambda and a comprehension belong to the function that they stand in.
      name = code.co_qualname.split(".<locals>")[0]
      if "<" not in name:
        seen.add((code.co_filename.removeprefix(LIBRARY), name))

  threading.setprofile(watch)
  sys.setprofile(watch)
  try:
    call()
  finally:
    sys.setprofile(None)
    threading.setprofile(None)
  return seen


def calls(folder: str) -> Iterator[tuple[str, Callable[[], object]]]:
  """What is measured, on the bundled model."""
  from sam3lt_jax import Predictor

  rng = np.random.default_rng(0)
  for i in range(4):
    Image.fromarray(rng.integers(0, 256, (60, 80, 3)).astype(np.uint8)).save(f"{folder}/{i}.png")

  loaded = Predictor.from_pretrained("shapes", compile_ahead=False)

  def photo():
    loaded(f"{folder}/0.png", text=PHRASE)

  def job():
    from sam3lt_jax.jobs.run import JobConfig, run_job

    run_job(JobConfig(folder, f"{folder}/out", phrases=[PHRASE], model="shapes"))

  yield "the first photo of a loaded model, which traces it", photo
  yield "another photo", photo
  yield "a batch job of four images, from its configuration to its summary", job


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--list", action="store_true", help="name the functions, file by file")
  args = parser.parse_args()
  print("| call | files | functions |\n| --- | ---: | ---: |")
  with tempfile.TemporaryDirectory() as folder:
    for what, call in calls(folder):
      found = walked(call)
      print(f"| {what} | {len({file for file, _ in found})} | {len(found)} |", flush=True)
      if args.list:
        for file, function in sorted(found):
          print(f"  {file:<36} {function}")


if __name__ == "__main__":
  main()
