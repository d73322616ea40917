"""Peak memory and time to first result: each side alone in a fresh process.

The child (`python -m tests.benchmarks.processes ...`) loads the checkpoint, goes from file to results twice
and prints one line of JSON. The parent watches its anonymous memory, which leaves the mapped checkpoint out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from tests.benchmarks import workload as workloads
from tests.benchmarks.timing import OURS, REFERENCE, Elsewhere, Row, say
from tests.benchmarks.workload import Workload

POLL = 0.05
ROOT = pathlib.Path(__file__).parents[2]
# What jax calls the steps of a compilation.
_EVENTS = {
  "compile_s": ("backend_compile_duration",),
  "trace_s": ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration"),
}
COLD, WARM = "cache cold", "cache warm"


def measure(workload: Workload, dtype: str, repeats: int, parts: list[str]) -> list[Row]:
  """Rows of the parts "memory" and "start" (both come from the same processes)."""
  runs: dict[str, dict[str, list[dict]]] = {OURS: {COLD: [], WARM: []}, REFERENCE: {"eager": []}}
  watch = Elsewhere()
  for _ in range(min(repeats, 3)):  # whole processes: minutes each at full size, and they vary little
    with tempfile.TemporaryDirectory() as cache:
      runs[OURS][COLD].append(_spawn(workload, OURS, dtype, cache))
      runs[REFERENCE]["eager"].append(_spawn(workload, REFERENCE, dtype, cache))
      runs[OURS][WARM].append(_spawn(workload, OURS, dtype, cache))
  rows = []
  if "memory" in parts:
    rows += _memory_rows(runs, dtype)
  if "start" in parts:
    rows += _start_rows(runs, dtype)
  return [dataclasses.replace(row, elsewhere=watch.share()) for row in rows]


def _column(runs, side: str, key: str, variants=None) -> dict[str, list[float]]:
  return {
    variant: [run[key] for run in found]
    for variant, found in runs[side].items()
    if (variants is None or variant in variants) and all(run.get(key) is not None for run in found)
  }


def _memory_rows(runs, dtype: str) -> list[Row]:
  def row(what, key, variants, note=""):
    ours, reference = _column(runs, OURS, key, variants), _column(runs, REFERENCE, key)
    return Row("memory", what, dtype, ours, reference, "MB", note)

  return [
    row("peak resident, end to end, compiling", "peak_mb", (COLD,)),
    row("peak resident, end to end, compilation cached", "peak_mb", (WARM,)),
    row("peak anonymous, end to end, compiling", "anonymous_mb", (COLD,), "without mapped files; polled"),
    row("resident after loading", "loaded_mb", (WARM,)),
    row("resident after imports", "imported_mb", (WARM,)),
  ]


def _start_rows(runs, dtype: str) -> list[Row]:
  def row(what, key, variants=(COLD, WARM), note=""):
    rows = _column(runs, OURS, key, variants), _column(runs, REFERENCE, key)
    return Row("start", what, dtype, *rows, note=note)

  return [
    row("new process to first result, empty compilation cache", "total_s", (COLD,)),
    row("new process to first result, warm compilation cache", "total_s", (WARM,)),
    row("of which imports", "import_s", (WARM,)),
    row("of which loading the checkpoint", "load_s", (WARM,)),
    row("first call, empty compilation cache", "first_s", (COLD,)),
    row("first call, warm compilation cache", "first_s", (WARM,)),
    row("second call", "second_s"),
    row("tracing and lowering", "trace_s", (COLD,), "as jax reports it; included above"),
    row("XLA compilation", "compile_s", (COLD,), "as jax reports it; included above"),
    row("XLA compilation, warm cache", "compile_s", (WARM,), "retrieval included"),
  ]


def _spawn(workload: Workload, side: str, dtype: str, cache: str) -> dict:
  command = [sys.executable, "-m", "tests.benchmarks.processes", side, dtype, workloads.to_json(workload)]
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": cache,
    # The default keeps nothing that compiled in under a second.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "BENCHMARK_STARTED": repr(time.time()),
  }
  process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
  anonymous = 0.0
  try:
    while process.poll() is None:
      anonymous = max(anonymous, _status_mb("RssAnon", process.pid) or 0.0)
      time.sleep(POLL)
    out = process.stdout.read()
  finally:
    process.kill()
    process.wait()
    process.stdout.close()
  if process.returncode:
    raise RuntimeError(f"the benchmark's {side} process failed with exit status {process.returncode}")
  result = json.loads(out.splitlines()[-1]) | {"anonymous_mb": anonymous or None}
  peak = f"{result['peak_mb']:.0f} MB" if result["peak_mb"] else "unknown"
  say(f"process, {side}, {dtype}: first result after {result['total_s']:.1f} s, peak {peak}")
  return result


def _status_mb(field: str, pid: int | str = "self") -> float | None:
  """A field of /proc/<pid>/status in MB (10^6 bytes); None where there is no such thing."""
  try:
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as f:
      line = next(line for line in f if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024 / 1e6
  except (OSError, StopIteration, ValueError):
    return None


def child(side: str, dtype: str, workload: Workload) -> dict:
  """Runs one side; the keys are what the rows above read."""
  started = float(os.environ["BENCHMARK_STARTED"])
  result: dict = {"trace_s": None, "compile_s": None}
  if side == OURS:
    import jax

    durations: list[tuple[str, float]] = []
    jax.monitoring.register_event_duration_secs_listener(lambda e, s, **_: durations.append((e, s)))
    import sam3lt_jax

    sam3lt_jax.Predictor  # noqa: B018 - loads the model's modules, which `import` alone leaves for later
  else:
    from convert import torch_reference

    torch_reference.import_reference()
  from tests.benchmarks import sides

  result |= {"import_s": time.time() - started, "imported_mb": _status_mb("VmRSS")}
  start = time.perf_counter()
  loaded = (sides.Ours if side == OURS else sides.Reference)(workload, dtype)
  result |= {"load_s": time.perf_counter() - start, "loaded_mb": _status_mb("VmRSS")}
  for call in ("first", "second"):
    start = time.perf_counter()
    loaded.end_to_end(workload.photos[:1], workloads.PHRASE, workload.threshold)
    result[f"{call}_s"] = time.perf_counter() - start
    result.setdefault("total_s", time.time() - started)
  result["peak_mb"] = _status_mb("VmHWM")
  if side == OURS:
    for key, events in _EVENTS.items():
      result[key] = sum(s for event, s in durations if event.rpartition("/")[2] in events)
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("side", choices=(OURS, REFERENCE))
  parser.add_argument("dtype")
  parser.add_argument("workload")
  args = parser.parse_args()
  print(json.dumps(child(args.side, args.dtype, workloads.from_json(args.workload))))


if __name__ == "__main__":
  main()
