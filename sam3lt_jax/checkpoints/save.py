"""`save_pretrained`: a model as a directory, of our own format or of transformers'."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax

from sam3lt_jax import config_schema, storage
from sam3lt_jax.checkpoints import engine, orbax_io, tables
from sam3lt_jax.checkpoints.errors import CheckpointError
from sam3lt_jax.checkpoints.pretrained import abstract_leaves
from sam3lt_jax.checkpoints.readers import SAFETENSORS_INDEX_NAME
from sam3lt_jax.checkpoints.tracker import FOLDER, tracker_leaves
from sam3lt_jax.config import Profile, Sam3LiteTextConfig, TextConfig
from sam3lt_jax.errors import warn

if TYPE_CHECKING:
  from sam3lt_jax.model import Sam3LiteText, Variables
  from sam3lt_jax.tracker import Sam3Tracker

FORMATS = ("orbax", "transformers")
_TOKENIZER_FILES = (
  "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
)  # fmt: skip
_CLIP_VOCABULARY = 49408
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


class OtherRules(UserWarning):
  """A model saved for transformers, which will run it by other rules than its own."""


# Of a profile, what decides what is found, and is no field of transformers' configuration.
_DECIDING = ("pad_token_id", "context_length", "mask_text_padding", "position_policy", "geometry_cls")


def transformers_note(config: Sam3LiteTextConfig) -> str | None:
  """One sentence about what `Sam3LiteTextModel` of transformers does otherwise than a model of `config`, and
  what to do; None where both find the same.
  """
  here, there = config.profile, Profile.transformers()
  apart = [name for name in _DECIDING if getattr(here, name) != getattr(there, name)]
  same = {
    "pad_token_id": config.text.vocab_size != TextConfig().vocab_size,  # an id of its tokenizer's, not CLIP's
    "position_policy": config.text.max_position_embeddings == there.context_length,  # nothing to resample
    "geometry_cls": here.geometry_cls == "with_any_boxes",
  }
  apart = [name for name in apart if not same.get(name)]
  if not apart:
    return None
  differences = ", ".join(f"{n} {getattr(here, n)!r} and not {getattr(there, n)!r}" for n in apart)
  return (
    f"transformers will find other things with these weights, or nothing: their profile {here.name!r} has"
    f" {differences}; train them on under transformers' rules (sam3lt finetune --profile transformers) before"
    " you take them there"
  )


def save_pretrained(
  directory: str | os.PathLike,
  model: Sam3LiteText,
  variables: Variables,
  *,
  format: Literal["orbax", "transformers"] = "orbax",
  tracker: tuple[Sam3Tracker, Variables] | None = None,
  tokenizer: Any = None,
  max_shard_size: int | str = "5GB",
  overwrite: bool = False,
) -> None:
  """Writes a checkpoint that `from_pretrained` loads, in one piece: a crash leaves no half of one.

  All is written to a hidden directory beside the target and then renamed. Under several processes all of them
  call it with the same arguments, as Orbax wants it, and the first one writes.

  Args:
    directory: the target on a local disk. Made where it does not exist.
    model: its `config`, profile included, is saved along.
    variables: exactly the variables of `model`, of any floating dtype, which is kept.
    format: "orbax" (ours: `config.json`, the variables, and their checksums in `checkpoint.json`) or
      "transformers", which `Sam3LiteTextModel` or, for SAM 3's text tower, `Sam3Model` loads, with processor
      and tokenizer files. Those run it by transformers' rules, whatever its profile: where that decides what
      is found, the warning `OtherRules` says so (see `transformers_note`). BatchNorm's count of batches,
      which nothing reads, is written as 0.
    tracker: (tracker, its variables), to go with the model. For "transformers" the directory is then one of
      `Sam3VideoModel`, which `Sam3TrackerModel` and `Sam3TrackerVideoModel` load as well.
    tokenizer: where the tokenizer files come from: a directory that has them, a `tokenizer.json`, or an
      object with `save(path)`. Default: the configuration's own, of a pruned model; for "transformers" and
      CLIP's vocabulary the bundled one, else none.
    max_shard_size: bytes, or like "500MB": the weights of "transformers" are split beyond it.
    overwrite: replace a directory that is not empty.

  Raises:
    CheckpointError: (ValueError) the target is not empty or no directory, fused blocks or a tracker without
      its memory for "transformers", or the disk is full: what stood at the target stays, and nothing of the
      save takes up room.
    CheckpointMismatchError: `variables` are not those of `model`; lists every leaf.
    ValueError: another `format` or an unreadable `max_shard_size`.
  """
  if format not in FORMATS:
    raise ValueError(f"format must be one of {', '.join(map(repr, FORMATS))}, got {format!r}")
  limit = _shard_bytes(max_shard_size)
  if format == "transformers" and model.config.text.fused:
    raise CheckpointError(
      "format='transformers' has no place for fused RepMixer blocks (config.text.fused); save the unfused "
      "model"
    )
  if format == "transformers" and tracker is not None and tracker[0].config.memory is None:
    raise CheckpointError(
      "format='transformers' keeps a detector beside a whole tracker; this one is of images alone "
      "(config.memory is None)"
    )
  target = _target(directory, overwrite)
  if format == "transformers" and (note := transformers_note(model.config)):
    warn(f"{target}: {note}", OtherRules)
  leaves = engine.flatten(variables)
  orbax_io.compare(leaves, abstract_leaves(model), "variables")
  if tracker is not None:
    width = model.config.vision.hidden_size
    orbax_io.compare(engine.flatten(tracker[1]), tracker_leaves(tracker[0], width), "tracker")
  parent, name = os.path.split(target)
  several, leads = jax.process_count() > 1, jax.process_index() == 0
  mark = "all" if several else uuid.uuid4().hex[:8]  # all processes have to name the same directory
  unfinished = os.path.join(parent, f".{name}.saving-{mark}")
  if leads:
    if several:
      shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
  orbax_io.barrier("sam3lt-save")  # all have looked at the target, and the directory is there
  try:
    with storage.writing(target, "make room and save again", CheckpointError):
      if format == "orbax":
        _save_orbax(unfinished, variables, model.config.to_json(), leads)
        if tracker is not None:
          sizes = config_schema.tracker_to_schema(tracker[0].config, model.config)
          _save_orbax(os.path.join(unfinished, FOLDER), tracker[1], sizes, leads)
      if leads:
        if format == "transformers":
          write_transformers(unfinished, model.config, leaves, limit, tracker)
        _write_tokenizer(unfinished, tokenizer, model.config, bundled=format == "transformers")
        _publish(unfinished, target)
  except BaseException:
    if leads:
      storage.remove(parent, os.path.basename(unfinished))
    raise


def _save_orbax(directory: str, variables: Variables, sizes: Mapping[str, Any], leads: bool) -> None:
  if leads:
    os.makedirs(directory, exist_ok=True)
  orbax_io.barrier(f"sam3lt-save-{os.path.basename(directory)}")
  orbax_io.save(directory, variables)
  if leads:
    orbax_io.write_manifest(directory, orbax_io.VARIABLES, {})
    _write_json(os.path.join(directory, "config.json"), sizes)


def _target(directory: str | os.PathLike, overwrite: bool) -> str:
  name = os.path.expanduser(os.fspath(directory))
  if "://" in name:
    raise CheckpointError(f"directory: {name!r} is an address; save to a local directory and copy that")
  path = os.path.abspath(name)
  if os.path.exists(path) and not os.path.isdir(path):
    raise CheckpointError(f"directory: {name} exists and is no directory")
  if os.path.isdir(path) and os.listdir(path) and not overwrite:
    raise CheckpointError(f"directory: {name} is not empty; pass overwrite=True to replace it as a whole")
  return path


def _publish(unfinished: str, target: str) -> None:
  """Renames the finished directory to its name; what stood there is moved aside first, then deleted."""
  aside = None
  if os.path.isdir(target):
    aside = f"{unfinished}.replaced"
    os.rename(target, aside)
  try:
    os.rename(unfinished, target)
  except OSError:
    if aside is not None:
      os.rename(aside, target)
    raise
  if aside is not None:
    shutil.rmtree(aside)


def write_transformers(
  directory: str,
  config: Sam3LiteTextConfig,
  leaves: Mapping[str, Any],
  max_shard_bytes: int,
  tracker: tuple[Sam3Tracker, Variables] | None = None,
) -> None:
  """Configuration, processor and weights as transformers keeps them, into an existing directory."""
  layout = tables.layout("transformers", config.text.kind)
  sizes = config.to_json()
  if tracker is not None:
    layout = dataclasses.replace(layout, prefix="detector_model.")
    sizes = {
      "model_type": "sam3_video",
      "architectures": ["Sam3VideoModel"],
      "low_res_mask_size": 4 * (config.vision.image_size // config.vision.patch_size),
      "detector_config": sizes,
      "tracker_config": config_schema.tracker_to_schema(tracker[0].config, config),
    }
  entries = engine.export_tensors(layout, leaves)
  if tracker is not None:
    of_tracker = tables.tracker_layout("transformers")
    entries |= engine.export_tensors(of_tracker, engine.flatten(tracker[1]), where="the tracker")
  dtypes = {e.dtype.name for e in entries.values() if engine.is_floating(e.dtype)}
  # What from_pretrained(dtype="auto") gives its parameters. BatchNorm statistics stay float32 in any case.
  dtype = next((name for name in ("bfloat16", "float16") if name in dtypes), "float32")
  _write_json(os.path.join(directory, "config.json"), sizes | {"dtype": dtype})
  _write_processor(directory, config)
  _write_shards(directory, entries, max_shard_bytes)


def _write_shards(directory: str, entries: Mapping[str, engine.Entry], limit: int) -> None:
  from huggingface_hub import split_state_dict_into_shards_factory
  from safetensors.numpy import save_file

  split = split_state_dict_into_shards_factory(
    dict(entries),
    get_storage_size=lambda entry: entry.nbytes,
    filename_pattern="model{suffix}.safetensors",
    max_shard_size=limit,
  )
  for name, keys in split.filename_to_tensors.items():
    file = os.path.join(directory, name)
    save_file({key: entries[key].build() for key in keys}, file, metadata={"format": "pt"})
    shutil.copymode(os.path.join(directory, "config.json"), file)  # safetensors writes for the owner alone
  if split.is_sharded:
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    _write_json(os.path.join(directory, SAFETENSORS_INDEX_NAME), index)


def _shard_bytes(size: int | str) -> int:
  match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?)B?", str(size).strip().upper())
  count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
  if count < 1:
    raise ValueError(f"max_shard_size must be bytes or like '500MB' or '5GB', got {size!r}")
  return count


def _write_processor(directory: str, config: Sam3LiteTextConfig) -> None:
  """What `Sam3Processor.save_pretrained` of transformers 5.23.0 writes, and the image part for older ones."""
  side = config.vision.image_size
  masks = 4 * (side // config.vision.patch_size)
  image = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Sam3ImageProcessor",
    "mask_size": {"height": masks, "width": masks},
    "resample": 2,  # bilinear
    "rescale_factor": 1 / 255,
    "size": {"height": side, "width": side},
  }
  named = {"processor_class": "Sam3Processor"}
  processor = named | {"image_processor": image, "point_pad_value": -10, "target_size": side}
  _write_json(os.path.join(directory, "processor_config.json"), processor)
  _write_json(os.path.join(directory, "preprocessor_config.json"), image | named)


def _write_tokenizer(directory: str, tokenizer: Any, config: Sam3LiteTextConfig, *, bundled: bool) -> None:
  file = os.path.join(directory, "tokenizer.json")
  if tokenizer is None and config.tokenizer is not None:
    with open(file, "w", encoding="utf-8") as f:
      f.write(config.tokenizer)
  elif tokenizer is None:
    if not bundled or config.text.vocab_size != _CLIP_VOCABULARY:
      return  # a table of other ids would only mislead
    from sam3lt_jax.processing.tokenizer import ClipTokenizer

    ClipTokenizer(profile="transformers").save(file)
  elif hasattr(tokenizer, "save"):
    tokenizer.save(file)
  else:
    source = os.path.expanduser(os.fspath(tokenizer))
    if os.path.isdir(source):
      files = {os.path.join(source, n): os.path.join(directory, n) for n in _TOKENIZER_FILES}
    else:
      files = {source: file}
    found = [name for name in files if os.path.isfile(name)]
    if not found:
      raise CheckpointError(f"tokenizer: {source} has no tokenizer files ({', '.join(_TOKENIZER_FILES)})")
    for name in found:
      shutil.copyfile(name, files[name])
  settings = os.path.join(directory, "tokenizer_config.json")
  if not os.path.exists(settings):
    _write_json(settings, _TOKENIZER_CONFIG)


_TOKENIZER_CONFIG = {
  "backend": "tokenizers",
  "bos_token": "<|startoftext|>",
  "eos_token": "<|endoftext|>",
  "model_max_length": 32,
  "pad_token": "<|endoftext|>",
  "processor_class": "Sam3Processor",
  "tokenizer_class": "CLIPTokenizer",
  "unk_token": "<|endoftext|>",
}


def _write_json(path: str, data: Mapping[str, Any]) -> None:
  with open(path, "w", encoding="utf-8") as f:
    json.dump(data, f, indent=2, sort_keys=True)
    f.write("\n")
