"""Runs a checkpoint in the PyTorch reference (transformers) and here, and compares stage by stage.

  python -m convert.verify s0 --image photo.jpg --text "a truck" --box 80,120,400,380
  python -m convert.verify --random s0          # the released size with random weights, nothing to download

Both get the same pixels and token ids, in float32, under the transformers profile (the only one that the
reference can run). Exit code 0: every stage is within its tolerance; 1: one is not; 2: a mistake in the call.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import convert
from convert import torch_reference

# Largest absolute difference in float32 at values of order 1 to 15, by the beginning of a stage's name; for
# larger values it grows in proportion. At full size (S0, random) all are under half of these.
TOLERANCES = {
  "vit_block": 5e-5,
  "neck": 1e-4,
  "text": 2e-5,
  "prompt": 5e-5,
  "encoder_output": 1e-4,
  "decoder_hidden_states": 1e-4,
  "decoder_boxes": 1e-5,
  "decoder_logits": 1e-4,
  "decoder_presence_logits": 1e-4,
  "pixel_embed": 5e-5,
  "pred_masks": 5e-4,
  "pred_boxes": 1e-5,
  "pred_logits": 1e-4,
  "presence_logits": 1e-4,
  "semantic_seg": 5e-4,
}
_RANGE = 15.0
_SCORE = 0.3


@dataclasses.dataclass(frozen=True)
class Row:
  """One stage, compared. `difference` is the largest absolute one, NaN where shapes differ."""

  name: str
  shape: tuple[int, ...]
  low: float
  high: float
  difference: float
  mean: float
  tolerance: float

  @property
  def ok(self) -> bool:
    return self.difference <= self.tolerance  # False for NaN


def compare(reference: dict[str, np.ndarray], here: dict[str, np.ndarray]) -> list[Row]:
  """The reference's stages, each against ours of the same name; a missing one counts as different."""
  rows = []
  for name in sorted(reference, key=_order):
    a = np.asarray(reference[name], np.float32)
    b = np.asarray(here[name], np.float32) if name in here else None
    base = next((t for prefix, t in TOLERANCES.items() if name.startswith(prefix)), 1e-4)
    # The layers of the decoder are rows of their own: a mistake shows in the first layer that has it.
    split = name.startswith("decoder_") and a.ndim > 1
    for i in range(a.shape[0]) if split else [None]:
      x = a if i is None else a[i]
      y = b if i is None or b is None or b.shape != a.shape else b[i]
      d = np.abs(x - y) if y is not None and x.shape == y.shape else np.full((1,), np.nan)
      scale = max(1.0, float(np.abs(x).max(initial=0)) / _RANGE)
      label = name if i is None else f"{name}[{i}]"
      tolerance = 0.0 if name == "prompt_mask" else base * scale
      rows.append(
        Row(label, x.shape, float(x.min()), float(x.max()), float(d.max()), float(d.mean()), tolerance)
      )
  return rows


def _order(name: str) -> tuple[int, str, int]:
  names = [
    "vit_block",
    "neck",
    "text_embeddings",
    "text_block",
    "text_features",
    "prompt",
    "encoder",
    "decoder",
  ]
  rank = next((i for i, n in enumerate(names) if name.startswith(n)), len(names))
  number = re.search(r"_(\d+)$", name)
  return rank, name if number is None else name[: number.start()], int(number[1]) if number else -1


def format_rows(rows: Sequence[Row]) -> str:
  """The table, one line a stage."""
  lines = [f"{'stage':28} {'shape':18} {'range':>18} {'max diff':>9} {'mean':>8} {'tolerance':>9}"]
  for r in rows:
    shape, span = "x".join(map(str, r.shape)), f"{r.low:.2f} .. {r.high:.2f}"
    verdict = (
      "" if r.ok else "  OVER" if np.isfinite(r.difference) else "  MISSING, OF ANOTHER SHAPE, OR NOT FINITE"
    )
    numbers = f"{r.difference:9.1e} {r.mean:8.0e} {r.tolerance:9.1e}"
    lines.append(f"{r.name:28} {shape:18} {span:>18} {numbers}{verdict}")
  return "\n".join(lines)


