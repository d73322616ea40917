"""How the tests run: on the CPU, in full float32, offline, without fighting over cores."""

from __future__ import annotations

import importlib.util
import os

# Before anything imports jax, torch or huggingface_hub, which read these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Compiling is most of the time at tiny sizes, and half of that is optimisation. Full-size tests turn it on.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that means to download starts its own process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

import pytest  # noqa: E402


def pytest_collection_modifyitems(items):
  missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
  if not missing:
    return
  skip = pytest.mark.skip(reason=f"compares with the PyTorch reference, which needs {' and '.join(missing)}")
  for item in items:
    if "torch" in item.keywords:
      item.add_marker(skip)
