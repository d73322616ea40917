"""A job without a model: items that are not there, made-up records, and a process that works."""

import hashlib
import json
import os
import pathlib
import signal
import time

from sam3lt_jax import storage
from sam3lt_jax.jobs.ledger import Busy, ShardWriter
from sam3lt_jax.jobs.plan import Plan
from sam3lt_jax.jobs.sources import Item, open_item
from tests.kills import kill_after

FINGERPRINT = {"model": "m", "phrases": ["a", "b"]}


def make_items(number, start=0):
  return [Item(f"{i:04d}.jpg", f"/photos/{i:04d}.jpg") for i in range(start, start + number)]


def record(item, size=200):
  """The same for the same item, so that a shard's content shows whether it is right."""
  noise = hashlib.sha256(item.id.encode()).hexdigest() * (1 + len(item.id) * size // 1000)
  if item.id.endswith("7.jpg"):
    return {"id": item.id, "uri": item.uri, "error": "truncated", "message": noise[:20]}
  return {"id": item.id, "uri": item.uri, "width": 4, "height": 3, "results": [], "noise": noise}


def read_bytes(item):
  with open_item(item) as f:
    return f.read()


def open_plan(directory, number=20, shard_size=4, **options):
  return Plan.open(directory, make_items(number), FINGERPRINT, shard_size, **options)


def finish(plan, process=0, count=1, batch=2, pause=0.0, log=None, on_batch=lambda: None):
  """Works on every shard that is missing and not in other hands; logs each id that it makes a record of."""
  for shard in plan.missing(process, count):
    try:
      with ShardWriter(plan, shard, process) as writer:
        todo = [item for item in shard.items if item.id not in writer.done]
        for start in range(0, len(todo), batch):
          some = todo[start : start + batch]
          if log is not None:
            os.write(log, "".join(f"{item.id}\n" for item in some).encode())
          on_batch()
          time.sleep(pause)
          writer.append([record(item) for item in some])
        writer.commit()
    except Busy:
      continue


def life(directory, number, shard_size, process=0, count=1, batch=2, pause=0.0, log=None, kill=None):
  """The whole life of a process; kill = (batches, seconds): its end, so long after so many."""
  descriptor = None if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  on_batch = (lambda: None) if kill is None else kill_after(*kill)
  finish(open_plan(directory, number, shard_size), process, count, batch, pause, descriptor, on_batch)


STEPS = ("open", "pwrite", "fsync", "ftruncate", "replace", "unlink", "close")


def life_until(step, *arguments):
  """A life that SIGKILL ends at its `step`-th call of the file system; of a write half is done."""
  left = step

  def wrap(function):
    def call(*args, **kwargs):
      nonlocal left
      left -= 1
      if left == 0:
        if function.__name__ == "pwrite":
          function(args[0], args[1][: len(args[1]) // 2], args[2])
        os.kill(os.getpid(), signal.SIGKILL)
      return function(*args, **kwargs)

    return call

  for name in STEPS:
    setattr(os, name, wrap(getattr(os, name)))
  life(*arguments)


def check_whole(directory, number):
  """Every item exactly once, each record right, each digest that of its file, nothing left over."""
  shards = pathlib.Path(directory) / "shards"
  seen = []
  for path in sorted(shards.glob("*.jsonl")):
    data = path.read_bytes()
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["sha256"] == hashlib.sha256(data).hexdigest() and about["bytes"] == len(data), path
    records = [json.loads(line) for line in data.splitlines()]
    assert about["records"] == len(records)
    assert about["failures"] == sum("error" in r for r in records)
    seen += records
  items = {item.id: item for item in make_items(number)}
  assert sorted(r["id"] for r in seen) == sorted(items)
  assert all(r == record(items[r["id"]]) for r in seen)
  left = {p.name for p in shards.iterdir() if p.suffix in (".part", ".tmp")}
  assert not left, left
  # A kill between commit and release leaves a lock file, which nobody holds and nobody minds.
  held = [p.name for p in shards.glob("*.lock") if storage.is_held(str(p))]
  assert not held, held
