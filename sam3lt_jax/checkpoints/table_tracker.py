"""The tracker's key names, the authors' and transformers'.

Source: the state dicts of facebookresearch/sam3's `Sam3TrackerPredictor` and of transformers 5.23.0
`Sam3VideoModel`; the standalone trackers of both have the same tensors under other prefixes (`tables.py`).
"""

from __future__ import annotations

from sam3lt_jax.checkpoints.rules import Rule, conv, embedding, linear, norm, with_bias

_QKV = "{p:q_proj|k_proj|v_proj}"


def _mlp(source: str, target: str, names: tuple[str, str, str]) -> list[Rule]:
  """Three layers, by what the file calls them."""
  return [r for i, name in enumerate(names) for r in linear(f"{source}.{name}", f"{target}/layers_{i}")]


def _attention(source: str, target: str, out: str) -> list[Rule]:
  return [*linear(f"{source}.{_QKV}", f"{target}/{{p}}"), *linear(f"{source}.{out}", f"{target}/o_proj")]


_CROSS = "{a:cross_attn_token_to_image|cross_attn_image_to_token|self_attn}"
_FPN = "neck/fpn_layers"
_TWO_WAY = "mask_decoder/transformer"
_DOWNSAMPLER = "memory_encoder/mask_downsampler"
_FUSER = "memory_encoder/memory_fuser_layers_{i}"

# ---------------------------------------------------------------- the authors' names

_NECK = "detector.backbone.vision_backbone.sam2_convs"
_PROMPT, _DECODER = "tracker.sam_prompt_encoder", "tracker.sam_mask_decoder"
_MEMORY = "tracker.maskmem_backbone"
_BLOCK = f"{_DECODER}.transformer.layers.{{i}}"
_LAYER = "tracker.transformer.encoder.layers.{i}"
_NUMBERED = ("layers.0", "layers.1", "layers.2")

ORIGINAL_IMAGE: tuple[Rule, ...] = (
  *with_bias(f"{_NECK}.{{i}}.dconv_2x2_0", f"{_FPN}_{{i:0}}/scale_layers_0", "conv_transpose"),
  *with_bias(f"{_NECK}.{{i}}.dconv_2x2_1", f"{_FPN}_{{i:0}}/scale_layers_2", "conv_transpose"),
  *with_bias(f"{_NECK}.{{i}}.dconv_2x2", f"{_FPN}_{{i:[1-9]}}/scale_layers_0", "conv_transpose"),
  *conv(f"{_NECK}.{{i}}.conv_1x1", f"{_FPN}_{{i}}/proj1"),
  *conv(f"{_NECK}.{{i}}.conv_3x3", f"{_FPN}_{{i}}/proj2"),
  Rule("tracker.no_mem_embed", "no_memory_embedding"),
  Rule(
    f"{_PROMPT}.pe_layer.positional_encoding_gaussian_matrix",
    "prompt_encoder/shared_embedding/positional_embedding",
  ),
  embedding(f"{_PROMPT}.point_embeddings.{{i:[0-3]}}", "prompt_encoder/point_embed_{i}"),
  embedding(f"{_PROMPT}.{{e:not_a_point_embed|no_mask_embed}}", "prompt_encoder/{e}"),
  *conv(f"{_PROMPT}.mask_downscaling.0", "prompt_encoder/mask_embed/conv1"),
  *norm(f"{_PROMPT}.mask_downscaling.1", "prompt_encoder/mask_embed/layer_norm1"),
  *conv(f"{_PROMPT}.mask_downscaling.3", "prompt_encoder/mask_embed/conv2"),
  *norm(f"{_PROMPT}.mask_downscaling.4", "prompt_encoder/mask_embed/layer_norm2"),
  *conv(f"{_PROMPT}.mask_downscaling.6", "prompt_encoder/mask_embed/conv3"),
  embedding(f"{_DECODER}.{{e:iou_token|mask_tokens|obj_score_token}}", "mask_decoder/{e}"),
  *_attention(f"{_BLOCK}.{_CROSS}", f"{_TWO_WAY}/layers_{{i}}/{{a}}", "out_proj"),
  *norm(f"{_BLOCK}.norm{{n:1|2|3|4}}", f"{_TWO_WAY}/layers_{{i}}/layer_norm{{n}}"),
  *linear(f"{_BLOCK}.mlp.lin{{n:1|2}}", f"{_TWO_WAY}/layers_{{i}}/mlp/fc{{n}}"),
  *_attention(
    f"{_DECODER}.transformer.final_attn_token_to_image", f"{_TWO_WAY}/final_attn_token_to_image", "out_proj"
  ),
  *norm(f"{_DECODER}.transformer.norm_final_attn", f"{_TWO_WAY}/layer_norm_final_attn"),
  *with_bias(f"{_DECODER}.output_upscaling.0", "mask_decoder/upscale_conv1", "conv_transpose"),
  *norm(f"{_DECODER}.output_upscaling.1", "mask_decoder/upscale_layer_norm"),
  *with_bias(f"{_DECODER}.output_upscaling.3", "mask_decoder/upscale_conv2", "conv_transpose"),
  *conv(f"{_DECODER}.{{c:conv_s0|conv_s1}}", "mask_decoder/{c}"),
  *_mlp(
    f"{_DECODER}.output_hypernetworks_mlps.{{i}}", "mask_decoder/output_hypernetworks_mlps_{i}", _NUMBERED
  ),
  *_mlp(
    f"{_DECODER}.{{h:iou_prediction_head|pred_obj_score_head}}", "mask_decoder/{h}", _NUMBERED
  ),
)  # fmt: skip

