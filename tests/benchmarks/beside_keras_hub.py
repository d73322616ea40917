"""This library beside keras-hub's SAM 3 on its JAX backend: one forward pass, one image, one phrase.

  python3 -m venv /tmp/keras && /tmp/keras/bin/pip install keras-hub jax tensorflow-cpu
  python -m tests.benchmarks.beside_keras_hub --python /tmp/keras/bin/python --json keras.json

keras-hub is no dependency of this library, so it is measured from an environment of its own. Both sides are
full-size models with random weights, each in a process of its own; they run in turn, one waiting while the
other computes. `compare --load` puts the JSON into docs/benchmarks.md. keras-hub's model holds SAM 3's text
encoder, and every prompt of it has a box, here one that is marked as padding.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
OURS, KERAS = "ours", "keras-hub"
GO = "go"
CONTEXT = 32
NO_BOX = -10  # keras-hub's label of a box that is padding


def keras_forward(size: str, dtype: str) -> Callable[[], Any]:
  """One forward pass of keras-hub's SAM 3. Full size: the dimensions of SAM 3's published configuration."""
  os.environ["KERAS_BACKEND"] = "jax"
  import keras_hub
  import numpy as np

  side, depth, width, layers = (1008, 32, 1024, 6) if size == "full" else (224, 4, 32, 2)
  inner = {"num_layers": layers, "dtype": dtype}
  inner |= {"hidden_dim": 256, "intermediate_dim": 2048, "num_heads": 8} if size == "full" else {
    "hidden_dim": 32, "intermediate_dim": 64, "num_heads": 2,
  }  # fmt: skip
  text = (1024, 24, 16) if size == "full" else (32, 2, 2)
  shape = {"image_shape": (side, side, 3), "patch_size": 14}
  model = keras_hub.models.SAM3PromptableConceptBackbone(
    vision_encoder=keras_hub.layers.SAM3VisionEncoder(
      **shape, num_layers=depth, hidden_dim=width, intermediate_dim=width * 37 // 8,
      num_heads=width // 64 or 2, fpn_hidden_dim=inner["hidden_dim"], fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
      window_size=side // 42,
      pretrain_image_shape=(side // 3 // 14 * 14,) * 2 + (3,),
      global_attn_indexes=[i for i in range(depth) if i % (depth // 4) == depth // 4 - 1], dtype=dtype,
    ),
    text_encoder=keras_hub.layers.SAM3TextEncoder(
      vocabulary_size=49408, embedding_dim=text[0], hidden_dim=text[0], num_layers=text[1], num_heads=text[2],
      intermediate_dim=4 * text[0], dtype=dtype,
    ),
    geometry_encoder=keras_hub.layers.SAM3GeometryEncoder(
      **(inner | {"num_layers": layers // 2}), roi_size=7
    ),
    detr_encoder=keras_hub.layers.SAM3DetrEncoder(**inner),
    detr_decoder=keras_hub.layers.SAM3DetrDecoder(**shape, **inner, num_queries=200),
    mask_decoder=keras_hub.layers.SAM3MaskDecoder(
      num_upsampling_stages=3, hidden_dim=inner["hidden_dim"], num_heads=inner["num_heads"], dtype=dtype
    ),
    dtype=dtype,
  )  # fmt: skip
  inputs = {
    "pixel_values": np.random.default_rng(0).normal(size=(1, side, side, 3)).astype(np.float32),
    "token_ids": np.arange(CONTEXT, dtype=np.int32)[None],
    "padding_mask": (np.arange(CONTEXT) < 4).astype(np.int32)[None],
    "boxes": np.zeros((1, 1, 5), np.float32),
    "box_labels": np.full((1, 1), NO_BOX, np.int32),
  }
  return lambda: model.predict_on_batch(inputs)


def our_forward(size: str, dtype: str) -> Callable[[], Any]:
  """The same of this library."""
  import jax
  import numpy as np

  from sam3lt_jax import Predictor
  from sam3lt_jax.programs import jit

  predictor = Predictor.from_pretrained("random:s0" if size == "full" else "random:tiny", dtype=dtype)
  side = predictor.model.config.vision.image_size
  forward = jit(predictor.model.apply)
  pixels = np.random.default_rng(0).normal(size=(1, side, side, 3)).astype(np.float32)
  phrase = predictor.processor(text="coffee cup")
  ids, mask = phrase.input_ids, phrase.attention_mask
  return lambda: jax.block_until_ready(forward(predictor.variables, pixels, ids, mask))


def child(side: str, size: str, dtype: str) -> None:
  """Answers each line with the seconds of a call and the process's peak memory, until stdin ends."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # libraries talk on stdout
  call = (keras_forward if side == KERAS else our_forward)(size, dtype)
  for _ in sys.stdin:
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    version = f"keras-hub {importlib.metadata.version('keras-hub')}" if side == KERAS else "jit"
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "how": version}), file=answers, flush=True)


