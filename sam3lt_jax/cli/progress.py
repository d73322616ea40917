"""What is going on, on stderr, for anything that takes more than two seconds."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from sam3lt_jax.cli import PROGRAM

DELAY = 2.0  # seconds before anything is shown
_LOG_PERIOD = 30.0  # seconds between lines where stderr is no terminal


class Progress:
  """A tqdm bar that appears after `DELAY` and whose clock runs while the work blocks; see `busy`."""

  def __init__(self, description: str):
    self._description, self._bar = description, None
    self._lock = threading.RLock()
    self.end = threading.Event()
    self.clock = threading.Thread(target=self._tick, daemon=True)
    self.expect(None)

  def expect(self, total: int | None, unit: str = "", done: int = 0) -> None:
    """What is counted from now on, when the clock starts anew; see `busy`."""
    with self._lock:
      self.hide()
      self._total, self.unit, self._before, self._done = total, unit, done, done
      self._start, self._left = time.time(), DELAY  # seconds until it is shown again
      self._first: float | None = None  # when the first was done: what it waited for compiling does not count

  def describe(self, description: str) -> None:
    """What is being done now."""
    with self._lock:
      self._description = description
      if self._bar is not None:
        self._bar.set_description_str(description, refresh=False)

  def advance(self, failed: bool = False) -> None:
    """One more is done."""
    with self._lock:
      self._done += 1
      self._first = self._first or time.time()
      if self._bar is not None:
        self._bar.update()

  def say(self, text: str, file=None) -> None:
    """Prints a line (to stdout, or `file`) that the bar does not run into."""
    with self._lock:
      if self._bar is not None:
        self._bar.clear()
      print(text, file=file, flush=True)

  def note(self, text: str) -> None:
    """A line for the reader, on stderr."""
    self.say(f"{PROGRAM}: {text}", file=sys.stderr)

  def hide(self) -> None:
    if self._bar is not None:
      self._bar.close()
    self._bar = None

  def _show(self, terminal: bool) -> None:
    from tqdm import tqdm

    counts = self._total is not None and self._total > 1
    if self._bar is None:
      layout = "{desc} {n_fmt}" if counts or self.unit else "{desc}"
      layout += "/{total_fmt} [{elapsed}{postfix}]" if counts else " [{elapsed}{postfix}]"
      self._bar = tqdm(
        desc=self._description, total=self._total, initial=self._before, leave=False, bar_format=layout,
        file=sys.stderr, mininterval=1.0 if terminal else _LOG_PERIOD, delay=1e-9,
        position=None if terminal else 0,  # a log has no lines above others: no escape that goes up
      )  # fmt: skip
      self._bar.start_t = self._start
      self._bar.update(self._done - self._before)
    new = self._done - self._before - 1
    if new > 0 and (counts or self.unit):
      rate = new / max(time.time() - self._first, 1e-9)
      told = f"{rate:.3g}{self.unit} a second"
      if self._total is not None:
        told += f", {tqdm.format_interval(max(self._total - self._done, 0) / rate)} left"
      self._bar.set_postfix_str(told, refresh=False)
    self._bar.refresh()
    if not terminal:
      print(file=sys.stderr, flush=True)

  def _tick(self) -> None:
    terminal, step = sys.stderr.isatty(), DELAY / 8
    while not self.end.wait(step):
      with self._lock:
        self._left -= step
        if self._left <= 0:
          self._show(terminal)
          self._left = 1.0 if terminal else _LOG_PERIOD


@contextlib.contextmanager
def busy(description: str, total: int | None = None, unit: str = "", done: int = 0) -> Iterator[Progress]:
  """Shows on stderr what is being done and for how long; with `total` over 1, how many of them are done.

  unit: " frames": also how many of them a second, also where nobody knows how many there are. done: before.

  A terminal is redrawn every second, a log file gets a line every half minute.
  """
  progress = Progress(description)
  progress.expect(total, unit, done)
  progress.clock.start()
  try:
    yield progress
  finally:
    progress.end.set()
    progress.clock.join()
    progress.hide()
