"""How far a job is: what is committed, in work and missing, what failed, how fast it goes on, and where.

Read from the job's folder alone, from any machine that sees it, while the job runs or long after.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

from sam3lt_jax import locks
from sam3lt_jax.errors import shown
from sam3lt_jax.jobs import files, shard_files
from sam3lt_jax.jobs.plan import Plan

WINDOW = 600.0  # seconds over which the rate is taken
_EXAMPLES = 3  # failures shown a reason


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

  @property
  def finished(self) -> bool:
    return self.shards["done"] == self.shards["total"]

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self) | {"finished": self.finished}


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
    """
    now = time.time() if now is None else now
    # Listed before the plan is read, which may grow meanwhile.
    sizes = files.sizes(files.join(self.directory, shard_files.SHARDS))
    there = shard_files.committed(self.directory)
    plan = Plan.load(self.directory)
    indices = range(len(plan.shards))
    done = there.intersection(indices)
    wrong = plan.damaged(done, sizes, self._digests, verify)
    tally = _Tally()
    activities = [tally.committed(i, self._digests[i]) for i in sorted(done - wrong.keys())]
    begun = [i for i in indices if i not in done and _part_name(i) in sizes]
    in_work = [tally.in_work(plan, i, sizes[_part_name(i)][1] or now) for i in begun]
    in_work = [activity for activity in in_work if activity is not None]
    running = sum(activity.running is not None for activity in in_work)
    stopped = len(in_work) - running
    written = [activity.end for activity in activities + in_work if activity.end]
    activities += [activity for activity in in_work if activity.host is not None]
    healthy = len(done) - len(wrong)
    shards = {"total": len(indices), "done": healthy, "running": running, "stopped": stopped}
    shards |= {"missing": len(indices) - len(done) - running - stopped, "damaged": len(wrong)}
    left = plan.num_items - tally.images
    rate = _rate(activities, now, finished=left == 0)
    return Status(
      directory=self.directory,
      settings=plan.fingerprint,
      shards=shards,
      images={"total": plan.num_items, "done": tally.images, "failed": sum(tally.reasons.values())},
      failures=dict(tally.reasons.most_common()),
      examples=tally.examples,
      rate=rate,
      seconds_left=0.0 if left == 0 else left / rate if rate else None,
      last=round(max(0.0, now - max(written)), 1) if written else None,
      hosts=_hosts(activities, now),
      damaged=[*map(str, wrong.values()), *plan.strays(there)],
    )


def job_status(directory: str | os.PathLike, *, verify: bool = False, now: float | None = None) -> Status:
  """The status of the job in `directory`, see `Watcher.look`."""
  return Watcher(directory).look(verify=verify, now=now)


def _part_name(index: int) -> str:
  return f"{shard_files.shard_name(index)}.jsonl.part"


class _Tally:
  """Images and failures of all shards."""

  def __init__(self):
    self.images = 0
    self.reasons: collections.Counter[str] = collections.Counter()
    self.examples: list[dict[str, Any]] = []
    self._shown: collections.Counter[str] = collections.Counter()

  def committed(self, index: int, about: dict[str, Any]) -> _Activity:
    self.images += about["records"]
    self.reasons.update(about.get("reasons", {}))
    self._show(about.get("examples", []))
    end = about.get("committed", 0.0)
    start = min(about.get("started", end), end)
    images = about["records"] - about.get("recovered", 0)
    return _Activity(about.get("host", "?"), about.get("process", 0), start, end, images)

  def in_work(self, plan: Plan, index: int, written: float) -> _Activity | None:
    """None for one that was committed since the folder was listed: the next look counts it."""
    try:
      lines = files.read(shard_files.part_path(plan.directory, index)).splitlines(keepends=True)
    except FileNotFoundError:
      return None
    except OSError:  # whoever works on it says so
      lines = []
    lines = [line for line in lines if line.endswith(b"\n")][: plan.shards.size(index)]
    lock = shard_files.lock_path(plan.directory, index)
    held, about = locks.is_held(lock), _holder(lock)
    self.images += len(lines)
    failures = [record for line in lines if b'"error":' in line and (record := shard_files.record_of(line))]
    failures = list(filter(shard_files.is_failure, failures))
    self.reasons.update(record["error"] for record in failures)
    self._show(failures)
    images = max(0, len(lines) - about.get("recovered", 0))
    start = min(about.get("started", written), written)
    running = shard_files.shard_name(index) if held else None
    return _Activity(about.get("host"), about.get("process", 0), start, written, images, running)

  def _show(self, failures: Iterable[dict[str, Any]]) -> None:
    for record in failures:
      if self._shown[record["error"]] < _EXAMPLES:
        self._shown[record["error"]] += 1
        self.examples.append({k: record[k] for k in ("id", "uri", "error", "message") if k in record})


def _holder(lock: str) -> dict[str, Any]:
  """What a shard's holder said of itself, as far as it makes sense."""
  about, number = locks.holder(lock), lambda x: type(x) in (int, float) and 0 <= x < 1 << 53
  sound = {"host": lambda x: isinstance(x, str), "process": lambda x: type(x) is int}
  sound |= {"started": number, "recovered": lambda x: type(x) is int and x >= 0}
  return {key: about[key] for key, is_sound in sound.items() if key in about and is_sound(about[key])}


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
    by_process[activity.host, activity.process].append(activity)
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
  lines = [
    shown(status.directory) + (f"  model {model}" if model else ""),
    f"  shards   {', '.join(parts)} of {shards['total']:,}",
    f"  {kind:<7}  {images['done']:,} of {images['total']:,} ({share:.1f}%), {images['failed']:,} failed",
    f"  rate     {_speed(status)}",
  ]
  for i, host in enumerate(status.hosts):
    at = f"on {', '.join(host['running'])}" if host["running"] else f"last seen {duration(host['last'])} ago"
    rate = f", {host['rate']:.1f} a second" if host["rate"] and kind == "images" else ""
    label = "hosts" if i == 0 else ""
    name = f"{host['host']} process {host['process']}"
    lines.append(f"  {label:<7}  {name}: {host['images']:,} {kind}{rate}, {at}")
  lines += _failure_lines(status)
  lines += [f"  {'damaged' if i == 0 else '':<7}  {what}" for i, what in enumerate(status.damaged)]
  if status.damaged:
    lines.append(
      f"           sam3lt status {shown(status.directory)} --repair sets them aside, to be done again"
    )
  return "\n".join(lines)


def _speed(status: Status) -> str:
  if status.finished:
    return f"{_each(status)} over all; finished" if status.rate else "finished"
  idle = not status.shards["running"] and not files.is_remote(status.directory)
  if idle or status.rate is None:
    last = "nothing is written yet" if status.last is None else f"last written {duration(status.last)} ago"
    return "; ".join(filter(None, ["no process works on it now" if idle else "", last]))
  left = "" if status.seconds_left is None else f", {duration(status.seconds_left)} to go"
  return f"{_each(status)} lately{left}"


def _each(status: Status) -> str:
  if status.settings.get("video"):
    return f"{3600 * status.rate:.1f} clips an hour"
  return f"{status.rate:.1f} images a second"


def _failure_lines(status: Status) -> list[str]:
  lines = []
  for reason, count in status.failures.items():
    label = "" if lines else "failed"
    lines.append(f"  {label:<7}  {count:,} {reason}")
    examples = [record for record in status.examples if record["error"] == reason]
    lines += [
      f"             {shown(record['id'])}: {shown(record.get('message', ''))}" for record in examples
    ]
  return lines


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
