"""Compiles a small model's programs for v5e and prints their figures as JSON.

A process of its own: libtpu answers signals for the whole process once it is loaded.
"""

from __future__ import annotations

import dataclasses
import json

import jax

from sam3lt_jax.checkpoints.random_init import RANDOM_CONFIGS
from sam3lt_jax.config import Sam3LiteTextConfig, VisionConfig
from tpu import compile


def small() -> Sam3LiteTextConfig:
  """48 x 48 tokens in windows of 24, one of two layers global, a layer of each part of the detector."""
  config = RANDOM_CONFIGS["tiny-s1"]()
  width = {"hidden_size": 128}
  return config.replace(
    vision=VisionConfig(
      hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, image_size=672,
      window_size=24, global_attn_indexes=(1,), pretrain_image_size=336, fpn_hidden_size=128,
    ),
    geometry_encoder=dataclasses.replace(config.geometry_encoder, **width, num_layers=1),
    detr_encoder=dataclasses.replace(config.detr_encoder, **width, num_layers=2),
    detr_decoder=dataclasses.replace(config.detr_decoder, **width, num_layers=1),
    mask_decoder=dataclasses.replace(config.mask_decoder, **width),
  )  # fmt: skip


def main() -> None:
  devices, found = compile.topology("v5e:2x2"), {}
  for chips, name, precision in (
    (1, "vision, 1 image", "default"),
    (4, "vision, 1 image", "highest"),
    (4, "detection, 1 prompt", "highest"),
    (4, "clicks, 64 objects", "highest"),
  ):
    program = compile.programs(small(), chips)[name]()
    with jax.default_matmul_precision(precision):
      compiled = compile.compile_for(program, devices[:chips])
    found[f"{name}, {chips}"] = dataclasses.asdict(compile.figures(compiled))
  print(json.dumps(found))


if __name__ == "__main__":
  main()
