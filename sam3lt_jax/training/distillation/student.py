"""The student: a small text encoder with the teacher's detector around it, and where its weights start.

Sources: the authors' `build_text_student_model` (whose keys start a student, and that the projection to the
detector stays random); MobileCLIP's published checkpoints for their key names.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.checkpoints import CheckpointError, engine, from_pretrained, readers, sources, tables
from sam3lt_jax.checkpoints.errors import CheckpointMismatchError
from sam3lt_jax.checkpoints.random_init import RANDOM_CONFIGS
from sam3lt_jax.checkpoints.rules import Layout
from sam3lt_jax.config import Profile, Sam3LiteTextConfig, TextConfig
from sam3lt_jax.errors import ArgumentError, check, renamed
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.ops.resize import resize_rows
from sam3lt_jax.training.distillation import text_part

# What a file may leave out: CLIP's pooled head, which nothing reads, and the projection to the detector.
_OPTIONAL = re.compile(r"params/(text_projection|text_encoder/projection)/.*")
_TABLE = "params/text_encoder/embeddings/position_embedding"
_ENCODER = "backbone.language_backbone.encoder."
_PROJECTOR = "backbone.language_backbone.projector."


@dataclasses.dataclass(frozen=True)
class InitReport:
  """Where a student's weights come from.

  Attributes:
    source: as given.
    loaded, random: paths of leaves, sorted.
    notes: what was changed on the way, one sentence each.
  """

  source: str
  loaded: tuple[str, ...]
  random: tuple[str, ...]
  notes: tuple[str, ...] = ()

  def __str__(self) -> str:
    text = f"{self.source}: {len(self.loaded)} of {len(self.loaded) + len(self.random)} tensors loaded"
    if self.loaded and self.random:
      names = sorted({path.partition("/")[2].rpartition("/")[0] for path in self.random})
      text += f", random: {', '.join(names)}"
    return "; ".join([text, *self.notes])


def student_config(
  student: str | TextConfig,
  teacher: Sam3LiteTextConfig,
  *,
  profile: str | Profile = "original",
  context_length: int = 16,
) -> Sam3LiteTextConfig:
  """The teacher's configuration with the student's text encoder.

  Args:
    student: "s0", "s1", "l" (also "tiny", "tiny-s1", "tiny-l") for those text encoders with the teacher's
      vocabulary and a position table of `context_length` rows; or a `TextConfig`.
    teacher: whose detector the student will serve.
    profile: how the student reads phrases (padding id, padding mask, positions, cleaning). The authors'
      students were trained as "original" says.
    context_length: tokens a phrase is padded and cut to.

  Raises:
    ValueError: an unknown name, another vocabulary than the teacher's, a context that does not fit the
      position table, or folded RepMixer blocks.
  """
  text = student
  if not isinstance(student, TextConfig):
    names = f"{', '.join(RANDOM_CONFIGS)} or a TextConfig"
    check(student in RANDOM_CONFIGS, "student", student, names)
    own = {"vocab_size": teacher.text.vocab_size, "max_position_embeddings": context_length}
    text = dataclasses.replace(RANDOM_CONFIGS[student]().text, **own)
  if text.vocab_size != teacher.text.vocab_size:
    raise ArgumentError(
      "student",
      f": its vocabulary has {text.vocab_size} tokens, the teacher's {teacher.text.vocab_size}; "
      "features are compared token by token, so both must read the same ids",
    )
  if text.fused:
    raise ArgumentError(
      "student", ": config.text.fused has no BatchNorm to train; take the unfused configuration"
    )
  changed = text_part.with_text_profile(teacher.profile, Profile.named(profile), context_length)
  with renamed("text", "student"):
    config = teacher.replace(text=text, profile=changed)
  text_part.check_reading(config, context_length, "student")
  return config


def make_student(
  student: str | TextConfig,
  init: str | os.PathLike = "random",
  *,
  teacher: Sam3LiteTextConfig,
  profile: str | Profile = "original",
  context_length: int = 16,
  seed: int = 0,
) -> tuple[Sam3LiteText, Variables, InitReport]:
  """A student model and the variables of its text part.

  Args:
    student, teacher, profile, context_length: see `student_config`.
    init: "random" (from `seed`); a LiteText checkpoint that `from_pretrained` reads, in any layout; or a file
      with MobileCLIP's text encoder, its keys behind any prefix (`text_encoder.`, `module.text_encoder.`,
      ...). A projection to another width than the teacher's, or none, starts at random.

  Returns:
    (model, variables, report): `variables` has only the text part in float32, enough for `get_text_features`.

  Raises:
    ValueError: see `student_config`. `CheckpointError`: an unknown source, or a file without a text encoder
      of this kind; `CheckpointMismatchError` lists tensors that do not fit.
  """
  config = student_config(student, teacher, profile=profile, context_length=context_length)
  model = Sam3LiteText(config)
  ids = jnp.zeros((1, min(4, config.text.max_position_embeddings)), jnp.int32)
  variables = jax.jit(lambda key: model.init(key, ids, method="get_text_features"))(jax.random.key(seed))
  source = os.fspath(init)
  if source == "random":
    flat = engine.flatten(variables)
    return model, variables, InitReport(f"random (seed {seed})", (), tuple(sorted(flat)))
  with renamed("source", "init"):
    loaded, notes = _load(source, model)
  variables, report = _fill(variables, loaded, source, notes, config)
  return model, variables, report


def _load(source: str, model: Sam3LiteText) -> tuple[dict[str, Any], list[str]]:
  """The leaves of the text part that a checkpoint has, flat."""
  found = sources.locate(source)
  if found.kind != "tensors":
    other, variables = from_pretrained(source if found.kind == "random" else found.path)
    if other.config.text.fused:
      raise CheckpointError(f"{source} holds folded RepMixer blocks, which cannot be trained on")
    return engine.flatten(text_part.text_variables(variables)), []
  with readers.open_tensors(found.path) as tensors:
    layout, keys = _text_layout(tensors, found.path, model.config.text.kind)
    chosen = {name: tensors[key] for name, key in keys.items()}
    assigned, problems = engine.assign(layout, {k: tuple(t.shape) for k, t in chosen.items()})
    if problems:
      raise CheckpointMismatchError(found.path, problems)
    target = {leaf: jax.ShapeDtypeStruct(s.shape, np.float32) for leaf, s in assigned.items()}
    leaves = engine.load_tensors(layout, chosen, target, where=found.path)
  notes = [] if layout.name != "mobileclip" else ["read as MobileCLIP's text encoder"]
  return leaves, notes


def _text_layout(keys: Mapping[str, Any], where: str, kind: str) -> tuple[Layout, dict[str, str]]:
  """The rules for a file's text encoder, and the name under them -> the key in the file."""
  mark = re.compile(r"(.*?)embedding_layer\.weight")
  prefixes = sorted({m[1] for key in keys if (m := mark.fullmatch(key))}, key=len)
  if prefixes and "language_backbone" not in prefixes[0]:
    base = tables.layout("original", "mobileclip")
    renamed = {_ENCODER + k[len(prefixes[0]) :]: k for k in keys if k.startswith(prefixes[0])}
    # The authors' own student files keep the projector beside the encoder.
    parent = re.sub(r"(encoder|text_encoder)\.$", "", prefixes[0])
    renamed |= {_PROJECTOR + n: f"{parent}projector.{n}" for n in ("weight", "bias")
                if f"{parent}projector.{n}" in keys}  # fmt: skip
    layout = dataclasses.replace(base, name="mobileclip")
  else:
    layout = tables.detect(keys, where)
    renamed = {key: key for key in keys}
  if layout.text_kind != kind:
    raise CheckpointError(
      f"{where} holds a text encoder of kind {layout.text_kind!r}, the student's is {kind!r}"
    )
  text = tuple(r for r in layout.rules if any("text_" in t.split("/")[1] for t in r.targets))
  patterns = [r.source_pattern for r in text]
  chosen = {n: k for n, k in renamed.items() if any(p.fullmatch(layout.canonical(n)) for p in patterns)}
  if not chosen:
    raise CheckpointError(f"{where} holds no text encoder that could start the student")
  return dataclasses.replace(layout, rules=text), chosen


