"""What phrase video decides on a frame: which detections are new objects, which objects leave or are hidden.

Pure numpy on small arrays: scores, and how many pixels masks have and share. The masks themselves stay on the
device. One frame, in order:

    keep_detections -> associate -> limit_new -> hot_start -> choose_reconditioned -> suppress_overlapping

and, once the frame is put out, `choose_outputs` and `without_overlap`. `decide` is all of a frame. Objects of
different phrases never meet: association, duplicates and overlap stay inside a phrase.

Source: facebookresearch/sam3 `sam3_video_base.py` (February 2026); transformers 5.23.0 `sam3_video`. Axes: N
detections, M objects that are tracked, in the order of their ids; h, w a mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sam3lt_jax.config import PhraseVideoConfig

NEVER_OCCLUDED, ALWAYS_OCCLUDED = -1, 100_000
CLICKED = -1  # the phrase of an object that was clicked and belongs to none


@dataclasses.dataclass
class Counters:
  """All that the decisions remember of a clip. Keys of the dictionaries are object ids.

  Attributes:
    ids: of the objects that are tracked, ascending.
    next_id: of the next new object; ids are never used twice.
    phrase: which phrase each object belongs to.
    score: each object's first detection score, 1 once it was clicked on.
    first_frame: on which each was found.
    keep_alive: goes up on frames with a detection, down on frames without.
    unmatched: frames without a detection.
    pairs: (the earlier, the later object): how many detections matched both.
    last_occluded: the frame on which each was last empty or hidden.
    detected_in_a_row: frames in a row with a detection, up to this one. confirmed: objects that once had
      enough.
    removed: objects that are gone and are still to be kept from frames that wait to be put out.
    pinned: objects that the user clicked on, which nothing here removes or hides for want of detections.
  """

  ids: list[int] = dataclasses.field(default_factory=list)
  next_id: int = 0
  phrase: dict[int, int] = dataclasses.field(default_factory=dict)
  score: dict[int, float] = dataclasses.field(default_factory=dict)
  first_frame: dict[int, int] = dataclasses.field(default_factory=dict)
  keep_alive: dict[int, int] = dataclasses.field(default_factory=dict)
  unmatched: dict[int, int] = dataclasses.field(default_factory=dict)
  pairs: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
  last_occluded: dict[int, int] = dataclasses.field(default_factory=dict)
  detected_in_a_row: dict[int, int] = dataclasses.field(default_factory=dict)
  confirmed: set[int] = dataclasses.field(default_factory=set)
  removed: set[int] = dataclasses.field(default_factory=set)
  pinned: set[int] = dataclasses.field(default_factory=set)

  def begin(self, i: int, frame: int, phrase: int) -> None:
    """A new object that no detection stands for."""
    self.ids.append(i)
    self.next_id = max(self.next_id, i + 1)
    self.phrase[i], self.score[i], self.first_frame[i] = phrase, 1.0, frame
    self.keep_alive[i] = 0

  def pin(self, i: int) -> None:
    """The user says that this is an object."""
    self.pinned.add(i)
    self.score[i] = 1.0

  def remove(self, gone: set[int]) -> None:
    """Objects leave. What is known of them stays until `forget`."""
    self.ids = [i for i in self.ids if i not in gone]
    self.removed |= gone
    for i in gone:
      self.last_occluded.pop(i, None)

  def forget(self, gone: set[int]) -> None:
    """Drops removed objects of which nothing waits to be put out, so that a clip may be of any length."""
    for name in ("phrase", "score", "first_frame", "keep_alive", "unmatched", "detected_in_a_row"):
      for i in gone:
        getattr(self, name).pop(i, None)
    for name in ("confirmed", "removed", "pinned"):
      getattr(self, name).difference_update(gone)
    self.pairs = {pair: n for pair, n in self.pairs.items() if gone.isdisjoint(pair)}

  def to_json(self) -> dict[str, Any]:
    """In JSON's types; `from_json` gives the same back, the order of entries included."""
    plain = {dict: lambda x: list(x.items()), set: sorted}
    return {name: plain.get(type(x), lambda x: x)(x) for name, x in vars(self).items()}

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Counters:
    """What `to_json` made."""
    counters = cls()
    for name, like in vars(counters).items():
      value = data[name]
      if isinstance(like, dict):  # whose keys may be pairs
        value = {tuple(key) if isinstance(key, list) else key: x for key, x in value}
      setattr(counters, name, type(like)(value))
    return counters


# ---------------------------------------------------------------- detections


