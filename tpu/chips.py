"""What makers state of their accelerators, and where the figures of compiled programs are kept."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

COMPILED = pathlib.Path(__file__).with_name("compiled.json")  # written by `tpu.compile`


class Chip(NamedTuple):
  """What its maker states: dense bfloat16 peak in TFLOP/s, memory in GB, its bandwidth in GB/s; and where."""

  tflops: float
  memory: int
  bandwidth: float
  source: str


CHIPS = {
  "v5e": Chip(197, 16, 819, "Google Cloud, TPU v5e: peak compute per chip (bf16)"),
  "v6e": Chip(918, 32, 1640, "Google Cloud, TPU v6e (Trillium): peak compute per chip (bf16)"),
  "v5p": Chip(459, 95, 2765, "Google Cloud, TPU v5p: peak compute per chip (bf16)"),
  "a100": Chip(312, 80, 2039, "NVIDIA A100 data sheet: BFLOAT16 Tensor Core, dense"),
  "h100": Chip(989, 80, 3350, "NVIDIA H100 SXM data sheet: BFLOAT16 Tensor Core, without sparsity"),
  "h200": Chip(989, 141, 4800, "NVIDIA H200 SXM data sheet: BFLOAT16 Tensor Core, without sparsity"),
  "l4": Chip(121, 24, 300, "NVIDIA L4 data sheet: BFLOAT16 Tensor Core, without sparsity"),
}
