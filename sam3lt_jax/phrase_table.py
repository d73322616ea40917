"""Phrases as rows of one table on the devices: each is encoded once, in batches, and stays there.

Axes: P phrases, T tokens of a padded phrase, D detector width, C rows of the table.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sam3lt_jax import parallel
from sam3lt_jax.processing.processor import Sam3Processor
from sam3lt_jax.programs import Program, explain_memory

# Rows, about 16 kB each: as many as are there, then the next size. Beyond the last the phrase that was used
# longest ago makes room.
ROWS = (64, 512, 4096)


class PhraseTable:
  """The text encoder's results. Iterating gives the phrases it keeps, the one used longest ago first.

  A table is never written to: a call that has one keeps it while another thread adds phrases to the next.
  """

  def __init__(self, read: Program, processor: Sam3Processor, mesh: Mesh, batches: Sequence[int]):
    """read: (variables, ids [P, T], mask [P, T]) -> [P, T, D]. batches: phrases read at once, ascending."""
    everywhere = parallel.replicated(mesh)
    self._read, self._processor, self._batches = read, processor, tuple(batches)
    self._everywhere, self._split = everywhere, parallel.batch_sharding(mesh)
    self._put, self._take = Program("put", _put, mesh, everywhere), Program("take", _take, mesh, self._split)
    self._lock = threading.RLock()
    self.forget()

  def forget(self) -> None:
    """As when the weights have changed."""
    with self._lock:
      self._row: collections.OrderedDict[str, int] = collections.OrderedDict()
      self._table: tuple[jax.Array, jax.Array] | None = None

  def __iter__(self):
    return iter(list(self._row))

  def add(self, variables: Any, phrases: Sequence[str]) -> None:
    """Encodes those of `phrases` that are not there yet, as many as there is room for."""
    phrases = list(dict.fromkeys(phrases))[: ROWS[-1]]
    with self._lock:
      for phrase in filter(self._row.__contains__, phrases):
        self._row.move_to_end(phrase)  # so that it is not among those that make room
      new = [phrase for phrase in phrases if phrase not in self._row]
      for start in range(0, len(new), self._batches[-1]):
        some = new[start : start + self._batches[-1]]
        ids, mask = self.inputs(some)
        with explain_memory():
          features = self._read(variables, ids, mask)
        self._grow((features, mask), len(self._row) + len(some))
        rows = sorted(set(range(len(self._table[0]))).difference(self._row.values()))[: len(some)]
        while len(rows) < len(some):  # the oldest make room
          rows.append(self._row.popitem(last=False)[1])
        at = jax.device_put(pad_rows(np.array(rows, np.int32), len(ids)), self._everywhere)
        self._table = self._put((), self._table, at, features, mask)
        self._row.update(zip(some, rows))
      for phrase in phrases:
        self._row.move_to_end(phrase)

  def tokens(self, variables: Any, phrases: Sequence[Sequence[str]]) -> tuple[jax.Array, jax.Array]:
    """Phrases [R][P] -> features [R, P, T, D] and mask bool [R, P, T], split over the devices by R."""
    with self._lock:
      self.add(variables, [phrase for row in phrases for phrase in row])
      index = np.array([[self._row[phrase] for phrase in row] for row in phrases], np.int32)
      table = self._table
    return self._take((), table, jax.device_put(index, self._split))

  def inputs(self, phrases: Sequence[str]) -> tuple[jax.Array, jax.Array]:
    """Ids and mask of phrases, padded to a batch by the first, on the devices."""
    given = self._processor(text=list(phrases))
    batch = next(b for b in self._batches if b >= len(phrases))
    arrays = given["input_ids"], given["attention_mask"].astype(bool)
    return tuple(jax.device_put(pad_rows(x, batch), self._everywhere) for x in arrays)

  def _grow(self, like: tuple[jax.Array, ...], wanted: int) -> None:
    """To the first size of at least `wanted` rows, or to the last."""
    held = 0 if self._table is None else len(self._table[0])
    size = next((n for n in ROWS if n >= wanted), ROWS[-1])
    if size > held:
      grown = [np.zeros((size, *x.shape[1:]), x.dtype) for x in like]
      for new, old in zip(grown, self._table or ()):
        new[:held] = old
      self._table = tuple(jax.device_put(x, self._everywhere) for x in grown)


def pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
  """Repeats the first row up to `rows`; rows are independent, so the copies change nothing."""
  return np.concatenate([array, np.repeat(array[:1], rows - len(array), axis=0)])


def _put(_, table, at, features, mask):
  return tuple(old.at[at].set(new) for old, new in zip(table, (features, mask)))


def _take(_, table, index):
  return tuple(x[index] for x in table)
