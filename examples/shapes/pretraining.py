"""Stage 0: the vision encoder learns what lies where, before anybody asks about it.

Set prediction teaches a vision encoder slowly: its gradient comes through queries that do not yet know where
to look. So the encoder starts, as SAM 3's does, from a pretraining of its own: every map of the neck has to
tell, for each pixel of the masks, the kind, colour, pattern and size of the object there and the distances to
the four edges of its box. The linear heads that read this off are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

from examples.shapes import data
from sam3lt_jax.model import Sam3LiteText
from sam3lt_jax.shapes.scenes import Scene, SceneConfig, draw_scene

# As the questions', but for the kind "no object", which comes first.
ATTRIBUTES = tuple({**data.ATTRIBUTES, "kind": (None, *data.ATTRIBUTES["kind"])}.items())
_CLASSES = tuple(len(values) for _, values in ATTRIBUTES)
_CHANNELS = sum(_CLASSES) + 4
_BOX_WEIGHT = 5.0
HEADS = "dense_heads"  # beside the model's own parameters
CROWDED = SceneConfig(min_objects=4)  # scenes with few objects teach these heads little


class DenseHeads(nn.Module):
  """One linear head a map: for each cell, all channels of each of its pixels."""

  side: int  # of the label maps

  @nn.compact
  def __call__(self, maps: tuple[jax.Array, ...]) -> list[jax.Array]:
    """maps [B, h, w, D] -> as many [B, side, side, channels]."""
    out = []
    for i, x in enumerate(maps):
      finer = self.side // x.shape[1]
      y = nn.Dense(finer * finer * _CHANNELS, name=f"head_{i}")(x)
      out.append(rearrange(y, "b h w (p q c) -> b (h p) (w q) c", p=finer, q=finer))
    return out


def dense_labels(scene: Scene, side: int) -> dict[str, np.ndarray]:
  """What the heads have to say of a scene: classes int32 [side, side, 4], edges float32 [side, side, 4].

  classes: index of kind (0: no object), colour, pattern, size. edges: distances from the pixel to the left,
  top, right and bottom of its object's box, in sides of the scene. Both 0 where there is no object. A pixel
  belongs to the object at its centre.
  """
  size = scene.image.shape[0]
  at = ((np.arange(side) + 0.5) * size / side).astype(int)
  classes, edges = np.zeros((side, side, 4), np.int32), np.zeros((side, side, 4), np.float32)
  centre = (np.arange(side, dtype=np.float32) + 0.5) / side
  x, y = np.broadcast_to(centre, (side, side)), np.broadcast_to(centre[:, None], (side, side))
  for thing in scene.objects:
    here = thing.mask[np.ix_(at, at)]
    classes[here] = [values.index(getattr(thing, name)) for name, values in ATTRIBUTES]
    x1, y1, x2, y2 = (v / size for v in thing.box)
    edges[here] = np.stack([x - x1, y - y1, x2 - x, y2 - y], -1)[here]
  return {"classes": classes, "edges": edges}


class DenseBatches:
  """Batches by step number, of seeds that no other stage uses for anything but training."""

  def __init__(self, *, images: int, side: int, seed: int, scene: SceneConfig | None = None):
    self._images, self._side, self._seed, self._scene = images, side, seed, scene or CROWDED

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    first = self._seed * 100_000_000 + step * self._images
    if first + self._images > data.HELD_OUT_SEED:
      raise ValueError(f"step {step} would reach the held-out scenes (seeds from {data.HELD_OUT_SEED} on)")
    scenes = [draw_scene(first + i, self._scene) for i in range(self._images)]
    labels = [dense_labels(scene, self._side) for scene in scenes]
    return {
      "pixel_values": np.stack([s.image for s in scenes]).astype(np.float32) / 127.5 - 1.0,
      "classes": np.stack([here["classes"] for here in labels]),
      "edges": np.stack([here["edges"] for here in labels]),
      "id": np.array([s.seed for s in scenes], np.int64),
    }


def dense_loss(maps: list[jax.Array], classes: jax.Array, edges: jax.Array) -> tuple[jax.Array, dict]:
  """Cross entropy of the attributes and L1 of the edges, averaged over heads.

  Everywhere for the kind, over pixels of objects for the rest. Metrics, of the finest map: the accuracies of
  kind (over pixels of objects), colour, pattern and size, and the mean distance of an edge.
  """
  inside = classes[..., 0] > 0
  objects = jnp.maximum(inside.sum(), 1)
  total, metrics = jnp.zeros(()), {}
  for level, channels in enumerate(maps):
    *parts, predicted = jnp.split(channels, np.cumsum(_CLASSES), axis=-1)
    for i, ((name, _), logits) in enumerate(zip(ATTRIBUTES, parts)):
      loss = optax.softmax_cross_entropy_with_integer_labels(logits, classes[..., i])
      total += loss.mean() * 3.0 if name == "kind" else (loss * inside).sum() / objects
      if level == 0:
        right = (logits.argmax(-1) == classes[..., i]) & inside
        metrics[f"{name}_accuracy"] = right.sum() / objects
    off = jnp.abs(predicted - edges).mean(-1)
    off = (off * inside).sum() / objects
    total += _BOX_WEIGHT * off
    if level == 0:
      metrics["edge_error"] = off
  return total / len(maps), metrics


def make_dense_extra(side: int, weight: float) -> Callable:
  """Stage 0's loss as an `extra` of `make_detection_loss_fn`.

  It keeps a vision encoder that learns on with the detector from forgetting. For batches with `dense_labels`
  and parameters that hold the heads of stage 0 beside the model's, under `HEADS`.
  """
  heads = DenseHeads(side)

  def extra(model, params, maps, output, batch):
    maps = heads.apply({"params": params[HEADS]}, maps)
    loss, metrics = dense_loss(maps, batch["classes"], batch["edges"])
    return weight * loss, {f"dense_{name}": value for name, value in metrics.items()}

  return extra


def make_dense_loss_fn(model: Sam3LiteText, side: int) -> tuple[Callable, Callable[[Any, jax.Array], Any]]:
  """(loss_fn for `make_train_step`, init): parameters {"vision_encoder": ..., "heads": ...}.

  init(vision_encoder parameters, key) adds heads to a vision encoder's parameters.
  """
  heads = DenseHeads(side)

  def encode(vision, pixels):
    variables = {"params": {"vision_encoder": vision}}
    return model.apply(variables, pixels, method="neck_maps")

  def loss_fn(params, frozen, batch_stats, batch, key):
    maps = encode(params["vision_encoder"], batch["pixel_values"])
    maps = heads.apply({"params": params["heads"]}, maps)
    loss, metrics = dense_loss(maps, batch["classes"], batch["edges"])
    return loss, (metrics, batch_stats)

  def init(vision, key):
    size = model.config.vision.image_size
    maps = jax.eval_shape(encode, vision, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    maps = tuple(jnp.zeros(m.shape) for m in maps)
    return {"vision_encoder": vision, "heads": heads.init(key, maps)["params"]}

  return loss_fn, init


def with_unit_maps(model: Sam3LiteText, vision: Any, heads: Any, pixels: np.ndarray) -> tuple[Any, Any]:
  """The vision encoder's parameters with every map of the neck scaled to a standard deviation of 1, and heads
  that read from them what they did before.

  Nothing in stage 0 holds the maps' scale, and it grows (33 for the coarsest, measured). The detector reads
  the coarsest map without a norm and adds positions of about 1 to it: where the map is thirty times as large,
  the decoder cannot tell places apart and learns nothing.

  Args:
    vision, heads: the parameters after stage 0. pixels: float32 [B, S, S, 3], scenes to measure by.
  """
  variables = {"params": {"vision_encoder": vision}}
  maps = model.apply(variables, pixels, method="neck_maps")
  neck, heads = dict(vision["neck"]), dict(heads)
  for i, x in enumerate(maps):
    level, head, scale = dict(neck[f"fpn_layers_{i}"]), heads[f"head_{i}"], float(x.std())
    level["proj2"] = jax.tree.map(
      lambda w, by=scale: np.asarray(w / by), level["proj2"]
    )  # nothing follows it
    neck[f"fpn_layers_{i}"] = level
    heads[f"head_{i}"] = {**head, "kernel": np.asarray(head["kernel"] * scale)}
  return {**vision, "neck": neck}, heads
