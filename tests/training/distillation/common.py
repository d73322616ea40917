"""What the distillation tests share."""

from __future__ import annotations

import functools
import itertools

import numpy as np

from sam3lt_jax import from_pretrained
from sam3lt_jax.processing.tokenizer import ClipTokenizer
from sam3lt_jax.pruning import prune_vocabulary
from sam3lt_jax.training.distillation.teacher import Teacher

_COLOURS = "red green blue yellow black white purple orange".split()
_THINGS = "car cup dog house tree ball chair bird".split()
PHRASES = [f"{c} {t}" for c, t in itertools.product(_COLOURS, _THINGS)] + [
  f"{s} {c} {t}" for s, c, t in itertools.product(("small", "striped"), _COLOURS[:4], _THINGS)
]


@functools.cache
def _tiny():
  model, variables, tokenizer = prune_vocabulary(*from_pretrained("random:tiny", progress=False), PHRASES)
  table = variables["params"]["text_encoder"]["embeddings"]["token_embedding"]
  table["embedding"] = 20 * table["embedding"]
  ids, mask = tokenizer(PHRASES, context_length=8)
  features = model.apply(variables, ids, mask, method="get_text_features").pooler_output
  projection = variables["params"]["text_projection"]
  words = np.asarray(mask[:, 1:] * mask[:, :-1], bool)  # neither the start token nor padding
  projection["bias"] = projection["bias"] - features[:, 1:][words].mean(axis=0)
  return model, variables, tokenizer


def tiny_model():
  """(model, variables): random:tiny with the words of `PHRASES` only.

  The words outweigh their places, and the features are centred: else the mean feature alone, whatever the
  phrase, has a cosine of 0.92 with them, and a student that reads nothing would look well taught.
  """
  return _tiny()[:2]


def tokenizer() -> ClipTokenizer:
  """Its tokenizer."""
  return _tiny()[2]


@functools.cache
def tiny_teacher() -> Teacher:
  return Teacher.of(*tiny_model(), context_length=8, name="random:tiny")
