"""What a batch job costs beside the bare forward, and what it takes: `python -m tests.benchmarks.job`.

    throughput  images/s of the job and of its compiled programs alone, in turn, in one process
    memory      resident memory while small images go by: it must not grow with their number
    start       new process to first written record, compilation cache empty and warm
    kill        time and images lost by a SIGKILL in the middle and a restart
    scaling     1, 2, 4, 8 forced host devices: they share the machine's cores, so that it is the even split
                of the work that shows, not speed

`--json FILE` keeps the numbers; the tables are for docs/jobs.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
PARTS = ("throughput", "memory", "start", "kill", "scaling")
PHRASES = ["a dog", "two yellow cats"]


@dataclasses.dataclass
class Task:
  """What a child process does: one job, with what is to be watched."""

  model: str
  source: str
  out: str
  batch: int | None = None
  shard_size: int | None = None
  watch: bool = False
  kill_after: int | None = None
  bare: int = 0  # rounds of the job against the bare forward


def small_config(image_size: int = 336) -> Any:
  """Some 10 GFLOP an image: large enough that the pipeline's share means something, seconds to compile."""
  from sam3lt_jax.config import Sam3LiteTextConfig, VisionConfig
  from tests import tiny

  vision = VisionConfig(
    hidden_size=384, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=6,
    image_size=image_size, window_size=8, pretrain_image_size=image_size, fpn_hidden_size=64,
    global_attn_indexes=(3, 7),
  )  # fmt: skip
  part = {"hidden_size": 64, "num_attention_heads": 4}
  base = tiny.config(vocab_size=49408)
  layers = {
    name: dataclasses.replace(getattr(base, name), **part, intermediate_size=256)
    for name in ("geometry_encoder", "detr_encoder", "detr_decoder")
  }
  layers["detr_decoder"] = dataclasses.replace(layers["detr_decoder"], num_queries=50)
  masks = dataclasses.replace(base.mask_decoder, **part)
  return Sam3LiteTextConfig(vision=vision, text=base.text, mask_decoder=masks, profile=base.profile, **layers)


def predictor(model: str) -> Any:
  """ "tiny", "small", or what `Predictor.from_pretrained` takes."""
  from sam3lt_jax import Predictor, from_pretrained
  from tests import tiny

  if model in ("tiny", "small"):
    config = tiny.config(vocab_size=49408) if model == "tiny" else small_config()
    return Predictor(*from_pretrained("random:tiny", config, progress=False))
  return Predictor.from_pretrained(model)


def make_photos(folder: pathlib.Path, count: int, size: tuple[int, int]) -> None:
  """JPEG files of (width, height) that compress about as photos do."""
  from PIL import Image

  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  for i in range(count):
    if i < 20:
      coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 20, size[0] // 20, 3)).astype(np.uint8))
      fine = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
      fine = fine + rng.normal(0, 6, fine.shape).astype(np.int16)
      Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(folder / f"{i:06d}.jpg", quality=90)
    else:
      shutil.copyfile(folder / f"{i % 20:06d}.jpg", folder / f"{i:06d}.jpg")


# -------------------------------------------------------------------- the process that is measured


def child(task: Task) -> dict[str, Any]:
  from sam3lt_jax.jobs import run

  started = float(os.environ["BENCHMARK_STARTED"])
  found: dict[str, Any] = {"first_s": None, "rss": []}

  class Watch(run.Progress):
    done = 0

    def advance(self, failed: bool) -> None:
      self.done += 1
      if self.done == 1:
        found["first_s"] = time.time() - started
      if task.watch and self.done % 50 == 0:
        found["rss"].append([self.done, resident_mb()])
      if task.kill_after == self.done:
        os.kill(os.getpid(), signal.SIGKILL)

  loaded = predictor(task.model)
  config = run.JobConfig(
    task.source, task.out, phrases=PHRASES, threshold=threshold(loaded), batch=task.batch,
    shard_size=task.shard_size,
  )  # fmt: skip
  if task.bare:
    return against_bare(run, config, loaded, task.bare)
  summary = run.run_job(config, predictor=loaded, progress=Watch())
  return found | summary.to_json() | {"total_s": time.time() - started}