def detections(stages: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(scores [Q], boxes [Q, 4], masks [Q, h, w] bool) of the only prompt, unfiltered."""
  logits = np.asarray(stages["pred_logits"])[0]
  scores = 1 / (1 + np.exp(-logits)) / (1 + np.exp(-np.asarray(stages["presence_logits"])[0]))
  return scores, np.asarray(stages["pred_boxes"])[0], np.asarray(stages["pred_masks"])[0] > 0


def summarise(reference: dict[str, np.ndarray], here: dict[str, np.ndarray], size: tuple[int, int]) -> str:
  """What a user would see: kept sets, boxes in pixels, mask pixels. size: (height, width)."""
  (s0, b0, m0), (s1, b1, m1) = detections(reference), detections(here)
  k0, k1 = s0 > _SCORE, s1 > _SCORE
  text = f"kept at score > {_SCORE}: {k0.sum()} in the reference, {k1.sum()} here"
  text += ", the same" if (k0 == k1).all() else f", {(k0 != k1).sum()} differ"
  which, name = (
    (k0 & k1, "of them") if (k0 & k1).any() else (np.ones_like(k0), "of all queries, kept or not,")
  )
  height, width = size
  pixels = np.abs((b0 - b1)[which] * np.array([width, height, width, height])).max()
  share = (m0 != m1)[which].mean()
  return (
    f"{text}; boxes {name} within {pixels:.4f} pixel, masks differ in {share:.4%} of low-resolution pixels"
  )


def make_inputs(
  args: argparse.Namespace, size: int, processor: Any
) -> tuple[dict[str, np.ndarray], tuple[int, int]]:
  """The arrays that both models get, and the photo's (height, width)."""
  from sam3lt_jax.processing.images import preprocess

  pixels, original = preprocess(args.image if args.image else _test_card(), size)
  some = "star" if args.source == "shapes" else "truck"
  text = processor(text=args.text if args.text is not None else "visual" if args.box else some)
  inputs = {"pixel_values": pixels[None], **{k: text[k] for k in ("input_ids", "attention_mask")}}
  if args.box:
    height, width = original
    boxes = np.array([_box(b, width, height) for b in args.box], np.float64)
    boxes = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=-1)
    boxes = (boxes / np.array([width, height, width, height])).astype(np.float32)
    inputs |= {"input_boxes": boxes[None], "input_boxes_labels": np.ones((1, len(boxes)), np.int32)}
  return inputs, original


def _box(text: str, width: int, height: int) -> list[float]:
  try:
    x1, y1, x2, y2 = map(float, text.split(","))
  except ValueError:
    raise ValueError(f"--box: got {text!r}; accepted: x1,y1,x2,y2 in pixels of the image") from None
  # Outside the image torchvision's Python RoIAlign (see torch_reference) is no reference.
  if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
    raise ValueError(f"--box: {text} is not a box inside the image of {width} x {height} pixels")
  return [x1, y1, x2, y2]


