"""transformers' key names. Ours follow them, so only the kinds of layers have to be told apart.

Source: the state dicts of transformers 5.23.0 `Sam3LiteTextModel` and `Sam3Model`.
"""

from __future__ import annotations

from sam3lt_jax.checkpoints.rules import (
  Rule,
  batch_norm,
  conv,
  conv_transpose,
  embedding,
  kernel,
  linear,
  norm,
  same,
  value,
  with_bias,
)

_QKVO = "{p:q_proj|k_proj|v_proj|o_proj}"
_MLP = "{f:fc1|fc2}"
DETECTOR: tuple[Rule, ...] = (
  *same(value, "vision_encoder.backbone.embeddings.position_embeddings"),
  *same(kernel, "vision_encoder.backbone.embeddings.patch_embeddings.projection", transform="conv"),
  *same(conv_transpose, "vision_encoder.neck.fpn_layers.{i}.scale_layers.{j}"),
  *same(
    conv,
    "vision_encoder.neck.fpn_layers.{i}.{p:proj1|proj2}",
    "geometry_encoder.boxes_pool_project",
    "mask_decoder.pixel_decoder.conv_layers.{i}",
    "mask_decoder.{p:instance_projection|semantic_projection}",
  ),
  *same(
    linear,
    f"vision_encoder.backbone.layers.{{i}}.attention.{_QKVO}",
    f"vision_encoder.backbone.layers.{{i}}.mlp.{_MLP}",
    "geometry_encoder.{p:boxes_direct_project|boxes_pos_enc_project|final_proj}",
    f"geometry_encoder.layers.{{i}}.{{a:self_attn|cross_attn}}.{_QKVO}",
    f"geometry_encoder.layers.{{i}}.mlp.{_MLP}",
    f"detr_encoder.layers.{{i}}.{{a:self_attn|cross_attn}}.{_QKVO}",
    f"detr_encoder.layers.{{i}}.mlp.{_MLP}",
    f"detr_decoder.layers.{{i}}.{{a:self_attn|text_cross_attn|vision_cross_attn}}.{_QKVO}",
    f"detr_decoder.layers.{{i}}.mlp.{_MLP}",
    "detr_decoder.{h:box_head|presence_head}.{l:layer1|layer2|layer3}",
    "detr_decoder.{h:ref_point_head|box_rpb_embed_x|box_rpb_embed_y}.{l:layer1|layer2}",
    "mask_decoder.mask_embedder.layers.{i}",
    f"mask_decoder.prompt_cross_attn.{_QKVO}",
    "dot_product_scoring.text_mlp.{l:layer1|layer2}",
    "dot_product_scoring.{p:text_proj|query_proj}",
    "text_projection",
  ),
  *same(
    norm,
    "vision_encoder.backbone.layer_norm",
    "vision_encoder.backbone.layers.{i}.{n:layer_norm1|layer_norm2}",
    "geometry_encoder.{n:vision_layer_norm|prompt_layer_norm|output_layer_norm}",
    "geometry_encoder.layers.{i}.{n:layer_norm1|layer_norm2|layer_norm3}",
    "detr_encoder.layers.{i}.{n:layer_norm1|layer_norm2|layer_norm3}",
    "detr_decoder.layers.{i}.{n:(?:self_attn|text_cross_attn|vision_cross_attn|mlp)_layer_norm}",
    "detr_decoder.{n:output_layer_norm|presence_layer_norm}",
    "mask_decoder.pixel_decoder.norms.{i}",
    "mask_decoder.prompt_cross_attn_norm",
    "dot_product_scoring.text_mlp_out_norm",
  ),
  *same(
    embedding,
    "geometry_encoder.{e:label_embed|cls_embed}",
    "detr_decoder.{e:query_embed|reference_points|presence_token}",
  ),
)

_LAYER = "text_encoder.layers.{i}"
MOBILECLIP: tuple[Rule, ...] = (
  *same(embedding, "text_encoder.embeddings.token_embedding"),
  Rule(
    "text_encoder.embeddings.position_embedding.position_embedding",
    "text_encoder/embeddings/position_embedding",
    "squeeze_table",
  ),
  *same(norm, f"{_LAYER}.{{n:layer_norm1|layer_norm2}}", "text_encoder.final_layer_norm"),
  *same(linear, f"{_LAYER}.self_attn.{{p:q_proj|k_proj|v_proj|out_proj}}", f"{_LAYER}.mlp.{_MLP}"),
  *same(kernel, "text_encoder.projection", transform="linear"),
  # RepMixer blocks
  *same(value, f"{_LAYER}.layer_scale", f"{_LAYER}.token_mixer.layer_scale", transform="squeeze_scale"),
  *same(
    batch_norm,
    f"{_LAYER}.token_mixer.reference_batchnorm",
    f"{_LAYER}.token_mixer.mixer.{{b:batchnorm_skip|batchnorm_conv}}",
    f"{_LAYER}.conv_feed_forward.depthwise_batchnorm",
  ),
  *same(
    kernel,
    f"{_LAYER}.token_mixer.mixer.conv",
    f"{_LAYER}.conv_feed_forward.depthwise_conv",
    transform="depthwise_conv",
  ),
  *same(with_bias, f"{_LAYER}.conv_feed_forward.mlp.{_MLP}", transform="conv_1x1"),
)

_CLIP = "text_encoder.text_model"
CLIP: tuple[Rule, ...] = (
  *embedding(f"{_CLIP}.embeddings.token_embedding", "text_encoder/embeddings/token_embedding"),
  Rule(f"{_CLIP}.embeddings.position_embedding.weight", "text_encoder/embeddings/position_embedding"),
  *linear(
    f"{_CLIP}.encoder.layers.{{i}}.self_attn.{{p:q_proj|k_proj|v_proj|out_proj}}",
    "text_encoder/layers_{i}/self_attn/{p}",
  ),
  *linear(f"{_CLIP}.encoder.layers.{{i}}.mlp.{_MLP}", "text_encoder/layers_{i}/mlp/{f}"),
  *norm(f"{_CLIP}.encoder.layers.{{i}}.{{n:layer_norm1|layer_norm2}}", "text_encoder/layers_{i}/{n}"),
  *norm(f"{_CLIP}.final_layer_norm", "text_encoder/final_layer_norm"),
  *kernel("text_encoder.text_projection", "text_encoder/projection", "linear"),
)
