"""Loads and runs the compiled-ahead model in this folder: needs jax and numpy, and nothing of sam3lt_jax.

`sam3lt export` copies this file into every export as `loader.py`. manifest.json beside it tells all shapes,
names and thresholds.

    import loader
    model = loader.load("exported")
    maps = model.vision(loader.normalise(image)[None])       # image: uint8 [S, S, 3], RGB, see "preprocess"
    ids, mask = model.phrases("truck", "wheel")              # token ids kept at export, or your tokenizer's
    tokens = model.text(ids, mask)
    found = model.detection(maps, tokens, mask)
    keep = loader.scores(found) > model.manifest["score_threshold"]            # [P, Q]
    found["pred_boxes"][keep], found["pred_masks"][keep]     # xyxy in units of the image's sides; mask logits

`python loader.py` runs all three on a grey image and prints what comes out.
Axes: B images, P prompts, T tokens, N boxes, Q queries, S side in pixels, h, w rows and columns of a mask.
"""

import hashlib
import json
import os
import pathlib
import sys

import jax
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent


def load(directory=HERE, verify=True):
  """The model of an export's folder, as a `Model`.

  `verify` checks that the folder holds the files of the manifest, unchanged, and no other: those of vendor/,
  which is code that runs, as well.

  Raises:
    FileNotFoundError: a file of the export is missing.
    ValueError: a damaged file, one that is not of the export, or an export of another format.
  """
  directory = pathlib.Path(directory)
  manifest = read_manifest(directory)
  if verify:
    check_files(directory, manifest["files"])
  try:
    return Model(directory, manifest)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    raise ValueError(f"{directory}: its manifest does not fit its programs: {e!r}") from e


def read_manifest(directory):
  """manifest.json of an export's folder. Raises FileNotFoundError; ValueError: it is none of this format."""
  path = pathlib.Path(directory) / "manifest.json"
  try:
    manifest = json.loads(path.read_bytes())
    format = manifest.get("format")
  except (ValueError, AttributeError, RecursionError) as e:
    raise ValueError(f"{path} is damaged: it is no manifest of an export ({e})") from e
  if format != "sam3lt_jax.export/2":
    raise ValueError(f"format must be sam3lt_jax.export/2, got {format!r} in {directory}")
  try:
    listed, used = manifest["files"], [part["file"] for part in manifest["parts"].values()]
    sound = all(isinstance(file["sha256"], str) for file in listed.values())
    sound = sound and all(name in listed for name in [*used, "weights.safetensors"])
  except (AttributeError, KeyError, TypeError):
    sound = False
  if not sound:
    raise ValueError(f"{path} is damaged: files must have a sha256 each, those of the parts among them")
  return manifest


def files_in(directory):
  """Names of all files under an export's folder, "vendor/flatbuffers/table.py", but the manifest and what
  Python compiled; of vendor/ it is not read, see `Model`.
  """
  found = []
  for folder, _, names in os.walk(directory, followlinks=True):
    inside = pathlib.Path(folder).relative_to(directory)
    found += [(inside / name).as_posix() for name in names]
  return [n for n in found if n != "manifest.json" and "__pycache__" not in n.split("/")]


def check_files(directory, listed):
  """Raises FileNotFoundError, or ValueError for the first file that is not as `listed` in the manifest."""
  there = set(files_in(directory))
  if missing := sorted(set(listed) - there):
    raise FileNotFoundError(f"{directory / missing[0]} is in the manifest and not in the folder")
  if others := sorted(there - set(listed)):
    raise ValueError(f"{directory / others[0]} is not in the manifest, so not of this export: remove it")
  for name, file in listed.items():
    with open(directory / name, "rb") as f:
      if hashlib.file_digest(f, "sha256").hexdigest() != file["sha256"]:
        raise ValueError(f"{directory / name} is damaged: its SHA-256 is not the manifest's")


def read_safetensors(path):
  """Name -> array, mapped from the file: 8 bytes of length, JSON with the places, then the numbers."""
  with open(path, "rb") as f:
    length = int.from_bytes(f.read(8), "little")
    head = json.loads(f.read(length))
  head.pop("__metadata__", None)
  data = np.memmap(path, np.uint8, "r", offset=8 + length)
  kinds = {"F32": np.float32, "F16": np.float16, "BF16": jax.numpy.bfloat16, "I32": np.int32}
  return {
    name: data[slice(*t["data_offsets"])].view(np.dtype(kinds[t["dtype"]])).reshape(t["shape"])
    for name, t in head.items()
  }


