"""Clicks, boxes and masks on any frame of a clip, objects followed in both directions; SAM 2's names.

    predictor = InteractiveVideo(engine)
    state = predictor.init_state("clip.mp4")
    predictor.add_new_points_or_box(state, frame_idx=0, obj_id=1, points=[[210, 350]], labels=[1])
    for frame_idx, obj_ids, masks in predictor.propagate_in_video(state):
      ...

To go back one needs what was remembered of earlier frames: it is kept on the host, per object and frame, 1 MB
at 1008 px, for so many frames as `history` says; frames with prompts always. Before objects are followed, the
bank on the device is filled from it. To go forward once, in constant memory, use `tracks.Tracks`.

Axes: N objects, H, W the clip, h, w the token grid, T its cells, C memory width, D width.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.engine import Engine
from sam3lt_jax.errors import ArgumentError, check_whole
from sam3lt_jax.features import Clicks, Tracked, TrackerFeatures
from sam3lt_jax.ops.interpolation import antialias_matrix, interpolation_matrix
from sam3lt_jax.processing import images as image_ops
from sam3lt_jax.processing import postprocess
from sam3lt_jax.processing.arrays import to_numpy
from sam3lt_jax.processing.clicks import clicks_of
from sam3lt_jax.tracker import ABSENT_LOGIT, MEMORY_SCALE
from sam3lt_jax.video import bank as banks
from sam3lt_jax.video.frames import Frames, open_frames
from sam3lt_jax.video.tracks import Tracks, bits, bucket, grid_of, of_bits, programs_of, saved_by

HISTORY = 512  # frames, of which an object takes 1 MB each at 1008 px
MOST_POINTS = 16  # of an object on a frame; of more, the first and the last 8 count, as in the original
POINT_SLOTS = (4, MOST_POINTS)
ENCODED = 8  # frames whose features are kept, for more clicks on them
PLACEHOLDER_SCORE = 10.0  # of an object without an answer on a frame that its group has a prompt on


@dataclasses.dataclass
class Record:
  """What is known of an object on a frame. On the host.

  Attributes:
    logits: float32 [4h, 4w]. pointer: [D]. score: object score logit. iou, quality: in [0, 1].
    memory: bfloat16 [T, C]; None until objects are followed.
    cond: it is a frame with a prompt for this object. kept: its answer is the user's and stays.
    mask: bool [H, W], what was given as a mask, and asked: float32 [S, S], what the tracker was given of it;
      None once it is remembered, and where no mask was given.
  """

  logits: np.ndarray
  pointer: np.ndarray
  score: float
  iou: float
  quality: float = 0.0
  memory: np.ndarray | None = None
  cond: bool = False
  kept: bool = False
  mask: np.ndarray | None = None
  asked: np.ndarray | None = None


@dataclasses.dataclass
class TrackedObject:
  """Attributes:

  prompts: frame -> (points [N, 2] from 0 to 1, labels [N]) that were given there; None: a mask was.
  records: frame -> what is known. pending: what prompts made, until objects are followed.
  passed: frame -> whether it was last passed backward.
  """

  prompts: dict[int, tuple[np.ndarray, np.ndarray] | None] = dataclasses.field(default_factory=dict)
  records: dict[int, Record] = dataclasses.field(default_factory=dict)
  pending: dict[int, Record] = dataclasses.field(default_factory=dict)
  passed: dict[int, bool] = dataclasses.field(default_factory=dict)

  def cond_frames(self) -> list[int]:
    return [t for t, r in self.records.items() if r.cond]


@dataclasses.dataclass
class InferenceState:
  """A clip and its objects, in the order in which they were first named.

  Attributes:
    frames: the clip's, read when they are needed.
    history: frames of which more than prompts is kept.
  """

  frames: Frames
  history: int
  objects: dict[int, TrackedObject] = dataclasses.field(default_factory=dict)
  features: collections.OrderedDict[int, TrackerFeatures] = dataclasses.field(
    default_factory=collections.OrderedDict
  )

  @property
  def size(self) -> tuple[int, int]:
    """(H, W)."""
    return self.frames.size

  @property
  def obj_ids(self) -> list[int]:
    return list(self.objects)

  def fork(self) -> InferenceState:
    """Another state of the same clip, that goes its own way from here."""
    return InferenceState(self.frames, self.history, copy.deepcopy(self.objects))

  def save(self, file: BinaryIO | str | os.PathLike) -> None:
    """Writes the objects, with all that is remembered of them, for `init_state(source, state=file)`.

    file: a path, or a file that is open for writing.
    """
    arrays = {}
    for i, thing in self.objects.items():
      for t, given in thing.prompts.items():
        arrays |= {f"{i}/prompts/{t}/{n}": x for n, x in zip(("points", "labels"), given or (np.zeros(0),))}
      for kind in ("records", "pending"):
        for t, record in getattr(thing, kind).items():
          known = {name: x for name, x in vars(record).items() if x is not None}
          arrays |= {f"{i}/{kind}/{t}/{name}": bits(np.asarray(x)) for name, x in known.items()}
      arrays |= {f"{i}/passed/{t}/": np.array(backward) for t, backward in thing.passed.items()}
    np.savez(file, clip=np.array([*self.size, self.frames.count]), objects=np.array(self.obj_ids), **arrays)

  def _load(self, file: Any, dtype: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """dtype: of pointers, the tracker's. shapes: of what it knows of an object on a frame, by name."""
    with saved_by("InferenceState.save", file) as state:
      clip, ids = state.pop("clip").tolist(), state.pop("objects").tolist()
      self.objects = {i: TrackedObject() for i in ids}
      given: dict[tuple, dict[str, np.ndarray]] = {}
      for key, x in state.items():
        i, kind, t, name = key.split("/")
        given.setdefault((int(i), kind, int(t)), {})[name] = x
      for (i, kind, t), fields in given.items():
        getattr(self.objects[i], kind)[t] = _of_arrays(kind, fields, dtype)
    if clip != [*self.size, self.frames.count]:
      raise ArgumentError(
        "state", " must be of this clip: (height, width, frames) are "
        f"{(*self.size, self.frames.count)}, got {tuple(clip)}",
      )  # fmt: skip
    for fields in given.values():
      for name in shapes.keys() & fields.keys():
        if fields[name].shape != shapes[name]:
          raise ArgumentError(
            "state",
            f" must be of this tracker, whose {name} has shape {shapes[name]}, got {fields[name].shape}",
          )