def mask_iou(shared: np.ndarray, areas: np.ndarray, other_areas: np.ndarray) -> np.ndarray:
  """shared: pixels that masks have in common, [N, M]; areas: [N] and [M]. IoU float32 [N, M], 0 of two empty
  ones.
  """
  shared = np.asarray(shared, np.float32)
  union = np.asarray(areas, np.float32)[:, None] + np.asarray(other_areas, np.float32)[None] - shared
  return shared / np.maximum(union, 1)


def keep_detections(scores: np.ndarray, iou: np.ndarray, threshold: float, nms_iou: float) -> np.ndarray:
  """Greedy NMS of one phrase's detections: bool [N], those above the threshold that overlap no better one.

  scores: float32 [N], of equal ones the last is better; iou: float32 [N, N]; two overlap when their IoU is
  above `nms_iou`; 0: no NMS.
  """
  keep = scores > threshold
  if nms_iou > 0:
    for i in np.argsort(scores, kind="stable")[::-1]:
      if keep[i]:
        keep &= ~((iou[i] > nms_iou) & (np.arange(len(keep)) != i))
  return keep


def away_from_border(boxes: np.ndarray, margin: float) -> np.ndarray:
  """bool [N]: boxes [N, 4], normalised xyxy, with centres further than `margin` from each edge of a frame."""
  centres = (boxes[:, :2] + boxes[:, 2:]) / 2
  return ((centres > margin) & (centres < 1 - margin)).all(axis=1)


class Matches(NamedTuple):
  """How the detections of a frame and the objects fit together.

  Attributes:
    new: detections that are new objects.
    unmatched: objects that are there and that no detection fits.
    empty: objects whose mask is empty.
    matched: detection -> all objects that it overlaps; of phrases that have objects.
    reconditioning: object -> the detection that may renew its memory.
  """

  new: list[int]
  unmatched: list[int]
  empty: list[int]
  matched: dict[int, list[int]]
  reconditioning: dict[int, int]


def associate(
  config: PhraseVideoConfig,
  scores: np.ndarray,
  phrases: np.ndarray,
  iou: np.ndarray,
  counters: Counters,
  areas: np.ndarray,
) -> Matches:
  """Fits detections to objects, many to many.

  Args:
    scores: float32 [N]; phrases: int [N] of the detections that are left.
    iou: float32 [N, M] with the masks of the objects, in the order of `counters.ids`.
    areas: [M] of the objects' masks.
  """
  ids = np.array(counters.ids, int)
  of_object = np.array([counters.phrase[i] for i in counters.ids], int)
  iou = np.where(phrases[:, None] == of_object, iou, np.float32(0))
  there = np.asarray(areas) > 0
  fits = (iou >= config.trk_assoc_iou_thresh).any(axis=0)
  overlaps = iou >= config.assoc_iou_thresh
  # A phrase without objects takes all that it found, however unsure.
  first = ~np.isin(phrases, of_object)
  new = first | ((scores >= config.new_det_thresh) & ~overlaps.any(axis=1))
  matched = {int(d): ids[overlaps[d]].tolist() for d in np.flatnonzero(~first)}
  sure = (scores >= config.high_conf_thresh) & ~new
  reconditioning: dict[int, int] = {}
  for d in np.flatnonzero(sure & (iou.max(axis=1, initial=0) >= config.high_iou_thresh)):
    reconditioning[int(ids[iou[d].argmax()])] = int(d)  # of several detections the last
  return Matches(
    np.flatnonzero(new).tolist(),
    ids[there & ~fits].tolist(),
    ids[~there].tolist(),
    matched,
    reconditioning,
  )


def limit_new(new: Sequence[int], scores: np.ndarray, room: int) -> tuple[list[int], int]:
  """(the detections that become objects, how many others there were): where there are more than `room`, the
  best, which then get their ids in falling order of score.
  """
  if len(new) <= room:
    return list(new), 0
  best = sorted(new, key=lambda d: -scores[d])[: max(room, 0)]
  return best, len(new) - len(best)


# ---------------------------------------------------------------- objects


def hot_start(
  config: PhraseVideoConfig, counters: Counters, frame: int, reverse: bool, matches: Matches, new: list[int]
) -> tuple[set[int], set[int]]:
  """Counts the frame, then (objects to remove, objects to hide on this frame). new: ids of new objects.

  A young object is removed once it was without a detection too often, or once too many detections matched it
  and an older object alike.
  """
  count_frame(config, counters, frame, reverse, matches, new)
  limit = frame + config.hotstart_delay if reverse else frame - config.hotstart_delay

  def young(i: int) -> bool:
    first = counters.first_frame[i]
    return first < limit if reverse else first > limit

  spared = counters.removed | counters.pinned
  gone: set[int] = set()
  hidden: set[int] = set()
  for i, frames in counters.unmatched.items():
    if i in spared:
      continue
    if frames >= config.hotstart_unmatch_thresh and young(i):
      gone.add(i)
    elif counters.keep_alive[i] <= 0 and not config.suppress_unmatched_only_within_hotstart:
      hidden.add(i)
  for (_, later), frames in counters.pairs.items():
    if later not in spared and frames >= config.hotstart_dup_thresh and young(later):
      gone.add(later)
  return gone, hidden