def _test_card() -> np.ndarray:
  """uint8 [480, 640, 3]: gradients, discs and noise, for a run without a photo."""
  y, x = np.mgrid[0:480, 0:640]
  image = np.stack([x * 255 / 640, y * 255 / 480, 255 - (x + y) * 255 / 1120], -1)
  for cx, cy, r, colour in (
    (160, 140, 70, (250, 40, 40)),
    (430, 300, 110, (30, 60, 220)),
    (520, 90, 40, (20, 200, 60)),
  ):
    image[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = colour
  image += np.random.default_rng(0).normal(0, 6, image.shape)
  return image.clip(0, 255).astype(np.uint8)


def run_reference(
  directory: str, size: int | None, inputs_for: Any
) -> tuple[dict[str, np.ndarray], Any, float]:
  """Loads, runs and frees the reference. Returns (stages, what `inputs_for(size)` gave, seconds)."""
  ref = torch_reference.import_reference()
  config = ref.transformers.AutoConfig.from_pretrained(directory)
  detector = getattr(config, "detector_config", None) or config
  if size is not None:
    detector.vision_config.image_size = size
  made = inputs_for(detector.vision_config.image_size)
  cls = ref.Sam3Model if "lite" not in config.model_type else ref.Sam3LiteTextModel
  model = cls.from_pretrained(directory, config=config, dtype=ref.torch.float32).eval()
  start = time.perf_counter()
  stages = torch_reference.run_stages(model, made[0], delete=True)
  return stages, made, time.perf_counter() - start


def run_here(
  source: str, inputs: dict[str, np.ndarray], **options: Any
) -> tuple[dict[str, np.ndarray], float]:
  """Loads `source` under the transformers profile and runs it in float32. Returns (stages, seconds)."""
  import jax

  from sam3lt_jax.checkpoints import from_pretrained

  model, variables = from_pretrained(source, profile="transformers", **options)
  prompts = {k: v for k, v in inputs.items() if k.startswith("input_boxes")}
  start = time.perf_counter()
  with jax.default_matmul_precision("highest"):
    apply = jax.jit(lambda v, *a, **k: model.apply(v, *a, **k, output_intermediates=True))
    out = apply(variables, inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"], **prompts)
  stages = {k: np.asarray(v) for k, v in out.intermediates.items()}
  for name in ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg"):
    stages[name] = np.asarray(getattr(out, name))
  return stages, time.perf_counter() - start


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = convert.parser("verify", __doc__)
  convert.add_source(parser)
  parser.add_argument(
    "--random", choices=("s0", "s1", "l", "sam3"), help="random weights of this size instead"
  )
  parser.add_argument("--image", metavar="PHOTO", help="default: a drawn test card")
  parser.add_argument(
    "--text", metavar="PHRASE", help='default: "truck" ("star" for shapes), or "visual" with boxes only'
  )
  parser.add_argument(
    "--box", metavar="x1,y1,x2,y2", action="append", help="example box in pixels; may be given again"
  )
  parser.add_argument(
    "--size", type=int, help="side of the model's input, a multiple of 14 (default: the model's)"
  )
  parser.add_argument("--seed", type=int, default=0, help="of --random's weights")
  args = parser.parse_args(argv)
  if (args.source is None) == (args.random is None):
    parser.error("give either SOURCE or --random")
  if args.size is not None and (args.size % 14 or args.size < 28):
    parser.error(f"--size must be a multiple of 14 and at least 28, got {args.size}")
  return args


def main(argv: Sequence[str] | None = None) -> int:
  args = _parse(argv)
  ref = torch_reference.import_reference()
  with tempfile.TemporaryDirectory() as scratch:
    source, directory, options = _prepare(args, scratch)
    processor = _processor(directory)
    reference, (inputs, original), seconds = run_reference(
      directory, args.size, lambda size: make_inputs(args, size, processor)
    )
    _say(f"transformers {ref.transformers.__version__} on torch {ref.torch.__version__}: {seconds:.1f} s")
    here, seconds = run_here(source, inputs, **options)
  import jax

  _say(f"here, jax {jax.__version__} on {jax.default_backend()}: {seconds:.1f} s with compilation")
  side, boxes = inputs["pixel_values"].shape[1], len(args.box or ())
  print(
    f"\n{args.image or 'test card'} at {side} pixels, {inputs['input_ids'].shape[1]} token ids, {boxes} boxes"
  )
  rows = compare(reference, here)
  print(format_rows(rows))
  print("\n" + summarise(reference, here, original))
  over = [r.name for r in rows if not r.ok]
  if over:
    print(f"FAILED: {len(over)} of {len(rows)} stages are over their tolerance, the first is {over[0]}")
    return 1
  print(f"all {len(rows)} stages are within their tolerance")
  return 0


def _prepare(args: argparse.Namespace, scratch: str) -> tuple[str, str, dict[str, Any]]:
  """(what we load, a transformers directory for the reference, options of our loader)."""
  if args.random is not None:
    from sam3lt_jax.config import Sam3LiteTextConfig

    ref = torch_reference.import_reference()
    data = getattr(Sam3LiteTextConfig, args.random)("transformers").to_json()
    config = (ref.Sam3Config if args.random == "sam3" else ref.Sam3LiteTextConfig).from_dict(data)
    _say(f"drawing random weights for {args.random} (seed {args.seed})")
    torch_reference.randomise_(model := torch_reference.build_model(config), args.seed).save_pretrained(
      scratch
    )
    model.to("meta")
    return scratch, scratch, {}
  from sam3lt_jax import checkpoints
  from sam3lt_jax.checkpoints import sources

  options = convert.source_options(args)
  config = {"config": options.pop("config")} if "config" in options else {}
  found = sources.locate(args.source, **options)
  if found.kind == "tensors" and os.path.isfile(os.path.join(found.path, "config.json")) and not config:
    return found.path, found.path, {}
  _say("writing the checkpoint in transformers' layout for the reference to load")
  source = args.source if found.kind == "random" else found.path
  model, variables = checkpoints.from_pretrained(source, profile="transformers", **config)
  checkpoints.save_pretrained(scratch, model, variables, format="transformers")
  return source, scratch, config


def _processor(directory: str) -> Any:
  """Of the checkpoint, by transformers' rules; a pruned vocabulary has a number of its own for padding."""
  from sam3lt_jax.config import Profile, Sam3LiteTextConfig
  from sam3lt_jax.processing.processor import Sam3Processor
  from sam3lt_jax.processing.tokenizer import ClipTokenizer

  profile, config = Profile.transformers(), Sam3LiteTextConfig.from_json(directory)
  if config.tokenizer is not None:
    profile = dataclasses.replace(profile, pad_token_id=config.profile.pad_token_id)
  own = os.path.isfile(os.path.join(directory, "tokenizer.json"))
  tokenizer = ClipTokenizer.from_file(directory, profile) if own else None
  return Sam3Processor(config.replace(profile=profile), tokenizer=tokenizer)


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
  sys.exit(convert.run(main))
