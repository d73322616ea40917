"""metrics.jsonl -> a picture of the run."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from sam3lt_jax.errors import needed
from sam3lt_jax.training.run_files import read_metrics

Series = dict[str, tuple[list[int], list[float]]]

_SMOOTHED_FROM = 40  # points: fewer are shown as they are
_LINES = 6  # a panel: more cannot be told apart
_OWN = {
  "learning_rate": "learning rate",
  "grad_norm": "gradient norm",
  "images_per_second": "images a second",
}
_ORDER = ("losses", "evaluation: losses", "evaluation", "training metrics")


def panels(series: Series) -> dict[str, list[str]]:
  """title -> names: losses, evaluation, other metrics of training, learning rate, gradient norm, speed.

  No panel has more than six; eval metrics that are losses are drawn apart from scores, and what goes beyond 1
  apart from shares, which would all lie on the ground beside it.
  """
  groups: dict[str, list[str]] = {}
  for name, (_, values) in series.items():
    title = _OWN.get(name, "losses" if "loss" in name.split("_") else "training metrics")
    if name.startswith("eval_"):
      title = "evaluation: losses" if "loss" in name else "evaluation"
    if title in ("evaluation", "training metrics") and max(map(abs, values)) > 1:
      title += " beyond 1"
    groups.setdefault(title, []).append(name)
  order = [f"{title}{more}" for title in _ORDER for more in ("", " beyond 1")]
  return {
    title if i == 0 else f"{title} ({i // _LINES + 1})": groups[title][i : i + _LINES]
    for title in sorted(groups, key=lambda t: (order.index(t) if t in order else len(order), t))
    for i in range(0, len(groups[title]), _LINES)
  }


def smooth(values: list[float]) -> np.ndarray:
  """A centred mean over a 20th of the values; shorter windows at both ends. float64, as long as `values`."""
  window = np.ones(2 * max(1, len(values) // 40) + 1)
  total, count = (np.convolve(x, window) for x in (values, np.ones(len(values))))
  half = len(window) // 2
  return (total / count)[half : half + len(values)]


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
  with needed("plots need", "matplotlib", "train"):
    from matplotlib.figure import Figure
  series: Series = {}
  for line in read_metrics(metrics):
    step = line.pop("step")
    for name, value in line.items():
      if name != "time":
        steps, values = series.setdefault(name, ([], []))
        steps.append(int(step))
        values.append(float(value))
  if not series:
    raise ValueError(f"{os.fspath(metrics)}: no metric in it yet")
  groups = panels(series)
  columns = min(2, len(groups))
  rows = -(-len(groups) // columns)
  figure = Figure(figsize=(6.4 * columns, 3.2 * rows), layout="constrained")
  for number, (name, lines) in enumerate(groups.items()):
    _draw(figure.add_subplot(rows, columns, number + 1), name, {line: series[line] for line in lines})
  if title:
    figure.suptitle(title)
  figure.savefig(os.fspath(output), dpi=120)


def _draw(axes: Any, title: str, lines: Series) -> None:
  for name, (steps, values) in lines.items():
    label, few = name.removeprefix("eval_"), len(values) < _SMOOTHED_FROM
    if few or label != name or name == "learning_rate":
      axes.plot(steps, values, marker="o" if few else None, markersize=3, label=label)
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
  axes.legend(fontsize=8)
