"""How the tests run: on the CPU, in full float32, offline, without fighting over cores."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import sys
import tempfile

_ROOT = pathlib.Path(__file__).parents[1]

# Where a machine asks for no bytecode, every process that a test starts would compile the library's source
# again, and every worker the tests': 8 s of CPU.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Before anything imports jax, torch or huggingface_hub, which read these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# Compiling is most of the time at tiny sizes, and most of that is optimisation: a tiny model takes 6.2 s
# of CPU as users compile it and 1.1 s so. Full-size comparisons run in a process of their own, without this.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):  # an unknown flag would end the process
  os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    " --xla_backend_optimization_level=0",
  )
# What one worker or an earlier run compiled is not compiled again, small programs either: files of cases
# worked by hand compile hundreds of operations, 19 s of CPU for three files and 12 from the cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that means to download starts its own process
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

import filelock  # noqa: E402
import pytest  # noqa: E402


def pytest_collection_finish():
  """Garbage is looked for less often, and not in what was imported: that took an eighth of the time."""
  gc.freeze()
  gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
  """Tests that are marked "large" run one at a time, whatever the workers."""
  if "large" not in item.keywords:
    return (yield)
  with filelock.FileLock(os.path.join(tempfile.gettempdir(), f"sam3lt_large_{os.getuid()}.lock")):
    return (yield)


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: "large" not in item.keywords)  # they come first
  missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
  if not missing:
    return
  skip = pytest.mark.skip(reason=f"compares with the PyTorch reference, which needs {' and '.join(missing)}")
  for item in items:
    if "torch" in item.keywords:
      item.add_marker(skip)


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
  """No bar on stderr, however loaded the machine is; a test of the bars sets its own delay."""
  from sam3lt_jax.checkpoints import pretrained
  from sam3lt_jax.cli import progress

  monkeypatch.setattr(progress, "DELAY", 3600.0)
  monkeypatch.setattr(pretrained, "_QUIET_SECONDS", 3600.0)


@pytest.fixture
def complaints(monkeypatch):
  """What would have been shown on stderr by Python itself, for exceptions that nobody catches."""
  seen = []
  monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(args.exc_value))
  return seen