def count_frame(
  config: PhraseVideoConfig, counters: Counters, frame: int, reverse: bool, matches: Matches, new: list[int]
) -> None:
  """Brings `first_frame`, `keep_alive`, `unmatched` and `pairs` up to this frame."""
  for i in new:
    counters.first_frame.setdefault(i, frame)
    counters.keep_alive[i] = config.init_trk_keep_alive
  for i in sorted({i for ids in matches.matched.values() for i in ids}):
    counters.keep_alive[i] = min(config.max_trk_keep_alive, counters.keep_alive[i] + 1)
  # An object may be in both lists: overlapped by a detection, but too little to count as found.
  fading = matches.unmatched
  if config.decrease_trk_keep_alive_for_empty_masklets:
    fading = [*fading, *matches.empty]
  for i in fading:
    counters.keep_alive[i] = max(config.min_trk_keep_alive, counters.keep_alive[i] - 1)
  for i in matches.unmatched:
    counters.unmatched[i] = counters.unmatched.get(i, 0) + 1
  for ids in matches.matched.values():
    if len(ids) > 1:
      earliest = (max if reverse else min)(ids, key=counters.first_frame.__getitem__)
      for i in ids:
        if i != earliest:
          counters.pairs[earliest, i] = counters.pairs.get((earliest, i), 0) + 1


def confirm(config: PhraseVideoConfig, counters: Counters, matches: Matches, new_ids: list[int]) -> None:
  """Counts detections in a row, where unconfirmed objects are not put out."""
  found = set(new_ids).union(*matches.matched.values())
  for i in counters.ids:
    counters.detected_in_a_row[i] = counters.detected_in_a_row.get(i, 0) + 1 if i in found else 0
    if counters.detected_in_a_row[i] >= config.masklet_confirmation_consecutive_det_thresh:
      counters.confirmed.add(i)


def choose_reconditioned(
  config: PhraseVideoConfig, frame: int, reconditioning: Mapping[int, int], score_logits: Mapping[int, float]
) -> dict[int, int]:
  """object -> the detection that renews its memory on this frame. Both references compare a logit with the
  threshold, which is a probability's.
  """
  if not config.recondition_every_nth_frame or frame % config.recondition_every_nth_frame:
    return {}
  return {i: d for i, d in reconditioning.items() if score_logits[i] > config.high_conf_thresh}


def suppress_overlapping(
  threshold: float,
  counters: Counters,
  frame: int,
  reverse: bool,
  iou: np.ndarray,
  areas: np.ndarray,
  gone: set[int],
) -> list[int]:
  """Of two objects of a phrase that cover each other, the one that was occluded more recently is hidden, if
  the other ever was. Brings `last_occluded` up to this frame.

  In reverse both references turn the comparison round, so that an object that never was occluded is hidden.

  Args:
    threshold: IoU from which two cover each other; 0: nothing is hidden, nothing recorded.
    iou: float32 [M, M]; areas: [M], of the objects' masks.
    gone: objects that are removed on this frame.
  """
  if threshold <= 0:
    return []
  ids = counters.ids
  never = {i: ALWAYS_OCCLUDED if i in gone else NEVER_OCCLUDED for i in ids}
  last = np.array([counters.last_occluded.get(i, never[i]) for i in ids], int)
  phrases = np.array([counters.phrase[i] for i in ids], int)
  later = last[:, None] < last if reverse else last[:, None] > last
  same = (phrases[:, None] == phrases) & (phrases != CLICKED)
  both = (iou >= threshold) & same & ~np.eye(len(ids), dtype=bool)
  hidden = (both & later & (last > NEVER_OCCLUDED)).any(axis=1)
  last[hidden | (np.asarray(areas) == 0)] = frame
  counters.last_occluded.update(zip(ids, last.tolist()))
  return [i for i, hide in zip(ids, hidden) if hide]


# ---------------------------------------------------------------- a frame


class Plan(NamedTuple):
  """What is to be done on a frame.

  Attributes:
    matches: see `Matches`; `new` before the limit.
    new: id -> detection of the objects that begin.
    dropped: detections beyond the limit of objects.
    removed: objects that leave. hidden: objects that are not put out on this frame.
    unconfirmed: objects that were not detected often enough in a row so far.
    reconditioned: id -> detection.
    suppressed: objects whose mask is emptied.
  """

  matches: Matches
  new: dict[int, int]
  dropped: int
  removed: set[int]
  hidden: set[int]
  unconfirmed: set[int]
  reconditioned: dict[int, int]
  suppressed: list[int]


