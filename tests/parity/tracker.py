"""The authors' tracker at a tiny size: weights, inputs and recorded outputs, in our names and layouts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.checkpoints import engine, tables
from sam3lt_jax.checkpoints.tracker import tracker_leaves
from sam3lt_jax.config import MemoryConfig, TrackerConfig
from sam3lt_jax.features import Clicks, TrackerFeatures
from sam3lt_jax.tracker import Sam3Tracker
from sam3lt_jax.video.bank import Bank
from sam3lt_jax.video.interactive import InteractiveVideo
from tests.checkpoints.common import fixture

NECK = "detector.backbone.vision_backbone.sam2_convs"


@functools.cache
def sizes() -> dict[str, Any]:
  return json.loads(str(fixture("tracker")["config_json"]))


def config(**changes: Any) -> TrackerConfig:
  c = sizes()
  memory = MemoryConfig(
    num_layers=c["memory_attention_layers"], intermediate_size=c["memory_attention_ffn"],
    hidden_size=c["memory_width"], num_maps=c["memory_maps"], fuser_layers=c["memory_fuser_layers"],
    fuser_intermediate_size=c["memory_fuser_ffn"],
  )  # fmt: skip
  return TrackerConfig(
    hidden_size=c["width"], patch_size=c["patch_size"], num_layers=c["mask_decoder_layers"],
    num_attention_heads=c["mask_decoder_heads"], intermediate_size=c["mask_decoder_ffn"],
    iou_head_hidden_size=c["iou_head_width"], memory=memory,
  ).replace(**changes)  # fmt: skip


def state_dict() -> dict[str, np.ndarray]:
  """The weights under the authors' keys. The neck's fourth level, which nothing reads, was not recorded."""
  state = {k.removeprefix("sd/"): v for k, v in fixture("tracker").items() if k.startswith("sd/")}
  c = sizes()
  for name, shape in (
    ("conv_1x1", (c["width"], c["neck_trunk_width"], 1, 1)),
    ("conv_3x3", (c["width"],) * 2 + (3, 3)),
  ):
    state[f"{NECK}.3.{name}.weight"] = np.full(shape, 0.5, np.float32)
    state[f"{NECK}.3.{name}.bias"] = np.full(shape[:1], 0.5, np.float32)
  return state


@functools.cache
def load() -> tuple[Sam3Tracker, dict]:
  """(tracker, variables) through the real tables."""
  tracker, state = Sam3Tracker(config()), state_dict()
  leaves = tracker_leaves(tracker, sizes()["neck_trunk_width"])
  layout = tables.detect_tracker(state, "the fixture")
  return tracker, jax.tree.map(jnp.asarray, engine.unflatten(engine.load_tensors(layout, state, leaves)))


def neck_maps(frames: np.ndarray | list[int]) -> list[np.ndarray]:
  """x4, x2, x1 of some frames, float32 [B, h, w, D]."""
  f = fixture("tracker")
  return [
    (f[f"features/{level}_int8"][frames] * f[f"features/{level}_scale"])
    .astype(np.float32)
    .transpose(0, 2, 3, 1)
    for level in ("x4", "x2", "x1")
  ]


def features(frames: list[int]) -> TrackerFeatures:
  tracker, variables = load()
  x4, x2, x1 = neck_maps(frames)
  fine = tracker.apply(variables, x4, x2, method=lambda m, *maps: m.mask_decoder.fine(*maps))
  return TrackerFeatures(jnp.asarray(x1), fine)


def cases() -> list[str]:
  return sorted({k.split("/")[1] for k in fixture("tracker") if k.startswith("image/")})


def case(name: str) -> dict[str, np.ndarray]:
  prefix = f"image/{name}/"
  return {k.removeprefix(prefix): v for k, v in fixture("tracker").items() if k.startswith(prefix)}


def rows(name: str, slots: int) -> dict[str, np.ndarray]:
  """A case's prompts: points and labels padded to `slots`, box corners first."""
  c = case(name)
  size = np.array([sizes()["image_width"], sizes()["image_height"]], np.float64)
  P = len(c["all_ious"])
  points, labels = np.zeros((P, 0, 2)), np.zeros((P, 0), np.int32)
  if "box_xyxy" in c:
    points = c["box_xyxy"].reshape(P, 2, 2)
    labels = np.tile(np.array([2, 3], np.int32), (P, 1))
  if "point_coords" in c:
    points = np.concatenate([points, c["point_coords"].reshape(P, -1, 2)], axis=1)
    labels = np.concatenate([labels, c["point_labels"].reshape(P, -1)], axis=1)
  missing = slots - points.shape[1]
  mask = c.get("mask_input", np.zeros((P, *c["all_masks"].shape[-2:]))).reshape(P, *c["all_masks"].shape[-2:])
  return {
    # What stands in an empty slot must not matter.
    "points": np.pad(points / size, ((0, 0), (0, missing), (0, 0)), constant_values=np.nan).astype(
      np.float32
    ),
    "labels": np.pad(labels, ((0, 0), (0, missing)), constant_values=1).astype(np.int32),
    "valid": np.pad(np.ones(labels.shape, bool), ((0, 0), (0, missing))),
    "masks": mask.astype(np.float32),
    "has_mask": np.full(P, "mask_input" in c),
    "image_index": np.full(P, int(c["frame"]), np.int32),
  }


