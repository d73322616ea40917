"""What a job needs before it runs: questions, model, the fingerprint of both."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sam3lt_jax import devices, parallel
from sam3lt_jax.checkpoints import open_checkpoint
from sam3lt_jax.checkpoints.summary import digest
from sam3lt_jax.engine import IMAGE_BUCKETS, PROMPT_BUCKETS, Engine
from sam3lt_jax.errors import renamed
from sam3lt_jax.jobs.questions import Questions
from sam3lt_jax.model import Sam3LiteText
from sam3lt_jax.predictor import Predictor
from sam3lt_jax.processing.processor import Sam3Processor

if TYPE_CHECKING:
  from sam3lt_jax.jobs.clips import ClipConfig
  from sam3lt_jax.jobs.run import JobConfig

_LISTED = 10_000  # phrases that stand in plan.json; more only by their digest


def process_number(config: JobConfig | ClipConfig) -> tuple[int, int]:
  """(index, count) of this process."""
  if config.process_count is not None:
    return config.process_index, config.process_count
  devices.check()
  return jax.process_index(), jax.process_count()


def load_questions(config: JobConfig) -> Questions:
  if config.prompts_file is not None:
    return Questions.from_file(config.prompts_file)
  return Questions.of_phrases(config.phrases)


def load(config: JobConfig, questions: int, ahead: bool) -> tuple[Engine, str]:
  """The configuration's model on this process's devices, and the digest of its weights.

  Args:
    questions: of each image, as far as is known. ahead: compile for them while the weights are read.
  """
  opened = open_checkpoint(config.model, None, config.profile, config.dtype, config.dtype)
  with renamed("prompt_buckets", "buckets"):
    predictor = Predictor.without_weights(opened, config.image_size, **engine_options(config, questions))
  if ahead:
    predictor.engine.compile_ahead(predictor.engine.rows, questions)
  # On the host where one device is too small for the weights.
  variables = opened.load(parallel.host_device() if config.model_parallel > 1 else None)
  weights = digest(variables)  # before folding, whose rounding may depend on the platform
  predictor.use_variables(variables)
  return predictor.engine, weights


def engine_options(config: JobConfig, questions: int) -> dict[str, Any]:
  """All local devices; what runs together is as the configuration says, or as suits the questions."""
  local = jax.local_devices()
  options: dict[str, Any] = {"devices": local, "model_parallel": config.model_parallel}
  on_cpu = local[0].platform == "cpu"
  if config.batch is not None or not on_cpu:
    options["image_buckets"] = (config.batch or IMAGE_BUCKETS[-1],)
  if config.buckets is not None:
    options["prompt_buckets"] = config.buckets
  elif not on_cpu:
    options["prompt_buckets"] = sorted({*PROMPT_BUCKETS, questions})
  return options


def fingerprint(
  config: JobConfig, model: Sam3LiteText, processor: Sam3Processor, questions: Questions, weights: str
) -> dict[str, Any]:
  """What must be the same on a restart, and what `merge` and a reader need to know, once."""
  profile = processor.profile
  name = config.model.rstrip("/")
  return {
    # By name where that says something; a folder may be another one on another host.
    "model": os.path.basename(name) if os.path.exists(name) else name,
    "weights": weights,
    "profile": profile.name,
    "dtype": np.dtype(model.dtype).name,
    "image_size": processor.image_size,
    "threshold": profile.score_threshold if config.threshold is None else config.threshold,
    "mask_threshold": config.mask_threshold,
    "max_pixels": config.max_pixels,
    "questions": questions.digest,
    "per_image": questions.per_image,
    "phrases": list(questions.phrases if len(questions.phrases) <= _LISTED else ()),
  }
