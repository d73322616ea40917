"""The tracker's key names, the authors' and transformers'.

Source: the state dicts of facebookresearch/sam3's `Sam3TrackerPredictor` and of transformers 5.23.0
`Sam3VideoModel`; the standalone trackers of both have the same tensors under other prefixes (`tables.py`).
"""

from __future__ import annotations

import functools

from sam3lt_jax.checkpoints.rules import Rule, conv, conv_transpose, embedding, linear, norm, same, value
from sam3lt_jax.checkpoints.table_original import neck

_QKV = "{p:q_proj|k_proj|v_proj}"


def _mlp(source: str, target: str, names: tuple[str, str, str]) -> list[Rule]:
  """Three layers, by what the file calls them."""
  return [r for i, name in enumerate(names) for r in linear(f"{source}.{name}", f"{target}/layers_{i}")]


def _attention(source: str, target: str) -> list[Rule]:
  return [*linear(f"{source}.{_QKV}", f"{target}/{{p}}"), *linear(f"{source}.out_proj", f"{target}/o_proj")]


_CROSS = "{a:cross_attn_token_to_image|cross_attn_image_to_token|self_attn}"
_TWO_WAY = "mask_decoder/transformer"
_DOWNSAMPLER = "memory_encoder/mask_downsampler"
_FUSER = "memory_encoder/memory_fuser_layers_{i}"

# ---------------------------------------------------------------- the authors' names

_PROMPT, _DECODER = "tracker.sam_prompt_encoder", "tracker.sam_mask_decoder"
_MEMORY = "tracker.maskmem_backbone"
_BLOCK = f"{_DECODER}.transformer.layers.{{i}}"
_LAYER = "tracker.transformer.encoder.layers.{i}"
_NUMBERED = ("layers.0", "layers.1", "layers.2")

ORIGINAL_IMAGE: tuple[Rule, ...] = (
  *neck("detector.backbone.vision_backbone.sam2_convs", "neck/fpn_layers"),
  Rule("tracker.no_mem_embed", "no_memory_embedding"),
  Rule(
    f"{_PROMPT}.pe_layer.positional_encoding_gaussian_matrix",
    "prompt_encoder/shared_embedding/positional_embedding",
  ),
  *embedding(f"{_PROMPT}.point_embeddings.{{i:[0-3]}}", "prompt_encoder/point_embed_{i}"),
  *embedding(f"{_PROMPT}.{{e:not_a_point_embed|no_mask_embed}}", "prompt_encoder/{e}"),
  *conv(f"{_PROMPT}.mask_downscaling.0", "prompt_encoder/mask_embed/conv1"),
  *norm(f"{_PROMPT}.mask_downscaling.1", "prompt_encoder/mask_embed/layer_norm1"),
  *conv(f"{_PROMPT}.mask_downscaling.3", "prompt_encoder/mask_embed/conv2"),
  *norm(f"{_PROMPT}.mask_downscaling.4", "prompt_encoder/mask_embed/layer_norm2"),
  *conv(f"{_PROMPT}.mask_downscaling.6", "prompt_encoder/mask_embed/conv3"),
  *embedding(f"{_DECODER}.{{e:iou_token|mask_tokens|obj_score_token}}", "mask_decoder/{e}"),
  *_attention(f"{_BLOCK}.{_CROSS}", f"{_TWO_WAY}/layers_{{i}}/{{a}}"),
  *norm(f"{_BLOCK}.norm{{n:1|2|3|4}}", f"{_TWO_WAY}/layers_{{i}}/layer_norm{{n}}"),
  *linear(f"{_BLOCK}.mlp.lin{{n:1|2}}", f"{_TWO_WAY}/layers_{{i}}/mlp/fc{{n}}"),
  *_attention(f"{_DECODER}.transformer.final_attn_token_to_image", f"{_TWO_WAY}/final_attn_token_to_image"),
  *norm(f"{_DECODER}.transformer.norm_final_attn", f"{_TWO_WAY}/layer_norm_final_attn"),
  *conv_transpose(f"{_DECODER}.output_upscaling.0", "mask_decoder/upscale_conv1"),
  *norm(f"{_DECODER}.output_upscaling.1", "mask_decoder/upscale_layer_norm"),
  *conv_transpose(f"{_DECODER}.output_upscaling.3", "mask_decoder/upscale_conv2"),
  *conv(f"{_DECODER}.{{c:conv_s0|conv_s1}}", "mask_decoder/{c}"),
  *_mlp(
    f"{_DECODER}.output_hypernetworks_mlps.{{i}}", "mask_decoder/output_hypernetworks_mlps_{i}", _NUMBERED
  ),
  *_mlp(f"{_DECODER}.{{h:iou_prediction_head|pred_obj_score_head}}", "mask_decoder/{h}", _NUMBERED),
)

