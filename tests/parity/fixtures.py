"""Inputs and outputs of the authors' code, recorded on tiny random models, in our names and layouts.

The detector's cases are rows of two calls of our model, one without boxes and one with: prompts of both
images and of different box counts stand beside each other, so the comparison also says that a row depends
neither on its neighbours nor on padding.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.checkpoints import engine, tables
from sam3lt_jax.config import Profile, Sam3LiteTextConfig
from sam3lt_jax.model import PADDING_LABEL, Sam3LiteText
from sam3lt_jax.ops import positions
from tests.checkpoints.common import TEXT, fixture, original_config
from tests.parity.tolerances import flat

Stages = dict[str, np.ndarray]

DETECTOR_CASES = (
  "text_only", "text_only_long", "text_zero_id", "batch2_text", "img1_two_texts",
  "text_1pos", "text_2pos_1neg", "box_only_visual", "text_box_outside", "batch2_boxes",
)  # fmt: skip

# What a recorded stage holds of the whole array.
_EVERY_4TH_CHANNEL = np.s_[..., ::4]
_EVERY_10TH_QUERY = np.s_[:, ::10]


def detector_state_dict() -> Stages:
  """The tiny detector's weights under the authors' keys, RoPE tables and unused tensors included."""
  return _part("detector_tiny", "sd/")


def detector_config() -> Sam3LiteTextConfig:
  """Its configuration: S0-like, a position table of 77 rows sliced to 16, profile "original"."""
  return original_config("s0")


def pixel_values() -> np.ndarray:
  """The two recorded images, float32 [2, 168, 168, 3] in [-1, 1]."""
  images = fixture("detector_tiny")["images_uint8"].transpose(0, 2, 3, 1)
  return (images.astype(np.float32) / 255 - 0.5) / 0.5


def _part(name: str, prefix: str) -> Stages:
  return {k.removeprefix(prefix): v for k, v in fixture(name).items() if k.startswith(prefix)}


def _case(name: str) -> Stages:
  part = _part("detector_tiny", f"case/{name}/")
  if not part:
    raise KeyError(f"no case {name!r} in the fixture")
  return part


def _inputs(case: Stages, boxes: int) -> Stages:
  """The rows of one case, its boxes padded to `boxes` slots."""
  ids = case["token_ids"]
  found, labels = case["boxes_cxcywh"], np.where(case["box_pad_mask"], PADDING_LABEL, case["box_labels"])
  missing = boxes - found.shape[1]
  return {
    "image_index": case["image_index"],
    "input_ids": ids,
    "attention_mask": ids != 0,  # the original's rule, also for a 0 inside a prompt
    "input_boxes": np.pad(found, ((0, 0), (0, missing), (0, 0))),
    "input_boxes_labels": np.pad(labels, ((0, 0), (0, missing)), constant_values=PADDING_LABEL),
  }


@functools.cache
def _apply(model: Sam3LiteText) -> Any:
  return jax.jit(functools.partial(model.apply, output_intermediates=True))


def run_detector(model: Sam3LiteText, variables: Any) -> dict[str, Stages]:
  """Case -> what our model computes for it, under the names of `expected`, whole arrays."""
  cases = {name: _case(name) for name in DETECTOR_CASES}
  reference_points = variables["params"]["detr_decoder"]["reference_points"]["embedding"]
  results: dict[str, Stages] = {}
  for with_boxes in (False, True):
    names = [n for n, c in cases.items() if (c["boxes_cxcywh"].shape[1] > 0) == with_boxes]
    slots = max(cases[n]["boxes_cxcywh"].shape[1] for n in names)
    rows = [_inputs(cases[n], slots) for n in names]
    batch = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    stages = flat(_apply(model)(variables, pixel_values(), **batch))
    start = 0
    for name in names:
      stop = start + len(cases[name]["token_ids"])
      results[name] = _rows(stages, slice(start, stop), cases[name], np.asarray(reference_points))
      start = stop
  return results


def _rows(stages: Stages, rows: slice, case: Stages, reference_points: np.ndarray) -> Stages:
  """The rows of one case out of a call's stages, with geometry tokens in the original's order."""
  per_image = ("vit_block_", "neck_")
  by_layer = ("decoder_hidden_states", "decoder_boxes", "decoder_logits", "decoder_presence_logits")
  out = {
    name: value if name.startswith(per_image) else value[:, rows] if name in by_layer else value[rows]
    for name, value in stages.items()
  }
  tokens, count = case["token_ids"].shape[1], case["geo_feats"].shape[0]
  valid = out["prompt_mask"][:, tokens:]
  # The original packs valid boxes and the CLS token to the left, here they keep their slots.
  order = np.argsort(~valid, axis=1, kind="stable")[:, :count]
  packed = np.take_along_axis(out["prompt_tokens"][:, tokens:], order[..., None], axis=1)
  out["geometry_mask"] = np.take_along_axis(valid, order, axis=1)
  out["geometry_tokens"] = np.where(out["geometry_mask"][..., None], packed, 0.0)
  assert valid.sum() == out["geometry_mask"].sum(), "more valid geometry tokens than the original has"
  out["text_mask"] = out["prompt_mask"][:, :tokens]
  out["pred_boxes_cxcywh"] = out["decoder_boxes"][-1]
  first = np.broadcast_to(1 / (1 + np.exp(-reference_points)), out["decoder_boxes"][:1].shape)
  out["decoder_input_boxes"] = np.concatenate([first, out["decoder_boxes"][:-1]])
  return out


def expected(name: str) -> tuple[Stages, dict[str, Any]]:
  """(stages of the original for a case, {stage: index} of those that hold a part of the array only)."""
  case = _case(name)
  geometry_mask = ~case["geo_mask"]
  stages = {
    "text_features": case["language_features"].transpose(1, 0, 2),
    "text_mask": ~case["language_mask"],
    "geometry_tokens": np.where(geometry_mask[..., None], case["geo_feats"].transpose(1, 0, 2), 0.0),
    "geometry_mask": geometry_mask,
    "encoder_output": case["encoder_memory"].transpose(1, 0, 2),
    "decoder_hidden_states": case["decoder_hs"].transpose(0, 2, 1, 3),
    "decoder_input_boxes": case["decoder_ref_boxes"].transpose(0, 2, 1, 3),
    "decoder_presence_logits": case["decoder_presence_logits"].transpose(0, 2, 1),
    "pred_logits": case["pred_logits"][..., 0],
    "pred_boxes_cxcywh": case["pred_boxes"],
    "pred_boxes": case["pred_boxes_xyxy"],
    "presence_logits": case["presence_logit_dec"],
    "semantic_seg": case["semantic_seg"],
  }
  parts = {}
  if "pred_masks" in case:
    stages["pred_masks"] = case["pred_masks"]
  else:
    stages["pred_masks"] = case["pred_masks_every10th_query"]
    parts["pred_masks"] = _EVERY_10TH_QUERY
  if "pixel_embed_every4th_channel" in case:
    stages["pixel_embed"] = case["pixel_embed_every4th_channel"].transpose(0, 2, 3, 1)
    parts["pixel_embed"] = _EVERY_4TH_CHANNEL
  read = {"image_index", "token_ids", "boxes_cxcywh", "box_labels", "box_pad_mask"} | {
    "language_features", "language_mask", "geo_feats", "geo_mask", "encoder_memory", "decoder_hs",
    "decoder_ref_boxes", "decoder_presence_logits", "pred_logits", "pred_boxes", "pred_boxes_xyxy",
    "presence_logit_dec", "semantic_seg", "pred_masks", "pred_masks_every10th_query",
    "pixel_embed_every4th_channel",
  }  # fmt: skip
  assert case.keys() <= read, f"arrays of {name} that nothing compares: {case.keys() - read}"
  return stages, parts


def select(stages: Stages, parts: dict[str, Any]) -> Stages:
  """`stages` with the parts that the fixture recorded."""
  return {name: value[parts[name]] if name in parts else value for name, value in stages.items()}


def expected_image_taps(last_block: int) -> tuple[Stages, dict[str, Any]]:
  """Like `expected`, for the two images; `last_block` is the index of the trunk's last layer."""
  taps = {k: v.transpose(0, 2, 3, 1) for k, v in _part("detector_tiny", "image_taps/").items()}
  stages = {
    f"vit_block_{last_block}": taps["vit"],
    "neck_0": taps["fpn0_every4th_channel"],
    "neck_1": taps["fpn1_every4th_channel"],
    "neck_2": taps["fpn2"],
    "neck_3": taps["fpn3_dropped"],
    "position_code": taps["pos2"],
  }
  # The first level was recorded for the first image only.
  return stages, {"neck_0": np.s_[:1, ..., ::4], "neck_1": _EVERY_4TH_CHANNEL}


