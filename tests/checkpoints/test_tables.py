import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from sam3lt_jax.checkpoints import engine, infer, tables
from sam3lt_jax.checkpoints.errors import CheckpointError
from sam3lt_jax.checkpoints.pretrained import abstract_leaves
from sam3lt_jax.checkpoints.rules import TRANSFORMS
from sam3lt_jax.checkpoints.summary import parameter_summary
from sam3lt_jax.config import Sam3LiteTextConfig
from sam3lt_jax.model import Sam3LiteText
from tests.checkpoints.common import FIXTURES, VARIANTS, real_size_layout

KINDS = {"s0": "mobileclip", "s1": "mobileclip", "l": "mobileclip", "sam3": "clip"}
UNUSED = re.compile(r".*(\.freqs_cis|\.sam2_convs\..*|geometry_encoder\.points_.*)|tracker\..*")
LAYOUTS = [(name, kind) for name in tables.LAYOUTS for kind in ("mobileclip", "clip")]


def released_config(variant):
  config = getattr(Sam3LiteTextConfig, variant)()
  if variant == "sam3":
    return config
  return config.replace(text=dataclasses.replace(config.text, max_position_embeddings=77))


@pytest.mark.parametrize(("name", "kind"), LAYOUTS)
def test_rules_are_sound(name, kind):
  rules = tables.layout(name, kind).rules
  sources = [rule.source for rule in rules]
  assert len(set(sources)) == len(sources)
  for rule in rules:
    for pattern in rule.target_patterns:
      assert set(pattern.groupindex) == set(rule.source_pattern.groupindex), rule
    parts = 3 if rule.transform.startswith("split") else 1
    assert len(rule.targets) == parts, rule
    assert rule.transform in TRANSFORMS


_HALF = np.arange(12.0).reshape(6, 2)
_EXAMPLES = {
  "same": np.arange(4.0),
  "linear": np.arange(6.0).reshape(2, 3),
  "conv": np.arange(120.0).reshape(2, 3, 4, 5),
  "conv_transpose": np.arange(120.0).reshape(2, 3, 4, 5),
  "depthwise_conv": np.arange(10.0).reshape(2, 1, 1, 5),
  "conv_1x1": np.arange(6.0).reshape(2, 3, 1, 1),
  "split_linear": _HALF,
  "split_bias": np.arange(6.0),
  "split_four_rows": np.arange(12.0).reshape(4, 3),
  "drop_class_row": np.concatenate([np.zeros((1, 1, 3)), np.arange(12.0).reshape(1, 4, 3)], axis=1),
  "squeeze_table": np.arange(6.0).reshape(1, 1, 2, 3),
  "squeeze_scale": np.arange(3.0).reshape(3, 1, 1),
}


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_transforms_are_invertible(name):
  transform, x = TRANSFORMS[name], _EXAMPLES[name]
  assert transform.accepts(x.shape)
  np.testing.assert_array_equal(transform.inverse(transform.forward(x)), x)
  if transform.form is not None:
    assert not transform.accepts((*x.shape, 2))
    assert not transform.accepts(())


def test_transforms_by_hand():
  def apply(name):
    return TRANSFORMS[name].forward(_EXAMPLES[name])

  assert apply("linear")[0][2, 1] == _EXAMPLES["linear"][1, 2]
  assert apply("conv")[0][3, 4, 2, 1] == _EXAMPLES["conv"][1, 2, 3, 4]
  assert apply("conv_transpose")[0][3, 4, 1, 2] == _EXAMPLES["conv_transpose"][1, 2, 3, 4]
  assert apply("depthwise_conv")[0].shape == (5, 1, 2)
  assert apply("depthwise_conv")[0][4, 0, 1] == _EXAMPLES["depthwise_conv"][1, 0, 0, 4]
  q, k, v = apply("split_linear")
  np.testing.assert_array_equal(q, [[0, 2], [1, 3]])
  np.testing.assert_array_equal(k, [[4, 6], [5, 7]])
  np.testing.assert_array_equal(v, [[8, 10], [9, 11]])
  np.testing.assert_array_equal(apply("split_bias")[1], [2, 3])
  np.testing.assert_array_equal(apply("drop_class_row")[0][0, 0], [0, 1, 2])


@pytest.mark.full  # 9 s
@pytest.mark.parametrize("variant", VARIANTS)
def test_released_files_match_the_model_exactly(variant):
  keys = real_size_layout(variant)
  layout = tables.detect(keys, "file")
  assert (layout.name, layout.text_kind) == ("original", KINDS[variant])
  tensors = {k: jax.ShapeDtypeStruct(shape, np.dtype(dtype)) for k, (shape, dtype) in keys.items()}
  target = abstract_leaves(Sam3LiteText(released_config(variant)))
  sources, problems = engine.assign(layout, {k: t.shape for k, t in tensors.items()})
  engine.check(sources, problems, tensors, target)
  assert not problems, problems
  assert sources.keys() == target.keys()
  ignored = {k for k in keys if layout.is_ignored(layout.canonical(k))}
  counters = {k for k in keys if k.endswith("num_batches_tracked")}
  assert ignored - counters == {k for k in keys if UNUSED.fullmatch(k)}
  assert counters == (ignored & counters)


