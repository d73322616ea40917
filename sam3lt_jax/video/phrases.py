"""Phrase video: all that phrases name in a clip, found by the detector on every frame and followed on.

A frame takes two device programs with the host's decisions between them:

    observe   every object followed, its mask cleaned; how many pixels all masks have and share
    decide    `decisions`, numpy: new, removed, hidden, suppressed, reconditioned
    commit    memory of what is left, new objects into free slots -> the next bank, the masks to put out

Only counts and scores leave the device between them; masks do when they are put out, 14 frames later, so that
objects which are soon removed are never seen.

Axes: R frames of a batch, P slots, C prompts that were asked together, Q object queries, N objects; h, w a
mask; H, W the clip.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax import parallel
from sam3lt_jax.config import BOX_ONLY_PHRASE, PhraseVideoConfig
from sam3lt_jax.engine import Engine
from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.features import Clicks, Detections, Tracked, TrackerFeatures, VisionFeatures
from sam3lt_jax.kept import MaskSource
from sam3lt_jax.ops import overlap
from sam3lt_jax.ops.components import clean_small
from sam3lt_jax.ops.resize import resized
from sam3lt_jax.processing.clicks import ClickArrays
from sam3lt_jax.processing.masks import mask_box
from sam3lt_jax.processing.postprocess import sigmoid
from sam3lt_jax.processing.prompts import Prompt, prompts_of
from sam3lt_jax.processing.results import Results, hold_masks
from sam3lt_jax.programs import Program, explain_memory
from sam3lt_jax.tracker import ABSENT_LOGIT, CELL, Sam3Tracker
from sam3lt_jax.video import bank as banks
from sam3lt_jax.video import decisions, step
from sam3lt_jax.video.bank import Bank, Clock
from sam3lt_jax.video.decisions import CLICKED, Counters, Delay, Observed, Plan, Waiting
from sam3lt_jax.video.tracks import Tracks, bits, of_bits

HIDDEN_LOGIT = -10.0  # everywhere in a mask that was suppressed
BORDER = 0.025  # of the frame's sides, see `suppress_det_close_to_boundary`
NEAR = 16  # frames around a click on which the object's detections are taken back
NONE = -1  # no detection, no phrase
MOST_CLICKED = 16  # frames of an object with clicks that later clicks leave alone
_FORMAT = 1  # of a saved state


# ---------------------------------------------------------------- the programs


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

  def as_given(at: jax.Array) -> tuple[Tracked, jax.Array, jax.Array]:
    """Detections as the tracker takes masks; their logits, as they are and cleaned."""
    logits = _detected(now, at)
    prompts = _mask_prompts(config, tracker, logits, one.image.shape[1])
    given = step.given_masks(tracker, variables, one, prompts, at >= 0)
    return given, logits, clean_small(logits, config.fill_hole_area)

  nothing = jax.tree.map(jnp.zeros_like, (tracked, masks, masks))
  at = jnp.where(starts, orders.new, orders.recondition)
  given, detected, fresh = jax.lax.cond((at >= 0).any(), as_given, lambda _: nothing, at)
  out = jnp.where(starts[:, None, None], fresh, masks)
  if config.recondition_on_trk_masks:
    out = jnp.where(renews[:, None, None], detected, out)
  else:
    tracked = tracked.replace(pointers=jnp.where(renews[:, None], given.pointers, tracked.pointers))
  tracked = _where(starts, given, tracked)
  if not config.new_masks_at_mask_size:
    tracked = tracked.replace(masks=jnp.where(starts[:, None, None], first, tracked.masks))

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
    tracked.masks, tracked.object_score_logits > 0, starts, starts,
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


# ---------------------------------------------------------------- the host


class Found(NamedTuple):
  """What one call of the detector found in a batch of frames.

  Attributes:
    phrase: int [R, C], which phrase each prompt is for, -1 where nothing was asked.
    detections: [R, C, Q, ...].
  """

  phrase: np.ndarray
  detections: Detections


@dataclasses.dataclass(frozen=True)
class FrameObjects:
  """The objects of a frame, their masks still on the device.

  Attributes:
    frame: its number.
    ids: ascending. phrases: which phrase each belongs to, -1 for those that were only clicked on.
    scores: each object's first detection score, 1 once it was clicked on.
    tracker_scores: how sure the tracker is, on this frame, that each is there.
    logits: float32 [P, h, w]; rows: which of them is each object's.
    removed: ids of objects that were put out on earlier frames and turned out to be none, or that the user
      removed.
  """

  frame: int
  ids: list[int]
  phrases: list[int]
  scores: list[float]
  tracker_scores: list[float]
  logits: jax.Array
  rows: list[int]
  removed: tuple[int, ...] = ()

  def only(self, keep: Sequence[int], removed: tuple[int, ...] = ()) -> FrameObjects:
    """Those at these places."""
    lists = {name: [getattr(self, name)[k] for k in keep] for name in _LISTS}
    return dataclasses.replace(self, **lists, removed=removed)

  def masks(self) -> np.ndarray:
    """Logits float32 [N, h, w], on the host."""
    return np.asarray(self.logits)[np.array(self.rows, int)]


_LISTS = ("ids", "phrases", "scores", "tracker_scores", "rows")


# Of the thresholds, those that programs read; others change without another compilation.
_ON_DEVICE = (
  "fill_hole_area", "shrink_threshold", "shrink_at_mask_size", "shrink_spares_single",
  "new_masks_at_mask_size", "recondition_on_trk_masks",
)  # fmt: skip


class PhrasePrograms:
  """Those of an engine for one set of thresholds, compiled once for all clips; see the functions so named."""

  def __init__(self, engine: Engine, config: PhraseVideoConfig):
    self._engine, self._config = engine, config
    self.observe, self.commit, self.correct = (self._made(f) for f in (observe, commit, correct))
    self._first: dict[tuple[int, int], Program] = {}

  def first_masks(self, size: tuple[int, int]) -> Program:
    """For clips of this size."""
    if size not in self._first:
      self._first[size] = self._made(first_masks, size)
    return self._first[size]

  def _made(self, function: Any, *more: Any) -> Program:
    engine = self._engine
    return engine.program(function, parallel.replicated(engine.mesh), self._config, engine.tracker, *more)


_made: weakref.WeakKeyDictionary[Any, dict[PhraseVideoConfig, PhrasePrograms]] = weakref.WeakKeyDictionary()


def programs_of(engine: Engine, config: PhraseVideoConfig) -> PhrasePrograms:
  """The engine's, made when first asked for."""
  made = _made.setdefault(engine, {})
  config = PhraseVideoConfig(**{name: getattr(config, name) for name in _ON_DEVICE})
  if config not in made:
    made[config] = PhrasePrograms(engine, config)
  return made[config]


