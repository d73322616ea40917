"""The times that a user of a GPU or TPU sees: milliseconds, images a second.

    python -m tests.benchmarks.accelerator                     # S0, 1008 px, bfloat16
    python -m tests.benchmarks.accelerator --parts engine predictor
    python -m tests.benchmarks.accelerator --model random:tiny --image-size 84 --photos 8    # does it run

Weights are random, which changes no time. Prints the device's name and a table a part: medians, each call
waited for. `batch` and `start` run in processes of their own, with an empty compilation cache and again.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from PIL import Image

from sam3lt_jax import Predictor

PARTS = ("engine", "predictor", "clicks", "start", "batch")
PHOTO = (853, 1280)  # height, width
KEPT = 10
_START = """
import sys, time
from sam3lt_jax import Predictor
source, size, dtype, photo = sys.argv[1:5]
predictor = Predictor.from_pretrained(source, image_size=int(size) or None, dtype=dtype)
predictor(photo, text="a coffee cup", threshold=0.9)
"""


def milliseconds(call: Callable[[], object], repeats: int) -> float:
  """Median of calls that are waited for, after two."""
  times = []
  for i in range(repeats + 2):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
    if i == 1:
      times = []
  return 1e3 * statistics.median(times)


def engine(predictor: Predictor, args: argparse.Namespace) -> list[tuple[str, float, str]]:
  """What the devices do: one after the other, nothing of the host's beside it."""
  one, side = predictor.engine, predictor.processor.image_size
  rng, rows = np.random.default_rng(0), []
  photos = list(rng.integers(0, 256, (8, side, side, 3)).astype(np.uint8))
  maps = jax.jit(lambda v, x: one.model.apply(v, x, method="neck_maps"))
  for count in (1, 8):
    pixels = jax.device_put(np.stack(photos[:count]).astype(np.float32) / 127.5 - 1, one.devices[0])
    ms = milliseconds(lambda pixels=pixels: maps(one.variables, pixels), args.repeats)
    rows.append((f"vision encoder, {count} image{'s' * (count > 1)}", ms, f"{count / ms * 1e3:.1f} images/s"))
  vision = one.encode(photos[:1])
  ms = milliseconds(lambda: one.encode(photos[:1]), args.repeats)
  rows.append(("encode (bytes up, vision encoder, what prompts share), 1 image", ms, ""))
  from sam3lt_jax.processing.prompts import Prompt

  for count in (1, 16):
    asked = [one.asked(None, PHOTO, [Prompt(f"thing {i}") for i in range(count)])]
    calls = one.calls(asked)
    ms = milliseconds(lambda calls=calls: [one.detect(vision, call) for call in calls], args.repeats)
    rows.append(
      (f"detect, {count} phrase{'s' * (count > 1)}", ms, f"{len(calls)} call{'s' * (len(calls) > 1)}")
    )
  asked = one.calls([one.asked(None, PHOTO, [Prompt("thing 0")])])
  ms = milliseconds(lambda: one.detect(one.encode(photos[:1]), asked[0]), args.repeats)
  rows.append(("a photo with one phrase, on the device", ms, ""))
  return rows