def _of_arrays(kind: str, fields: dict[str, np.ndarray], dtype: Any) -> Any:
  """What `InferenceState.save` made arrays of."""
  if kind == "passed":
    return bool(fields[""])
  if kind == "prompts":
    return (fields["points"], fields["labels"]) if "labels" in fields else None
  kinds = {"memory": jnp.bfloat16, "pointer": dtype}
  found = {name: of_bits(x, kinds[name]) if name in kinds else x for name, x in fields.items()}
  return Record(**{name: x if x.ndim else x.item() for name, x in found.items()})


Masks = tuple[int, list[int], np.ndarray]  # frame, ids of N objects, float32 logits [N, 1, H, W]


class InteractiveVideo:
  """SAM 2's video predictor (`SAM2VideoPredictor`) on an engine with a tracker.

  Unlike there, objects may be added at any time, and each is on its own unless the profile has `group_rules`.
  """

  def __init__(self, engine: Engine, history: int = HISTORY):
    """history: frames of which what is remembered is kept on the host, the last that were passed."""
    check_whole("history", history)
    self.engine, self.history = engine, history
    programs_of(engine)  # says early that there is no tracker
    self.profile, self._side = engine.tracker.config.profile, 4 * grid_of(engine)

  def init_state(self, source: Any, rate: float | None = None, state: Any = None) -> InferenceState:
    """Args:
    source, rate: see `open_frames`; not a live one.
    state: a file of `InferenceState.save`, of the same clip and weights, to go on from: the same masks, bit
      for bit, on the same kind of device.

    Raises:
      ValueError: state is of another clip or of a tracker of another size, or is none.
    """
    frames = open_frames(source, rate)
    frames.measure()  # what a file says of itself may be wrong
    made = InferenceState(frames, self.history)
    if state is not None:
      config = self.engine.tracker.config
      shapes = {
        "logits": (self._side, self._side), "pointer": (config.hidden_size,),
        "memory": ((self._side // 4) ** 2, config.memory.hidden_size),
      }  # fmt: skip
      made._load(state, self.engine.tracker.dtype, shapes)
    return made

  # ---------------------------------------------------------------- prompts

  def add_new_points_or_box(
    self,
    inference_state: InferenceState,
    frame_idx: int,
    obj_id: int,
    points: Any = None,
    labels: Any = None,
    clear_old_points: bool = True,
    normalize_coords: bool = True,
    box: Any = None,
    *,
    use_prev_mem_frame: bool | None = None,
  ) -> Masks:
    """Clicks on an object, its outline, or both.

    Args:
      points: [N, 2] in pixels of the clip. labels: [N], 1 on the object, 0 off it.
      clear_old_points: forget earlier clicks on this frame. A box must come with this.
      normalize_coords: points and box are in pixels. False: from 0 to 1.
      box: (x1, y1, x2, y2), the outline.
      use_prev_mem_frame: a correction is answered with memory; None: as the profile says.

    Returns:
      (frame_idx, ids, logits float32 [N, 1, H, W] of all objects there).

    Raises:
      ValueError: naming the argument.
    """
    state = inference_state
    t, size = self._frame(state, frame_idx), state.size
    if points is None and box is None:
      raise ValueError("give points or box, got neither")
    if (points is None) != (labels is None):
      raise ValueError("points and labels must be given together")
    if box is not None and not clear_old_points:
      raise ArgumentError("box", " must be given before any points: clear_old_points must be True with it")
    if not normalize_coords:
      scale = np.array([size[1], size[0]], np.float64)
      points = None if points is None else to_numpy(points, "points") * scale
      box = None if box is None else to_numpy(box, "box").reshape(2, 2) * scale
    box = None if box is None else to_numpy(box, "box").reshape(-1)
    new = clicks_of(size, self._side, points, labels, box, names=("points", "labels", "box", "mask"))
    if len(new.points) != 1:
      raise ArgumentError("points", f" must be of one object, got {len(new.points)}")
    xy, kinds = new.points[0][new.valid[0]], new.labels[0][new.valid[0]]
    thing = state.objects.setdefault(obj_id, TrackedObject())
    if not clear_old_points and thing.prompts.get(t) is not None:
      before = thing.prompts[t]
      xy, kinds = np.concatenate([before[0], xy]), np.concatenate([before[1], kinds])
    if len(kinds) > MOST_POINTS:
      half = MOST_POINTS // 2
      xy, kinds = (np.concatenate([x[:half], x[-half:]]) for x in (xy, kinds))
    thing.prompts[t] = xy, kinds
    first = t not in thing.passed or (self.profile.corrections_remember and self._is_cond(thing, t))
    remembers = not first and (
      self.profile.corrections_remember if use_prev_mem_frame is None else use_prev_mem_frame
    )
    clicks = self._clicks(xy, kinds, self._mask_before(thing, t) if self.profile.refine_from_mask else None)
    backward = thing.passed.get(t, False)
    tracks = self._filled(state, [obj_id] if remembers else [], t, backward)
    if not remembers:
      tracks.add([obj_id], 0)
    clock = tracks.clock(t, backward, state.frames.count)
    found = tracks.ask(self._encoded(state, t), clock, {obj_id: clicks}, with_memory=remembers)
    record = self._records(tracks, found, [obj_id])[obj_id]
    record.cond, record.kept = first or not self.profile.corrections_remember, True
    thing.pending[t] = record
    return t, state.obj_ids, self._shown(state, t)

  def add_new_mask(self, inference_state: InferenceState, frame_idx: int, obj_id: int, mask: Any) -> Masks:
    """An object's mask, bool or 0 and 1, [H, W] of the clip or of any other size.

    Returns and raises as `add_new_points_or_box`.
    """
    state = inference_state
    t = self._frame(state, frame_idx)
    given = to_numpy(mask, "mask")
    if given.ndim != 2 or not given.size or given.dtype.kind not in "bfiu":
      raise ArgumentError("mask", f" must be [H, W] of one object, got {given.dtype} of shape {given.shape}")
    given = given.astype(np.float32)
    if not np.isfinite(given).all() or given.min() < 0 or given.max() > 1:
      raise ArgumentError("mask", " must hold values from 0 to 1")
    thing = state.objects.setdefault(obj_id, TrackedObject())
    tracks = self._filled(state, [], t)
    tracks.add([obj_id], 0)
    side = self.engine.tracker.mask_side(grid_of(self.engine))
    asked = _resized(given, (side, side))
    if self.profile.mask_prompt_of_image_side:
      asked = (asked >= 0.5).astype(np.float32)
    masks = tracks.rows({obj_id: asked}, np.zeros_like(asked))
    found = tracks._run(tracks.programs.take, self._encoded(state, t), masks, tracks.mask([obj_id]))
    record = self._records(tracks, found, [obj_id])[obj_id]
    record.mask, record.asked = _resized(given, state.size) > 0.5, asked
    record.cond = record.kept = True
    if self.profile.group_rules:  # a later mask takes its pixels from earlier ones
      for other in state.objects.values():
        if other is not thing and (rival := other.pending.get(t)) is not None and rival.mask is not None:
          rival.mask = rival.mask & ~record.mask
    thing.prompts[t], thing.pending[t] = None, record
    return t, state.obj_ids, self._shown(state, t)

  def clear_all_points_in_frame(
    self, inference_state: InferenceState, frame_idx: int, obj_id: int, need_output: bool = True
  ) -> Masks | None:
    """Takes back all clicks, the box or the mask of an object on a frame; it is an ordinary frame then.

    An object without any prompt is forgotten wherever it was followed.
    """
    state = inference_state
    t, thing = self._frame(state, frame_idx), self._object(state, obj_id)
    thing.prompts.pop(t, None)
    thing.pending.pop(t, None)
    together = list(state.objects.values()) if self.profile.group_rules else [thing]
    if not any(t in one.prompts for one in together):
      for one in together:
        if (record := one.records.get(t)) is not None:
          record.cond = record.kept = False
        one.passed.pop(t, None)
      if not any(one.cond_frames() or one.pending for one in together):
        for one in together:
          one.records.clear(), one.pending.clear(), one.passed.clear()
    return (t, state.obj_ids, self._shown(state, t)) if need_output else None

  def remove_object(
    self, inference_state: InferenceState, obj_id: int, strict: bool = False, need_output: bool = True
  ) -> tuple[list[int], list[tuple[int, np.ndarray]]]:
    """Forgets an object. Returns the ids that stay and, of each frame that it had a prompt on, what is shown.

    Raises:
      ValueError: strict, and there is no such object.
    """
    state = inference_state
    if obj_id not in state.objects:
      if strict:
        self._object(state, obj_id)
      return state.obj_ids, []
    frames = sorted(state.objects[obj_id].prompts)
    for t in frames:
      self.clear_all_points_in_frame(state, t, obj_id, need_output=False)
    del state.objects[obj_id]
    return state.obj_ids, [(t, self._shown(state, t)) for t in frames] if need_output else []

  def reset_state(self, inference_state: InferenceState) -> None:
    """Forgets all objects."""
    inference_state.objects.clear()

  # ---------------------------------------------------------------- following

  def propagate_in_video(
    self,
    inference_state: InferenceState,
    start_frame_idx: int | None = None,
    max_frame_num_to_track: int | None = None,
    reverse: bool = False,
  ) -> Iterator[Masks]:
    """Follows all objects; frames with prompts keep their answer.

    Args:
      start_frame_idx: None: the first frame with a prompt.
      max_frame_num_to_track: so many frames beyond the start. None: to the clip's end.
      reverse: towards the first frame.

    Yields:
      (frame, ids, logits float32 [N, 1, H, W]) of each frame, the start included.

    Raises:
      ValueError: there is no prompt yet, or no such frame.
    """
    state = inference_state
    self._settle(state)
    prompted = sorted({t for thing in state.objects.values() for t in thing.cond_frames()})
    if not prompted:
      raise ValueError("there is nothing to follow: add points, a box or a mask first")
    start = prompted[0] if start_frame_idx is None else self._frame(state, start_frame_idx, "start_frame_idx")
    count = state.frames.count if max_frame_num_to_track is None else max_frame_num_to_track
    if reverse:
      order = range(start, max(start - count, 0) - 1, -1)
    else:
      order = range(start, min(start + count, state.frames.count - 1) + 1)
    ids = [i for i, thing in state.objects.items() if thing.cond_frames()]
    tracks = self._filled(state, ids, start, reverse)
    for t in order:
      self._advance(state, tracks, ids, t, reverse)
      yield t, state.obj_ids, self._shown(state, t)

  def _advance(self, state: InferenceState, tracks: Tracks, ids: list[int], t: int, reverse: bool) -> None:
    clock = tracks.clock(t, reverse, state.frames.count)
    kept = [i for i in ids if (r := state.objects[i].records.get(t)) is not None and r.kept]
    followed = [i for i in ids if i not in kept]
    if kept:
      self._put(tracks, clock, {i: state.objects[i].records[t] for i in kept})
    if followed:
      found = tracks.advance(self._encoded(state, t), clock, followed)
      maps, quality = jax.device_get(tracks._run(tracks.programs.recall, tracks.bank, clock))
      for i, record in self._records(tracks, found, followed).items():
        slot = tracks.slots[i]
        record.memory, record.quality = maps[slot], float(quality[slot])
        state.objects[i].records.pop(t, None)
        state.objects[i].records[t] = record
    for i in ids:
      thing = state.objects[i]
      thing.passed[t] = reverse
      ordinary = [f for f, r in thing.records.items() if not r.kept]
      for f in ordinary[: max(0, len(ordinary) - state.history)]:
        del thing.records[f]

  def _put(self, tracks: Tracks, clock: banks.Clock, records: dict[int, Record]) -> None:
    like = next(iter(records.values()))
    rows = lambda of, like: tracks.rows({i: of(r) for i, r in records.items()}, np.asarray(like))  # noqa: E731
    tracks.bank = tracks._run(
      tracks.programs.put, tracks.bank, clock, tracks.mask(records),
      rows(lambda r: r.memory, np.zeros_like(like.memory)),
      rows(lambda r: r.pointer, np.zeros_like(like.pointer)), rows(lambda r: r.quality, np.float32(0)),
      rows(lambda r: r.cond, False),
    )  # fmt: skip

  def _settle(self, state: InferenceState) -> None:
    """Encodes the memory of what was prompted since objects were last followed."""
    for t in sorted({t for thing in state.objects.values() for t in thing.pending}):
      if self.profile.group_rules:
        new = {i: self._of_group(state, i, t) for i in state.objects}
      else:
        new = {i: thing.pending[t] for i, thing in state.objects.items() if t in thing.pending}
      tracks = self._filled(state, [], t)
      tracks.add(new, 0)
      side = self._side
      maps_of: dict[int, np.ndarray] = {}
      by_side: dict[int, dict[int, np.ndarray]] = {}  # the tracker's, or that of masks that were given
      for i, record in new.items():
        logits = record.logits
        if record.mask is not None and self.profile.mask_prompt_of_image_side:
          logits = 2 * MEMORY_SCALE * record.asked - MEMORY_SCALE
        elif record.mask is not None:
          whole = np.where(record.mask, -ABSENT_LOGIT, ABSENT_LOGIT).astype(np.float32)
          logits = record.logits = _resized(whole, (side, side))
        by_side.setdefault(len(logits), {})[i] = logits
      for side, logits in by_side.items():
        which = tracks.mask(logits)
        maps = tracks._run(
          tracks.programs.encode_masks, self._encoded(state, t),
          tracks.rows(logits, np.zeros((side, side), np.float32)),
          tracks.rows({i: new[i].score > 0 for i in logits}, np.asarray(False)), which, which,
          which if self.profile.group_rules else None,
        )  # fmt: skip
        maps_of |= {i: m for i, m in zip(logits, jax.device_get(maps)[[tracks.slots[i] for i in logits]])}
      for i, record in new.items():
        record.memory, record.mask, record.asked = maps_of[i], None, None
        state.objects[i].records.pop(t, None)
        state.objects[i].records[t] = record
        state.objects[i].pending.pop(t, None)

  def _of_group(self, state: InferenceState, obj_id: int, t: int) -> Record:
    """An object's answer on a frame that any object of the clip has a prompt on: its own, or none at all."""
    thing = state.objects[obj_id]
    record = thing.pending.get(t) or thing.records.get(t)
    if record is None:
      pointer = self.engine.tracker_variables["params"]["no_object_pointer"][0]
      nothing = np.full((self._side, self._side), ABSENT_LOGIT, np.float32)
      record = Record(nothing, np.asarray(pointer), PLACEHOLDER_SCORE, 0.0)
    record.cond = record.kept = True
    return record

  # ---------------------------------------------------------------- between host and device

  def _filled(self, state: InferenceState, ids: Sequence[int], t: int, reverse: bool = False) -> Tracks:
    """Tracks of these objects as if all that is remembered had come one by one, up to frame t."""
    most = max([len(state.objects[i].cond_frames()) for i in ids], default=1)
    usual = self.engine.tracker.config.memory.max_cond_frames
    tracks = Tracks(self.engine, max(len(ids), 1), max(usual, bucket(most)))
    if not ids:
      return tracks
    tracks.add(ids, 0)
    arrays = {name: np.array(x) for name, x in jax.device_get(vars(tracks.bank)).items()}
    for i in ids:
      records, slot = state.objects[i].records, tracks.slots[i]
      for n, f in enumerate(state.objects[i].cond_frames()):
        arrays["cond_maps"][slot, n], arrays["cond_pointers"][slot, n] = records[f].memory, records[f].pointer
        arrays["cond_frames"][slot, n] = f
      for kind, value in (("map", "memory"), ("pointer", "pointer")):
        room = arrays[f"{kind}_frames"].shape[1]
        for n, f in enumerate(self._before(records, t, reverse)[:room]):
          arrays[f"{kind}s"][slot, n], arrays[f"{kind}_frames"][slot, n] = getattr(records[f], value), f
          arrays[f"{kind}_quality"][slot, n] = 0 if records[f].cond else records[f].quality
    tracks.bank = tracks._placed(banks.Bank(**arrays))
    return tracks

  def _before(self, records: dict[int, Record], t: int, reverse: bool) -> list[int]:
    """Frames that may be read as those before t, the nearest first."""
    way, threshold = -1 if reverse else 1, self.profile.memory_quality
    frames = sorted((f for f in records if (t - f) * way > 0), key=lambda f: (t - f) * way)
    if threshold is None:
      return frames
    good = lambda f: not records[f].cond and records[f].quality > threshold  # noqa: E731
    return [f for f in frames if f == t - way or good(f)]

  def _records(self, tracks: Tracks, found: Tracked, ids: Sequence[int]) -> dict[int, Record]:
    host = jax.device_get(found)
    out = {}
    for i in ids:
      s = tracks.slots[i]
      score, iou = float(host.object_score_logits[s]), float(host.ious[s])
      out[i] = Record(host.masks[s], host.pointers[s], score, iou)
    return out

  def _clicks(self, xy: np.ndarray, kinds: np.ndarray, before: np.ndarray | None) -> Clicks:
    slots = next(n for n in POINT_SLOTS if n >= len(kinds))
    pad = lambda x: np.pad(x, [(0, slots - len(x)), *[(0, 0)] * (x.ndim - 1)])[None]  # noqa: E731
    mask = np.zeros((self._side, self._side), np.float32) if before is None else before
    return Clicks(
      pad(xy.astype(np.float32)), pad(kinds.astype(np.int32)), pad(np.ones(len(kinds), bool)), mask[None],
      np.array([before is not None]),
    )  # fmt: skip

  def _mask_before(self, thing: TrackedObject, t: int) -> np.ndarray | None:
    """Logits that clicks on this frame start from."""
    record = thing.pending.get(t) or thing.records.get(t)
    if record is None or record.mask is not None:
      return None
    limit = self.profile.logit_limit
    return record.logits if limit is None else np.clip(record.logits, -limit, limit)

  def _is_cond(self, thing: TrackedObject, t: int) -> bool:
    return (record := thing.records.get(t)) is not None and record.cond

  def _encoded(self, state: InferenceState, t: int) -> TrackerFeatures:
    if t not in state.features:
      pixels = image_ops.resize_image(state.frames[t].image, self.engine.processor.image_size)
      state.features[t] = self.engine.encode_frames([pixels])
      while len(state.features) > ENCODED:
        state.features.popitem(last=False)
    state.features.move_to_end(t)
    return state.features[t]

  def _shown(self, state: InferenceState, t: int) -> np.ndarray:
    """float32 [N, 1, H, W], what is known of all objects on a frame; -1024 where that is nothing."""
    out = np.full((len(state.objects), 1, *state.size), ABSENT_LOGIT, np.float32)
    for row, thing in zip(out, state.objects.values()):
      record = thing.pending.get(t) or thing.records.get(t)
      if record is not None and record.mask is not None:
        row[0] = np.where(record.mask, -ABSENT_LOGIT, ABSENT_LOGIT)
      elif record is not None:
        row[0] = postprocess.resize_masks(record.logits, state.size)
    return out

  def _frame(self, state: InferenceState, t: Any, name: str = "frame_idx") -> int:
    check_whole(name, t, 0, state.frames.count - 1, "a frame")
    return int(t)

  def _object(self, state: InferenceState, obj_id: int) -> TrackedObject:
    if obj_id not in state.objects:
      raise ArgumentError("obj_id", f" must be one of {state.obj_ids}, got {obj_id!r}")
    return state.objects[obj_id]


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """[H, W] enlarged bilinearly or shrunk with antialiasing, each axis by itself."""
  rows, columns = (
    (antialias_matrix if to < n else interpolation_matrix)(n, to) for n, to in zip(image.shape, size)
  )
  return rows @ image @ columns.T
