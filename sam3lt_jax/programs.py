"""Programs that compile while something else goes on: a predictor's, while its weights are read."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

_log = logging.getLogger(__name__)


def jit(function: Callable, **options: Any) -> Any:
  """`jax.jit` for inference with the compiler options that suit the platform.

  On CPUs XLA orders operations so that many can run at once, which keeps their results in memory all at once:
  884 MB beside the weights for the full-size image encoder in float32, against 239 MB in the order of the
  program (from the compiled programs, jax 0.10.2). Every operation uses all cores by itself, so nothing is
  lost by that.
  """
  if jax.default_backend() == "cpu":
    options["compiler_options"] = _cpu_options()
  return jax.jit(function, **options)


@functools.cache
def _cpu_options() -> dict[str, str] | None:
  options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
  try:
    jax.jit(lambda x: x, compiler_options=options).lower(np.float32(0)).compile()
  except jax.errors.JaxRuntimeError:  # another version of XLA, without this option
    return None
  return options


class Program:
  """A function under `jit` whose compilation may be under way in another thread."""

  def __init__(self, function: Callable):
    self._jitted = jit(function)
    self._awaited: list[concurrent.futures.Future] = []

  def __call__(self, *args: Any) -> Any:
    if self._awaited:
      concurrent.futures.wait(self._awaited)  # what went wrong there is raised again below
      self._awaited = []
    return self._jitted(*args)

  def call_after(self, future: concurrent.futures.Future) -> None:
    """The next call waits until `future` is done, however it ends."""
    self._awaited.append(future)

  def compiled_for(self) -> int:
    """Kinds of arguments that it was called with."""
    return self._jitted._cache_size()

  def compile(self, *args: Any) -> Any:
    """Compiles for arguments of these shapes and dtypes, arrays or `jax.ShapeDtypeStruct`; a call with such
    arguments then finds the program. Returns the shapes and dtypes of the result.
    """
    traced = self._jitted.trace(*shapes_of(args))
    traced.lower().compile()
    return shapes_of(traced.out_info)

  def compile_in(self, executor: concurrent.futures.Executor, args: Callable[[], tuple]) -> Callable[[], Any]:
    """The same in a thread of `executor`, under the settings of this one; `args` is called there, too.
    Returns a function that waits and gives the shapes of the result.
    """
    precision, device = jax.config.jax_default_matmul_precision, jax.config.jax_default_device

    def work():
      with jax.default_matmul_precision(precision), jax.default_device(device):
        try:
          return self.compile(*args())
        except Exception:
          _log.debug("compiling ahead failed", exc_info=True)
          raise

    compiled = executor.submit(work)
    self.call_after(compiled)
    return compiled.result


def shapes_of(tree: Any) -> Any:
  """Every array of a tree as a `jax.ShapeDtypeStruct`."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def return_freed_memory() -> None:
  """Gives back to the system what compiling took and freed, which glibc keeps otherwise: 180 MB at full size.

  With other C libraries nothing happens.
  """
  with contextlib.suppress(AttributeError, OSError, TypeError):
    ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def explain_memory() -> Iterator[None]:
  """XLA's out-of-memory error, said in one sentence with what helps."""
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e) and "out of memory" not in str(e).lower():
      raise
    raise MemoryError(
      f"{jax.devices()[0].device_kind} has too little memory for this call; use dtype='bfloat16', fewer "
      f"prompts at once (prompt_buckets=(1,)) or a smaller image_size ({str(e).splitlines()[0][:200]})"
    ) from e
