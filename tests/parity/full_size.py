"""The released size (S0, 1008 px) against transformers on a real photo, from the weights' file to results.

  python -m tests.parity.full_size            # prints the table: about 5 minutes on 2 cores, 9 GB
  python -m tests.parity.full_size --write    # and puts it into docs/parity.md

Weights are random (every parameter active), drawn once from a seed, written by transformers and read by
`from_pretrained`. Both sides get the same pixels and ids; transformers post-processes its own outputs.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import pathlib
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert import torch_reference
from sam3lt_jax import (
  Predictor,
  Sam3LiteTextConfig,
  Sam3Processor,
  from_pretrained,
  tracker_from_pretrained,
)
from tests.parity import full_size_clicks, queries

PHOTO = pathlib.Path(__file__).parents[2] / "examples" / "coffee.jpg"
SEED = 0
TRACKER = "tracker"  # the folder of its weights, below the model's
PROMPTS = {
  "text": {"text": ["coffee cup"]},
  "text and boxes": {
    "text": ["coffee cup"],
    "boxes": [[150.0, 80.0, 420.0, 300.0], [430.0, 40.0, 560.0, 110.0]],
    "box_labels": [1, 0],
  },
}


@dataclasses.dataclass(frozen=True)
class Detections:
  """All queries of one prompt: scores [Q], boxes [Q, 4] pixels, masks bool [Q, H, W]."""

  scores: np.ndarray
  boxes: np.ndarray
  masks: np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
  """One prompt in one dtype against the reference. Pixels are those of the photo."""

  prompt: str
  dtype: str
  threshold: float
  kept_reference: int
  kept_differently: int
  score_difference: float
  box_difference: float
  mask_difference: float  # share of pixels that differ, over all kept masks
  mask_iou: float  # mean over kept masks


def run_reference(directory: str) -> tuple[dict[str, Detections], dict[str, Any]]:
  """Writes the random checkpoint to `directory`, its tracker below, and runs transformers on them."""
  ref = torch_reference.import_reference()
  data = Sam3LiteTextConfig.s0("transformers").to_json()
  config = ref.Sam3LiteTextConfig(**{k: v for k, v in data.items() if k != "sam3lt_jax"})
  model = torch_reference.randomise_(torch_reference.build_model(config), SEED)
  model.save_pretrained(directory)
  processor = Sam3Processor("transformers")
  post = ref.transformers.Sam3ImageProcessor()
  results, trunk = {}, []
  model.vision_encoder.backbone.register_forward_hook(lambda _, __, out: trunk.append(out.last_hidden_state))
  with ref.torch.no_grad():
    vision = None
    for name, prompt in PROMPTS.items():
      inputs = processor(
        images=str(PHOTO),
        text=prompt["text"],
        input_boxes=[prompt["boxes"]] if "boxes" in prompt else None,
        input_boxes_labels=[prompt["box_labels"]] if "boxes" in prompt else None,
      )
      tensors = {k: ref.torch.from_numpy(v) for k, v in inputs.model_inputs.items()}
      pixels = tensors.pop("pixel_values").permute(0, 3, 1, 2).contiguous()
      vision = model.get_vision_features(pixels) if vision is None else vision
      ints = {k: v.long() for k, v in tensors.items() if not v.is_floating_point()}
      out = model(vision_embeds=vision, **(tensors | ints))
      found = post.post_process_instance_segmentation(
        out, threshold=0.0, target_sizes=inputs.original_sizes.tolist()
      )[0]
      height, width = inputs.original_sizes[0].tolist()
      boxes = np.clip(found["boxes"].numpy(), 0, [width, height, width, height])  # as ours are
      results[name] = Detections(found["scores"].numpy(), boxes, found["masks"].numpy().astype(bool))
    del model
  size = tuple(inputs.original_sizes[0].tolist())
  return results, full_size_clicks.run_reference(trunk[0], size, os.path.join(directory, TRACKER))


def run_here(directory: str, dtype: Any) -> tuple[dict[str, Detections], dict[str, Any]]:
  """The same checkpoint, photo and prompts through `Predictor`."""
  dtypes = {"dtype": dtype, "param_dtype": dtype}
  model, variables = from_pretrained(directory, **dtypes)
  tracker = tracker_from_pretrained(os.path.join(directory, TRACKER), profile="transformers", **dtypes)
  predictor = Predictor(model, variables, tracker=tracker)
  predictor.set_image(PHOTO)
  results = {}
  for name, prompt in PROMPTS.items():
    found = queries.predict(predictor, 0.0, **prompt)
    results[name] = Detections(found.scores, found.boxes, found.masks)
  return results, full_size_clicks.run_here(predictor)


def compare(prompt: str, dtype: str, want: Detections, got: Detections) -> Row:
  """Keeps what scores above the middle of the widest gap, so that rounding cannot decide what is kept.

  Both sides list all queries in the same order: boxes and masks are compared for the queries the reference
  keeps, whatever the scores here say. Random weights give 200 scores within a few thousandths of each other,
  and bfloat16 can move all of them across the threshold together.
  """
  ranked = np.sort(want.scores)
  inner = ranked[len(ranked) // 4 : -len(ranked) // 4]
  at = int(np.argmax(np.diff(inner)))
  threshold = float((inner[at] + inner[at + 1]) / 2)
  kept, kept_here = want.scores > threshold, got.scores > threshold
  differing = want.masks[kept] != got.masks[kept]
  union = (want.masks[kept] | got.masks[kept]).sum(axis=(1, 2))
  overlap = (want.masks[kept] & got.masks[kept]).sum(axis=(1, 2))
  return Row(
    prompt,
    dtype,
    threshold,
    int(kept.sum()),
    int((kept != kept_here).sum()),
    float(np.abs(want.scores - got.scores).max()),
    float(np.abs(want.boxes[kept] - got.boxes[kept]).max()),
    float(differing.mean()),
    float(np.where(union > 0, overlap / np.maximum(union, 1), 1.0).mean()),
  )


def measure(
  dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> tuple[list[Row], list[full_size_clicks.ClickRow]]:
  """The whole comparison; one model in memory at a time. Clicks are compared in float32."""
  with tempfile.TemporaryDirectory() as directory:
    want, want_clicks = run_reference(directory)
    gc.collect()
    rows, clicks = [], []
    for dtype in dtypes:
      got, got_clicks = run_here(directory, jnp.dtype(dtype))
      rows += [compare(name, dtype, want[name], got[name]) for name in PROMPTS]
      if dtype == "float32":
        clicks = full_size_clicks.compare(want_clicks, got_clicks)
      gc.collect()
  return rows, clicks


def format_rows(rows: list[Row]) -> str:
  """A markdown table."""
  lines = [
    "| prompt | dtype | kept by the reference | kept differently | max score difference"
    " | max box difference, pixels | mask pixels that differ | mean mask IoU |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for r in rows:
    lines.append(
      f"| {r.prompt} | {r.dtype} | {r.kept_reference} of 200 | {r.kept_differently}"
      f" | {r.score_difference:.1e} | {r.box_difference:.4f}"
      f" | {100 * r.mask_difference:.4f}% | {r.mask_iou:.4f} |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--write", action="store_true", help="update docs/parity.md")
  parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
  args = parser.parse_args()
  rows, clicks = measure()
  table = format_rows(rows) + "\n\n" + full_size_clicks.format_rows(clicks)
  print(table)
  if args.json:
    told = {"phrases": [*map(dataclasses.asdict, rows)], "clicks": [*map(dataclasses.asdict, clicks)]}
    pathlib.Path(args.json).write_text(json.dumps(told))
  if args.write:
    from tests.parity.table import write_section

    write_section("full size", table, "python -m tests.parity.full_size --write")


if __name__ == "__main__":
  main()
