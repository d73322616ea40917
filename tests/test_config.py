"""Configurations: the released numbers, transformers' schema, and what is refused."""

import dataclasses
import json

import pytest

from sam3lt_jax import Profile, Sam3LiteTextConfig
from sam3lt_jax.config import TextConfig, VisionConfig
from tests import tiny

VARIANTS = {name: getattr(Sam3LiteTextConfig, name) for name in ("s0", "s1", "l", "sam3")}


def test_vision_numbers():
  v = Sam3LiteTextConfig.s0().vision
  assert (v.hidden_size, v.num_hidden_layers, v.num_attention_heads, v.intermediate_size) == (
    1024,
    32,
    16,
    4736,
  )
  assert (v.image_size, v.patch_size, v.window_size, v.pretrain_image_size, v.pretrain_grid) == (
    1008,
    14,
    24,
    336,
    24,
  )
  assert v.global_attn_indexes == (7, 15, 23, 31)
  assert v.scale_factors == (4.0, 2.0, 1.0, 0.5)
  assert all(make().vision == v for make in VARIANTS.values())


@pytest.mark.parametrize(
  "name, width, heads, layers, mlp, repmixer, rows, kind",
  [
    ("s0", 512, 8, 6, 2048, True, 16, "mobileclip"),
    ("s1", 512, 8, 12, 2048, False, 16, "mobileclip"),
    ("l", 768, 12, 12, 3072, False, 16, "mobileclip"),
    ("sam3", 1024, 16, 24, 4096, False, 32, "clip"),
  ],
)
def test_text_numbers(name, width, heads, layers, mlp, repmixer, rows, kind):
  t = VARIANTS[name]().text
  assert (t.hidden_size, t.num_attention_heads, t.num_hidden_layers, t.intermediate_size) == (
    width,
    heads,
    layers,
    mlp,
  )
  assert (t.use_repmixer_blocks, t.max_position_embeddings, t.kind, t.vocab_size) == (
    repmixer,
    rows,
    kind,
    49408,
  )
  assert t.repmixer_kernel_size == 11
  assert t.layer_norm_eps == t.batch_norm_eps == 1e-5


def test_detector_numbers():
  c = Sam3LiteTextConfig.s1()
  assert (c.geometry_encoder.num_layers, c.detr_encoder.num_layers, c.detr_decoder.num_layers) == (3, 6, 6)
  assert c.detr_decoder.num_queries == 200
  for part in (c.geometry_encoder, c.detr_encoder, c.detr_decoder):
    assert (part.hidden_size, part.num_attention_heads, part.intermediate_size, part.dropout) == (
      256,
      8,
      2048,
      0.1,
    )
  assert (c.mask_decoder.hidden_size, c.mask_decoder.num_upsampling_stages, c.mask_decoder.num_groups) == (
    256,
    3,
    8,
  )


def test_profiles_differ_where_the_references_do():
  original, transformers = Profile.original(), Profile.transformers()
  values = dataclasses.asdict(original), dataclasses.asdict(transformers)
  assert {k: (values[0][k], values[1][k]) for k in values[0]} == {
    "name": ("original", "transformers"),
    "pad_token_id": (0, 49407),
    "context_length": (16, 32),
    "mask_text_padding": (False, True),
    "position_policy": ("slice", "interpolate"),
    "geometry_cls": ("always", "with_boxes"),
    "vit_layer_norm_eps": (1e-5, 1e-6),
    "presence_logit_clamp": (None, 10.0),
    "text_cleaning": ("original", "transformers"),
    "mask_order": ("upsample_then_sigmoid", "sigmoid_then_upsample"),
    "score_threshold": (0.5, 0.3),
    "training_dropout": ("original", "transformers"),
  }


def test_the_profile_is_the_users_choice():
  assert Sam3LiteTextConfig.s0().profile == Profile.original()
  assert Sam3LiteTextConfig.s0("transformers").profile == Profile.transformers()
  mixture = dataclasses.replace(Profile.original(), name="mine", score_threshold=0.4)
  assert Sam3LiteTextConfig.l(mixture).profile is mixture
  assert Sam3LiteTextConfig.sam3().profile.context_length == 32
  assert Sam3LiteTextConfig.sam3("transformers").profile.context_length == 32
  assert Sam3LiteTextConfig.s0().replace(profile="transformers").profile == Profile.transformers()