def threshold(loaded: Any) -> float:
  """One that about three of random weights' finds an image are above, as photos have."""
  rng = np.random.default_rng(1)
  results = loaded(rng.integers(0, 256, (200, 300, 3)).astype(np.uint8), PHRASES, threshold=0.0)
  scores = np.sort(results.scores)
  return float(scores[-min(4, len(scores))])


def against_bare(run: Any, config: Any, loaded: Any, rounds: int) -> dict[str, Any]:
  """The job and its programs alone, in turn; seconds an image of each, round by round."""
  from sam3lt_jax.jobs import reading, sources
  from sam3lt_jax.processing.prompts import Prompt

  made = []

  def engine(*arguments, **options):
    if not made:
      made.append(Engine(*arguments, **options))
    return made[0]

  Engine, run.Engine = run.Engine, engine
  items = list(sources.list_items(config.source))
  pixels = [reading.read_image(item, loaded.processor.image_size).pixels for item in items[:20]]
  prompts = tuple(Prompt(phrase) for phrase in PHRASES)
  seconds: dict[str, list[float]] = {"job": [], "bare": []}
  busy = []
  for turn in range(rounds + 1):
    out = f"{config.out}-{turn}"
    summary = run.run_job(dataclasses.replace(config, out=out), predictor=loaded)
    shutil.rmtree(out)
    one = made[0]
    one.on_start = lambda start, output: None
    start = time.perf_counter()
    for first in range(0, len(items), one.rows):
      rows = [pixels[i % len(pixels)] for i in range(first, min(first + one.rows, len(items)))]
      asked = [one.asked(None, (1, 1), prompts)] * len(rows)
      vision = one.encode(rows)
      found = [one.detect(vision, call) for call in one.calls(asked)]
      found[-1].scores.block_until_ready()
    bare = time.perf_counter() - start
    if turn:  # the first one compiles
      seconds["job"].append((summary.seconds - summary.startup_s) / len(items))
      seconds["bare"].append(bare / len(items))
      busy.append(summary.device_busy)
  return {"seconds": seconds, "device_busy": busy, "batch": made[0].image_buckets[-1], "images": len(items)}


def resident_mb(pid: int | str = "self") -> float | None:
  try:
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:"))
  except (OSError, StopIteration):
    return None


# -------------------------------------------------------------------- the measurements


def spawn(
  task: Task, devices: int = 1, cache: str | None = None, timeout: float = 7200
) -> dict[str, Any] | None:
  """Runs a child; None if it was killed as the task says."""
  environment = os.environ | {
    "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
    "JAX_NUM_CPU_DEVICES": str(devices),
    "BENCHMARK_STARTED": repr(time.time()),
  }
  if cache is not None:
    environment |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  command = [sys.executable, "-m", "tests.benchmarks.job", "--child", json.dumps(dataclasses.asdict(task))]
  done = subprocess.run(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=timeout
  )
  if task.kill_after and done.returncode == -signal.SIGKILL:
    return None
  if done.returncode:
    raise RuntimeError(f"the measured process failed with exit status {done.returncode}")
  return json.loads(done.stdout.splitlines()[-1])


def throughput(args: argparse.Namespace, work: pathlib.Path) -> list[dict]:
  make_photos(work / "photos", args.images, (args.width, args.height))
  task = Task(args.model, str(work / "photos"), str(work / "out"), args.batch, bare=args.rounds)
  found = spawn(task, cache=str(work / "cache"))
  job, bare = (statistics.median(found["seconds"][name]) for name in ("job", "bare"))
  return [
    {"what": "bare forward, images/s", "value": 1 / bare},
    {"what": "job, images/s", "value": 1 / job},
    {"what": "the pipeline's cost, % of the forward", "value": 100 * (job / bare - 1)},
    {"what": "devices busy, %", "value": 100 * statistics.median(found["device_busy"])},
  ]


