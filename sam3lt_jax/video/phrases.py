"""Phrase video: all that phrases name in a clip, found by the detector on every frame and followed on.

A frame takes two device programs with the host's decisions between them:

    observe   every object followed, its mask cleaned; how many pixels all masks have and share
    decide    `decisions`, numpy: new, removed, hidden, suppressed, reconditioned
    commit    memory of what is left, new objects into free slots -> the next bank, the masks to put out

Only counts and scores leave the device between them; masks do when they are put out, 14 frames later, so that
objects which are soon removed are never seen.

Axes as in `phrase_step`; N objects of a frame.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax import parallel
from sam3lt_jax.config import BOX_ONLY_PHRASE, PhraseVideoConfig
from sam3lt_jax.engine import Engine
from sam3lt_jax.errors import ArgumentError, check_whole
from sam3lt_jax.features import Clicks, Detections, Tracked, TrackerFeatures
from sam3lt_jax.kept import MaskSource
from sam3lt_jax.processing.clicks import ClickArrays
from sam3lt_jax.processing.masks import mask_box
from sam3lt_jax.processing.postprocess import sigmoid
from sam3lt_jax.processing.results import Results, hold_masks
from sam3lt_jax.programs import Program, explain_memory
from sam3lt_jax.video import bank as banks
from sam3lt_jax.video import decisions, phrase_step
from sam3lt_jax.video.decisions import CLICKED, Counters, Delay, Observed, Plan
from sam3lt_jax.video.phrase_step import Now, Orders, Seen
from sam3lt_jax.video.tracks import Tracks, bits, of_bits, programs_of

BORDER = 0.025  # of the frame's sides, see `suppress_det_close_to_boundary`
COND_FRAMES = 16  # frames with prompts of an object that are kept where the pointers of all are read
MOST_CLICKED = 16  # frames of an object with clicks that later clicks leave alone
NONE = -1  # no detection, no phrase
_FORMAT = 1  # of a saved state


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
    hidden, unconfirmed: objects that are not put out, see `decisions.Plan`.
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
  hidden: set[int]
  unconfirmed: set[int]
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


def _program(engine: Engine, config: PhraseVideoConfig, function: Any, *more: Any) -> Program:
  """A function of `phrase_step`, for an engine and a set of thresholds."""
  return engine.program(function, parallel.replicated(engine.mesh), config, engine.tracker, *more)


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
    shown: phrases whose objects the user showed: they are followed whether they are detected again or not.
  """

  def __init__(
    self,
    engine: Engine,
    size: tuple[int, int],
    config: str | PhraseVideoConfig = "original",
    *,
    frames: int | None = None,
    latency: int | None = None,
    slots: int = 1,
  ):
    """Args:
    size: (H, W).
    config: thresholds.
    frames: how many the clip has; None: nobody knows.
    latency: frames that results are held back; None: 14, as the hot start needs. With 0 each frame is put
      out at once, and objects that turn out to be none are named in `FrameObjects.removed`.
    slots: objects that there is room for from the start; it grows by itself.
    """
    if latency is not None:
      check_whole("latency", latency)
    every = engine.tracker is not None and engine.tracker.config.profile.all_cond_pointers
    self.tracks = Tracks(engine, slots, COND_FRAMES if every else None)  # says early that there is no tracker
    self.config, self.size = PhraseVideoConfig.named(config), (int(size[0]), int(size[1]))
    on_device = PhraseVideoConfig(**{name: getattr(self.config, name) for name in _ON_DEVICE})
    made = functools.partial(programs_of, engine, _program, on_device)
    self._observe, self._commit = made(phrase_step.observe), made(phrase_step.commit)
    self._first_masks, self._correct = made(phrase_step.first_masks, self.size), made(phrase_step.correct)
    self._frames = frames
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
      self._observe, self.tracks.bank, now, self._last.tracked, np.int32(self._last.frame)
    )
    at, observed = self._observed(jax.device_get(seen), found, row)
    before, counters = self.counters.ids, copy.deepcopy(self.counters)
    plan = decisions.decide(self.config, counters, frame, observed)
    counters.pinned |= {i for i in plan.new if counters.phrase[i] in self.shown}
    tracks, (tracked, cleaned) = self._with_room(plan.new, frame, tracked, cleaned)
    orders = self._orders(plan, at, before, tracks, counters)
    first = cleaned
    if plan.new and not self.config.new_masks_at_mask_size:
      first = self._run(self._first_masks, now, orders.new)
    # The bank is not given up: where `commit` fails, and in a fork, it stands as it was.
    arguments = tracks.bank, now, tracked, cleaned, first, orders
    tracks.bank, tracked, masks = self._run(self._commit, *arguments)
    # From here on nothing fails.
    scores = dict(zip(before, sigmoid(observed.object_scores).tolist()))
    scores |= {i: counters.score[i] for i in plan.new}
    unseen = plan.hidden, plan.unconfirmed
    objects = _objects(frame, [*before, *plan.new], counters, scores, masks, tracks.slots, *unseen)
    tracks.slots = {i: tracks.slots[i] for i in counters.ids}
    self.tracks, self.counters, self._last = tracks, counters, _Last(frame, tracked, objects)
    return self._released(self._delay.push(objects, counters.removed))

  def finish(self) -> list[FrameObjects]:
    """The frames that are held back, at the end of the clip."""
    return self._released(self._delay.finish(self.counters.removed))

  def _now(self, frame: int, features: TrackerFeatures, row: int, detections: Sequence[Detections]) -> Now:
    clock = self.tracks.clock(frame, frames=self._frames)
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

  def _released(self, released: Sequence[tuple[FrameObjects, set[int]]]) -> list[FrameObjects]:
    out = []
    for objects, never in released:
      gone = tuple(sorted(self.counters.removed & self._put_out))
      self._put_out.difference_update(gone)
      objects = objects.only([k for k, i in enumerate(objects.ids) if i not in never], gone)
      self._put_out.update(objects.ids)
      out.append(objects)
    held = {i for w in self._delay.waiting for i in w.ids} | self._put_out
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
    if last.objects is None:
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
    tracks.bank, tracked, masks = self._run(self._correct, *arguments)
    objects = _corrected(last.objects, object_id, counters, tracked, masks, tracks.slots[object_id])
    self.tracks, self.counters, self._clicked[object_id] = tracks, counters, kept
    self._last = _Last(last.frame, tracked, objects)
    if self._delay.waiting:
      self._delay.waiting[-1] = objects
    never = objects.hidden | objects.unconfirmed | counters.removed
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
    if self._last.objects is not None and not waiting:
      waiting = [self._last.objects]  # clicks may still come
    held = [_to_json(w) for w in waiting]
    arrays = {f"waiting/{k}": w.masks() for k, w in enumerate(waiting)}
    arrays |= {f"tracks/{k}": v for k, v in self.tracks.state().items()}
    arrays |= {f"last/{k}": bits(np.asarray(v)) for k, v in vars(self._last.tracked).items()}
    known = {
      "format": _FORMAT, "counters": self.counters.to_json(), "shown": sorted(self.shown),
      "put_out": sorted(self._put_out), "clicked": [[i, t] for i, t in self._clicked.items()],
      "waiting": held, "delayed": len(self._delay.waiting), "frame": self._last.frame,
    }  # fmt: skip
    return arrays | {"known": np.array(json.dumps(known))}

  def load_state(self, state: Mapping[str, np.ndarray]) -> None:
    """Goes on from what `state` gave, of a clip with the same size and thresholds.

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
  objects: FrameObjects | None


def _objects(
  frame: int,
  ids: Sequence[int],
  counters: Counters,
  tracker_scores: Mapping[int, float],
  masks: jax.Array,
  rows: Mapping[int, int],
  hidden: set[int],
  unconfirmed: set[int],
) -> FrameObjects:
  return FrameObjects(
    frame, list(ids), [counters.phrase[i] for i in ids], [counters.score[i] for i in ids],
    [tracker_scores[i] for i in ids], masks, [rows[i] for i in ids],
    hidden, unconfirmed,
  )  # fmt: skip


def _corrected(
  before: FrameObjects, i: int, counters: Counters, tracked: Tracked, masks: jax.Array, slot: int
) -> FrameObjects:
  """A frame with object `i` as it is now, in its slot."""
  scores = dict(zip(before.ids, before.tracker_scores))
  scores[i] = float(sigmoid(np.asarray(tracked.object_score_logits)[slot]))
  rows = dict(zip(before.ids, before.rows)) | {i: len(before.logits)}
  logits = jnp.concatenate([before.logits, masks[slot][None]])
  ids = [j for j in sorted(rows) if j in counters.phrase]
  unseen = before.hidden - {i}, before.unconfirmed - {i}
  return _objects(before.frame, ids, counters, scores, logits, rows, *unseen)


def _to_json(objects: FrameObjects) -> dict[str, Any]:
  """All but the masks."""
  sets = {name: sorted(getattr(objects, name)) for name in ("hidden", "unconfirmed")}
  return {name: getattr(objects, name) for name in ("frame", *_LISTS) if name != "rows"} | sets


def _of_json(data: Mapping[str, Any], logits: jax.Array) -> FrameObjects:
  sets = {name: set(data[name]) for name in ("hidden", "unconfirmed")}
  return FrameObjects(**data | sets, logits=logits, rows=list(range(len(logits))))