class Side:
  """A process that makes a call when it is asked to."""

  def __init__(self, name: str, python: str, size: str, dtype: str):
    self.name = name
    command = [python, "-P", os.path.abspath(__file__), "--child", name, "--size", size, "--dtype", dtype]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} if name == OURS else os.environ
    pipe = subprocess.PIPE
    self._process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

  def call(self) -> dict[str, Any]:
    try:
      self._process.stdin.write(GO + "\n")
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # the next line says what it was
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit(f"beside_keras_hub: {self.name} ended with status {self._process.wait()}; see above")
    return json.loads(line)

  def close(self) -> None:
    self._process.stdin.close()
    self._process.stdout.close()
    self._process.wait()


def measure(python: str, size: str, dtype: str, repeats: int) -> list[Any]:
  """Rows: seconds of a forward pass, of the first call, and peak memory."""
  from tests.benchmarks.timing import Elsewhere, Row, say

  watch = Elsewhere()
  sides = [Side(OURS, sys.executable, size, dtype), Side(KERAS, python, size, dtype)]
  samples: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
  for _ in range(1 + repeats):
    for side in sides:
      samples[side.name].append(side.call())
      say(f"{side.name}, {dtype}: {samples[side.name][-1]}")
  for side in sides:
    side.close()

  def row(what: str, key: str, chosen: slice, unit: str, note: str = "") -> Row:
    columns = [{found[0]["how"]: [s[key] for s in found[chosen]]} for found in samples.values()]
    return Row("keras_hub", what, dtype, *columns, unit=unit, note=note, elsewhere=watch.share())

  model = "one image, one phrase" if size == "full" else "tiny models of different sizes"
  return [
    row(f"whole forward, {model}", "seconds", slice(1, None), "s", "the other side is keras-hub on JAX"),
    row(f"first call, {model}", "seconds", slice(0, 1), "s", "with compilation"),
    row(f"peak resident, {model}", "peak_mb", slice(-1, None), "MB"),
  ]


def main(arguments: Sequence[str] | None = None) -> int:
  formatter = argparse.RawDescriptionHelpFormatter
  parser = argparse.ArgumentParser(prog="beside_keras_hub", description=__doc__, formatter_class=formatter)
  parser.add_argument("--python", help="the interpreter of an environment with keras-hub and jax")
  parser.add_argument("--size", default="full", choices=("full", "tiny"))
  parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--repeats", type=int, default=1, help="rounds after the first call (default 1)")
  parser.add_argument("--json", metavar="FILE", help="write the samples there, for compare --load")
  parser.add_argument("--child", choices=(OURS, KERAS), help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  if args.child:
    child(args.child, args.size, args.dtype)
    return 0
  if not args.python or not os.access(args.python, os.X_OK):
    parser.error(f"--python must be an interpreter that imports keras_hub, got {args.python!r}")
  if args.repeats < 1:
    parser.error(f"--repeats must be at least 1, got {args.repeats}")
  from tests.benchmarks import machine, report

  command = f"python -m tests.benchmarks.beside_keras_hub --size {args.size} --dtype {args.dtype}"
  run = report.Run(f"{command} --repeats {args.repeats} --python ...", "s0", args.repeats, machine.describe())
  run.rows = measure(args.python, args.size, args.dtype, args.repeats)
  run.complete = True
  if args.json:
    run.save(args.json)
  print(report.markdown(run))
  return 0


if __name__ == "__main__":
  sys.exit(main())
