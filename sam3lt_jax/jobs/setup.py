"""What a job needs before it runs: questions, model, the fingerprint of both, the compilation cache."""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sam3lt_jax.jobs import files
from sam3lt_jax.jobs.questions import Questions
from sam3lt_jax.predictor import Predictor

if TYPE_CHECKING:
  from sam3lt_jax.jobs.run import JobConfig

_LISTED = 10_000  # phrases that stand in plan.json; more only by their digest
_SAMPLES = 64  # values of each array that tell one model from another


def process_number(config: JobConfig) -> tuple[int, int]:
  """(index, count) of this process."""
  if config.process_count is not None:
    return config.process_index, config.process_count
  return jax.process_index(), jax.process_count()


def load_questions(config: JobConfig) -> Questions:
  if config.prompts_file is not None:
    return Questions.from_file(config.prompts_file)
  return Questions.of_phrases(config.phrases)


def use_compilation_cache(folder: str | None) -> None:
  """XLA keeps what it compiles, for the next start, in `folder`; see `JobConfig.compilation_cache`.

  Programs in there are trusted: the default folder is the user's own.
  """
  if folder is None and jax.config.jax_compilation_cache_dir:
    return
  if folder is None:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(cache, "sam3lt_jax", "xla")
  if folder and not files.is_remote(folder):
    try:
      os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError:  # a home that cannot be written: the job runs, it compiles anew each time
      folder = ""
  jax.config.update("jax_compilation_cache_dir", folder or None)


def load(config: JobConfig) -> tuple[Predictor, str]:
  """The configuration's predictor and the digest of its weights."""
  options = {"profile": config.profile, "dtype": config.dtype, "image_size": config.image_size}
  with _where_it_fits(config):
    loaded = Predictor.from_pretrained(config.model, **options, fuse=False, compile_ahead=False)
    weights = digest(loaded)  # before folding, whose rounding may depend on the platform
    predictor = Predictor(loaded.model, loaded.variables, loaded.processor)
  if config.model_parallel > 1 and jax.default_backend() != "cpu":
    predictor.variables = jax.device_put(predictor.variables, jax.local_devices(backend="cpu")[0])
  return predictor, weights


def _where_it_fits(config: JobConfig) -> Any:
  """On the host where one device is too small for the weights; phrases are then encoded there, once each."""
  if config.model_parallel == 1 or jax.default_backend() == "cpu":
    return contextlib.nullcontext()
  return jax.default_device(jax.local_devices(backend="cpu")[0])


def digest(predictor: Predictor) -> str:
  """Of a sample of every array's values, in order of their names: another model gives another digest."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(predictor.variables):
    flat = leaf.reshape(-1)
    sample = np.asarray(flat[:: max(1, flat.size // _SAMPLES)], np.float32)
    sha.update(f"{jax.tree_util.keystr(path)} {leaf.shape} ".encode() + sample.tobytes())
  return sha.hexdigest()[:16]


def fingerprint(
  config: JobConfig, predictor: Predictor, questions: Questions, weights: str
) -> dict[str, Any]:
  """What must be the same on a restart, and what `merge` and a reader need to know, once."""
  profile = predictor.processor.profile
  model = config.model.rstrip("/")
  return {
    # By name where that says something; a folder may be another one on another host.
    "model": os.path.basename(model) if os.path.exists(model) else model,
    "weights": weights,
    "profile": profile.name,
    "dtype": np.dtype(predictor.model.dtype).name,
    "image_size": predictor.processor.image_size,
    "threshold": profile.score_threshold if config.threshold is None else config.threshold,
    "mask_threshold": config.mask_threshold,
    "max_pixels": config.max_pixels,
    "questions": questions.digest,
    "per_image": questions.per_image,
    "phrases": list(questions.phrases if len(questions.phrases) <= _LISTED else ()),
  }
