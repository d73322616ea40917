"""Compiled-ahead programs for serving: StableHLO by `jax.export`, weights beside it, and a loader without us.

Three parts, so that an image and a phrase are encoded once and combined many times:

    vision     pixels [B, S, S, 3]                                    -> four maps [B, h, w, D]
    text       ids [P, T], mask [P, T]                                -> tokens [P, T, D]
    detection  maps, tokens, mask, image_index [P], boxes, labels     -> logits, boxes, masks

The folder holds vision.jaxexport, text.jaxexport, detection.jaxexport, weights.safetensors, tokenizer.json,
manifest.json, loader.py and vendor/ (flatbuffers, which jax.export reads its files with). What a later jax
accepts is jax.export's promise: files stay readable for at least six months.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax import __version__, export_loader
from sam3lt_jax.checkpoints import engine
from sam3lt_jax.config import PADDING_LABEL
from sam3lt_jax.engine import read
from sam3lt_jax.errors import needed
from sam3lt_jax.features import Prompts, VisionFeatures
from sam3lt_jax.model import Sam3LiteText
from sam3lt_jax.ops import target

if TYPE_CHECKING:
  from sam3lt_jax.predictor import Predictor

FORMAT = "sam3lt_jax.export/2"
PLATFORMS = ("cpu", "cuda", "tpu", "rocm")
SYMBOLIC = "symbolic"
OUTPUTS = ("pred_logits", "presence_logits", "pred_boxes", "pred_masks", "semantic_seg")
Count = int | Literal["symbolic"]


@dataclasses.dataclass(frozen=True)
class Part:
  """One exported program.

  Attributes:
    program: `jax.export.Exported`, called as `program.call(weights, *inputs)` with `weights` a flat
      dictionary of the names below.
    weights: leaf paths it reads, "params/...".
    inputs: name -> abstract array, in order. A symbolic axis is "b" (images) or "p" (prompts).
    outputs: name -> abstract array; a tuple of four for "vision", one array for "text", a dictionary for
      "detection".
  """

  program: jax.export.Exported
  weights: tuple[str, ...]
  inputs: dict[str, Any]
  outputs: dict[str, Any]


def export_parts(
  model: Sam3LiteText,
  variables: Mapping[str, Any],
  *,
  image_size: int | None = None,
  platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
  batch: Count = SYMBOLIC,
  prompts: Count = SYMBOLIC,
  boxes: int = 8,
) -> dict[str, Part]:
  """The model as three programs; nothing is computed, and no device but this process's CPU is needed.

  Args:
    model, variables: as they are to run (see `Sam3LiteText.fuse`); of the variables only shapes are read.
    image_size: side of the input in pixels; default: the configuration's.
    platforms: what the programs run on, any of `PLATFORMS`.
    batch, prompts: images and prompts of a call, a number or "symbolic" for any. A program of fixed numbers
      knows all its shapes; a symbolic one is compiled again for each number it meets.
    boxes: slots for example boxes a prompt; 0 leaves box inputs out (as phrases alone need it where
      `Profile.geometry_cls` is "with_any_boxes").

  Returns:
    "vision", "text" and "detection".

  Raises:
    ValueError: an unknown platform, or a number that is none.
  """
  if not platforms or any(p not in PLATFORMS for p in platforms) or len(set(platforms)) < len(platforms):
    raise ValueError(f"platforms must be some of {', '.join(PLATFORMS)}, each once, got {list(platforms)}")
  for name, value, least in (("batch", batch, 1), ("prompts", prompts, 1), ("boxes", boxes, 0)):
    if value == SYMBOLIC and name != "boxes":
      continue
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      accepted = f"a whole number from {least}" + ("" if name == "boxes" else f", or {SYMBOLIC!r}")
      raise ValueError(f"{name} must be {accepted}, got {value!r}")
  config, shape = model.config, jax.ShapeDtypeStruct
  S, T = image_size or config.vision.image_size, config.profile.context_length
  weights = {k: shape(v.shape, v.dtype) for k, v in engine.flatten(variables).items()}

  def vision(w, pixels):
    features = model.apply(engine.unflatten(w), pixels, method="get_vision_features")
    return features.image, features.mixed, *features.convolved

  def text(w, ids, mask):
    return read(model, engine.unflatten(w), ids, mask)

  def detection(w, image, mixed, *rest):
    *convolved, tokens, mask, index = rest[:5]
    P = mask.shape[0]
    empty = jnp.zeros((P, 0, 4)), jnp.zeros((P, 0), jnp.int32)
    prompts = Prompts(tokens, mask, *(rest[5:] or empty), index)
    vision = VisionFeatures(image, mixed, tuple(convolved))
    out = model.apply(engine.unflatten(w), vision, prompts, method="detect")
    return {name: getattr(out, name) for name in OUTPUTS}

  def text_inputs(B, P):
    return {"ids": shape((P, T), jnp.int32), "mask": shape((P, T), jnp.bool_)}

  def vision_inputs(B, P):
    return {"pixels": shape((B, S, S, config.vision.num_channels), jnp.float32)}

  maps = jax.eval_shape(vision, weights, *vision_inputs(1, 1).values())
  tokens = jax.eval_shape(text, weights, *text_inputs(1, 1).values())

  def detection_inputs(B, P):
    examples = {"boxes": shape((P, boxes, 4), jnp.float32), "labels": shape((P, boxes), jnp.int32)}
    return {
      **{f"map_{i}": shape((B, *m.shape[1:]), m.dtype) for i, m in enumerate(maps)},
      "tokens": shape((P, *tokens.shape[1:]), tokens.dtype),
      "mask": shape((P, T), jnp.bool_),
      "image_index": shape((P,), jnp.int32),
      **(examples if boxes else {}),
    }

  b, p = jax.export.symbolic_shape("b, p")  # of one scope
  counts = (b if batch == SYMBOLIC else batch), (p if prompts == SYMBOLIC else prompts)
  return {
    f.__name__: _export(f, weights, inputs, counts, platforms)
    for f, inputs in ((vision, vision_inputs), (text, text_inputs), (detection, detection_inputs))
  }


def _export(
  function: Callable, weights: Mapping[str, Any], inputs: Callable, counts: tuple, platforms: Sequence[str]
) -> Part:
  # With a symbolic axis jax keeps every argument; without one it tells which weights are read.
  probe = jax.export.export(jax.jit(function))(weights, *inputs(1, 1).values())
  names = sorted(weights)  # the order in which jax flattens a dictionary
  read = tuple(names[i] for i in probe.module_kept_var_idx if i < len(names))
  given = inputs(*counts)

  def serve(w, *inputs):
    # Some layers look up a parameter that they do not use; nothing of it reaches the program.
    unread = {k: jnp.zeros(v.shape, v.dtype) for k, v in weights.items() if k not in w}
    return function(unread | w, *inputs)

  with target.traced_for(platforms):
    program = jax.export.export(jax.jit(serve), platforms=tuple(platforms))(
      {k: weights[k] for k in read}, *given.values()
    )
  outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
  if isinstance(outputs, tuple):
    outputs = {f"map_{i}": x for i, x in enumerate(outputs)}
  return Part(program, read, given, outputs if isinstance(outputs, dict) else {"tokens": outputs})


def export_model(
  predictor: Predictor,
  directory: str | os.PathLike,
  *,
  platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
  batch: Count = SYMBOLIC,
  prompts: Count = SYMBOLIC,
  boxes: int = 8,
  phrases: Sequence[str] = (),
  name: str = "",
) -> dict[str, Any]:
  """Writes `predictor`'s model as a folder that `loader.py`, written into it, runs without this package.

  All is written beside `directory` and then renamed, so that a crash leaves no half of an export.

  Args:
    predictor: its model, variables, image size and tokenizer are what is exported.
    directory: a folder that is empty or does not exist.
    platforms, batch, prompts, boxes: see `export_parts`.
    phrases: their token ids go into the manifest, so that the reader needs no tokenizer for them.
    name: what the manifest calls the model.

  Returns:
    The manifest.

  Raises:
    ValueError: as `export_parts`, or a folder that is not empty.
    ImportError: flatbuffers is not installed (`pip install 'sam3lt_jax[jobs]'`).
    OSError: the folder cannot be written.
  """
  with needed("exported programs need", "flatbuffers", "jobs"):
    import flatbuffers
  target = os.path.abspath(os.path.expanduser(os.fspath(directory)))
  if os.path.exists(target) and (not os.path.isdir(target) or os.listdir(target)):
    raise ValueError(f"directory must be new or empty, got {os.fspath(directory)}")
  tokens = _tokens(predictor, phrases)
  model, variables, side = predictor.model, predictor.variables, predictor.processor.image_size
  options = {"platforms": list(platforms), "batch": batch, "prompts": prompts, "boxes": boxes}
  parts = export_parts(model, variables, image_size=side, **options)
  unfinished = f"{target}.saving-{uuid.uuid4().hex[:8]}"
  os.makedirs(unfinished)
  try:
    for part, content in parts.items():
      with open(os.path.join(unfinished, f"{part}.jaxexport"), "wb") as f:
        f.write(content.program.serialize())
    _write_weights(unfinished, variables, parts)
    predictor.processor.tokenizer.save(os.path.join(unfinished, "tokenizer.json"))
    shutil.copyfile(export_loader.__file__, os.path.join(unfinished, "loader.py"))
    _copy_flatbuffers(flatbuffers, os.path.join(unfinished, "vendor"))
    digests = {n: _digest(os.path.join(unfinished, n)) for n in sorted(export_loader.files_in(unfinished))}
    manifest = _manifest(predictor, parts, options, tokens, digests, name)
    with open(os.path.join(unfinished, "manifest.json"), "w", encoding="utf-8") as f:
      json.dump(manifest, f, indent=1)
      f.write("\n")
    os.replace(unfinished, target)  # an empty folder may stand there
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
  return manifest


def _copy_flatbuffers(package, folder: str) -> None:
  """The pure-Python package, unchanged and with its licence, so that the reader needs jax and numpy only."""
  source = os.path.dirname(package.__file__)
  ignore = shutil.ignore_patterns("__pycache__")
  shutil.copytree(source, os.path.join(folder, "flatbuffers"), ignore=ignore)
  version = importlib.metadata.version("flatbuffers")
  with open(os.path.join(folder, "NOTICE"), "w", encoding="utf-8") as f:
    f.write(
      f"flatbuffers {version} (https://github.com/google/flatbuffers), unchanged. Copyright Google Inc.\n"
      "Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0\n"
    )


def _write_weights(folder: str, variables: Mapping[str, Any], parts: Mapping[str, Part]) -> None:
  from safetensors.numpy import save_file

  leaves = engine.flatten(variables)
  names = sorted({n for part in parts.values() for n in part.weights})
  arrays = {n: np.ascontiguousarray(leaves[n]) for n in names}
  save_file(arrays, file := os.path.join(folder, "weights.safetensors"))
  shutil.copymode(os.path.join(folder, "vision.jaxexport"), file)  # safetensors writes for the owner alone


def _digest(path: str) -> dict[str, Any]:
  with open(path, "rb") as f:
    digest = hashlib.file_digest(f, "sha256").hexdigest()
  return {"bytes": os.path.getsize(path), "sha256": digest}


def _tokens(predictor: Predictor, phrases: Sequence[str]) -> dict[str, Any]:
  """How phrases become ids, and those of `phrases`."""
  profile, tokenizer = predictor.processor.profile, predictor.processor.tokenizer
  rows = {}
  if phrases:
    inputs = predictor.processor(text=list(phrases))
    for phrase, ids, mask in zip(phrases, inputs["input_ids"], inputs["attention_mask"]):
      rows[phrase] = {"ids": ids.tolist(), "mask": mask.tolist()}
  return {
    "tokenizer": "tokenizer.json (package tokenizers), CLIP's byte-pair encoding",
    "cleaning": profile.text_cleaning,
    "context_length": profile.context_length,
    "start": tokenizer.sot_token_id,
    "end": tokenizer.eot_token_id,
    "padding": profile.pad_token_id,
    "phrases": rows,
  }


def _manifest(predictor, parts, options, tokens, digests, name: str) -> dict[str, Any]:
  config, side = predictor.model.config, predictor.processor.image_size
  profile = config.profile
  program = parts["vision"].program
  return {
    "format": FORMAT,
    "model": name,
    "config": config.to_json(),
    "profile": dataclasses.asdict(profile),
    "image_size": side,
    "dtype": jnp.dtype(predictor.model.dtype).name,
    "matmul_precision": jax.config.jax_default_matmul_precision or "default",
    "score_threshold": profile.score_threshold,
    "mask_threshold": 0.5,
    **options,
    "parts": {
      part: {
        "file": f"{part}.jaxexport",
        "inputs": _specs(content.inputs),
        "outputs": _specs(content.outputs),
        "weights": list(content.weights),
      }
      for part, content in parts.items()
    },
    "tokens": tokens,
    "preprocess": {
      "image": "RGB, upright; transparency over white",
      "resize": f"to {side} x {side} pixels, aspect ratio not kept: bilinear with antialiasing on 8 bits, "
      "width first, then height (Pillow's Image.resize with BILINEAR, one side at a time)",
      "values": "(x / 255 - 0.5) / 0.5, float32, axes [image, row, column, channel]",
    },
    "postprocess": {
      "score": "sigmoid(pred_logits) * sigmoid(presence_logits); keep those above score_threshold",
      "boxes": "pred_boxes are (x1, y1, x2, y2) in units of the image's sides, not clipped",
      "masks": f"{profile.mask_order.replace('_', ' ')} to the image's size, bilinear with half-pixel "
      "centres; a pixel belongs to the object above mask_threshold",
      "empty_box_slot": PADDING_LABEL,
    },
    "versions": {
      "sam3lt_jax": __version__,
      "jax": jax.__version__,
      "jaxlib": importlib.metadata.version("jaxlib"),
      "calling_convention": program.calling_convention_version,
    },
    "files": digests,
  }


def _specs(arrays: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Symbolic sizes by their names."""
  return [
    {"name": n, "shape": [d if isinstance(d, int) else str(d) for d in a.shape], "dtype": a.dtype.name}
    for n, a in arrays.items()
  ]
