"""The teacher: a model's text encoder whose features a student learns to give.

It is SAM 3's CLIP text tower, or the text encoder of any LiteText checkpoint. Its features come from running
it (`Teacher.features`) or from files written once (`features.export_features`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp

from sam3lt_jax.checkpoints import from_pretrained
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.training.distillation import text_part

ALIASES = {"sam3": "facebook/sam3"}


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
  """A text encoder to learn from, never trained.

  Attributes:
    model: its configuration is set to the distillation's context length.
    variables: of the text part only; pass them to a jitted step as an argument (`frozen`).
    name: for reports.
  """

  model: Sam3LiteText
  variables: Variables
  name: str = "teacher"

  @classmethod
  def of(
    cls, model: Sam3LiteText, variables: Variables, *, context_length: int = 16, name: str = "teacher"
  ) -> Teacher:
    """The teacher in a model at hand.

    A CLIP tower's position table is cut to `context_length` rows, as the authors do, whatever the profile: it
    was trained on prefixes of its table, and a causal encoder gives the same features for them.

    Raises:
      ValueError: more tokens than the position table has rows, or RepMixer blocks that were folded.
    """
    config = model.config
    policy = "slice" if config.text.kind == "clip" else config.profile.position_policy
    profile = dataclasses.replace(config.profile, context_length=context_length, position_policy=policy)
    config = config.replace(profile=profile)
    text_part.check_reading(config, context_length, "teacher")
    return cls(model.clone(config=config), text_part.text_variables(variables), name)

  @property
  def width(self) -> int:
    """D, the width of its features."""
    return self.model.config.detr_encoder.hidden_size

  @property
  def context_length(self) -> int:
    return self.model.config.profile.context_length

  def features(self, variables: Variables, input_ids: jax.Array, mask: jax.Array) -> jax.Array:
    """Token features in the model's dtype, without gradients; for use inside jit.

    Args:
      variables: `Teacher.variables`, handed in so that they are no constants of the program.
      input_ids: int32 [P, T]; padding may hold any id, the teacher's own is put there.
      mask: bool or int [P, T], 1 = token.

    Returns:
      [P, T, D].
    """
    mask = jnp.asarray(mask).astype(bool)
    ids = jnp.where(mask, input_ids, self.model.config.profile.pad_token_id)
    out = self.model.apply(variables, ids, mask, method="get_text_features").pooler_output
    return jax.lax.stop_gradient(out)

  @functools.cached_property
  def digest(self) -> str:
    """sha256 of its weights, see `text_part.weights_digest`."""
    return text_part.weights_digest(self.variables)

  def identity(self) -> dict[str, Any]:
    """What decides its features, as JSON: configuration of the text part, profile's fields, weights."""
    config = self.model.config
    return {
      "text": dataclasses.asdict(config.text),
      "width": self.width,
      "profile": {name: getattr(config.profile, name) for name in text_part.TEXT_PROFILE_FIELDS},
      "dtype": jnp.dtype(self.model.dtype).name,
      "weights_sha256": self.digest,
    }


def load_model(source: str | os.PathLike, **options: Any) -> tuple[Sam3LiteText, Variables]:
  """`from_pretrained`, which also knows "sam3" (facebook/sam3). Errors as there."""
  name = os.fspath(source)
  return from_pretrained(ALIASES.get(name.lower(), name), **options)
