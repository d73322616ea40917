"""A profile in the vocabulary of the checkpoint that is trained under it."""

from __future__ import annotations

import dataclasses
import os

from sam3lt_jax.checkpoints import sources
from sam3lt_jax.config import Profile, Sam3LiteTextConfig, TextConfig
from sam3lt_jax.processing.tokenizer import ClipTokenizer


def fitting(profile: str | Profile, source: str | os.PathLike) -> Profile:
  """`profile` for the checkpoint `source`: the named ones pad with an id of CLIP's table, which a pruned
  vocabulary does not have.

  Errors of `from_pretrained` about `source` come as they are.
  """
  profile = Profile.named(profile)
  own = saved_tokenizer(source)
  return profile if own is None else padded_like(profile, own)


def saved_tokenizer(source: str | os.PathLike) -> ClipTokenizer | None:
  """The tokenizer of a vocabulary of its own that lies beside the weights of `source`."""
  found = sources.locate(source)
  folder = found.path if os.path.isdir(found.path) else os.path.dirname(found.path)
  names = ("config.json", "tokenizer.json")
  if found.kind == "random" or not all(os.path.isfile(os.path.join(folder, name)) for name in names):
    return None
  config = Sam3LiteTextConfig.from_json(folder)
  if config.text.vocab_size == TextConfig().vocab_size:
    return None
  return ClipTokenizer.from_file(folder, config.profile)


def padded_like(profile: Profile, tokenizer: ClipTokenizer) -> Profile:
  """`profile` with an id of the tokenizer's: its end token for CLIP's end token, else its own padding."""
  ends = profile.pad_token_id == Profile.transformers().pad_token_id
  own = tokenizer.eot_token_id if ends else tokenizer.profile.pad_token_id
  return dataclasses.replace(profile, pad_token_id=own)
