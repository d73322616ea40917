"""Prompts for distillation: read and de-duplicated, split by hash, served in batches for training.

    prompts = read_prompts(["noun_phrases.json", "lvis_v1_val.json"])
    train, held_out = split_prompts(prompts.phrases, 0.02)
    batches = prompt_batches(train, ClipTokenizer(), batch_size=64, seed=0)
    batches[step]                                             # the same arrays whenever it is asked for

Axes: B rows of a batch, T context length. Accepted files: see `prompt_files`.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import logging
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from sam3lt_jax.config import BOX_ONLY_PHRASE, Profile
from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.processing.tokenizer import ClipTokenizer, clean_original
from sam3lt_jax.training import prompt_files
from sam3lt_jax.training.prompt_files import Bad

if TYPE_CHECKING:
  import grain

MAX_CHARACTERS = 1000  # a longer "phrase" is something else: a page, or a file without line ends
_BLANKS = re.compile(r"[^\S\x1c-\x1f]+")  # the tokenizers package's \s: without four that Python counts in
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PromptSource:
  """One file.

  Attributes:
    path, format: where it is, and what it was taken for (`prompt_files.PromptFile`).
    records: texts in it, usable or not.
    phrases: how many phrases it was the first to bring.
  """

  path: str
  format: str
  records: int
  phrases: int


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """What `read_prompts` found.

  Attributes:
    phrases: distinct phrases in the order they were first met, as written but for blank ends.
    skipped: reason -> number of records left out for it: "empty", "not UTF-8", "not valid JSON", "not a
      string", "no text field", "not an object", "over 1000 characters".
    duplicates: texts left out because an earlier one reads the same to the tokenizer.
    sources: the files, in the order read.
  """

  phrases: list[str]
  skipped: dict[str, int]
  duplicates: int
  sources: list[PromptSource]


def clean_phrase(text: str, profile: str | Profile = "original") -> str:
  """The text as the tokenizer of `profile` reads it: two phrases with one result have the same token ids."""
  if text.isascii() and text.isprintable() and "&" not in text:
    return " ".join(text.split()).lower()  # both cleanings come to this, and ftfy takes 25 microseconds
  if Profile.named(profile).text_cleaning == "original":
    return clean_original(text)
  text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
  text = _BLANKS.sub(" ", unicodedata.normalize("NFC", text)).strip(" ")
  return "".join(c.lower() for c in text)  # a letter at a time: str.lower ends Greek words in another sigma


def read_prompts(
  paths: str | os.PathLike | Sequence[str | os.PathLike],
  profile: str | Profile = "original",
  *,
  synonyms: bool = False,
) -> PromptSet:
  """Reads one or several files or folders of prompts.

  Records that cannot be used are counted by reason and left out, with one log line (WARNING) a file and
  reason that names the first of them.

  Args:
    paths: files in any of the formats of `prompt_files`, found by content; of a folder, its .txt, .json and
      .jsonl files by name. The order decides which of two equal phrases is kept: the first.
    profile: whose cleaning tells which phrases are equal.
    synonyms: take the synonyms of LVIS categories, too.

  Raises:
    OSError: a file that does not exist or cannot be read.
    ValueError: a file that is no list of prompts (the message names file and line), or no usable phrase.
  """
  profile = Profile.named(profile)
  files = prompt_files.find_files(paths)
  seen: set[str] = set()
  phrases: list[str] = []
  skipped: collections.Counter[str] = collections.Counter()
  duplicates, sources = 0, []
  for path in files:
    file = prompt_files.open_file(path, synonyms)
    bad: collections.Counter[str] = collections.Counter()
    first_bad: dict[str, str] = {}
    records, before = 0, len(phrases)
    for place, text in _texts(file):
      records += 1
      if isinstance(text, str):
        text = text.strip()
        key = clean_phrase(text, profile) if len(text) <= MAX_CHARACTERS else None
        if key:
          if key in seen:
            duplicates += 1
          else:
            seen.add(key)
            phrases.append(text)
          continue
        text = Bad("empty" if key == "" else f"over {MAX_CHARACTERS} characters")
      bad[text.reason] += 1
      first_bad.setdefault(text.reason, place[0].format(place[1]))
    for reason, count in bad.items():
      _log.warning("%s: %d skipped: %s (first: %s)", path, count, reason, first_bad[reason])
    skipped += bad
    sources.append(PromptSource(path, file.format, records, len(phrases) - before))
  if not phrases:
    why = "; ".join(f"{reason}: {count}" for reason, count in skipped.items()) or "there are no records"
    raise ValueError(f"no usable phrase in {', '.join(files[:5])}{', ...' if len(files) > 5 else ''} ({why})")
  return PromptSet(phrases, dict(skipped), duplicates, sources)


def _texts(file: prompt_files.PromptFile) -> Iterator[tuple[tuple[str, int], str | Bad]]:
  """((place, number), text) of every record; a record with several texts gives them all at its place."""
  for place, first, values in file.sections:
    for number, value in enumerate(values, first):
      if type(value) is list:
        for text in value or [Bad("empty")]:
          yield (place, number), text
      else:
        yield (place, number), value


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
  if not 0 <= held_out < 1:
    raise ArgumentError("held_out", f" must be a share in [0, 1), got {held_out}")
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
  epochs: int | None = None,
  shuffle: bool = True,
  word_shuffle: bool = True,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.MapDataset:
  """Batches for distillation, by step: `batches[step]` depends on the arguments and on `step` alone.

  So a run resumes exactly by asking for the step it stopped at, and any number of processes or threads may
  read ahead. Each epoch goes through all phrases once in an order of its own. Epochs follow one another
  without a gap: a batch may hold the end of one and the beginning of the next, and no phrase is left out.

  Args:
    phrases: N distinct phrases; their numbers, 0 to N - 1, are the ids.
    tokenizer: cleans, encodes and pads, by its profile.
    batch_size: rows over all processes.
    context_length: T; default: that of the tokenizer's profile.
    seed: of the order of phrases and of the words, any whole number from 0.
    epochs: None: without end (the length is then some huge number). A number: the last batch may be shorter.
    shuffle: False: the order given, in every epoch.
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
  try:
    import grain
  except ImportError as e:
    raise ImportError("batches of prompts need grain: pip install 'sam3lt_jax[train]'") from e

  phrases = [phrases] if isinstance(phrases, str) else list(phrases)
  length = tokenizer.profile.context_length if context_length is None else context_length
  _check_batches(phrases, batch_size, length, seed, epochs, process_index, process_count)
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

  data = grain.MapDataset.range(len(phrases))
  if shuffle:
    # grain's own seed of an epoch is seed + epoch: without this, neighbouring seeds share their orders.
    data = data.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
  return data.repeat(epochs).map_with_index(place).batch(batch_size).map(load)


def _check_batches(
  phrases: list[str],
  batch_size: int,
  length: int,
  seed: int,
  epochs: int | None,
  process: int,
  processes: int,
) -> None:
  if not phrases:
    raise ValueError("phrases must hold at least one phrase, got none")
  if not isinstance(phrases[0], str):
    raise ValueError(f"phrases must be strings, got {type(phrases[0]).__name__}")
  if length < 2:
    raise ArgumentError("context_length", f" must be at least 2, got {length}")
  if seed < 0:
    raise ArgumentError("seed", f" must be at least 0, got {seed}")
  if epochs is not None and epochs < 1:
    raise ValueError(f"epochs must be at least 1, or None for no end, got {epochs}")
  if not 0 <= process < processes:
    raise ValueError(f"process_index must be from 0 to process_count - 1, got {process} of {processes}")
  if batch_size < 1 or batch_size % processes:
    raise ValueError(
      f"batch_size must be a positive multiple of process_count ({processes}), got {batch_size}"
    )
  if processes > 1 and epochs is not None:
    raise ValueError("epochs must be None with several processes: a short last batch cannot be shared out")
