"""The authors' key names, without the `detector.` in front.

Source: the state dicts of efficientsam3, branch sam3_litetext, and of SAM 3 itself (text tower).
"""

from __future__ import annotations

from collections.abc import Iterable

from sam3lt_jax.checkpoints.rules import (
  Rule,
  batch_norm,
  conv,
  conv_transpose,
  embedding,
  fused_qkv,
  kernel,
  linear,
  norm,
  same,
  torch_attention,
  with_bias,
)

_TRUNK = "backbone.vision_backbone.trunk"
_VIT = "vision_encoder/backbone"


def neck(source: str, target: str) -> list[Rule]:
  """A lone transposed convolution is named dconv_2x2, two in a row dconv_2x2_0 and _1 with a GELU between."""
  return [
    *conv_transpose(f"{source}.{{i}}.dconv_2x2_0", f"{target}_{{i:0}}/scale_layers_0"),
    *conv_transpose(f"{source}.{{i}}.dconv_2x2_1", f"{target}_{{i:0}}/scale_layers_2"),
    *conv_transpose(f"{source}.{{i}}.dconv_2x2", f"{target}_{{i:[1-9]}}/scale_layers_0"),
    *conv(f"{source}.{{i}}.conv_1x1", f"{target}_{{i}}/proj1"),
    *conv(f"{source}.{{i}}.conv_3x3", f"{target}_{{i}}/proj2"),
  ]


def _numbered_mlp(source: str, target: str, count: int) -> Iterable[Rule]:
  """`layers.0`, `layers.1`, ... -> `layer1`, `layer2`, ..."""
  for n in range(count):
    yield from linear(f"{source}.layers.{n}", f"{target}/layer{n + 1}")


DETECTOR: tuple[Rule, ...] = (
  Rule(f"{_TRUNK}.pos_embed", f"{_VIT}/embeddings/position_embeddings", "drop_class_row"),
  *kernel(f"{_TRUNK}.patch_embed.proj", f"{_VIT}/embeddings/patch_embeddings/projection", "conv"),
  *norm(f"{_TRUNK}.ln_pre", f"{_VIT}/layer_norm"),
  *norm(f"{_TRUNK}.blocks.{{i}}.norm{{n:1|2}}", f"{_VIT}/layers_{{i}}/layer_norm{{n}}"),
  *fused_qkv(f"{_TRUNK}.blocks.{{i}}.attn.qkv.", f"{_VIT}/layers_{{i}}/attention"),
  *linear(f"{_TRUNK}.blocks.{{i}}.attn.proj", f"{_VIT}/layers_{{i}}/attention/o_proj"),
  *linear(f"{_TRUNK}.blocks.{{i}}.mlp.{{f:fc1|fc2}}", f"{_VIT}/layers_{{i}}/mlp/{{f}}"),
  *neck("backbone.vision_backbone.convs", "vision_encoder/neck/fpn_layers"),
  *same(embedding, "geometry_encoder.{e:label_embed|cls_embed}"),
  *same(linear, "geometry_encoder.{p:boxes_direct_project|boxes_pos_enc_project|final_proj}"),
  *same(conv, "geometry_encoder.boxes_pool_project"),
  *norm("geometry_encoder.norm", "geometry_encoder/prompt_layer_norm"),
  *norm("geometry_encoder.img_pre_norm", "geometry_encoder/vision_layer_norm"),
  *norm("geometry_encoder.encode_norm", "geometry_encoder/output_layer_norm"),
  *(
    rule
    for source, target in (
      ("geometry_encoder.encode.{i}", "geometry_encoder/layers_{i}"),
      ("transformer.encoder.layers.{i}", "detr_encoder/layers_{i}"),
    )
    for rule in (
      *torch_attention(f"{source}.self_attn", f"{target}/self_attn"),
      *torch_attention(f"{source}.cross_attn_image", f"{target}/cross_attn"),
      *linear(f"{source}.linear{{n:1|2}}", f"{target}/mlp/fc{{n}}"),
      *norm(f"{source}.norm{{n:1|2|3}}", f"{target}/layer_norm{{n}}"),
    )
  ),
  *(
    rule
    for source, target in (
      ("self_attn", "self_attn"),
      ("ca_text", "text_cross_attn"),
      ("cross_attn", "vision_cross_attn"),
    )
    for rule in torch_attention(
      f"transformer.decoder.layers.{{i}}.{source}", f"detr_decoder/layers_{{i}}/{target}"
    )
  ),
  *(
    rule
    for source, target in (
      ("norm1", "vision_cross_attn"),
      ("catext_norm", "text_cross_attn"),
      ("norm2", "self_attn"),
      ("norm3", "mlp"),
    )
    for rule in norm(
      f"transformer.decoder.layers.{{i}}.{source}", f"detr_decoder/layers_{{i}}/{target}_layer_norm"
    )
  ),
  *linear("transformer.decoder.layers.{i}.linear{n:1|2}", "detr_decoder/layers_{i}/mlp/fc{n}"),
  *norm("transformer.decoder.norm", "detr_decoder/output_layer_norm"),
  *norm("transformer.decoder.presence_token_out_norm", "detr_decoder/presence_layer_norm"),
  *embedding("transformer.decoder.{e:query_embed|reference_points|presence_token}", "detr_decoder/{e}"),
  *_numbered_mlp("transformer.decoder.bbox_embed", "detr_decoder/box_head", 3),
  *_numbered_mlp("transformer.decoder.presence_token_head", "detr_decoder/presence_head", 3),
  *_numbered_mlp("transformer.decoder.ref_point_head", "detr_decoder/ref_point_head", 2),
  *_numbered_mlp("transformer.decoder.boxRPB_embed_{a:x|y}", "detr_decoder/box_rpb_embed_{a}", 2),
  *conv("segmentation_head.pixel_decoder.conv_layers.{i}", "mask_decoder/pixel_decoder/conv_layers_{i}"),
  *norm("segmentation_head.pixel_decoder.norms.{i}", "mask_decoder/pixel_decoder/norms_{i}"),
  *linear("segmentation_head.mask_predictor.mask_embed.layers.{i}", "mask_decoder/mask_embedder/layers_{i}"),
  *torch_attention("segmentation_head.cross_attend_prompt", "mask_decoder/prompt_cross_attn"),
  *norm("segmentation_head.cross_attn_norm", "mask_decoder/prompt_cross_attn_norm"),
  *conv("segmentation_head.{h:semantic|instance}_seg_head", "mask_decoder/{h}_projection"),
  *_numbered_mlp("dot_prod_scoring.prompt_mlp", "dot_product_scoring/text_mlp", 2),
  *norm("dot_prod_scoring.prompt_mlp.out_norm", "dot_product_scoring/text_mlp_out_norm"),
  *linear("dot_prod_scoring.prompt_proj", "dot_product_scoring/text_proj"),
  *linear("dot_prod_scoring.hs_proj", "dot_product_scoring/query_proj"),
)