class Model:
  """Three programs and their weights on the first device. Each new batch size compiles once."""

  def __init__(self, directory, manifest):
    # jax.export reads its files with flatbuffers; the export brings a copy for where it is not installed.
    sys.path.append(str(directory / "vendor"))
    # What was verified is compiled anew: what lies compiled beside it was not.
    before, sys.pycache_prefix = sys.pycache_prefix, os.devnull
    try:
      import flatbuffers  # noqa: F401
    finally:
      sys.pycache_prefix = before
    from jax import export

    self.manifest, self._parts = manifest, {}
    weights = {k: jax.device_put(v) for k, v in read_safetensors(directory / "weights.safetensors").items()}
    for name, part in manifest["parts"].items():
      program = export.deserialize(bytearray((directory / part["file"]).read_bytes()))
      self._parts[name] = jax.jit(program.call), {k: weights[k] for k in part["weights"]}

  def _run(self, name, *inputs):
    program, weights = self._parts[name]
    specs = self.manifest["parts"][name]["inputs"]
    return program(weights, *(jax.numpy.asarray(x, s["dtype"]) for x, s in zip(inputs, specs, strict=True)))

  def phrases(self, *phrases):
    """Token ids int32 [P, T] and mask bool [P, T] of phrases named at export; ValueError for others."""
    known = self.manifest["tokens"]["phrases"]
    if unknown := [phrase for phrase in phrases if phrase not in known]:
      raise ValueError(
        f"{', '.join(map(repr, unknown))}: the token ids of these phrases are not in this export, which has "
        f"{', '.join(map(repr, known)) or 'none'}; make them with a tokenizer (see 'tokens' in manifest.json)"
        " and give them to text(ids, mask), or export again with --phrases"
      )
    rows = [known[phrase] for phrase in phrases]
    return tuple(np.array([r[k] for r in rows], t) for k, t in (("ids", np.int32), ("mask", bool)))

  def vision(self, pixels):
    """float32 [B, S, S, 3] in [-1, 1] -> four feature maps, to be reused over many prompts."""
    return self._run("vision", pixels)

  def text(self, ids, mask):
    """int32 [P, T] and bool [P, T] -> tokens [P, T, D], to be reused over many images."""
    return self._run("text", ids, mask)

  def detection(self, maps, tokens, mask, boxes=None, labels=None, image_index=None):
    """What each prompt finds in its image.

    boxes float [P, N, 4] (centre x, centre y, width, height in units of the image's sides) and labels int
    [P, N] (1 like this, 0 not like this, -10 empty slot) are example boxes; image_index int [P] says which
    row of `maps` a prompt is for (default: row i for prompt i, or the only one). Returns a dictionary of
    float32: pred_logits [P, Q], presence_logits [P, 1], pred_boxes [P, Q, 4], pred_masks [P, Q, h, w] and
    semantic_seg [P, 1, h, w].
    """
    (images, prompts), slots = (len(maps[0]), len(tokens)), self.manifest["boxes"]
    if image_index is None and images not in (1, prompts):
      raise ValueError(f"{prompts} prompts for {images} images: pass image_index, one image number a prompt")
    index = np.arange(prompts) % images if image_index is None else np.asarray(image_index)
    if len(index) != prompts or not ((index >= 0) & (index < images)).all():
      raise ValueError(f"image_index must be {prompts} numbers from 0 to {images - 1}, got {index.tolist()}")
    boxes = np.zeros((prompts, 0, 4)) if boxes is None else np.asarray(boxes)
    labels = np.ones(boxes.shape[:2]) if labels is None else np.asarray(labels)
    if boxes.shape[1] > slots:
      raise ValueError(f"boxes: this export has {slots} slots a prompt, got {boxes.shape[1]} boxes")
    empty = ((0, 0), (0, slots - boxes.shape[1]))
    pair = (np.pad(boxes, (*empty, (0, 0))), np.pad(labels, empty, constant_values=-10)) if slots else ()
    return self._run("detection", *maps, tokens, mask, index, *pair)


def normalise(image):
  """uint8 of any shape to float32 in [-1, 1]."""
  return (np.asarray(image, np.float32) / 255 - 0.5) / 0.5


def scores(found):
  """float32 [P, Q] in [0, 1]: sigmoid(pred_logits) * sigmoid(presence_logits)."""
  sigmoid = [1 / (1 + np.exp(-np.asarray(found[k], np.float64))) for k in ("pred_logits", "presence_logits")]
  return (sigmoid[0] * sigmoid[1]).astype(np.float32)


def main():
  model = load()
  b, p, side = (model.manifest[k] for k in ("batch", "prompts", "image_size"))
  b, p, length = (1 if n == "symbolic" else n for n in (b, p, model.manifest["tokens"]["context_length"]))
  maps = model.vision(np.zeros((b, side, side, 3)))
  tokens = model.text(np.zeros((p, length)), np.ones((p, length)))
  found = model.detection(maps, tokens, np.ones((p, length)), image_index=np.arange(p) % b)
  for name, x in {"tokens": tokens, **found}.items():
    print(f"{name:<16} {x.dtype} {list(x.shape)}")


if __name__ == "__main__":
  main()
