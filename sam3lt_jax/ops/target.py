"""What the program that is being traced is to run on, for layers that have a form for each platform."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh

GPUS = ("gpu", "cuda", "rocm")


@dataclasses.dataclass(frozen=True)
class Target:
  """Where a program will run.

  Attributes:
    platforms: any of "cpu", "cuda" ("gpu"), "tpu"; several for an exported program.
    mesh: over whose axis "data" the batch is split; None: there is none.
    takes_kernels: whether a Pallas kernel may stand in the program. XLA cannot split one by itself, so that
      it must be known that the program is for one device, or over which mesh it is split.
    here: whether it runs in this process, so that what this machine has may be counted on.
  """

  platforms: tuple[str, ...]
  mesh: Mesh | None = None
  takes_kernels: bool = True
  here: bool = False

  @property
  def has_cpu(self) -> bool:
    return "cpu" in self.platforms

  def is_for(self, *platforms: str) -> bool:
    """Whether it is for these alone."""
    return all(platform in platforms for platform in self.platforms)

  @property
  def devices(self) -> int:
    """Over how many the batch is split."""
    return 1 if self.mesh is None else self.mesh.shape["data"]

  def on_tpus(self, batch: int) -> bool:
    """Whether it is for TPUs alone, each of which has rows of its own of this batch that XLA need not split:
    there a Pallas kernel may stand.
    """
    return self.is_for("tpu") and self.takes_kernels and batch % self.devices == 0


_target: contextvars.ContextVar[Target | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def traced_for(platforms: Sequence[str], mesh: Mesh | None = None, here: bool = False) -> Iterator[None]:
  """What is traced inside is to run on any of `platforms` ("cpu", "cuda", "tpu"), see `jax.export`.

  mesh: the devices that share its batch, split over the axis "data"; None: it runs on one device.
  here: see `Target`.
  """
  token = _target.set(Target(tuple(platforms), mesh, here=here))
  try:
    yield
  finally:
    _target.reset(token)


def current() -> Target:
  """What `traced_for` says; outside of it this process's own backend."""
  told = _target.get()
  if told is not None:
    return told
  manual = bool(jax.sharding.get_abstract_mesh().manual_axes)  # in shard_map and pmap
  return Target((jax.default_backend(),), takes_kernels=manual or jax.device_count() == 1, here=True)
