"""What checkpoint tests share: fixtures as state dicts, and our tree worked out from torch's modules."""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
from typing import Any

import numpy as np

from sam3lt_jax.checkpoints import engine, sources
from sam3lt_jax.config import (
  DetrDecoderConfig,
  DetrEncoderConfig,
  GeometryEncoderConfig,
  MaskDecoderConfig,
  Sam3LiteTextConfig,
  TextConfig,
  VisionConfig,
)

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
TEXT = "detector.backbone.language_backbone."
VARIANTS = ("s0", "s1", "l", "sam3")
_TEXT_FIXTURES = {"s0": "text_mct", "s1": "text_base", "l": "text_base_wide", "sam3": "text_teacher_ve"}


def bundled_detector(directory: pathlib.Path) -> pathlib.Path:
  """The bundled model without its tracker, as a directory."""
  return shutil.copytree(sources.bundled("shapes"), directory, ignore=shutil.ignore_patterns("tracker"))


@functools.cache
def fixture(name: str) -> dict[str, np.ndarray]:
  with np.load(FIXTURES / f"original_{name}.npz") as data:
    return {key: data[key] for key in data.files}


def _part(name: str, prefix: str) -> dict[str, np.ndarray]:
  return {k.removeprefix(prefix): v for k, v in fixture(name).items() if k.startswith(prefix)}


def original_state_dict(variant: str, *, short_table: bool = False) -> dict[str, np.ndarray]:
  """A whole tiny model in the original's layout: the detector fixture, with the text fixture of `variant`.

  short_table: the text encoder's position table has 16 rows instead of 77 (32 in the teacher, either way).
  """
  state = {k: v for k, v in _part("detector_tiny", "sd/").items() if not k.startswith(TEXT)}
  state |= _part(_TEXT_FIXTURES[variant], "sd/")
  return state | (_part(_TEXT_FIXTURES[variant], "sd_pos16/") if short_table else {})


def original_config(variant: str, *, short_table: bool = False, **changes: Any) -> Sam3LiteTextConfig:
  """The configuration of `original_state_dict`, from what the fixtures say of themselves."""
  c = json.loads(str(fixture("detector_tiny")["config_json"]))
  t = json.loads(str(fixture(_TEXT_FIXTURES[variant])["config_json"]))
  part = {"hidden_size": c["d"], "num_attention_heads": c["heads"]}
  layers = part | {"intermediate_size": c["ffn"]}
  if variant == "sam3":
    text = TextConfig(
      kind="clip", vocab_size=t["vocab_size"], hidden_size=t["width"], intermediate_size=4 * t["width"],
      projection_dim=512, num_hidden_layers=t["layers"], num_attention_heads=t["heads"],
      max_position_embeddings=32,
    )  # fmt: skip
  else:
    blocks = t["n_transformer_layers"] + 2 * (t["model_name"] == "mct")
    text = TextConfig(
      vocab_size=t["vocab_size"], hidden_size=t["dim"], intermediate_size=4 * t["dim"],
      projection_dim=t["dim"], num_hidden_layers=blocks, num_attention_heads=t["n_heads_per_layer"],
      max_position_embeddings=16 if short_table else 77, use_repmixer_blocks=t["model_name"] == "mct",
    )  # fmt: skip
  return Sam3LiteTextConfig(
    vision=VisionConfig(
      hidden_size=c["vit_dim"], intermediate_size=int(c["vit_dim"] * c["mlp_ratio"]),
      num_hidden_layers=c["vit_depth"], num_attention_heads=c["vit_heads"], image_size=c["img"],
      patch_size=c["patch"], window_size=c["window"], global_attn_indexes=tuple(c["glob"]),
      pretrain_image_size=c["pre_img"], fpn_hidden_size=c["d"],
    ),
    text=text,
    geometry_encoder=GeometryEncoderConfig(**layers, num_layers=c["geo"]),
    detr_encoder=DetrEncoderConfig(**layers, num_layers=c["enc"]),
    detr_decoder=DetrDecoderConfig(**layers, num_layers=c["dec"], num_queries=c["nq"]),
    mask_decoder=MaskDecoderConfig(**part),
  ).replace(**changes)  # fmt: skip


