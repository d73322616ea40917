"""The library's programs, compiled for an NVIDIA GPU that is not there, by XLA's compiler for GPUs.

    pip install 'sam3lt_jax[cuda]'
    JAX_PLATFORMS=cpu python -m tpu.gpu                        # an H200, a table on the screen
    JAX_PLATFORMS=cpu python -m tpu.gpu --card h100 --only detection --kernels

Needs no GPU and no driver. Nothing is run, so no time is measured, and the compiler cannot try out which
kernel is fastest, as it does on a card: products are cuBLAS's throughout, attention cuDNN's. What is counted
is the same at every run: kernels, which cost a launch each, and the bytes that they read and write.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import importlib.util
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import jax

from sam3lt_jax.checkpoints.random_init import RANDOM_CONFIGS
from sam3lt_jax.ops import kernels
from tpu.chips import CHIPS
from tpu.compile import Program, collectives, compile_for, programs

# What XLA wants to know of a card: CUDA's device properties of compute capability 9.0.
_CARD = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 clock_rate_ghz: 1.98
  l2_cache_size: 52428800 memory_bandwidth: {bandwidth} device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA" device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: {cuda} }}
"""
CARDS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
_BYTES = {"pred": 1, "bf16": 2, "f16": 2}  # of others the bits stand in the name
_NO_KERNELS = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast")


def cards(card: str, count: int) -> list[jax.Device]:
  """So many cards of the kind in one machine, to compile for.

  Raises:
    ValueError: jax's plugin for CUDA is not installed, or refuses.
  """
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # or the plugin looks for a driver
  from jax.experimental import topologies

  cuda = next((n for n in (13, 12) if importlib.util.find_spec(f"jax_cuda{n}_plugin")), None)
  if cuda is None:
    raise ValueError("card: needs jax's plugin for CUDA: pip install 'sam3lt_jax[cuda]'")
  bandwidth, memory = (int(x * 1e9) for x in (CHIPS[card].bandwidth, CHIPS[card].memory))
  config = _CARD.format(bandwidth=bandwidth, memory=memory, name=CARDS[card], cuda=cuda)
  slots = {"topology": f"1x1x{count}", "target_config": config}
  try:
    return list(topologies.get_topology_desc(platform="cuda", topology_name="", **slots).devices)
  except Exception as e:
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise ValueError(f"card {card!r} cannot be compiled for: {reason}") from e


def compile_for_cards(program: Program, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
  """As `tpu.compile.compile_for`."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  # Three questions that are put to the GPU of this process, which has none.
  with (
    mock.patch.object(kernels, "_has_cudnn", lambda: True),
    mock.patch.object(cudnn, "check_compute_capability", lambda capability: True),
    mock.patch.object(cudnn, "check_cudnn_version", lambda: 91000),
  ):
    return compile_for(program, devices, "cuda", {"xla_gpu_enable_triton_gemm": False})


# -------------------------------------------------------------------- what a compiled program does


class Kernel(NamedTuple):
  """One launch: what it is, bytes that it reads and writes, its result's shape, the layer that it is of."""

  kind: str
  bytes: int
  result: str
  layer: str


class _Instruction(NamedTuple):
  name: str
  type: str
  op: str
  operands: list[str]
  line: str


def kernels_of(text: str) -> list[Kernel] | None:
  """The kernels of a compiled program, `jax.stages.Compiled.as_text`, in order; None where it has loops."""
  computations = dict(_computations(text))
  entry = next(name for name in computations if name.startswith("ENTRY "))
  if any(i.op == "while" for i in computations[entry]):
    return None
  types, found = {}, []
  for instruction in computations[entry]:
    types[instruction.name] = instruction.type
    if instruction.op in _NO_KERNELS:
      continue
    called = re.search(r"calls=%([\w.\-]+)", instruction.line)
    body = computations.get(called.group(1), []) if called else []
    read = [_read(i, types[name], body) for i, name in enumerate(instruction.operands) if name in types]
    layer = re.search(r'op_name="([^"]*)"', instruction.line)
    found.append(
      Kernel(
        _kind(instruction),
        sum(read) + size(instruction.type),
        re.sub(r"\{[^}]*\}", "", instruction.type),
        layer.group(1) if layer else "",
      )
    )
  return found


def _computations(text: str) -> Iterator[tuple[str, list[_Instruction]]]:
  for block in re.split(r"\n(?=(?:ENTRY )?%)", text):
    head = re.match(r"(ENTRY )?%([\w.\-]+) ", block)
    if head is None:
      continue
    instructions = []
    for line in block.splitlines()[1:]:
      if match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)", line):
        name, kind, op, rest = match.groups()
        operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
        instructions.append(_Instruction(name, kind, op, operands, line))
    yield (head.group(1) or "") + head.group(2), instructions


def _read(position: int, kind: str, body: Sequence[_Instruction]) -> int:
  """Bytes that a kernel reads of its operand: of one that it only slices, the slices."""
  mine = next((i.name for i in body if i.op == "parameter" and f"parameter({position})" in i.line), None)
  users = [i for i in body if mine in i.operands]
  if users and all(i.op in ("slice", "dynamic-slice") for i in users):
    return min(size(kind), sum(size(i.type) for i in users))
  return size(kind)


