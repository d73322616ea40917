"""What the teacher is told beside boxes and masks: which attributes an object has, and which phrases fit it.

SAM 3 starts from an image and a text encoder that were trained together on billions of pairs. A detector from
nothing has no such start, and its own losses hardly supply it: after 2,000 steps objects are found and
outlined, but colours cannot be read from the queries and scores do not depend on the phrase (measured on
drawn scenes). Two losses make up for that, both on queries that are matched to an object:

- attributes: a linear head reads kind, colour, pattern and size from the query. It is not part of the model.
- fit: the model's own scoring, asked for every pair of a matched query and a phrase of the batch, not only
  for phrases about the query's image. An object fits a phrase that names nothing else than it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.shapes.data import ATTRIBUTES
from sam3lt_jax.config import PADDING_LABEL
from sam3lt_jax.model import Sam3LiteText, Sam3LiteTextOutput
from sam3lt_jax.training.detection.losses import Metrics
from sam3lt_jax.training.detection.matcher import MatcherConfig, match_one_to_one

HEADS = "attribute_heads"  # beside the model's own parameters
_SIZES = [len(values) for values in ATTRIBUTES.values()]


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
  """Factors of the two losses, and the matching of queries to objects."""

  attributes_weight: float = 4.0
  fit_weight: float = 10.0
  matcher: MatcherConfig = MatcherConfig()


def with_heads(params: Any, width: int) -> dict[str, Any]:
  """`params` and the linear heads, from zero."""
  return {**params, HEADS: {"kernel": jnp.zeros((width, sum(_SIZES)))}}


def make_alignment(config: AlignmentConfig = AlignmentConfig()) -> Callable:
  """`extra` of `make_detection_loss_fn`, for batches of `examples.shapes.data`."""

  def extra(model: Sam3LiteText, params, maps, output: Sam3LiteTextOutput, batch):
    taps = output.intermediates
    flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in batch.items() if k.startswith(("target_", "phrase_"))}
    layers = taps["decoder_logits"].shape[0]
    boxes, valid = (
      jnp.broadcast_to(x, (layers, *x.shape)) for x in (flat["target_boxes"], flat["target_valid"])
    )
    match = match_one_to_one(taps["decoder_logits"], taps["decoder_boxes"], boxes, valid, config.matcher)
    objects = jnp.einsum("lpqm,lpqd->lpmd", match, taps["decoder_hidden_states"])
    found = match.sum(2)  # [layers, P, M]
    has = flat["target_attributes"]  # [P, M, attributes]
    told, metrics = attribute_loss(objects @ params[HEADS]["kernel"], has, found)

    P, M = has.shape[:2]
    everyone = objects.reshape(layers, 1, P * M, -1)
    queries = jnp.broadcast_to(everyone, (layers, P, *everyone.shape[2:]))
    logits = model.dot_product_scoring(queries, taps["prompt_tokens"], taps["prompt_mask"])
    only_text = (batch["input_boxes_labels"] == PADDING_LABEL).all(-1).reshape(P)
    weight = found.reshape(layers, 1, -1) * only_text[:, None]
    fit, more = fit_loss(logits, flat["phrase_attributes"], has.reshape(-1, has.shape[-1]), weight)
    return config.attributes_weight * told + config.fit_weight * fit, metrics | more

  return extra


def attribute_loss(logits: jax.Array, has: jax.Array, found: jax.Array) -> tuple[jax.Array, Metrics]:
  """Cross entropies of the attributes, summed over attributes and layers, a mean over objects.

  Args:
    logits: [layers, P, M, values of all attributes]. has: int32 [P, M, attributes], which value is true.
    found: float32 [layers, P, M], 1 where a query is matched.

  Returns:
    (loss [], the last layer's accuracies by name).
  """
  count = jnp.maximum(found[0].sum(), 1.0)
  total, metrics, start = jnp.zeros(()), {}, 0
  for i, (name, size) in enumerate(zip(ATTRIBUTES, _SIZES)):
    part, start = logits[..., start : start + size], start + size
    true = jnp.broadcast_to(has[..., i], part.shape[:-1])
    total += (optax.softmax_cross_entropy_with_integer_labels(part, true) * found).sum() / count
    metrics[f"{name}_accuracy"] = ((part[-1].argmax(-1) == true[-1]) * found[-1]).sum() / count
  return total, metrics


def fit_loss(
  logits: jax.Array, named: jax.Array, has: jax.Array, weight: jax.Array
) -> tuple[jax.Array, Metrics]:
  """Cross entropy of "this object fits this phrase", summed over layers, a mean over pairs.

  Args:
    logits: [layers, P, N], N objects. named: int32 [P, attributes], -1 where the phrase leaves one open.
    has: int32 [N, attributes]. weight: float32 [layers, P, N].

  Returns:
    (loss [], the last layer's F1 of pairs as "fit_f1").
  """
  fits = ((named[:, None] < 0) | (named[:, None] == has)).all(-1)  # [P, N]
  loss = optax.sigmoid_binary_cross_entropy(logits, jnp.broadcast_to(fits, logits.shape).astype(logits.dtype))
  loss = (loss * weight).sum((1, 2)) / jnp.maximum(weight.sum((1, 2)), 1.0)
  said, last = logits[-1] > 0, weight[-1]
  both = 2 * ((said & fits) * last).sum()
  return loss.sum(), {"fit_f1": both / jnp.maximum((said * last).sum() + (fits * last).sum(), 1.0)}
