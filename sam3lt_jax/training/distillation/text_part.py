"""The part of a model that reads phrases: its parameters, its configuration, and how to replace it.

The text part is `text_encoder` and `text_projection` (to the detector's width D); the rest is the detector.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from sam3lt_jax.checkpoints.engine import flatten
from sam3lt_jax.config import Profile, Sam3LiteTextConfig
from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.model import Sam3LiteText, Variables

TEXT_PARTS = ("text_encoder", "text_projection")
# What of a profile says how phrases are read; the rest is the detector's.
TEXT_PROFILE_FIELDS = (
  "pad_token_id", "context_length", "mask_text_padding", "position_policy", "text_cleaning",
)  # fmt: skip
# CLIP's pooled head: checkpoints carry it, the detector does not use it, so no gradient reaches it.
UNUSED = "text_encoder/projection"


def text_variables(variables: Mapping[str, Any]) -> Variables:
  """The variables of the text part alone, which `get_text_features` runs on; shares the arrays."""
  part = {"params": {name: variables["params"][name] for name in TEXT_PARTS}}
  stats = variables.get("batch_stats") or {}
  if "text_encoder" in stats:
    part["batch_stats"] = {"text_encoder": stats["text_encoder"]}
  return part


def with_text_profile(profile: Profile, text: Profile, context_length: int | None = None) -> Profile:
  """`profile` with the fields that concern phrases taken from `text`, and `context_length` if given."""
  changes = {name: getattr(text, name) for name in TEXT_PROFILE_FIELDS}
  if context_length is not None:
    changes["context_length"] = context_length
  label = profile.name if profile.name == text.name else f"{profile.name}, text {text.name}"
  return dataclasses.replace(profile, name=label, **changes)


def check_reading(config: Sam3LiteTextConfig, context_length: int, whose: str) -> None:
  """Raises ValueError for more tokens than a table to be cut has rows, or an unknown padding id."""
  rows = config.text.max_position_embeddings
  if context_length < 2:
    raise ArgumentError("context_length", f" must be at least 2, got {context_length}")
  if config.profile.position_policy == "slice" and context_length > rows:
    raise ArgumentError(
      "context_length",
      f": the {whose}'s position table has {rows} rows, so at most {rows} tokens, got {context_length}",
    )
  pad, words = config.profile.pad_token_id, config.text.vocab_size
  if pad >= words:
    raise ArgumentError(
      "profile", f": pad_token_id {pad} is beyond the {whose}'s vocabulary of {words} tokens"
    )


def splice(
  student: Sam3LiteText, student_variables: Variables, model: Sam3LiteText, variables: Variables
) -> tuple[Sam3LiteText, Variables]:
  """The model with the student's text part in place of its own.

  Args:
    student, student_variables: a model and its variables; only those of the text part are read.
    model, variables: the whole model that keeps its detector.

  Returns:
    (model, variables) with `config.text`, the profile's fields about phrases, the parameters and the
    BatchNorm statistics of the text part replaced. Arrays are shared, not copied.

  Raises:
    ValueError: the student's features have another width than the detector reads.
  """
  check_width(student.config, model.config)
  profile = with_text_profile(model.config.profile, student.config.profile)
  config = model.config.replace(text=student.config.text, profile=profile)
  part = text_variables(student_variables)
  merged: Variables = {"params": {**variables["params"], **part["params"]}}
  if "batch_stats" in part:
    merged["batch_stats"] = part["batch_stats"]
  return model.clone(config=config), merged


def check_width(student: Sam3LiteTextConfig, teacher: Sam3LiteTextConfig) -> None:
  """Raises ValueError where the student's projected width is not the teacher's."""
  got, expected = student.detr_encoder.hidden_size, teacher.detr_encoder.hidden_size
  if got != expected:
    raise ArgumentError(
      "student",
      f": its features are projected to a width of {got}, the teacher's to {expected} "
      "(config.detr_encoder.hidden_size); the two must be equal",
    )


def weights_digest(variables: Mapping[str, Any]) -> str:
  """sha256 of the text part: every leaf's path, shape and float32 bytes, in the order of the paths."""
  digest = hashlib.sha256()
  for path, leaf in sorted(flatten(text_variables(variables)).items()):
    array = np.ascontiguousarray(np.asarray(leaf), np.float32)
    digest.update(f"{path} {list(array.shape)}\n".encode())
    digest.update(array.data)
  return digest.hexdigest()
