"""metrics.jsonl -> a picture of the run."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from sam3lt_jax.training.run_files import read_metrics

Series = dict[str, tuple[list[int], list[float]]]

_SMOOTHED_FROM = 40  # points: fewer are shown as they are
_LINES = 6  # a panel: more cannot be told apart


def read_series(path: str | os.PathLike[str]) -> Series:
  """name -> (steps, values) of every metric in a metrics.jsonl, in the order of the steps.

  Raises:
    ValueError: no such file, no JSON lines, or no metric in it.
  """
  series: Series = {}
  for line in read_metrics(path):
    for name, value in line.items():
      if name not in ("step", "time"):
        steps, values = series.setdefault(name, ([], []))
        steps.append(int(line["step"]))
        values.append(float(value))
  if not series:
    raise ValueError(f"{os.fspath(path)}: no metric in it yet")
  return series


def panels(series: Series) -> dict[str, list[str]]:
  """title -> names: losses, evaluation, other metrics of training, learning rate, gradient norm, speed.

  No panel has more than six; eval metrics that are losses are drawn apart from scores, and what goes beyond 1
  apart from shares, which would all lie on the ground beside it.
  """
  groups: dict[str, list[str]] = {}
  for name, (_, values) in series.items():
    is_loss = name == "loss" or name.endswith("_loss") or name.startswith("loss_")
    if name.startswith("eval_"):
      title = "evaluation: losses" if "loss" in name else "evaluation"
    elif name in ("learning_rate", "grad_norm", "images_per_second"):
      title = {"learning_rate": "learning rate", "grad_norm": "gradient norm"}.get(name, "images a second")
    else:
      title = "losses" if is_loss else "training metrics"
    if title in ("evaluation", "training metrics") and max(map(abs, values)) > 1:
      title += " beyond 1"
    groups.setdefault(title, []).append(name)
  split: dict[str, list[str]] = {}
  order = [
    "losses", "evaluation: losses", "evaluation", "evaluation beyond 1", "training metrics",
    "training metrics beyond 1",
  ]  # fmt: skip
  for title in sorted(groups, key=lambda t: (order.index(t) if t in order else len(order), t)):
    found = groups[title]
    for i in range(0, len(found), _LINES):
      split[title if i == 0 else f"{title} ({i // _LINES + 1})"] = found[i : i + _LINES]
  return split


def smooth(values: list[float]) -> np.ndarray:
  """A centred mean over a 20th of the values; shorter windows at both ends. float64, as long as `values`."""
  x, half = np.asarray(values, np.float64), max(1, len(values) // 40)
  total = np.concatenate([[0.0], np.cumsum(x)])
  low = np.maximum(np.arange(len(x)) - half, 0)
  high = np.minimum(np.arange(len(x)) + half + 1, len(x))
  return (total[high] - total[low]) / (high - low)


def plot_run(metrics: str | os.PathLike[str], output: str | os.PathLike[str], title: str = "") -> None:
  """Draws every metric of a run against its steps, a few panels in one picture.

  Args:
    metrics: the metrics.jsonl of a run.
    output: written; its suffix (.png, .svg, .pdf) names the format.
    title: above the picture.

  Raises:
    ValueError: the file is missing or empty, or the suffix is of no format.
    ImportError: matplotlib is not installed.
  """
  series = read_series(metrics)
  Figure = _figure_class()
  groups = panels(series)
  columns = min(2, len(groups))
  rows = -(-len(groups) // columns)
  figure = Figure(figsize=(6.4 * columns, 3.2 * rows), layout="constrained")
  for number, (name, lines) in enumerate(groups.items()):
    _draw(figure.add_subplot(rows, columns, number + 1), name, {line: series[line] for line in lines})
  if title:
    figure.suptitle(title)
  kinds = figure.canvas.get_supported_filetypes()
  suffix = os.path.splitext(os.fspath(output))[1][1:].lower()
  if suffix not in kinds:
    raise ValueError(f"output={os.fspath(output)!r}; accepted: a name ending in {', '.join(sorted(kinds))}")
  figure.savefig(os.fspath(output), dpi=120)


def _draw(axes: Any, title: str, lines: Series) -> None:
  for name, (steps, values) in lines.items():
    label = name.removeprefix("eval_")
    if len(values) < _SMOOTHED_FROM or name.startswith("eval_") or name == "learning_rate":
      axes.plot(
        steps, values, marker="o" if len(values) < _SMOOTHED_FROM else None, markersize=3, label=label
      )
    else:
      (line,) = axes.plot(steps, smooth(values), label=label)
      axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.7)
  everything = np.concatenate([values for _, values in lines.values()])
  finite = everything[np.isfinite(everything)]
  if "loss" in title or title == "gradient norm":
    if finite.size and finite.min() > 0 and finite.max() > 20 * finite.min():
      axes.set_yscale("log")
  axes.set_title(title, fontsize=10)
  axes.set_xlabel("step", fontsize=9)
  axes.tick_params(labelsize=8)
  axes.grid(alpha=0.3)
  if len(lines) > 1:
    axes.legend(fontsize=8)
  else:
    axes.set_ylabel(next(iter(lines)).removeprefix("eval_").replace("_", " "), fontsize=9)


def _figure_class() -> Any:
  try:
    from matplotlib.figure import Figure
  except ImportError as e:
    raise ImportError("plots need matplotlib: pip install 'sam3lt_jax[train]'") from e
  return Figure