_TEXT = "backbone.language_backbone.encoder"
_BLOCK = f"{_TEXT}.transformer.{{i}}"
_LAYER = "text_encoder/layers_{i}"
MOBILECLIP: tuple[Rule, ...] = (
  Rule(f"{_TEXT}.projection_layer", "text_encoder/projection/kernel"),  # stored [in, out], like ours
  *embedding(f"{_TEXT}.embedding_layer", "text_encoder/embeddings/token_embedding"),
  Rule(
    f"{_TEXT}.positional_embedding.pos_embed.pos_embed",
    "text_encoder/embeddings/position_embedding",
    "squeeze_table",
  ),
  *norm(f"{_BLOCK}.pre_norm_mha.0", f"{_LAYER}/layer_norm1"),
  *fused_qkv(f"{_BLOCK}.pre_norm_mha.1.qkv_proj.", f"{_LAYER}/self_attn"),
  *linear(f"{_BLOCK}.pre_norm_mha.1.out_proj", f"{_LAYER}/self_attn/out_proj"),
  *norm(f"{_BLOCK}.pre_norm_ffn.0", f"{_LAYER}/layer_norm2"),
  *linear(f"{_BLOCK}.pre_norm_ffn.1", f"{_LAYER}/mlp/fc1"),
  *linear(f"{_BLOCK}.pre_norm_ffn.4", f"{_LAYER}/mlp/fc2"),
  *norm(f"{_TEXT}.final_layer_norm", "text_encoder/final_layer_norm"),
  *linear("backbone.language_backbone.projector", "text_projection"),
  # RepMixer blocks
  Rule(f"{_BLOCK}.layer_scale", f"{_LAYER}/layer_scale", "squeeze_scale"),
  Rule(f"{_BLOCK}.token_mixer.layer_scale", f"{_LAYER}/token_mixer/layer_scale", "squeeze_scale"),
  *batch_norm(f"{_BLOCK}.token_mixer.norm.rbr_skip", f"{_LAYER}/token_mixer/reference_batchnorm"),
  *batch_norm(f"{_BLOCK}.token_mixer.mixer.rbr_skip", f"{_LAYER}/token_mixer/mixer/batchnorm_skip"),
  *batch_norm(f"{_BLOCK}.token_mixer.mixer.rbr_conv.0.bn", f"{_LAYER}/token_mixer/mixer/batchnorm_conv"),
  *kernel(
    f"{_BLOCK}.token_mixer.mixer.rbr_conv.0.conv", f"{_LAYER}/token_mixer/mixer/conv", "depthwise_conv"
  ),
  *kernel(f"{_BLOCK}.convffn.conv.conv", f"{_LAYER}/conv_feed_forward/depthwise_conv", "depthwise_conv"),
  *batch_norm(f"{_BLOCK}.convffn.conv.bn", f"{_LAYER}/conv_feed_forward/depthwise_batchnorm"),
  *with_bias(f"{_BLOCK}.convffn.{{f:fc1|fc2}}", f"{_LAYER}/conv_feed_forward/mlp/{{f}}", "conv_1x1"),
)

_RESBLOCK = f"{_TEXT}.transformer.resblocks.{{i}}"
CLIP: tuple[Rule, ...] = (
  Rule(f"{_TEXT}.positional_embedding", "text_encoder/embeddings/position_embedding"),
  Rule(f"{_TEXT}.text_projection", "text_encoder/projection/kernel"),  # stored [in, out], like ours
  *embedding(f"{_TEXT}.token_embedding", "text_encoder/embeddings/token_embedding"),
  *torch_attention(f"{_RESBLOCK}.attn", f"{_LAYER}/self_attn", out="out_proj"),
  *norm(f"{_RESBLOCK}.ln_{{n:1|2}}", f"{_LAYER}/layer_norm{{n}}"),
  *linear(f"{_RESBLOCK}.mlp.c_fc", f"{_LAYER}/mlp/fc1"),
  *linear(f"{_RESBLOCK}.mlp.c_proj", f"{_LAYER}/mlp/fc2"),
  *norm(f"{_TEXT}.ln_final", "text_encoder/final_layer_norm"),
  *linear("backbone.language_backbone.resizer", "text_projection"),
)
