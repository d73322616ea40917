"""Where a detector that starts from nothing should start."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

_LOGIT_DROP = 8.0  # of the attention per unit of log distance outside the box; 8 cells in 64 are 0.33 units
_SIZE = 0.3  # side of the first boxes, of the image's


def start_locally(decoder: Any) -> Any:
  """The decoder's parameters with queries spread over the image, each looking at its own box.

  Drawn at random, every query's attention covers the whole image, so that all of them see the same average:
  boxes and masks then stay what they are without an image for thousands of steps (measured on drawn scenes).
  Here instead
  - reference points are a grid of square boxes of 0.3 of the image's side;
  - the position bias is about -8 times the log distance outside a query's box, 0 inside;
  - the box head's last layer is zero: a prediction is at first the box that it started from.
  All of it is free to change in training. Other parameters stay as they are.

  Args:
    decoder: `params["detr_decoder"]` of a `Sam3LiteText`.

  Returns:
    A new tree of the same structure, shapes and dtypes.
  """
  decoder = jax.tree.map(jnp.asarray, dict(decoder))
  table = decoder["reference_points"]["embedding"]
  decoder["reference_points"] = {"embedding": _grid(len(table)).astype(table.dtype)}
  for axis in "xy":
    decoder[f"box_rpb_embed_{axis}"] = _stay_inside(decoder[f"box_rpb_embed_{axis}"])
  head = dict(decoder["box_head"])
  last = max(head)
  head[last] = jax.tree.map(jnp.zeros_like, head[last])
  return {**decoder, "box_head": head}


def _grid(count: int) -> jax.Array:
  """[count, 4]: logits of cxcywh, centres in rows as even as the number allows."""
  rows = max(1, round(math.sqrt(count)))
  centres = []
  for row in range(rows):
    here = count // rows + (row < count % rows)
    centres += [((i + 0.5) / here, (row + 0.5) / rows) for i in range(here)]
  boxes = jnp.concatenate([jnp.array(centres), jnp.full((count, 2), _SIZE)], axis=1)
  return jnp.log(boxes / (1 - boxes))


def _stay_inside(mlp: Any) -> Any:
  """Two hidden units measure how far a cell lies before the box's first edge and beyond its second."""
  first, last = dict(mlp["layer1"]), dict(mlp["layer2"])
  outside = jnp.array([[-1.0, 0.0], [0.0, 1.0]])  # inputs: signed distances from both edges
  first["kernel"] = first["kernel"].at[:, :2].set(outside)
  first["bias"] = first["bias"].at[:2].set(0)
  last["kernel"] = (0.1 * last["kernel"]).at[:2].set(-_LOGIT_DROP)
  return {"layer1": first, "layer2": last}