ORIGINAL_MEMORY: tuple[Rule, ...] = (
  Rule("tracker.maskmem_tpos_enc", "memory_temporal_positional_encoding"),
  Rule("tracker.no_mem_pos_enc", "no_memory_positional_encoding"),
  Rule("tracker.no_obj_ptr", "no_object_pointer"),
  Rule("tracker.no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
  *conv("tracker.mask_downsample", "mask_downsample"),
  *_mlp("tracker.obj_ptr_proj", "object_pointer_proj", _NUMBERED),
  *linear("tracker.obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer"),
  *_attention(f"{_LAYER}.{{a:self_attn|cross_attn_image}}", "memory_attention/layers_{i}/{a}"),
  *linear(f"{_LAYER}.linear{{n:1|2}}", "memory_attention/layers_{i}/linear{n}"),
  *norm(f"{_LAYER}.norm{{n:1|2|3}}", "memory_attention/layers_{i}/layer_norm{n}"),
  *norm("tracker.transformer.encoder.norm", "memory_attention/layer_norm"),
  # A convolution, its LayerNorm and a GELU, four times; then one more.
  *(
    rule
    for i in range(4)
    for rule in (
      *conv(f"{_MEMORY}.mask_downsampler.encoder.{3 * i}", f"{_DOWNSAMPLER}/layers_{i}_conv"),
      *norm(f"{_MEMORY}.mask_downsampler.encoder.{3 * i + 1}", f"{_DOWNSAMPLER}/layers_{i}_layer_norm"),
    )
  ),
  *conv(f"{_MEMORY}.mask_downsampler.encoder.12", f"{_DOWNSAMPLER}/final_conv"),
  *conv(f"{_MEMORY}.pix_feat_proj", "memory_encoder/feature_projection"),
  *conv(f"{_MEMORY}.out_proj", "memory_encoder/projection"),
  Rule(f"{_MEMORY}.fuser.layers.{{i}}.gamma", f"{_FUSER}/scale"),
  *conv(f"{_MEMORY}.fuser.layers.{{i}}.dwconv", f"{_FUSER}/depthwise_conv"),
  *norm(f"{_MEMORY}.fuser.layers.{{i}}.norm", f"{_FUSER}/layer_norm"),
  *linear(f"{_MEMORY}.fuser.layers.{{i}}.pwconv{{n:1|2}}", f"{_FUSER}/pointwise_conv{{n}}"),
)

# ---------------------------------------------------------------- transformers' names

_T = "tracker_model."
_same = functools.partial(same, prefix=_T)
_NAMED = ("proj_in", "layers.0", "proj_out")
_T_TWO_WAY = "mask_decoder.transformer"
_T_ATTENTION = "{p:q_proj|k_proj|v_proj|o_proj}"
_T_FUSER = "tracker_model.memory_encoder.memory_fuser.layers.{i}"
_T_DOWNSAMPLER = "tracker_model.memory_encoder.mask_downsampler"

TRANSFORMERS_IMAGE: tuple[Rule, ...] = (
  *conv_transpose("tracker_neck.fpn_layers.{i}.scale_layers.{j}", "neck/fpn_layers_{i}/scale_layers_{j}"),
  *conv("tracker_neck.fpn_layers.{i}.{p:proj1|proj2}", "neck/fpn_layers_{i}/{p}"),
  *_same(value, "no_memory_embedding"),
  Rule(
    "tracker_model.prompt_encoder.shared_embedding.positional_embedding",
    "prompt_encoder/shared_embedding/positional_embedding",
    twin="tracker_model.shared_image_embedding.positional_embedding",
  ),
  Rule(
    "tracker_model.prompt_encoder.point_embed.weight",
    tuple(f"prompt_encoder/point_embed_{i}/embedding" for i in range(4)),
    "split_four_rows",
  ),
  *_same(
    embedding,
    "prompt_encoder.{e:not_a_point_embed|no_mask_embed}",
    "mask_decoder.{e:iou_token|mask_tokens|obj_score_token}",
  ),
  *_same(conv, "prompt_encoder.mask_embed.{c:conv1|conv2|conv3}", "mask_decoder.{c:conv_s0|conv_s1}"),
  *_same(
    norm,
    "prompt_encoder.mask_embed.{n:layer_norm1|layer_norm2}",
    f"{_T_TWO_WAY}.layers.{{i}}.{{n:layer_norm1|layer_norm2|layer_norm3|layer_norm4}}",
    f"{_T_TWO_WAY}.layer_norm_final_attn",
    "mask_decoder.upscale_layer_norm",
  ),
  *_same(
    linear,
    f"{_T_TWO_WAY}.layers.{{i}}.{_CROSS}.{_T_ATTENTION}",
    f"{_T_TWO_WAY}.final_attn_token_to_image.{_T_ATTENTION}",
  ),
  *linear(f"{_T}{_T_TWO_WAY}.layers.{{i}}.mlp.proj_in", f"{_TWO_WAY}/layers_{{i}}/mlp/fc1"),
  *linear(f"{_T}{_T_TWO_WAY}.layers.{{i}}.mlp.proj_out", f"{_TWO_WAY}/layers_{{i}}/mlp/fc2"),
  *_same(conv_transpose, "mask_decoder.{u:upscale_conv1|upscale_conv2}"),
  *_mlp(
    f"{_T}mask_decoder.output_hypernetworks_mlps.{{i}}", "mask_decoder/output_hypernetworks_mlps_{i}", _NAMED
  ),
  *_mlp(f"{_T}mask_decoder.{{h:iou_prediction_head|pred_obj_score_head}}", "mask_decoder/{h}", _NAMED),
)

TRANSFORMERS_MEMORY: tuple[Rule, ...] = (
  *_same(
    value,
    "memory_temporal_positional_encoding",
    "no_memory_positional_encoding",
    "no_object_pointer",
    "occlusion_spatial_embedding_parameter",
  ),
  *_same(
    conv,
    "mask_downsample",
    "memory_encoder.feature_projection",
    "memory_encoder.projection",
    "memory_encoder.mask_downsampler.final_conv",
  ),
  *_mlp(f"{_T}object_pointer_proj", "object_pointer_proj", _NAMED),
  *_same(
    linear,
    "temporal_positional_encoding_projection_layer",
    f"memory_attention.layers.{{i}}.{{a:self_attn|cross_attn_image}}.{_T_ATTENTION}",
    "memory_attention.layers.{i}.{n:linear1|linear2}",
  ),
  *_same(
    norm, "memory_attention.layers.{i}.{n:layer_norm1|layer_norm2|layer_norm3}", "memory_attention.layer_norm"
  ),
  *conv(f"{_T_DOWNSAMPLER}.layers.{{i}}.conv", f"{_DOWNSAMPLER}/layers_{{i}}_conv"),
  *norm(f"{_T_DOWNSAMPLER}.layers.{{i}}.layer_norm", f"{_DOWNSAMPLER}/layers_{{i}}_layer_norm"),
  Rule(f"{_T_FUSER}.scale", f"{_FUSER}/scale"),
  *conv(f"{_T_FUSER}.depthwise_conv", f"{_FUSER}/depthwise_conv"),
  *norm(f"{_T_FUSER}.layer_norm", f"{_FUSER}/layer_norm"),
  *linear(f"{_T_FUSER}.pointwise_conv{{n:1|2}}", f"{_FUSER}/pointwise_conv{{n}}"),
)
