"""The losses of set prediction, as SAM 3 trains its detector.

Every function is pure and takes a match (`matcher`). The defaults are those of SAM 3's published fine-tuning
configuration (`roboflow_v100_full_ft_100_images.yaml`), with the mask losses that it keeps for training with
segmentation.
Axes: L layers, P prompts, Q queries, M object slots, h, w rows and columns of a mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sam3lt_jax.model import Sam3LiteText, Sam3LiteTextOutput
from sam3lt_jax.ops import boxes as box_ops
from sam3lt_jax.training.detection.matcher import (
  MatcherConfig,
  match_one_to_many,
  match_one_to_one,
  pairwise_iou,
)
from sam3lt_jax.training.detection.targets import DetectionTargets

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class DetectionLossConfig:
  """Weights and shapes of the losses.

  Attributes:
    class_weight, presence_weight, l1_weight, giou_weight, mask_weight, dice_weight, semantic_weight,
      semantic_dice_weight: factors of the parts; 0 leaves a part out.
    many_weight: factor of everything that the one-to-many rows add (models with `one_to_many` only).
    many_masks: the one-to-many rows have mask losses, too.
    positive_weight: factor of matched queries in the classification loss.
    score_alpha: the target of a matched query is probability ** alpha * IoU ** (1 - alpha), at least 0.01.
    score_gamma: unmatched queries count with probability ** gamma.
    mask_alpha, mask_gamma, semantic_alpha, semantic_gamma: of the focal losses.
    mask_points: this many random points a mask instead of every pixel; None, every pixel.
    queries_scale: the classification loss is divided by this many queries a prompt, whatever the model has;
      None, by those of the model.
    scale_by_prompts: multiply the whole by the root of the number of real prompts, so that a batch of many
      counts for more.
    matcher: costs of the matching.
  """

  class_weight: float = 20.0
  presence_weight: float = 20.0
  l1_weight: float = 5.0
  giou_weight: float = 2.0
  mask_weight: float = 200.0
  dice_weight: float = 10.0
  semantic_weight: float = 20.0
  semantic_dice_weight: float = 30.0
  many_weight: float = 2.0
  many_masks: bool = True
  positive_weight: float = 10.0
  score_alpha: float = 0.25
  score_gamma: float = 2.0
  mask_alpha: float = 0.25
  mask_gamma: float = 2.0
  semantic_alpha: float = 0.6
  semantic_gamma: float = 2.0
  mask_points: int | None = None
  queries_scale: int | None = 200
  scale_by_prompts: bool = True
  matcher: MatcherConfig = MatcherConfig()


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Elementwise, for targets in [0, 1]; float32."""
  return jax.nn.softplus(logits) - logits * targets


def focal_loss(logits: jax.Array, targets: jax.Array, alpha: float, gamma: float) -> jax.Array:
  """Sigmoid focal loss, elementwise (arXiv 1708.02002); alpha weighs ones, 1 - alpha zeros."""
  p = jax.nn.sigmoid(logits)
  wrong = p * (1.0 - targets) + (1.0 - p) * targets
  weight = alpha * targets + (1.0 - alpha) * (1.0 - targets)
  return weight * wrong**gamma * binary_cross_entropy(logits, targets)


def dice_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """[..., N] -> [...]: 1 - (2 |A B| + 1) / (|A| + |B| + 1) over the last axis, A = sigmoid(logits)."""
  p = jax.nn.sigmoid(logits)
  return 1.0 - (2.0 * (p * targets).sum(-1) + 1.0) / (p.sum(-1) + targets.sum(-1) + 1.0)