def image_taps(stages: Stages) -> Stages:
  """What our model computes for the two images, from any case's stages."""
  code = positions.map_positions(*stages["neck_2"].shape[1:])
  return stages | {"position_code": np.asarray(code)[None]}


def padded_windows(model: Sam3LiteText, variables: Any) -> tuple[Stages, Stages]:
  """(expected, got) of the trunk on a grid of 10, which its window of 4 does not divide."""
  want = fixture("vit_padded_windows")["vit"].transpose(0, 2, 3, 1)
  pixels = pixel_values()[:1, :140, :140]

  @jax.jit
  def blocks(variables, pixels):
    ids = jnp.ones((1, 2), jnp.int32)
    taps = model.apply(variables, pixels, ids, output_intermediates=True).intermediates
    return {name: value for name, value in taps.items() if name.startswith("vit_block_")}

  got = {name: np.asarray(value) for name, value in blocks(variables, pixels).items()}
  return {f"vit_block_{len(got) - 1}": want}, got


class TextCase(NamedTuple):
  """One recorded run of a text encoder.

  Attributes:
    variant: whose text encoder: s0, s1, l or sam3 (the teacher).
    name: the case's name in the fixture.
    short_table: the position table has 16 rows instead of 77 (the teacher's has 32 either way).
    policy: what becomes of a table that is longer or shorter than the phrase.
  """

  variant: str
  name: str
  short_table: bool
  policy: str

  @property
  def file(self) -> str:
    return _TEXT_FILES[self.variant]

  def __str__(self) -> str:
    return f"{self.variant}-{self.name}"


