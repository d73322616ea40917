"""The objects of one clip on a device: who is in which slot, and the programs that take them a frame further.

    tracks = Tracks(engine)
    tracks.add([7], frame=0)
    tracked = tracks.ask(features, tracks.clock(0), {7: clicks})
    tracks.keep(features, tracks.clock(0), tracked, [7])
    tracked = tracks.advance(features, tracks.clock(1))   # its memory does not grow

Axes as in `bank`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax import parallel
from sam3lt_jax.engine import Engine
from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.features import Clicks, Tracked, TrackerFeatures
from sam3lt_jax.programs import Program
from sam3lt_jax.tracker import Sam3Tracker
from sam3lt_jax.video import bank as banks
from sam3lt_jax.video import step
from sam3lt_jax.video.bank import Bank, Clock

MOST_SLOTS = 1 << 12


# ---------------------------------------------------------------- the programs


def advance(tracker, variables, bank, features, clock, which) -> tuple[Bank, Tracked]:
  """Objects `which` followed to a frame, and that remembered."""
  tracked = step.follow(tracker, variables, bank, features, clock, which)
  return step.remember(tracker, variables, bank, features, clock, tracked, which), tracked


def put(tracker, variables, bank, clock, which, maps, pointers, quality, cond) -> Bank:
  """`bank.write`."""
  return banks.write(bank, tracker.config, clock, which, maps, pointers, quality, cond)


def recall(tracker, variables, bank, clock) -> tuple[jax.Array, jax.Array]:
  """What was written of the clock's frame: maps [P, T, C], quality [P]."""
  at = (bank.map_frames == clock.frame).argmax(axis=1)[:, None]
  maps = jnp.take_along_axis(bank.maps, at[..., None, None], axis=1)[:, 0]
  return maps, jnp.take_along_axis(bank.map_quality, at, axis=1)[:, 0]


class TrackPrograms:
  """Functions of this module and of `step`, for an engine."""

  def __init__(self, engine: Engine):
    if engine.tracker is None or engine.tracker.config.memory is None:
      this = "there is none" if engine.tracker is None else "this one is of images alone"
      raise ArgumentError("tracker", f" must have the parts that remember frames; {this}")
    if engine.mesh.size > 1:
      raise ArgumentError("devices", f" must be one device, as a clip runs on one, got {engine.mesh.size}")

    def made(function: Callable, **options: Any) -> Program:
      return engine.program(function, parallel.replicated(engine.mesh), engine.tracker, **options)

    with_memory = functools.partial(step.prompt, with_memory=True)
    self.ask, self.ask_with_memory = made(step.prompt), made(with_memory, name="prompt_with_memory")
    self.advance, self.keep = made(advance, donate=(0,)), made(step.remember, donate=(0,))
    self.take, self.encode_masks = made(step.given_masks), made(step.maps_of)
    self.put, self.recall = made(put, donate=(0,)), made(recall)


_made: weakref.WeakKeyDictionary[Engine, dict[tuple, Any]] = weakref.WeakKeyDictionary()


def programs_of(engine: Engine, make: Callable = TrackPrograms, *about: Any) -> Any:
  """`make(engine, *about)`, once for all clips. What it gives must not hold the engine.

  Raises:
    ValueError: the engine has no tracker with memory, or several devices.
  """
  made = _made.setdefault(engine, {})
  if (make, *about) not in made:
    made[make, *about] = make(engine, *about)
  return made[make, *about]


# ---------------------------------------------------------------- the objects


