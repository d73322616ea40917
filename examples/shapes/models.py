"""Configurations of the bundled model and of the teacher that its text encoder is distilled from."""

from __future__ import annotations

import dataclasses
import functools

from sam3lt_jax.config import (
  BOX_ONLY_PHRASE,
  DetrDecoderConfig,
  DetrEncoderConfig,
  GeometryEncoderConfig,
  MaskDecoderConfig,
  Profile,
  Sam3LiteTextConfig,
  TextConfig,
  VisionConfig,
)
from sam3lt_jax.processing.tokenizer import ClipTokenizer
from sam3lt_jax.pruning import needed_tokens, prune_tokenizer, pruned_config
from sam3lt_jax.shapes.phrases import all_phrases

WIDTH = 64  # of the detector
CONTEXT = 8  # tokens: start, up to four words, end, and room for a word of two tokens


def profile(rules: str = "original") -> Profile:
  """The rules of a stage: the authors', with a shorter context, or transformers', under which it ships."""
  if rules == "original":
    return dataclasses.replace(Profile.original(), name="shapes", context_length=CONTEXT)
  # What is done with its outputs is no rule of the model's: the masks are better the authors' way, and 0.5 is
  # the threshold that everything here is measured at.
  after = {"mask_order": "upsample_then_sigmoid", "score_threshold": 0.5}
  return dataclasses.replace(Profile.named(rules), **after)


@functools.cache
def tokenizer(rules: str = "original") -> ClipTokenizer:
  """The bundled CLIP vocabulary, pruned to the words of the shapes' phrases: the same ids under all rules."""
  kept = needed_tokens(ClipTokenizer(profile=profile()), [*all_phrases(), BOX_ONLY_PHRASE])
  return prune_tokenizer(ClipTokenizer(profile=profile(rules)), kept)


def student_config(rules: str = "original") -> Sam3LiteTextConfig:
  """The model that ships: MobileCLIP-S0's kind of text encoder, RepMixer blocks at both ends."""
  return _config(
    TextConfig(
      hidden_size=64, intermediate_size=192, projection_dim=64, num_hidden_layers=4, num_attention_heads=4,
      max_position_embeddings=profile(rules).context_length, use_repmixer_blocks=True, repmixer_kernel_size=5,
      layer_scale_init_value=0.1,
    ),
    rules,
  )  # fmt: skip


def teacher_config() -> Sam3LiteTextConfig:
  """The same detector under SAM 3's kind of text encoder, eight times and more as large as the student's."""
  return _config(
    TextConfig(
      kind="clip", hidden_size=192, intermediate_size=768, projection_dim=64, num_hidden_layers=4,
      num_attention_heads=4, max_position_embeddings=CONTEXT,
    )
  )  # fmt: skip


def _config(text: TextConfig, rules: str = "original") -> Sam3LiteTextConfig:
  part = {"hidden_size": WIDTH, "num_attention_heads": 4}
  layers = part | {"intermediate_size": 3 * WIDTH, "dropout": 0.0}
  config = Sam3LiteTextConfig(
    vision=VisionConfig(
      hidden_size=160, intermediate_size=480, num_hidden_layers=6, num_attention_heads=4, image_size=120,
      patch_size=12, window_size=5, global_attn_indexes=(2, 5), pretrain_image_size=120, drop_path_rate=0.0,
      fpn_hidden_size=WIDTH,
    ),
    text=text,
    geometry_encoder=GeometryEncoderConfig(**layers, num_layers=1, roi_size=4),
    detr_encoder=DetrEncoderConfig(**layers, num_layers=3),
    detr_decoder=DetrDecoderConfig(**layers, num_layers=3, num_queries=20),
    mask_decoder=MaskDecoderConfig(**part, num_upsampling_stages=2),
    profile=profile(rules),
  )  # fmt: skip
  pruned = tokenizer(rules)
  return pruned_config(config, pruned, pruned.eot_token_id + 1)


def mask_side() -> int:
  """Side of the predicted masks in pixels."""
  vision = student_config().vision
  return 4 * vision.image_size // vision.patch_size