class PhraseTracks:
  """Objects of any number of phrases, followed through one clip.

      tracks = PhraseTracks(engine, (1080, 1920))
      for frame, features, found in ...:              # of the tracker's neck and of the detector
        for objects in tracks.step(frame, features, 0, found):
          ...
      for objects in tracks.finish():
        ...

  Nothing that it holds grows with the clip: it can be any length, or a camera.

  Attributes:
    counters: what the decisions know; `counters.ids` are the objects that are tracked.
    tracks: what the tracker knows.
    reverse: frames come in falling order.
    shown: phrases whose objects the user showed: they are followed whether they are detected again or not.
  """

  def __init__(
    self,
    engine: Engine,
    size: tuple[int, int],
    config: str | PhraseVideoConfig = "original",
    *,
    frames: int | None = None,
    reverse: bool = False,
    latency: int | None = None,
    slots: int = 1,
  ):
    """Args:
    size: (H, W).
    config: thresholds.
    frames: how many the clip has; None: nobody knows.
    reverse: frames come in falling order.
    latency: frames that results are held back; None: 14, as the hot start needs. With 0 each frame is put
      out at once, and objects that turn out to be none are named in `FrameObjects.removed`.
    slots: objects that there is room for from the start; it grows by itself.
    """
    if latency is not None and (isinstance(latency, bool) or not isinstance(latency, int) or latency < 0):
      raise ArgumentError("latency", f" must be a number of frames from 0, or None, got {latency!r}")
    self.tracks = Tracks(engine, slots)  # says early that there is no tracker
    self.config, self.size = PhraseVideoConfig.named(config), (int(size[0]), int(size[1]))
    self._programs = programs_of(engine, self.config)
    self._frames, self.reverse = frames, reverse
    self.counters = Counters()
    self.shown: set[int] = set()
    self._delay = Delay(self.config, latency)
    self._last = self._no_frame()
    self._put_out: set[int] = set()  # ids that were on any frame that left
    self._clicked: dict[int, list[int]] = {}  # id -> frames that the user clicked on

  def _no_frame(self) -> _Last:
    P, config = self.tracks.size, self.tracks.tracker.config
    side = 4 * self.tracks._grid
    none = Tracked(
      jnp.zeros((P, side, side)), jnp.zeros((P, config.hidden_size), self.tracks.tracker.dtype),
      jnp.zeros(P), jnp.zeros(P),
    )  # fmt: skip
    return _Last(banks.EMPTY, self.tracks._placed(none), None)

  @property
  def frame(self) -> int | None:
    """The one that ran last."""
    return None if self._last.waiting is None else self._last.frame

  # ---------------------------------------------------------------- frames

  def step(
    self, frame: int, features: TrackerFeatures, row: int, found: Sequence[Found]
  ) -> list[FrameObjects]:
    """The next frame; what may be put out by now, in order, mostly one frame or none.

    If it raises, nothing has changed, and the frame may be tried again.

    Args:
      features: of a batch of frames, of which `row` is meant; found: what the detector found in the batch.
    """
    now = self._now(frame, features, row, [f.detections for f in found])
    tracked, cleaned, seen = self._run(
      self._programs.observe, self.tracks.bank, now, self._last.tracked, np.int32(self._last.frame)
    )
    at, observed = self._observed(jax.device_get(seen), found, row)
    before, counters = self.counters.ids, copy.deepcopy(self.counters)
    plan = decisions.decide(self.config, counters, frame, observed, self.reverse)
    counters.pinned |= {i for i in plan.new if counters.phrase[i] in self.shown}
    tracks, (tracked, cleaned) = self._with_room(plan.new, frame, tracked, cleaned)
    orders = self._orders(plan, at, before, tracks, counters)
    first = cleaned
    if plan.new and not self.config.new_masks_at_mask_size:
      first = self._run(self._programs.first_masks(self.size), now, orders.new)
    arguments = tracks.bank, now, tracked, cleaned, first, orders
    tracks.bank, tracked, masks = self._run(self._programs.commit, *arguments)
    # From here on nothing fails.
    scores = dict(zip(before, sigmoid(observed.object_scores).tolist()))
    scores |= {i: counters.score[i] for i in plan.new}
    objects = _objects(frame, [*before, *plan.new], counters, scores, masks, tracks.slots)
    tracks.slots = {i: tracks.slots[i] for i in counters.ids}
    waiting = Waiting(frame, plan.hidden, plan.unconfirmed, objects)
    self.tracks, self.counters, self._last = tracks, counters, _Last(frame, tracked, waiting)
    return self._released(self._delay.push(waiting, counters.removed))

  def finish(self) -> list[FrameObjects]:
    """The frames that are held back, at the end of the clip."""
    return self._released(self._delay.finish(self.counters.removed))

  def _now(self, frame: int, features: TrackerFeatures, row: int, detections: Sequence[Detections]) -> Now:
    clock = self.tracks.clock(frame, self.reverse, self._frames)
    return Now(features, np.int32(row), clock, tuple(detections))

  def _run(self, program: Program, *arguments: Any) -> Any:
    with explain_memory():
      return program(self.tracks.engine.tracker_variables, *arguments)

  def _observed(self, seen: Seen, found: Sequence[Found], row: int) -> tuple[np.ndarray, Observed]:
    """(where each kept detection stands among all, what is decided on), phrase by phrase."""
    config, slots = self.config, [self.tracks.slots[i] for i in self.counters.ids]
    none = np.zeros(0, int)
    parts, start = [(none, np.zeros(0, np.float32), none, none, np.zeros((0, len(slots)), np.float32))], 0
    for call, mine in zip(found, seen.detections):
      for c, phrase in enumerate(call.phrase[row]):
        if phrase != NONE:
          scores = np.clip(mine.scores[c], 1 - config.max_score, config.max_score)
          iou = decisions.mask_iou(mine.between[c], mine.areas[c], mine.areas[c])
          keep = decisions.keep_detections(
            scores, iou, config.score_threshold_detection, config.det_nms_thresh
          )
          if config.suppress_det_close_to_boundary:
            keep &= decisions.away_from_border(mine.boxes[c], BORDER)
          k = np.flatnonzero(keep)
          at, of = start + c * len(keep) + k, np.full(len(k), phrase)
          parts.append((at, scores[k], of, mine.areas[c, k], mine.with_objects[c, k][:, slots]))
      start += mine.scores.size
    parts.sort(key=lambda part: part[2][:1].tolist())
    at, scores, phrases, areas, shared = map(np.concatenate, zip(*parts))
    between = seen.between[np.ix_(slots, slots)]
    return at, Observed(scores, phrases, areas, shared, seen.areas[slots], between, seen.scores[slots])

  def _with_room(self, new: Sequence[int], frame: int, *trees: Any) -> tuple[Tracks, tuple[Any, ...]]:
    """Tracks with slots for new objects, and trees of [P, ...] with as many; `self.tracks` stays as it is."""
    tracks = copy.copy(self.tracks)
    tracks.slots, P = dict(tracks.slots), tracks.size
    if new:
      tracks.add(new, frame)
    wider = lambda x: jnp.pad(x, [(0, tracks.size - P), *[(0, 0)] * (x.ndim - 1)])  # noqa: E731
    return tracks, jax.tree.map(wider, trees) if tracks.size > P else trees

  def _orders(
    self, plan: Plan, at: np.ndarray, before: Sequence[int], tracks: Tracks, counters: Counters
  ) -> Orders:
    """before: the objects that were tracked; tracks, counters: of after the frame."""
    slot_of = lambda ids: [tracks.slots[i] for i in ids]  # noqa: E731
    new, recondition = np.full((2, tracks.size), NONE, np.int32)
    group, rank = np.tile(np.arange(tracks.size, dtype=np.int32), (2, 1))
    for orders, chosen in ((new, plan.new), (recondition, plan.reconditioned)):
      orders[slot_of(chosen)] = at[list(chosen.values())]
    renewed = set(plan.reconditioned)
    if tracks.tracker.config.profile.group_rules:
      births = {counters.first_frame[i] for i in renewed}
      renewed = {i for i in before if counters.first_frame[i] in births}
    first: dict[int, int] = {}
    for k, i in enumerate(before):
      rank[tracks.slots[i]] = k
      if counters.phrase[i] != CLICKED:
        group[tracks.slots[i]] = first.setdefault(counters.phrase[i], tracks.slots[i])
    marked = map(tracks.mask, (renewed, plan.suppressed, plan.removed))
    return Orders(new, recondition, *marked, group, rank)

  def _released(self, released: Sequence[tuple[Waiting, set[int]]]) -> list[FrameObjects]:
    out = []
    for waiting, never in released:
      objects: FrameObjects = waiting.content
      gone = tuple(sorted(self.counters.removed & self._put_out))
      self._put_out.difference_update(gone)
      objects = objects.only([k for k, i in enumerate(objects.ids) if i not in never], gone)
      self._put_out.update(objects.ids)
      out.append(objects)
    held = {i for w in self._delay.waiting for i in w.content.ids} | self._put_out
    self.counters.forget(self.counters.removed - held)
    return out

  # ---------------------------------------------------------------- what the user does

  def click(
    self,
    clicks: ClickArrays,
    features: TrackerFeatures,
    row: int,
    object_id: int | None = None,
    phrase: int = CLICKED,
  ) -> FrameObjects:
    """Corrects an object on the frame that ran last, or begins one there; its objects as they are now.

    An object that was clicked on is never removed or hidden by itself, and its score is 1.

    Args:
      clicks: of one object, `processing.clicks.clicks_of`.
      features, row: of the frame that ran last.
      object_id: which object; None: a new one.
      phrase: what a new one belongs to; -1: to none.

    Raises:
      ValueError: no frame ran, no such object, the object limit, clicks of several objects.
    """
    last = self._last
    if last.waiting is None:
      raise ValueError("clicks are about a frame: let one run first")
    if len(clicks.valid) != 1:
      raise ArgumentError("points", f" must be of one object, got {len(clicks.valid)}")
    begins = object_id is None
    if not begins:
      self._check(object_id)
    elif len(self.counters.ids) >= self.config.max_num_objects:
      raise ValueError(f"there are {len(self.counters.ids)} objects already, which is max_num_objects")
    counters = copy.deepcopy(self.counters)
    if begins:
      object_id = counters.next_id
      counters.begin(object_id, last.frame, phrase)
    counters.pin(object_id)
    tracks, (before,) = self._with_room([object_id] if begins else [], last.frame, last.tracked)
    which = tracks.mask([object_id])
    kept = sorted({*self._clicked.get(object_id, []), last.frame})[-MOST_CLICKED:]
    kept_array = np.array([*kept, *kept[:1] * (MOST_CLICKED - len(kept))], np.int32)
    rows = (tracks.rows({object_id: x[0]}, np.zeros_like(x[0])) for x in clicks[:3])
    now = self._now(last.frame, features, row, ())
    arguments = tracks.bank, now, before, Clicks(*rows), which, which & begins, kept_array
    tracks.bank, tracked, masks = self._run(self._programs.correct, *arguments)
    waiting = _corrected(last.waiting, object_id, counters, tracked, masks, tracks.slots[object_id])
    self.tracks, self.counters, self._clicked[object_id] = tracks, counters, kept
    self._last = _Last(last.frame, tracked, waiting)
    if self._delay.waiting:
      self._delay.waiting[-1] = waiting
    never = waiting.hidden | waiting.unconfirmed | counters.removed
    objects: FrameObjects = waiting.content
    return objects.only([k for k, i in enumerate(objects.ids) if i not in never])

  def remove(self, object_id: int) -> None:
    """Takes an object out, from the frames that wait to be put out as well.

    Raises:
      ValueError: no such object.
    """
    self._check(object_id)
    tracks = copy.copy(self.tracks)
    tracks.slots = dict(tracks.slots)
    tracks.remove([object_id])
    self.tracks = tracks
    self.counters.remove({object_id})
    self._clicked.pop(object_id, None)

  def _check(self, object_id: int) -> None:
    if object_id not in self.tracks.slots:
      raise ArgumentError("object_id", f" must be one of {self.counters.ids}, got {object_id!r}")

  # ---------------------------------------------------------------- kept for later

  def fork(self) -> PhraseTracks:
    """A second one that goes on from here by itself."""
    other = copy.copy(self)
    other.counters, other._delay = copy.deepcopy(self.counters), copy.copy(self._delay)
    other._delay.waiting = list(self._delay.waiting)
    other.shown, other._put_out = set(self.shown), set(self._put_out)
    other._clicked = dict(self._clicked)
    return other

  def state(self) -> dict[str, np.ndarray]:
    """All that is needed to go on, bit for bit, as arrays that `numpy.savez` takes."""
    waiting = list(self._delay.waiting)
    if self._last.waiting is not None and not waiting:
      waiting = [self._last.waiting]  # clicks may still come
    held = [_to_json(w) for w in waiting]
    arrays = {f"waiting/{k}": np.asarray(w.content.masks()) for k, w in enumerate(waiting)}
    arrays |= {f"tracks/{k}": v for k, v in self.tracks.state().items()}
    arrays |= {f"last/{k}": bits(np.asarray(v)) for k, v in vars(self._last.tracked).items()}
    known = {
      "format": _FORMAT, "counters": self.counters.to_json(), "shown": sorted(self.shown),
      "put_out": sorted(self._put_out), "clicked": [[i, t] for i, t in self._clicked.items()],
      "waiting": held, "delayed": len(self._delay.waiting), "frame": self._last.frame,
    }  # fmt: skip
    return arrays | {"known": np.array(json.dumps(known))}

  def load_state(self, state: Mapping[str, np.ndarray]) -> None:
    """Goes on from what `state` gave, of a clip with the same size, thresholds and direction.

    Raises:
      ValueError: it is of another model, or is none.
    """
    try:
      known = json.loads(str(state["known"]))
      number = known["format"]
    except (KeyError, TypeError, ValueError) as e:
      raise ArgumentError(
        "state", f" must be what PhraseTracks.state gave, got one without it ({e})"
      ) from None
    if number != _FORMAT:
      raise ArgumentError("state", f" must be of format {_FORMAT}, got {number}")
    part = lambda name: {k.removeprefix(name): v for k, v in state.items() if k.startswith(name)}  # noqa: E731
    tracks = Tracks.of_state(self.tracks.engine, part("tracks/"))
    waiting = [_of_json(w, tracks._placed(state[f"waiting/{k}"])) for k, w in enumerate(known["waiting"])]
    like = vars(self._last.tracked)
    last = Tracked(**{k: of_bits(v, like[k].dtype) for k, v in part("last/").items()})
    self.tracks, self.counters = tracks, Counters.from_json(known["counters"])
    self.shown, self._put_out = set(known["shown"]), set(known["put_out"])
    self._clicked = {i: t for i, t in known["clicked"]}
    self._delay.waiting = waiting[: known["delayed"]]
    self._last = _Last(known["frame"], tracks._placed(last), waiting[-1] if waiting else None)