def test_configurations_are_frozen_and_hashable():
  config = Sam3LiteTextConfig.s0()
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.profile = Profile.transformers()
  assert hash(config) == hash(Sam3LiteTextConfig.s0())
  assert config != Sam3LiteTextConfig.s1()


MIXTURE = dataclasses.replace(
  Profile.transformers(), name="mine", presence_logit_clamp=None, geometry_cls="always"
)
EVERY = {
  **{f"{name}-original": make() for name, make in VARIANTS.items()},
  **{f"{name}-transformers": make("transformers") for name, make in VARIANTS.items()},
  "tiny": tiny.config(),
  "mixture": Sam3LiteTextConfig.s0(MIXTURE),
  "odd": tiny.config(
    vision=VisionConfig(image_size=28, rope_theta=100.0, drop_path_rate=0.3, global_attn_indexes=()),
    text=TextConfig(fused=True, use_repmixer_blocks=True, repmixer_kernel_size=5),
  ),
}


@pytest.mark.parametrize("name", EVERY)
def test_json_round_trip(name, tmp_path):
  config = EVERY[name]
  assert Sam3LiteTextConfig.from_json(config.to_json()) == config
  written = config.to_json(tmp_path / "config.json")
  assert json.loads((tmp_path / "config.json").read_text()) == written
  for source in (tmp_path, str(tmp_path / "config.json")):
    assert Sam3LiteTextConfig.from_json(source) == config


def test_reading_with_another_profile():
  saved = Sam3LiteTextConfig.s1("original").to_json()
  assert Sam3LiteTextConfig.from_json(saved, "transformers") == Sam3LiteTextConfig.s1("transformers")
  assert Sam3LiteTextConfig.from_json(saved, MIXTURE).profile == MIXTURE


def test_a_file_that_is_not_ours_is_transformers():
  saved = Sam3LiteTextConfig.s1("original").to_json()
  del saved["sam3lt_jax"]
  saved["vision_config"]["backbone_config"]["layer_norm_eps"] = 3e-6
  read = Sam3LiteTextConfig.from_json(saved)
  assert read.profile == dataclasses.replace(Profile.transformers(), vit_layer_norm_eps=3e-6)
  # What the original computes does not depend on what transformers' file says.
  assert Sam3LiteTextConfig.from_json(saved, "original") == Sam3LiteTextConfig.s1("original")


def test_an_empty_schema_means_transformers_defaults():
  read = Sam3LiteTextConfig.from_json({"model_type": "sam3_lite_text"})
  assert (read.text.use_repmixer_blocks, read.text.max_position_embeddings) == (True, 77)
  teacher = Sam3LiteTextConfig.from_json({"model_type": "sam3"})
  assert teacher.text == Sam3LiteTextConfig.sam3().text


def test_a_video_checkpoint_nests_the_image_model():
  nested = {"model_type": "sam3_video", "detector_config": Sam3LiteTextConfig.sam3().to_json()}
  assert Sam3LiteTextConfig.from_json(nested) == Sam3LiteTextConfig.sam3()


def test_square_sizes_may_be_pairs():
  data = tiny.config().to_json()
  data["vision_config"]["backbone_config"]["image_size"] = [84, 84]
  assert Sam3LiteTextConfig.from_json(data) == tiny.config()
  data["vision_config"]["backbone_config"]["image_size"] = [84, 168]
  with pytest.raises(ValueError, match=r"image_size.*square"):
    Sam3LiteTextConfig.from_json(data)


def test_bad_files(tmp_path):
  path = tmp_path / "config.json"
  with pytest.raises(FileNotFoundError):
    Sam3LiteTextConfig.from_json(tmp_path)
  path.write_text('{"model_type": "sam3_lite_text"')
  with pytest.raises(ValueError, match="not valid JSON"):
    Sam3LiteTextConfig.from_json(path)
  path.write_text('{"model_type": "sam2"}')
  with pytest.raises(ValueError, match="'sam2' is not a SAM3-LiteText model"):
    Sam3LiteTextConfig.from_json(path)
  with pytest.raises(ValueError, match="None is not a SAM3-LiteText model"):
    Sam3LiteTextConfig.from_json({})
  with pytest.raises(ValueError, match=r"text_config.hidden_size: expected int, got 'wide'"):
    Sam3LiteTextConfig.from_json({"model_type": "sam3", "text_config": {"hidden_size": "wide"}})


