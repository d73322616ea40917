"""Phrases in, text features out: each phrase is encoded once and kept, in programs of few shapes.

Axes: P phrases, T tokens of a padded phrase, D detector width.
"""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from sam3lt_jax.config import BOX_ONLY_PHRASE
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.processing.processor import Sam3Processor
from sam3lt_jax.programs import Program, explain_memory, shapes_of

BATCH = 8  # phrases encoded at once
KEPT = 4096  # phrases kept, about 16 kB each
# Tokens that are computed of a phrase, where padding does not take part: the first of these that holds it,
# or all T. Six words, start and end are 8 tokens; 95% of the paper's prompts have 10 or fewer.
LENGTHS = (8, 16)


class PhraseEncoder:
  """The text encoder with its memory. Iterating gives the phrases it keeps, the one used longest ago first.

  Attributes:
    lengths: numbers of tokens that a program is compiled for, ascending, when the first such phrase comes.
    programs: length -> the program, (variables, ids, mask) -> features.
  """

  def __init__(self, model: Sam3LiteText, processor: Sam3Processor):
    profile = processor.profile
    hides_padding = profile.mask_text_padding or model.config.text.kind == "clip"
    tokens = profile.context_length
    self.lengths = (*(n for n in LENGTHS if hides_padding and n < tokens), tokens)
    self._processor = processor
    self._kept: collections.OrderedDict[str, tuple[np.ndarray, np.ndarray]] = collections.OrderedDict()

    def encode(length: int | None) -> Program:
      def encode_text(variables, ids, mask):
        text = model.apply(variables, ids, mask, method="get_text_features", length=length)
        return text.pooler_output

      return Program(encode_text)

    self.programs = {n: encode(n if n < tokens else None) for n in self.lengths}

  def __call__(self, variables: Variables, phrases: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Features [P, T, D] and mask bool [P, T]; features of padding are zero where it was not computed."""
    by_length: dict[int, list[tuple[str, np.ndarray, np.ndarray]]] = {}
    new = [phrase for phrase in dict.fromkeys(phrases) if phrase not in self._kept]
    for start in range(0, len(new), BATCH):
      batch = new[start : start + BATCH]
      inputs = self._processor(text=batch)
      for row in zip(batch, inputs["input_ids"], inputs["attention_mask"]):
        by_length.setdefault(self.length_of(row[2][None]), []).append(row)
    for length, rows in by_length.items():
      for start in range(0, len(rows), BATCH):
        self._encode(variables, length, rows[start : start + BATCH])
    found = [self._kept[phrase] for phrase in phrases]
    for phrase in phrases:
      self._kept.move_to_end(phrase)
    while len(self._kept) > KEPT:
      self._kept.popitem(last=False)
    return np.stack([row[0] for row in found]), np.stack([row[1] for row in found])

  def _encode(self, variables: Variables, length: int, rows: Sequence[tuple]) -> None:
    phrases, ids, masks = zip(*rows)
    ids, masks = (pad_rows(np.stack(arrays), BATCH) for arrays in (ids, masks))
    with explain_memory():
      features = np.asarray(self.programs[length](variables, ids, masks))
    for phrase, row, mask in zip(phrases, features, masks):
      whole = np.zeros((mask.shape[0], row.shape[1]), row.dtype)
      whole[: len(row)] = row
      self._kept[phrase] = whole, mask.astype(bool)

  def length_of(self, masks: np.ndarray) -> int:
    """The program that serves phrases of these masks [P, T]."""
    last = masks.shape[1] - int(np.argmax(masks.any(axis=0)[::-1]))
    return next(n for n in self.lengths if n >= last or n == self.lengths[-1])

  def __iter__(self) -> Iterator[str]:
    return iter(self._kept)

  def forget(self) -> None:
    """As when the weights have changed."""
    self._kept.clear()

  def compile_ahead(
    self, executor: concurrent.futures.Executor, variables: Variables
  ) -> Callable[[], jax.ShapeDtypeStruct]:
    """Compiles the program for short phrases in the executor's thread; returns a function that waits and
    gives the shape and dtype of what a call returns for one phrase, [1, T, D].
    """

    def arguments() -> tuple:
      inputs = self._processor(text=[BOX_ONLY_PHRASE] * BATCH)
      return shapes_of(variables), inputs["input_ids"], inputs["attention_mask"]

    found = self.programs[self.lengths[0]].compile_in(executor, arguments)
    tokens = self.lengths[-1]
    return lambda: jax.ShapeDtypeStruct((1, tokens, found().shape[2]), found().dtype)


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
  """Repeats the first row up to `rows`; rows are independent, so the copies change nothing."""
  return np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)])
