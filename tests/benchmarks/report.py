"""A run as data, as markdown, and as the page docs/benchmarks.md."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.breakdown import Share
from tests.benchmarks.timing import OURS, REFERENCE, Row

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PAGE = f"""# Speed and memory

Measured with `python -m tests.benchmarks.compare` from a checkout: the PyTorch reference (transformers,
eager, with the attention it chooses by itself; on a GPU also through `torch.compile`) and this library in one
invocation, in turn (A B A B ...), after a warm-up call of each. Both load one checkpoint of random weights
and get the same photos and phrases; time does not depend on what the weights have learned. Figures are
medians. A side that can do a thing in two ways (phrases together or one by one) gets the faster one, and the
table says which. Ratio = this library by the reference: below 1, this library is faster or smaller. A row
with a `*` was measured while other programs took more than a tenth of the machine.

- Peak memory and time to first result come from processes that hold one side alone. "Anonymous" memory leaves
  out the mapped checkpoint file, which the system may drop at any time.
- The profile times each part of this library alone on the inputs it gets inside the model. FLOPs count matrix
  products and convolutions; the share is of the fastest product that torch or jax reached on that machine.
- "Beside keras-hub" comes from `python -m tests.benchmarks.beside_keras_hub`: keras-hub's SAM 3 on its JAX
  backend, in an environment of its own, in turn with this library; its column is "reference" there.
- "Text encoder": this library leaves out padding that no token of a phrase depends on, as `Predictor` does;
  the row "every token" computes it. Profiles in which tokens attend to padding (`original`) gain nothing.
- Where torchvision's operators do not load (see each run's heading), the reference pools boxes by a slow
  stand-in in Python: its times with boxes say nothing there.
- Ratios belong to a machine: how fast torch's and jax's own matrix products are there stands above the
  profile.
- The command's GPU path has not been run: there was no GPU at hand.

{BEGIN}

