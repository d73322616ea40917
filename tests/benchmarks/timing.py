"""Fair timing of two sides in one process, and the row that holds what came out."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

# Both runtimes keep their worker threads spinning for a moment after a call; the other side must not pay.
PAUSE = 0.05
# A short call is made twice in its turn and the second one counts: waking up, torch's threads may spin on one
# core for 10 ms before the system spreads them (measured; it is not what either side is compared for).
SHORT = 1.0
# A row stops repeating when it has taken this long, at least two rounds being measured.
ROW_SECONDS = 300.0

OURS, REFERENCE = "ours", "reference"
Variant = tuple[str, str]  # (OURS or REFERENCE, how it was called)
Samples = dict[str, list[float]]  # variant -> one number a round


@dataclasses.dataclass
class Row:
  """One thing measured on both sides.

  Attributes:
    part: section of the report. what: the thing, in words. dtype: what was computed in.
    ours, reference: variant -> samples. A side's result is its best variant's median, since a user would
      choose that one.
    unit: "s" or "MB".
    note: what a reader must know about this row.
    elsewhere: share of the machine's cores that other processes took meanwhile (0 to 1); None where unknown.
  """

  part: str
  what: str
  dtype: str
  ours: Samples
  reference: Samples
  unit: str = "s"
  note: str = ""
  elsewhere: float | None = None

  def best(self, side: str) -> tuple[str, float] | None:
    """(variant, median) of a side's best variant, None where the side was not measured."""
    samples = {k: v for k, v in (self.ours if side == OURS else self.reference).items() if v}
    if not samples:
      return None
    medians = {variant: statistics.median(values) for variant, values in samples.items()}
    variant = min(medians, key=medians.__getitem__)
    return variant, medians[variant]

  @property
  def ratio(self) -> float | None:
    """Ours by the reference's; smaller is better."""
    ours, reference = self.best(OURS), self.best(REFERENCE)
    return ours[1] / reference[1] if ours and reference and reference[1] > 0 else None

  def to_json(self) -> dict[str, Any]:
    best = {side: self.best(side) for side in (OURS, REFERENCE)}
    summary = {side: found and {"variant": found[0], "median": found[1]} for side, found in best.items()}
    return dataclasses.asdict(self) | {"best": summary, "ratio": self.ratio}

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Row:
    return cls(**{f.name: data[f.name] for f in dataclasses.fields(cls)})


def interleave(variants: Mapping[Variant, Callable[[], Any]], repeats: int) -> dict[Variant, list[float]]:
  """Seconds of each call: one warm-up each, then rounds of A B A B ...

  Every call must block until its result is there.
  """
  started = time.perf_counter()
  for call in variants.values():
    call()
  warm = time.perf_counter() - started  # compilation included, so at least a round's time
  rounds = min(repeats, max(2, math.ceil(ROW_SECONDS / max(warm, 1e-9))))
  samples: dict[Variant, list[float]] = {variant: [] for variant in variants}
  for _ in range(rounds):
    for variant, call in variants.items():
      time.sleep(PAUSE)
      seconds = _seconds(call)
      samples[variant].append(_seconds(call) if seconds < SHORT else seconds)
  return samples


class Elsewhere:
  """How much of the machine other processes use between construction and `share()`.

  On a busy machine torch loses far more than its share (its threads wait for each other by spinning), so a
  ratio measured there means little.
  """

  def __init__(self):
    self._start = self._now()

  def share(self) -> float | None:
    """0 to 1, or None where /proc/stat does not exist."""
    end = self._now()
    if self._start is None or end is None:
      return None
    busy, own, total = (b - a for a, b in zip(self._start, end))
    return max(busy - own, 0.0) / total if total > 0 else None

  @staticmethod
  def _now() -> tuple[float, float, float] | None:
    """CPU seconds of the whole machine (busy; all) and, between them, of this process with its children."""
    try:
      with open("/proc/stat", encoding="ascii") as f:
        ticks = [int(x) for x in f.readline().split()[1:9]]
    except (OSError, ValueError):
      return None
    idle = ticks[3] + ticks[4]  # waiting for a disk is idle, too
    second = os.sysconf("SC_CLK_TCK")
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return (sum(ticks) - idle) / second, own, sum(ticks) / second


def _seconds(call: Callable[[], Any]) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def measure(
  part: str,
  what: str,
  dtype: str,
  variants: Mapping[Variant, Callable[[], Any]],
  repeats: int,
  note: str = "",
) -> Row:
  """`interleave` as a `Row`; says on stderr what came out."""
  watch = Elsewhere()
  samples = interleave(variants, repeats)

  def of(side):
    return {how: values for (whose, how), values in samples.items() if whose == side}

  row = Row(part, what, dtype, of(OURS), of(REFERENCE), note=note, elsewhere=watch.share())
  parts = [f"{side} {best[1]:.3f} s ({best[0]})" for side in (OURS, REFERENCE) if (best := row.best(side))]
  say(f"{part}: {what}, {dtype}: {', '.join(parts)}")
  return row


def say(text: str) -> None:
  """Progress, on stderr: stdout is the report."""
  print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
