"""The state of a clip: what is remembered of P objects. One pytree of static shapes, pure functions of it.

A slot holds an object's latest maps and pointers in two rings, and those of its frames with prompts
("conditioning frames") beside them, so that its size does not depend on the clip's length. What stands in a
dead slot or an empty place never matters, NaN included.

Axes: P slots, Kc frames with prompts, R and L places of the rings, T tokens of a map, C memory width, D
width.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.config import TrackerConfig
from sam3lt_jax.features import Memory

EMPTY = -(1 << 28)  # frame number of a place that holds nothing
_FAR = 1 << 29


@flax.struct.dataclass
class Clock:
  """Where in the clip a step is; three int32 [], all traced.

  Attributes:
    frame: number of the frame.
    direction: 1 forward, -1 backward.
    normaliser: distances of object pointers are shares of this less 1; as many frames back they are read.
  """

  frame: Any
  direction: Any
  normaliser: Any

  @classmethod
  def at(cls, frame: int, config: TrackerConfig, reverse: bool = False, frames: int | None = None) -> Clock:
    """frames: how many the clip has; None: nobody knows, as with a camera."""
    most = config.memory.max_pointers
    return cls(*map(np.int32, (frame, -1 if reverse else 1, most if frames is None else min(frames, most))))


@flax.struct.dataclass
class Bank:
  """Attributes:

  live: bool [P], slots that hold an object.
  birth: int32 [P], the frame that the object's group first appears on; read under `group_rules` alone.
  cond_maps: bfloat16 [P, Kc, T, C]; cond_pointers: [P, Kc, D]; cond_frames: int32 [P, Kc], of frames with
    prompts.
  maps: bfloat16 [P, R, T, C]; map_frames: int32 [P, R]; map_quality: float32 [P, R], 0 for a frame with a
    prompt, which is here as well.
  pointers: [P, L, D]; pointer_frames: int32 [P, L]; pointer_quality: float32 [P, L].
  """

  live: jax.Array
  birth: jax.Array
  cond_maps: jax.Array
  cond_pointers: jax.Array
  cond_frames: jax.Array
  maps: jax.Array
  map_frames: jax.Array
  map_quality: jax.Array
  pointers: jax.Array
  pointer_frames: jax.Array
  pointer_quality: jax.Array


def empty(
  config: TrackerConfig, grid: int, slots: int, cond: int | None = None, dtype: Any = jnp.float32
) -> Bank:
  """A bank without objects.

  Args:
    grid: side of the token grid. dtype: of pointers, the tracker's.
    cond: frames with prompts that an object may have; None: the 4 that are read, enough to go forward.
  """
  m = config.memory
  # With selection the frame before this one stands beside as many good ones as are read.
  more = config.profile.memory_quality is not None
  P, Kc, R, L = slots, cond or m.max_cond_frames, m.num_maps - 1 + more, m.max_pointers - 1 + more
  T, C, D = grid * grid, m.hidden_size, config.hidden_size
  none = lambda n: jnp.full((P, n), EMPTY, jnp.int32)  # noqa: E731
  map_of = lambda n: jnp.zeros((P, n, T, C), jnp.bfloat16)  # noqa: E731
  return Bank(
    jnp.zeros(P, bool), jnp.zeros(P, jnp.int32),
    map_of(Kc), jnp.zeros((P, Kc, D), dtype), none(Kc),
    map_of(R), none(R), jnp.zeros((P, R), jnp.float32),
    jnp.zeros((P, L, D), dtype), none(L), jnp.zeros((P, L), jnp.float32),
  )  # fmt: skip


def grow(bank: Bank, slots: int) -> Bank:
  """The same with more slots; changes no result."""

  def wider(name: str, x: jax.Array) -> jax.Array:
    sides = [(0, slots - len(x)), *[(0, 0)] * (x.ndim - 1)]
    return jnp.pad(x, sides, constant_values=EMPTY if name.endswith("_frames") else 0)

  return Bank(**{name: wider(name, x) for name, x in vars(bank).items()})


def clear(bank: Bank, which: jax.Array) -> Bank:
  """Without the objects of these slots (bool [P]): nothing of them is read any more."""
  gone = lambda frames: jnp.where(which[:, None], EMPTY, frames)  # noqa: E731
  return bank.replace(
    live=bank.live & ~which, cond_frames=gone(bank.cond_frames), map_frames=gone(bank.map_frames),
    pointer_frames=gone(bank.pointer_frames),
  )  # fmt: skip


def born(bank: Bank, which: jax.Array, frame: jax.Array) -> Bank:
  """With new objects in these slots (bool [P]), which must be free and clear, of the group of this frame."""
  return bank.replace(live=bank.live | which, birth=jnp.where(which, frame, bank.birth).astype(jnp.int32))


def shared_quality(bank: Bank, quality: jax.Array) -> jax.Array:
  """The mean over each object's group: float32 [P]."""
  together = (bank.birth[:, None] == bank.birth) & bank.live
  return jnp.where(together, quality, 0).sum(axis=1) / jnp.maximum(together.sum(axis=1), 1)


