"""transformers' key names. Ours follow them, so only the kinds of layers have to be told apart.

Source: the state dicts of transformers 5.23.0 `Sam3LiteTextModel` and `Sam3Model`.
"""

from __future__ import annotations

from sam3lt_jax.checkpoints.rules import Rule, batch_norm, conv, embedding, linear, norm, with_bias


def _same_path(path: str) -> str:
  """`layers.{i}.fc` -> `layers_{i}/fc`: a list index joins the name before it."""
  return path.replace(".{i}", "_{i}").replace(".", "/")


def _linears(*paths: str) -> list[Rule]:
  return [rule for path in paths for rule in linear(path, _same_path(path))]


def _norms(*paths: str) -> list[Rule]:
  return [rule for path in paths for rule in norm(path, _same_path(path))]


def _embeddings(*paths: str) -> list[Rule]:
  return [embedding(path, _same_path(path)) for path in paths]


_QKVO = "{p:q_proj|k_proj|v_proj|o_proj}"
DETECTOR: tuple[Rule, ...] = (
  Rule(
    "vision_encoder.backbone.embeddings.position_embeddings",
    "vision_encoder/backbone/embeddings/position_embeddings",
  ),
  Rule(
    "vision_encoder.backbone.embeddings.patch_embeddings.projection.weight",
    "vision_encoder/backbone/embeddings/patch_embeddings/projection/kernel",
    "conv",
  ),
  *_norms(
    "vision_encoder.backbone.layer_norm",
    "vision_encoder.backbone.layers.{i}.{n:layer_norm1|layer_norm2}",
  ),
  *_linears(
    f"vision_encoder.backbone.layers.{{i}}.attention.{_QKVO}",
    "vision_encoder.backbone.layers.{i}.mlp.{f:fc1|fc2}",
  ),
  *with_bias(
    "vision_encoder.neck.fpn_layers.{i}.scale_layers.{j}",
    "vision_encoder/neck/fpn_layers_{i}/scale_layers_{j}",
    "conv_transpose",
  ),
  *conv("vision_encoder.neck.fpn_layers.{i}.{p:proj1|proj2}", "vision_encoder/neck/fpn_layers_{i}/{p}"),
  *_embeddings("geometry_encoder.{e:label_embed|cls_embed}"),
  *_linears(
    "geometry_encoder.{p:boxes_direct_project|boxes_pos_enc_project|final_proj}",
    f"geometry_encoder.layers.{{i}}.{{a:self_attn|cross_attn}}.{_QKVO}",
    "geometry_encoder.layers.{i}.mlp.{f:fc1|fc2}",
  ),
  *conv("geometry_encoder.boxes_pool_project", "geometry_encoder/boxes_pool_project"),
  *_norms(
    "geometry_encoder.{n:vision_layer_norm|prompt_layer_norm|output_layer_norm}",
    "geometry_encoder.layers.{i}.{n:layer_norm1|layer_norm2|layer_norm3}",
    "detr_encoder.layers.{i}.{n:layer_norm1|layer_norm2|layer_norm3}",
  ),
  *_linears(
    f"detr_encoder.layers.{{i}}.{{a:self_attn|cross_attn}}.{_QKVO}",
    "detr_encoder.layers.{i}.mlp.{f:fc1|fc2}",
    f"detr_decoder.layers.{{i}}.{{a:self_attn|text_cross_attn|vision_cross_attn}}.{_QKVO}",
    "detr_decoder.layers.{i}.mlp.{f:fc1|fc2}",
    "detr_decoder.{h:box_head|presence_head}.{l:layer1|layer2|layer3}",
    "detr_decoder.{h:ref_point_head|box_rpb_embed_x|box_rpb_embed_y}.{l:layer1|layer2}",
  ),
  *_norms(
    "detr_decoder.layers.{i}.{n:(?:self_attn|text_cross_attn|vision_cross_attn|mlp)_layer_norm}",
    "detr_decoder.{n:output_layer_norm|presence_layer_norm}",
  ),
  *_embeddings("detr_decoder.{e:query_embed|reference_points|presence_token}"),
  *conv("mask_decoder.pixel_decoder.conv_layers.{i}", "mask_decoder/pixel_decoder/conv_layers_{i}"),
  *_norms("mask_decoder.pixel_decoder.norms.{i}", "mask_decoder.prompt_cross_attn_norm"),
  *_linears("mask_decoder.mask_embedder.layers.{i}", f"mask_decoder.prompt_cross_attn.{_QKVO}"),
  *conv("mask_decoder.{p:instance_projection|semantic_projection}", "mask_decoder/{p}"),
  *_linears(
    "dot_product_scoring.text_mlp.{l:layer1|layer2}", "dot_product_scoring.{p:text_proj|query_proj}"
  ),
  *_norms("dot_product_scoring.text_mlp_out_norm"),
  *_linears("text_projection"),
)  # fmt: skip