def score_loss(
  logits: jax.Array,
  boxes: jax.Array,
  match: jax.Array,
  targets: DetectionTargets,
  config: DetectionLossConfig,
) -> jax.Array:
  """Classification of queries, with the box's quality in the target (IoU-aware); [L, P, Q] -> [L].

  Prompts without objects are left out: there, presence alone learns. Summed over queries, divided by
  `queries_scale` and the number of real prompts.
  """
  p = jax.lax.stop_gradient(jax.nn.sigmoid(logits))
  matched = jnp.minimum(match.sum(-1), 1.0)
  iou = pairwise_iou(box_ops.cxcywh_to_xyxy(boxes), box_ops.cxcywh_to_xyxy(targets.boxes))[0]
  iou = jax.lax.stop_gradient((iou * match).max(-1))
  goal = jnp.maximum(p**config.score_alpha * iou ** (1.0 - config.score_alpha), 0.01)
  positive = binary_cross_entropy(logits, goal) * matched * config.positive_weight
  negative = binary_cross_entropy(logits, jnp.zeros_like(logits)) * (1.0 - matched)
  negative = negative * jax.nn.sigmoid(logits) ** config.score_gamma * targets.exhaustive[:, None]
  has_objects = targets.valid.any(-1)[:, None]
  total = jnp.where(has_objects, positive + negative, 0.0).sum((1, 2))
  return total / ((config.queries_scale or logits.shape[-1]) * _count(targets.prompt_valid))


def presence_loss(logits: jax.Array, targets: DetectionTargets) -> jax.Array:
  """[L, P, 1] -> [L]: half the cross entropy of "the image holds such an object", averaged over real prompts.

  Half, because the reference takes a focal loss with alpha 0.5 and gamma 0.
  """
  present = targets.valid.any(-1).astype(jnp.float32)
  loss = 0.5 * binary_cross_entropy(logits[..., 0], present) * targets.prompt_valid
  return loss.sum(-1) / _count(targets.prompt_valid)


