"""How far a job is: what is committed, in work and missing, what failed, how fast it goes on, and where.

Read from the job's folder alone, from any machine that sees it, while the job runs or long after.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any

from sam3lt_jax import storage
from sam3lt_jax.errors import shown
from sam3lt_jax.jobs import files, ledger
from sam3lt_jax.jobs.plan import Plan

WINDOW = 600.0  # seconds over which the rate is taken


@dataclasses.dataclass(frozen=True)
class Status:
  """A job at one moment. Times in seconds, rates in images a second.

  Attributes:
    directory: the job's folder.
    settings: the plan's fingerprint.
    shards: {"total", "done", "running", "stopped", "missing", "damaged"}; "stopped" are begun, and nobody
      works on them now; "missing" are those not begun. On an object store only done and missing are known.
    images: {"total", "done", "failed"}; images of shards in work count once they are written.
    failures: a reason -> how many.
    examples: some failures, {"id", "uri", "error", "message"} each.
    rate: over the last `WINDOW`; of a finished job over all its time; None where nothing was done lately.
    seconds_left: at this rate; None where it is not known, 0 of a finished job.
    last: seconds since something was written; None where nothing is, or it is not known.
    hosts: {"host", "process", "shards", "images", "rate", "running": [shards], "last": seconds ago}, each.
    damaged: a sentence for every shard that is not what was written, or is none of this job's.
    finished: whether all is done.
  """

  directory: str
  settings: dict[str, Any]
  shards: dict[str, int]
  images: dict[str, int]
  failures: dict[str, int]
  examples: list[dict[str, Any]]
  rate: float | None
  seconds_left: float | None
  last: float | None
  hosts: list[dict[str, Any]]
  damaged: list[str]
  finished: bool

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


@dataclasses.dataclass
class _Activity:
  """Images written by one process between two times; a committed shard or one in work.

  `host` is None for a shard that was left in order: who worked on it and when is not known any more.
  """

  host: str | None
  process: int
  start: float
  end: float
  images: int
  running: str | None = None

  def within(self, start: float, end: float) -> float:
    """The images of `start`..`end`, were they written evenly."""
    overlap = min(end, self.end) - max(start, self.start)
    length = self.end - self.start
    if length <= 0:
      return float(self.images if start <= self.end <= end else 0)
    return self.images * max(0.0, overlap) / length


class Watcher:
  """Looks at a job again and again; what is committed is read once."""

  def __init__(self, directory: str | os.PathLike):
    """Raises ValueError if `directory` holds no job."""
    self.directory = files.absolute(directory)
    self._digests: dict[int, dict[str, Any]] = {}

  def look(self, *, verify: bool = False, now: float | None = None) -> Status:
    """The job's status. `verify` reads every committed shard; else only sizes are compared.

    Raises:
      ValueError: no job there, or a damaged plan.
      OSError: a shard that cannot be read.
    """
    now = time.time() if now is None else now
    # Listed before the plan is read, which may grow meanwhile.
    sizes = files.sizes(files.join(self.directory, ledger.SHARDS))
    plan = Plan.load(self.directory)
    total, there = len(plan.sizes), ledger.indices(sizes)
    wrong = plan.damaged(sizes, self._digests, verify)
    done = {i for i in there if i < total} - wrong.keys()
    tally, images, activities, in_work = ledger.Tally(), 0, [], []
    for about in (self._digests[i] for i in sorted(done)):
      images += about["records"]
      tally.reasons.update(about.get("reasons", {}))
      for failure in about.get("examples", ()):
        tally.show(failure)
      activities.append(_activity(about, about["records"], about.get("committed", 0.0)))
    for i in sorted(ledger.indices(sizes, ledger.PART) - there):
      if i < total and (
        found := _in_work(plan, i, sizes[ledger.shard_name(i) + ledger.PART][1] or now, tally)
      ):
        images += found[0]
        in_work.append(found[1])
    running = sum(activity.running is not None for activity in in_work)
    written = [activity.end for activity in activities + in_work if activity.end]
    activities += [activity for activity in in_work if activity.host is not None]
    missing = total - len(done) - len(wrong) - len(in_work)
    left = plan.num_items - images
    rate = _rate(activities, now, finished=left == 0)
    return Status(
      directory=self.directory,
      settings=plan.fingerprint,
      shards={
        "total": total, "done": len(done), "running": running, "stopped": len(in_work) - running,
        "missing": missing, "damaged": len(wrong),
      },
      images={"total": plan.num_items, "done": images, "failed": tally.reasons.total()},
      failures=dict(tally.reasons.most_common()),
      examples=tally.examples,
      rate=rate,
      seconds_left=0.0 if left == 0 else left / rate if rate else None,
      last=round(max(0.0, now - max(written)), 1) if written else None,
      hosts=_hosts(activities, now),
      damaged=[*map(str, wrong.values()), *plan.strays(there).values()],
      finished=len(done) == total,
    )  # fmt: skip


def job_status(directory: str | os.PathLike, *, verify: bool = False, now: float | None = None) -> Status:
  """The status of the job in `directory`, see `Watcher.look`."""
  return Watcher(directory).look(verify=verify, now=now)


def _activity(about: dict[str, Any], images: int, end: float, running: str | None = None) -> _Activity:
  """`about`: what a digest file or a lock says."""
  images, start = max(0, images - about.get("recovered", 0)), min(about.get("started", end), end)
  return _Activity(about.get("host"), about.get("process", 0), start, end, images, running)


def _in_work(plan: Plan, index: int, written: float, tally: ledger.Tally) -> tuple[int, _Activity] | None:
  """Images in a .part file, failures to `tally`; None: it was committed since the folder was listed."""
  try:
    lines = files.read(ledger.path(plan.directory, index, ledger.PART)).splitlines(keepends=True)
  except FileNotFoundError:
    return None
  except OSError:  # whoever works on it says so
    lines = []
  lines = [line for line in lines if line.endswith(b"\n")][: plan.sizes[index]]
  for line in lines:
    if b'"error":' in line and ledger.is_failure(record := ledger.record_of(line)):
      tally.add(record)
  lock = ledger.path(plan.directory, index, ledger.LOCK)
  running = ledger.shard_name(index) if storage.is_held(lock) else None
  return len(lines), _activity(storage.holder(lock), len(lines), written, running)


def _rate(activities: Sequence[_Activity], now: float, finished: bool) -> float | None:
  """Images a second over the window, or over the time since work began in it."""
  if not activities:
    return None
  if finished:
    start, end = min(a.start for a in activities), max(a.end for a in activities)
  else:
    recent = [a.start for a in activities if a.end > now - WINDOW]
    if not recent:
      return None
    start, end = max(now - WINDOW, min(recent)), now
  images = sum(a.within(start, end) for a in activities)
  return images / (end - start) if end > start and images else None


def _hosts(activities: Sequence[_Activity], now: float) -> list[dict[str, Any]]:
  by_process: dict[tuple[str, int], list[_Activity]] = collections.defaultdict(list)
  for activity in activities:
    by_process[activity.host or "?", activity.process].append(activity)
  return [
    {
      "host": host,
      "process": process,
      "shards": sum(a.running is None for a in own),
      "images": sum(a.images for a in own),
      "rate": _rate(own, now, finished=False),
      "running": [a.running for a in own if a.running],
      "last": round(max(0.0, now - max(a.end for a in own)), 1),
    }
    for (host, process), own in sorted(by_process.items())
  ]


def table(status: Status) -> str:
  """The status in lines, for a terminal."""
  shards, images = status.shards, status.images
  parts = [f"{shards[key]:,} {key}" for key in ("done", "running", "stopped", "missing", "damaged")
           if shards[key] or key in ("done", "missing")]  # fmt: skip
  share = 100 * images["done"] / images["total"]
  model = status.settings.get("model")
  kind = "clips" if status.settings.get("video") else "images"
  each = (
    f"{3600 * (status.rate or 0):.1f} clips an hour"
    if kind == "clips"
    else f"{status.rate or 0:.2f} images a second"
  )
  rows = [
    ("shards", f"{', '.join(parts)} of {shards['total']:,}"),
    (kind, f"{images['done']:,} of {images['total']:,} ({share:.1f}%), {images['failed']:,} failed"),
    ("rate", _speed(status, each)),
  ]
  for host in status.hosts:
    at = f"on {', '.join(host['running'])}" if host["running"] else f"last seen {duration(host['last'])} ago"
    rate = f", {host['rate']:.2f} a second" if host["rate"] and kind == "images" else ""
    rows.append(("hosts", f"{host['host']} process {host['process']}: {host['images']:,} {kind}{rate}, {at}"))
  for reason, count in status.failures.items():
    rows.append(("failed", f"{count:,} {reason}"))
    rows += [
      ("failed", f"  {shown(failure['id'])}: {shown(failure['message'])}")
      for failure in status.examples
      if failure["error"] == reason
    ]
  rows += [("damaged", what) for what in status.damaged]
  if status.damaged:
    repair = f"sam3lt status {shown(status.directory)} --repair sets them aside, to be done again"
    rows.append(("damaged", repair))
  lines, before = [shown(status.directory) + (f"  model {model}" if model else "")], ""
  for label, text in rows:  # a label once, before the first of its rows
    lines.append(f"  {'' if label == before else label:<7}  {text}")
    before = label
  return "\n".join(lines)


def _speed(status: Status, each: str) -> str:
  if status.finished:
    return f"{each} over all; finished" if status.rate else "finished"
  idle = not status.shards["running"] and not files.is_remote(status.directory)
  if idle or status.rate is None:
    last = "nothing is written yet" if status.last is None else f"last written {duration(status.last)} ago"
    return "; ".join(filter(None, ["no process works on it now" if idle else "", last]))
  left = "" if status.seconds_left is None else f", {duration(status.seconds_left)} to go"
  return f"{each} lately{left}"


def duration(seconds: float) -> str:
  """42 s, 12 min, 3 h 20 min, 2 d 4 h."""
  minutes = round(seconds / 60)
  if seconds < 90:
    return f"{seconds:.0f} s"
  if minutes < 60:
    return f"{minutes} min"
  if minutes < 2 * 24 * 60:
    return f"{minutes // 60} h {minutes % 60} min"
  return f"{minutes // 1440} d {minutes % 1440 // 60} h"
