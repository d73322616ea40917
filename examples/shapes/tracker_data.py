"""What the bundled model's tracker is trained on: scenes and clips as the frozen trunk sees them; prompts.

The trunk never changes, so that its maps are computed once and kept in files: `trunk` float16 [N, h, w, D]
and `owner` uint8 [N, S, S], which object (from 1) a pixel belongs to. A clip's frames follow each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import jax
import numpy as np
from einops import reduce
from scipy import ndimage

from examples.shapes.data import HELD_OUT_SEED
from sam3lt_jax import from_pretrained
from sam3lt_jax.shapes.scenes import Scene, SceneConfig, draw_clip, draw_scene

SCENES, CLIPS = SceneConfig(min_objects=1), SceneConfig(min_objects=2, max_objects=5)
LEAST = 30  # pixels of an object that is asked about
SLOTS = 2  # points of a first prompt: a click, or a box's corners
_AT_ONCE = 64


def owners(scene: Scene) -> np.ndarray:
  """uint8 [S, S]: 0 where there is no object, else its place in `scene.objects`, from 1."""
  owner = np.zeros(scene.image.shape[:2], np.uint8)
  for i, thing in enumerate(scene.objects):
    owner[thing.mask] = i + 1
  return owner


def encode(images: np.ndarray, loaded=None) -> np.ndarray:
  """uint8 [N, S, S, 3] -> the bundled trunk's maps, float16 [N, h, w, D]."""
  model, variables = loaded or from_pretrained("shapes", progress=False)
  read = jax.jit(lambda v, x: model.apply(v, x.astype(np.float32) / 127.5 - 1.0, method="trunk_map"))
  short = -len(images) % _AT_ONCE
  images = np.concatenate([images, np.zeros((short, *images.shape[1:]), np.uint8)])
  maps = [
    np.asarray(read(variables, images[i : i + _AT_ONCE]), np.float16) for i in range(0, len(images), _AT_ONCE)
  ]
  return np.concatenate(maps)[: len(maps) * _AT_ONCE - short]


def prepared(
  path: str, seeds: Sequence[int], draw: Callable[[int], Sequence[Scene]]
) -> tuple[np.ndarray, np.ndarray]:
  """(trunk, owner) of what is drawn for all seeds, from the file `path` or written to it."""
  if not os.path.exists(path):
    loaded, trunk, owner = from_pretrained("shapes", progress=False), [], []
    for i in range(0, len(seeds), 500):
      scenes = [scene for seed in seeds[i : i + 500] for scene in draw(seed)]
      trunk.append(encode(np.stack([s.image for s in scenes]), loaded))
      owner.append(np.stack([owners(s) for s in scenes]))
    np.savez(path + ".new.npz", trunk=np.concatenate(trunk), owner=np.concatenate(owner))
    os.replace(path + ".new.npz", path)
  with np.load(path) as file:
    return file["trunk"], file["owner"]