def box_losses(
  boxes: jax.Array, match: jax.Array, targets: DetectionTargets, objects: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """L1 of normalised cxcywh and 1 - GIoU of matched pairs: [L, P, Q, 4] -> two [L], divided by `objects`."""
  l1 = jnp.abs(boxes[..., :, None, :] - targets.boxes[..., None, :, :]).sum(-1)
  giou = pairwise_iou(box_ops.cxcywh_to_xyxy(boxes), box_ops.cxcywh_to_xyxy(targets.boxes))[1]
  return (l1 * match).sum((1, 2, 3)) / objects, ((1.0 - giou) * match).sum((1, 2, 3)) / objects


def mask_losses(
  masks: jax.Array,
  match: jax.Array,
  targets: DetectionTargets,
  objects: jax.Array,
  config: DetectionLossConfig,
  key: jax.Array | None = None,
  queries: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """Focal and dice loss of matched pairs, the predictions made as large as the targets.

  Args:
    masks: float32 [P, Q, h, w] logits. match: [P, Q, M], at most `queries` of them an object.
    objects: [], what the sums are divided by. key: for `mask_points`.

  Returns:
    Two float32 []. The focal loss is averaged over pixels (or points) first.
  """
  P, Q, M = match.shape
  N = min(queries, Q)
  matched, query = jax.lax.top_k(jnp.swapaxes(match, 1, 2), N)  # [P, M, N]
  known = ((matched > 0) & targets.has_mask[..., None]).reshape(P, M * N)
  mine = jnp.take_along_axis(masks, query.reshape(P, M * N, 1, 1), axis=1)
  if config.mask_points is not None:
    if key is None:
      raise ValueError("mask_points needs a key")
    mine, true = _at_points(mine, jnp.repeat(targets.masks, N, axis=1), config.mask_points, key)
    focal = focal_loss(mine, true, config.mask_alpha, config.mask_gamma).mean(-1)
    dice = dice_loss(mine, true)
  else:

    @jax.checkpoint
    def one_each(pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      """The losses [P] of one pair a prompt: logits [P, h, w], the object's number []."""
      true = targets.masks[:, pair[1]].astype(jnp.float32)
      a, b = _resize(pair[0], true.shape[-2:]).reshape(P, -1), true.reshape(P, -1)
      return focal_loss(a, b, config.mask_alpha, config.mask_gamma).mean(-1), dice_loss(a, b)

    # One after another: all of them at 1008 px, with what their gradients need, would be gigabytes.
    pairs = jnp.swapaxes(mine, 0, 1), jnp.arange(M * N) // N
    focal, dice = (x.T for x in jax.lax.map(one_each, pairs))
  return (focal * known).sum() / objects, (dice * known).sum() / objects


def semantic_losses(
  logits: jax.Array, targets: DetectionTargets, config: DetectionLossConfig
) -> tuple[jax.Array, jax.Array]:
  """Focal and dice loss of the union of all objects, [P, 1, h, w]; over prompts whose masks are all known."""
  true = jnp.where(targets.has_mask[:, :, None, None], targets.masks, 0).max(1).astype(jnp.float32)
  logits = _resize(logits, true.shape[-2:])[:, 0]
  logits, true = (a.reshape(a.shape[0], -1) for a in (logits, true))
  use = targets.valid.any(-1) & (targets.has_mask == targets.valid).all(-1) & targets.exhaustive
  focal = focal_loss(logits, true, config.semantic_alpha, config.semantic_gamma).mean(-1)
  dice = dice_loss(logits, true)
  return (focal * use).sum() / _count(use), (dice * use).sum() / _count(use)


def detection_loss(
  output: Sam3LiteTextOutput,
  targets: DetectionTargets,
  config: DetectionLossConfig = DetectionLossConfig(),
  key: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """All of it, from a forward with `output_intermediates=True`.

  Classification, presence and boxes are summed over the decoder's layers, each with its own match; masks and
  the semantic map have one output. Divided by the number of objects (boxes, masks) or prompts (the rest); the
  sum is then multiplied by the root of the number of prompts (`scale_by_prompts`).

  Returns:
    (loss float32 [], metrics of float32 []: the parts before weighting, of the last layer where there are
    several, and presence_accuracy, matched_iou).

  Raises:
    ValueError: the output carries no intermediates.
  """
  taps = output.intermediates
  if taps is None:
    raise ValueError(
      "detection_loss needs the decoder's layers: call the model with output_intermediates=True"
    )
  logits, boxes = taps["decoder_logits"], taps["decoder_boxes"]
  objects = _count(targets.valid)
  keys = (None, None) if key is None else jax.random.split(key)
  match = _per_layer(match_one_to_one, logits, boxes, targets, config)
  score = score_loss(logits, boxes, match, targets, config)
  presence = presence_loss(taps["decoder_presence_logits"], targets)
  l1, giou = box_losses(boxes, match, targets, objects)
  mask, dice = mask_losses(output.pred_masks, match[-1], targets, objects, config, keys[0])
  semantic, semantic_dice = semantic_losses(output.semantic_seg, targets, config)
  loss = (
    (config.class_weight * score + config.presence_weight * presence).sum()
    + (config.l1_weight * l1 + config.giou_weight * giou).sum()
    + config.mask_weight * mask + config.dice_weight * dice
    + config.semantic_weight * semantic + config.semantic_dice_weight * semantic_dice
  )  # fmt: skip
  metrics = {
    "score": score[-1], "presence": presence[-1], "l1": l1[-1], "giou": giou[-1], "mask": mask, "dice": dice,
    "semantic": semantic, "semantic_dice": semantic_dice,
  }  # fmt: skip
  if "one_to_many_logits" in taps:
    logits_m, boxes_m = taps["one_to_many_logits"], taps["one_to_many_boxes"]
    # Layers before the last are matched one to one, as in the reference.
    inner = _per_layer(match_one_to_one, logits_m[:-1], boxes_m[:-1], targets, config)
    last = _per_layer(match_one_to_many, logits_m[-1:], boxes_m[-1:], targets, config)
    match_m = jnp.concatenate([inner, last])
    l1, giou = box_losses(boxes_m, match_m, targets, objects)
    score = score_loss(logits_m, boxes_m, match_m, targets, config)
    many = (config.class_weight * score + config.l1_weight * l1 + config.giou_weight * giou).sum()
    if config.many_masks and (config.mask_weight or config.dice_weight):
      mask, dice = mask_losses(
        taps["one_to_many_masks"], match_m[-1], targets, objects, config, keys[1], config.matcher.many_top
      )
      many += config.mask_weight * mask + config.dice_weight * dice
    loss = loss + config.many_weight * many
    metrics["one_to_many"] = many
  present = targets.valid.any(-1)
  right = ((taps["decoder_presence_logits"][-1, :, 0] > 0) == present) & targets.prompt_valid
  iou = pairwise_iou(box_ops.cxcywh_to_xyxy(boxes[-1]), box_ops.cxcywh_to_xyxy(targets.boxes))[0]
  metrics["presence_accuracy"] = right.sum() / _count(targets.prompt_valid)
  metrics["matched_iou"] = (iou * match[-1]).sum() / objects
  if config.scale_by_prompts:
    loss = loss * jnp.sqrt(_count(targets.prompt_valid))
  return loss, metrics


def make_detection_loss_fn(
  model: Sam3LiteText,
  config: DetectionLossConfig = DetectionLossConfig(),
  *,
  merge: Callable[[Any, Any], Any] = lambda params, frozen: params,
  update_batch_stats: bool = False,
  deterministic: bool = False,
  extra: Callable[..., tuple[jax.Array, Metrics]] | None = None,
) -> Callable:
  """`loss_fn(params, frozen, batch_stats, batch, key)` for `training.step.make_train_step`.

  Args:
    merge: (trainable parameters, `frozen`) -> the model's whole parameter tree (frozen parts, LoRA).
    update_batch_stats: RepMixer blocks normalise by the batch and update their statistics.
    deterministic: True trains without dropout.
    extra: another loss, (bound model, merged parameters, the neck's maps of the batch's images, output with
      intermediates, batch) -> (loss float32 [], metrics), added to the model's own. It may call the model's
      parts and use parameters of its own beside the model's.

  Each image is encoded once and its maps are repeated for its K prompts. Batches: `sam3lt_jax.data.batches`.
  """

  def loss_fn(params, frozen, batch_stats, batch, key):
    drop, points = jax.random.split(key)
    variables = {"params": merge(params, frozen), **({"batch_stats": batch_stats} if batch_stats else {})}
    mutable = ["batch_stats"] if update_batch_stats else False

    def call(model: Sam3LiteText):
      B, K = batch["input_ids"].shape[:2]
      maps = model.neck_maps(batch["pixel_values"], deterministic)
      vision = model.prepare(maps, deterministic)
      flat = {k: batch[k].reshape(B * K, *batch[k].shape[2:]) for k in _PROMPT_KEYS}
      output = model(
        vision_embeds=jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), vision),
        deterministic=deterministic,
        update_batch_stats=update_batch_stats,
        output_intermediates=True,
        **flat,
      )
      return output, (0.0, {}) if extra is None else extra(model, variables["params"], maps, output, batch)

    result = model.apply(variables, rngs={"dropout": drop}, mutable=mutable, method=call)
    result, new_stats = result if update_batch_stats else (result, {"batch_stats": batch_stats})
    output, (more, told) = result
    loss, metrics = detection_loss(output, DetectionTargets.from_batch(batch), config, points)
    return loss + more, (metrics | told, new_stats["batch_stats"])

  return loss_fn


_PROMPT_KEYS = ("input_ids", "attention_mask", "input_boxes", "input_boxes_labels")


def _count(flags: jax.Array) -> jax.Array:
  return jnp.maximum(flags.sum().astype(jnp.float32), 1.0)


def _per_layer(matcher, logits, boxes, targets: DetectionTargets, config: DetectionLossConfig) -> jax.Array:
  """[L, P, Q, M]"""
  lead = logits.shape[:2]
  true = jnp.broadcast_to(targets.boxes, (*lead, *targets.boxes.shape[1:]))
  valid = jnp.broadcast_to(targets.valid, (*lead, targets.valid.shape[-1]))
  return matcher(logits, boxes, true, valid, config.matcher)


def _resize(masks: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Bilinear, [..., h, w] -> [..., *size]; nothing to do where the size is right."""
  if masks.shape[-2:] == tuple(size):
    return masks
  return jax.image.resize(masks, (*masks.shape[:-2], *size), "bilinear", antialias=False)


def _at_points(
  logits: jax.Array, true: jax.Array, points: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Both masks [P, M, h, w] bilinearly at the same random points: two [P, M, points]."""
  xy = jax.random.uniform(key, (*logits.shape[:2], points, 2))

  def sample(masks):
    h, w = masks.shape[-2:]

    def one(mask, xy):
      at = [xy[:, 1] * h - 0.5, xy[:, 0] * w - 0.5]
      return jax.scipy.ndimage.map_coordinates(mask, at, order=1, mode="nearest")

    return jax.vmap(jax.vmap(one))(masks.astype(jnp.float32), xy)

  return sample(logits), sample(true)
