"""One frame of phrase video on the device: what `phrases` compiles. Pure functions, no state of their own.

    observe -> what the host decides on, then commit -> the next bank        a frame
    correct -> the next bank                                                 clicks on the frame that ran last

Axes: R frames of a batch, P slots, C prompts that were asked together, Q object queries; h, w a mask; H, W
the clip.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from sam3lt_jax.config import PhraseVideoConfig
from sam3lt_jax.features import Clicks, Detections, Tracked, TrackerFeatures
from sam3lt_jax.ops import overlap
from sam3lt_jax.ops.components import clean_small
from sam3lt_jax.ops.resize import resized
from sam3lt_jax.tracker import ABSENT_LOGIT, CELL, MEMORY_SCALE, Sam3Tracker
from sam3lt_jax.video import bank as banks
from sam3lt_jax.video import step
from sam3lt_jax.video.bank import Bank, Clock

HIDDEN_LOGIT = -10.0  # everywhere in a mask that was suppressed
NEAR = 16  # frames around a click on which the object's detections are taken back


@flax.struct.dataclass
class SeenDetections:
  """Of C prompts: scores float32 [C, Q]; boxes [C, Q, 4]; areas int32 [C, Q]; and pixels that their masks
  share, float32: among themselves [C, Q, Q], with each object's [C, Q, P].
  """

  scores: jax.Array
  boxes: jax.Array
  areas: jax.Array
  between: jax.Array
  with_objects: jax.Array


@flax.struct.dataclass
class Seen:
  """What `observe` tells the host: areas int32 [P] of the objects' masks, pixels that they share float32
  [P, P], their score logits float32 [P], and the detections.
  """

  areas: jax.Array
  between: jax.Array
  scores: jax.Array
  detections: tuple[SeenDetections, ...]


@flax.struct.dataclass
class Orders:
  """What `commit` is told, a row a slot.

  Attributes:
    new, recondition: int32 [P], which detection, counted through all of them; -1: none.
    cond: bool [P], objects for which this becomes a frame with a prompt.
    suppressed, removed: bool [P].
    group: int32 [P], the same slot number for all objects of a phrase; its own for every other slot.
    rank: int32 [P], the order of the objects' ids.
  """

  new: Any
  recondition: Any
  cond: Any
  suppressed: Any
  removed: Any
  group: Any
  rank: Any


class Now(NamedTuple):
  """The frame that a program is about.

  Attributes:
    features: of a batch of R frames. row: int32 [], which of them.
    clock: see `Clock`.
    detections: [R, C, Q, ...] each.
  """

  features: TrackerFeatures
  row: Any
  clock: Clock
  detections: tuple[Detections, ...]


def observe(
  config: PhraseVideoConfig,
  tracker: Sam3Tracker,
  variables: Any,
  bank: Bank,
  now: Now,
  last: Tracked,
  last_frame: jax.Array,
) -> tuple[Tracked, jax.Array, Seen]:
  """Follows every object: as tracked, the cleaned masks float32 [P, h, w], and what the host is told.

  last, last_frame: what stood on the frame that ran last. Where it is this one, objects with a prompt on it
  are as they were.
  """
  tracked = step.follow(tracker, variables, bank, step.one_frame(now.features, now.row), now.clock)
  again = (bank.cond_frames == now.clock.frame).any(axis=1) & (last_frame == now.clock.frame)
  tracked = _where(again, last, tracked)
  cleaned = clean_small(tracked.masks, config.fill_hole_area)
  on = (cleaned > 0) & bank.live[:, None, None]

  def count(found: Detections) -> SeenDetections:
    found = _of_row(found, now.row)
    masks = found.masks > 0
    return SeenDetections(
      found.scores, found.boxes, masks.sum((-1, -2)), overlap.shared_pixels(masks, masks),
      overlap.shared_pixels(masks, jnp.broadcast_to(on, (len(masks), *on.shape))),
    )  # fmt: skip

  between = overlap.shared_pixels(on, on)
  seen = Seen(on.sum((-1, -2)), between, tracked.object_score_logits, tuple(map(count, now.detections)))
  return tracked, cleaned, seen


def commit(
  config: PhraseVideoConfig,
  tracker: Sam3Tracker,
  variables: Any,
  bank: Bank,
  now: Now,
  tracked: Tracked,
  cleaned: jax.Array,
  first: jax.Array,
  orders: Orders,
) -> tuple[Bank, Tracked, jax.Array]:
  """Carries out the decisions: the next bank, what stands on this frame, masks to put out [P, h, w].

  first: float32 [P, h, w], of `first_masks`.
  """
  one = step.one_frame(now.features, now.row)
  masks = jnp.where(orders.suppressed[:, None, None], HIDDEN_LOGIT, cleaned)
  side = None if config.shrink_at_mask_size else one.image.shape[1] * CELL
  areas, left = overlap.areas_among_others(masks, orders.group, orders.rank, side)
  keeps = overlap.keeps_area(areas, left, orders.group, config.shrink_threshold, config.shrink_spares_single)

  renews, starts = orders.recondition >= 0, orders.new >= 0

  def as_given(at: jax.Array) -> tuple[Tracked, jax.Array, jax.Array, jax.Array]:
    """Detections as the tracker takes masks; their logits, as they are and cleaned; what is remembered."""
    logits = _detected(now, at)
    prompts = _mask_prompts(config, tracker, logits, one.image.shape[1])
    given = step.given_masks(tracker, variables, one, prompts, at >= 0)
    whole = first
    if config.new_masks_at_mask_size:
      whole = 2 * MEMORY_SCALE * prompts - MEMORY_SCALE
    else:
      given = given.replace(masks=first)
    return given, logits, clean_small(logits, config.fill_hole_area), whole

  at = jnp.where(starts, orders.new, orders.recondition)
  nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(as_given, at))
  given, detected, fresh, whole = jax.lax.cond((at >= 0).any(), as_given, lambda _: nothing, at)
  out = jnp.where(starts[:, None, None], fresh, masks)
  if config.recondition_on_trk_masks:
    out = jnp.where(renews[:, None, None], detected, out)
  else:
    tracked = tracked.replace(pointers=jnp.where(renews[:, None], given.pointers, tracked.pointers))
  tracked = _where(starts, given, tracked)

  # What is followed is remembered as it was seen, what begins as it was given.
  maps_of = functools.partial(step.maps_of, tracker, variables, one)
  remembered = jnp.where(keeps[:, None, None], masks, jnp.minimum(masks, HIDDEN_LOGIT))
  maps = maps_of(
    remembered,
    keeps & (areas > 0),
    jnp.zeros_like(starts),
    bank.live & ~starts & ~orders.removed,
    direct=True,
  )
  first_maps = maps_of(
    whole, tracked.object_score_logits > 0, starts, starts,
    starts if tracker.config.profile.group_rules else None,
  )  # fmt: skip
  quality = step.quality_of(tracked)
  if tracker.config.profile.group_rules:
    quality = banks.shared_quality(bank, quality)
  maps = jnp.where(starts[:, None, None], first_maps, maps)
  cond = orders.cond | starts
  bank = banks.write(bank, tracker.config, now.clock, bank.live, maps, tracked.pointers, quality, cond)
  return banks.clear(bank, orders.removed), tracked, out


def first_masks(
  config: PhraseVideoConfig,
  tracker: Sam3Tracker,
  size: tuple[int, int],
  variables: Any,
  now: Now,
  new: jax.Array,
) -> jax.Array:
  """What is remembered of detections that become objects: float32 [P, h, w], +-1024 but for the edges.

  The original brings them to the clip's own size (H, W) and back. new: int32 [P], which detections.
  """
  grid = now.features.image.shape[1]
  masks = resized(_mask_prompts(config, tracker, _detected(now, new), grid), *size) > 0.5
  if tracker.config.profile.group_rules:  # later ones take their pixels from earlier ones
    masks &= ~(jnp.cumsum(masks[::-1], axis=0)[::-1] - masks > 0)
  return resized(jnp.where(masks, -ABSENT_LOGIT, ABSENT_LOGIT), now.features.mask_side)


def correct(
  config: PhraseVideoConfig,
  tracker: Sam3Tracker,
  variables: Any,
  bank: Bank,
  now: Now,
  last: Tracked,
  clicks: Clicks,
  which: jax.Array,
  begins: jax.Array,
  kept: jax.Array,
) -> tuple[Bank, Tracked, jax.Array]:
  """Clicks on the frame that ran last: the next bank, what stands there now, masks to put out [P, h, w].

  Args:
    clicks: a row a slot, without masks. which: bool [P], slots that have some; begins: those that are new.
    kept: int32 [K], frames with prompts of the user, which stay.
  """
  profile = tracker.config.profile
  one = step.one_frame(now.features, now.row)
  if profile.refine_from_mask:
    limit = jnp.inf if profile.logit_limit is None else profile.logit_limit
    clicks = clicks.replace(masks=jnp.clip(last.masks, -limit, limit), has_mask=which & ~begins)
  answer = functools.partial(step.prompt, tracker, variables, bank, one, now.clock, clicks, which)
  tracked = answer(with_memory=profile.corrections_remember)
  # What the detector said near by is what the user corrects.
  near = jnp.abs(bank.cond_frames - now.clock.frame) < NEAR
  near &= ~jnp.isin(bank.cond_frames, kept) & which[:, None]
  bank = bank.replace(cond_frames=jnp.where(near, banks.EMPTY, bank.cond_frames))
  cond = begins if profile.corrections_remember else which
  bank = step.remember(
    tracker, variables, bank, one, now.clock, tracked, which=which, cond=cond, binary=which
  )
  return bank, _where(which, tracked, last), clean_small(tracked.masks, config.fill_hole_area)


def _where(which: jax.Array, a: Any, b: Any) -> Any:
  """Trees of [P, ...], chosen by slot."""
  return jax.tree.map(lambda x, y: jnp.where(which.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)


def _of_row(found: Detections, row: jax.Array) -> Detections:
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, row, keepdims=False), found)


def _detected(now: Now, which: jax.Array) -> jax.Array:
  """Mask logits float32 [P, h, w] of detections int32 [P], counted through all calls; zeros for -1."""
  out, start = None, 0
  for found in now.detections:
    C, Q = found.masks.shape[1:3]
    at = which - start
    inside = (at >= 0) & (at < C * Q)
    at = jnp.clip(at, 0, C * Q - 1)
    masks = jnp.where(inside[:, None, None], found.masks[now.row, at // Q, at % Q], 0)
    out, start = masks if out is None else out + masks, start + C * Q
  side = now.features.mask_side
  return jnp.zeros((len(which), side, side)) if out is None else out


def _mask_prompts(config: PhraseVideoConfig, tracker: Sam3Tracker, logits: jax.Array, grid: int) -> jax.Array:
  """float32 [P, S, S] in [0, 1], as the tracker takes masks."""
  side = tracker.mask_side(grid)
  if config.new_masks_at_mask_size:
    return resized((logits >= 0.5).astype(jnp.float32), side)
  return (resized(logits, side) > 0).astype(jnp.float32)