ORIGINAL_MEMORY: tuple[Rule, ...] = (
  Rule("tracker.maskmem_tpos_enc", "memory_temporal_positional_encoding"),
  Rule("tracker.no_mem_pos_enc", "no_memory_positional_encoding"),
  Rule("tracker.no_obj_ptr", "no_object_pointer"),
  Rule("tracker.no_obj_embed_spatial", "occlusion_spatial_embedding_parameter"),
  *conv("tracker.mask_downsample", "mask_downsample"),
  *_mlp("tracker.obj_ptr_proj", "object_pointer_proj", _NUMBERED),
  *linear("tracker.obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer"),
  *_attention(
    f"{_LAYER}.{{a:self_attn|cross_attn_image}}", "memory_attention/layers_{i}/{a}", "out_proj"
  ),
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
)  # fmt: skip

# ---------------------------------------------------------------- transformers' names

_T = "tracker_model"
_NAMED = ("proj_in", "layers.0", "proj_out")
_T_BLOCK = f"{_T}.mask_decoder.transformer.layers.{{i}}"
_T_LAYER = f"{_T}.memory_attention.layers.{{i}}"
_T_FUSER = f"{_T}.memory_encoder.memory_fuser.layers.{{i}}"
_T_DOWNSAMPLER = f"{_T}.memory_encoder.mask_downsampler"

