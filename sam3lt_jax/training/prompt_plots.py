"""A prompt report as one picture."""

from __future__ import annotations

import math
import os
import warnings
from typing import TYPE_CHECKING, Any

from sam3lt_jax.training.prompt_report import SHORT, PromptReport

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#2a6f97", "#d1603d", "#b8bec4"
_WORDS = 15


def save_plots(report: PromptReport, path: str | os.PathLike) -> None:
  """Writes a PNG: lengths, context use, vocabulary coverage, frequent words and, with a model, dimensions.

  Raises:
    ImportError: matplotlib is not installed.
    OSError: the file cannot be written.
  """
  try:
    from matplotlib.figure import Figure
  except ImportError as e:
    raise ImportError("plots need matplotlib: pip install 'sam3lt_jax[train]'") from e

  columns = 3 if report.dimensions else 2
  figure = Figure(figsize=(5.2 * columns, 8.4), dpi=110, layout="constrained")
  figure.suptitle(f"{report.phrases:,} distinct phrases, tokens of the profile {report.profile!r}")
  axes = figure.subplots(2, columns).ravel().tolist()
  panels = [_lengths, _contexts, _coverage, _words]
  if report.dimensions:
    panels = [_lengths, _contexts, _variance, _coverage, _words, _dimensions]
  for panel, ax in zip(panels, axes):
    panel(ax, report)
    ax.spines[["top", "right"]].set_visible(False)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing")  # words of scripts that the font lacks
    figure.savefig(os.fspath(path), format="png")


def _percent(ax: Axes, axis: str = "y") -> None:
  from matplotlib.ticker import PercentFormatter

  getattr(ax, f"{axis}axis").set_major_formatter(PercentFormatter(1.0, decimals=0))


def _lengths(ax: Axes, report: PromptReport) -> None:
  from matplotlib.ticker import MaxNLocator

  histogram = report.lengths.histogram
  shares = [n / report.phrases for n in histogram]
  colours = [_BLUE if n <= SHORT else _ORANGE for n in range(len(shares))]
  ax.bar(range(len(shares)), shares, color=colours, width=0.85)
  ax.axvline(report.lengths.mean, color="black", linestyle="--", linewidth=1)
  ax.annotate(
    f"mean {report.lengths.mean:.1f}", (report.lengths.mean, 1), (4, -4), xycoords=("data", "axes fraction"),
    textcoords="offset points", va="top",
  )  # fmt: skip
  ax.set_ylim(0, 1.12 * max(shares))
  ax.set_xlim(report.lengths.minimum - 1, max(report.lengths.maximum, SHORT) + 1)
  ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  ax.set_title(f"Length: {report.lengths.share_at_most_10:.1%} have at most {SHORT} tokens")
  ax.set_xlabel("tokens a phrase, start and end included")
  ax.set_ylabel("share of phrases")
  _percent(ax)


def _contexts(ax: Axes, report: PromptReport) -> None:
  rows = report.contexts
  places = range(len(rows))
  ax.bar(places, [c.filled for c in rows], color=_BLUE, width=0.6, label="tokens")
  ax.bar(
    places, [1 - c.filled for c in rows], bottom=[c.filled for c in rows], color=_GREY, width=0.6,
    label="padding",
  )  # fmt: skip
  for x, c in zip(places, rows):
    # White on the bar where there is room, else black above it.
    inside = c.filled > 0.08
    ax.text(
      x, c.filled / 2 if inside else c.filled + 0.01, f"{c.filled:.0%}", ha="center",
      va="center" if inside else "bottom", color="white" if inside else "black",
    )  # fmt: skip
  ax.set_xticks(list(places), [f"{c.context}\n{c.truncated_share:.1%} cut" for c in rows])
  ax.set_ylim(0, 1.18)
  ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
  ax.set_title("Use of the context window")
  ax.set_xlabel("context, in tokens, and share of phrases cut by it")
  ax.set_ylabel("mean share of the window")
  ax.legend(loc="upper center", ncols=2, frameon=False)
  _percent(ax)


