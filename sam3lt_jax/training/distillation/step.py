"""The distillation loss as a function of the student's parameters, for `training.step.make_train_step`."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sam3lt_jax.errors import check
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.nn.layers import Attention, Mlp
from sam3lt_jax.nn.text_encoder import TextEmbeddings
from sam3lt_jax.training import freezing
from sam3lt_jax.training.distillation import text_part
from sam3lt_jax.training.distillation.losses import DistillationLossConfig, distillation_loss
from sam3lt_jax.training.distillation.teacher import Teacher
from sam3lt_jax.training.step import LossFn

Tree = dict[str, Any]


def split_student(variables: Variables) -> tuple[Tree, Tree, Tree]:
  """(trainable, frozen, batch_stats) of a student's text part.

  CLIP's pooled head is always frozen: no gradient reaches it, and weight decay would wear it down.
  """
  params = text_part.text_variables(variables)["params"]
  trainable, frozen = freezing.split(params, freeze=[f"{text_part.UNUSED}/"])
  return trainable, frozen, variables.get("batch_stats", {})


def make_distillation_loss_fn(
  student: Sam3LiteText,
  teacher: Teacher | None,
  config: DistillationLossConfig | None = None,
  *,
  update_batch_stats: bool = True,
  dropout: float = 0.0,
  dtype: Any = None,
) -> LossFn:
  """A loss function of (params, frozen, batch_stats, batch, key), see `training.step`.

  `frozen` is {"params": the student's frozen parameters, "teacher": `Teacher.variables`}; a batch has
  input_ids and attention_mask [P, T], shuffled_ids and shuffled_attention_mask [P, T] where
  `config.consistency` is not 0, and teacher_features [P, T, D] where `teacher` is None (then frozen needs no
  "teacher").

  Args:
    student: its configuration decides the layers; parameters come with each call, in float32.
    teacher: computes its features in every step; None: they come with the batch.
    config: weights of the losses; None: the authors'.
    update_batch_stats: RepMixer blocks normalise by the batch and move their statistics, as the authors train
      (the shuffled prompts do so after the prompts); False: they use the statistics given, which stay.
    dropout: rate after the student's embeddings, attentions and MLPs. The authors use none.
    dtype: what the student computes in; None: its own. Losses are float32.

  Raises:
    ValueError: a rate outside [0, 1), or a student whose features have another width than the teacher's.
  """
  config = config or DistillationLossConfig()
  check(0 <= dropout < 1, "dropout", dropout, "a rate in [0, 1)")
  if teacher is not None:
    text_part.check_width(student.config, teacher.model.config)
  if dtype is not None:
    student = student.clone(dtype=jnp.dtype(dtype))

  def encode(variables, ids, mask, key):
    with nn.intercept_methods(_dropping(dropout, key)):
      if not (update_batch_stats and variables["batch_stats"]):
        out = student.apply(variables, ids, mask, method="get_text_features")
        return out.pooler_output, variables["batch_stats"]
      out, changed = student.apply(
        variables, ids, mask, update_batch_stats=True, method="get_text_features", mutable=["batch_stats"]
      )
      return out.pooler_output, changed["batch_stats"]

  def loss_fn(params, frozen, batch_stats, batch, key):
    params = freezing.merge(params, frozen["params"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    keys = jax.random.split(key)
    features, batch_stats = encode({"params": params, "batch_stats": batch_stats}, ids, mask, keys[0])
    shuffled = shuffled_mask = None
    if config.consistency:
      shuffled_mask = batch["shuffled_attention_mask"]
      variables = {"params": params, "batch_stats": batch_stats}
      shuffled, batch_stats = encode(variables, batch["shuffled_ids"], shuffled_mask, keys[1])
    if teacher is None:
      wanted = batch["teacher_features"]
    else:
      wanted = teacher.features(frozen["teacher"], ids, mask)
    loss, metrics = distillation_loss(features, wanted, mask, shuffled, shuffled_mask, config)
    return loss, (metrics, batch_stats)

  return loss_fn


def _dropping(rate: float, key: jax.Array) -> Callable[..., Any]:
  """Drops part of what embeddings, attentions and MLPs give; each module by a key of its own."""

  def interceptor(call, args, kwargs, context):
    out = call(*args, **kwargs)
    module = context.module
    if (
      not rate
      or context.method_name != "__call__"
      or not isinstance(module, (TextEmbeddings, Attention, Mlp))
    ):
      return out
    own = jax.random.fold_in(key, zlib.crc32("/".join(module.path).encode()))
    return jnp.where(jax.random.bernoulli(own, 1 - rate, out.shape), out / (1 - rate), 0).astype(out.dtype)

  return interceptor
