"""One frame of a clip, as pure functions: what compiled programs of `video` are made of.

    follow -> Tracked, then remember -> Bank        a frame that nobody asked about
    prompt -> Tracked, then remember(cond=...)      clicks or a box on it
    given_masks -> Tracked, then remember(cond=...) masks that are taken as they are

All of them take all slots of a bank; what dead slots give means nothing. Axes as in `bank`; h, w rows and
columns of the token grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sam3lt_jax.features import Clicks, Tracked, TrackerFeatures
from sam3lt_jax.ops import target
from sam3lt_jax.ops.resize import resized
from sam3lt_jax.tracker import MEMORY_SCALE, Sam3Tracker
from sam3lt_jax.video import bank as banks
from sam3lt_jax.video.bank import Bank, Clock

SLOTS_TOGETHER = 8  # where there is no CPU, of what is small for one; slots beyond run after them


def one_frame(features: TrackerFeatures, row: jax.Array) -> TrackerFeatures:
  """Row `row` (int32 []) of a batch's features."""
  return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), features)


def follow(
  tracker: Sam3Tracker,
  variables: Any,
  bank: Bank,
  features: TrackerFeatures,
  clock: Clock,
  which: jax.Array | None = None,
) -> Tracked:
  """Objects on a frame, from what is remembered of them; changes nothing.

  features: of the frame, 1 row. which: bool [P], slots that are meant; None: all live ones.
  """
  which = bank.live if which is None else which & bank.live
  return prompt(tracker, variables, bank, features, clock, None, which, with_memory=True)


def condition(
  tracker: Sam3Tracker, variables: Any, bank: Bank, features: TrackerFeatures, clock: Clock, which: jax.Array
) -> jax.Array:
  """The frame's map with what is remembered of objects: [P, h, w, D].

  One object after the other, each of which pays for the maps that it has: the blocks of one fill a device.
  """
  started = tracker.apply(variables, features, method="start_memory_attention")
  memory = banks.choose(bank, tracker.config, clock)
  one = lambda memory: tracker.apply(variables, started, memory, method="condition")  # noqa: E731
  return _by_slots(one, which, memory, together=1)


def prompt(
  tracker: Sam3Tracker,
  variables: Any,
  bank: Bank,
  features: TrackerFeatures,
  clock: Clock,
  clicks: Clicks | None,
  which: jax.Array,
  with_memory: bool = False,
) -> Tracked:
  """The objects of slots `which` (bool [P]) on a frame with clicks, or logits to start from; changes nothing.

  Args:
    clicks: one row a slot, with masks and has_mask, without image_index.
    with_memory: what is remembered of them is read too (static). False: as on a first frame.
  """
  image = condition(tracker, variables, bank, features, clock, which) if with_memory else None
  answer = lambda given: tracker.apply(variables, features, *given, method="prompted")  # noqa: E731
  return _by_slots(answer, which, (clicks, image))


def remember(
  tracker: Sam3Tracker,
  variables: Any,
  bank: Bank,
  features: TrackerFeatures,
  clock: Clock,
  tracked: Tracked,
  which: jax.Array | None = None,
  cond: jax.Array | None = None,
  binary: jax.Array | None = None,
) -> Bank:
  """The bank after a frame.

  Args:
    which: bool [P], slots that this frame is remembered of; None: all live ones.
    cond: bool [P], for which of them it is a frame with a prompt; None: for none.
    binary: bool [P], whose mask was given and counts as 0s and 1s; None: as `cond`.
  """
  P = len(bank.live)
  which = bank.live if which is None else which & bank.live
  cond = jnp.zeros(P, bool) if cond is None else cond
  binary = cond if binary is None else binary
  present = tracked.object_score_logits > 0
  maps = maps_of(tracker, variables, features, tracked.masks, present, binary, which)
  quality = quality_of(tracked)
  if tracker.config.profile.group_rules:
    quality = banks.shared_quality(bank, quality)
  return banks.write(bank, tracker.config, clock, which, maps, tracked.pointers, quality, cond)


def maps_of(
  tracker: Sam3Tracker,
  variables: Any,
  features: TrackerFeatures,
  logits: jax.Array,
  present: jax.Array,
  binary: jax.Array,
  which: jax.Array,
  exclusive: jax.Array | None = None,
  direct: bool = False,
) -> jax.Array:
  """What to remember of masks on a frame: bfloat16 [P, T, C].

  Args:
    logits: float32 [P, 4h, 4w] or of any other side. present: bool [P], whether the object is there.
    which, binary: see `remember`. exclusive, direct: see `Sam3Tracker.mask_to_remember`.
  """
  grid = features.image.shape[1]

  def encode(given):
    logits, binary, present = given
    masks = logits
    if exclusive is None:
      masks = tracker.apply(variables, logits, binary, grid, direct, method="mask_to_remember")
    memory = tracker.apply(variables, features, masks, present, method="encode_memory")
    return memory.reshape(len(memory), -1, memory.shape[-1]).astype(jnp.bfloat16)

  if exclusive is not None:  # which reads all slots at once
    logits = tracker.apply(variables, logits, binary, grid, direct, exclusive, method="mask_to_remember")
  return _by_slots(encode, which, (logits, binary, present))


def quality_of(tracked: Tracked) -> jax.Array:
  """float32 [P] in [0, 1]: how sure the tracker is that the object is there, times the IoU it expects."""
  there = jnp.maximum(2 * jax.nn.sigmoid(tracked.object_score_logits) - 1, 0)
  return there * tracked.ious


def given_masks(
  tracker: Sam3Tracker, variables: Any, features: TrackerFeatures, masks: jax.Array, which: jax.Array
) -> Tracked:
  """Masks that are taken as they are, with the pointers that stand for them.

  masks: float32 [P, S, S] in [0, 1], S as `Sam3Tracker.mask_side` says. which: bool [P].
  """

  def one(masks: jax.Array) -> Tracked:
    there = (masks > 0).any(axis=(1, 2))
    logits = resized(2 * MEMORY_SCALE * masks - MEMORY_SCALE, features.mask_side)
    pointers = tracker.apply(variables, features, masks, method="pointers_of_masks")
    score = jnp.where(there, MEMORY_SCALE, -MEMORY_SCALE)
    return Tracked(logits, pointers, score, jnp.ones_like(score))

  return _by_slots(one, which, masks)


def _by_slots(
  function: Callable[[Any], Any], which: jax.Array, rows: Any, together: int = SLOTS_TOGETHER
) -> Any:
  """`function` of so many slots at a time, where any of them is meant, and zeros elsewhere.

  On a CPU one by one.
  """
  P = len(which)
  together = 1 if target.current().has_cpu else min(P, together)
  if P % together:
    together = P
  split = lambda x: x.reshape(P // together, together, *x.shape[1:])  # noqa: E731
  function = jax.jit(function)  # traced once, for its shapes and for itself
  kind = jax.eval_shape(function, jax.tree.map(lambda x: split(x)[0], rows))

  def some(given):
    any_of_them, rows = given
    nothing = lambda _: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kind)  # noqa: E731
    return jax.lax.cond(any_of_them.any(), function, nothing, rows)

  out = jax.lax.map(some, jax.tree.map(split, (which, rows)))
  return jax.tree.map(lambda x: x.reshape(P, *x.shape[2:]), out)
