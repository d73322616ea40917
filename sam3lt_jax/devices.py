"""What a process asks of JAX before it computes: which devices, and where compiled programs are kept."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.ops import kernels

KINDS = ("cpu", "gpu", "tpu")
ACCEPTED = "'cpu', 'gpu', 'tpu'"
CACHE_BYTES = 2 << 30  # of compiled programs, all together; the ones unused for longest go first
_NEEDS = {
  "gpu": "NVIDIA GPUs need their driver and pip install 'sam3lt_jax[cuda]'",
  "tpu": "TPUs need pip install 'sam3lt_jax[tpu]', on a TPU machine",
}


def _setting(name: str) -> Any:
  """A setting of JAX's, none of which its types name."""
  return getattr(jax.config, name)


def parse(device: str) -> tuple[str, int | None]:
  """(kind, number or None) of a device's name. Raises ArgumentError."""
  kind, colon, number = str(device).lower().partition(":")
  kind = "gpu" if kind == "cuda" else kind  # as PyTorch has it
  if kind not in KINDS or (colon and not number.isdecimal()):
    raise ArgumentError("device", f" must be {ACCEPTED}, or one of several, as 'gpu:1', got {device!r}")
  return kind, int(number) if colon else None


def find(device: str | jax.Device) -> jax.Device:
  """The device of that name, "cpu", "gpu", "gpu:1", "tpu"; the first of its kind without a number.

  Raises:
    ArgumentError: no such name, or no such device here.
  """
  if isinstance(device, jax.Device):
    return device
  kind, number = parse(device)
  try:
    found = jax.local_devices(backend=kind)
  except Exception as e:  # JAX has several kinds for it
    check()
    raise _absent("device", device) from e
  if (number or 0) >= len(found):
    raise ArgumentError("device", f"={device!r}: there is no such one, only {_counted(found)}")
  return found[number or 0]


def use(device: str | None) -> None:
  """Lets this process see the devices of that name alone, all of its kind without a number.

  To be called before anything else of JAX; `check` tells whether they are there.
  """
  if device is None:
    return
  kind, number = parse(device)
  if number is not None and kind != "gpu":
    raise ArgumentError("device", f" takes a number with gpu only, as 'gpu:1', got {device!r}")
  if number is not None:
    jax.config.update("jax_cuda_visible_devices", str(number))
  jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}[kind])


def check(device: str | None = None) -> None:
  """Raises ArgumentError, in one sentence, where JAX can start none of the devices that it was told to use:
  by `use(device)`, else by JAX_PLATFORMS.
  """
  try:
    found = jax.devices()
  except Exception as e:  # an AssertionError for cuda, a RuntimeError for others
    asked = _setting("jax_platforms")
    if device is not None or not asked:
      raise _absent("device", device or "default", e) from e
    raise _absent("JAX_PLATFORMS", asked, e) from e
  if device is not None and found[0].platform != parse(device)[0]:
    raise _absent("device", device)


def _absent(argument: str, asked: str, e: Exception | None = None) -> ArgumentError:
  why = (str(e or "").strip() or "JAX finds none").splitlines()[0].partition(" (set JAX_PLATFORMS")[0]
  kind = asked.partition(":")[0].partition(",")[0].replace("cuda", "gpu")
  needs = _NEEDS.get(kind, f"accepted: {ACCEPTED.replace('gpu', 'cuda')}, or leave it out")
  return ArgumentError(
    argument, f"={asked}: there is no such device here ({textwrap.shorten(why, 120)}); {needs}"
  )


def _counted(devices: Sequence[jax.Device]) -> str:
  kind = devices[0].device_kind
  kind = kind.upper() if kind == "cpu" else kind
  return kind if len(devices) == 1 else f"{len(devices)} x {kind}"


def running(devices: Sequence[jax.Device], dtype: Any) -> str:
  """What runs on what, in a few words: "CPU, float32, attention in blocks"."""
  name = np.dtype(dtype).name
  return f"{_counted(devices)}, {name}, attention {kernels.described(devices[0].platform, name)}"


def cache_folder() -> str:
  """Where compiled programs are kept by default."""
  cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  return os.path.join(cache, "sam3lt_jax", "compiled")


def keep_compiled(folder: str | None = None) -> None:
  """XLA keeps what it compiles in `folder`, for the next start.

  None: in `cache_folder()`, at most `CACHE_BYTES`; but a folder that JAX was given
  (JAX_COMPILATION_CACHE_DIR) stays, and JAX_ENABLE_COMPILATION_CACHE=0 is obeyed. "": nowhere. Programs in
  there are trusted: the default folder is the user's own.
  """
  if folder is None:
    if _setting("jax_compilation_cache_dir") or not _setting("jax_enable_compilation_cache"):
      return
    folder = cache_folder()
    if _setting("jax_compilation_cache_max_size") == -1:
      jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
  if folder and "://" not in folder:
    try:
      os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError:  # a home that cannot be written: all runs, and is compiled anew each time
      folder = ""
  jax.config.update("jax_compilation_cache_dir", folder or None)