class Observed(NamedTuple):
  """What was seen on a frame, on the host.

  Attributes:
    scores: float32 [N] of the detections that were kept; phrases: int [N].
    areas: [N], pixels of their masks; with_objects: [N, M], pixels that they share with each object's mask.
    object_areas: [M]; between_objects: [M, M].
    object_scores: float32 [M], logits.
  """

  scores: np.ndarray
  phrases: np.ndarray
  areas: np.ndarray
  with_objects: np.ndarray
  object_areas: np.ndarray
  between_objects: np.ndarray
  object_scores: np.ndarray


def decide(
  config: PhraseVideoConfig, counters: Counters, frame: int, seen: Observed, reverse: bool = False
) -> Plan:
  """All decisions of a frame; brings `counters` up to it."""
  before = counters.ids
  iou = mask_iou(seen.with_objects, seen.areas, seen.object_areas)
  matches = associate(config, seen.scores, seen.phrases, iou, counters, seen.object_areas)
  chosen, dropped = limit_new(matches.new, seen.scores, config.max_num_objects - len(before))
  new = {counters.next_id + k: d for k, d in enumerate(chosen)}
  counters.next_id += len(new)
  for i, d in new.items():
    counters.phrase[i], counters.score[i] = int(seen.phrases[d]), float(seen.scores[d])
  gone, hidden = hot_start(config, counters, frame, reverse, matches, list(new))
  logits = dict(zip(before, np.asarray(seen.object_scores).tolist()))
  reconditioned = choose_reconditioned(config, frame, matches.reconditioning, logits)
  between = mask_iou(seen.between_objects, seen.object_areas, seen.object_areas)
  suppressed = suppress_overlapping(
    config.suppress_overlapping_based_on_recent_occlusion_threshold,
    counters, frame, reverse, between, seen.object_areas, gone,
  )  # fmt: skip
  counters.ids = [*before, *new]
  counters.remove(gone)
  unsure: set[int] = set()
  if config.masklet_confirmation_enable:
    confirm(config, counters, matches, list(new))
    unsure = set(counters.ids) - counters.confirmed - counters.pinned
  return Plan(matches, new, dropped, gone, hidden, unsure, reconditioned, suppressed)


# ---------------------------------------------------------------- what is put out


def choose_outputs(ids: Sequence[int], there: np.ndarray, never: set[int]) -> list[int]:
  """Places in `ids` of the objects that are put out, in the order of ids.

  there: bool [N], whose mask has a pixel. never: hidden and removed objects.
  """
  return sorted((k for k, i in enumerate(ids) if there[k] and i not in never), key=ids.__getitem__)


def without_overlap(masks: Sequence[np.ndarray], scores: Sequence[float], phrases: Sequence[int]) -> None:
  """Gives each pixel to the object with the best score of those of its phrase, in place.

  masks: bool [H, W] each; scores: the tracker's of this frame. Of equal ones the first wins.
  """
  taken: dict[int, np.ndarray] = {}
  for k in sorted(range(len(masks)), key=lambda k: -scores[k]):
    if phrases[k] == CLICKED:
      continue
    before = taken.get(phrases[k])
    if before is None:
      taken[phrases[k]] = masks[k].copy()
    else:
      masks[k] &= ~before
      before |= masks[k]


class Delay:
  """Holds frames back, so that an object which is soon removed is never shown.

  Attributes:
    waiting: the frames that are held back, the oldest first: anything that says of itself which objects were
      `hidden` and which `unconfirmed` on it.
  """

  def __init__(self, config: PhraseVideoConfig, latency: int | None = None):
    """latency: frames that are held back; None: those that the hot start takes, the newest one included."""
    self.latency = max(config.hotstart_delay - 1, 0) if latency is None else latency
    self._confirm_after = config.masklet_confirmation_consecutive_det_thresh - 1
    self.waiting: list[Any] = []

  def push(self, frame: Any, removed: set[int]) -> list[tuple[Any, set[int]]]:
    """(frame, objects that are not to be shown on it) of what may now be put out. removed: by now."""
    self.waiting.append(frame)
    return [self._release(removed)] if len(self.waiting) > self.latency else []

  def finish(self, removed: set[int]) -> list[tuple[Any, set[int]]]:
    """All that is left, at the end of a clip."""
    return [self._release(removed) for _ in list(self.waiting)]

  def _release(self, removed: set[int]) -> tuple[Any, set[int]]:
    # An object that is confirmed on one of the next frames is shown from its first on.
    later = self.waiting[min(self._confirm_after, len(self.waiting) - 1)]
    first = self.waiting.pop(0)
    return first, first.hidden | later.unconfirmed | removed