def scenes_for_training(path: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """The maps of `count` scenes of a seed that no other stage uses."""
  first = seed * 100_000_000
  assert first + count < HELD_OUT_SEED
  return prepared(path, range(first, first + count), lambda s: [draw_scene(s, SCENES)])


def clips_for_training(path: str, count: int, frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """The same of clips: [count, frames, ...]."""
  first = seed * 100_000_000
  assert first + count < HELD_OUT_SEED
  found = prepared(path, range(first, first + count), lambda s: draw_clip(s, frames, CLIPS))
  return tuple(x.reshape(count, frames, *x.shape[1:]) for x in found)


def first_prompt(mask: np.ndarray, kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """(points [2, 2] in [0, 1] of the image, labels [2]; -10 where there is none) on or around a mask.

  kind: "click", "box", or another, which has no point at all.
  """
  side = len(mask)
  points, labels = np.zeros((SLOTS, 2), np.float32), np.full(SLOTS, -10, np.int32)
  ys, xs = np.nonzero(mask)
  if kind == "click":
    if rng.random() < 0.5:  # as often as not well inside, where people click
      inside = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1][ys, xs]
      i = rng.choice(len(xs), p=inside**2 / (inside**2).sum())
    else:
      i = rng.integers(len(xs))
    points[0], labels[0] = (xs[i], ys[i]), 1
  elif kind == "box":
    box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float32)
    size = np.tile(box[2:] - box[:2], 2)
    box = np.clip(box + rng.uniform(-0.06, 0.06, 4) * size, 0, side)
    points[:], labels[:] = box.reshape(2, 2), (2, 3)
  return points / side, labels


def loose_mask(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Logits float32 [S / 3, S / 3] of a mask that somebody else made: a little too large, small or off."""
  change = rng.integers(-1, 3)
  if change > 0:
    mask = ndimage.binary_dilation(mask, iterations=int(change))
  elif change < 0:
    eroded = ndimage.binary_erosion(mask)
    mask = eroded if eroded.any() else mask
  mask = np.roll(mask, rng.integers(-2, 3, 2), (0, 1))
  return (shrunk(mask) - 0.5) * 2 * rng.uniform(4, 12)


def wrong_mask(mask: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """A mask that a piece is cut off of, or that holds a piece of something else as well; bool [S, S]."""
  y, x = np.ogrid[: mask.shape[0], : mask.shape[1]]
  angle, part = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.7)
  along = np.cos(angle) * x + np.sin(angle) * y
  if rng.random() < 0.5:
    return mask & (along > np.quantile(along[mask], part))
  ys, xs = np.nonzero(others if others.any() else ~mask)
  i = rng.integers(len(xs))
  return mask | ((np.hypot(x - xs[i], y - ys[i]) < rng.uniform(3, 14)) & ~mask)


def shrunk(masks: np.ndarray) -> np.ndarray:
  """[..., S, S] -> float32 [..., S / 3, S / 3], the share of a cell that is covered."""
  return reduce(np.asarray(masks, np.float32), "... (h p) (w q) -> ... h w", "mean", p=3, q=3)


class ClickBatches:
  """Batches by step number of B scenes and K first prompts each.

  trunk [B, h, w, D]; masks uint8 [B, K, S, S], empty where the prompt is at nothing; points [B, K, 2, 2],
  labels [B, K, 2]; logits [B, K, S / 3, S / 3] and has_mask [B, K]. A correction is a mask that is wrong
  somewhere and a click there: answers of the tracker's own, as Segment Anything's recipe corrects them, would
  cost a second pass.
  """

  kinds, shares = ("click", "box", "mask", "correction"), (0.5, 0.22, 0.06, 0.22)
  absent = 0.12

  def __init__(self, trunk: np.ndarray, owner: np.ndarray, *, images: int, prompts: int, seed: int):
    self._trunk, self._owner = trunk, owner
    self._images, self._prompts, self._seed = images, prompts, seed

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([self._seed, step, 23])
    rows = rng.integers(len(self._trunk), size=self._images)
    asked = [self._ask(self._owner[row], rng) for row in rows for _ in range(self._prompts)]
    return {"trunk": self._trunk[rows].astype(np.float32)} | _stacked(asked, self._images)

  def _ask(self, owner, rng) -> dict[str, np.ndarray]:
    sizes = np.bincount(owner.ravel(), minlength=2)
    there = np.flatnonzero(sizes[1:] >= LEAST) + 1
    kind = str(rng.choice(self.kinds, p=self.shares))
    if not len(there) or rng.random() < self.absent:
      at = owner == 0  # a click on the ground, a box around a piece of it
      y, x = rng.integers(0, len(owner) - 20, 2)
      piece = np.zeros_like(at)
      piece[y : y + rng.integers(8, 20), x : x + rng.integers(8, 20)] = True
      at = at if kind == "click" else piece & at if (piece & at).any() else at
      return _prompt(at, np.zeros_like(at), kind if kind == "box" else "click", rng)
    mask = owner == rng.choice(there)
    if kind != "correction":
      return _prompt(mask, mask, kind, rng)
    before = wrong_mask(mask, (owner > 0) & ~mask, rng)
    asked = _prompt(before if before.any() else mask, mask, "mask", rng)
    ys, xs = np.nonzero(before != mask)
    if len(xs):
      i = rng.integers(len(xs))
      asked["points"][0] = np.array([xs[i], ys[i]]) / len(mask)
      asked["labels"][0] = mask[ys[i], xs[i]]
    return asked


class ClipBatches:
  """Batches by step number of B clips and K objects each, that are there on the first frame.

  trunk [B, F, h, w, D]; masks uint8 [B, K, F, S, S]; the rest as in `ClickBatches`, for the first frame;
  "own" bool [B]: what is remembered is what was found, and not the truth.
  """

  def __init__(
    self, trunk: np.ndarray, owner: np.ndarray, *, clips: int, frames: int, objects: int, seed: int
  ):
    self._trunk, self._owner = trunk, owner
    self._clips, self._frames, self._objects, self._seed = clips, frames, objects, seed

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([self._seed, step, 29])
    trunk, asked = [], []
    while len(trunk) < self._clips:
      row = rng.integers(len(self._trunk))
      stride = int(rng.integers(1, (self._trunk.shape[1] - 1) // (self._frames - 1) + 1))
      first = int(rng.integers(self._trunk.shape[1] - stride * (self._frames - 1)))
      frames = slice(first, first + stride * (self._frames - 1) + 1, stride)
      owner = self._owner[row, frames]
      there = np.flatnonzero(np.bincount(owner[0].ravel(), minlength=2)[1:] >= LEAST) + 1
      if not len(there):
        continue
      trunk.append(self._trunk[row, frames])
      for i in rng.choice(there, self._objects, replace=len(there) < self._objects):
        kind = str(rng.choice(("click", "box", "mask"), p=(0.5, 0.2, 0.3)))
        asked.append(_prompt(owner[0] == i, owner == i, kind, rng))
    batch = {"trunk": np.stack(trunk).astype(np.float32), "own": rng.random(self._clips) < 0.7}
    return batch | _stacked(asked, self._clips)


def _prompt(at, truth, kind, rng) -> dict[str, np.ndarray]:
  points, labels = first_prompt(at, kind, rng)
  side = at.shape[-1] // 3
  logits = loose_mask(at, rng) if kind == "mask" else np.zeros((side, side), np.float32)
  return {
    "masks": truth.astype(np.uint8), "points": points, "labels": labels, "logits": logits.astype(np.float32),
    "has_mask": np.array(kind == "mask"),
  }  # fmt: skip


def _stacked(asked, rows: int) -> dict[str, np.ndarray]:
  stacked = {name: np.stack([a[name] for a in asked]) for name in asked[0]}
  return {name: x.reshape(rows, -1, *x.shape[1:]) for name, x in stacked.items()}
