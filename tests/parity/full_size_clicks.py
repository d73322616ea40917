"""The tracker at the released size against transformers, on the trunk's map of the photo of `full_size`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import numpy as np

from convert import torch_reference
from sam3lt_jax import Predictor, SamPredictor
from sam3lt_jax.config import VisionConfig

SIDE = 1008
SEED = 1
# Arguments of `SamPredictor.predict`, in pixels of the photo. "mask": starts from the answer before.
CLICKS = {
  "one click, three masks": {"point_coords": [[280.0, 190.0]], "point_labels": [1]},
  "two clicks, one mask": {
    "point_coords": [[280.0, 190.0], [500.0, 80.0]], "point_labels": [1, 0], "multimask_output": False,
  },
  "an outline": {"box": [150.0, 80.0, 420.0, 300.0], "multimask_output": False},
  "a mask and a click": {
    "point_coords": [[280.0, 190.0]], "point_labels": [1], "mask": True, "multimask_output": False,
  },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ClickRow:
  """One prompt in float32 against the reference. Pixels are those of the photo."""

  prompt: str
  masks: int
  area: float  # share of the photo that the reference's masks cover
  iou_difference: float
  mask_difference: float  # share of pixels that differ


def build(vision: VisionConfig, directory: str) -> Any:
  """transformers' tracker with random weights for a trunk of these sizes, of which it holds one layer only;
  all but the trunk is written to `directory`.
  """
  ref = torch_reference.import_reference()
  from safetensors.torch import save_file

  grid, D = vision.image_size // vision.patch_size, vision.fpn_hidden_size
  sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
  backbone = {
    "model_type": "sam3_vit_model", "hidden_size": vision.hidden_size, "num_hidden_layers": 1,
    "global_attn_indexes": [], "num_attention_heads": vision.num_attention_heads, **sizes,
  }  # fmt: skip
  config = ref.transformers.Sam3TrackerConfig(
    vision_config={
      "model_type": "sam3_vision_model", "backbone_config": backbone, "fpn_hidden_size": D,
      "backbone_feature_sizes": [[n * grid] * 2 for n in (4, 2, 1)],
    },
    prompt_encoder_config={"hidden_size": D, **sizes},
    mask_decoder_config={"hidden_size": D},
  )  # fmt: skip
  model = torch_reference.randomise_(ref.transformers.Sam3TrackerModel(config).eval(), SEED)
  matrix = model.prompt_encoder.shared_embedding.positional_embedding
  model.shared_image_embedding.positional_embedding.copy_(matrix)
  os.makedirs(directory)
  tensors = {
    k: v.clone().contiguous()
    for k, v in model.state_dict().items()
    if not k.startswith("vision_encoder.backbone.")
  }
  save_file(tensors, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
  config.save_pretrained(directory)
  return model


def run_reference(
  trunk: Any, size: tuple[int, int], directory: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Writes a random tracker to `directory` and asks it: prompt -> masks bool [C, H, W] and IoUs [C].

  trunk: [1, 72 * 72, 1024], the last map of the image model's trunk. The tracker's own is left out: its
  layers are the image model's, which the other table compares.
  """
  ref = torch_reference.import_reference()
  torch, F = ref.torch, ref.torch.nn.functional
  model = build(VisionConfig(), directory)
  height, width = size
  scale = torch.tensor([SIDE / width, SIDE / height])
  found, previous = {}, None
  with torch.no_grad():
    grid = trunk.reshape(1, 72, 72, -1).permute(0, 3, 1, 2)
    maps = model.vision_encoder.neck(grid)[0]
    embeddings = [model.mask_decoder.conv_s0(maps[0]), model.mask_decoder.conv_s1(maps[1]), maps[2]]
    for name, asked in CLICKS.items():
      prompt = {}
      if "point_coords" in asked:
        prompt["input_points"] = torch.tensor(asked["point_coords"])[None, None] * scale
        prompt["input_labels"] = torch.tensor(asked["point_labels"])[None, None]
      if "box" in asked:
        prompt["input_boxes"] = (torch.tensor(asked["box"]).reshape(2, 2) * scale).reshape(1, 1, 4)
      if "mask" in asked:
        prompt["input_masks"] = previous
      multimask = asked.get("multimask_output", True)
      out = model(image_embeddings=embeddings, multimask_output=multimask, **prompt)
      previous = out.pred_masks[0, :, :1]
      masks = F.interpolate(out.pred_masks[0], size, mode="bilinear", align_corners=False)[0] > 0
      found[name] = masks.numpy(), out.iou_scores[0, 0].numpy()
  return found


def run_here(predictor: Predictor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """The same through `SamPredictor`. predictor: with the tracker, and with the photo set."""
  sam, found, low = SamPredictor(predictor), {}, None
  for name, asked in CLICKS.items():
    arguments = {k: v for k, v in asked.items() if k != "mask"}
    masks, ious, low = sam.predict(**arguments, mask_input=low[:1] if "mask" in asked else None)
    found[name] = masks, ious
  return found


def compare(want: dict[str, Any], got: dict[str, Any]) -> list[ClickRow]:
  return [
    ClickRow(
      name, len(masks), float(masks.mean()), float(np.abs(ious - got[name][1]).max()),
      float((masks != got[name][0]).mean()),
    )
    for name, (masks, ious) in want.items()
  ]  # fmt: skip


def format_rows(rows: list[ClickRow]) -> str:
  """A markdown table."""
  lines = [
    "| clicks, float32 | masks | share of the photo | max IoU difference | mask pixels that differ |",
    "| --- | --- | --- | --- | --- |",
  ]
  for r in rows:
    lines.append(
      f"| {r.prompt} | {r.masks} | {100 * r.area:.0f}% | {r.iou_difference:.1e}"
      f" | {100 * r.mask_difference:.4f}% |"
    )
  return "\n".join(lines)
