"""Sam3LiteText under bfloat16, fusing, differentiation, mapping and several devices."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax import Sam3LiteText
from tests import tiny

# bfloat16 rounds at 2^-8 and adds that up over some 15 layers. Twice the largest differences measured for six
# sets of inputs (masks 0.11 of values to 3, boxes 0.006, logits 0.021, presence 0.008, semantic 0.026).
BF16 = {
  "pred_masks": 0.22,
  "pred_boxes": 0.012,
  "pred_logits": 0.042,
  "presence_logits": 0.016,
  "semantic_seg": 0.052,
}


@pytest.fixture(scope="module")
def model():
  return tiny.load(tiny.config())[0]


@pytest.fixture(scope="module")
def variables():
  return tiny.load(tiny.config())[1]


@pytest.mark.full  # 4 s
def test_bfloat16_is_close_and_gives_float32(model, variables):
  inputs = tiny.inputs()
  out = tiny.jit(lambda v, inputs: model.apply(v, **inputs))(variables, inputs)
  bf16 = model.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
  stored = dict(variables, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"]))
  rough = tiny.jit(lambda v, inputs: bf16.apply(v, **inputs))(stored, inputs)
  for name in tiny.OUTPUTS:
    exact, value = np.asarray(getattr(out, name)), getattr(rough, name)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, exact, atol=BF16[name], err_msg=name)


def test_fused_equals_unfused(model, variables):
  ids, mask = tiny.phrases(3)
  before = tiny.jit(lambda v: model.apply(v, ids, mask, method="get_text_features"))(variables)
  fused, fused_variables = model.fuse(variables)
  assert set(fused_variables) == {"params"}
  assert fused.config.text.fused
  after = tiny.jit(lambda v: fused.apply(v, ids, mask, method="get_text_features"))(fused_variables)
  np.testing.assert_allclose(after.pooler_output, before.pooler_output, atol=1e-5)
  np.testing.assert_allclose(after.last_hidden_state, before.last_hidden_state, atol=1e-5)
  wanted = jax.eval_shape(fused.init_variables, jax.random.key(0))
  assert jax.tree.map(jnp.shape, dict(wanted)) == jax.tree.map(jnp.shape, fused_variables)
  # The arguments are as they were, and fusing twice is fusing once.
  assert "token_mixer" in variables["params"]["text_encoder"]["layers_0"]
  assert "batch_stats" in variables
  again, again_variables = fused.fuse(fused_variables)
  assert again is fused and again_variables is fused_variables


@pytest.mark.parametrize("profile", ["original", "transformers"])
def test_nothing_to_fuse(profile):
  text = dataclasses.replace(tiny.config().text, use_repmixer_blocks=False)
  plain = Sam3LiteText(tiny.config(profile, text=text))
  variables = {"params": {}}
  assert plain.fuse(variables) == (plain, variables)
  teacher = Sam3LiteText(tiny.config(profile, text=dataclasses.replace(tiny.config().text, kind="clip")))
  assert teacher.fuse(variables) == (teacher, variables)


def test_fuse_keeps_the_stored_dtype(model, variables):
  stored = dict(variables, params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables["params"]))
  _, fused = model.clone(param_dtype=jnp.bfloat16).fuse(stored)
  assert {leaf.dtype for leaf in jax.tree.leaves(fused)} == {jnp.dtype("bfloat16")}


@pytest.mark.full  # a whole gradient to compile; CI compares it with torch's, too
def test_gradients_are_finite_and_reach_every_part(model, variables):
  """At the smallest resolution, whose grid of 2 is smaller than a window and than the position table."""
  ids, mask = tiny.phrases(1)
  pixels, boxes = tiny.pixels(1, 28), np.full((1, 1, 4), 0.5, np.float32)

  def loss(params):
    out = model.apply(dict(variables, params=params), pixels, ids, mask, input_boxes=boxes)
    return sum(jnp.mean(jnp.sin(getattr(out, name))) for name in tiny.OUTPUTS)

  value, grads = tiny.jit(jax.value_and_grad(loss))(variables["params"])
  assert np.isfinite(value)
  flat = flax.traverse_util.flatten_dict(grads, sep="/")
  assert all(np.isfinite(leaf).all() for leaf in flat.values())
  # What no output depends on: CLIP's own projection, the x0.5 level, the third stage, and what is constant
  # over keys, which the softmax cancels up to rounding (with RoPE the bias of keys is not constant).
  silent = (
    "text_encoder/projection/", "vision_encoder/neck/fpn_layers_3/",
    "mask_decoder/pixel_decoder/conv_layers_2/", "mask_decoder/pixel_decoder/norms_2/",
    "detr_decoder/box_rpb_embed_x/layer2/bias", "detr_decoder/box_rpb_embed_y/layer2/bias",
  )  # fmt: skip
  for path, leaf in flat.items():
    if "backbone" in path or not path.endswith("k_proj/bias"):
      assert (np.abs(leaf).max() < 1e-6) == path.startswith(silent), path


def test_vmap_over_images(model, variables):
  ids, _ = tiny.phrases(1)
  out = jax.eval_shape(
    jax.vmap(lambda pixels: model.apply(variables, pixels, ids)),
    jax.ShapeDtypeStruct((3, 2, 28, 28, 3), jnp.float32),
  )
  assert out.pred_masks.shape == (3, 2, tiny.QUERIES, 8, 8)


def test_init_variables_differ_with_the_key_only(model):
  draw = tiny.jit(lambda key: model.init_variables(key)["params"]["text_projection"]["kernel"])
  first, again, other = draw(jax.random.key(0)), draw(jax.random.key(0)), draw(jax.random.key(1))
  np.testing.assert_array_equal(first, again)
  assert not np.array_equal(first, other)


_TWO_DEVICES = """
import chex, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sam3lt_jax import parallel
from tests import tiny
assert jax.device_count() == 2, jax.devices()
model, variables = tiny.load(tiny.config())
forward = lambda v, *inputs: model.apply(v, *inputs)
inputs = (tiny.pixels(4, 28), *tiny.phrases(4))
wanted = tiny.jit(forward)(variables, *inputs)
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("data"))
everywhere = NamedSharding(mesh, PartitionSpec())
sharded = tiny.jit(forward, in_shardings=(everywhere, *[rows] * 3), out_shardings=rows)(variables, *inputs)
assert len(sharded.pred_masks.addressable_shards) == 2
by_pmap = parallel.pmap_forward(model, variables)
mapped = by_pmap(*inputs)
assert len(mapped.pred_masks.addressable_shards) == 2
try:
  by_pmap(*(x[:3] for x in inputs))
  raise SystemExit("three rows were split over two devices")
