"""transformers' `config.json` schema, read and written.

Source: transformers 5.23.0 `configuration_sam3_lite_text.py` and `configuration_sam3.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from sam3lt_jax.config import (
  DetrDecoderConfig,
  DetrEncoderConfig,
  GeometryEncoderConfig,
  MaskDecoderConfig,
  MemoryConfig,
  Profile,
  Sam3LiteTextConfig,
  TextConfig,
  TrackerConfig,
  TrackerProfile,
  VisionConfig,
  read_json,
  typed,
)

_MODEL_TYPES = ("sam3_lite_text", "sam3", "sam3_video", "sam3_lite_text_video")
_PARTS = {
  "geometry_encoder": GeometryEncoderConfig, "detr_encoder": DetrEncoderConfig,
  "detr_decoder": DetrDecoderConfig, "mask_decoder": MaskDecoderConfig,
}  # fmt: skip


def _fields(part: type, *but: str) -> list[str]:
  return [field.name for field in dataclasses.fields(part) if field.name not in but]


_VIT_FIELDS = _fields(VisionConfig, "rope_theta", "drop_path_rate", "fpn_hidden_size", "scale_factors")
_OF_REPMIXER = "use_repmixer_blocks", "repmixer_kernel_size", "layer_scale_init_value"
_TEXT_FIELDS = _fields(TextConfig, "kind", "batch_norm_eps", "fused")
_CLIP_FIELDS = _fields(TextConfig, "kind", "batch_norm_eps", "fused", *_OF_REPMIXER)
# What transformers' classes default to where they differ from ours; a config.json may leave defaults out.
_TRANSFORMERS_TEXT_DEFAULTS = {
  "mobileclip": {"use_repmixer_blocks": True, "max_position_embeddings": 77},
  "clip": {
    "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 512, "num_hidden_layers": 24,
    "num_attention_heads": 16, "max_position_embeddings": 32,
  },
}  # fmt: skip


def read(
  source: str | os.PathLike | Mapping[str, Any], profile: str | Profile | None = None
) -> Sam3LiteTextConfig:
  """See `Sam3LiteTextConfig.from_json`."""
  if isinstance(source, Mapping):
    return from_schema(source, profile)
  path = os.fspath(source)
  if os.path.isdir(path):
    path = os.path.join(path, "config.json")
  config = from_schema(read_json(path), profile)
  own = os.path.join(os.path.dirname(path), "tokenizer.json")
  if config.text.vocab_size == TextConfig().vocab_size or not os.path.isfile(own):
    return config
  with open(own, encoding="utf-8") as f:
    return config.replace(tokenizer=f.read())


def to_schema(config: Sam3LiteTextConfig) -> dict[str, Any]:
  v, t = config.vision, config.text
  clip = t.kind == "clip"
  prefix = "sam3" if clip else "sam3_lite_text"
  backbone = {k: getattr(v, k) for k in _VIT_FIELDS}
  backbone |= {
    "model_type": "sam3_vit_model",
    "hidden_act": "gelu",
    "layer_norm_eps": config.profile.vit_layer_norm_eps,
    "global_attn_indexes": list(v.global_attn_indexes),
    "rope_parameters": {"rope_type": "axial", "rope_theta": v.rope_theta},
  }
  grid = v.image_size // v.patch_size
  vision = {
    "model_type": "sam3_vision_model",
    "backbone_config": backbone,
    "fpn_hidden_size": v.fpn_hidden_size,
    "scale_factors": list(v.scale_factors),
    "backbone_feature_sizes": [[int(grid * s)] * 2 for s in v.scale_factors[:-1]],
  }
  text = {k: getattr(t, k) for k in (_CLIP_FIELDS if clip else _TEXT_FIELDS)}
  text |= {
    "model_type": "clip_text_model" if clip else "sam3_lite_text_text_model",
    "hidden_act": "gelu",
  }
  parts = {
    f"{name}_config": dataclasses.asdict(getattr(config, name)) | {"model_type": f"{prefix}_{name}"}
    for name in _PARTS
  }
  parts["mask_decoder_config"].pop("num_groups")
  return {
    "model_type": prefix,
    "architectures": ["Sam3Model" if clip else "Sam3LiteTextModel"],
    "vision_config": vision,
    "text_config": text,
    **parts,
    "sam3lt_jax": {
      "profile": dataclasses.asdict(config.profile),
      "drop_path_rate": v.drop_path_rate,
      "fused": t.fused,
      "num_groups": config.mask_decoder.num_groups,
    },
  }


def from_schema(data: Mapping[str, Any], profile: str | Profile | None) -> Sam3LiteTextConfig:
  if isinstance(data, Mapping):
    data = data.get("detector_config") or data  # a video checkpoint nests the image model
  if not isinstance(data, Mapping):
    raise ValueError(f"config must be a JSON object, got {type(data).__name__}")
  for name, part in data.items():
    if str(name).endswith("_config") or name == "sam3lt_jax":
      _object(name, part)
  model_type = data.get("model_type")
  if model_type not in _MODEL_TYPES:
    raise ValueError(
      f"config: model_type {model_type!r:.80} is not a SAM3-LiteText model;"
      f" accepted: {', '.join(_MODEL_TYPES)}"
    )
  ours = data.get("sam3lt_jax") or {}
  if profile is None:
    profile = _profile(ours["profile"]) if "profile" in ours else Profile.transformers()
  profile = Profile.named(profile)

  vision = data.get("vision_config") or {}
  vit = _object("backbone_config", vision.get("backbone_config"))
  if (eps := vit.get("layer_norm_eps")) is not None and not ours and profile.name == "transformers":
    profile = dataclasses.replace(profile, vit_layer_norm_eps=typed("layer_norm_eps", eps, 0.0))
  kind = "clip" if model_type in ("sam3", "sam3_video") else "mobileclip"
  text = _TRANSFORMERS_TEXT_DEFAULTS[kind] | dict(data.get("text_config") or {})
  rope = _object("rope_parameters", vit.get("rope_parameters"))
  extra = {k: v[k] for k, v in (("rope_theta", rope), ("drop_path_rate", ours)) if k in v}
  parts = {name: dict(data.get(f"{name}_config") or {}) for name in _PARTS}
  if "num_groups" in ours:
    parts["mask_decoder"]["num_groups"] = ours["num_groups"]
  return Sam3LiteTextConfig(
    vision=_pick(VisionConfig, {**vit, **vision, **extra}, "vision_config"),
    text=_pick(TextConfig, {**text, "kind": kind, "fused": ours.get("fused", False)}, "text_config"),
    **{name: _pick(_PARTS[name], part, f"{name}_config") for name, part in parts.items()},
    profile=profile,
  )


# ---------------------------------------------------------------- the tracker

_TRACKER_TYPES = ("sam3_tracker", "sam3_tracker_video", "sam3_video")
# Ours -> where transformers has it, under `prompt_encoder_config`, `mask_decoder_config` or at the top.
_TRACKER_FIELDS = {
  "hidden_size": "mask_decoder_config.hidden_size",
  "patch_size": "prompt_encoder_config.patch_size",
  "mask_input_channels": "prompt_encoder_config.mask_input_channels",
  "num_layers": "mask_decoder_config.num_hidden_layers",
  "num_attention_heads": "mask_decoder_config.num_attention_heads",
  "intermediate_size": "mask_decoder_config.mlp_dim",
  "attention_downsample_rate": "mask_decoder_config.attention_downsample_rate",
  "num_multimask_outputs": "mask_decoder_config.num_multimask_outputs",
  "iou_head_hidden_size": "mask_decoder_config.iou_head_hidden_dim",
  "stability_offset": "mask_decoder_config.dynamic_multimask_stability_delta",
  "stability_threshold": "mask_decoder_config.dynamic_multimask_stability_thresh",
}
_MEMORY_FIELDS = {
  "num_layers": "memory_attention_num_layers",
  "intermediate_size": "memory_attention_feed_forward_hidden_size",
  "hidden_size": "memory_encoder_output_channels",
  "num_maps": "num_maskmem",
  "max_cond_frames": "max_cond_frame_num",
  "max_pointers": "max_object_pointers_in_encoder",
  "fuser_layers": "memory_fuser_num_layers",
  "fuser_intermediate_size": "memory_fuser_intermediate_dim",
}


def tracker_to_schema(config: TrackerConfig, detector: Sam3LiteTextConfig) -> dict[str, Any]:
  """transformers' `Sam3TrackerVideoConfig`; the trunk's part comes from the detector that it runs beside."""
  vision = to_schema(detector)["vision_config"]
  side, D = detector.vision.image_size, config.hidden_size
  grid = side // config.patch_size
  parts: dict[str, dict] = {
    "prompt_encoder_config": {"image_size": side, "hidden_size": D},
    "mask_decoder_config": {},
  }
  for ours, theirs in _TRACKER_FIELDS.items():
    part, name = theirs.split(".")
    parts[part][name] = getattr(config, ours)
  m = config.memory or MemoryConfig()
  flat = {theirs: getattr(m, ours) for ours, theirs in _MEMORY_FIELDS.items()}
  kind = "sam3_tracker_video" if config.memory else "sam3_tracker"
  for name, part in parts.items():
    part["model_type"] = f"{kind}_{name.removesuffix('_config')}"
  flat |= {
    "image_size": side,
    "memory_attention_hidden_size": D,
    "memory_attention_rope_feat_sizes": [grid, grid],
    "memory_encoder_hidden_size": D,
    "mask_downsampler_embed_dim": D,
    "memory_fuser_embed_dim": D,
    "rope_parameters": {"rope_type": "axial", "rope_theta": m.rope_theta},
  }
  return {
    "model_type": kind,
    "architectures": ["Sam3TrackerVideoModel" if config.memory else "Sam3TrackerModel"],
    "vision_config": vision | {"fpn_hidden_size": D, "scale_factors": list(config.scale_factors)},
    **parts,
    **(flat if config.memory else {}),
    "sam3lt_jax": {"profile": dataclasses.asdict(config.profile)},
  }


def tracker_from_schema(data: Any, memory: bool) -> TrackerConfig:
  """Reads `Sam3TrackerConfig`, `Sam3TrackerVideoConfig` or the tracker's part of `Sam3VideoConfig`.

  memory: whether the weights hold what remembers; without it the sizes of that are left out.

  Raises:
    ValueError: another kind of model, or a field of the wrong kind.
  """
  data = _object("config", data)
  if data.get("model_type") not in _TRACKER_TYPES:
    raise ValueError(
      f"config: model_type {data.get('model_type')!r:.80} has no tracker; accepted:"
      f" {', '.join(_TRACKER_TYPES)}"
    )
  data = _object("tracker_config", data.get("tracker_config")) or data

  def picked(fields: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for ours, theirs in fields.items():
      part, _, name = theirs.rpartition(".")
      where = _object(part, data.get(part)) if part else data
      found[ours] = where.get(name)
    return found

  own = picked(_TRACKER_FIELDS)
  own["scale_factors"] = _object("vision_config", data.get("vision_config")).get("scale_factors")
  config = _pick(TrackerConfig, own, "tracker_config")
  extra = picked(_MEMORY_FIELDS)
  extra["rope_theta"] = _object("rope_parameters", data.get("rope_parameters")).get("rope_theta")
  config = config.replace(memory=_pick(MemoryConfig, extra, "tracker_config") if memory else None)
  ours = _object("sam3lt_jax", data.get("sam3lt_jax"))
  return config.replace(profile=_profile(ours["profile"], TrackerProfile)) if "profile" in ours else config


def _object(name: str, value: Any) -> Mapping[str, Any]:
  if not isinstance(value, (Mapping, type(None))):
    raise ValueError(f"config: {name} must be an object, got {value!r:.80}")
  return value or {}


def _pick(cls, data: Mapping[str, Any], where: str):
  """Builds `cls` from the fields that it has; other keys of the schema do not concern us."""
  values = {}
  for field in dataclasses.fields(cls):
    value = data.get(field.name)
    if value is None:
      continue
    default = field.default
    if isinstance(default, int) and isinstance(value, (list, tuple)):
      if not value or any(x != value[0] for x in value):
        raise ValueError(f"{where}.{field.name}: only square sizes are supported, got {value}")
      value = value[0]
    values[field.name] = typed(f"{where}.{field.name}", value, default)
  return cls(**values)


def _profile(data: Any, kind: type = Profile) -> Any:
  """The profile that `to_schema` wrote, every field of it but those with a default, which came later."""
  fields = {field.name for field in dataclasses.fields(kind)}
  needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
  if not isinstance(data, Mapping) or not needed <= set(data) <= fields:
    got = sorted(data) if isinstance(data, Mapping) else data
    raise ValueError(f"sam3lt_jax.profile must hold exactly {sorted(fields)}, got {got}")
  return kind(**data)
