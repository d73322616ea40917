"""A reader whose images hang, in a process of its own: python -m tests.jobs.hanging PROCESSES PIDS.

Says "reading" when the first two hang, with the processes that read them in the file PIDS. SIGTERM stops it.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from sam3lt_jax import storage
from sam3lt_jax.jobs import reading
from sam3lt_jax.jobs.reading import Reader, Stopped
from sam3lt_jax.jobs.sources import Item


class Hanging(Item):
  """An item that notes who reads it and keeps him."""

  @property
  def meta(self):
    with open(self.uri, "a") as f:
      f.write(f"{os.getpid()} ")
    time.sleep(1000)

  @meta.setter
  def meta(self, value):
    pass

  def __reduce__(self):
    return Hanging, (self.id, self.uri)


def main(processes: str, pids: str) -> None:
  reading.PATIENCE_S = 0.1
  stop = threading.Event()
  works = [(i, Hanging(str(i), pids)) for i in range(4)]
  with (
    storage.signals(stop.set),
    Reader(28, workers=2, processes=processes == "1", stop=stop.is_set) as reader,
  ):
    stream = reader.stream(works)

    def say() -> None:
      while not os.path.exists(pids) or len(open(pids).read().split()) < 2:
        time.sleep(0.02)
      print("reading", flush=True)

    threading.Thread(target=say, daemon=True).start()
    try:
      next(stream)
    except Stopped:
      pass


if __name__ == "__main__":
  main(*sys.argv[1:])