_TEXT_FILES = {"s0": "text_mct", "s1": "text_base", "l": "text_base_wide", "sam3": "text_teacher_ve"}
_TEXT_RUNS = ("ctx16_trunc77", "ctx16_interp77", "ctx32_trunc77", "ctx32_interp77", "ctx77", "pos16",
              "pos16_interp32", "ctx16", "ctx32")  # fmt: skip


def text_cases() -> list[TextCase]:
  """Every run of every text fixture."""
  cases = []
  for variant, file in _TEXT_FILES.items():
    found = {key.partition("/")[0] for key in fixture(file) if key.endswith("/token_ids")}
    assert found <= set(_TEXT_RUNS), f"runs of {file} that nothing compares: {found - set(_TEXT_RUNS)}"
    for name in _TEXT_RUNS:
      if name in found:
        policy = "interpolate" if "interp" in name else "slice"
        cases.append(TextCase(variant, name, name.startswith("pos16"), policy))
  return cases


def text_stages(model: Sam3LiteText, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
  """Our text encoder's stages, without an image; for `apply` and `init` as `method`."""
  taps: dict[str, Any] = {}
  hidden = model.text_encoder(input_ids, attention_mask, False, taps)
  return taps | {"text_features": model.text_projection(hidden)}


def text_model(case: TextCase) -> tuple[Sam3LiteText, Any]:
  """Model and variables of a text fixture; it holds a text encoder only, so part of a tree is loaded."""
  config = original_config(case.variant, short_table=case.short_table)
  profile = dataclasses.replace(Profile.original(), position_policy=case.policy)
  model = Sam3LiteText(config.replace(profile=profile))
  return model, _text_variables(case.variant, case.short_table)


@functools.cache
def _text_variables(variant: str, short_table: bool) -> Any:
  model = Sam3LiteText(original_config(variant, short_table=short_table))
  ids = jnp.ones((1, 2), jnp.int32)

  def init(key):
    return model.init(key, ids, ids > 0, method=text_stages)

  target = engine.flatten(jax.eval_shape(init, jax.random.key(0)))
  tensors = _part(_TEXT_FILES[variant], "sd/")
  if short_table:
    tensors |= _part(_TEXT_FILES[variant], "sd_pos16/")
  layout = tables.layout("original", model.config.text.kind)
  return engine.unflatten(engine.load_tensors(layout, tensors, target, place=jnp.asarray))


def text_pair(case: TextCase, model: Sam3LiteText, variables: Any) -> tuple[Stages, Stages]:
  """(expected, got) of one text case: features of all phrases, layers of the first three."""
  data = _part(case.file, f"{case.name}/")
  ids = data["token_ids"]
  want = {"text_features": data["text_memory"].transpose(1, 0, 2), "text_mask": ~data["text_attention_mask"]}
  some = {}
  if "input_embeds" in data:
    some["text_embeddings"] = data["input_embeds"].transpose(1, 0, 2)
    if case.variant == "sam3":  # recorded before the teacher adds its positions
      table = fixture(case.file)[f"sd/{TEXT}encoder.positional_embedding"]
      some["text_embeddings"] = some["text_embeddings"] + table[: ids.shape[1]]
  some |= {f"text_block_{k.removeprefix('layer')}": v for k, v in data.items() if k.startswith("layer")}
  run = jax.jit(functools.partial(model.apply, method=text_stages))
  got = {name: np.asarray(value) for name, value in run(variables, ids, ids != 0).items()}
  got["text_mask"] = ids != 0
  for name, value in some.items():
    got[name] = got[name][: len(value)]
  return want | some, got
