"""What the tests of the ledger share: processes to kill, paths, records."""

import multiprocessing
import os
import pathlib

from sam3lt_jax.jobs import ledger
from tests.jobs import work

# A server that has imported everything forks the processes, so that a life takes hundredths of a second.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tests.jobs.work"])


def start(target, *arguments):
  process = processes.Process(target=target, args=arguments, daemon=True)
  process.start()
  return process


def part_of(directory, index=0):
  return pathlib.Path(ledger.path(str(directory), index, ledger.PART))


def data_of(directory, index=0):
  return pathlib.Path(ledger.path(str(directory), index))


def records(shard, *indices):
  return [work.record(shard.items[i]) for i in indices]


def damage(directory, index):
  """What is wrong with a committed shard, all of which is read for it; None if nothing is."""
  try:
    ledger.read_shard(str(directory), index)
  except ledger.Damaged as e:
    return str(e)
  return None


def started(directory):
  """Shards in work, or left by a kill."""
  return ledger.indices(os.listdir(f"{directory}/{ledger.SHARDS}"), ledger.PART)


TAILS = {
  "torn line": b'{"id":"0002.jpg","uri":"/pho',
  "line without its end": b'{"id":"0002.jpg","uri":"x"}',
  "zeros, as after a power cut": b"\0" * 4096,
  "broken line": b'{"id":"0002.jpg",\n',
  "no record": b"[]\n",
  "an id of another shard": b'{"id":"0005.jpg"}\n',
  "an id that is there": b'{"id":"0000.jpg"}\n',
  "broken, then sound": b'garbage\n{"id":"0003.jpg","uri":"x"}\n',
}
