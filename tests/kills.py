"""Processes that kill themselves: however loaded the machine is, the kill does not come late."""

import itertools
import os
import signal
import threading


def kill_after(calls, delay):
  """A function that sends SIGKILL to its own process `delay` seconds after its `calls`-th call.

  With no calls the time begins at once.
  """
  kill = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
  kill.daemon, count = True, itertools.count(1)

  def call(*_):
    if next(count) == calls:
      kill.start()

  if calls == 0:
    kill.start()
  return call
