"""What ends a run before its last step: each a `TrainingStopped`, with the step it happened at."""

from __future__ import annotations


class TrainingStopped(ValueError):
  """A run that ended early. `step` counts from 1 and is the step that failed or was the last one done."""

  def __init__(self, message: str, step: int):
    super().__init__(message)
    self.step = step


class NonFiniteLoss(TrainingStopped):
  """The loss or its gradient is NaN or infinite.

  `ids` are the records of the batch (None: it names none), of this process where there are several; `names`
  what the reader knows them by, all of them (None: nothing but the ids).
  """

  def __init__(self, message: str, step: int, ids: list[int] | None, names: list[str] | None = None):
    super().__init__(message, step)
    self.ids, self.names = ids, names


class Interrupted(TrainingStopped):
  """A signal asked the run to end; the state after `step` is saved. `signal` is its number (15 = SIGTERM)."""

  def __init__(self, message: str, step: int, signal: int):
    super().__init__(message, step)
    self.signal = signal
