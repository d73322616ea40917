"""Phrase video live against transformers 5.23.0 at a tiny size, with scripted detections.

Patched where the reference is wrong, as running it shows: on the frame on which an object is removed it pairs
masks with the ids that are left; a new object makes it follow all others once more and forget what their
memory was made of; without its CUDA kernels it leaves masks uncleaned, silently.

After each frame our memory is compared with the reference's and takes its values, see `taken_over`.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from sam3lt_jax import from_pretrained, tracker_from_pretrained
from sam3lt_jax.config import PhraseVideoConfig
from sam3lt_jax.features import Detections
from sam3lt_jax.processing.masks import _parts
from sam3lt_jax.video.phrases import Found, PhraseTracks
from tests.parity.test_tracker_transformers import _video_config
from tests.parity.tracker import taken_over
from tests.reference import import_torch_reference, randomise_
from tests.video.common import StubEngine

pytestmark = [pytest.mark.torch, pytest.mark.full]

FRAMES, SIZE, SIDE, SLOTS = 14, 112, 32, 24
THRESHOLDS = {
  "hotstart_delay": 6, "hotstart_unmatch_thresh": 2, "hotstart_dup_thresh": 3,
  "recondition_every_nth_frame": 4,
}  # fmt: skip
TOLERANCE = 1e-4
STEP = 2.0**-7  # of a number in bfloat16, which memory is rounded to
SMALL = 0.11  # a cell this near to 0 may be cleaned, to +-0.1, on one side alone


class Step(NamedTuple):
  """A frame of the reference: what was detected, and what came of it."""

  masks: np.ndarray
  scores: np.ndarray
  phrases: np.ndarray
  out: Any
  counters: dict[str, Any]
  of: dict[int, int]  # which phrase each object belongs to
  memory: dict[int, dict[int, dict[str, Any]]]  # of each object, what it keeps of each frame


def patch(model: Any, rng: np.random.Generator, phrases: int, steps: list[Step]) -> None:
  """Scripted detections for a `Sam3VideoModel`, and its faults mended."""
  torch = import_torch_reference().torch
  from transformers.models.sam3_video import modeling_sam3_video as module

  def components(mask):
    found = [_parts(m[0]) for m in mask.numpy().astype(bool)]
    counts = np.stack([sizes[labels] for labels, sizes in found])[:, None]
    return None, torch.from_numpy(counts.astype(np.int32))

  module._get_connected_components_with_padding = components

  def run_detection(inference_session, vision_embeds):
    return {}

  planning = model.run_tracker_update_planning_phase

  def plan(inference_session, det_out, tracker_low_res_masks_global, det_idx_to_prompt_id, **rest):
    # Only here the tracked masks are known, which some detections have to fit.
    tracked = tracker_low_res_masks_global.numpy().copy()
    of = [inference_session.obj_id_to_prompt_id[i] for i in inference_session.obj_ids]
    masks, scores, numbers = detections(rng, tracked, of, phrases)
    det_out |= {"mask": torch.from_numpy(masks), "scores": torch.from_numpy(scores)}
    det_idx_to_prompt_id |= dict(enumerate(numbers.tolist()))
    model.before = list(inference_session.obj_ids)
    steps.append(Step(masks, scores, numbers, None, {}, {}, {}))
    return planning(
      inference_session=inference_session, det_out=det_out, det_idx_to_prompt_id=det_idx_to_prompt_id,
      tracker_low_res_masks_global=tracker_low_res_masks_global, **rest,
    )  # fmt: skip

  adding = model._tracker_add_new_objects

  def add(inference_session, frame_idx, **rest):
    held = copy.deepcopy(inference_session.output_dict_per_obj)
    adding(inference_session=inference_session, frame_idx=frame_idx, **rest)
    inference_session.output_dict_per_obj.update(held)

  building = model.build_outputs

  def build(inference_session, **rest):
    after, inference_session.obj_ids = inference_session.obj_ids, model.before
    out = building(inference_session=inference_session, **rest)
    inference_session.obj_ids = after
    return out

  model.run_detection, model.run_tracker_update_planning_phase = run_detection, plan
  model._tracker_add_new_objects, model.build_outputs = add, build


def detections(rng: np.random.Generator, tracked: np.ndarray, of: list[int], phrases: int) -> tuple:
  """Masks [N, 32, 32], scores and phrases: most tracked masks again, nearly, and squares here and there."""
  masks, scores, numbers = [], [], []
  for mask, phrase in zip(tracked, of):
    if rng.random() < 0.6 and (mask > 0).any():
      masks.append(mask + rng.normal(0, 0.05, mask.shape))
      scores.append(rng.uniform(0.75, 0.98))
      numbers.append(phrase)
  for phrase in range(phrases):
    for _ in range(rng.integers(0, 3)):
      x, y, w = rng.integers(2, 20), rng.integers(2, 20), rng.integers(5, 11)
      mask = np.full((SIDE, SIDE), -5.0)
      mask[y : y + w, x : x + w] = 5
      masks.append(mask)
      # With a score under 0.7 only a phrase without objects takes it; there, only where no phrase has any.
      scores.append(rng.uniform(0.55 if phrases == 1 else 0.72, 0.98))
      numbers.append(phrase)
  order = np.argsort(numbers, kind="stable")
  stacked = np.array(masks, np.float32).reshape(-1, SIDE, SIDE)
  return stacked[order], np.array(scores, np.float32)[order], np.array(numbers, int)[order]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """(transformers' model, our engine, our features of each frame, the frames)."""
  ref = import_torch_reference()
  torch = ref.torch
  from safetensors.torch import save_file

  model = randomise_(ref.transformers.Sam3VideoModel(_video_config()).eval(), 3)
  tracker = model.tracker_model
  matrix = tracker.prompt_encoder.shared_embedding.positional_embedding
  tracker.shared_image_embedding.positional_embedding.copy_(matrix)
  tracker.mask_decoder.pred_obj_score_head.proj_out.bias.data.fill_(2.0)
  # Random weights find three masks nearly equally good: features off by 1e-6 move our own masks by 4 then.
  tracker.mask_decoder.iou_prediction_head.proj_out.bias.data[:] = torch.tensor([0.0, 4.0, 0.0, -4.0])
  folder = tmp_path_factory.mktemp("video")
  model.config.save_pretrained(folder)
  tensors = {k: v.clone() for k, v in model.state_dict().items()}
  save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
  image_model, variables = from_pretrained(folder)
  engine = StubEngine(*tracker_from_pretrained(folder, profile="transformers"), SIZE, None)
  pixels = np.random.default_rng(1).uniform(-1, 1, (FRAMES, SIZE, SIZE, 3)).astype(np.float32)
  pixels += np.linspace(-0.3, 0.3, FRAMES, dtype=np.float32)[:, None, None, None]

  @jax.jit
  def encode(frame):
    trunk = image_model.apply(variables, frame, method="trunk_map")
    return engine.tracker.apply(engine.tracker_variables, trunk, method="get_image_features")

  with jax.default_matmul_precision("highest"):
    features = [encode(frame[None]) for frame in pixels]
  return model, engine, features, pixels


def run_reference(model: Any, pixels: np.ndarray, phrases: int, seed: int) -> list[Step]:
  ref = import_torch_reference()
  torch, steps = ref.torch, []
  for name, value in THRESHOLDS.items():
    setattr(model, name, value)
  for name in (
    "run_detection",
    "run_tracker_update_planning_phase",
    "_tracker_add_new_objects",
    "build_outputs",
  ):
    model.__dict__.pop(name, None)
  patch(model, np.random.default_rng(seed), phrases, steps)
  video = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
  session = ref.transformers.Sam3VideoInferenceSession(
    video=video, video_height=90, video_width=120, dtype=torch.float32
  )
  for phrase in range(phrases):
    session.add_prompt(f"thing {phrase}")
  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # tiny products: more of them are slower, and sum in another order
  with torch.inference_mode():
    for t in range(FRAMES):
      out = model(inference_session=session, frame_idx=t)
      counters = {
        "first_frame": dict(session.obj_first_frame_idx), "keep_alive": dict(session.trk_keep_alive),
        "unmatched": {i: len(x) for i, x in session.unmatched_frame_inds.items()},
        "pairs": {i: len(x) for i, x in session.overlap_pair_to_frame_inds.items()},
        "last_occluded": {i: int(x) for i, x in session.obj_id_to_last_occluded.items()},
        "ids": list(session.obj_ids), "removed": set(session.removed_obj_ids),
      }  # fmt: skip
      memory = {
        i: {f: dict(kept) for kind in session.output_dict_per_obj[k].values() for f, kept in kind.items()}
        for i, k in session._obj_id_to_idx.items()
      }
      steps[-1] = steps[-1]._replace(
        out=out, counters=counters, of=dict(session.obj_id_to_prompt_id), memory=memory
      )
  torch.set_num_threads(threads)
  return steps


def found_of(step: Step, phrases: int) -> list[Found]:
  """A frame's detections, a call a phrase, filled up with what is not detected."""
  out = []
  for phrase in range(phrases):
    mine = np.flatnonzero(step.phrases == phrase)
    scores, masks = np.zeros((1, 1, SLOTS), np.float32), np.full((1, 1, SLOTS, SIDE, SIDE), -5, np.float32)
    scores[0, 0, : len(mine)], masks[0, 0, : len(mine)] = step.scores[mine], step.masks[mine]
    boxes = np.zeros((1, 1, SLOTS, 4), np.float32)
    out.append(Found(np.array([[phrase]]), jax.device_put(Detections(scores, boxes, masks))))
  return out


def check(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
  step = STEP * np.abs(theirs) if what.endswith("map") else 0
  assert (np.abs(theirs - ours) <= step + TOLERANCE).all(), what


def arrays_of(kept: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  return kept["maskmem_features"][:, 0].float().numpy(), kept["object_pointer"][0].numpy()


@pytest.mark.parametrize(("phrases", "seed"), [(1, 0), (2, 6)])
def test_as_transformers(reference, phrases, seed, monkeypatch):
  model, engine, features, pixels = reference
  steps = run_reference(model, pixels, phrases, seed)
  config = PhraseVideoConfig.transformers()
  # Both sides get what is left after NMS.
  config = config.__class__(**vars(config) | THRESHOLDS | {"det_nms_thresh": 0.0})
  monkeypatch.setattr("sam3lt_jax.video.decisions.Counters.forget", lambda self, gone: None)
  tracks = PhraseTracks(engine, (90, 120), config, frames=FRAMES, slots=8)
  worst = 0.0
  with jax.default_matmul_precision("highest"):
    for t, step in enumerate(steps):
      tracks.step(t, features[t], 0, found_of(step, phrases))
      objects = tracks._last.objects
      for name, expected in step.counters.items():
        assert getattr(tracks.counters, name) == expected, (t, name)
      masks = {i: m[0].numpy() for i, m in step.out.obj_id_to_mask.items()}
      assert objects.ids == sorted(masks)
      known = dict(zip(objects.ids, objects.phrases))
      assert step.of.items() <= known.items()
      for i, mask in zip(objects.ids, objects.masks()):
        clear = (abs(mask) > SMALL) | (abs(masks[i]) > SMALL)
        worst = max(worst, abs(mask - masks[i])[clear].max())
      assert worst < TOLERANCE, t
      theirs = {i: {f: arrays_of(kept) for f, kept in of.items()} for i, of in step.memory.items()}
      tracks.tracks.bank = taken_over(tracks.tracks.bank, tracks.tracks.slots, theirs, check)
  assert tracks.counters.removed and len(tracks.counters.first_frame) > 6