def memory(args: argparse.Namespace, work: pathlib.Path) -> list[dict]:
  make_photos(work / "photos", args.many, (160, 120))
  found = spawn(Task("tiny", str(work / "photos"), str(work / "out"), args.batch, watch=True))
  rows = []
  for share in (0.1, 0.25, 0.5, 1.0):
    seen = [rss for done, rss in found["rss"] if done <= share * args.many]
    if seen:
      rows.append(
        {"what": f"resident after {round(share * args.many)} of {args.many} images, MB", "value": seen[-1]}
      )
  return rows


def start(args: argparse.Namespace, work: pathlib.Path) -> list[dict]:
  make_photos(work / "photos", 4, (args.width, args.height))
  rows = []
  for how in ("cold", "warm"):
    found = spawn(
      Task(args.model, str(work / "photos"), str(work / how), args.batch), cache=str(work / "cache")
    )
    rows += [
      {"what": f"process start to first record, cache {how}, s", "value": found["first_s"]},
      {"what": f"of which compiling, cache {how}, s", "value": found["compile_s"]},
    ]
  return rows


def kill(args: argparse.Namespace, work: pathlib.Path) -> list[dict]:
  make_photos(work / "photos", args.images, (args.width, args.height))
  cache, photos = str(work / "cache"), str(work / "photos")
  task = lambda out, **more: Task(args.model, photos, str(work / out), args.batch, **more)  # noqa: E731
  spawn(task("warm-up"), cache=cache)
  whole = spawn(task("whole"), cache=cache)["total_s"]
  began = time.perf_counter()
  spawn(task("killed", kill_after=args.images // 2), cache=cache)
  first = time.perf_counter() - began
  again = spawn(task("killed"), cache=cache)
  # Records come in groups: up to a group was in work, and is done a second time.
  return [
    {"what": "without a kill, s", "value": whole},
    {"what": "killed in the middle and restarted, s", "value": first + again["total_s"]},
    {"what": "lost, s", "value": first + again["total_s"] - whole},
    {"what": "of which starting again, s", "value": again["startup_s"] + again["compile_s"]},
    {"what": "images that were on the disk at the kill", "value": args.images - again["images"]},
  ]


def scaling(args: argparse.Namespace, work: pathlib.Path) -> list[dict]:
  make_photos(work / "photos", args.images, (args.width, args.height))
  rows = []
  for devices in (1, 2, 4, 8):
    task = Task(args.model, str(work / "photos"), str(work / f"out{devices}"), batch=1)
    spawn(task, devices, str(work / "cache"))
    shutil.rmtree(task.out)
    found = spawn(task, devices, str(work / "cache"))
    rows.append({"what": f"{devices} devices: images/s", "value": found["images"] / found["run_s"]})
    groups = -(-found["images"] // devices)
    rows.append({"what": f"{devices} devices: images a device", "value": found["images"] / devices})
    rows.append({"what": f"{devices} devices: rows that are padding, %",
                 "value": 100 * (1 - found["images"] / (groups * devices))})  # fmt: skip
  return rows


def table(part: str, rows: list[dict]) -> str:
  lines = [f"| {part} | |", "| --- | ---: |"]
  return "\n".join([*lines, *(f"| {row['what']} | {row['value']:.4g} |" for row in rows), ""])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--child", help=argparse.SUPPRESS)
  parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
  parser.add_argument("--model", default="small", help="tiny, small, or a released variant (default: small)")
  parser.add_argument("--images", type=int, default=60, help="of throughput, kill and scaling")
  parser.add_argument("--many", type=int, default=2000, help="small images, of memory")
  parser.add_argument("--rounds", type=int, default=3, help="of throughput, after a warm-up")
  parser.add_argument("--batch", type=int, help="images a device")
  parser.add_argument("--width", type=int, default=640)
  parser.add_argument("--height", type=int, default=480)
  parser.add_argument("--json", metavar="FILE")
  args = parser.parse_args()
  if args.child:
    print(json.dumps(child(Task(**json.loads(args.child)))))
    return
  measured: dict[str, Any] = {"arguments": vars(args), "load_average": os.getloadavg()[0]}
  for part in args.parts:
    with tempfile.TemporaryDirectory() as work:
      measured[part] = globals()[part](args, pathlib.Path(work))
    print(table(part, measured[part]), flush=True)
    if args.json:
      pathlib.Path(args.json).write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
  main()