class Batch(NamedTuple):
  """Some frames that run through the image model together, and what the detector found in them.

  Attributes:
    frames: their numbers, a row of `vision` each.
    phrases: how many phrases there were when it was asked.
  """

  frames: Sequence[int]
  vision: VisionFeatures
  found: Sequence[Found]
  phrases: int


class PhraseVideo:
  """Phrases, example boxes and clicks about one clip.

      video = PhraseVideo(engine, (1080, 1920))
      video.add_phrase("person")
      for frame, pixels in ...:                       # uint8 [S, S, 3]
        batch = video.look([frame], engine.encode([pixels]))
        for objects in video.step(batch, 0):
          results = video.results(objects)            # ids, masks [N, H, W], boxes, scores
      for objects in video.finish():
        ...

  Attributes:
    tracks: the objects, `PhraseTracks`: `click` and `remove` are there.
    texts: what each phrase says; None: nothing but the boxes of `add_boxes` does.
  """

  def __init__(self, engine: Engine, size: tuple[int, int], config: Any = "original", **options: Any):
    """Arguments as in `PhraseTracks`."""
    self.engine, self.tracks = engine, PhraseTracks(engine, size, config, **options)
    self.texts: list[str | None] = []
    self._boxes: dict[tuple[int, int], Prompt] = {}  # (phrase, frame)

  def add_phrase(self, text: str) -> int:
    """Sought from the next frame on; its number. A phrase that is there already keeps its own."""
    (prompt,) = prompts_of(text, None, None)
    if prompt.text not in self.texts:
      self.texts.append(prompt.text)
    return self.texts.index(prompt.text)

  def add_boxes(self, frame: int, boxes: Any, labels: Any = None, phrase: int | None = None) -> int:
    """Examples on a frame that is still to come, of a phrase or by themselves; the phrase's number.

    Objects that boxes alone show are found on that frame and followed, whether detected again or not.

    Args:
      boxes: (x1, y1, x2, y2) in pixels of the clip, [N, 4]. labels: 1 (like this) or 0 (not); None: all 1.

    Raises:
      ValueError: naming the argument; the frame has run.
    """
    direction = -1 if self.tracks.reverse else 1
    if self.tracks.frame is not None and (frame - self.tracks.frame) * direction <= 0:
      raise ArgumentError("frame", f" must be still to come, after {self.tracks.frame}, got {frame}")
    if phrase is not None and not 0 <= phrase < len(self.texts):
      raise ArgumentError("phrase", f" must be one of the {len(self.texts)} phrases, got {phrase}")
    text = None if phrase is None else self.texts[phrase]
    (prompt,) = prompts_of(text, boxes, labels)
    self.engine.box_arrays(prompt, self.tracks.size)  # raises
    if phrase is None:
      phrase = len(self.texts)
      self.texts.append(None)
      self.tracks.shown.add(phrase)
    self._boxes[phrase, frame] = prompt
    return phrase

  def look(self, frames: Sequence[int], vision: VisionFeatures) -> Batch:
    """Starts the detector on some frames; vision: of `Engine.encode`, a row each."""
    numbers, asked = [], []
    for frame in frames:
      prompts = {n: self._boxes.get((n, frame), text and Prompt(text)) for n, text in enumerate(self.texts)}
      prompts = {n: prompt for n, prompt in prompts.items() if prompt}
      numbers.append(list(prompts))
      asked.append(self.engine.asked(None, self.tracks.size, list(prompts.values())))
    self.engine.phrases.add(self.engine.variables, [p.phrase for one in asked for p in one.prompts])
    found = []
    for call in self.engine.calls(asked):
      phrase = np.full(call.index.shape, NONE)
      for row, slot in np.argwhere(call.index >= 0):
        phrase[row, slot] = numbers[row][call.index[row, slot]]
      found.append(Found(phrase, self.engine.detect(vision, call)))
    return Batch(frames, vision, found, self._asked())

  def _asked(self) -> int:
    return len(self.texts) + len(self._boxes)

  def step(self, batch: Batch, row: int) -> list[FrameObjects]:
    """As `PhraseTracks.step`. What was asked since the batch was looked at counts."""
    if batch.phrases != self._asked():
      batch = self.look(batch.frames, batch.vision)
    frame = batch.frames[row]
    out = self.tracks.step(frame, batch.vision.tracker, row, batch.found)
    self._boxes = {at: prompt for at, prompt in self._boxes.items() if at[1] != frame}
    return out

  def finish(self) -> list[FrameObjects]:
    """As `PhraseTracks.finish`."""
    return self.tracks.finish()

  def results(self, objects: FrameObjects, mask_threshold: float = 0.5) -> Results:
    """What is put out of a frame, at the clip's own size."""
    return frame_results(self.engine.click_masks, objects, self.texts, self.tracks.size, mask_threshold)

  def state(self) -> dict[str, np.ndarray]:
    """As `PhraseTracks.state`, with what is asked."""
    boxes = [[*at, p.text, p.boxes, p.labels] for at, p in self._boxes.items()]
    return self.tracks.state() | {"asked": np.array(json.dumps([self.texts, boxes]))}

  def load_state(self, state: Mapping[str, np.ndarray]) -> None:
    """As `PhraseTracks.load_state`."""
    self.tracks.load_state(state)
    self.texts, boxes = json.loads(str(state["asked"]))
    self._boxes = {(n, t): Prompt(text, boxes, labels) for n, t, text, boxes, labels in boxes}