def predictor(one: Predictor, args: argparse.Namespace, photo: str) -> list[tuple[str, float, str]]:
  """From a file to results on the host; a threshold that keeps some ten instances, as photos have."""
  scores = np.sort(one(photo, text="a coffee cup", threshold=0.0).scores)[::-1]
  threshold = float(scores[min(KEPT, len(scores) - 1)])
  kept = len(one(photo, text="a coffee cup", threshold=threshold))
  new = iter(range(10**6))
  rows = []
  ms = milliseconds(lambda: one(photo, text=f"cup {next(new)}", threshold=threshold) and None, args.repeats)
  rows.append(("photo file to results, a new phrase", ms, f"about {kept} kept"))
  one.set_image(photo)
  ms = milliseconds(lambda: one.predict(text=f"cup {next(new)}", threshold=threshold) and None, args.repeats)
  rows.append(("a further phrase", ms, f"about {kept} kept"))
  many = lambda: [f"cup {next(new)}" for _ in range(64)]  # noqa: E731
  ms = milliseconds(lambda: one.predict(text=many(), threshold=0.99) and None, max(args.repeats // 4, 2))
  rows.append(("64 new phrases", ms, "0 kept"))
  for what in ("stream of 64 photos, an image, compiling included", "the same again"):
    start = time.perf_counter()
    found = sum(1 for _ in one.stream([photo] * 64, text="a coffee cup", threshold=threshold))
    ms = (time.perf_counter() - start) / found * 1e3
    rows.append((what, ms, f"{1e3 / ms:.1f} images/s"))
  return rows


def clicks(args: argparse.Namespace, photo: str) -> list[tuple[str, float, str]]:
  """About one photo; with random weights as many masks are kept as the thresholds are made for."""
  one = Predictor.from_pretrained(
    args.model, tracker=args.tracker or True, dtype=args.dtype, image_size=args.image_size
  ).set_image(photo)
  rng, rows = np.random.default_rng(0), []

  def points(count):
    return rng.uniform(0, min(PHOTO), (count, 1, 2))

  ms = milliseconds(lambda: one.predict(points=points(1)) and None, args.repeats)
  rows.append(("a click on an encoded photo, to its mask", ms, ""))
  ms = milliseconds(lambda: one.predict(points=points(64)) and None, max(args.repeats // 4, 2))
  rows.append(("64 objects, a click each", ms, ""))
  loose = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
  ious = [record["predicted_iou"] for record in one.generate_masks(photo, **loose, points_per_side=8)]
  loose["pred_iou_thresh"] = float(np.quantile(ious, 0.9))  # a tenth is kept, some 300 of 3072
  kept = len(one.generate_masks(photo, **loose))
  ms = milliseconds(lambda: one.generate_masks(photo, **loose) and None, 3)
  rows.append(("everything, 1024 points, from the file", ms, f"{kept} kept"))
  return rows


def start(args: argparse.Namespace, photo: str, cache: str) -> list[tuple[str, float, str]]:
  rows = []
  for how in ("cold", "warm"):
    began = time.perf_counter()
    command = [sys.executable, "-c", _START, args.model, str(args.image_size or 0), args.dtype, photo]
    _run(command, cache)
    rows.append((f"new process to its first result, cache {how}", 1e3 * (time.perf_counter() - began), ""))
  return rows


def batch(args: argparse.Namespace, folder: pathlib.Path, cache: str) -> list[tuple[str, float, str]]:
  rows = []
  for how in ("cold", "warm"):
    out = folder / f"found-{how}"
    command = [
      sys.executable, "-m", "sam3lt_jax", "batch", str(folder / "photos"), "--prompts", "a cup",
      "a spoon",
      "--model", args.model, "--dtype", args.dtype, "--threshold", "0.9", "--out", str(out), "--json",
      *(("--image-size", str(args.image_size)) if args.image_size else ()),
    ]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(command, env=_environment(cache), stdout=subprocess.PIPE, text=True)
    first = None
    while process.poll() is None and first is None:
      if any(p.stat().st_size for p in out.glob("shards/*.jsonl*")):
        first = time.perf_counter() - began
      time.sleep(0.05)
    summary = json.loads(process.communicate()[0].splitlines()[-1])
    if process.returncode:
      raise RuntimeError(f"sam3lt batch ended with {process.returncode}")
    rate, busy = summary["images"] / summary["run_s"], 100 * summary["device_busy"]
    rows.append((f"sam3lt batch, start to first record, cache {how}", 1e3 * (first or 0), ""))
    rows.append(
      ("  an image, start-up left out", 1e3 / rate, f"{rate:.1f} images/s, devices busy {busy:.0f}%")
    )
  return rows


def _environment(cache: str) -> dict[str, str]:
  cached = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
  return os.environ | cached


def _run(command: list[str], cache: str) -> None:
  subprocess.run(command, env=_environment(cache), check=True)


def make_photos(folder: pathlib.Path, count: int) -> None:
  """JPEGs of the goal's size, smooth with some detail, all different."""
  folder.mkdir()
  for i in range(count):
    small = np.random.default_rng(i).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(small).resize(PHOTO[::-1], Image.Resampling.BICUBIC).save(
      folder / f"{i:04d}.jpg", quality=90
    )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
  parser.add_argument("--model", default="random:s0")
  parser.add_argument("--tracker", help="of the part clicks; default: in --model itself")
  parser.add_argument("--image-size", type=int)
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--photos", type=int, default=512, help="of the batch job")
  parser.add_argument("--repeats", type=int, default=20)
  args = parser.parse_args()
  device = jax.devices()[0]
  print(f"{args.model}, {args.dtype}, jax {jax.__version__} on {device.device_kind} ({device.platform})")
  if device.platform != "cpu":
    # The parts below share the device with the processes that they start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  with tempfile.TemporaryDirectory() as work:
    folder, cache = pathlib.Path(work), f"{work}/cache"
    make_photos(folder / "photos", args.photos if "batch" in args.parts else 1)
    photo = str(folder / "photos" / "0000.jpg")
    loaded = None
    for part in args.parts:
      if part in ("engine", "predictor") and loaded is None:
        loaded = Predictor.from_pretrained(args.model, dtype=args.dtype, image_size=args.image_size)
      if part == "engine":
        rows = engine(loaded, args)
      elif part == "predictor":
        rows = predictor(loaded, args, photo)
      elif part == "clicks":
        rows = clicks(args, photo)
      elif part == "start":
        rows = start(args, photo, cache)
      else:
        rows = batch(args, folder, cache)
      print(f"\n| {part} | ms | |\n| --- | ---: | --- |")
      for what, ms, note in rows:
        print(f"| {what} | {ms:.2f} | {note} |", flush=True)


if __name__ == "__main__":
  main()