# ---------------------------------------------------------------- writing


def write(
  bank: Bank,
  config: TrackerConfig,
  clock: Clock,
  which: jax.Array,
  maps: jax.Array,
  pointers: jax.Array,
  quality: jax.Array,
  cond: jax.Array,
) -> Bank:
  """Remembers a frame.

  Args:
    which: bool [P], slots that this frame is remembered of. Another slot that has a prompt on this frame
      keeps that as one of its latest.
    maps: [P, T, C], rounded to bfloat16 as both references do; pointers: [P, D]; quality: float32 [P].
    cond: bool [P], for which of them it is a frame with a prompt; where it was one before, it stays one.
  """
  frame = jnp.asarray(clock.frame, jnp.int32)
  prompted = (bank.cond_frames == frame) & bank.live[:, None]
  cond = which & (cond | prompted.any(axis=1))
  again = prompted.any(axis=1) & ~which
  at = prompted.argmax(axis=1)[:, None]
  stored_map = jnp.take_along_axis(bank.cond_maps, at[..., None, None], axis=1)[:, 0]
  stored_pointer = jnp.take_along_axis(bank.cond_pointers, at[..., None], axis=1)[:, 0]
  maps = jnp.where(again[:, None, None], stored_map, maps.astype(jnp.bfloat16))
  pointers = jnp.where(again[:, None], stored_pointer, pointers.astype(bank.pointers.dtype))
  quality = jnp.where(again | cond, 0.0, quality)
  threshold = config.profile.memory_quality

  latest = which | again
  m = _place(bank.map_frames, bank.map_quality, clock, threshold)
  p = _place(bank.pointer_frames, bank.pointer_quality, clock, threshold)
  c = _place(bank.cond_frames, None, clock, None)
  return bank.replace(
    maps=_put(bank.maps, m, latest, maps), map_frames=_put(bank.map_frames, m, latest, frame),
    map_quality=_put(bank.map_quality, m, latest, quality),
    pointers=_put(bank.pointers, p, latest, pointers),
    pointer_frames=_put(bank.pointer_frames, p, latest, frame),
    pointer_quality=_put(bank.pointer_quality, p, latest, quality),
    cond_maps=_put(bank.cond_maps, c, cond, maps), cond_pointers=_put(bank.cond_pointers, c, cond, pointers),
    cond_frames=_put(bank.cond_frames, c, cond, frame),
  )  # fmt: skip


def _place(frames: jax.Array, quality: jax.Array | None, clock: Clock, threshold: float | None) -> jax.Array:
  """Where the clock's frame is written, int32 [P]: where it stands already, or nothing does, or what is
  ahead, or what is not good enough to be read later, or the oldest.
  """
  age = (clock.frame - frames) * clock.direction
  order = jnp.where(age < 0, _FAR + 1, age)
  if threshold is not None:
    order = jnp.where((age > 0) & (quality <= threshold), _FAR, order)
  order = jnp.where(frames == EMPTY, _FAR + 2, order)
  return jnp.where(frames == clock.frame, _FAR + 3, order).argmax(axis=1)


def _put(array: jax.Array, at: jax.Array, which: jax.Array, value: jax.Array) -> jax.Array:
  """array [P, N, ...] with value [P, ...] (or one number) at place `at` [P] of the slots `which` [P]."""
  at = jnp.where(which, at, array.shape[1])  # out of range: dropped
  value = jnp.broadcast_to(value, (array.shape[0], *array.shape[2:]))
  return array.at[jnp.arange(array.shape[0]), at].set(value.astype(array.dtype), mode="drop")


# ---------------------------------------------------------------- reading