{END}
"""
CROWDED = 0.1  # share of the cores that others took
_TITLES = {
  "vision": "Vision encoder",
  "text": "Text encoder",
  "detect": "Detection",
  "clicks": "Clicks on an encoded image",
  "end_to_end": "End to end",
  "start": "Start",
  "memory": "Memory",
  "keras_hub": "Beside keras-hub",
}


@dataclasses.dataclass
class Run:
  """One invocation. `peaks`: dtype -> how -> GFLOP/s of a square matrix product."""

  command: str
  size: str
  repeats: int
  machine: dict[str, Any]
  rows: list[Row] = dataclasses.field(default_factory=list)
  profile: list[Share] = dataclasses.field(default_factory=list)
  peaks: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  complete: bool = False

  def to_json(self) -> dict[str, Any]:
    data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return data | {
      "rows": [row.to_json() for row in self.rows],
      "profile": [share.to_json() for share in self.profile],
    }

  def save(self, path: str | os.PathLike) -> None:
    """Replaces the file in one step: a run that is cut short leaves what it had."""
    partial = f"{os.fspath(path)}.part"
    with open(partial, "w", encoding="utf-8") as f:
      json.dump(self.to_json(), f, indent=1)
      f.write("\n")
    os.replace(partial, path)

  @classmethod
  def load(cls, path: str | os.PathLike) -> Run:
    """Raises ValueError for a file that no run wrote."""
    try:
      data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
      rows = [Row.from_json(row) for row in data["rows"]]
      profile = [Share(**share) for share in data["profile"]]
      return cls(**(data | {"rows": rows, "profile": profile}))
    except (KeyError, TypeError, json.JSONDecodeError) as e:
      raise ValueError(f"{path} is not a file that --json wrote: {e}") from e


def markdown(run: Run) -> str:
  """All tables of a run."""
  sections = [_heading(run)]
  comparison = [row for row in run.rows if not row.part.startswith("scaling: ")]
  if comparison:
    sections.append(_comparison(comparison))
  for name in dict.fromkeys(row.part for row in run.rows if row.part.startswith("scaling: ")):
    sections.append(_scaling(name.removeprefix("scaling: "), [row for row in run.rows if row.part == name]))
  if run.profile:
    sections.append(_profile(run))
  notes = [f"- {row.what}, {row.dtype}: {row.note}." for row in run.rows if row.note]
  if notes:
    sections.append("\n".join(["Notes:", "", *notes]))
  return "\n\n".join(sections)


def _heading(run: Run) -> str:
  m = run.machine
  units = f" ({', '.join(m['cpu_features'])})" if m["cpu_features"] else ""
  memory = f", {m['memory_gb']:.0f} GB" if m["memory_gb"] else ""
  versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
  load = "" if m["load_average"] is None else f" Load average before the start: {m['load_average']:.1f}."
  lines = [
    f"## {run.size} on {m['cores']} cores of {m['cpu']}, {m['jax_backend']} backend",
    "",
    f"{m['date']}. {m['cpu']}{units}, {m['cores']} cores{memory}; jax on {m['jax_device']}, torch on"
    f" {m['torch_device']}. Python {m['python']}, {versions}. torchvision's operators:"
    f" {m['torchvision_operators']}.{load} At most {run.repeats} rounds. Command: `{run.command}`.",
  ]
  if not run.complete:
    lines += ["", "**This run was cut short; what follows is what it had measured.**"]
  return "\n".join(lines)


def _comparison(rows: Sequence[Row]) -> str:
  lines = [
    "| part | what | dtype | ours | reference | ratio | ours: how | reference: how | rounds |",
    "| --- | --- | --- | ---: | ---: | ---: | --- | --- | ---: |",
  ]
  for row in rows:
    ours, reference = row.best(OURS), row.best(REFERENCE)
    rounds = max((len(v) for v in [*row.ours.values(), *row.reference.values()]), default=0)
    cells = [
      _TITLES.get(row.part, row.part), row.what, row.dtype,
      _value(ours, row.unit), _value(reference, row.unit), _ratio(row),
      ours[0] if ours else "", reference[0] if reference else "", str(rounds),
    ]  # fmt: skip
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


def _scaling(name: str, rows: Sequence[Row]) -> str:
  dtypes = list(dict.fromkeys(row.dtype for row in rows))
  found = {(row.what, row.dtype): row for row in rows}
  head = " | ".join(f"ours, {d} | reference, {d} | ratio, {d}" for d in dtypes)
  lines = [f"### Scaling: {name}", "", f"| | {head} |", "| ---: |" + " ---: |" * (3 * len(dtypes))]
  for what in dict.fromkeys(row.what for row in rows):
    cells = []
    for dtype in dtypes:
      row = found.get((what, dtype))
      if row is None:
        cells += ["", "", ""]
      else:
        cells += [_value(row.best(OURS), row.unit), _value(row.best(REFERENCE), row.unit), _ratio(row)]
    lines.append(f"| {what} | {' | '.join(cells)} |")
  return "\n".join(lines)


def _profile(run: Run) -> str:
  peaks = "Matrix peak, GFLOP/s (square product):"
  for dtype, found in run.peaks.items():
    peaks += f" {dtype} " + ", ".join(f"{how} {gflops:.0f}" for how, gflops in found.items()) + "."
  sections = ["### Profile of this library: one image, one phrase", "", peaks]
  for dtype in dict.fromkeys(share.dtype for share in run.profile):
    shares = [share for share in run.profile if share.dtype == dtype]
    peak = max(run.peaks[dtype].values())
    whole = shares[-1].seconds
    sections += [
      "",
      f"| part, {dtype} | s | of the whole | GFLOP | GFLOP/s | of the peak |",
      "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for share in shares:
      cells = [share.part, _seconds(share.seconds), f"{100 * share.seconds / whole:.1f}%"]
      if share.gflop and share.seconds > 0:
        rate = share.gflop / share.seconds
        cells += [f"{share.gflop:.4g}", f"{rate:.4g}", f"{100 * rate / peak:.0f}%"]
      else:
        cells += ["", "", ""]
      sections.append(f"| {' | '.join(cells)} |")
  return "\n".join(sections)


def _value(best: tuple[str, float] | None, unit: str) -> str:
  if best is None:
    return ""
  return _seconds(best[1]) if unit == "s" else f"{best[1]:.0f} {unit}"


def _seconds(value: float) -> str:
  return f"{value:.2f} s" if abs(value) >= 1 else f"{1000 * value:.3g} ms"


def _ratio(row: Row) -> str:
  if row.ratio is None:
    return ""
  return f"{row.ratio:.2f}" + ("*" if (row.elsewhere or 0.0) > CROWDED else "")


def around_tables(path: str | os.PathLike) -> tuple[str, str]:
  """What stands before and after the tables of a page; of a page that does not exist, what it will say.

  Raises ValueError for a page without the markers.
  """
  page = pathlib.Path(path)
  text = page.read_text(encoding="utf-8") if page.exists() else PAGE
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise ValueError(f"{page} has no {BEGIN} ... {END}")
  return before, after


def write_page(path: str | os.PathLike, runs: Sequence[Run]) -> None:
  """Puts the runs between the page's markers. Raises as `around_tables`."""
  before, after = around_tables(path)
  page = pathlib.Path(path)
  body = "\n\n".join(markdown(run) for run in runs)
  page.parent.mkdir(parents=True, exist_ok=True)
  page.write_text(f"{before}{BEGIN}\n\n{body}\n\n{END}{after}", encoding="utf-8")
