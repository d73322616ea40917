"""What a run of a job did, and how well its stages kept the devices at work."""

from __future__ import annotations

import collections
import dataclasses
import json
import time
from typing import Any

from sam3lt_jax.jobs import files


@dataclasses.dataclass
class Summary:
  """One process's run.

  Attributes:
    process: "0 of 1"; out: the job's folder.
    shards, shards_done, shards_left: of the whole job: all, committed by this run, not committed by anyone.
    shards_busy: left to another process that worked on them.
    images: records written by this run, failures included; images_before: those of earlier runs (as far as
      this run looked); instances: found in them. Of a job of clips (`video`) clips, and objects; `frames`.
    failures: reason -> how many, of this run.
    seconds: all of it; startup_s: listing, loading and compiling ahead, part of it.
    run_s: from the first program's start on the devices to the end of their last, without compilation;
      device_busy: the share of it in which they had something to do.
    decode_wait_s: waiting for images with nothing else to do; write_wait_s: for room to write.
    stopped: why it ended early, or None. too_many_failures, signal: whether it was for these.
  """

  process: str
  out: str
  shards: int
  shards_done: int = 0
  shards_left: int = 0
  shards_busy: int = 0
  images: int = 0
  images_before: int = 0
  instances: int = 0
  failures: dict[str, int] = dataclasses.field(default_factory=collections.Counter)
  devices: int = 0
  batch: int = 0
  seconds: float = 0.0
  startup_s: float = 0.0
  compile_s: float = 0.0
  run_s: float = 0.0
  device_busy: float | None = None
  decode_wait_s: float = 0.0
  write_wait_s: float = 0.0
  stopped: str | None = None
  too_many_failures: bool = False
  signal: int | None = None
  video: bool = False
  frames: int = 0
  started: float = dataclasses.field(default_factory=time.perf_counter)

  @property
  def exit_code(self) -> int:
    """0; 1 if it stopped for too many failures; 128 and the signal's number if a signal ended it."""
    if self.signal is not None:
      return 128 + self.signal
    return 1 if self.too_many_failures else 0

  def count(self, record: dict[str, Any]) -> None:
    self.images += 1
    self.instances += record.get("objects", len(record.get("results", ())))
    if "error" in record:
      self.failures[record["error"]] += 1

  def finish(self, plan: Any) -> Summary:
    self.seconds = time.perf_counter() - self.started
    self.shards_left = self.shards - len(plan.committed())
    return self

  def to_json(self) -> dict[str, Any]:
    values = dataclasses.asdict(self) | {"failures": dict(self.failures)}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items() if k != "started"}

  def __str__(self) -> str:
    kind, found = ("clips", "objects") if self.video else ("images", "instances")
    lines = []
    if not self.images and not self.shards_left and self.stopped is None:
      lines.append(f"nothing to do: all {self.images_before} {kind} were done before")
    else:
      before = f" ({self.images_before} were done before)" if self.images_before else ""
      rate = f", {self.images / self.run_s:.2f} images/s" if self.run_s else ""
      frames = f", {self.frames} frames" if self.video else ""
      lines.append(
        f"{self.images} {kind}{frames} in {self.seconds:.1f} s{rate}{before}: {self.instances} {found} found"
      )
    if failed := sum(self.failures.values()):
      reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.failures.items()))
      lines.append(f"{failed} {kind} failed: {reasons}")
    if self.device_busy is not None:
      lines.append(
        f"devices ({self.devices}, {self.batch} images each) busy {100 * self.device_busy:.0f}% of"
        f" {self.run_s:.1f} s; waited {self.decode_wait_s:.1f} s for images, {self.write_wait_s:.1f} s for"
        f" writing; start-up {self.startup_s:.1f} s, compilation {self.compile_s:.1f} s"
      )
    if self.stopped is not None:
      lines.append(f"{self.stopped}; the same command goes on from here")
    elif self.shards_left:
      busy = f" ({self.shards_busy} in work elsewhere)" if self.shards_busy else ""
      lines.append(f"{self.shards_left} of {self.shards} shards are not done yet{busy}")
    return "\n".join(lines)

  def write(self, process: int) -> None:
    """Keeps it in OUT/runs, for whoever asks later how it went."""
    folder = files.join(self.out, "runs")
    files.make_folder(folder)
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{process:05d}.json"
    files.write_atomic(files.join(folder, name), json.dumps(self.to_json(), indent=1).encode() + b"\n")
