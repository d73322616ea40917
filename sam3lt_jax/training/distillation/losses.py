"""Losses between a student's and a teacher's token features.

Axes: P prompts, T tokens, D feature width. Features are [P, T, D] of any floating dtype, masks bool or int
[P, T], 1 = token; every sum is taken in float32, and a loss is float32 []. ValueError: other shapes.
Source: the authors' stage-1 trainer for text encoders (efficientsam3, `train_text_encoder_stage1.py` and its
configuration `text_improved_s0`), read for the formulas.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from sam3lt_jax.errors import check

_EPS = 1e-8  # under a norm, as torch.nn.functional.cosine_similarity has it


@dataclasses.dataclass(frozen=True)
class DistillationLossConfig:
  """Weights of the sum `distillation_loss`. The defaults are the authors'.

  Attributes:
    mse: of the squared error of token features.
    cosine: of 1 - cosine of token features.
    consistency: of the squared distance between a prompt and the same prompt with its words shuffled. 0:
      the shuffled prompts are not encoded at all.
    consistency_pool: what a prompt's mean is taken over: its "valid" tokens, so that nothing in a padding
      slot can move the loss, or "all" the slots of the context, as the authors' trainer does.
  """

  mse: float = 1.0
  cosine: float = 2.0
  consistency: float = 0.1
  consistency_pool: Literal["valid", "all"] = "valid"

  def __post_init__(self):
    for name in ("mse", "cosine", "consistency"):
      check(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "a weight of 0 or more")
    if self.mse == self.cosine == 0:
      raise ValueError("mse and cosine are both 0: nothing would draw the student to its teacher")
    good = self.consistency_pool in ("valid", "all")
    check(good, "consistency_pool", self.consistency_pool, "'valid' or 'all'")


def masked_mse(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> jax.Array:
  """Squared error, averaged over a prompt's valid tokens and the D channels, then over the prompts.

  A prompt without a valid token adds 0 to the mean over prompts.
  """
  student, teacher, mask = _check(student, teacher, mask)
  per_token = jnp.mean(jnp.square(student - teacher), axis=-1)
  return mean_of_prompts(per_token, mask).mean()


def masked_cosine(student: jax.Array, teacher: jax.Array, mask: jax.Array) -> jax.Array:
  """1 - cosine of every valid token, averaged over a prompt's valid tokens, then over the prompts.

  0 (same directions) to 2. A feature of norm 0 has cosine 0 with everything.
  """
  student, teacher, mask = _check(student, teacher, mask)
  return mean_of_prompts(1.0 - cosine_similarity(student, teacher), mask).mean()


def cosine_similarity(a: jax.Array, b: jax.Array) -> jax.Array:
  """Cosine over the last axis in float32: [..., D], [..., D] -> [...]. Norms are at least 1e-8."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)

  def norm(x):  # the bound lies inside the root: its slope at 0 would be infinite
    return jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1), _EPS**2))

  return jnp.sum(a * b, axis=-1) / (norm(a) * norm(b))


def shuffled_consistency(
  features: jax.Array,
  shuffled: jax.Array,
  mask: jax.Array,
  shuffled_mask: jax.Array,
  pool: Literal["valid", "all"] = "valid",
) -> jax.Array:
  """Squared error between the mean feature of a prompt and that of the same words in another order.

  Averaged over the D channels, then over the prompts. Prompts are bags of concepts: "red car" should mean
  what "car red" means.

  Args:
    features, shuffled: of the prompt and of the shuffled prompt; both receive gradients.
    mask, shuffled_mask: the words may split into another number of tokens.
    pool: the mean is over "valid" tokens, or over "all" T slots, padding included, as the authors take it.
  """
  features, shuffled, mask = _check(features, shuffled, mask, names=("features", "shuffled"), clean=False)
  if shuffled_mask.shape != mask.shape:
    raise ValueError(f"shuffled_mask must be {mask.shape} like mask, got {shuffled_mask.shape}")
  if pool == "all":
    means = features.mean(axis=1), shuffled.mean(axis=1)
  else:
    means = _pooled(features, mask), _pooled(shuffled, shuffled_mask.astype(bool))
  return jnp.mean(jnp.square(means[0] - means[1]))


def distillation_loss(
  student: jax.Array,
  teacher: jax.Array,
  mask: jax.Array,
  shuffled: jax.Array | None = None,
  shuffled_mask: jax.Array | None = None,
  config: DistillationLossConfig | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """mse * masked MSE + cosine * masked (1 - cosine) + consistency * shuffled-words consistency.

  Args:
    student, teacher: token features of the same prompts. No gradient reaches the teacher.
    shuffled, shuffled_mask: the student's features of the shuffled prompts, and their mask; may be left out
      where `config.consistency` is 0.
    config: the weights; None: the authors'.

  Returns:
    (loss, {"mse", "cosine_loss", "feature_cosine" and, where weighted, "consistency"}), all float32 [].
    `feature_cosine` is 1 - `cosine_loss`.

  Raises:
    ValueError: no shuffled features where they are weighted.
  """
  config = config or DistillationLossConfig()
  teacher = jax.lax.stop_gradient(teacher)
  mse, cosine = masked_mse(student, teacher, mask), masked_cosine(student, teacher, mask)
  loss = config.mse * mse + config.cosine * cosine
  metrics = {"mse": mse, "cosine_loss": cosine, "feature_cosine": 1.0 - cosine}
  if config.consistency:
    if shuffled is None or shuffled_mask is None:
      raise ValueError("shuffled and shuffled_mask are needed: config.consistency is not 0")
    consistency = shuffled_consistency(student, shuffled, mask, shuffled_mask, config.consistency_pool)
    loss = loss + config.consistency * consistency
    metrics["consistency"] = consistency
  return loss, metrics


def _check(a, b, mask, names=("student", "teacher"), clean=True):
  """Both as float32 (with `clean`, 0 in padding: a NaN there must reach neither value nor gradient)."""
  if a.ndim != 3 or a.shape != b.shape:
    raise ValueError(f"{names[0]} and {names[1]} must be [P, T, D] alike, got {a.shape} and {b.shape}")
  if mask.shape != a.shape[:2]:
    raise ValueError(f"mask must be {a.shape[:2]} like the tokens, got {mask.shape}")
  a, b, mask = a.astype(jnp.float32), b.astype(jnp.float32), mask.astype(bool)
  if clean:
    a, b = (jnp.where(mask[..., None], x, 0.0) for x in (a, b))
  return a, b, mask


def mean_of_prompts(values: jax.Array, mask: jax.Array) -> jax.Array:
  """[P, T] -> [P], the mean over valid tokens; 0 where there is none."""
  return jnp.where(mask, values, 0.0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)


def _pooled(features: jax.Array, mask: jax.Array) -> jax.Array:
  """[P, T, D] -> [P, D]."""
  total = jnp.where(mask[..., None], features, 0.0).sum(axis=1)
  return total / jnp.maximum(mask.sum(axis=1), 1)[:, None]
