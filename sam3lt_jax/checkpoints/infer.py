"""Which model a file holds, told by the shapes of its tensors: a released variant, or what `config=` says.

Works on the leaves of our tree (`engine.assign` gives their shapes without reading anything), so one set of
rules serves every layout.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from sam3lt_jax.checkpoints.errors import CheckpointError
from sam3lt_jax.config import Profile, Sam3LiteTextConfig, TextConfig

Shape = tuple[int, ...]

_VARIANTS = {
  "SAM3-LiteText-S0": Sam3LiteTextConfig.s0,
  "SAM3-LiteText-S1": Sam3LiteTextConfig.s1,
  "SAM3-LiteText-L": Sam3LiteTextConfig.l,
  "SAM 3 (the teacher)": Sam3LiteTextConfig.sam3,
}
_TEXT_LAYER = r"params/text_encoder/layers_(\d+)/"
_POSITIONS = "params/text_encoder/embeddings/position_embedding"
# How many of each a configuration asks for, and the leaves that show how many there are.
_COUNTS = {
  "vision.num_hidden_layers": r"params/vision_encoder/backbone/layers_(\d+)/",
  "vision.scale_factors": r"params/vision_encoder/neck/fpn_layers_(\d+)/",
  "text.num_hidden_layers": _TEXT_LAYER,
  "geometry_encoder.num_layers": r"params/geometry_encoder/layers_(\d+)/",
  "detr_encoder.num_layers": r"params/detr_encoder/layers_(\d+)/",
  "detr_decoder.num_layers": r"params/detr_decoder/layers_(\d+)/",
  "mask_decoder.num_upsampling_stages": r"params/mask_decoder/pixel_decoder/conv_layers_(\d+)/",
}
_SHOWN = 3  # differences that a message lists


@dataclasses.dataclass(frozen=True)
class TextFacts:
  """What tells the variants apart."""

  kind: str
  hidden_size: int
  num_hidden_layers: int
  use_repmixer_blocks: bool

  @classmethod
  def of(cls, text: TextConfig) -> TextFacts:
    return cls(text.kind, text.hidden_size, text.num_hidden_layers, text.use_repmixer_blocks)

  def __str__(self) -> str:
    name = next(
      (n for n, make in _VARIANTS.items() if TextFacts.of(make().text) == self), "an unreleased variant"
    )
    tower = "CLIP" if self.kind == "clip" else "MobileCLIP"
    blocks = " with RepMixer blocks" if self.use_repmixer_blocks else ""
    return f"{name} ({tower} text encoder, {self.num_hidden_layers} layers of {self.hidden_size}{blocks})"


def _count(shapes: Mapping[str, Shape], pattern: str) -> int:
  """Layers: one more than the highest index, which `pattern` captures; 0 without any."""
  return max((int(m[1]) for path in shapes if (m := re.match(pattern, path))), default=-1) + 1


def text_facts(shapes: Mapping[str, Shape], text_kind: str) -> TextFacts | None:
  """The variant's marks in a file; None where it has no (whole) text encoder."""
  table = shapes.get("params/text_encoder/embeddings/token_embedding/embedding", ())
  if len(table) != 2:
    return None
  repmixer = _count(shapes, _TEXT_LAYER + "token_mixer/") > 0
  return TextFacts(text_kind, table[1], _count(shapes, _TEXT_LAYER), repmixer)


def check_counts(config: Sam3LiteTextConfig, shapes: Mapping[str, Shape], where: str) -> None:
  """Refuses, before a model is built, a configuration with more layers than the tensors are for.

  Raises:
    CheckpointError: names the field. Fewer layers are found by the comparison of all leaves.
  """
  for name, pattern in _COUNTS.items():
    part, field = name.split(".")
    asked = getattr(getattr(config, part), field)
    asked, there = asked if isinstance(asked, int) else len(asked), _count(shapes, pattern)
    if asked > there:
      raise CheckpointError(f"{where}: the configuration has {name}={asked}, the tensors are for {there}")


def check_variant(
  config: Sam3LiteTextConfig, shapes: Mapping[str, Shape], text_kind: str, where: str, *, given: bool
) -> None:
  """Compares the file's text encoder with the configuration's.

  Args:
    given: `config` was passed by the user; else it comes from the checkpoint's own config.json.

  Raises:
    CheckpointError: another variant, in one sentence that names both; or a position table of other length.
  """
  facts = text_facts(shapes, text_kind)
  if facts is None:
    return
  expected = TextFacts.of(config.text)
  told_by = "the given config" if given else "its config.json"
  if facts != expected:
    advice = "leave config= out, or pass the file's own" if given else "the two do not belong together"
    raise CheckpointError(f"{where} looks like {facts}, but {told_by} is for {expected}; {advice}")
  table = shapes.get(_POSITIONS)
  if table and table[0] != config.text.max_position_embeddings:
    raise CheckpointError(
      f"{where} has {table[0]} rows in the text encoder's position table, but {told_by} says "
      f"text.max_position_embeddings={config.text.max_position_embeddings}; set it to {table[0]}"
    )


def released_config(
  shapes: Mapping[str, Shape], text_kind: str, where: str, profile: str | Profile
) -> Sam3LiteTextConfig:
  """The released variant whose text encoder a file has, with as many positions as its table.

  Args:
    shapes: leaf path -> shape, see `engine.assign`.
    text_kind: "mobileclip" or "clip".
    where: names the file in errors.
    profile: the reference profile to follow.

  Raises:
    CheckpointError: none of them; says which were compared, and asks for `config=`.
  """
  facts = text_facts(shapes, text_kind)
  config = next((c for make in _VARIANTS.values() if TextFacts.of((c := make()).text) == facts), None)
  if config is None:
    compared = ", ".join(str(TextFacts.of(make().text)) for make in _VARIANTS.values())
    found = "it has no text encoder" if facts is None else f"it looks like {facts}"
    raise CheckpointError(
      f"{where} is no released model: {found}, compared with {compared}; pass config= with its sizes"
    )
  rows = (shapes.get(_POSITIONS) or (config.text.max_position_embeddings,))[0]
  config = config.replace(text=dataclasses.replace(config.text, max_position_embeddings=rows))
  profile = Profile.named(profile)
  if profile != Profile.original():
    return config.replace(profile=profile)
  # The teacher was trained with 32 tokens; its table says so.
  length = rows if text_kind == "clip" else profile.context_length
  return config.replace(profile=dataclasses.replace(profile, context_length=length))


def check_released(
  config: Sam3LiteTextConfig, shapes: Mapping[str, Shape], released: Mapping[str, Shape], where: str
) -> None:
  """Compares a file that came without sizes with the released model that its text encoder is of.

  Args:
    released: the leaves of that model.

  Raises:
    CheckpointError: leaves of other shapes, or of layers that it does not have; shows some of them.
  """
  differ = [
    f"{leaf.partition('/')[2]} is {list(shapes[leaf])} and not {list(shape)}"
    for leaf, shape in released.items()
    if leaf in shapes and shapes[leaf] != shape
  ]
  for name, pattern in _COUNTS.items():
    there, expected = _count(shapes, pattern), _count(released, pattern)
    if there != expected:
      differ.append(f"{name} is {there} and not {expected}")
  if differ:
    more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    raise CheckpointError(
      f"{where} has the text encoder of {TextFacts.of(config.text)}, but is not that model: "
      f"{'; '.join(differ[:_SHOWN])}{more}; pass config= with its sizes"
    )