def run_all(slots: int = 6) -> dict[str, dict[str, np.ndarray]]:
  """Every case, all of them in one call: case -> stages."""
  tracker, variables = load()
  batch = {name: rows(name, slots) for name in cases()}
  merged = {k: np.concatenate([b[k] for b in batch.values()]) for k in next(iter(batch.values()))}
  frames = sorted(set(merged["image_index"]))
  merged["image_index"] = np.searchsorted(frames, merged["image_index"]).astype(np.int32)

  @jax.jit
  def run(variables, features, clicks):
    taps: dict = {}
    decoded = tracker.apply(variables, features, clicks, taps, method="decode")
    single = tracker.apply(variables, decoded, method="single")
    return {**taps, **decoded._asdict(), "single": single}

  stages = jax.tree.map(np.asarray, run(variables, features(frames), Clicks(**merged)))
  out, start = {}, 0
  for name, b in batch.items():
    stop = start + len(b["labels"])
    out[name] = {k: v[start:stop] for k, v in stages.items()}
    start = stop
  return out


POINTERS = 1e-4  # largest difference of an object pointer


class Watched(InteractiveVideo):
  """Whose tracks can be reached while objects are followed."""

  def _filled(self, *args):
    self.tracks = super()._filled(*args)
    return self.tracks


def near(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
  """Of a frame's memory, which both sides made of the same: `what` ends with "map" or "pointer"."""
  apart = np.abs(np.asarray(ours, np.float64) - theirs)
  if what.endswith("pointer"):
    assert apart.max() <= POINTERS, f"{what}: {apart.max():.1e} of {np.abs(theirs).max():.3g}"
    return
  # A value may have been rounded the other way: one step of bfloat16, or what the masks' difference makes.
  # Of an asked mask the sign alone counts: a pixel that is 0 to rounding moves a value by 0.025 (measured).
  beyond = apart - np.abs(theirs) / 64
  assert (beyond > 0.02).sum() <= 2 and beyond.max() <= 0.04, what


def take_over(
  video: Watched, record: Any, slot: int, frame: int, theirs: tuple[np.ndarray, np.ndarray]
) -> None:
  """The reference's memory of a frame, (map [T, C], pointer [D]), in place of ours, see `taken_over`."""
  video.tracks.bank = taken_over(video.tracks.bank, {0: slot}, {0: {frame: theirs}}, near)
  take_over_record(record, frame, theirs)


def take_over_record(record: Any, frame: int, theirs: tuple[np.ndarray, np.ndarray]) -> None:
  """The same before the bank is filled from records."""
  map_, pointer = theirs
  near(record.memory.astype(np.float32), map_, f"frame {frame}, map")
  record.memory, record.pointer = map_.astype(record.memory.dtype), pointer


def taken_over(
  bank: Bank,
  slots: dict[int, int],
  memory: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]],
  check: Callable[[np.ndarray, np.ndarray, str], None],
) -> Bank:
  """The bank with a reference's memory in it, after a comparison.

  Memory is rounded to bfloat16: a rounding of the last digit, which differs from one processor to the next,
  grows to whole objects over the frames where each side goes on from its own (measured).

  slots: of objects. memory: of each, by frame, the map [T, C] and the pointer [D]; frames that are missing
    stay as they are. check: of ours, theirs and what it is, raises where they differ.
  """
  arrays = {name: np.array(x) for name, x in vars(bank).items()}
  for i, slot in slots.items():
    for frames, *names in (
      ("cond_frames", "cond_maps", "cond_pointers"), ("map_frames", "maps", None),
      ("pointer_frames", None, "pointers"),
    ):  # fmt: skip
      for k, frame in enumerate(arrays[frames][slot]):
        for name, theirs, kind in zip(names, memory[i].get(int(frame), ()), ("map", "pointer")):
          if name:
            check(arrays[name][slot, k].astype(np.float32), theirs, f"object {i}, frame {frame}, {kind}")
            arrays[name][slot, k] = theirs
  return jax.device_put(Bank(**arrays))
