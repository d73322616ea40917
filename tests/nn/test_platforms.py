"""Layers have a form for each platform: of equal results, and each in the programs that it is for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.nn import layers
from sam3lt_jax.nn.vision_encoder import VitTrunk
from sam3lt_jax.ops import rope, target

TRUNK = VitTrunk(
  features=128,
  num_layers=2,
  num_heads=2,
  mlp_hidden=256,
  patch=14,
  window=24,
  global_layers=(1,),
  pretrain_grid=24,
  rope_theta=1e4,
  epsilon=1e-6,
  dtype=jnp.bfloat16,
  param_dtype=jnp.bfloat16,
)


def lowered(platform):
  """The trunk's program for 48 x 48 tokens, before XLA."""
  variables = jax.eval_shape(lambda: TRUNK.init(jax.random.key(0), jnp.zeros((1, 28, 28, 3))))
  pixels = jax.ShapeDtypeStruct((1, 672, 672, 3), jnp.float32)
  with target.traced_for([platform]):
    program = jax.jit(lambda *args: TRUNK.apply(*args)).trace(variables, pixels)
  return program.lower(lowering_platforms=(platform,)).as_text()


def test_one_process_traces_a_layer_for_each_platform():
  """Equal layers are traced once: not for a CPU and then taken for a TPU."""
  cpu, tpu, cuda, again = (lowered(p) for p in ("cpu", "tpu", "cuda", "cpu"))
  assert [x.count("tpu_custom_call") for x in (cpu, tpu, cuda)] == [0, 2, 0]
  assert cpu == again


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_write_products_in_16_bits(platform):
  products = re.findall(r"stablehlo.dot_general .* -> tensor<\S*x(\w+)>", lowered(platform))
  scores = 2 if platform == "cuda" else 0  # float32, which a TPU's kernels keep to themselves
  assert products.count("f32") == scores and products.count("bf16") == 13 + scores


def test_a_tpu_moves_no_windows_and_a_gpu_joins_no_halves():
  tpu, cuda = lowered("tpu"), lowered("cuda")
  blocks = {name: text[text.index("func.func private") :] for name, text in (("tpu", tpu), ("cuda", cuda))}
  assert not re.search(r"stablehlo\.(transpose|concatenate|pad)", blocks["tpu"])
  assert "stablehlo.concatenate" not in blocks["cuda"] and "stablehlo.reverse" in blocks["cuda"]
  assert "stablehlo.concatenate" in lowered("cpu")


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 0.008)])
def test_rotations_agree(dtype, tolerance):
  x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, size=(2, 36, 2, 16)), dtype)
  tables = rope.axial_rope(6, 16, 1e4)
  with target.traced_for(["cuda"]):
    got = rope.apply_rope(x, *tables)
  assert got.dtype == dtype
  wanted = rope.apply_rope(x, *tables)
  np.testing.assert_allclose(got.astype(np.float32), wanted.astype(np.float32), atol=tolerance)


def test_norms_agree_and_take_constant_rows():
  rng = np.random.default_rng(0)
  x = rng.normal(3, [[0.1], [1], [30]], size=(3, 256)).astype(np.float32)
  x = jnp.asarray(np.concatenate([x, np.full((1, 256), 100.1, np.float32)]))
  norm = layers.LayerNorm(1e-6)
  variables = norm.init(jax.random.key(0), x)
  with target.traced_for(["tpu"]):
    got = norm.apply(variables, x)
  wanted = norm.apply(variables, x)
  np.testing.assert_allclose(got[:3], wanted[:3], atol=2e-4)
  assert np.isfinite(got).all()