except ValueError as e:
  assert "a batch of 3 rows cannot be split evenly over 2 devices" in str(e), e
for out in (sharded, mapped):
  chex.assert_trees_all_close(out, wanted, atol=2e-5)
"""


@pytest.mark.full  # a process with a model; test_parallel has the meshes
def test_two_devices_give_what_one_gives():
  """jit over a mesh and `pmap_forward`, in a process of its own, which can have two devices."""
  flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
  root = pathlib.Path(__file__).parent.parent
  env = os.environ | {"XLA_FLAGS": flags}
  command = [sys.executable, "-c", _TWO_DEVICES]
  done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300, check=False)
  assert done.returncode == 0, done.stderr


_FOUR_DEVICES = """
import jax, numpy as np
from sam3lt_jax import Predictor
from tests.jobs import pictures
assert jax.device_count() == 4, jax.devices()
one = pictures.predictor()
assert len(one.engine.devices) == 1
loaded = one.model, one.variables, one.processor
four = Predictor(*loaded, fuse=False, devices=jax.devices(), image_buckets=(1, 2))
photos = [pictures.photo(i) for i in range(11)]  # a batch of 8, and 3 of which one device has none
wanted = [one(photo, ["a dog", "a cat"], threshold=0.0) for photo in photos]
found = four(photos, ["a dog", "a cat"], threshold=0.0)
for a, b in zip(found, wanted, strict=True):
  pictures.assert_same_results(a, b)
pictures.assert_same_results(four(photos[0], ["a dog", "a cat"], threshold=0.0), wanted[0])
assert all(x.sharding.device_set == set(jax.devices()) for x in jax.tree.leaves(four.variables))
last = Predictor(*loaded, fuse=False, devices=jax.devices()[3:])
pictures.assert_same_results(last(photos[0], ["a dog", "a cat"], threshold=0.0), wanted[0])
"""


@pytest.mark.full
def test_a_predictor_on_four_devices_finds_what_one_finds():
  env = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
  command = [sys.executable, "-c", _FOUR_DEVICES]
  root = pathlib.Path(__file__).parents[1]
  done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
