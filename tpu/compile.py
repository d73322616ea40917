"""The library's programs, compiled for a TPU that is not there, by the compiler that a TPU machine runs.

    pip install 'sam3lt_jax[tpu]'
    python -m tpu.compile                                  # one chip and four of v5e, a table on the screen
    python -m tpu.compile --topology v6e:2x2 --write docs/tpu.md

Needs no TPU: libtpu compiles ahead of time on any Linux machine, Pallas kernels included. What it says of
memory, FLOPs and bytes is the same at every run and on every machine. Nothing is run, so no time is measured:
the milliseconds are what the chip's own rates allow at best.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sam3lt_jax import engine, parallel
from sam3lt_jax.checkpoints import random_init
from sam3lt_jax.checkpoints.random_init import RANDOM_CONFIGS
from sam3lt_jax.config import Sam3LiteTextConfig
from sam3lt_jax.data.batches import BatchConfig
from sam3lt_jax.features import Clicks, Prompts
from sam3lt_jax.model import Sam3LiteText
from sam3lt_jax.ops import target
from sam3lt_jax.tracker import Sam3Tracker
from sam3lt_jax.training.detection import memory
from sam3lt_jax.training.detection.lora import LoraConfig
from sam3lt_jax.training.detection.setup import FinetuneConfig
from sam3lt_jax.video import bank as banks
from sam3lt_jax.video import tracks
from tpu.chips import CHIPS, COMPILED

# -------------------------------------------------------------------- the programs


class Program(NamedTuple):
  """What is compiled: `function` of `arguments` (shapes); those that are `split` are it over a mesh."""

  function: Callable
  arguments: tuple[Any, ...]
  split: tuple[bool, ...]
  donated: tuple[int, ...] = ()


def programs(config: Sam3LiteTextConfig, ways: int) -> dict[str, Callable[[], Program]]:
  """Name -> what makes the program for `ways` devices, each with as many images as the name says."""
  model = Sam3LiteText(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  variables = jax.eval_shape(model.init_variables, jax.random.key(0))
  struct, side = jax.ShapeDtypeStruct, config.vision.image_size

  def vision(images: int) -> Program:
    pixels = struct((ways * images, side, side, 3), jnp.uint8)
    return Program(lambda v, x: engine.encode(model, False, v, x), (variables, pixels), (False, True))

  def reading(phrases: int) -> Program:
    tokens = (phrases, config.profile.context_length)
    ids, mask = struct(tokens, jnp.int32), struct(tokens, bool)
    return Program(lambda *given: engine.read(model, *given), (variables, ids, mask), (False,) * 3)

  def detection(prompts: int, boxes: int = 0) -> Program:
    function, arguments, _, _ = vision(1)
    T, D, lead = config.profile.context_length, config.detr_encoder.hidden_size, (ways, prompts)
    asked = Prompts(
      struct((*lead, T, D), jnp.bfloat16), struct((*lead, T), bool),
      struct((*lead, boxes, 4), jnp.float32), struct((*lead, boxes), jnp.int32),
    )  # fmt: skip
    features = jax.eval_shape(function, *arguments)
    return Program(
      lambda *given: engine.detect(model, *given), (variables, features, asked), (False, True, True)
    )

  tracker = Sam3Tracker(random_init.tracker_config(config), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  make = functools.partial(tracker.init_variables, trunk_width=config.vision.hidden_size)
  of_tracker = jax.eval_shape(make, jax.random.key(0))

  def neck() -> Program:
    grid = side // config.vision.patch_size
    trunk = struct((ways, grid, grid, config.vision.hidden_size), jnp.bfloat16)
    return Program(lambda t, x: engine.neck(tracker, t, x), (of_tracker, trunk), (False, True))

  def frame() -> Program:
    _, (_, pixels), _, _ = vision(1)
    return Program(
      lambda v, t, x: engine.encode_frames(model, tracker, (v, t), x), (variables, of_tracker, pixels),
      (False, False, True),
    )  # fmt: skip

  def clicks(objects: int) -> Program:
    lead, slots = (ways, objects), engine.POINT_BUCKETS[0]
    features = jax.eval_shape(neck().function, *neck().arguments)
    asked = Clicks(
      struct((*lead, slots, 2), jnp.float32), struct((*lead, slots), jnp.int32), struct((*lead, slots), bool)
    )
    return Program(
      lambda *given: engine.click(tracker, *given), (of_tracker, features, asked, struct((), jnp.float32)),
      (False, True, True, False),
    )  # fmt: skip

  def following(objects: int) -> Program:
    grid = side // config.vision.patch_size
    bank = jax.eval_shape(lambda: banks.empty(tracker.config, grid, objects, dtype=jnp.bfloat16))
    features = jax.eval_shape(neck().function, *neck().arguments)
    number = struct((), jnp.int32)
    clock, which = banks.Clock(number, number, number), struct((objects,), bool)
    return Program(
      functools.partial(tracks.advance, tracker), (of_tracker, bank, features, clock, which),
      (False,) * 5, donated=(1,),
    )  # fmt: skip

  def training() -> Program:
    tuning = FinetuneConfig(
      data=BatchConfig(batch_size=ways, prompts=1, objects=32), dtype="bfloat16", remat=True,
      lora=LoraConfig(rank=16),
    )  # fmt: skip
    setup, state, batch = memory.abstract(config, tuning)
    return Program(setup.step, (state, setup.frozen, batch), (False, False, True), (0,))

  plural = lambda n: "" if n == 1 else "s"  # noqa: E731
  found: dict[str, Callable[[], Program]] = {
    f"vision, {n} image{plural(n)}": lambda n=n: vision(n) for n in (1, 8)
  }
  found |= {f"reading {n} phrases": lambda n=n: reading(n) for n in engine.PHRASE_BATCHES}
  found |= {f"detection, {n} prompt{plural(n)}": lambda n=n: detection(n) for n in (1, 4, 16)}
  found["detection, 1 prompt with boxes"] = lambda: detection(1, engine.BOX_BUCKETS[0])
  found |= {"the tracker's neck, 1 image": neck, "a frame for the tracker": frame}
  found |= {f"clicks, {n} object{plural(n)}": lambda n=n: clicks(n) for n in (1, 64)}
  if ways == 1:  # a clip is one device's
    found |= {f"following {n} object{plural(n)}": lambda n=n: following(n) for n in (1, 8)}
  return found | {"training step, LoRA, 1 image": training}


# -------------------------------------------------------------------- the compiler


def topology(name: str) -> list[Any]:
  """The devices of a TPU slice such as "v5e:2x2", to compile for.

  Raises:
    ValueError: libtpu is not installed, or it knows no such slice.
  """
  # libtpu asks the machine which TPU it has, and lets one process in at a time, unless it is told not to.
  for variable, value in (
    ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_WORKER_HOSTNAMES", "localhost"),
    ("TPU_ACCELERATOR_TYPE", "v5litepod-4"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
  ):  # fmt: skip
    os.environ.setdefault(variable, value)
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(topology_name=name, platform="tpu").devices)
  except Exception as e:
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise ValueError(f"topology {name!r} cannot be compiled for: {reason}") from e


def compile_for(
  program: Program, devices: Sequence[Any], platform: str = "tpu", options: Mapping[str, Any] | None = None
) -> jax.stages.Compiled:
  """The program for these devices: on one, or over a mesh of all of them. options: the compiler's."""
  mesh = parallel.make_mesh(devices=list(devices))
  rows, everywhere = parallel.batch_sharding(mesh), parallel.replicated(mesh)

  def placed(tree, split):
    where = rows if split else everywhere
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

  arguments = tuple(placed(tree, split) for tree, split in zip(program.arguments, program.split, strict=True))
  with target.traced_for([platform], mesh if len(devices) > 1 else None):
    traced = jax.jit(program.function, donate_argnums=program.donated).trace(*arguments)
  return traced.lower(lowering_platforms=(platform,)).compile(compiler_options=options)


COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")


def collectives(text: str) -> dict[str, int]:
  """Of a compiled program's text, its operations between devices."""
  return dict(collections.Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text)))


@dataclasses.dataclass(frozen=True)
class Figures:
  """What the compiler says of a program, for each device.

  Attributes:
    arguments, temporaries, outputs: bytes of memory (HBM); no outputs that take an argument's place.
    flops: of products and attention kernels. None where the program has loops, whose bodies count once.
    accessed: bytes that its operations read and write one by one, in HBM and in the chip's fast memory; None
      likewise.
    cycles: the compiler's own estimate of what its operations take, one after the other; None likewise.
    kernels: name -> how many of these kernels stand in the program, as custom calls.
    collectives: likewise the operations between devices.
  """

  arguments: int
  temporaries: int
  outputs: int
  flops: float | None
  accessed: float | None
  cycles: int | None
  kernels: Mapping[str, int]
  collectives: Mapping[str, int]

  @property
  def memory(self) -> int:
    return self.arguments + self.temporaries + self.outputs


def _entry(text: str) -> str:
  """Of a compiled program's text, what runs: its operations, and not what they are made of."""
  return text[text.find("\nENTRY ") + 1 :]


def figures(compiled: jax.stages.Compiled) -> Figures:
  memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
  # An instruction's name is its kernel's and a number.
  kernel = r"%([a-z_]+)[\w.]* = [^\n]* custom-call\([^\n]*custom_call_target=\"tpu_custom_call\""
  calls = re.findall(kernel, text)
  loops = " while(" in text
  return Figures(
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    flops=None if loops else cost["flops"],
    accessed=None if loops else cost["bytes accessed"],
    cycles=None if loops else sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', _entry(text)))),
    kernels=dict(collections.Counter(name.strip("_") for name in calls)),
    collectives=collectives(text),
  )


