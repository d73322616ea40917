"""What "equal to the reference" means, stage by stage: one table, and the comparison that reads it.

Stages go by the names of `Sam3LiteTextOutput` and its intermediates, on both sides.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

# Largest absolute difference in float32 at highest matmul precision, outputs being of order 1 to 15. Stage
# pattern -> tolerance; the first pattern that fits counts. Loosening one needs a measured, written cause.
TOLERANCES: dict[str, float] = {
  # What users see.
  "pred_logits": 1e-4,
  "presence_logits": 1e-4,
  "pred_boxes*": 1e-5,
  "pred_masks": 5e-4,
  "semantic_seg": 5e-4,
  # On the way there.
  "position_code": 1e-6,  # no weights: sines of the grid
  # Tight, because the references' LayerNorm epsilons (1e-5 and 1e-6) are only 8e-5 apart here and less later.
  "vit_block_*": 3e-5,
  "neck_*": 1e-4,
  "text_embeddings": 1e-6,  # one lookup and one sum; a resampled position table costs its rounding
  "text_block_*": 1e-4,
  "text_features": 1e-4,
  "prompt_tokens": 1e-4,
  "geometry_tokens": 1e-4,
  "encoder_output": 1e-4,
  "decoder_hidden_states": 1e-4,
  "decoder_boxes": 1e-5,
  "decoder_input_boxes": 1e-5,
  "decoder_logits": 1e-4,
  "decoder_presence_logits": 1e-4,
  "pixel_embed": 1e-4,
  "*mask": 0.0,  # booleans
}

OUTPUTS = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")


class Row(NamedTuple):
  """One stage of a comparison.

  Attributes:
    stage: its name.
    difference: largest absolute difference; NaN where either side holds one.
    low, high: range of the reference's values.
    tolerance: what `TOLERANCES` allows.
  """

  stage: str
  difference: float
  low: float
  high: float
  tolerance: float

  @property
  def passed(self) -> bool:
    return self.difference <= self.tolerance  # False for NaN


def pattern(stage: str) -> str:
  """The pattern of `TOLERANCES` that judges a stage.

  Raises KeyError for a name that none fits: a stage must not pass unjudged.
  """
  for candidate in TOLERANCES:
    if fnmatch.fnmatchcase(stage, candidate):
      return candidate
  raise KeyError(f"no tolerance for the stage {stage!r}; known: {', '.join(TOLERANCES)}")


def tolerance(stage: str) -> float:
  """The tolerance of a stage; errors as in `pattern`."""
  return TOLERANCES[pattern(stage)]


def flat(output: Any) -> dict[str, np.ndarray]:
  """A `Sam3LiteTextOutput`, its intermediates included, as {stage: numpy array}."""
  stages = {name: np.asarray(value) for name, value in (output.intermediates or {}).items()}
  return stages | {name: np.asarray(getattr(output, name)) for name in OUTPUTS}


def without_padding(stages: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """`stages` with prompt tokens in padding slots set to zero: nothing reads them, the references differ."""
  stages = dict(stages)
  if "prompt_tokens" in stages and "prompt_mask" in stages:
    valid = np.asarray(stages["prompt_mask"], bool)[..., None]
    stages["prompt_tokens"] = np.where(valid, stages["prompt_tokens"], 0.0)
  return stages


def compare(expected: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray]) -> list[Row]:
  """Compares every stage of `expected`; `got` may hold more.

  Raises:
    AssertionError: a stage that `got` lacks or has in another shape; lists all of them.
  """
  problems = []
  for stage, want in expected.items():
    if stage not in got:
      problems.append(f"{stage}: not produced")
    elif np.shape(got[stage]) != np.shape(want):
      problems.append(f"{stage}: shape {np.shape(got[stage])}, the reference's is {np.shape(want)}")
  if problems:
    raise AssertionError("stages cannot be compared:\n  " + "\n  ".join(problems))
  return [_row(stage, np.asarray(want), np.asarray(got[stage])) for stage, want in expected.items()]


def _row(stage: str, want: np.ndarray, got: np.ndarray) -> Row:
  want, got = want.astype(np.float64), got.astype(np.float64)
  if not want.size:
    return Row(stage, 0.0, 0.0, 0.0, tolerance(stage))
  return Row(stage, float(np.abs(want - got).max()), float(want.min()), float(want.max()), tolerance(stage))


def worst(rows: Iterable[Row]) -> list[Row]:
  """One row a stage out of those of many cases: the largest difference, the widest range."""
  merged: dict[str, Row] = {}
  for row in rows:
    old = merged.get(row.stage, row)
    # max() would let a NaN through or not, depending on the order.
    difference = float(np.maximum(old.difference, row.difference))
    merged[row.stage] = row._replace(
      difference=difference, low=min(old.low, row.low), high=max(old.high, row.high)
    )
  return list(merged.values())


def assert_close(rows: Iterable[Row], what: str = "") -> None:
  """Fails with every stage over its tolerance. `what` names the case in the message."""
  failed = [row for row in rows if not row.passed]
  if failed:
    lines = [
      f"  {r.stage}: {r.difference:.2e} > {r.tolerance:.0e} (range {r.low:.3g} to {r.high:.3g})"
      for r in failed
    ]
    raise AssertionError(f"{what or 'parity'}: {len(failed)} stages over tolerance\n" + "\n".join(lines))
