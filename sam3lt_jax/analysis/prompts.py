"""What a set of prompts asks of a text encoder: lengths, context, vocabulary and, with a model, dimensions.

The paper's analysis of why a small text encoder suffices: prompts are short, the context window is mostly
padding, few of the vocabulary's ids are ever met, and features fill few of their dimensions.

    report = prompt_report(read_prompts("noun_phrases.json"), ClipTokenizer())
    print(table(report))
    plots.save_plots(report, "report.png")

Lengths are in tokens and include the start and the end token, since both take room in the context.

Source: the SAM3-LiteText paper (arXiv 2602.12173) for what is measured; written from its description.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3lt_jax.analysis.dimension import intrinsic_dimension
from sam3lt_jax.data.prompts import PromptSet, clean_phrase
from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.processing.tokenizer import ClipTokenizer
from sam3lt_jax.training.prompts import token_rows

if TYPE_CHECKING:
  from sam3lt_jax.model import Sam3LiteText, Variables

CONTEXTS = (16, 32)  # of the released models and of SAM 3: told besides the one asked for
SHORT = 10  # tokens; the paper's bound under which 95% of prompts fall
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_SHARES = (0.5, 0.9, 0.95, 0.99)
_MIN_POINTS = 20  # fewer say nothing of a dimension
_BLOCK = 64  # prompts encoded at once
_EMBEDDINGS = ("text_encoder", "embeddings", "token_embedding", "embedding")


def prompt_report(
  prompts: PromptSet | Sequence[str],
  tokenizer: ClipTokenizer,
  context_length: int | None = None,
  *,
  model: Sam3LiteText | None = None,
  variables: Variables | None = None,
  model_name: str = "model",
  max_points: int = 2000,
  seed: int = 0,
) -> dict[str, Any]:
  """Measures a set of prompts.

  Args:
    prompts: distinct phrases.
    tokenizer: counts tokens; with a model, the one that belongs to it.
    context_length: told of besides 16 and 32, and what the model reads; default: the tokenizer's.
    model, variables: adds the intrinsic dimension of the phrases' features (`pooler_output`, averaged over a
      phrase's tokens) and of the rows of the token table that the phrases use.
    model_name: what the report calls it.
    max_points: phrases, and rows, that a dimension is measured on, drawn by `seed` where there are more.

  Returns:
    What JSON can hold:
    phrases: how many; skipped, duplicates, sources: of the `PromptSet`; profile: whose tokens these are;
    lengths: mean, std, minimum, maximum; quantiles: share of phrases -> tokens; share_at_most_10;
      histogram[n]: phrases of n tokens;
    contexts: of each window, filled: mean share of it that holds tokens; truncated, truncated_share: phrases
      that are cut; tokens_lost: share of all tokens that the cuts take away;
    vocabulary, start and end token left out: size: ids of the tokenizer; used: how many are met; once: a
      single time; tokens: repeats included; ids_for: share of tokens -> how many ids, the most frequent
      first, make it up; curve: [ids, share], at most 200 points; distinct_words, frequent_words: of the
      cleaned phrases, the first 30 as [word, count];
    model: its name or None; dimensions: "phrase features", "token embeddings" -> `intrinsic_dimension`.

  Raises:
    ValueError: no phrase, a context below 2 (or beyond the model's), or a tokenizer of another model.
  """
  found = prompts if isinstance(prompts, PromptSet) else PromptSet(list(prompts))
  phrases = found.phrases
  if not phrases:
    raise ValueError("prompts must hold at least one phrase, got none")
  context = tokenizer.profile.context_length if context_length is None else context_length
  if context < 2:
    raise ArgumentError("context_length", f" must be at least 2, got {context}")
  lengths, met = np.empty(len(phrases), np.int64), collections.Counter()
  for i, phrase in enumerate(phrases):
    row = tokenizer.encode(phrase)
    lengths[i] = len(row)
    met.update(row[1:-1])
  counts = np.zeros(tokenizer.vocab_size, np.int64)
  counts[list(met)] = list(met.values())
  dimensions = {}
  if model is not None:
    features = phrase_features(_sample(phrases, max_points, seed), tokenizer, model, variables, context)
    used = np.flatnonzero(counts)
    embeddings = _sample(_token_table(variables, used)[used], max_points, seed)
    for name, points in (("phrase features", features), ("token embeddings", embeddings)):
      if len(np.unique(points, axis=0)) >= _MIN_POINTS:
        dimensions[name] = intrinsic_dimension(points)
  return {
    "phrases": len(phrases),
    "duplicates": found.duplicates,
    "skipped": found.skipped,
    "sources": found.sources,
    "profile": tokenizer.profile.name,
    "lengths": _lengths(lengths),
    "contexts": [_context(lengths, c) for c in sorted({*CONTEXTS, context})],
    "vocabulary": vocabulary_use(counts, phrases, tokenizer),
    "model": None if model is None else model_name,
    "dimensions": dimensions,
  }


def _lengths(lengths: np.ndarray) -> dict[str, Any]:
  # A quantile is the least length that so many phrases do not exceed.
  quantiles = np.quantile(lengths, _QUANTILES, method="inverted_cdf")
  return {
    "mean": float(lengths.mean()),
    "std": float(lengths.std()),
    "minimum": int(lengths.min()),
    "maximum": int(lengths.max()),
    "quantiles": {str(q): int(v) for q, v in zip(_QUANTILES, quantiles)},
    "share_at_most_10": float((lengths <= SHORT).mean()),
    "histogram": np.bincount(lengths).tolist(),
  }


def _context(lengths: np.ndarray, context: int) -> dict[str, Any]:
  kept = np.minimum(lengths, context)
  return {
    "context": context,
    "filled": float(kept.mean() / context),
    "truncated": int((lengths > context).sum()),
    "truncated_share": float((lengths > context).mean()),
    "tokens_lost": float(1 - kept.sum() / lengths.sum()),
  }


def vocabulary_use(counts: np.ndarray, phrases: Sequence[str], tokenizer: ClipTokenizer) -> dict[str, Any]:
  """ "vocabulary" of the report. counts: int [V], how often each id is met."""
  shares = np.cumsum(np.sort(counts[counts > 0])[::-1]) / max(counts.sum(), 1)
  used = len(shares)
  marks = np.unique(np.geomspace(1, used, 200).round().astype(int)) if used else []
  words = collections.Counter(word for p in phrases for word in clean_phrase(p, tokenizer.profile).split())
  return {
    "size": tokenizer.vocab_size,
    "used": used,
    "once": int((counts == 1).sum()),
    "tokens": int(counts.sum()),
    "ids_for": {str(s): int(np.searchsorted(shares, s * (1 - 1e-12)) + 1) if used else 0 for s in _SHARES},
    "curve": [[int(n), round(float(shares[n - 1]), 6)] for n in marks],
    "distinct_words": len(words),
    "frequent_words": [[word, n] for word, n in words.most_common(30)],
  }


def phrase_features(
  phrases: Sequence[str],
  tokenizer: ClipTokenizer,
  model: Sam3LiteText,
  variables: Variables,
  context_length: int,
) -> np.ndarray:
  """Features float32 [P, D]: `TextFeatures.pooler_output` averaged over a phrase's tokens.

  Raises:
    ValueError: a context beyond what the model reads, or ids it has no row for.
  """
  import jax
  import jax.numpy as jnp

  from sam3lt_jax.training.distillation.text_part import text_variables

  ids, mask = token_rows(phrases, tokenizer, context_length)
  _token_table(variables, ids)

  @jax.jit
  def encode(variables, ids, mask):
    text = model.apply(variables, ids, mask, method="get_text_features")
    weights = text.attention_mask[..., None].astype(jnp.float32)
    total = (text.pooler_output.astype(jnp.float32) * weights).sum(axis=1)
    return total / jnp.maximum(weights.sum(axis=1), 1.0)

  features, part = [], text_variables(variables)  # a call would carry the vision trunk along otherwise
  for start in range(0, len(phrases), _BLOCK):
    rows = np.minimum(np.arange(start, start + _BLOCK), len(phrases) - 1)  # one shape: the last row repeats
    features.append(np.asarray(encode(part, ids[rows], mask[rows])))
  return np.concatenate(features)[: len(phrases)]


def _token_table(variables: Variables, used: np.ndarray) -> np.ndarray:
  """The token table, float32 [V, D], once it is known to have a row for every id in `used`."""
  table = variables["params"]
  for name in _EMBEDDINGS:
    table = table[name]
  if used.size and used.max() >= len(table):
    raise ValueError(
      f"the tokenizer gives id {used.max()}, but the model's token table has {len(table)} rows: these "
      "phrases need a vocabulary that was pruned away, or the tokenizer is another model's"
    )
  return np.asarray(table, np.float32)


def _sample(items: Any, count: int, seed: int) -> Any:
  """At most `count` of them, in their order."""
  if len(items) <= count:
    return items
  chosen = np.sort(np.random.default_rng(seed).choice(len(items), count, replace=False))
  return items[chosen] if isinstance(items, np.ndarray) else [items[i] for i in chosen]


def table(report: dict[str, Any]) -> str:
  """All of a report but the curves, as text of 80 columns or so."""
  lengths, v, q = report["lengths"], report["vocabulary"], report["lengths"]["quantiles"]
  lines = [
    f"{report['phrases']:,} distinct phrases (left out as duplicates: {report['duplicates']:,}), "
    f"profile {report['profile']}"
  ]
  for s in report["sources"]:
    lines.append(f"  {s['path']}: {s['format']}, {s['records']:,} records, {s['phrases']:,} new")
  if report["skipped"]:
    lines.append("  skipped: " + ", ".join(f"{n:,} {reason}" for reason, n in report["skipped"].items()))
  lines += [
    "",
    "tokens a phrase (start and end included)",
    f"  mean {lengths['mean']:.2f} (standard deviation {lengths['std']:.2f}), "
    f"from {lengths['minimum']} to {lengths['maximum']}",
    f"  half of them have at most {q['0.5']}, 95% at most {q['0.95']}, 99% at most {q['0.99']}",
    f"  at most {SHORT}: {lengths['share_at_most_10']:.1%}",
    "",
    "context   filled   padding   phrases cut      tokens lost",
  ]
  for c in report["contexts"]:
    cut, filled = f"{c['truncated']:,} ({c['truncated_share']:.2%})", c["filled"]
    lines.append(f"{c['context']:>7} {filled:>8.1%} {1 - filled:>9.1%}   {cut:<16} {c['tokens_lost']:.2%}")
  lines += [
    "",
    f"vocabulary: {v['used']:,} of {v['size']:,} ids used ({v['used'] / v['size']:.2%}), {v['once']:,} of "
    f"them once; {v['distinct_words']:,} words",
    "  ids that make up " + ", ".join(f"{float(s):.0%} of tokens: {n:,}" for s, n in v["ids_for"].items()),
    "  most frequent: " + ", ".join(f"{word} {n:,}" for word, n in v["frequent_words"][:8]),
  ]
  if report["model"] is not None:
    head = f"dimensions ({report['model']})"
    lines += ["", f"{head}    points   width   TwoNN   participation   axes for 95%"]
    for name, d in report["dimensions"].items():
      two_nn = math.inf if d["two_nn"] is None else d["two_nn"]
      lines.append(
        f"{'  ' + name:<{len(head)}} {d['points']:>9,} {d['width']:>7,} {two_nn:>7.1f}"
        f" {d['participation_ratio']:>15.1f} {d['pca_95']:>14,}"
      )
    if not report["dimensions"]:
      lines.append(f"  not measured: fewer than {_MIN_POINTS} different vectors")
  return "\n".join(lines)
