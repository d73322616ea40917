"""What a set of prompts asks of a text encoder: lengths, context, vocabulary and, with a model, dimensions.

The paper's analysis of why a small text encoder suffices: prompts are short, the context window is mostly
padding, few of the vocabulary's ids are ever met, and features fill few of their dimensions.

    report = prompt_report(read_prompts("noun_phrases.json"), ClipTokenizer())
    print(report.table())
    prompt_plots.save_plots(report, "report.png")

Lengths are in tokens and include the start and the end token, since both take room in the context.

Source: the SAM3-LiteText paper (arXiv 2602.12173) for what is measured; written from its description.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.processing.tokenizer import ClipTokenizer
from sam3lt_jax.training.intrinsic_dimension import IntrinsicDimension, intrinsic_dimension
from sam3lt_jax.training.prompts import PromptSet, clean_phrase, token_rows

if TYPE_CHECKING:
  from sam3lt_jax.model import Sam3LiteText, Variables

CONTEXTS = (16, 32)  # of the released models and of SAM 3: told besides the one asked for
SHORT = 10  # tokens; the paper's bound under which 95% of prompts fall
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_SHARES = (0.5, 0.9, 0.95, 0.99)
_WORDS = 30  # most frequent ones kept
_CURVE = 200  # points of the coverage curve
_MIN_POINTS = 20  # fewer say nothing of a dimension
_BLOCK = 64  # prompts encoded at once
_EMBEDDINGS = ("text_encoder", "embeddings", "token_embedding", "embedding")


@dataclasses.dataclass(frozen=True)
class LengthStats:
  """Tokens a phrase. `histogram[n]`: phrases of n tokens; `quantiles`: share of phrases -> tokens."""

  mean: float
  std: float
  minimum: int
  maximum: int
  quantiles: dict[str, int]
  share_at_most_10: float
  histogram: list[int]


@dataclasses.dataclass(frozen=True)
class ContextUse:
  """What a context window of `context` tokens does to the phrases.

  Attributes:
    filled: mean share of the window that holds tokens, the rest being padding.
    truncated: phrases that are cut. tokens_lost: share of all tokens that the cuts take away.
  """

  context: int
  filled: float
  truncated: int
  truncated_share: float
  tokens_lost: float


@dataclasses.dataclass(frozen=True)
class VocabularyUse:
  """Ids met in the phrases, start and end token left out.

  Attributes:
    size: ids of the tokenizer. used: how many of them are met. once: how many a single time.
    tokens: all tokens met, repeats included.
    ids_for: share of tokens -> how many ids, the most frequent first, make it up.
    curve: [number of ids, share of tokens they make up], the most frequent first, at most 200 points.
    distinct_words: of the cleaned phrases, split at blanks. frequent_words: the first 30, [word, count].
  """

  size: int
  used: int
  once: int
  tokens: int
  ids_for: dict[str, int]
  curve: list[list[float]]
  distinct_words: int
  frequent_words: list[list[Any]]


@dataclasses.dataclass(frozen=True)
class PromptReport:
  """Everything `prompt_report` found; see its parts.

  Attributes:
    phrases: how many distinct ones. skipped, duplicates, sources: of the `PromptSet`, if there was one.
    profile: whose cleaning and tokens these are.
    model: what the features come from, or None.
    dimensions: "phrase features" and "token embeddings" -> their dimension; empty without a model.
  """

  phrases: int
  duplicates: int
  skipped: dict[str, int]
  sources: list[dict[str, Any]]
  profile: str
  lengths: LengthStats
  contexts: list[ContextUse]
  vocabulary: VocabularyUse
  model: str | None = None
  dimensions: dict[str, IntrinsicDimension] = dataclasses.field(default_factory=dict)

  def to_json(self, indent: int | None = None) -> str:
    """All of it as JSON; a number that is not finite becomes null."""
    return json.dumps(_plain(dataclasses.asdict(self)), indent=indent, ensure_ascii=False)

  def table(self) -> str:
    """All of it but the curves, as text of 80 columns or so."""
    return "\n".join(_table_lines(self))


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
) -> PromptReport:
  """Measures a set of prompts.

  Args:
    prompts: distinct phrases.
    tokenizer: counts tokens; with a model, the one that belongs to it.
    context_length: told of besides 16 and 32, and what the model reads; default: the tokenizer's.
    model, variables: adds the intrinsic dimension of the phrases' features (`pooler_output`, averaged over a
      phrase's tokens) and of the rows of the token table that the phrases use.
    model_name: what the report calls it.
    max_points: phrases, and rows, that a dimension is measured on, drawn by `seed` where there are more.

  Raises:
    ValueError: no phrase, a context below 2 (or beyond the model's), or a tokenizer of another model.
  """
  known = isinstance(prompts, PromptSet)
  phrases = prompts.phrases if known else list(prompts)
  if not phrases:
    raise ValueError("prompts must hold at least one phrase, got none")
  context = tokenizer.profile.context_length if context_length is None else context_length
  if context < 2:
    raise ArgumentError("context_length", f" must be at least 2, got {context}")
  lengths, counts = count_tokens(phrases, tokenizer)
  dimensions = {}
  if model is not None:
    features = phrase_features(_sample(phrases, max_points, seed), tokenizer, model, variables, context)
    used = np.flatnonzero(counts)
    rows = _sample(_token_table(variables, used)[used], max_points, seed)
    for name, points in (("phrase features", features), ("token embeddings", rows)):
      if len(np.unique(points, axis=0)) >= _MIN_POINTS:
        dimensions[name] = intrinsic_dimension(points)
  return PromptReport(
    phrases=len(phrases),
    duplicates=prompts.duplicates if known else 0,
    skipped=dict(prompts.skipped) if known else {},
    sources=[dataclasses.asdict(s) for s in prompts.sources] if known else [],
    profile=tokenizer.profile.name,
    lengths=length_stats(lengths),
    contexts=[context_use(lengths, c) for c in sorted({*CONTEXTS, context})],
    vocabulary=_vocabulary_use(counts, phrases, tokenizer),
    model=None if model is None else model_name,
    dimensions=dimensions,
  )


def count_tokens(phrases: Sequence[str], tokenizer: ClipTokenizer) -> tuple[np.ndarray, np.ndarray]:
  """(lengths int64 [P], start and end token included; how often each id is met, int64 [V], without them)."""
  lengths = np.empty(len(phrases), np.int64)
  counts = np.zeros(tokenizer.vocab_size, np.int64)
  for start in range(0, len(phrases), 4096):
    rows = [tokenizer.encode(phrase) for phrase in phrases[start : start + 4096]]
    lengths[start : start + len(rows)] = [len(row) for row in rows]
    ids = np.fromiter((i for row in rows for i in row[1:-1]), np.int64)
    counts += np.bincount(ids, minlength=len(counts))
  return lengths, counts


def length_stats(lengths: np.ndarray) -> LengthStats:
  """`LengthStats` of int [P]. A quantile is the least length that so many phrases do not exceed."""
  quantiles = np.quantile(lengths, _QUANTILES, method="inverted_cdf")
  return LengthStats(
    mean=float(lengths.mean()),
    std=float(lengths.std()),
    minimum=int(lengths.min()),
    maximum=int(lengths.max()),
    quantiles={str(q): int(v) for q, v in zip(_QUANTILES, quantiles)},
    share_at_most_10=float((lengths <= SHORT).mean()),
    histogram=np.bincount(lengths).tolist(),
  )


def context_use(lengths: np.ndarray, context: int) -> ContextUse:
  """`ContextUse` of phrases of int [P] tokens in a window of `context`."""
  kept = np.minimum(lengths, context)
  return ContextUse(
    context=context,
    filled=float(kept.mean() / context),
    truncated=int((lengths > context).sum()),
    truncated_share=float((lengths > context).mean()),
    tokens_lost=float(1 - kept.sum() / lengths.sum()),
  )


def ids_for(counts: np.ndarray, share: float) -> int:
  """How many ids, the most frequent first, make up `share` of all tokens; counts: int [V]."""
  cumulative = np.cumsum(np.sort(counts[counts > 0])[::-1])
  if not len(cumulative):
    return 0
  return int(np.searchsorted(cumulative, share * cumulative[-1] * (1 - 1e-12)) + 1)


def _vocabulary_use(counts: np.ndarray, phrases: Sequence[str], tokenizer: ClipTokenizer) -> VocabularyUse:
  cumulative = np.cumsum(np.sort(counts[counts > 0])[::-1])
  used, tokens = len(cumulative), int(counts.sum())
  marks = np.unique(np.geomspace(1, used, _CURVE).round().astype(int)) if used else []
  words = collections.Counter(word for p in phrases for word in clean_phrase(p, tokenizer.profile).split())
  return VocabularyUse(
    size=tokenizer.vocab_size,
    used=used,
    once=int((counts == 1).sum()),
    tokens=tokens,
    ids_for={str(share): ids_for(counts, share) for share in _SHARES},
    curve=[[int(n), round(float(cumulative[n - 1] / tokens), 6)] for n in marks],
    distinct_words=len(words),
    frequent_words=[[word, n] for word, n in words.most_common(_WORDS)],
  )


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

  ids, mask = token_rows(phrases, tokenizer, context_length)
  _token_table(variables, ids)

  @jax.jit
  def encode(variables, ids, mask):
    text = model.apply(variables, ids, mask, method="get_text_features")
    weights = text.attention_mask[..., None].astype(jnp.float32)
    total = (text.pooler_output.astype(jnp.float32) * weights).sum(axis=1)
    return total / jnp.maximum(weights.sum(axis=1), 1.0)

  features = []
  for start in range(0, len(phrases), _BLOCK):
    rows = np.minimum(np.arange(start, start + _BLOCK), len(phrases) - 1)  # one shape: the last row repeats
    features.append(np.asarray(encode(_text_part(variables), ids[rows], mask[rows])))
  return np.concatenate(features)[: len(phrases)]


def _text_part(variables: Variables) -> Variables:
  """Without the vision trunk, which a call would otherwise carry along."""
  parts = ("text_encoder", "text_projection")
  return {
    name: {part: collection[part] for part in parts if part in collection}
    for name, collection in variables.items()
  }


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


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_plain(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _table_lines(r: PromptReport) -> list[str]:
  lengths, v = r.lengths, r.vocabulary
  lines = [f"{r.phrases:,} distinct phrases (left out as duplicates: {r.duplicates:,}), profile {r.profile}"]
  lines += [
    f"  {s['path']}: {s['format']}, {s['records']:,} records, {s['phrases']:,} new" for s in r.sources
  ]
  if r.skipped:
    lines.append("  skipped: " + ", ".join(f"{n:,} {reason}" for reason, n in r.skipped.items()))
  q = lengths.quantiles
  lines += [
    "",
    "tokens a phrase (start and end included)",
    f"  mean {lengths.mean:.2f} (standard deviation {lengths.std:.2f}), "
    f"from {lengths.minimum} to {lengths.maximum}",
    f"  half of them have at most {q['0.5']}, 95% at most {q['0.95']}, 99% at most {q['0.99']}",
    f"  at most {SHORT}: {lengths.share_at_most_10:.1%}",
    "",
    "context   filled   padding   phrases cut      tokens lost",
  ]
  for c in r.contexts:
    cut = f"{c.truncated:,} ({c.truncated_share:.2%})"
    lines.append(f"{c.context:>7} {c.filled:>8.1%} {1 - c.filled:>9.1%}   {cut:<16} {c.tokens_lost:.2%}")
  lines += [
    "",
    f"vocabulary: {v.used:,} of {v.size:,} ids used ({v.used / v.size:.2%}), {v.once:,} of them once; "
    f"{v.distinct_words:,} words",
    "  " + "ids that make up " + ", ".join(f"{float(s):.0%} of tokens: {n:,}" for s, n in v.ids_for.items()),
    "  most frequent: " + ", ".join(f"{word} {n:,}" for word, n in v.frequent_words[:8]),
  ]
  if r.model is not None:
    lines += ["", f"dimensions ({r.model})    points   width   TwoNN   participation   axes for 95%"]
    width = len(f"dimensions ({r.model})")
    for name, d in r.dimensions.items():
      lines.append(
        f"{'  ' + name:<{width}} {d.points:>9,} {d.width:>7,} {d.two_nn:>7.1f} {d.participation_ratio:>15.1f}"
        f" {d.pca_95:>14,}"
      )
    if not r.dimensions:
      lines.append(f"  not measured: fewer than {_MIN_POINTS} different vectors")
  return lines
