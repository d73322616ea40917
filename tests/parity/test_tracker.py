"""The tracker against the authors' code, stage by stage, through the real tables of weights."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.checkpoints import engine
from sam3lt_jax.features import Clicks
from sam3lt_jax.ops import positions
from sam3lt_jax.ops.interpolation import interpolation_matrix
from tests.checkpoints.common import fixture
from tests.parity import tracker as reference

# As for the detector: largest absolute difference in float32.
LOGITS, IOU, MASKS, INSIDE = 1e-4, 1e-5, 5e-4, 1e-4


@pytest.fixture(scope="module", autouse=True)
def precision():
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def found():
  return reference.run_all()


def close(got, want, tolerance, what):
  assert got.shape == want.shape, (what, got.shape, want.shape)
  difference = np.abs(np.asarray(got, np.float64) - want).max(initial=0)
  assert difference <= tolerance, (
    f"{what}: {difference:.2e} > {tolerance:.0e}, values to {np.abs(want).max():.3g}"
  )


@pytest.mark.parametrize("name", reference.cases())
def test_image_head(name):
  want, got = reference.case(name), found()[name]
  for row, tokens in enumerate(want["sparse"]):
    close(got["prompt_tokens"][row][got["prompt_mask"][row]], tokens, INSIDE, "prompt_tokens")
  close(got["masks"], want["all_masks"], MASKS, "masks")
  close(got["ious"], want["all_ious"], IOU, "ious")
  close(got["object_score_logits"], want["object_score_logits"], LOGITS, "object_score_logits")
  close(got["tokens"], want["mask_tokens"], INSIDE, "mask tokens")
  if "dense" in want:
    close(got["mask_prompt"].transpose(0, 3, 1, 2), want["dense"], INSIDE, "mask_prompt")
  if "twoway_image" in want:
    flat = got["twoway_image"].reshape(want["twoway_image"].shape)
    close(flat, want["twoway_image"], INSIDE, "twoway_image")
    own = np.concatenate([np.ones((1, 6), bool), got["prompt_mask"]], axis=1)
    close(got["twoway_tokens"][own], want["twoway_tokens"][0], INSIDE, "twoway_tokens")


@pytest.mark.parametrize("name", [n for n in reference.cases() if not reference.case(n)["multimask"]])
def test_the_single_mask_is_the_one_that_the_authors_choose(name):
  want, got = reference.case(name), found()[name]
  P = len(got["single"])
  ious = np.take_along_axis(got["ious"], got["single"][:, None], axis=1)
  close(ious, want["ious"].reshape(P, 1), IOU, "ious")
  masks = got["masks"][np.arange(P), got["single"]]
  close(np.clip(masks, -32, 32), want["low_res_masks"].reshape(masks.shape), MASKS, "low_res_masks")


def test_both_branches_of_the_stability_rule_are_in_the_fixture():
  chosen = {int(i) for name in reference.cases() for i in found()[name]["single"]}
  assert 0 in chosen and len(chosen) > 1


def test_neck():
  f, (tracker, variables) = fixture("tracker"), reference.load()
  trunk = jnp.asarray(f["neck/trunk_map"].transpose(0, 2, 3, 1))
  x4, x2, x1 = tracker.apply(variables, trunk, method=lambda m, x: m.neck(x))
  close(x1.transpose(0, 3, 1, 2), f["neck/x1"], INSIDE, "x1")
  close(x4.transpose(0, 3, 1, 2)[:, ::4], f["neck/x4_every4th_channel"], INSIDE, "x4")
  close(x2.transpose(0, 3, 1, 2)[:, ::4], f["neck/x2_every4th_channel"], INSIDE, "x2")


def test_finer_maps():
  f = fixture("tracker")
  s0, s1 = (x.transpose(0, 3, 1, 2) for x in reference.features([0]).fine)
  close(s0[:, :, ::8], f["conv_s0_every8th_row"], INSIDE, "conv_s0")
  close(s1[:, :, ::4], f["conv_s1_every4th_row"], INSIDE, "conv_s1")


def test_places():
  f, (tracker, variables) = fixture("tracker"), reference.load()
  grid, width = reference.sizes()["grid"], reference.sizes()["width"]
  places = tracker.apply(variables, method=lambda m: m.prompt_encoder.image_places(grid, grid))
  close(places.transpose(2, 0, 1)[None], f["dense_position_of_prompts"], 1e-5, "dense position")
  sine = positions.map_positions(grid, grid, width).transpose(2, 0, 1)[None]
  close(sine, f["memory_attention_position"], 1e-6, "memory attention position")
  sine = positions.map_positions(grid, grid, reference.sizes()["memory_width"]).transpose(2, 0, 1)[None]
  close(sine, f["memory_encoder/position"], 1e-6, "memory encoder position")


# ---------------------------------------------------------------- memory


def _resized(x, size):
  """[P, h, w] -> [P, size, size], bilinear."""
  a = interpolation_matrix(x.shape[-1], size)
  return np.einsum("ij,pjk,lk->pil", a, x, a)


@pytest.mark.parametrize(
  "name", ["binarised", "sigmoid", "absent", "direct_sigmoid", "all_negative_binarised"]
)
def test_memory_encoder(name):
  f, (tracker, variables) = fixture("tracker"), reference.load()
  case = {k: f[f"memory_encoder/{name}/{k}"] for k in ("out", "object_score_logits", "binarise", "mask_size")}
  logits = f["memory_encoder/low_res_logits"][:, 0]
  if name == "all_negative_binarised":
    logits = -np.abs(logits) - 1
  large = _resized(logits, int(case["mask_size"]))
  soft = large > 0 if case["binarise"] else 1 / (1 + np.exp(-large))
  masks = _resized(20.0 * soft - 10.0, 16 * reference.sizes()["grid"])
  features = reference.features([int(f["memory_encoder/frame"])])
  present = jnp.asarray(case["object_score_logits"] > 0)
  got = tracker.apply(variables, features, jnp.asarray(masks, jnp.float32), present, method="encode_memory")
  close(got.transpose(0, 3, 1, 2), case["out"], INSIDE, "memory")
  assert name != "absent" or not present.all()


_ATTENTION_CASES = {
  "maps1_pointers1": 1, "maps3_pointers3": 3, "maps7_pointers7": 7, "maps7_pointers16": 7,
  "maps10_pointers19": 10,
}  # fmt: skip


def _remembered(case, tracker, variables):
  """The memory and its places as the rules of the authors' tracker choose them: at most 4 prompted frames,
  the 6 before this one, pointers of the prompted and of the 15 before. Also the number of maps.
  """
  p, frame, M = variables["params"], int(case["frame"]), min(int(case["num_frames"]), 16)
  where = {int(f): i for i, f in enumerate(case["stored_frames"])}
  cond, others = ([int(f) for f in case[k]] for k in ("cond_frames", "other_frames"))
  bits = case["maps_bf16"].astype(np.uint32) << 16
  maps = bits.view(np.float32).transpose(0, 1, 3, 4, 2)  # [frames, P, h, w, C]
  _, P, h, w, C = maps.shape
  sine = np.asarray(positions.map_positions(h, w, C))
  rows = np.asarray(p["memory_temporal_positional_encoding"])[:, 0, 0]
  recent = [(frame - r, r - 1) for r in range(1, 7) if frame - r in others]
  chosen = [(f, len(rows) - 1) for f in cond] + recent
  memory = [maps[where[f]].reshape(P, h * w, C) for f, _ in chosen]
  places = [np.broadcast_to((sine + rows[r]).reshape(h * w, C), (P, h * w, C)) for _, r in chosen]
  pointed = [f for f in cond if f <= frame] + [frame - r for r in range(1, M) if frame - r in others]
  for f in pointed:
    pointer = case["pointers"][where[f]].reshape(P, -1, C)
    code = positions.frame_code(jnp.float32((frame - f) / (M - 1)), pointer[0].size)
    place = tracker.apply(
      variables, code, method=lambda m, x: m.temporal_positional_encoding_projection_layer(x)
    )
    memory.append(pointer)
    places.append(np.broadcast_to(np.asarray(place), pointer.shape))
  return np.concatenate(memory, 1), np.concatenate(places, 1), len(chosen)


@pytest.mark.parametrize("name", _ATTENTION_CASES)
def test_memory_attention(name):
  f, (tracker, variables) = fixture("tracker"), reference.load()
  prefix = f"memory_attention/{name}/"
  case = {k.removeprefix(prefix): v for k, v in f.items() if k.startswith(prefix)}
  memory, places, maps = _remembered(case, tracker, variables)
  assert maps == int(case["n_maps"]) == _ATTENTION_CASES[name]
  image = reference.features([int(case["feature_frame"])]).image
  image = jnp.broadcast_to(image, (len(memory), *image.shape[1:]))
  place = positions.map_positions(*image.shape[1:])

  @jax.jit
  def attend(variables, image, memory, places, mask):
    return tracker.apply(
      variables, image, place, memory, places, maps, mask, method=lambda m, *a: m.memory_attention(*a)
    )

  got = attend(variables, image, memory, places, np.ones(memory.shape[:2], bool))
  close(got.transpose(0, 3, 1, 2), case["out"], INSIDE, "conditioned map")
  # What is masked must not matter.
  extra = np.full_like(memory[:, :5], 1e3)
  mask = np.pad(np.ones(memory.shape[:2], bool), ((0, 0), (0, 5)))
  padded = attend(
    variables, image, np.concatenate([memory, extra], 1), np.concatenate([places, extra], 1), mask
  )
  close(padded, np.asarray(got), 1e-5, "with masked tokens")


# ---------------------------------------------------------------- no inert tensor

_KEY_BIAS = "adds the same score to every key of a query, which the softmax cancels"
_BY_SESSION = "read by what chooses the memory of a frame, not by a module"
INERT = {
  r"neck/fpn_layers_3/.*": "the x0.5 level, which the tracker drops",
  r"mask_decoder/transformer/.*/k_proj/bias": _KEY_BIAS,
  r"no_memory_positional_encoding": "neither reference reads it",
  r"memory_temporal_positional_encoding": _BY_SESSION,
  r"temporal_positional_encoding_projection_layer/.*": _BY_SESSION,
  r"mask_downsample/.*": _BY_SESSION,
}


@pytest.mark.full
def test_every_leaf_moves_an_output():
  """Each leaf is set to zero in turn. Those that move nothing are listed, and the list holds no other."""
  tracker, variables = reference.load()
  f, rng = fixture("tracker"), np.random.default_rng(0)
  trunk = jnp.asarray(np.tile(f["neck/trunk_map"].transpose(0, 2, 3, 1), (2, 1, 1, 1)))
  clicks = Clicks(
    rng.uniform(size=(2, 5, 2)).astype(np.float32), np.array([[2, 3, 1, 0, -1]] * 2, np.int32),
    np.ones((2, 5), bool), rng.normal(0, 5, (2, 32, 32)).astype(np.float32), np.array([True, False]),
  )  # fmt: skip
  masks = rng.uniform(-10, 10, (2, 128, 128)).astype(np.float32)

  @jax.jit
  def outputs(variables):
    def run(m):
      features = m.get_image_features(trunk)
      decoded = m.decode(features, clicks)
      present = jnp.array([True, False])
      memory = m.encode_memory(features, masks, present)
      pointers = m.object_pointers(decoded.tokens[:, 0], present)
      tokens = jnp.concatenate([memory.reshape(2, 64, -1), pointers.reshape(2, 4, -1)], axis=1)
      seen = m.memory_attention(features.image, features.image[0], tokens, 0.1 * tokens, 1)
      return (*decoded, memory, pointers, seen)

    return tracker.apply(variables, method=run)

  leaves = engine.flatten(variables)
  base = [np.asarray(x) for x in outputs(variables)]
  still = []
  for leaf, value in leaves.items():
    changed = outputs(engine.unflatten({**leaves, leaf: jnp.zeros_like(value)}))
    if max(np.abs(np.asarray(a) - b).max() for a, b in zip(changed, base)) < 1e-4:
      still.append(leaf.removeprefix("params/"))
  expected = [leaf for leaf in still if any(re.fullmatch(pattern, leaf) for pattern in INERT)]
  assert still == expected
  for pattern in INERT:
    assert any(re.fullmatch(pattern, leaf) for leaf in still), f"{pattern} is not inert"
