"""The tracker against the authors' code, stage by stage, through the real tables of weights."""

from __future__ import annotations

import dataclasses
import functools
import re

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.checkpoints import engine
from sam3lt_jax.features import Clicks
from sam3lt_jax.ops import positions
from sam3lt_jax.video import bank as banks
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
  s0, s1 = reference.features([0]).fine
  s0 = einops.rearrange(s0, "b h w (a c e f) d -> b d (h a e) (w c f)", a=2, c=2, e=2)
  s1 = einops.rearrange(s1, "b h w (a c) d -> b d (h a) (w c)", a=2)
  close(s0[:, :, ::8], f["conv_s0_every8th_row"], INSIDE, "conv_s0")
  close(s1[:, :, ::4], f["conv_s1_every4th_row"], INSIDE, "conv_s1")


def test_places():
  f, (tracker, variables) = fixture("tracker"), reference.load()
  grid, width = reference.sizes()["grid"], reference.sizes()["width"]
  places = tracker.apply(variables, method=lambda m: m.prompt_encoder.image_places(grid))
  close(places.transpose(2, 0, 1)[None], f["dense_position_of_prompts"], 1e-5, "dense position")
  sine = positions.map_positions(grid, grid, width).transpose(2, 0, 1)[None]
  close(sine, f["memory_attention_position"], 1e-6, "memory attention position")
  sine = positions.map_positions(grid, grid, reference.sizes()["memory_width"]).transpose(2, 0, 1)[None]
  close(sine, f["memory_encoder/position"], 1e-6, "memory encoder position")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
  "name", ["binarised", "sigmoid", "absent", "direct_sigmoid", "all_negative_binarised"]
)
def test_memory_encoder(name):
  f, (tracker, variables) = fixture("tracker"), reference.load()
  case = {k: f[f"memory_encoder/{name}/{k}"] for k in ("out", "object_score_logits", "binarise", "mask_size")}
  logits = f["memory_encoder/low_res_logits"][:, 0]
  if name == "all_negative_binarised":
    logits = -np.abs(logits) - 1
  direct = int(case["mask_size"]) == 16 * reference.sizes()["grid"]
  binary = np.full(len(logits), bool(case["binarise"]))
  features = reference.features([int(f["memory_encoder/frame"])])
  present = jnp.asarray(case["object_score_logits"] > 0)
  masks = tracker.apply(
    variables, logits, binary, reference.sizes()["grid"], direct, method="mask_to_remember"
  )
  if f"memory_encoder/{name}/conv_input_object0" in f:
    close(masks[0], np.squeeze(f[f"memory_encoder/{name}/conv_input_object0"]), INSIDE, "mask to remember")
  got = tracker.apply(variables, features, masks, present, method="encode_memory")
  close(got.transpose(0, 3, 1, 2), case["out"], INSIDE, "memory")
  assert name != "absent" or not present.all()


def _memory_case(name):
  prefix = f"memory_attention/{name}/"
  return {k.removeprefix(prefix): v for k, v in fixture("tracker").items() if k.startswith(prefix)}


def _bank(case, tracker):
  """What the bank holds after the case's frames came one by one, and the clock of its last."""
  config, direction = tracker.config, -1 if case["reverse"] else 1
  where = {int(f): i for i, f in enumerate(case["stored_frames"])}
  cond, frame = [int(f) for f in case["cond_frames"]], int(case["frame"])
  bits = case["maps_bf16"].astype(np.uint32) << 16
  maps = bits.view(np.float32).transpose(0, 1, 3, 4, 2)  # [frames, P, h, w, C]
  P, grid, C = maps.shape[1], maps.shape[2], maps.shape[4]
  slots = P + 1  # one of them stays dead
  bank = banks.born(banks.empty(config, grid, slots, 8), jnp.arange(slots) < P, 0)
  write = jax.jit(lambda bank, clock, *a: banks.write(bank, config, clock, bank.live, *a))
  ahead = [f for f in cond if (f - frame) * direction >= 0]
  for now in ahead + sorted(where.keys() - set(ahead), reverse=direction < 0):
    padded = lambda x: np.pad(x, ((0, 1), *[(0, 0)] * (x.ndim - 1)), constant_values=np.nan)  # noqa: E731
    quality = np.full(slots, case["quality"][where[now]] if case["selection"] else 1, np.float32)
    bank = write(
      bank, banks.Clock.at(now, config, bool(case["reverse"])), padded(maps[where[now]].reshape(P, -1, C)),
      padded(case["pointers"][where[now]]), quality, np.full(slots, now in cond),
    )  # fmt: skip
  return bank, banks.Clock.at(frame, config, bool(case["reverse"]), int(case["num_frames"]))


@pytest.mark.full  # 9 s
@pytest.mark.parametrize(
  "name", sorted({k.split("/")[1] for k in fixture("tracker") if k.startswith("memory_attention/")})
)
def test_memory_attention(name):
  case, (tracker, variables) = _memory_case(name), reference.load()
  quality = 0.01 if case["selection"] else None
  config = tracker.config.replace(profile=dataclasses.replace(tracker.config.profile, memory_quality=quality))
  tracker = tracker.clone(config=config)
  bank, clock = _bank(case, tracker)
  P = case["out"].shape[0]
  memory = banks.choose(bank, config, clock)
  assert memory.count.tolist() == [int(case["n_maps"])] * P + [0]
  assert memory.there.sum(axis=1).tolist() == [int(case["n_pointers"])] * P + [0]
  features = reference.features([int(case["feature_frame"])])

  @jax.jit
  def conditioned(variables, features, memory):
    started = tracker.apply(variables, features, method="start_memory_attention")
    return tracker.apply(variables, started, memory, method="condition")

  got = conditioned(variables, features, memory)[:P]
  close(got.transpose(0, 3, 1, 2), case["out"], INSIDE, "conditioned map")


# ---------------------------------------------------------------- no inert tensor

_KEY_BIAS = "adds the same score to every key of a query, which the softmax cancels"
INERT = {
  r"neck/fpn_layers_3/.*": "the x0.5 level, which the tracker drops",
  r"mask_decoder/transformer/.*/k_proj/bias": _KEY_BIAS,
  r"no_memory_positional_encoding": "neither reference reads it",
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
      given = m.pointers_of_masks(features, 0.05 * masks + 0.5)
      clock = banks.Clock.at(1, tracker.config, frames=16)
      bank = banks.born(banks.empty(tracker.config, 8, 2), jnp.ones(2, bool), 0)
      flat = memory.reshape(2, 64, -1), pointers, jnp.ones(2), jnp.ones(2, bool)
      bank = banks.write(bank, tracker.config, clock.replace(frame=0), bank.live, *flat)
      remembered = banks.choose(bank, tracker.config, clock)
      # Unrounded, so that no small change is lost; both ends of the table of ages.
      remembered = remembered.replace(maps=memory.reshape(2, 1, 64, -1), rows=jnp.array([[6], [0]]))
      seen = m.condition(m.start_memory_attention(features), remembered)
      return (*decoded, memory, pointers, given, seen)

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