MOBILECLIP: tuple[Rule, ...] = (
  *_embeddings("text_encoder.embeddings.token_embedding"),
  Rule(
    "text_encoder.embeddings.position_embedding.position_embedding",
    "text_encoder/embeddings/position_embedding",
    "squeeze_table",
  ),
  *_norms("text_encoder.layers.{i}.{n:layer_norm1|layer_norm2}", "text_encoder.final_layer_norm"),
  *_linears(
    "text_encoder.layers.{i}.self_attn.{p:q_proj|k_proj|v_proj|out_proj}",
    "text_encoder.layers.{i}.mlp.{f:fc1|fc2}",
  ),
  Rule("text_encoder.projection.weight", "text_encoder/projection/kernel", "linear"),
  # RepMixer blocks
  Rule("text_encoder.layers.{i}.layer_scale", "text_encoder/layers_{i}/layer_scale", "squeeze_scale"),
  Rule(
    "text_encoder.layers.{i}.token_mixer.layer_scale",
    "text_encoder/layers_{i}/token_mixer/layer_scale",
    "squeeze_scale",
  ),
  *batch_norm(
    "text_encoder.layers.{i}.token_mixer.reference_batchnorm",
    "text_encoder/layers_{i}/token_mixer/reference_batchnorm",
  ),
  *batch_norm(
    "text_encoder.layers.{i}.token_mixer.mixer.{b:batchnorm_skip|batchnorm_conv}",
    "text_encoder/layers_{i}/token_mixer/mixer/{b}",
  ),
  Rule(
    "text_encoder.layers.{i}.token_mixer.mixer.conv.weight",
    "text_encoder/layers_{i}/token_mixer/mixer/conv/kernel",
    "depthwise_conv",
  ),
  Rule(
    "text_encoder.layers.{i}.conv_feed_forward.depthwise_conv.weight",
    "text_encoder/layers_{i}/conv_feed_forward/depthwise_conv/kernel",
    "depthwise_conv",
  ),
  *batch_norm(
    "text_encoder.layers.{i}.conv_feed_forward.depthwise_batchnorm",
    "text_encoder/layers_{i}/conv_feed_forward/depthwise_batchnorm",
  ),
  *with_bias(
    "text_encoder.layers.{i}.conv_feed_forward.mlp.{f:fc1|fc2}",
    "text_encoder/layers_{i}/conv_feed_forward/mlp/{f}",
    "conv_1x1",
  ),
)

_CLIP = "text_encoder.text_model"
CLIP: tuple[Rule, ...] = (
  embedding(f"{_CLIP}.embeddings.token_embedding", "text_encoder/embeddings/token_embedding"),
  Rule(f"{_CLIP}.embeddings.position_embedding.weight", "text_encoder/embeddings/position_embedding"),
  *linear(
    f"{_CLIP}.encoder.layers.{{i}}.self_attn.{{p:q_proj|k_proj|v_proj|out_proj}}",
    "text_encoder/layers_{i}/self_attn/{p}",
  ),
  *linear(f"{_CLIP}.encoder.layers.{{i}}.mlp.{{f:fc1|fc2}}", "text_encoder/layers_{i}/mlp/{f}"),
  *norm(f"{_CLIP}.encoder.layers.{{i}}.{{n:layer_norm1|layer_norm2}}", "text_encoder/layers_{i}/{n}"),
  *norm(f"{_CLIP}.final_layer_norm", "text_encoder/final_layer_norm"),
  Rule("text_encoder.text_projection.weight", "text_encoder/projection/kernel", "linear"),
)