def _coverage(ax: Axes, report: PromptReport) -> None:
  from matplotlib.ticker import FuncFormatter

  v = report.vocabulary
  ax.plot([n for n, _ in v.curve], [s for _, s in v.curve], color=_BLUE, linewidth=2)
  ax.axvline(v.size, color=_GREY, linestyle="--", linewidth=1)
  ax.annotate(
    f"vocabulary: {v.size:,}", (v.size, 0.03), (-4, 0), textcoords="offset points", rotation=90, ha="right",
    va="bottom",
  )  # fmt: skip
  n = v.ids_for["0.95"]
  ax.plot([n], [0.95], "o", color=_ORANGE)
  ax.annotate(f"95%: {n:,} ids", (n, 0.95), (8, -14), textcoords="offset points", color=_ORANGE)
  ax.set_xscale("log")
  ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
  ax.set_xlim(0.9, 1.3 * v.size)
  ax.set_ylim(0, 1.05)
  ax.set_title(f"Vocabulary: {v.used:,} of {v.size:,} ids used ({v.used / v.size:.1%})")
  ax.set_xlabel("ids, the most frequent first")
  ax.set_ylabel("share of tokens they make up")
  _percent(ax)


def _words(ax: Axes, report: PromptReport) -> None:
  top: list[list[Any]] = report.vocabulary.frequent_words[:_WORDS][::-1]
  names = [w if len(w) <= 18 else w[:17] + "…" for w, _ in top]
  bars = ax.barh(range(len(top)), [n for _, n in top], color=_BLUE)
  ax.bar_label(bars, labels=[f"{n:,}" for _, n in top], padding=3, fontsize=8)
  ax.set_yticks(range(len(top)), names, parse_math=False)
  ax.set_xlim(0, 1.15 * max((n for _, n in top), default=1))
  ax.set_title(f"Most frequent of {report.vocabulary.distinct_words:,} words")
  ax.set_xlabel("times met")


def _variance(ax: Axes, report: PromptReport) -> None:
  from matplotlib.ticker import MaxNLocator

  for (name, d), colour in zip(report.dimensions.items(), (_BLUE, _ORANGE)):
    ax.plot(range(1, len(d.variance) + 1), d.variance, color=colour, linewidth=2, label=f"{name} ({d.width})")
    ax.plot([d.pca_95], [d.variance[d.pca_95 - 1]], "o", color=colour)
  ax.axhline(0.95, color=_GREY, linestyle="--", linewidth=1)
  ax.set_ylim(0, 1.05)
  ax.set_xlim(left=0)
  ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  ax.set_title(f"Principal axes ({report.model})")
  ax.set_xlabel("axes, the largest first; dots: 95% of the variance")
  ax.set_ylabel("share of the variance they hold")
  ax.legend(loc="lower right", frameon=False, title="vectors (their width)")
  _percent(ax)


def _dimensions(ax: Axes, report: PromptReport) -> None:
  measures = (
    ("TwoNN", "two_nn"),
    ("participation\nratio", "participation_ratio"),
    ("axes for\n95%", "pca_95"),
  )
  for k, ((name, d), colour) in enumerate(zip(report.dimensions.items(), (_BLUE, _ORANGE))):
    places = [x + 0.4 * (k - 0.5) for x in range(len(measures))]
    values = [getattr(d, field) for _, field in measures]
    heights = [v if math.isfinite(v) else 0 for v in values]
    bars = ax.bar(places, heights, width=0.38, color=colour, label=name)
    ax.bar_label(bars, labels=[f"{v:.3g}" for v in values], padding=2, fontsize=8)
  ax.set_xticks(range(len(measures)), [label for label, _ in measures])
  ax.set_ylim(0, 1.2 * ax.get_ylim()[1])
  ax.set_title("Intrinsic dimension")
  ax.set_ylabel("dimensions")
  ax.legend(loc="upper center", ncols=2, frameon=False)