def frame_results(
  source: MaskSource,
  objects: FrameObjects,
  texts: Sequence[str | None],
  size: tuple[int, int],
  mask_threshold: float = 0.5,
) -> Results:
  """`Results` of a frame: those of its objects that have a pixel, each pixel one object's of its phrase.

  Boxes lie around the masks as they were before they shared pixels out, as in both references.

  Args:
    source: enlarges the masks. texts: of the phrases. size: (H, W).
  """
  zeros = np.zeros(len(objects.ids), int)
  (mask_of,) = source.of(
    objects.logits[None, None], (zeros, zeros, np.array(objects.rows, int)), [size], mask_threshold
  )
  masks = [mask_of(k) for k in range(len(zeros))]
  keep = decisions.choose_outputs(objects.ids, np.array([m.any() for m in masks], bool), set())
  masks, objects = [masks[k] for k in keep], objects.only(keep, objects.removed)
  boxes = np.array([mask_box(mask) for mask in masks], np.float32).reshape(-1, 4)
  decisions.without_overlap(masks, objects.tracker_scores, objects.phrases)
  labels = tuple("object" if n == CLICKED else texts[n] or BOX_ONLY_PHRASE for n in objects.phrases)
  return Results(
    boxes, np.array(objects.scores, np.float32), hold_masks(iter(masks), len(masks), size), labels, size,
    ids=np.array(objects.ids, np.int64),
  )  # fmt: skip


