"""Vocabulary pruning: keep the token rows that given phrases need, and drop the rest.

A token table of 49,408 rows is most of a small text encoder, and short phrases use few of them (the paper
counts 65% of the vocabulary unused by all prompts of its data). A pruned model gives the same features for
every phrase whose tokens were kept; any other phrase is an error, not a guess.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.config import BOX_ONLY_PHRASE, Sam3LiteTextConfig
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.processing.tokenizer import UNKNOWN, ClipTokenizer


def needed_tokens(tokenizer: ClipTokenizer, phrases: Iterable[str]) -> list[int]:
  """The ids that `phrases` are made of, with the start, end and padding id, and those of "visual", which
  example boxes without a phrase ask for; sorted.

  Raises:
    ValueError: no phrase.
  """
  kept = {tokenizer.sot_token_id, tokenizer.eot_token_id, tokenizer.profile.pad_token_id}
  kept.update(tokenizer.encode(BOX_ONLY_PHRASE))
  count = 0
  for phrase in phrases:
    kept.update(tokenizer.encode(phrase))
    count += 1
  if not count:
    raise ValueError("phrases must hold at least one phrase, got none")
  return sorted(kept)


def prune_tokenizer(tokenizer: ClipTokenizer, kept: Iterable[int]) -> ClipTokenizer:
  """A tokenizer that numbers the kept tokens 0, 1, ... in their old order.

  It also holds the pieces that byte-pair encoding passes through on its way to a kept token, and one unknown
  token. They are numbered from `len(kept)` on, beyond the model's table: the processor reports them as words
  that the model does not know.

  Args:
    tokenizer: the one to prune; stays as it is.
    kept: ids, of which the tokenizer's start, end and padding token must be three.

  Raises:
    ValueError: an id that the tokenizer does not have, or one of the three is missing.
  """
  from tokenizers import Tokenizer

  kept = sorted(set(kept))
  old = json.loads(tokenizer.to_json())
  token_of = {i: t for t, i in old["model"]["vocab"].items()} | {
    t["id"]: t["content"] for t in old["added_tokens"]
  }
  for name, needed in (
    ("start", tokenizer.sot_token_id),
    ("end", tokenizer.eot_token_id),
    ("padding", tokenizer.profile.pad_token_id),
  ):
    if needed not in kept:
      raise ValueError(f"kept must hold the {name} token {needed} ({token_of[needed]!r})")
  unknown = [i for i in kept if i not in token_of]
  if unknown:
    raise ValueError(f"kept holds ids that the tokenizer does not have: {unknown[:5]}")
  new_id = {old_id: i for i, old_id in enumerate(kept)}
  vocabulary = {token_of[i]: new_id[i] for i in kept}
  merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in old["model"]["merges"]]
  parts_of = {a + b: (a, b) for a, b in merges}
  for token in list(vocabulary):
    _add_pieces(token, parts_of, vocabulary)
  vocabulary[UNKNOWN] = len(vocabulary)
  new = dict(old)
  new["model"] = dict(
    old["model"],
    vocab=vocabulary,
    merges=[list(m) for m in merges if all(t in vocabulary for t in (*m, m[0] + m[1]))],
    unk_token=UNKNOWN,
  )
  new["added_tokens"] = [dict(t, id=new_id[t["id"]]) for t in old["added_tokens"] if t["id"] in new_id]
  new["post_processor"] = _renumbered(old["post_processor"], new_id)
  profile = dataclasses.replace(tokenizer.profile, pad_token_id=new_id[tokenizer.profile.pad_token_id])
  return ClipTokenizer(Tokenizer.from_str(json.dumps(new)), profile)


def prune_vocabulary(
  model: Sam3LiteText,
  variables: Variables,
  phrases: Iterable[str],
  tokenizer: ClipTokenizer | None = None,
) -> tuple[Sam3LiteText, Variables, ClipTokenizer]:
  """The same model with only the token rows that `phrases` need.

  Args:
    model, variables: any model; its vision part and detector are passed through.
    phrases: all that the model shall understand. A word in another place or company needs no phrase of its
      own: tokens are kept, not phrases.
    tokenizer: the model's; None: the bundled CLIP table under the model's profile.

  Returns:
    (model, variables, tokenizer). The model's configuration holds the tokenizer too, so that
    `save_pretrained`, `Sam3Processor` and `Predictor` take it. Features of phrases made of kept tokens are
    those of the unpruned model.

  Raises:
    ValueError: no phrase, or a tokenizer with more ids than the model's table has rows.
  """
  tokenizer = tokenizer or ClipTokenizer(profile=model.config.profile)
  kept = needed_tokens(tokenizer, phrases)
  rows = model.config.text.vocab_size
  if kept[-1] >= rows:
    raise ValueError(f"the tokenizer gives id {kept[-1]}, but the model's vocabulary has {rows}")
  pruned = prune_tokenizer(tokenizer, kept)
  config = pruned_config(model.config, pruned, len(kept))
  variables = jax.tree.map(lambda x: x, variables)  # new dictionaries around the same arrays
  table = variables["params"]["text_encoder"]["embeddings"]["token_embedding"]
  take = np.take if isinstance(table["embedding"], np.ndarray) else jnp.take
  table["embedding"] = take(table["embedding"], np.array(kept), axis=0)
  return model.clone(config=config), variables, pruned


def pruned_config(config: Sam3LiteTextConfig, tokenizer: ClipTokenizer, rows: int) -> Sam3LiteTextConfig:
  """`config` for a pruned tokenizer: its padding id and a table of `rows` rows."""
  profile = dataclasses.replace(config.profile, pad_token_id=tokenizer.profile.pad_token_id)
  text = dataclasses.replace(config.text, vocab_size=rows)
  return config.replace(text=text, profile=profile, tokenizer=tokenizer.to_json())


def _add_pieces(token: str, parts_of: dict[str, tuple[str, str]], vocabulary: dict[str, int]) -> None:
  """Adds what byte-pair encoding merges into `token`, with the next free ids."""
  for piece in parts_of.get(token, ()):
    if piece not in vocabulary:
      vocabulary[piece] = len(vocabulary)
    _add_pieces(piece, parts_of, vocabulary)


def _renumbered(post_processor, new_id: dict[int, int]):
  """Start and end token of a RoBERTa-style post-processor under their new numbers."""
  if not post_processor or post_processor.get("type") != "RobertaProcessing":
    return post_processor
  sep, cls = ([t, new_id[i]] for t, i in (post_processor["sep"], post_processor["cls"]))
  return dict(post_processor, sep=sep, cls=cls)
