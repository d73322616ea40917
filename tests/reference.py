"""The PyTorch reference at tiny sizes, for tests: every parameter active, saved as transformers saves it.

Use with `@pytest.mark.torch`; every function skips the test where torch or transformers is missing.
"""

from __future__ import annotations

import os
import types
from typing import Any

import pytest

from convert import torch_reference
from convert.torch_reference import randomise_, run_stages

__all__ = [
  "import_torch_reference",
  "random_torch_model",
  "randomise_",
  "run_stages",
  "save_torch",
  "tiny_config",
]

# Text towers that stand for the released ones: S0 has RepMixer blocks first and last, L another width.
_TEXT = {
  "s0": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "use_repmixer_blocks": True},
  "s1": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "use_repmixer_blocks": False},
  "l": {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 2, "use_repmixer_blocks": False},
  "sam3": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3},
}


def import_torch_reference() -> types.SimpleNamespace:
  """`convert.torch_reference.import_reference()`, or the test is skipped."""
  for name in ("torch", "transformers"):
    pytest.importorskip(name)
  try:
    return torch_reference.import_reference()
  except ImportError as e:
    pytest.skip(str(e))


def tiny_config(
  variant: str = "s0",
  image_size: int = 168,
  window: int = 4,
  *,
  vocab_size: int = 300,
  context: int = 16,
  vit_layers: int = 4,
  global_layers: tuple[int, ...] = (1, 3),
  hidden_size: int = 32,
  queries: int = 20,
  vit_layer_norm_eps: float = 1e-6,
  **text: Any,
) -> Any:
  """A transformers configuration of a tiny model.

  Args:
    variant: "s0", "s1" or "l" give a `Sam3LiteTextConfig`; "sam3" a `Sam3Config` with the CLIP text tower.
    image_size: pixels, a multiple of 14; 168 is a grid of 12. A grid that `window` does not divide is padded.
    vocab_size: ids. CLIP's end of text is 49407 in a full vocabulary of 49408.
    context: rows of the position table.
    text: further fields of the text configuration.
  """
  ref = import_torch_reference()
  if variant not in _TEXT:
    raise ValueError(f"variant must be one of {', '.join(map(repr, _TEXT))}, got {variant!r}")
  width = _TEXT[variant]["hidden_size"]
  text = _TEXT[variant] | {
    "vocab_size": vocab_size, "intermediate_size": 4 * width, "projection_dim": width,
    "max_position_embeddings": context, "hidden_act": "gelu",
  } | text  # fmt: skip
  teacher = variant == "sam3"
  if teacher:
    text |= {"model_type": "clip_text_model", "eos_token_id": vocab_size - 1, "bos_token_id": vocab_size - 2}
  grid = image_size // 14
  part = {"hidden_size": hidden_size, "num_attention_heads": 4}
  layers = part | {"num_layers": 2, "intermediate_size": 96}
  parts = {
    "vision_config": {
      "model_type": "sam3_vision_model",
      "backbone_config": {
        "model_type": "sam3_vit_model", "hidden_size": 64, "intermediate_size": 296,
        "num_hidden_layers": vit_layers, "num_attention_heads": 4, "image_size": image_size,
        "window_size": window, "pretrain_image_size": 56, "global_attn_indexes": list(global_layers),
        "layer_norm_eps": vit_layer_norm_eps,
      },
      "fpn_hidden_size": hidden_size,
      "backbone_feature_sizes": [[grid * s, grid * s] for s in (4, 2, 1)],
    },
    "text_config": text,
    "geometry_encoder_config": layers,
    "detr_encoder_config": layers,
    "detr_decoder_config": layers | {"num_queries": queries},
    "mask_decoder_config": part,
  }  # fmt: skip
  return (ref.Sam3Config if teacher else ref.Sam3LiteTextConfig)(**parts)


def random_torch_model(config: Any, seed: int = 0) -> Any:
  """The reference model of `config` in eval mode, every parameter and statistic randomised to be active."""
  return randomise_(torch_reference.build_model(config), seed)


def save_torch(model: Any, directory: str | os.PathLike, **kwargs: Any) -> str:
  """`model.save_pretrained(directory, **kwargs)`; returns the directory as a string."""
  model.save_pretrained(os.fspath(directory), **kwargs)
  return os.fspath(directory)