def save_pt(state: dict[str, np.ndarray], path: Any, *, wrap: str | None = "model", dtype: Any = None) -> str:
  """Writes a state dict as a torch file, as the authors do."""
  import torch

  tensors = {k: torch.from_numpy(np.array(v)) for k, v in state.items()}
  if dtype is not None:
    tensors = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
  torch.save(tensors if wrap is None else {wrap: tensors, "epoch": 3}, path)
  return str(path)


@functools.cache
def real_size_layout(variant: str) -> dict[str, tuple[tuple[int, ...], str]]:
  """Key -> (shape, dtype) of a released original file, tracker and second neck included."""
  data = json.loads((FIXTURES / "key_layout_real_size.json").read_text())
  names = {"s1": "text_MobileCLIP-S1", "l": "text_MobileCLIP2-L", "sam3": "text_SAM3_teacher"}
  keys = dict(data["detector_S0"])
  if variant != "s0":
    keys = {k: v for k, v in keys.items() if not k.startswith(TEXT)} | data[names[variant]]
  keys |= data["sam2_convs_when_interactive"] | data["tracker"]
  return {k: (tuple(shape), dtype) for k, (shape, dtype) in keys.items()}


def expected_tree(model: Any) -> dict[str, np.ndarray]:
  """Our flat tree from a torch model, worked out from the *types* of its modules, not from any key table."""
  import torch
  from torch import nn

  tree: dict[str, np.ndarray] = {}

  def put(path: str, name: str, value: Any, collection: str = "params") -> None:
    parts: list[str] = []
    for part in path.replace("text_model.encoder.", "").replace("text_model.", "").split("."):
      if part.isdigit():
        parts[-1] += f"_{part}"
      elif part:
        parts.append(part)
    tree["/".join([collection, *parts, name])] = value.detach().float().numpy()

  for path, module in model.named_modules():
    weight = getattr(module, "weight", None)
    if path == "text_encoder.text_projection":
      path = "text_encoder.projection"
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
      put(path, "scale", weight)
      if isinstance(module, nn.BatchNorm2d):
        put(path, "mean", module.running_mean, "batch_stats")
        put(path, "var", module.running_var, "batch_stats")
    elif isinstance(module, nn.Embedding):
      if path.endswith("position_embedding"):  # CLIP's
        put(path.rpartition(".")[0], "position_embedding", weight)
      else:
        put(path, "embedding", weight)
    elif isinstance(module, nn.Linear):
      put(path, "kernel", weight.T)
    elif isinstance(module, nn.ConvTranspose2d):
      put(path, "kernel", torch.einsum("iohw->hwio", weight))
    elif isinstance(module, nn.Conv2d):
      if path.startswith("text_encoder") and module.groups > 1:
        put(path, "kernel", torch.einsum("cohw->whoc", weight)[:, 0])
      elif path.startswith("text_encoder"):
        put(path, "kernel", weight[:, :, 0, 0].T)
      else:
        put(path, "kernel", torch.einsum("oihw->hwio", weight))
    else:
      for name, value in module.named_parameters(recurse=False):
        if name == "layer_scale":
          put(path, name, value[:, 0, 0])
        elif name == "position_embedding":
          put(path.rpartition(".")[0], name, value[0, 0])
        else:
          put(path, name, value)
      continue
    if getattr(module, "bias", None) is not None:
      put(path, "bias", module.bias)
  return tree


def flat(variables):
  return {k: np.asarray(v) for k, v in engine.flatten(variables).items()}


def assert_equal(found, expected):
  assert found.keys() == expected.keys()
  for key, value in expected.items():
    assert found[key].dtype == value.dtype, key
    np.testing.assert_array_equal(found[key], value, err_msg=key)
