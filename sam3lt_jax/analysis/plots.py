"""A prompt report as one picture."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from sam3lt_jax.analysis.prompts import SHORT
from sam3lt_jax.errors import needed

if TYPE_CHECKING:
  from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREY = "#2a6f97", "#d1603d", "#b8bec4"
Report = dict[str, Any]


def save_plots(report: Report, path: str | os.PathLike) -> None:
  """Writes a PNG: lengths, context use, vocabulary coverage, frequent words and, with a model, dimensions.

  Raises:
    ImportError: matplotlib is not installed.
    OSError: the file cannot be written.
  """
  with needed("plots need", "matplotlib", "train"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

  panels = [_lengths, _contexts, _coverage, _words]
  if report["dimensions"]:
    panels = [_lengths, _contexts, _variance, _coverage, _words, _dimensions]
  columns = len(panels) // 2
  figure = Figure(figsize=(5.2 * columns, 8.4), dpi=110, layout="constrained")
  figure.suptitle(f"{report['phrases']:,} distinct phrases, tokens of the profile {report['profile']!r}")
  for panel, ax in zip(panels, figure.subplots(2, columns).ravel()):
    panel(ax, report)
    ax.spines[["top", "right"]].set_visible(False)
    if panel in (_lengths, _contexts, _coverage, _variance):  # shares
      ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if panel in (_lengths, _variance):
      ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph .* missing")  # words of scripts that the font lacks
    figure.savefig(os.fspath(path), format="png")


def _lengths(ax: Axes, report: Report) -> None:
  lengths = report["lengths"]
  shares = [n / report["phrases"] for n in lengths["histogram"]]
  ax.bar(range(len(shares)), shares, color=[_BLUE if n <= SHORT else _ORANGE for n in range(len(shares))])
  ax.axvline(lengths["mean"], color="black", linestyle="--", linewidth=1, label=f"mean {lengths['mean']:.1f}")
  ax.set_xlim(lengths["minimum"] - 1, max(lengths["maximum"], SHORT) + 1)
  ax.set_title(f"Length: {lengths['share_at_most_10']:.1%} have at most {SHORT} tokens")
  ax.set_xlabel("tokens a phrase, start and end included")
  ax.set_ylabel("share of phrases")
  ax.legend(frameon=False)


def _contexts(ax: Axes, report: Report) -> None:
  rows = report["contexts"]
  places, filled = range(len(rows)), [c["filled"] for c in rows]
  bars = ax.bar(places, filled, color=_BLUE, width=0.6, label="tokens")
  ax.bar(places, [1 - f for f in filled], bottom=filled, color=_GREY, width=0.6, label="padding")
  ax.bar_label(bars, labels=[f"{f:.0%}" for f in filled])
  ax.set_xticks(list(places), [f"{c['context']}\n{c['truncated_share']:.1%} cut" for c in rows])
  ax.set_ylim(0, 1.18)
  ax.set_title("Use of the context window")
  ax.set_xlabel("context, in tokens, and share of phrases cut by it")
  ax.set_ylabel("mean share of the window")
  ax.legend(loc="upper center", ncols=2, frameon=False)


def _coverage(ax: Axes, report: Report) -> None:
  v = report["vocabulary"]
  ax.plot([n for n, _ in v["curve"]], [s for _, s in v["curve"]], color=_BLUE, linewidth=2)
  ax.axvline(v["size"], color=_GREY, linestyle="--", linewidth=1, label=f"vocabulary: {v['size']:,}")
  n = v["ids_for"]["0.95"]
  ax.plot([n], [0.95], "o", color=_ORANGE, label=f"95%: {n:,} ids")
  ax.set_xscale("log")
  ax.set_xlim(0.9, 1.3 * v["size"])
  ax.set_ylim(0, 1.05)
  ax.set_title(f"Vocabulary: {v['used']:,} of {v['size']:,} ids used ({v['used'] / v['size']:.1%})")
  ax.set_xlabel("ids, the most frequent first")
  ax.set_ylabel("share of tokens they make up")
  ax.legend(loc="lower right", frameon=False)


def _words(ax: Axes, report: Report) -> None:
  top = report["vocabulary"]["frequent_words"][:15][::-1]
  names = [w if len(w) <= 18 else w[:17] + "…" for w, _ in top]
  bars = ax.barh(range(len(top)), [n for _, n in top], color=_BLUE)
  ax.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
  ax.set_yticks(range(len(top)), names, parse_math=False)
  ax.margins(x=0.15)
  ax.set_title(f"Most frequent of {report['vocabulary']['distinct_words']:,} words")
  ax.set_xlabel("times met")


def _variance(ax: Axes, report: Report) -> None:
  for (name, d), colour in zip(report["dimensions"].items(), (_BLUE, _ORANGE)):
    shares, axes = d["variance"], d["pca_95"]
    ax.plot(range(1, len(shares) + 1), shares, color=colour, linewidth=2, label=f"{name} ({d['width']})")
    ax.plot([axes], [shares[axes - 1]], "o", color=colour)
  ax.axhline(0.95, color=_GREY, linestyle="--", linewidth=1)
  ax.set_ylim(0, 1.05)
  ax.set_title(f"Principal axes ({report['model']})")
  ax.set_xlabel("axes, the largest first; dots: 95% of the variance")
  ax.set_ylabel("share of the variance they hold")
  ax.legend(loc="lower right", frameon=False, title="vectors (their width)")


def _dimensions(ax: Axes, report: Report) -> None:
  measures = {
    "TwoNN": "two_nn", "participation\nratio": "participation_ratio", "axes for\n95%": "pca_95",
  }  # fmt: skip
  for k, ((name, d), colour) in enumerate(zip(report["dimensions"].items(), (_BLUE, _ORANGE))):
    heights = [d[field] or 0 for field in measures.values()]
    bars = ax.bar([x + 0.4 * (k - 0.5) for x in range(3)], heights, width=0.38, color=colour, label=name)
    ax.bar_label(bars, fmt="{:.3g}", padding=2, fontsize=8)
  ax.set_xticks(range(len(measures)), list(measures))
  ax.margins(y=0.2)
  ax.set_title("Intrinsic dimension")
  ax.set_ylabel("dimensions")
  ax.legend(loc="upper center", ncols=2, frameon=False)
