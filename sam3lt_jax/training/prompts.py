"""Prompts for distillation: split by hash, served in batches for training.

    train, held_out = split_prompts(read_prompts("noun_phrases.json").phrases, 0.02)
    batches = prompt_batches(train, ClipTokenizer(), batch_size=64, seed=0)
    batches[step]                                             # the same arrays whenever it is asked for

Axes: B rows of a batch, T context length. Files of prompts: `sam3lt_jax.data.prompts`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from sam3lt_jax.config import BOX_ONLY_PHRASE, Profile
from sam3lt_jax.data.prompts import clean_phrase
from sam3lt_jax.errors import check, needed
from sam3lt_jax.processing.tokenizer import ClipTokenizer

if TYPE_CHECKING:
  import grain


def split_prompts(
  phrases: Sequence[str], held_out: float = 0.02, seed: int = 0, profile: str | Profile = "original"
) -> tuple[list[str], list[str]]:
  """(training phrases, held-out phrases), both in the order given.

  A phrase's side follows from `seed` and a hash of its words alone, so adding or removing others moves none.
  Case, spacing and the order of words do not count: training on shuffled words (the consistency loss) would
  otherwise show the student its held-out phrases. "visual" is never held out: the model reads it wherever
  there are boxes and no phrase.

  Args:
    held_out: expected share of phrases held out, in [0, 1); the share of a small set varies around it.

  Raises:
    ValueError: `held_out` outside [0, 1).
  """
  check(0 <= held_out < 1, "held_out", held_out, "a share in [0, 1)")
  profile = Profile.named(profile)
  limit, key = int(held_out * 2**64), str(seed).encode()
  sides: tuple[list[str], list[str]] = ([], [])
  for phrase in phrases:
    words = " ".join(sorted(clean_phrase(phrase, profile).split()))
    digest = hashlib.blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    away = int.from_bytes(digest, "big") < limit and words != BOX_ONLY_PHRASE
    sides[away].append(phrase)
  return sides


def shuffle_words(phrase: str, rng: np.random.Generator) -> str:
  """The phrase with its words in an order drawn uniformly from all (so now and then in its own)."""
  words = phrase.split()
  return " ".join(words[i] for i in rng.permutation(len(words)))


def token_rows(
  phrases: Sequence[str], tokenizer: ClipTokenizer, context_length: int
) -> tuple[np.ndarray, np.ndarray]:
  """(input_ids, attention_mask) of P phrases, both int32 [P, context_length], as `tokenizer(phrases)` gives.

  Without its warning for every phrase that is cut: the prompt report counts them once.
  """
  ids, mask = tokenizer(phrases, truncation=False, context_length=context_length)
  cut = mask[:, context_length:].any(axis=1)
  ids, mask = ids[:, :context_length].copy(), mask[:, :context_length].copy()
  ids[cut, -1], mask[cut, -1] = tokenizer.eot_token_id, 1
  return ids, mask


def prompt_batches(
  phrases: Sequence[str],
  tokenizer: ClipTokenizer,
  batch_size: int,
  context_length: int | None = None,
  seed: int = 0,
  *,
  word_shuffle: bool = True,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """Batches for distillation, by step: `batches[step]` depends on the arguments and on `step` alone.

  So a run resumes exactly by asking for the step it stopped at, and any number of processes or threads may
  read ahead. Each epoch goes through all phrases once in an order of its own. Epochs follow one another
  without a gap or an end: a batch may hold the end of one and the beginning of the next.

  Args:
    phrases: N distinct phrases; their numbers, 0 to N - 1, are the ids.
    tokenizer: cleans, encodes and pads, by its profile.
    batch_size: rows over all processes.
    context_length: T; default: that of the tokenizer's profile.
    seed: of the order of phrases and of the words, any whole number from 0.
    word_shuffle: add copies with their words shuffled, another order each epoch, drawn from (seed, epoch,
      phrase number).
    process_index, process_count: this process's contiguous rows of every batch, batch_size / process_count.

  Returns:
    A `grain.MapDataset` of dicts: input_ids, attention_mask, shuffled_ids and shuffled_attention_mask int32
    [B, T] (the last two with `word_shuffle`), and id int64 [B].

  Raises:
    ImportError: grain is not installed.
    ValueError: no phrases, or numbers out of range.
  """
  with needed("batches of prompts need", "grain", "train"):
    import grain

  length = tokenizer.profile.context_length if context_length is None else context_length
  check(len(phrases) > 0, "phrases", phrases, "at least one phrase")
  check(length >= 2, "context_length", length, "at least 2")
  check(seed >= 0, "seed", seed, "0 or more")
  check(0 <= process_index < process_count, "process_index", process_index, f"0 to {process_count - 1}")
  good = batch_size > 0 and batch_size % process_count == 0
  check(good, "batch_size", batch_size, f"a multiple of process_count, {process_count}")
  rows = batch_size // process_count

  def place(position: int, number: int) -> dict[str, np.int64]:
    return {"id": np.int64(number), "epoch": np.int64(position // len(phrases))}

  def load(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    here = slice(process_index * rows, (process_index + 1) * rows)
    numbers, epoch = batch["id"][here], batch["epoch"][here]
    texts = [phrases[n] for n in numbers]
    ids, mask = token_rows(texts, tokenizer, length)
    out = {"input_ids": ids, "attention_mask": mask}
    if word_shuffle:
      rngs = (np.random.default_rng([seed, e, n]) for e, n in zip(epoch, numbers))
      texts = [shuffle_words(text, rng) for text, rng in zip(texts, rngs)]
      out["shuffled_ids"], out["shuffled_attention_mask"] = token_rows(texts, tokenizer, length)
    return {**out, "id": numbers}

  # grain's own seed of an epoch is seed + epoch: without this, neighbouring seeds share their orders.
  order = int(np.random.SeedSequence(seed).generate_state(1)[0])
  data = grain.MapDataset.range(len(phrases)).shuffle(seed=order).repeat(None)
  return data.map_with_index(place).batch(batch_size).map(load)