def choose(bank: Bank, config: TrackerConfig, clock: Clock) -> Memory:
  """What each slot's object reads of its past on the clock's frame.

  At most 4 frames with prompts, ahead or past; the 6 frames before; object pointers of those frames with
  prompts that are not ahead and of the frames before. With selection (`memory_quality`), "the frames before"
  are the last good ones and the one just before, by rank and not by distance; like the authors' code it
  leaves out the oldest pointer and, going forward, frame 0.
  """
  m, profile = config.memory, config.profile
  cond, chosen = _chosen_cond(bank.cond_frames, clock.frame, m.max_cond_frames)
  cond_there = chosen != EMPTY

  before = lambda frames, quality: _age(frames, quality, clock, profile.memory_quality)  # noqa: E731
  taken = (bank.map_frames[..., None] == chosen[:, None]).any(axis=2)
  age, _ = before(bank.map_frames, bank.map_quality)
  recent = (age >= 1) & (age < m.num_maps) & ~taken

  there = jnp.concatenate([cond_there, recent], axis=1)
  rows = jnp.concatenate([jnp.full_like(chosen, m.num_maps - 1), age - 1], axis=1)
  maps = jnp.concatenate(
    [jnp.take_along_axis(bank.cond_maps, cond[..., None, None], axis=1), bank.maps], axis=1
  )
  order = jnp.argsort(~there, axis=1, stable=True)[:, : m.max_cond_frames + m.num_maps - 1]
  maps = jnp.take_along_axis(maps, order[..., None, None], axis=1)
  rows = jnp.clip(jnp.take_along_axis(rows, order, axis=1), 0, m.num_maps - 1)

  if profile.all_cond_pointers:
    cond_frames, cond_pointers = bank.cond_frames, bank.cond_pointers
  else:
    cond_frames, cond_pointers = chosen, jnp.take_along_axis(bank.cond_pointers, cond[..., None], axis=1)
  cond_age = (clock.frame - cond_frames) * clock.direction
  age, listed = before(bank.pointer_frames, bank.pointer_quality)
  taken = (bank.pointer_frames[..., None] == cond_frames[:, None]).any(axis=2)
  recent = (age >= 1) & (age < clock.normaliser) & ~taken
  if listed is not None:  # the last of the list is left out
    recent &= age < listed[:, None]
  return Memory(
    maps, rows, jnp.where(bank.live, there.sum(axis=1), 0).astype(jnp.int32),
    jnp.concatenate([cond_pointers, bank.pointers], axis=1),
    jnp.concatenate([cond_age, age], axis=1) / jnp.maximum(clock.normaliser - 1, 1).astype(jnp.float32),
    jnp.concatenate([(cond_frames != EMPTY) & (cond_age >= 0), recent], axis=1) & bank.live[:, None],
  )  # fmt: skip


def _chosen_cond(frames: jax.Array, now: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
  """Places and numbers of the frames with prompts that are read, int32 [P, min(Kc, most)]; EMPTY where none.

  The closest before and the closest of now or after, then the nearest; whatever the direction.
  """
  there = frames != EMPTY
  distance = jnp.abs(frames - now)
  first = jnp.zeros_like(there)
  for side in (there & (frames < now), there & (frames >= now)):
    nearest = jnp.where(side, distance, _FAR).min(axis=1, keepdims=True)
    first |= side & (distance == nearest)
  order = jnp.argsort(jnp.where(first, -1, jnp.where(there, distance, _FAR)), axis=1, stable=True)[:, :most]
  return order, jnp.take_along_axis(frames, order, axis=1)


def _age(
  frames: jax.Array, quality: jax.Array, clock: Clock, threshold: float | None
) -> tuple[jax.Array, jax.Array | None]:
  """How far back each place's frame counts, int32 [P, N]: 1 for the frame before; 0 or less: not at all.

  With selection: its rank in the list of good frames, and also how long that list is, int32 [P].
  """
  back = jnp.where(frames == EMPTY, 0, (clock.frame - frames) * clock.direction)
  if threshold is None:
    return back, None
  good = (back >= 1) & (quality > threshold) & ((frames >= 1) | (clock.direction < 0))
  closer = (good[:, None] & (back[:, None] < back[..., None])).sum(axis=2)
  before_is_bad = ~(good & (back == 1)).any(axis=1)
  kept = good & (closer < clock.normaliser - 1)
  rank = jnp.where(kept, closer + 1 + before_is_bad[:, None], 0)
  rank = jnp.where((back == 1) & ~good, 1, rank)
  return rank, kept.sum(axis=1) + before_is_bad
