"""The machine, the versions, and how fast it multiplies matrices."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import pathlib
import platform
import time
from typing import Any

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "torchvision", "transformers")
_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "sve")
_TRIES = 5


def describe() -> dict[str, Any]:
  """Where and with what the numbers were measured."""
  import jax

  from convert import torch_reference

  ref = torch_reference.import_reference()
  cuda = ref.torch.cuda.is_available()
  flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
  return {
    "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
    "cpu_features": [name for name in _FEATURES if name in flags],
    "cores": cores(),
    "memory_gb": _memory_gb(),
    "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    "jax_backend": jax.default_backend(),
    "jax_device": jax.devices()[0].device_kind,
    "torch_device": ref.torch.cuda.get_device_name() if cuda else "cpu",
    "torchvision_operators": "compiled" if ref.compiled_ops else "Python stand-in for RoIAlign",
    "python": platform.python_version(),
    "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
  }


def _cpuinfo(field: str) -> str | None:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field)
  except (OSError, StopIteration):
    return None


def _memory_gb() -> float | None:
  try:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
  except (AttributeError, OSError, ValueError):
    return None


def cores() -> int:
  """Those that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_up_torch() -> None:
  """As many threads as jax takes (or OMP_NUM_THREADS, where the user set it), and the same precision."""
  import torch

  if not os.environ.get("OMP_NUM_THREADS"):
    torch.set_num_threads(cores())
  if torch.cuda.is_available():
    # jax multiplies float32 in TF32 on GPUs by default. Not tried: there was no GPU where this was written.
    torch.set_float32_matmul_precision("high")


def matrix_peaks(side: int, dtypes: list[str]) -> dict[str, dict[str, float]]:
  """GFLOP/s of a square product, dtype -> how -> best of a few tries.

  "jax, float32 sums" asks for a float32 accumulator, which the library does: XLA:CPU is slow otherwise.
  """
  return {dtype: _jax_peaks(side, dtype) | _torch_peaks(side, dtype) for dtype in dtypes}


def _jax_peaks(side: int, dtype: str) -> dict[str, float]:
  import jax
  import jax.numpy as jnp

  a, b = (jax.random.normal(jax.random.key(i), (side, side)).astype(dtype) for i in range(2))
  plain = jax.jit(jnp.matmul)
  calls = {"jax": lambda: plain(a, b).block_until_ready()}
  if dtype != "float32":
    wide = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    calls["jax, float32 sums"] = lambda: wide(a, b).block_until_ready()
  return {how: _gflops(call, side) for how, call in calls.items()}


def _torch_peaks(side: int, dtype: str) -> dict[str, float]:
  import torch

  set_up_torch()
  device = "cuda" if torch.cuda.is_available() else "cpu"
  a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))

  def call():
    a @ b
    if device == "cuda":
      torch.cuda.synchronize()

  return {"torch": _gflops(call, side)}


def _gflops(call, side: int) -> float:
  call()
  best = float("inf")
  for _ in range(_TRIES):
    start = time.perf_counter()
    call()
    best = min(best, time.perf_counter() - start)
  return 2 * side**3 / best / 1e9