class _Last(NamedTuple):
  """The frame that ran last: its number, what stands in each slot there, and what is put out of it."""

  frame: int
  tracked: Tracked
  waiting: Waiting | None


def _objects(
  frame: int,
  ids: Sequence[int],
  counters: Counters,
  tracker_scores: Mapping[int, float],
  masks: jax.Array,
  rows: Mapping[int, int],
) -> FrameObjects:
  return FrameObjects(
    frame, list(ids), [counters.phrase[i] for i in ids], [counters.score[i] for i in ids],
    [tracker_scores[i] for i in ids], masks, [rows[i] for i in ids],
  )  # fmt: skip


def _corrected(
  waiting: Waiting, i: int, counters: Counters, tracked: Tracked, masks: jax.Array, slot: int
) -> Waiting:
  """A frame with object `i` as it is now, in its slot."""
  before: FrameObjects = waiting.content
  scores = dict(zip(before.ids, before.tracker_scores))
  scores[i] = float(sigmoid(np.asarray(tracked.object_score_logits)[slot]))
  rows = dict(zip(before.ids, before.rows)) | {i: len(before.logits)}
  logits = jnp.concatenate([before.logits, masks[slot][None]])
  ids = [j for j in sorted(rows) if j in counters.phrase]
  objects = _objects(before.frame, ids, counters, scores, logits, rows)
  return Waiting(before.frame, waiting.hidden - {i}, waiting.unconfirmed - {i}, objects)


def _to_json(waiting: Waiting) -> dict[str, Any]:
  objects: FrameObjects = waiting.content
  lists = {name: getattr(objects, name) for name in _LISTS if name != "rows"}
  return lists | {
    "frame": waiting.frame, "hidden": sorted(waiting.hidden), "unconfirmed": sorted(waiting.unconfirmed),
  }  # fmt: skip


def _of_json(data: Mapping[str, Any], logits: jax.Array) -> Waiting:
  lists = {name: data[name] for name in _LISTS if name != "rows"}
  objects = FrameObjects(data["frame"], **lists, logits=logits, rows=list(range(len(data["ids"]))))
  return Waiting(data["frame"], set(data["hidden"]), set(data["unconfirmed"]), objects)