class Tracks:
  """Attributes:

  bank: the state, on the device. It is given up by every step: copy what is to stay (`fork`).
  slots: object id -> slot, in the order in which objects came.
  """

  def __init__(self, engine: Engine, slots: int = 1, cond: int | None = None):
    """Args:
    slots: objects that there is room for; it grows by itself.
    cond: frames with prompts that an object may have; None: the last 4 are kept, which is all that is
      read going one way.
    """
    self.engine, self.programs = engine, programs_of(engine)
    self.slots: dict[int, int] = {}
    self._grid = grid_of(engine)
    self.bank = self._placed(
      banks.empty(self.tracker.config, self._grid, bucket(slots), cond, self.tracker.dtype)
    )

  @property
  def tracker(self) -> Sam3Tracker:
    return self.engine.tracker

  @property
  def size(self) -> int:
    """P, how many slots there are."""
    return len(self.bank.live)

  def clock(self, frame: int, reverse: bool = False, frames: int | None = None) -> Clock:
    """frames: how many the clip has; None: unknown, and taken to be many."""
    return Clock.at(frame, self.tracker.config, reverse, frames)

  # ---------------------------------------------------------------- slots

  def add(self, ids: Iterable[int], frame: int) -> None:
    """Gives new objects their slots, which grow if they must; what is remembered of them comes later.

    Args:
      ids: of objects that are not there. frame: on which they first appear.

    Raises:
      ValueError: an id that is there already, or twice.
    """
    ids = list(ids)
    twice = [i for n, i in enumerate(ids) if i in self.slots or i in ids[:n]]
    if twice:
      raise ArgumentError("ids", f" must be of new objects, got {twice[0]}, which is there already")
    if (slots := bucket(len(self.slots) + len(ids))) > self.size:
      self.bank = self._placed(banks.grow(self.bank, slots))
    taken = set(self.slots.values())
    free = [s for s in range(self.size) if s not in taken][: len(ids)]
    self.slots |= dict(zip(ids, free))
    self.bank = banks.born(self.bank, self.mask(ids), np.int32(frame))

  def remove(self, ids: Iterable[int]) -> None:
    """Forgets objects; their slots are free. Raises ValueError for an id that is not there."""
    ids = list(ids)
    self.bank = banks.clear(self.bank, self.mask(ids))
    for i in ids:
      del self.slots[i]

  def mask(self, ids: Iterable[int] | None = None) -> np.ndarray:
    """bool [P], the slots of these objects; None: of all."""
    which = np.zeros(self.size, bool)
    for i in self.slots if ids is None else ids:
      if i not in self.slots:
        raise ArgumentError("ids", f" must be of {list(self.slots)}, got {i}")
      which[self.slots[i]] = True
    return which

  def rows(self, of: Mapping[int, Any], like: np.ndarray) -> np.ndarray:
    """[P, ...] with each object's value in its slot, and `like` in the others."""
    out = np.broadcast_to(like, (self.size, *like.shape)).copy()
    for i, value in of.items():
      out[self.slots[i]] = value
    return out

  # ---------------------------------------------------------------- a frame

  def advance(self, features: TrackerFeatures, clock: Clock, ids: Iterable[int] | None = None) -> Tracked:
    """Follows objects to the clock's frame and remembers it.

    Args:
      features: of the frame, 1 row, as `Engine.encode_frames` gives them.
      ids: None: all.

    Returns:
      `Tracked` of all slots, on the device; what other slots give means nothing.
    """
    self.bank, tracked = self._run(self.programs.advance, self.bank, features, clock, self.mask(ids))
    return tracked

  def ask(
    self, features: TrackerFeatures, clock: Clock, clicks: Mapping[int, Clicks], with_memory: bool = False
  ) -> Tracked:
    """What clicks on the clock's frame make of objects; remembers nothing, see `keep`.

    Args:
      clicks: object id -> its `Clicks`, each of one row, of as many points.
      with_memory: what is remembered of them is read too. False: as on a first frame.
    """
    program = self.programs.ask_with_memory if with_memory else self.programs.ask
    first = next(iter(clicks.values()))
    rows = Clicks(*(
      self.rows({i: getattr(c, name)[0] for i, c in clicks.items()}, np.zeros_like(getattr(first, name)[0]))
      for name in ("points", "labels", "valid", "masks", "has_mask")
    ))  # fmt: skip
    return self._run(program, self.bank, features, clock, rows, self.mask(clicks))

  def keep(
    self, features: TrackerFeatures, clock: Clock, tracked: Tracked, ids: Iterable[int], cond: bool = True
  ) -> None:
    """Remembers the clock's frame as `tracked` has it, as one with a prompt or (cond=False) without."""
    which = self.mask(ids)
    self.bank = self._run(self.programs.keep, self.bank, features, clock, tracked, which, which & cond)

  def _run(self, program: Any, *arguments: Any) -> Any:
    return program(self.engine.tracker_variables, *arguments)

  def _placed(self, tree: Any) -> Any:
    return jax.device_put(tree, parallel.replicated(self.engine.mesh))

  # ---------------------------------------------------------------- kept for later

  def fork(self) -> Tracks:
    """A second one that goes on from here by itself."""
    other = object.__new__(Tracks)
    other.__dict__ |= self.__dict__ | {"slots": dict(self.slots), "bank": jax.tree.map(jnp.copy, self.bank)}
    return other

  def state(self) -> dict[str, np.ndarray]:
    """All that is needed to go on, bit for bit, as arrays that `numpy.savez` takes."""
    arrays = {name: bits(x) for name, x in jax.device_get(vars(self.bank)).items()}
    table = np.array(list(self.slots.items()), np.int64).reshape(-1, 2)
    return arrays | {"slots": table}

  @classmethod
  def of_state(cls, engine: Engine, state: Mapping[str, np.ndarray]) -> Tracks:
    """Goes on from what `state` gave.

    Raises:
      ValueError: it is of another model, or is none.
    """
    try:
      slots, cond = state["cond_frames"].shape
    except (KeyError, ValueError) as e:
      raise ArgumentError("state", f" must be what Tracks.state gave, got one without it ({e})") from None
    tracks = cls(engine, slots, cond)
    found = {}
    for name, like in vars(tracks.bank).items():
      array = of_bits(state[name], like.dtype)
      if array.shape != like.shape:
        raise ArgumentError(
          "state", f" must be of this tracker and its profile: {name} is {like.shape}, got {array.shape}"
        )
      found[name] = array
    tracks.bank = tracks._placed(Bank(**found))
    tracks.slots = {int(i): int(s) for i, s in state["slots"]}
    return tracks