# -------------------------------------------------------------------- the table


_KEY = ("size", "topology", "chips", "program")


def row(size: str, slice_name: str, chips: int, program: str, found: Figures) -> dict[str, Any]:
  """One line of the data: what was compiled, when and by what, and the figures."""
  versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
  day = datetime.datetime.now(datetime.UTC).date().isoformat()
  what = {"size": size, "topology": slice_name, "chips": chips, "program": program}
  return {**what, "date": day, **versions, **dataclasses.asdict(found)}


def merged(old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Rows of `old` with those of `new` in their place or behind them."""
  rows = {tuple(r[k] for k in _KEY): dict(r) for r in old}
  return list((rows | {tuple(r[k] for k in _KEY): dict(r) for r in new}).values())


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows of one size and topology as Markdown."""
  chip = CHIPS[rows[0]["topology"].partition(":")[0]]
  lines = [
    "| chips | program, on each chip | arguments GB | temporaries GB | output GB | TFLOP | GB accessed "
    "| ms by FLOPs | ms by bytes | million cycles | kernels | collectives |",
    "| ---: | --- " + "| ---: " * 8 + "| --- | --- |",
  ]
  for r in rows:
    memory = [f"{r[name] / 1e9:.2f}" for name in ("arguments", "temporaries", "outputs")]
    if r["flops"] is None:
      work = ["loops"] * 2 + [""] * 3
    else:
      by_flops, by_bytes = r["flops"] / chip.tflops / 1e9, r["accessed"] / chip.bandwidth / 1e6
      work = [f"{r['flops'] / 1e12:.2f}", f"{r['accessed'] / 1e9:.1f}", f"{by_flops:.1f}", f"{by_bytes:.1f}"]
      work.append(f"{r['cycles'] / 1e6:.1f}")
    named = [", ".join(f"{n} x {k}" for k, n in sorted(r[c].items())) for c in ("kernels", "collectives")]
    cells = [str(r["chips"]), r["program"], *memory, *work, named[0] or "none", named[1] or "none"]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


ABOUT = """# Programs on TPUs, by the TPU's own compiler

Written by `python -m tpu.compile --write`; the figures stand in `tpu/compiled.json` as well. libtpu compiles
ahead of time for a slice that is not there, so these are the programs that a TPU machine would run, kernels
included; nothing was run on a TPU, and no time was measured.

- Memory is HBM on each chip. "GB accessed" is the compiler's sum of what all operations read and write, one
  by one; much of it stays in the chip's fast memory, so that "ms by bytes" is more than HBM will take.
- "ms by FLOPs" and "ms by bytes" are what the maker's figures for the chip allow at best.
- "Million cycles" is the compiler's own estimate of its operations, by which it chooses among forms; our own
  kernels are not in it. It says which of two programs is the faster, and is no measurement.
- A program with loops (a training step runs its layers as scans) counts a loop's body once: its FLOPs and
  bytes say nothing and are left out.
- `vision` is uint8 images to the features that all prompts about them share, `detection` phrases (or phrases
  with up to 8 boxes) about one image to scores, boxes and masks; `clicks` prompts of up to 4 points about one
  image to masks and their scores. bfloat16; weights are arguments. "A frame for the tracker" is an image to
  what following objects takes; `following` is one frame of a clip, whose state is an argument and a result.
- On two cores a program compiles in about a minute, the training step in eight to twelve.
- On several chips each does what the program's name says; "collectives" are operations between chips.
"""


def document(rows: Sequence[Mapping[str, Any]]) -> str:
  """All rows as docs/tpu.md."""
  parts = [ABOUT]
  for size, slice_name in dict.fromkeys((r["size"], r["topology"]) for r in rows):
    mine = [r for r in rows if (r["size"], r["topology"]) == (size, slice_name)]
    chip = CHIPS[slice_name.partition(":")[0]]
    made = sorted({f"{r['date']}, jax {r['jax']}, libtpu {r['libtpu']}" for r in mine})
    parts.append(
      f"## {size} on {slice_name}\n\n{'; '.join(made)}. A chip: {chip.tflops:g} TFLOP/s in bfloat16,"
      f" {chip.bandwidth:g} GB/s, {chip.memory} GB.\nCommand: `python -m tpu.compile --topology {slice_name}"
      f" --size {size} --write`.\n\n{table(mine)}\n"
    )
  return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tpu.compile", description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--topology", default="v5e:2x2", metavar="NAME", help="slice to compile for (default: v5e:2x2)")
  add("--size", default="s0", choices=list(RANDOM_CONFIGS), help="model (default: s0)")
  add("--only", default="", metavar="TEXT", help="programs whose name holds it, such as vision")
  add("--chips", type=int, action="append", metavar="N",
      help="compile for so many of the slice's chips; may be given again (default: 1 and all)")  # fmt: skip
  add("--write", nargs="?", const="docs/tpu.md", metavar="FILE",
      help="the table, and the data beside this command (default FILE: docs/tpu.md)")  # fmt: skip
  args = parser.parse_args(argv)
  try:
    devices = topology(args.topology)
    if args.topology.partition(":")[0] not in CHIPS:
      raise ValueError(f"topology must be a slice of {', '.join(CHIPS)}, got {args.topology!r}")
    counts = args.chips or [1, len(devices)]
    if not all(1 <= n <= len(devices) for n in counts):
      raise ValueError(f"chips must be 1 to {len(devices)}, got {counts}")
    names = [name for name in programs(RANDOM_CONFIGS[args.size](), 1) if args.only in name]
    if not names:
      raise ValueError(f"only: no program's name holds {args.only!r}")
  except ValueError as e:
    parser.error(str(e))
  rows: list[dict[str, Any]] = []
  for chips in counts:
    made = programs(RANDOM_CONFIGS[args.size](), chips)
    for name in (n for n in names if n in made):
      start = time.perf_counter()
      found = figures(compile_for(made[name](), devices[:chips]))
      print(f"{name}, {chips} chip(s): compiled in {time.perf_counter() - start:.0f} s", flush=True)
      rows.append(row(args.size, args.topology, chips, name, found))
      if args.write:  # as soon as it is known: a compilation takes minutes
        old = json.loads(COMPILED.read_text()) if COMPILED.exists() else []
        rows_now = merged(old, rows)
        COMPILED.write_text(json.dumps(rows_now, indent=1) + "\n")
        pathlib.Path(args.write).write_text(document(rows_now))
  print(table(rows))
  return 0


if __name__ == "__main__":
  sys.exit(main())
