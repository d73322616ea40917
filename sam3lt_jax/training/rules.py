"""The rules of the checkpoint that is trained, before its weights are loaded."""

from __future__ import annotations

import dataclasses
import os

from sam3lt_jax.checkpoints import sources
from sam3lt_jax.checkpoints.random_init import RANDOM_CONFIGS
from sam3lt_jax.config import Profile, Sam3LiteTextConfig
from sam3lt_jax.processing.tokenizer import ClipTokenizer


def saved_config(source: str | os.PathLike) -> Sam3LiteTextConfig | None:
  """The configuration of a checkpoint, downloaded where it has to be; None where its weights alone tell it.

  Errors of `from_pretrained` about `source` come as they are.
  """
  found = sources.locate(source)
  if found.kind == "random":
    return RANDOM_CONFIGS[found.path]()
  whole = os.path.isdir(found.path)
  path = os.path.join(found.path if whole else os.path.dirname(found.path), "config.json")
  try:
    return Sam3LiteTextConfig.from_json(path) if os.path.isfile(path) else None
  except ValueError:
    if whole:
      raise
    return None  # a file is complete in itself; what lies beside it may be another model's


def fitting(profile: str | Profile, config: Sam3LiteTextConfig | None) -> Profile:
  """`profile` for a model of `config`: the named ones pad with an id of CLIP's table, which a pruned
  vocabulary does not have; its end token stands for CLIP's end token, else its own padding."""
  profile = Profile.named(profile)
  if config is None or config.tokenizer is None:
    return profile
  own = ClipTokenizer.of_json(config.tokenizer, config.profile)
  ends = profile.pad_token_id == Profile.transformers().pad_token_id
  return dataclasses.replace(profile, pad_token_id=own.eot_token_id if ends else own.profile.pad_token_id)
