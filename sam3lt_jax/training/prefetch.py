"""The next batches, read in a thread while the device computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any


class Prefetch:
  """data[start], data[start + 1], ... up to `stop`, in order, at most `depth` of them waiting.

  Iterating gives (step, batch). What reading a batch raises is raised there, with a note of its number.
  """

  def __init__(self, data: Any, start: int, stop: int, depth: int = 2):
    self._queue: queue.Queue = queue.Queue(maxsize=max(1, depth))
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._read, args=(data, start, stop), daemon=True, name="Prefetch")
    self._thread.start()

  def _read(self, data: Any, start: int, stop: int) -> None:
    for step in range(start, stop):
      try:
        item = (step, data[step], None)
      except BaseException as e:
        e.add_note(f"while reading batch {step}")
        item = (step, None, e)
      if not self._put(item) or item[2] is not None:
        return
    self._put(None)

  def _put(self, item: Any) -> bool:
    while not self._end.is_set():
      try:
        self._queue.put(item, timeout=0.1)
        return True
      except queue.Full:
        continue
    return False

  def __iter__(self) -> Iterator[tuple[int, Any]]:
    while (item := self._queue.get()) is not None:
      step, batch, error = item
      if error is not None:
        raise error
      yield step, batch

  def close(self) -> None:
    """Ends the thread; a batch being read is read to its end first."""
    self._end.set()
    self._thread.join()