def size(kind: str) -> int:
  """Bytes of a type such as "(bf16[2,3]{1,0}, s8[4194304]{0})", without a library's workspace (s8)."""
  total = 0
  for dtype, axes in re.findall(r"(\w+)\[([\d,]*)\]", kind):
    bits = re.fullmatch(r"[a-z](\d+)", dtype)
    each = _BYTES.get(dtype) or (int(bits.group(1)) // 8 if bits else 0)
    for axis in filter(None, axes.split(",")):
      each *= int(axis)
    total += 0 if dtype == "s8" else each
  return total


def _kind(instruction: _Instruction) -> str:
  called = re.search(r'custom_call_target="([^"]+)"', instruction.line)
  if called is None:
    return instruction.op
  name = called.group(1)
  if "cublas" in name:
    return "product"
  if "fmha" in name:
    return "attention"
  return "convolution" if "conv" in name else name


# -------------------------------------------------------------------- the table

KINDS = ("product", "attention", "convolution")


@dataclasses.dataclass(frozen=True)
class Row:
  """A program's figures, on each card; memory in bytes. kernels: None where it has loops."""

  cards: int
  program: str
  arguments: int
  temporaries: int
  outputs: int
  kernels: list[Kernel] | None
  collectives: dict[str, int]


def table(rows: Sequence[Row], card: str) -> str:
  lines = [
    "| cards | program, on each card | arguments GB | temporaries GB | output GB | kernels | products "
    "| attention | convolutions | others | GB accessed | ms by bytes | collectives |",
    "| ---: | --- " + "| ---: " * 10 + "| --- |",
  ]
  for row in rows:
    memory = [f"{x / 1e9:.2f}" for x in (row.arguments, row.temporaries, row.outputs)]
    if row.kernels is None:
      counts = ["loops", *[""] * 6]
    else:
      by_kind = collections.Counter(kernel.kind for kernel in row.kernels)
      named, accessed = [by_kind[kind] for kind in KINDS], sum(kernel.bytes for kernel in row.kernels)
      ms = accessed / CHIPS[card].bandwidth / 1e6
      counts = [len(row.kernels), *named, len(row.kernels) - sum(named), f"{accessed / 1e9:.1f}", f"{ms:.1f}"]
    between = ", ".join(f"{n} x {name}" for name, n in sorted(row.collectives.items())) or "none"
    lines.append(f"| {' | '.join(map(str, [row.cards, row.program, *memory, *counts, between]))} |")
  return "\n".join(lines)


def replaced(document: str, rows: str) -> str:
  """The document with these rows of a table for those of the same programs; it must have them."""
  program = lambda line: tuple(cell.strip() for cell in line.split("|")[1:3])  # noqa: E731
  new = {program(line): line for line in rows.splitlines()[2:]}
  if missing := new.keys() - map(program, document.splitlines()):
    names = ", ".join(f"{name} on {cards} card(s)" for cards, name in sorted(missing))
    raise SystemExit(f"write: the document lacks {names}; leave out --only")
  return "\n".join(new.get(program(line), line) for line in document.split("\n"))


ABOUT = """# Programs on GPUs, by XLA's compiler for them

Written by `JAX_PLATFORMS=cpu python -m tpu.gpu --write`, on a machine without a GPU. Nothing was run, and no
time was measured; on a card the compiler also tries out which kernel is the fastest, which it cannot here.

- A kernel costs a launch, some two microseconds, whatever it does. Attention is cuDNN's, products cuBLAS's.
- "GB accessed" is what all kernels read and write, one by one. "ms by bytes" is that by the card's bandwidth.
- The programs are those of [tpu.md](tpu.md). On several cards each does what the program's name says;
  "collectives" are operations between cards.
"""


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tpu.gpu", description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("--card", default="h200", choices=list(CARDS), help="card to compile for (default: h200)")
  add("--cards", type=int, action="append", metavar="N",
      help="compile for so many of them in one machine; may be given again (default: 1 and 4)")  # fmt: skip
  add("--size", default="s0", choices=list(RANDOM_CONFIGS), help="model (default: s0)")
  add("--only", default="", metavar="TEXT", help="programs whose name holds it, such as vision")
  add("--kernels", action="store_true", help="every kernel of them, with its megabytes")
  add("--write", nargs="?", const="docs/gpu.md", metavar="FILE", help="the table (default FILE: docs/gpu.md)")
  args = parser.parse_args(argv)
  counts = args.cards or [1, 4]
  try:
    if min(counts) < 1:
      raise ValueError(f"cards must be at least 1, got {min(counts)}")
    devices = {count: cards(args.card, count) for count in counts}
    names = [name for name in programs(RANDOM_CONFIGS[args.size](), 1) if args.only in name]
    if not names:
      raise ValueError(f"only: no program's name holds {args.only!r}")
  except ValueError as e:
    parser.error(str(e))
  rows = []
  for count in counts:
    made = programs(RANDOM_CONFIGS[args.size](), count)
    for name in (n for n in names if n in made):
      start = time.perf_counter()
      compiled = compile_for_cards(made[name](), devices[count])
      print(f"{name}, {count} card(s): compiled in {time.perf_counter() - start:.0f} s", flush=True)
      memory, text = compiled.memory_analysis(), compiled.as_text()
      output, found = memory.output_size_in_bytes - memory.alias_size_in_bytes, kernels_of(text)
      held = memory.argument_size_in_bytes, memory.temp_size_in_bytes, output
      rows.append(Row(count, name, *held, found, collectives(text)))
      for kernel in (found or []) if args.kernels else []:
        print(f"{kernel.bytes / 1e6:9.1f} MB  {kernel.kind:12} {kernel.result:40} {kernel.layer}")
  print(lines := table(rows, args.card))
  if args.write:
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    head = f"## {args.size} on {CARDS[args.card]}\n\n{day}, jax {jax.__version__}. bfloat16, 1008 px.\n"
    file = pathlib.Path(args.write)
    of_others = args.only and file.exists()
    file.write_text(replaced(file.read_text(), lines) if of_others else "\n".join([ABOUT, head, lines, ""]))
  return 0


if __name__ == "__main__":
  sys.exit(main())