def _fill(
  variables: Variables, loaded: Mapping[str, Any], source: str, notes: list[str], config: Sam3LiteTextConfig
) -> tuple[Variables, InitReport]:
  """Random variables overwritten with what was loaded; every leaf but `_OPTIONAL` must be there and fit."""
  flat, loaded, notes = engine.flatten(variables), dict(loaded), list(notes)
  if _TABLE in loaded:
    loaded[_TABLE] = _fit_table(loaded[_TABLE], flat[_TABLE].shape[0], config.profile, notes)
  for path in [p for p in loaded if _OPTIONAL.fullmatch(p)]:
    if path in flat and tuple(loaded[path].shape) != tuple(flat[path].shape):
      notes.append(f"{path.partition('/')[2]} of shape {list(loaded[path].shape)} was left out")
      del loaded[path]
  problems = engine.Problems(
    unexpected=[f"{p} {list(x.shape)}" for p, x in loaded.items() if p not in flat],
    missing=[
      f"{p} {list(x.shape)}" for p, x in flat.items() if p not in loaded and not _OPTIONAL.fullmatch(p)
    ],
    wrong_shape=[
      f"{p}: {list(x.shape)}, the student has {list(flat[p].shape)}"
      for p, x in loaded.items()
      if p in flat and tuple(x.shape) != tuple(flat[p].shape)
    ],
  )
  if problems:
    raise CheckpointMismatchError(f"init: {source}, as the start of this student,", problems)
  for path, value in loaded.items():
    flat[path] = jnp.array(value, jnp.float32)
  random = tuple(sorted(p for p in flat if p not in loaded))
  return engine.unflatten(flat), InitReport(source, tuple(sorted(loaded)), random, tuple(notes))


def _fit_table(table: Any, rows: int, profile: Profile, notes: list[str]) -> Any:
  """A position table with `rows` rows, as the profile's policy says."""
  have = table.shape[0]
  if have == rows:
    return table
  if profile.position_policy == "interpolate":
    notes.append(f"position table resampled from {have} to {rows} rows")
    return resize_rows(jnp.asarray(table), rows)
  if have < rows:
    return table  # reported as a wrong shape
  notes.append(f"position table cut from {have} to {rows} rows")
  return table[:rows]