def grid_of(engine: Engine) -> int:
  """Side of the token grid of its images."""
  return engine.processor.image_size // engine.tracker.config.patch_size


def bucket(count: int) -> int:
  """The smallest power of two that holds `count`; one program is compiled for each."""
  if not 0 <= count <= MOST_SLOTS:
    raise ArgumentError("slots", f" must be from 0 to {MOST_SLOTS}, got {count}")
  return 1 << max(0, count - 1).bit_length()


def bits(x: np.ndarray) -> np.ndarray:
  """bfloat16, which numpy cannot save, as uint16; anything else as it is."""
  return x.view(np.uint16) if x.dtype == jnp.bfloat16 else np.asarray(x)


@contextlib.contextmanager
def saved_by(function: str, file: Any) -> Iterator[dict[str, np.ndarray]]:
  """The arrays of a file that `numpy.savez` wrote for `function`.

  Raises:
    ValueError: it is none, or what is inside the block does not find in it what should be there.
  """
  try:
    with np.load(file, allow_pickle=False) as data:
      yield dict(data)
  except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile) as e:
    if isinstance(e, OSError) and e.errno is not None:
      raise
    name = os.fspath(file) if isinstance(file, os.PathLike) else file
    raise ArgumentError("state", f"={name!r} is not what {function} wrote, or damaged") from e


def of_bits(x: np.ndarray, dtype: Any) -> np.ndarray:
  return x.view(dtype) if x.dtype == np.uint16 else x.astype(dtype)
