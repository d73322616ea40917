"""`sam3lt info`: what a model is made of."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from sam3lt_jax.cli.arguments import RANDOM
from sam3lt_jax.cli.progress import busy

if TYPE_CHECKING:
  from sam3lt_jax.config import Sam3LiteTextConfig

SAM3_TEXT_PARAMETERS = 353_724_672  # CLIP text tower, its two projections; a test counts it again
_VARIANTS = ("s0", "s1", "l", "sam3")
_EPILOG = """\
examples:
  the smallest released variant, without downloading it:
    sam3lt info s0
  a checkpoint on disk, as transformers would run it:
    sam3lt info path/to/model --profile transformers
  one number, in a script:
    sam3lt info l --json | jq '.parts["text encoder"].parameters'
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.epilog = _EPILOG
  add = parser.add_argument
  add("model", metavar="MODEL", help="s0, s1, l, sam3, shapes; a hub id, a folder, or a .pt file")
  add("--profile", choices=("original", "transformers"),
      help="the profile to show (default: the checkpoint's own)")  # fmt: skip
  add("--json", action="store_true", help="print JSON instead of the table")


def run(args: argparse.Namespace) -> int:
  report = describe(args.model, args.profile)
  print(json.dumps(report) if args.json else format_report(report))
  return 0


def describe(source: str, profile: str | None = None) -> dict[str, Any]:
  """Everything `sam3lt info` tells, as plain values: model, source, profile, parts, total, files."""
  from sam3lt_jax.checkpoints import parameter_summary

  config, variables, where = _open(source, profile)
  *parts, total = [
    (size.name, {"parameters": size.parameters, "bytes": size.bytes}) for size in parameter_summary(variables)
  ]
  return {
    "model": source,
    "source": where,
    "text_kind": config.text.kind,
    "image_size": config.vision.image_size,
    "profile": dataclasses.asdict(config.profile),
    "parts": dict(parts),
    "total": total[1],
    "sam3_text_parameters": SAM3_TEXT_PARAMETERS,
    "files": _files(source),
  }


def _open(source: str, profile: str | None) -> tuple[Sam3LiteTextConfig, dict[str, Any], str]:
  """(config, the variables' shapes, where those were read); no weights are."""
  from sam3lt_jax.checkpoints.engine import unflatten
  from sam3lt_jax.checkpoints.pretrained import build, open_checkpoint
  from sam3lt_jax.config import Sam3LiteTextConfig

  with busy(f"counting the parameters of {source}"):
    if os.path.isfile(os.path.join(source, "config.json")):
      config = Sam3LiteTextConfig.from_json(source, profile)
      _, leaves = build(config, "float32", "float32")
      return config, unflatten(leaves), "its config.json; the weights were not read"
    built_in = source in _VARIANTS and not os.path.exists(source)
    opened = open_checkpoint(RANDOM + source if built_in else source, profile=profile)
  where = "built-in configuration; nothing was downloaded" if opened.random else "the shapes of its weights"
  return opened.model.config, opened.shapes, where


def _files(source: str) -> list[dict[str, Any]]:
  """Weight files of a checkpoint on disk: name, bytes and, for safetensors, number of tensors by dtype."""
  if os.path.isfile(source):
    return [{"name": os.path.basename(source), "bytes": os.path.getsize(source)}]
  if not os.path.isdir(source):
    return []
  files = []
  for name in sorted(os.listdir(source)):
    path = os.path.join(source, name)
    if os.path.isfile(path) and name.endswith((".safetensors", ".pt", ".pth", ".bin")):
      entry = {"name": name, "bytes": os.path.getsize(path)}
      if name.endswith(".safetensors"):
        entry["tensors"] = _safetensors_dtypes(path)
      files.append(entry)
  if not files:  # Orbax: folders of many small files
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, names in os.walk(source) for f in names)
    files.append({"name": ".", "bytes": size})
  return files


def _safetensors_dtypes(path: str) -> dict[str, int]:
  """Tensors by dtype, from the file's head alone."""
  import safetensors

  try:
    with safetensors.safe_open(path, "numpy") as f:
      return dict(collections.Counter(f.get_slice(name).get_dtype() for name in f.keys()))
  except safetensors.SafetensorError as e:
    raise ValueError(f"{path} is not a safetensors file, or is damaged: {e}") from None


def format_report(report: dict[str, Any]) -> str:
  lines = [f"{report['model']}  ({report['source']})", ""]
  lines.append(f"{'part':<18} {'parameters':>13} {'float32':>11} {'bfloat16':>11}")
  rows = [*report["parts"].items(), ("total", report["total"])]
  for name, part in rows:
    if name == "total":
      lines.append("-" * len(lines[-1]))
    n = part["parameters"]
    lines.append(f"{name:<18} {n:>13,} {_mb(4 * n):>11} {_mb(2 * n):>11}")
  text = report["parts"]["text encoder"]["parameters"]
  sam3 = report["sam3_text_parameters"]
  lines += [
    "",
    f"text encoder: {text / 1e6:.2f}M parameters, {100 * text / sam3:.1f}% of SAM3's {sam3 / 1e6:.2f}M",
    f"image: {report['image_size']} x {report['image_size']} pixels",
  ]
  for file in report["files"]:
    tensors = ", ".join(f"{count} x {dtype}" for dtype, count in file.get("tensors", {}).items())
    lines.append(f"file: {file['name']}  {_mb(file['bytes'])}{'  ' + tensors if tensors else ''}")
  return "\n".join([*lines, "", *_profile_lines(report["profile"])])


def _profile_lines(profile: dict[str, Any]) -> list[str]:
  """Every field, and beside it what the other reference does where that differs."""
  from sam3lt_jax.config import Profile

  name = profile["name"]
  other = Profile.named("transformers" if name == "original" else "original")
  lines = [f"{'profile: ' + name:<33}({other.name}, where it differs)"]
  for key, value in profile.items():
    if key != "name":
      theirs = getattr(other, key)
      lines.append(f"  {key:<22} {value!s:<22}" + ("" if theirs == value else f" ({theirs})"))
  return [line.rstrip() for line in lines]


def _mb(size: int) -> str:
  return f"{size / 1e6:,.1f} MB"
