"""A job in a process of its own, as the number of devices is set before JAX starts.

python -m tests.jobs.worker '{"jobs": [{"out": ...}], "kill_after": 3, "join": true}'

"jobs": options of `JobConfig`, run one after the other. "kill_after": so many records are written, then the
process ends as by `kill -9`. "stop_after": the same, by SIGTERM. "join": joins the other processes first, as
`tpu.batch_inference` does. "mark" and "mark_after": the file is made when so many records are written;
"wait_for": after the first record it waits for these files, so that no process runs away with the job. Prints
one line of JSON: the summaries and what the programs looked like.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import sys
import time

import jax

from sam3lt_jax.jobs import pipeline, run
from tests.jobs import pictures
from tpu import batch_inference

COLLECTIVES = r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"


class Watch(run.Progress):
  """Acts when so many records are written, as the task says."""

  def __init__(self, task: dict):
    self._task, self._written = task, 0

  def advance(self, failed: bool) -> None:
    self._written += 1
    if self._written == self._task.get("mark_after"):
      pathlib.Path(self._task["mark"]).touch()
    if self._written == 1:
      end = time.monotonic() + 200
      while not all(os.path.exists(mark) for mark in self._task.get("wait_for", ())):
        assert time.monotonic() < end, "the others did not come"
        time.sleep(0.02)
    for key, number in (("kill_after", signal.SIGKILL), ("stop_after", signal.SIGTERM)):
      if self._written == self._task.get(key):
        os.kill(os.getpid(), number)


def main(task: dict) -> dict:
  # Little is in work when the process is ended, and what it has counted is written.
  pipeline.FLUSH_RECORDS = 1
  writer = pipeline.Writer
  pipeline.Writer = lambda room, on_record: writer(2, on_record)
  number, count = batch_inference.join("auto") if task.get("join") else (0, 1)
  found: dict = {"process": [number, count], "devices": jax.local_device_count(), "runs": []}
  engines = []

  class Engine(run.Engine):
    def __init__(self, *arguments, **options):
      super().__init__(*arguments, **options)
      engines.append(self)

  run.Engine = Engine
  for options in task["jobs"]:
    if count > 1:
      options |= {"process_index": number, "process_count": count}
    summary = run.run_job(run.JobConfig(**options), predictor=pictures.predictor(), progress=Watch(task))
    made = engines.pop().programs().values() if engines else []
    programs = [one.as_text() for compiled in made for one in compiled]
    collectives = sum(len(re.findall(COLLECTIVES, text)) for text in programs)
    found["runs"].append(summary.to_json() | {"programs": len(programs), "collectives": collectives})
  return found


if __name__ == "__main__":
  print(json.dumps(main(json.loads(sys.argv[1]))))
