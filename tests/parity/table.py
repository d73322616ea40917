"""Measures every parity comparison and prints it as markdown: `python -m tests.parity.table [--write]`.

--write puts the tables into docs/parity.md, between its two markers; the rest of that page is left as it is.
The live comparisons are those of test_transformers.py, the recorded ones those of test_original.py.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Iterable

import jax

from sam3lt_jax.checkpoints import from_pretrained
from tests.checkpoints.common import save_pt
from tests.parity import fixtures, test_transformers, tolerances
from tests.parity.tolerances import TOLERANCES, Row
from tests.reference import random_torch_model, run_stages, save_torch, tiny_config

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "parity.md"
COMMAND = "python -m tests.parity.table --write"
TEXT_NAMES = {"s0": "S0-like", "s1": "S1-like", "l": "L-like", "sam3": "SAM 3 (teacher)"}


def original_detector() -> list[Row]:
  """Every stage of the recorded detector, over all its cases."""
  with tempfile.TemporaryDirectory() as directory:
    path = save_pt(fixtures.detector_state_dict(), os.path.join(directory, "detector.pt"))
    model, variables = from_pretrained(path, config=fixtures.detector_config(), profile="original")
  results = fixtures.run_detector(model, variables)
  rows: list[Row] = []
  for case in fixtures.DETECTOR_CASES:
    want, parts = fixtures.expected(case)
    rows += tolerances.compare(want, fixtures.select(results[case], parts))
  stages = fixtures.image_taps(results["text_only"])
  want, parts = fixtures.expected_image_taps(model.config.vision.num_hidden_layers - 1)
  rows += tolerances.compare(want, fixtures.select(stages, parts))
  return rows + tolerances.compare(*fixtures.padded_windows(model, variables))


def original_text() -> dict[str, list[Row]]:
  """Text encoder -> every stage of its recorded runs."""
  rows: dict[str, list[Row]] = {}
  for case in fixtures.text_cases():
    pair = fixtures.text_pair(case, *fixtures.text_model(case))
    rows.setdefault(TEXT_NAMES[case.variant], []).extend(tolerances.compare(*pair))
  return rows


def transformers_live() -> dict[str, list[Row]]:
  """Model and size -> every stage, without and with boxes."""
  rows: dict[str, list[Row]] = {}
  for variant, size, tokens in test_transformers.SIZES:
    reference = random_torch_model(tiny_config(variant, image_size=size), seed=size)
    with tempfile.TemporaryDirectory() as directory:
      model, variables = from_pretrained(save_torch(reference, directory))
    apply = jax.jit(functools.partial(model.apply, output_intermediates=True))
    grid, window = size // model.config.vision.patch_size, model.config.vision.window_size
    name = f"{TEXT_NAMES[variant]}, grid {grid}" + ("" if grid % window == 0 else ", padded windows")
    rows[name] = []
    for boxes in (None, "one", "several"):
      inputs = test_transformers._inputs(size, tokens, boxes)
      want = test_transformers._align_geometry(run_stages(reference, inputs), tokens)
      got = test_transformers._align_geometry(tolerances.flat(apply(variables, **inputs)), tokens)
      rows[name] += tolerances.compare(want, got)
  return rows


def grouped(rows: Iterable[Row]) -> dict[str, Row]:
  """The worst row of each pattern of `TOLERANCES`, in that order; booleans (which must be equal) left out."""
  found: dict[str, Row] = {}
  for pattern, allowed in TOLERANCES.items():
    of_pattern = [row._replace(stage=pattern) for row in rows if tolerances.pattern(row.stage) == pattern]
    if of_pattern and allowed > 0:
      found[pattern] = tolerances.worst(of_pattern)[0]
  return found


def table(columns: dict[str, list[Row]]) -> str:
  """Markdown: a line a stage, a column a comparison, then the values' range over all and the tolerance."""
  tables = {name: grouped(rows) for name, rows in columns.items()}
  lines = [
    "| stage | " + " | ".join(tables) + " | range | tolerance |",
    "| --- |" + " ---: |" * (len(tables) + 2),
  ]
  for pattern, allowed in TOLERANCES.items():
    rows = [t[pattern] for t in tables.values() if pattern in t]
    if rows:
      cells = [_cell(t.get(pattern)) for t in tables.values()]
      span = f"{min(r.low for r in rows):.3g} to {max(r.high for r in rows):.3g}"
      lines.append(f"| `{pattern}` | {' | '.join(cells)} | {span} | {allowed:.0e} |")
  return "\n".join(lines)


def _cell(row: Row | None) -> str:
  if row is None:
    return ""
  value = f"{row.difference:.1e}" if row.difference else "0"
  return value if row.passed else f"**{value}**"


def environment() -> str:
  """Date, machine and versions."""
  packages = ("jax", "flax", "numpy", "torch", "transformers")
  versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
  return (
    f"Measured {datetime.date.today()} on {_cpu()}, {os.cpu_count()} cores, {jax.default_backend()} backend;"
    f" Python {platform.python_version()}, {versions}."
  )


def _cpu() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


def measure() -> tuple[str, bool]:
  """(the tables as markdown, whether every stage is within its tolerance)."""
  detector, text, live = original_detector(), original_text(), transformers_live()
  sections = [
    f"### The original, detector ({len(fixtures.DETECTOR_CASES)} recorded cases, a grid of 12 and one of 10)",
    table({"difference": detector}),
    f"### The original, text encoders ({len(fixtures.text_cases())} recorded runs of seven phrases)",
    table(text),
    "### transformers, live (two images and phrases; no box, one box, several with a negative and padding)",
    table(live),
  ]
  passed = all(row.passed for rows in (detector, *text.values(), *live.values()) for row in rows)
  return "\n\n".join(sections), passed


def write_section(name: str, text: str, command: str) -> None:
  """Puts `text` into docs/parity.md, between `<!-- name: begin -->` and `<!-- name: end -->`.

  Args:
    name: of the section's markers.
    text: markdown.
    command: what made it; named in a line before `text`, with the date, the machine and the versions.
  """
  page = PAGE.read_text(encoding="utf-8")
  start, stop = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
  before, begin, rest = page.partition(start)
  _, end, after = rest.partition(stop)
  if not begin or not end:
    raise SystemExit(f"docs/parity.md has no {start} ... {stop}")
  new = f"{before}{start}\n\n{environment()} Command: `{command}`.\n\n{text}\n\n{stop}{after}"
  PAGE.write_text(new, encoding="utf-8")


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--write", action="store_true", help="put the tables into docs/parity.md")
  write = parser.parse_args().write
  jax.config.update("jax_default_matmul_precision", "highest")  # as the tests do; matters off the CPU
  text, passed = measure()
  print(f"{environment()}\n\n{text}")
  if not passed:
    print("stages over their tolerance are in bold", file=sys.stderr)
  if write:
    write_section("measured", text, COMMAND)
  return 0 if passed else 1


if __name__ == "__main__":
  raise SystemExit(main())
