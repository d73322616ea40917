"""Functions compiled once for each kind of arguments, by whoever needs them first, or ahead of that.

Nothing else compiles for inference. What a program is traced for (platform, mesh) is said when it is made.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from sam3lt_jax.ops import amx, target


def jit(function: Callable, platform: str | None = None, dtype: Any = None, **options: Any) -> Any:
  """`jax.jit` for inference with the compiler options that suit the platform (None: the default backend) and,
  where the image model runs, the dtype that its layers compute in.

  On CPUs XLA orders operations so that many can run at once, which keeps their results in memory all at once:
  884 MB beside the weights for the full-size image encoder in float32, against 239 MB in the order of the
  program (from the compiled programs, jax 0.10.2). Every operation uses all cores by itself, so nothing is
  lost by that. With AMX, float32 products are faster outside of XLA's library of kernels, which bfloat16
  needs: of the image encoder's layers (1008 px, CPU time, minima of 6 in turn, an Intel Xeon under load,
  2026-11-26) a windowed one takes 1751 -> 1487 ms, a global one 2991 -> 3111; there are 28 and 4. Not so the
  tracker's memory attention, whose products in loops copy their keys each time there: 3.7 s with the library,
  8.1 without (one object, seven maps).
  """
  if (platform or jax.default_backend()) == "cpu":
    wide = dtype is not None and np.dtype(dtype) == np.float32
    options["compiler_options"] = _cpu_options(wide and amx.available())
  return jax.jit(function, **options)


@functools.cache
def _cpu_options(products_outside: bool) -> dict[str, str] | None:
  options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
  if products_outside:  # XLA's default without LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT
    kinds = ("LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION", "LIBRARY_FUSION_TYPE_REDUCE")
    options["xla_cpu_experimental_ynn_fusion_type"] = ",".join(kinds)
  try:
    jax.jit(lambda x: x, compiler_options=options).lower(np.float32(0)).compile()
  except jax.errors.JaxRuntimeError:  # another version of XLA, without these options
    return _cpu_options(False) if products_outside else None
  return options


class Program:
  """A function of (constants, *arguments) on the devices of a mesh; constants are of one kind throughout.

  Any number of threads may call it. The first that brings a new kind of arguments compiles for it, the others
  wait for that one.

  Attributes:
    waited_s: seconds that callers have waited for compilation.
  """

  def __init__(
    self,
    name: str,
    function: Callable,
    mesh: Mesh,
    out_shardings: Any,
    dtype: Any = None,
    donate: tuple[int, ...] = (),
  ):
    """dtype: see `jit`.
    donate: which arguments after the constants are given up, so that results may take their memory.
    """
    self._platform = mesh.devices.flat[0].platform
    self._mesh, self.name = mesh, name
    function.__name__ = name  # what logs and profiles show
    given_up = tuple(1 + i for i in donate)
    self._jitted = jit(function, self._platform, dtype, out_shardings=out_shardings, donate_argnums=given_up)
    self._made: dict[tuple, futures.Future] = {}
    self._lock = threading.Lock()
    self.waited_s = 0.0

  def __call__(self, constants: Any, *arguments: Any) -> Any:
    start = time.perf_counter()
    future, waits = self._compile(constants, arguments)
    compiled = future.result()
    if waits:
      self.waited_s += time.perf_counter() - start
    return compiled(constants, *arguments)

  def compile(self, constants: Any, *arguments: Any) -> jax.stages.Compiled:
    """Compiles for arguments of these kinds, arrays or `jax.ShapeDtypeStruct`s with their shardings."""
    return self._compile(constants, arguments)[0].result()

  def compiled(self) -> list[jax.stages.Compiled]:
    """All that there is by now, to see what it does and what it takes."""
    return [f.result() for f in list(self._made.values()) if f.done() and f.exception() is None]

  def _compile(self, constants: Any, arguments: tuple) -> tuple[futures.Future, bool]:
    """(what is or will be compiled for these arguments, whether the caller has to wait for it)."""
    leaves, structure = jax.tree.flatten(arguments)
    precision = jax.config.jax_default_matmul_precision
    key = (structure, precision, *((x.shape, np.dtype(x.dtype), _devices(x)) for x in leaves))
    with self._lock:
      mine = key not in self._made
      future = self._made.setdefault(key, futures.Future())
      if mine:
        future.add_done_callback(lambda f: self._made.pop(key) if f.exception() else None)
    if not mine:
      return future, not future.done()
    try:
      with target.traced_for((self._platform,), self._mesh if self._mesh.size > 1 else None, here=True):
        lowered = self._jitted.lower(constants, *arguments)
      future.set_result(lowered.compile())
    except BaseException as e:
      future.set_exception(e)
    return future, True


def _devices(x: Any) -> Any:
  """Where an argument lies, as far as that makes another program: its sharding's devices."""
  sharding = getattr(x, "sharding", None)
  return None if sharding is None else tuple(sorted(d.id for d in sharding.device_set))


class Ahead:
  """Compiles in threads of its own what the caller will need, under the caller's settings."""

  def __init__(self, threads: int = 3):
    self._pool = futures.ThreadPoolExecutor(threads, "sam3lt-compile")
    self._asked: list[futures.Future] = []

  def compile(self, program: Program, constants: Any, *arguments: Any) -> None:
    """What goes wrong there is raised by the call that needs the program, which tries again."""
    precision = jax.config.jax_default_matmul_precision

    def work():
      with jax.default_matmul_precision(precision), contextlib.suppress(Exception):
        program.compile(constants, *arguments)

    self._asked.append(self._pool.submit(work))

  def wait(self) -> None:
    futures.wait(self._asked)
    self._asked = []


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