@pytest.mark.parametrize("variant", VARIANTS)
def test_export_gives_the_released_keys(variant):
  target = abstract_leaves(Sam3LiteText(released_config(variant)))
  entries = engine.export_tensors(tables.layout("original", KINDS[variant]), target)
  expected = {k: v for k, v in real_size_layout(variant).items() if not UNUSED.fullmatch(k)}
  assert {k: (e.shape, e.dtype.name) for k, e in entries.items()} == expected


def released_shapes(variant):
  keys = real_size_layout(variant)
  sources, _ = engine.assign(tables.detect(keys, "file"), {k: shape for k, (shape, _) in keys.items()})
  return {leaf: s.shape for leaf, s in sources.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("profile", ["original", "transformers"])
def test_released_models_are_known_by_their_tensors(variant, profile):
  shapes, config = released_shapes(variant), released_config(variant)
  found = infer.released_config(shapes, KINDS[variant], "file", profile)
  assert found == (config if profile == "original" else config.replace(profile=profile))
  released = {leaf: tuple(x.shape) for leaf, x in abstract_leaves(Sam3LiteText(config)).items()}
  infer.check_released(found, shapes, released, "file")
  infer.check_counts(found, shapes, "file")


def test_what_differs_from_the_released_model_is_said():
  config, shapes = released_config("s1"), released_shapes("s1")
  released = dict(shapes)
  shapes["params/detr_decoder/query_embed/embedding"] = (300, 256)
  shapes["params/detr_encoder/layers_6/layer_norm1/bias"] = (256,)
  with pytest.raises(CheckpointError) as caught:
    infer.check_released(config, shapes, released, "m.pt")
  assert str(caught.value) == (
    "m.pt has the text encoder of SAM3-LiteText-S1 (MobileCLIP text encoder, 12 layers of 512), but is not"
    " that model: detr_decoder/query_embed/embedding is [300, 256] and not [200, 256];"
    " detr_encoder.num_layers is 7 and not 6; pass config= with its sizes"
  )
  shapes |= {leaf: (1,) for leaf in list(released)[:9]}
  with pytest.raises(CheckpointError, match=r"; .*; .* and 8 more; pass config="):
    infer.check_released(config, shapes, released, "m.pt")


_MANY = 10**6


@pytest.mark.parametrize(
  ("part", "changes", "told"),
  [
    ("vision", {"num_hidden_layers": _MANY}, "vision.num_hidden_layers=1000000, the tensors are for 32"),
    ("vision", {"scale_factors": (1.0,) * 9}, "vision.scale_factors=9, the tensors are for 4"),
    ("text", {"num_hidden_layers": _MANY}, "text.num_hidden_layers=1000000, the tensors are for 12"),
    ("geometry_encoder", {"num_layers": _MANY}, "geometry_encoder.num_layers=1000000, the tensors are for 3"),
    ("detr_encoder", {"num_layers": 7}, "detr_encoder.num_layers=7, the tensors are for 6"),
    ("detr_decoder", {"num_layers": 7}, "detr_decoder.num_layers=7, the tensors are for 6"),
    (
      "mask_decoder", {"num_upsampling_stages": _MANY},
      "mask_decoder.num_upsampling_stages=1000000, the tensors are for 3",
    ),
  ],
)  # fmt: skip
def test_more_layers_than_tensors_are_refused_before_a_model_is_built(part, changes, told):
  config = released_config("s1")
  config = config.replace(**{part: dataclasses.replace(getattr(config, part), **changes)})
  with pytest.raises(CheckpointError, match=told):
    infer.check_counts(config, released_shapes("s1"), "file")


@pytest.mark.parametrize(("variant", "count"), [("s0", 42_541_312), ("s1", 63_528_192), ("l", 123_800_320)])
def test_parameter_counts(variant, count):
  """With the 16 rows of positions that the paper counts; the files have 77."""
  config = released_config(variant)
  leaves = abstract_leaves(Sam3LiteText(config))
  parts = {p.name: p for p in parameter_summary(engine.unflatten(leaves))}
  assert parts["text encoder"].parameters == count + (77 - 16) * config.text.hidden_size
  assert parts["vision encoder"].parameters == 454_038_784
  assert parts["total"].parameters == sum(p.parameters for n, p in parts.items() if n != "total")
  statistics = sum(np.prod(x.shape) for k, x in leaves.items() if k.startswith("batch_stats/"))
  assert parts["total"].bytes == 4 * (parts["total"].parameters + statistics)


def test_both_tables_agree_with_the_verified_mapping():
  """The mapping was verified by running both codes; here each side goes through its own table."""
  mapping = json.loads((FIXTURES / "mapping_tiny_original_to_transformers.json").read_text())
  original, transformers = tables.layout("original"), tables.layout("transformers")

  def leaves(layout, key):
    name = layout.canonical(key)
    (found,) = [r.leaves(m) for r in layout.rules if (m := r.source_pattern.fullmatch(name))]
    return found

  for key, value in mapping["mapped"].items():
    name = value.split(" [")[0]
    names = [name.replace("{q,k,v}", p) for p in "qkv"] if "{q,k,v}" in name else [name]
    assert leaves(original, key) == tuple(leaves(transformers, n)[0] for n in names), key
  for key in mapping["not mapped"]:
    assert original.is_ignored(original.canonical(key)), key


@pytest.mark.parametrize(
  ("key", "kind", "leaf"),
  [
    ("detector_model.text_projection.bias", "mobileclip", "text_projection/bias"),
    ("detector_model.text_encoder.final_layer_norm.bias", "mobileclip", "text_encoder/final_layer_norm/bias"),
    ("text_encoder.final_layer_norm.bias", "clip", "text_encoder/final_layer_norm/bias"),
    ("text_encoder.text_model.final_layer_norm.bias", "clip", "text_encoder/final_layer_norm/bias"),
    ("text_encoder.encoder.layers.2.mlp.fc1.bias", "clip", "text_encoder/layers_2/mlp/fc1/bias"),
    (
      "text_encoder.embeddings.position_embedding.weight",
      "clip",
      "text_encoder/embeddings/position_embedding",
    ),
  ],
)
def test_transformers_prefixes(key, kind, leaf):
  sources, problems = engine.assign(tables.layout("transformers", kind), {key: (8, 4)})
  assert not problems.unmapped
  assert list(sources) == [f"params/{leaf}"]


@pytest.mark.parametrize("prefix", ["", "detector.", "student_trunk.", "detector.student_trunk."])
def test_original_prefixes(prefix):
  key = f"{prefix}backbone.vision_backbone.trunk.ln_pre.bias"
  inner = key.replace("trunk.ln_pre", "student_trunk.trunk.ln_pre")
  for k in (key, inner):
    sources, problems = engine.assign(tables.layout("original"), {k: (8,)})
    assert not problems
    assert list(sources) == ["params/vision_encoder/backbone/layer_norm/bias"]


@pytest.mark.parametrize(
  "wrapped",
  [
    "module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "model.{}", "model.model.{}",
    "model.module._orig_mod.{}", "state_dict.model.{}", "_forward_module.model.{}", "network.{}",
    "_fsdp_wrapped_module.{}",
  ],
)  # fmt: skip
@pytest.mark.parametrize(
  ("key", "layout"),
  [
    ("detector.backbone.vision_backbone.trunk.ln_pre.bias", "original"),
    ("backbone.vision_backbone.trunk.ln_pre.bias", "original"),
    ("vision_encoder.backbone.layer_norm.bias", "transformers"),
    ("detector_model.vision_encoder.backbone.layer_norm.bias", "transformers"),
  ],
)
def test_wrappers_are_taken_off(wrapped, key, layout):
  found = tables.detect([wrapped.format(key)], "file")
  assert found.name == layout
  sources, problems = engine.assign(found, {wrapped.format(key): (8,), "n_averaged": ()})
  assert not problems and list(sources) == ["params/vision_encoder/backbone/layer_norm/bias"]


def test_wrapped_parts_and_derived_tables():
  blocks = "backbone.vision_backbone.trunk.blocks.3"
  key = f"module.detector.{blocks}._checkpoint_wrapped_module._orig_mod.norm1.bias"
  sources, problems = engine.assign(tables.layout("original"), {key: (8,)})
  assert not problems and list(sources) == ["params/vision_encoder/backbone/layers_3/layer_norm1/bias"]
  for name in ("freqs_cis", "freqs_cis_real", "freqs_cis_imag"):
    table = {f"detector.{blocks}.attn.{name}": (576, 32)}
    assert engine.assign(tables.layout("original"), table) == ({}, engine.Problems())
  both = {"module.text_projection.bias": (8,), "text_projection.bias": (8,)}
  assert engine.assign(tables.layout("transformers"), both)[1].doubled  # never one over the other


def test_patterns_are_anchored():
  layout = tables.layout("transformers")
  for key in (
    "xtext_projection.bias",
    "text_projection.bias.x",
    "text_projectionxbias",
    "a.text_projection.bias",
  ):
    assert engine.assign(layout, {key: (8,)})[1].unmapped == [key]
  assert engine.assign(layout, {"tracker_model.a.b": (1,), "tracker_neck.c": (2,)}) == ({}, engine.Problems())


def test_unknown_layouts():
  with pytest.raises(CheckpointError, match=r"m\.pt holds no SAM3-LiteText detector.*2 keys.*\(a, b\)"):
    tables.detect(["a", "b"], "m.pt")
  with pytest.raises(ValueError, match="layout must be one of 'transformers', 'original', got 'flax'"):
    tables.layout("flax")
  with pytest.raises(ValueError, match="text_kind must be"):
    tables.layout("original", "bert")
