"""Trains the bundled model's tracker: `python -m examples.shapes.tracker --out runs/tracker`.

Needs the extra "train". Trunk and neck are the bundled model's own and stay as they are. Stage "clicks"
trains what answers a click, a box or a mask on a picture, with Segment Anything's recipe but for the
corrections, which start from masks that were made wrong. Stage "clips"
goes on with all of it on short clips, frame by frame, of which the first is asked about. Killed and started
again, each goes on where it was. OUT/tracker is what lies in sam3lt_jax/assets/shapes/tracker.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from examples.shapes import models
from examples.shapes.tracker_data import ClickBatches, ClipBatches, clips_for_training, scenes_for_training
from sam3lt_jax import config_schema, from_pretrained, parallel
from sam3lt_jax.checkpoints import engine, tables
from sam3lt_jax.config import MemoryConfig, TrackerConfig, TrackerProfile
from sam3lt_jax.features import Clicks, Memory, TrackerFeatures
from sam3lt_jax.ops.resize import resized
from sam3lt_jax.tracker import Sam3Tracker
from sam3lt_jax.training import freezing
from sam3lt_jax.training.detection.losses import binary_cross_entropy, dice_loss, focal_loss
from sam3lt_jax.training.loop import fit
from sam3lt_jax.training.optimizer import OptimizerConfig, make_optimizer
from sam3lt_jax.training.state import TrainState
from sam3lt_jax.training.step import make_train_step

STAGES = ("clicks", "clips")
MEMORY = r"^(memory_|mask_downsample|object_pointer|temporal_|no_memory_positional|no_object|occlusion_)"
KEPT = (r"positional_embedding$", r"^neck/", r"^no_memory_positional")


def tracker_config() -> TrackerConfig:
  """A quarter of SAM 3's widths; holes are left alone, which a ring has on purpose."""
  return TrackerConfig(
    hidden_size=models.WIDTH, patch_size=12, num_attention_heads=4, intermediate_size=256,
    iou_head_hidden_size=64,
    memory=MemoryConfig(num_layers=2, intermediate_size=256, hidden_size=16, fuser_intermediate_size=128),
    profile=dataclasses.replace(TrackerProfile.original(), name="shapes", hole_area=0),
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ClicksRun:
  """Numbers of the first stage."""

  steps: int = 4_000
  scenes: int = 6_000
  images: int = 4
  prompts: int = 8
  seed: int = 8
  optimizer: OptimizerConfig = OptimizerConfig(
    peak_lr=1.5e-3, total_steps=4_000, warmup_steps=50, end_lr=1e-5, weight_decay=1e-3, muon_rms=1.0,
    muon_for=r"layers_|final_attn", ema_decay=0.99,
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ClipsRun:
  """Numbers of the second stage. Clips have `length` frames, of which some `frames` are taken in a row."""

  steps: int = 2_000
  scenes: int = 500
  length: int = 12
  clips: int = 3
  frames: int = 7
  objects: int = 2
  seed: int = 9
  optimizer: OptimizerConfig = OptimizerConfig(
    peak_lr=1.5e-3, total_steps=2_000, warmup_steps=50, end_lr=1e-5, weight_decay=1e-3, muon_rms=1.0,
    muon_for=r"(transformer|memory_attention)/layers_", ema_decay=0.99,
    lr_scale=((r"^(prompt_encoder|mask_decoder)/", 0.3),),
  )  # fmt: skip


# ---------------------------------------------------------------- losses


def answer_loss(decoded, truth: jax.Array) -> tuple[jax.Array, dict]:
  """Of P answers: focal and dice loss of the single mask and of the best of the others, the squared error of
  the expected IoUs, and the cross entropy of the object score.

  truth: float32 [P, S, S], empty where the object is not there. Cells of the masks are compared with the
  share of them that is covered.
  """
  P, M, h, w = decoded.masks.shape
  row = jnp.arange(P)
  there = truth.any(axis=(1, 2)).astype(jnp.float32)
  cells, logits = resized(truth, h).reshape(P, 1, h * w), decoded.masks.reshape(P, M, h * w)
  found, inside = logits > 0, cells > 0.5
  iou = (found & inside).sum(-1) / jnp.maximum((found | inside).sum(-1), 1)
  masks = 20 * focal_loss(logits, cells, 0.5, 2.0).mean(-1) + dice_loss(logits, cells)
  # Not min(): its gradient divides by how many equal it, which are none where it is computed twice, in two
  # roundings.
  best = 1 + jax.lax.stop_gradient(masks[:, 1:]).argmin(axis=1)
  masks = masks[:, 0] + masks[row, best]
  ious = jnp.square(decoded.ious - iou).mean(axis=1)
  score = binary_cross_entropy(decoded.object_score_logits[:, 0], there)
  total = (there * masks + ious + 0.5 * score).mean()
  chosen = iou[row, 1 + decoded.ious[:, 1:].argmax(axis=1)]
  right = (decoded.object_score_logits[:, 0] > 0) == (there > 0)
  return total, {"iou": (chosen * there).sum() / jnp.maximum(there.sum(), 1), "there": right.mean()}


def one_prompt(batch) -> Clicks:
  """The first prompts of a batch, P of them in a row."""
  points, labels, logits, has_mask = (
    batch[name].reshape(-1, *batch[name].shape[2:]) for name in ("points", "labels", "logits", "has_mask")
  )
  return Clicks(points, labels, labels != -10, logits, has_mask)


def clicks_loss(self: Sam3Tracker, batch, key: jax.Array) -> tuple[jax.Array, dict]:
  """Of a `ClickBatches` batch."""
  decoded = self.decode(self.get_image_features(batch["trunk"]), one_prompt(batch))
  return answer_loss(decoded, rearrange(batch["masks"], "b k h w -> (b k) h w").astype(jnp.float32))


def clips_loss(self: Sam3Tracker, batch, key: jax.Array) -> tuple[jax.Array, dict]:
  """Of a `ClipBatches` batch: the answer on the first frame, and what is found of the objects on the others.

  As the pure steps of `sam3lt_jax.video` do it, but for a choice: with the truth in place of what was found
  where "own" is False. All frames before are remembered, which are no more than a bank holds.
  """
  B, F = batch["trunk"].shape[:2]
  every = self.get_image_features(rearrange(batch["trunk"], "b f h w d -> (b f) h w d"))
  every = jax.tree.map(lambda x: x.reshape(B, F, *x.shape[1:]), every)
  truth = rearrange(batch["masks"], "b k f h w -> (b k) f h w").astype(jnp.float32)
  P, m = len(truth), self.config.memory
  own = jnp.repeat(batch["own"], P // B)
  asked, row = one_prompt(batch), jnp.arange(P)
  # Frames of a pointer's distance: short clips say it of their own length, long ones and cameras of 16.
  most = jnp.where(jax.random.bernoulli(key), F, m.max_pointers) - 1
  maps, pointers, total, metrics = [], [], 0.0, {}
  for f in range(F):
    features = TrackerFeatures(every.image[:, f], tuple(x[:, f] for x in every.fine))
    if f == 0:
      decoded, points = self.decode(features, asked), asked.valid.sum(axis=1)
    else:
      ages = np.arange(f, 0, -1)  # of the frames before, the first of which has the prompt
      recent = ages[1:] < m.num_maps
      kept = [0, *(np.flatnonzero(recent) + 1)]
      rows = np.concatenate([[m.num_maps - 1], ages[1:][recent] - 1])
      memory = Memory(
        jnp.stack([maps[i] for i in kept], 1), np.tile(rows, (P, 1)), np.full(P, len(kept)),
        jnp.stack(pointers, 1), jnp.broadcast_to(ages / most, (P, f)), jnp.ones((P, f), bool),
      )  # fmt: skip
      image = self.condition(self.start_memory_attention(features), memory)
      decoded, points = self._decode(image, features.fine, self._no_clicks(P)), jnp.zeros(P, jnp.int32)
    loss, found = answer_loss(decoded, truth[:, f])
    total += loss
    metrics |= {f"{name}_{f}": value for name, value in found.items()}
    best = 1 + decoded.ious[:, 1:].argmax(axis=1)
    chosen = jnp.where(points <= 1, best, self.single(decoded))
    logits = jax.lax.stop_gradient(decoded.masks[row, chosen])
    there = truth[:, f].any(axis=(1, 2))
    score = jnp.where(own, decoded.object_score_logits[:, 0] > 0, there)
    given = asked.has_mask if f == 0 else jnp.zeros(P, bool)
    exact = 10 * (2 * resized(truth[:, f], features.mask_side) - 1)
    logits = jnp.where((given | ~own)[:, None, None], exact, jnp.where(score[:, None, None], logits, -1024.0))
    soft = self.mask_to_remember(logits, jnp.full(P, f == 0), features.image.shape[1])
    maps.append(self.encode_memory(features, soft, score | given).reshape(P, -1, m.hidden_size))
    pointer = self.object_pointers(decoded.tokens[row, jnp.where(points <= 1, best, 0)], score)
    if f == 0:
      side = self.mask_side(features.image.shape[1])
      of_masks = self.pointers_of_masks(features, jnp.clip(resized(truth[:, 0], side), 0, 1))
      pointer = jnp.where(given[:, None], of_masks, pointer)
    pointers.append(pointer)
  return total / F, metrics


# ---------------------------------------------------------------- stages


def start(seed: int, trunk: np.ndarray) -> Any:
  """Random parameters, but for what makes a click look where it is from the first step on.

  The neck is the detector's own and stays so: it reads the same trunk, and was trained to tell of every
  pixel what lies there. The places of a grid of 10 need slower waves than SAM's 64. Where tokens and image
  look at each other, each head starts with four of these waves, the same for queries and keys; and the
  image's maps are scaled so that the places that are added to them stand out. Started otherwise, the
  tracker answered every click with all objects that there are, for as long as anybody watched.

  trunk: [B, h, w, D], maps to measure by.
  """
  tracker, rng = Sam3Tracker(tracker_config()), np.random.default_rng(seed)
  bundled, variables = from_pretrained("shapes", progress=False)
  params = tracker.init_variables(jax.random.key(seed), bundled.config.vision.hidden_size)["params"]
  params = {**params, "neck": variables["params"]["vision_encoder"]["neck"]}
  maps = tracker.apply({"params": params}, trunk.astype(np.float32), method=lambda self, x: self.neck(x))
  flat = engine.flatten(params)
  angle = rng.uniform(0, 2 * np.pi, models.WIDTH // 2)
  waves = np.geomspace(0.12, 0.6, len(angle)) * np.stack([np.cos(angle), np.sin(angle)])
  flat["prompt_encoder/shared_embedding/positional_embedding"] = waves.astype(np.float32)
  for path in flat:
    if level := re.match(r"neck/fpn_layers_([0-2])/proj2/", path):  # nothing follows it
      flat[path] = flat[path] * (0.3 if level[1] == "2" else 1.0) / maps[int(level[1])].std()
    if re.search(r"transformer.*(to_image|to_token)/q_proj/kernel$", path):
      kernel = 0.3 * np.asarray(flat[path])  # [D, heads * 8]
      chosen = rng.permutation(len(angle))[: kernel.shape[1] // 2]
      for i, wave in enumerate(chosen):  # its sine and its cosine
        kernel[wave, 2 * i] += 2.0
        kernel[wave + len(angle), 2 * i + 1] += 2.0
      flat[path] = flat[path.replace("q_proj", "k_proj")] = kernel
  return jax.tree.map(np.asarray, engine.unflatten(flat))


def run_stage(
  run: ClicksRun | ClipsRun, params: Any, data: Any, frozen: tuple[str, ...], directory: str
) -> Any:
  """Parameters after a stage."""
  tracker = Sam3Tracker(tracker_config())
  method = clips_loss if isinstance(run, ClipsRun) else clicks_loss
  params, kept = freezing.split(params, freeze=frozen)

  def loss_fn(params, kept, batch_stats, batch, key):
    variables = {"params": freezing.merge(params, kept)}
    loss, metrics = tracker.apply(variables, batch, key, method=method)
    return loss, (metrics, batch_stats)

  tx, schedule = make_optimizer(run.optimizer, params)
  state = fit(
    TrainState.create(params, tx, jax.random.key(run.seed), ema=True),
    make_train_step(loss_fn, tx, ema_decay=run.optimizer.ema_decay, schedule=schedule),
    data,
    frozen=kept,
    total_steps=run.steps,
    directory=directory,
    mesh=parallel.make_mesh(),
    log_every=25,
    checkpoint_every=100,
    fingerprint={"run": dataclasses.asdict(run)},
    unit="prompts" if isinstance(run, ClicksRun) else "clips",
  )
  return jax.tree.map(np.asarray, freezing.merge(state.averaged(), kept))


def ship(params: Any, directory: str, memory: bool) -> None:
  """The tracker in float16, as transformers' `Sam3TrackerModel` or `Sam3TrackerVideoModel` names things.

  memory: with what follows objects through a clip, that is to say after the second stage.
  """
  from safetensors.numpy import save_file

  detector, config = from_pretrained("shapes", progress=False)[0].config, tracker_config()
  flat = engine.flatten({"params": jax.tree.map(lambda x: np.asarray(x, np.float16), params)})
  if not memory:
    config = config.replace(memory=None)
    flat = {path: x for path, x in flat.items() if not re.search(MEMORY, path.removeprefix("params/"))}
  entries = engine.export_tensors(tables.tracker_layout("transformers"), flat, where="the tracker")
  os.makedirs(directory, exist_ok=True)
  with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as f:
    sizes = config_schema.tracker_to_schema(config, detector)
    json.dump(sizes | {"dtype": "float16"}, f, indent=2, sort_keys=True)
    f.write("\n")
  file = os.path.join(directory, "model.safetensors")
  save_file({e.key: e.build() for e in entries.values()}, file, metadata={"format": "pt"})
  print(f"wrote {directory} ({os.path.getsize(file) / 1e6:.1f} MB)")


def train(clicks: ClicksRun, clips: ClipsRun | None, out: str) -> None:
  """Both stages, or the first alone; each ends with a tracker to ship."""
  os.makedirs(out, exist_ok=True)
  found = scenes_for_training(os.path.join(out, "scenes.npz"), clicks.scenes, clicks.seed)
  data = ClickBatches(*found, images=clicks.images, prompts=clicks.prompts, seed=clicks.seed)
  params = run_stage(
    clicks, start(clicks.seed, found[0][:32]), data, (*KEPT, MEMORY), os.path.join(out, "clicks")
  )
  ship(params, os.path.join(out, "tracker"), memory=False)
  if clips is not None:
    found = clips_for_training(os.path.join(out, "clips.npz"), clips.scenes, clips.length, clips.seed)
    data = ClipBatches(*found, clips=clips.clips, frames=clips.frames, objects=clips.objects, seed=clips.seed)
    params = run_stage(clips, params, data, KEPT, os.path.join(out, "clips"))
    ship(params, os.path.join(out, "tracker"), memory=True)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
    "--out", default="runs/tracker", help="folder for data, checkpoints, logs and the tracker"
  )
  parser.add_argument("--stop-after", choices=STAGES, default=STAGES[-1])
  args = parser.parse_args()
  train(ClicksRun(), None if args.stop_after == "clicks" else ClipsRun(), args.out)


if __name__ == "__main__":
  main()
