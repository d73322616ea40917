"""Which query answers for which object.

A match is a matrix [..., Q, M] of zeros and ones, so that one and several queries an object are summed by the
same losses. Sources: SAM 3's training configuration (weights), DETR (arXiv 2005.12872), DAC-DETR.
Axes: ... any leading axes (layers, prompts), Q queries, M object slots.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from sam3lt_jax.ops import boxes as box_ops

_FORBIDDEN = 1e6  # cost of an empty slot: the same for every query, so that it does not steer the others


@dataclasses.dataclass(frozen=True)
class MatcherConfig:
  """Costs of the one-to-one matching and the rule of the one-to-many one.

  Attributes:
    class_weight, l1_weight, giou_weight: of the focal classification cost, the L1 distance of normalised
      cxcywh boxes, and the negative generalised IoU.
    focal_alpha, focal_gamma: of the classification cost.
    many_alpha: one to many ranks queries by alpha * probability + (1 - alpha) * IoU.
    many_threshold: a match needs at least this rank value.
    many_top: at most this many queries an object.
  """

  class_weight: float = 2.0
  l1_weight: float = 5.0
  giou_weight: float = 2.0
  focal_alpha: float = 0.25
  focal_gamma: float = 2.0
  many_alpha: float = 0.3
  many_threshold: float = 0.4
  many_top: int = 4


def match_one_to_one(
  logits: jax.Array, boxes: jax.Array, target_boxes: jax.Array, target_valid: jax.Array, config: MatcherConfig
) -> jax.Array:
  """The assignment of least total cost (Hungarian algorithm, `optax.assignment`), without gradient.

  Args:
    logits: float32 [..., Q]. boxes: float32 [..., Q, 4] normalised cxcywh.
    target_boxes: float32 [..., M, 4] normalised cxcywh; target_valid: bool [..., M].

  Returns:
    float32 [..., Q, M] of zeros and ones: every valid object has one query (as long as there are queries),
    every query at most one object, empty slots none.
  """
  cost = jax.lax.stop_gradient(_cost(logits, boxes, target_boxes, config))
  cost = jnp.where(target_valid[..., None, :], cost, _FORBIDDEN)
  *lead, Q, M = cost.shape

  def assign(cost):
    rows, columns = optax.assignment.hungarian_algorithm(cost)
    return jnp.zeros((Q, M)).at[rows, columns].set(1.0)

  match = jax.vmap(assign)(cost.reshape(-1, Q, M)).reshape(*lead, Q, M)
  return match * target_valid[..., None, :]


def match_one_to_many(
  logits: jax.Array, boxes: jax.Array, target_boxes: jax.Array, target_valid: jax.Array, config: MatcherConfig
) -> jax.Array:
  """Up to `many_top` queries for each object, those that rank highest and above `many_threshold`.

  Arguments and result as `match_one_to_one`; an object may have no query, a query several objects.
  """
  iou = pairwise_iou(box_ops.cxcywh_to_xyxy(boxes), box_ops.cxcywh_to_xyxy(target_boxes))[0]
  rank = config.many_alpha * jax.nn.sigmoid(logits)[..., None] + (1.0 - config.many_alpha) * iou
  rank = jax.lax.stop_gradient(rank)
  by_object = jnp.swapaxes(rank, -1, -2)  # [..., M, Q]
  top = min(config.many_top, rank.shape[-2])
  least = jax.lax.top_k(by_object, top)[0][..., -1:]
  match = (by_object >= least) & (by_object > config.many_threshold) & target_valid[..., None]
  return jnp.swapaxes(match, -1, -2).astype(jnp.float32)


def _cost(logits, boxes, target_boxes, config: MatcherConfig) -> jax.Array:
  """[..., Q, M]"""
  p = jax.nn.sigmoid(logits)
  a, g = config.focal_alpha, config.focal_gamma
  as_object = -a * (1.0 - p) ** g * jax.nn.log_sigmoid(logits)
  as_nothing = -(1.0 - a) * p**g * jax.nn.log_sigmoid(-logits)
  l1 = jnp.abs(boxes[..., :, None, :] - target_boxes[..., None, :, :]).sum(-1)
  giou = pairwise_iou(box_ops.cxcywh_to_xyxy(boxes), box_ops.cxcywh_to_xyxy(target_boxes))[1]
  return (
    config.class_weight * (as_object - as_nothing)[..., None]
    + config.l1_weight * l1
    - config.giou_weight * giou
  )


def pairwise_iou(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """IoU and generalised IoU of every pair of boxes.

  Args:
    a: [..., N, 4] xyxy; b: [..., M, 4] xyxy, in the same frame.

  Returns:
    Two arrays [..., N, M]: IoU in [0, 1], generalised IoU in [-1, 1] (arXiv 1902.09630). Boxes without area
    count as zero overlap.
  """
  a, b = a[..., :, None, :], b[..., None, :, :]

  def area(x1y1, x2y2):
    return jnp.prod(jnp.maximum(x2y2 - x1y1, 0.0), axis=-1)

  inner = area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
  outer = area(jnp.minimum(a[..., :2], b[..., :2]), jnp.maximum(a[..., 2:], b[..., 2:]))
  union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - inner
  iou = inner / jnp.maximum(union, 1e-9)
  return iou, iou - (outer - union) / jnp.maximum(outer, 1e-9)