@pytest.mark.parametrize(
  "change",
  [
    lambda data: [data],
    lambda data: data | {"vision_config": "large"},
    lambda data: data | {"sam3lt_jax": {"profile": {"name": "mine"}}},
    lambda data: data | {"sam3lt_jax": {"profile": data["sam3lt_jax"]["profile"] | {"new_field": 1}}},
    lambda data: data | {"text_config": data["text_config"] | {"num_attention_heads": 0}},
    lambda data: data | {"vision_config": {"backbone_config": {"image_size": 0}}},
  ],
  ids=["list", "part", "partial profile", "unknown field", "no heads", "no pixels"],
)
def test_bad_contents(change, tmp_path):
  path = tmp_path / "config.json"
  path.write_text(json.dumps(change(tiny.config().to_json())))
  with pytest.raises(ValueError):
    Sam3LiteTextConfig.from_json(path)


@pytest.mark.parametrize(
  "part, heads",
  [
    ("vision", 3),
    ("text", 5),
    ("geometry_encoder", 7),
    ("detr_encoder", 9),
    ("detr_decoder", 11),
    ("mask_decoder", 6),
  ],
)
def test_heads_must_divide_the_width(part, heads):
  config = Sam3LiteTextConfig.s0()
  changed = dataclasses.replace(getattr(config, part), num_attention_heads=heads)
  with pytest.raises(ValueError, match=rf"{part}: num_attention_heads must divide.*{heads} heads"):
    config.replace(**{part: changed})


def test_image_size_must_be_patches():
  with pytest.raises(ValueError, match="multiple of the patch size 14, at least twice it, got 1000"):
    Sam3LiteTextConfig(vision=VisionConfig(image_size=1000))


@pytest.mark.parametrize(
  "field, value",
  [
    ("position_policy", "stretch"),
    ("geometry_cls", True),
    ("text_cleaning", "none"),
    ("training_dropout", "off"),
    ("mask_order", "sigmoid"),
    ("context_length", 1),
  ],
)
def test_profiles_refuse_other_values(field, value):
  with pytest.raises(ValueError, match=rf"{field} must be .* got {value!r}"):
    dataclasses.replace(Profile.original(), **{field: value})


@pytest.mark.parametrize("name", ["Original", "hf", None])
def test_unknown_profiles(name):
  with pytest.raises(ValueError, match="profile must be one of 'original', 'transformers'"):
    Profile.named(name)
  with pytest.raises(ValueError, match="profile"):
    Sam3LiteTextConfig.s0(name)


@pytest.mark.full  # 3 s
@pytest.mark.torch
@pytest.mark.parametrize("variant", ["s0", "s1", "l", "sam3"])
def test_transformers_own_file_gives_the_same_numbers(variant, tmp_path):
  """What transformers' classes hold for the released sizes, saved by transformers itself."""
  from tests.reference import import_torch_reference

  ref = import_torch_reference()
  wanted = VARIANTS[variant]("transformers")
  if variant == "sam3":
    theirs = ref.Sam3Config()  # its defaults are SAM 3
  else:
    t = wanted.text
    fields = (
      "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
      "max_position_embeddings", "use_repmixer_blocks",
    )  # fmt: skip
    theirs = ref.Sam3LiteTextConfig(text_config={k: getattr(t, k) for k in fields})
  theirs.save_pretrained(tmp_path)
  assert Sam3LiteTextConfig.from_json(tmp_path) == wanted


@pytest.mark.torch
@pytest.mark.parametrize("variant", ["s0", "l", "sam3"])
def test_transformers_reads_what_we_write(variant, tmp_path):
  from tests.reference import import_torch_reference

  ref = import_torch_reference()
  VARIANTS[variant]("transformers").to_json(tmp_path / "config.json")
  read = ref.transformers.AutoConfig.from_pretrained(tmp_path)
  assert type(read) is (ref.Sam3Config if variant == "sam3" else ref.Sam3LiteTextConfig)
  read.save_pretrained(tmp_path / "again")
  again = Sam3LiteTextConfig.from_json(tmp_path / "again", "transformers")
  assert again == VARIANTS[variant]("transformers")
