"""Recorded clips of phrase video, as the tests replay them."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import numpy as np

from sam3lt_jax.config import PhraseVideoConfig
from sam3lt_jax.ops.components import clean_small
from sam3lt_jax.processing.masks import mask_box
from sam3lt_jax.processing.postprocess import sigmoid
from sam3lt_jax.video import decisions
from tests.checkpoints.common import fixture
from tests.tiny import jit

SIZE = (45, 60)


class Clip:
  """One clip of a fixture: what went in, and what was recorded."""

  def __init__(self, name: str, clip: str):
    prefix = f"clip/{clip}/"
    data = {k.removeprefix(prefix): v for k, v in fixture(name).items() if k.startswith(prefix)}
    self.settings = json.loads(str(data["settings_json"]))
    self.frames = json.loads(str(data["frames_json"]))
    self.outputs = json.loads(str(data["outputs_json"]))
    self.cleaned = data["track_masks_cleaned"]
    self.score_logits = data["track_score_logits"]
    self.track_masks = data["track_masks_int8"].astype(np.float32) / 8 if "track_masks_int8" in data else None
    self.detection_masks = data["detection_masks_int8"].astype(np.float32) / 8
    self.detection_scores = sigmoid(data["detection_logits"])
    self.output_masks = np.unpackbits(data["output_masks_packbits"], axis=-1, count=SIZE[1]).astype(bool)
    self.final_masks = np.unpackbits(data["final_masks_packbits"], axis=-1, count=SIZE[1]).astype(bool)
    self.reverse = self.settings["reverse"]
    known = {field.name for field in dataclasses.fields(PhraseVideoConfig)}
    given = {k: v for k, v in self.settings.items() if k in known}
    if given["max_num_objects"] < 0:  # no limit
      del given["max_num_objects"]
    self.config = PhraseVideoConfig(**given)
    self.starts = np.cumsum([0, *(frame["n_tracks"] for frame in self.frames)])

  def tracks(self, step: int) -> slice:
    """Rows of the objects of the step-th frame that was processed."""
    return slice(self.starts[step], self.starts[step + 1])


def names(name: str) -> list[str]:
  return sorted({key.split("/")[1] for key in fixture(name) if key.startswith("clip/")})


def shared_pixels(masks: np.ndarray, others: np.ndarray) -> np.ndarray:
  """bool [N, h, w] and [M, h, w] -> [N, M]."""
  return np.einsum("nhw,mhw->nm", masks.astype(np.float32), others.astype(np.float32), optimize=True)


def observed(clip: Clip, step: int) -> tuple[np.ndarray, decisions.Observed]:
  """(which of the recorded detections are kept, what `decide` gets) of a frame."""
  frame = clip.frames[step]["frame"]
  masks, scores = clip.detection_masks[frame] > 0, clip.detection_scores[frame]
  areas = masks.sum((1, 2))
  iou = decisions.mask_iou(shared_pixels(masks, masks), areas, areas)
  config = clip.config
  keep = decisions.keep_detections(scores, iou, config.score_threshold_detection, config.det_nms_thresh)
  if config.suppress_det_close_to_boundary:
    keep &= decisions.away_from_border(np.stack([box(mask) for mask in masks]), 0.025)
  kept = np.flatnonzero(keep)
  tracks = clip.cleaned[clip.tracks(step)] > 0
  return kept, decisions.Observed(
    scores[kept], np.zeros(len(kept), int), areas[kept], shared_pixels(masks[kept], tracks),
    tracks.sum((1, 2)), shared_pixels(tracks, tracks), clip.score_logits[clip.tracks(step)],
  )  # fmt: skip


def box(mask: np.ndarray) -> np.ndarray:
  """Around a mask, relative to its sides."""
  return mask_box(mask) / np.array([*mask.shape[::-1]] * 2)


def check_plan(found: decisions.Plan, counters: decisions.Counters, kept: np.ndarray, frame: dict[str, Any]):
  """Every decision that was recorded of a frame."""
  m = found.matches
  assert kept.tolist() == frame["kept_detections"]
  assert m.new == frame["new_detections"]
  assert list(found.new) == frame["new_ids"]
  assert found.dropped == frame["dropped_by_limit"]
  assert m.unmatched == frame["unmatched"]
  assert m.empty == frame["empty"]
  assert {str(d): ids for d, ids in m.matched.items()} == frame["matched_lists"]
  assert sorted(map(list, m.reconditioning.items())) == sorted(frame["recondition_pairs"])
  assert sorted(found.removed) == sorted(frame["removed_now"])
  assert sorted(found.hidden) == sorted(frame["hidden"])
  assert found.suppressed == frame.get("overlap_suppressed", [])
  assert list(found.reconditioned) == [i for i, _ in frame["reconditioned"]]
  assert counters.ids == frame["object_ids_after"]
  assert counters.next_id - 1 == frame["max_obj_id"]
  assert sorted(counters.removed) == sorted(frame["removed_so_far"])
  for ours, theirs in {
    "first_frame": "first_frame",
    "keep_alive": "keep_alive",
    "unmatched": "unmatched_counts",
    "last_occluded": "last_occluded",
  }.items():
    assert {str(k): v for k, v in getattr(counters, ours).items()} == frame[theirs], ours
  if "confirmation_status" in frame:
    assert [2 if i in counters.confirmed else 1 for i in counters.ids] == frame["confirmation_status"]
    assert [counters.detected_in_a_row[i] for i in counters.ids] == frame["confirmation_count"]
  assert sorted([*pair, n] for pair, n in counters.pairs.items()) == sorted(frame["pair_counts"])
  for i, score in frame["scores"].items():
    if score != -10000:  # an object that is gone
      assert abs(counters.score[int(i)] - score) < 2e-7  # a sigmoid


@functools.cache
def cleaner(area: int):
  return jit(functools.partial(clean_small, area=area))


def clean(masks: np.ndarray) -> list[np.ndarray]:
  """[N, h, w] as the authors' code cleans them."""
  return [np.asarray(cleaner(16)(mask)) for mask in masks]