TRANSFORMERS_IMAGE: tuple[Rule, ...] = (
  *with_bias(
    "tracker_neck.fpn_layers.{i}.scale_layers.{j}", f"{_FPN}_{{i}}/scale_layers_{{j}}", "conv_transpose"
  ),
  *conv("tracker_neck.fpn_layers.{i}.{p:proj1|proj2}", f"{_FPN}_{{i}}/{{p}}"),
  Rule(f"{_T}.no_memory_embedding", "no_memory_embedding"),
  Rule(
    f"{_T}.prompt_encoder.shared_embedding.positional_embedding",
    "prompt_encoder/shared_embedding/positional_embedding",
    twin=f"{_T}.shared_image_embedding.positional_embedding",
  ),
  Rule(
    f"{_T}.prompt_encoder.point_embed.weight",
    tuple(f"prompt_encoder/point_embed_{i}/embedding" for i in range(4)),
    "split_four_rows",
  ),
  embedding(f"{_T}.prompt_encoder.{{e:not_a_point_embed|no_mask_embed}}", "prompt_encoder/{e}"),
  *conv(f"{_T}.prompt_encoder.mask_embed.{{c:conv1|conv2|conv3}}", "prompt_encoder/mask_embed/{c}"),
  *norm(f"{_T}.prompt_encoder.mask_embed.layer_norm{{n:1|2}}", "prompt_encoder/mask_embed/layer_norm{n}"),
  embedding(f"{_T}.mask_decoder.{{e:iou_token|mask_tokens|obj_score_token}}", "mask_decoder/{e}"),
  *_attention(f"{_T_BLOCK}.{_CROSS}", f"{_TWO_WAY}/layers_{{i}}/{{a}}", "o_proj"),
  *norm(f"{_T_BLOCK}.layer_norm{{n:1|2|3|4}}", f"{_TWO_WAY}/layers_{{i}}/layer_norm{{n}}"),
  *linear(f"{_T_BLOCK}.mlp.proj_in", f"{_TWO_WAY}/layers_{{i}}/mlp/fc1"),
  *linear(f"{_T_BLOCK}.mlp.proj_out", f"{_TWO_WAY}/layers_{{i}}/mlp/fc2"),
  *_attention(
    f"{_T}.mask_decoder.transformer.final_attn_token_to_image",
    f"{_TWO_WAY}/final_attn_token_to_image",
    "o_proj",
  ),
  *norm(f"{_T}.mask_decoder.transformer.layer_norm_final_attn", f"{_TWO_WAY}/layer_norm_final_attn"),
  *with_bias(
    f"{_T}.mask_decoder.{{u:upscale_conv1|upscale_conv2}}", "mask_decoder/{u}", "conv_transpose"
  ),
  *norm(f"{_T}.mask_decoder.upscale_layer_norm", "mask_decoder/upscale_layer_norm"),
  *conv(f"{_T}.mask_decoder.{{c:conv_s0|conv_s1}}", "mask_decoder/{c}"),
  *_mlp(
    f"{_T}.mask_decoder.output_hypernetworks_mlps.{{i}}", "mask_decoder/output_hypernetworks_mlps_{i}", _NAMED
  ),
  *_mlp(
    f"{_T}.mask_decoder.{{h:iou_prediction_head|pred_obj_score_head}}", "mask_decoder/{h}", _NAMED
  ),
)  # fmt: skip

TRANSFORMERS_MEMORY: tuple[Rule, ...] = (
  *(
    Rule(f"{_T}.{name}", name)
    for name in (
      "memory_temporal_positional_encoding", "no_memory_positional_encoding", "no_object_pointer",
      "occlusion_spatial_embedding_parameter",
    )
  ),
  *conv(f"{_T}.mask_downsample", "mask_downsample"),
  *_mlp(f"{_T}.object_pointer_proj", "object_pointer_proj", _NAMED),
  *linear(
    f"{_T}.temporal_positional_encoding_projection_layer", "temporal_positional_encoding_projection_layer"
  ),
  *_attention(
    f"{_T_LAYER}.{{a:self_attn|cross_attn_image}}", "memory_attention/layers_{i}/{a}", "o_proj"
  ),
  *linear(f"{_T_LAYER}.linear{{n:1|2}}", "memory_attention/layers_{i}/linear{n}"),
  *norm(f"{_T_LAYER}.layer_norm{{n:1|2|3}}", "memory_attention/layers_{i}/layer_norm{n}"),
  *norm(f"{_T}.memory_attention.layer_norm", "memory_attention/layer_norm"),
  *conv(f"{_T_DOWNSAMPLER}.layers.{{i}}.conv", f"{_DOWNSAMPLER}/layers_{{i}}_conv"),
  *norm(f"{_T_DOWNSAMPLER}.layers.{{i}}.layer_norm", f"{_DOWNSAMPLER}/layers_{{i}}_layer_norm"),
  *conv(f"{_T_DOWNSAMPLER}.final_conv", f"{_DOWNSAMPLER}/final_conv"),
  *conv(f"{_T}.memory_encoder.feature_projection", "memory_encoder/feature_projection"),
  *conv(f"{_T}.memory_encoder.projection", "memory_encoder/projection"),
  Rule(f"{_T_FUSER}.scale", f"{_FUSER}/scale"),
  *conv(f"{_T_FUSER}.depthwise_conv", f"{_FUSER}/depthwise_conv"),
  *norm(f"{_T_FUSER}.layer_norm", f"{_FUSER}/layer_norm"),
  *linear(f"{_T_FUSER}.pointwise_conv{{n:1|2}}", f"{_FUSER}/pointwise_conv{{n}}"),
)  # fmt: skip
