"""Which kernel a program gets, and cuDNN's by what it is given."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sam3lt_jax.ops import attention, kernels, rope, target, tpu_attention
from sam3lt_jax.ops.target import Target


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch):
  monkeypatch.setattr(kernels, "_asked_for", None)
  monkeypatch.delenv(kernels.VARIABLE, raising=False)


def qkv(B, T, S, N, H, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(B, n, N, H)), dtype) for n in (T, S, S))


def shapes(B, T, S, N, H, dtype=jnp.bfloat16):
  return tuple(jax.ShapeDtypeStruct((B, n, N, H), dtype) for n in (T, S, S))


def mesh(devices: int):
  """A mesh that a program may be traced for; nothing runs on it."""
  return jax.sharding.AbstractMesh((devices, 1), ("data", "model"))


@pytest.mark.parametrize(
  "asked, platform, dtype, width, tokens, wanted",
  [
    ("xla", "gpu", "bfloat16", 64, 5184, None),
    ("auto", "cpu", "bfloat16", 64, 5184, None),
    (None, "gpu", "bfloat16", 64, 5184, kernels.cudnn),
    ("auto", "cuda", "float16", 64, 5184, kernels.cudnn),
    ("auto", "gpu", "float32", 64, 5184, None),
    ("auto", "gpu", "bfloat16", 60, 5184, None),
    ("auto", "gpu", "bfloat16", 64, 200, None),
    ("xla", "tpu", "bfloat16", 64, 5184, None),
    (None, "tpu", "float32", 64, 576, tpu_attention.attend),
    ("auto", "tpu", "bfloat16", 64, 200, None),
  ],
)
def test_chosen_by_platform_and_shape(asked, platform, dtype, width, tokens, wanted, monkeypatch):
  monkeypatch.setattr(kernels, "_has_cudnn", lambda: True)
  kernels.use(asked)
  q, k, _ = shapes(1, tokens, tokens, 2, width, jnp.dtype(dtype))
  assert kernels.chosen(q, k, Target((platform,))) is wanted
  assert kernels.chosen(q, k, Target((platform, "cpu"))) is None


def test_cudnn_is_split_by_rows_as_well(monkeypatch):
  monkeypatch.setattr(kernels, "_has_cudnn", lambda: True)
  q, k, _ = shapes(8, 576, 576, 2, 64)
  assert kernels.chosen(q, k, Target(("cuda",), takes_kernels=False)) is kernels.cudnn
  assert kernels.chosen(q, k, Target(("cuda",), mesh(4))) not in (None, kernels.cudnn)
  assert kernels.chosen(q, k, Target(("cuda",), mesh(3))) is None


def test_a_pallas_kernel_stands_only_where_xla_need_not_split_it():
  q, k, _ = shapes(8, 576, 576, 2, 64)
  x, tables = jax.ShapeDtypeStruct((8, 72, 72, 128), jnp.bfloat16), rope.axial_rope(24, 64, 1e4)
  cases = {
    Target(("tpu",)): True,
    Target(("tpu",), takes_kernels=False): False,
    Target(("tpu",), mesh(4)): True,
    Target(("tpu",), mesh(3)): False,  # does not divide the batch
  }
  for where, wanted in cases.items():
    assert (kernels.chosen(q, k, where) is not None) == wanted
    assert (kernels.chosen_for_windows(x, 2, 24, tables, where) is not None) == wanted


@pytest.mark.parametrize(
  "shape, dtype, heads, window, fits",
  [
    ((1, 72, 72, 1024), "bfloat16", 16, 24, True),
    ((1, 72, 72, 1024), "bfloat16", 16, 0, True),
    ((1, 72, 72, 1024), "float32", 16, 24, False),
    ((1, 72, 70, 1024), "bfloat16", 16, 24, False),  # no whole windows
    ((1, 72, 72, 1024), "bfloat16", 8, 24, False),  # heads of 128: one a register
    ((1, 72, 72, 192), "bfloat16", 3, 24, False),
    ((1, 96, 96, 1024), "bfloat16", 16, 0, False),  # keys beyond the fast memory
    ((1, 72, 72, 1024), "bfloat16", 16, 18, False),  # rows that end within a register
    ((1, 16, 16, 1024), "bfloat16", 16, 8, False),  # few tokens
  ],
)
def test_windows_take_the_kernel_where_it_fits(shape, dtype, heads, window, fits):
  tables = rope.axial_rope(window or shape[1], shape[3] // heads, 1e4)
  x = jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
  found = kernels.chosen_for_windows(x, heads, window, tables, Target(("tpu",)))
  assert (found is not None) == fits
  assert kernels.chosen_for_windows(x, heads, window, tables, Target(("cuda",))) is None


def test_the_bias_of_a_grid_takes_the_kernel_where_it_fits(monkeypatch):
  q, k, _ = shapes(4, 201, 5184, 8, 32)
  on_tpu = Target(("tpu",))
  assert kernels.chosen_with_bias(q, k, on_tpu) is tpu_attention.attend_with_bias
  assert kernels.chosen_with_bias(q, k, Target(("tpu",), mesh(2))) is not None
  refused = [
    (shapes(4, 201, 5184, 8, 32, jnp.float32)[:2], on_tpu),
    (shapes(4, 201, 400, 8, 32)[:2], on_tpu),
    (shapes(4, 201, 9216, 8, 32)[:2], on_tpu),
    ((q, k), Target(("cuda",))),
    ((q, k), Target(("tpu",), takes_kernels=False)),
    ((q, k), Target(("tpu",), mesh(3))),
  ]
  for arrays, where in refused:
    assert kernels.chosen_with_bias(*arrays, where) is None
  kernels.use("xla")
  assert kernels.chosen_with_bias(q, k, on_tpu) is None


def test_attention_with_the_bias_of_a_grid_goes_through_it(monkeypatch):
  monkeypatch.setattr(kernels, "MIN_TOKENS", 64)
  q, k, v = qkv(1, 9, 64, 4, 32, jnp.bfloat16)
  bias = attention.GridBias(jnp.ones((1, 4, 9, 8)), jnp.ones((1, 4, 9, 8)))
  with target.traced_for(["tpu"]):
    found = str(jax.make_jaxpr(lambda *args: attention.attend(*args, bias=bias))(q, k, v))
    dense = str(jax.make_jaxpr(lambda *args: attention.attend(*args, bias=bias.dense()))(q, k, v))
  assert "biased_attention" in found and "pallas_call" not in dense


def test_the_environment_asks_as_well(monkeypatch):
  q, k, _ = shapes(1, 576, 576, 2, 64)
  on_tpu = Target(("tpu",))
  assert kernels.chosen(q, k, on_tpu) is tpu_attention.attend
  monkeypatch.setenv(kernels.VARIABLE, "xla")
  assert kernels.chosen(q, k, on_tpu) is None
  kernels.use("auto")
  assert kernels.chosen(q, k, on_tpu) is tpu_attention.attend
  kernels.use(None)
  monkeypatch.setenv(kernels.VARIABLE, "flash")
  with pytest.raises(ValueError, match="SAM3LT_ATTENTION must be one of auto, xla, got 'flash'"):
    kernels.chosen(q, k, on_tpu)
  with pytest.raises(ValueError, match=r"name must be one of .* got 'flash'"):
    kernels.use("flash")


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="here it may be there")
def test_no_cudnn_without_a_gpu():
  kernels._has_cudnn.cache_clear()
  assert not kernels._has_cudnn()


def test_cudnn_is_given_what_attention_means(monkeypatch):
  """The same call with JAX's own implementation in cuDNN's place."""
  asked = []
  library = jax.nn.dot_product_attention

  def stand_in(*args, implementation):
    asked.append(implementation)
    return library(*args, implementation="xla")

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  q, k, v = qkv(2, 30, 40, 2, 8)
  np.testing.assert_allclose(kernels.cudnn(q, k, v), attention.attend(q, k, v), atol=2e-6)
  assert asked == ["cudnn"]


def test_attention_goes_through_the_kernel(monkeypatch):
  monkeypatch.setattr(kernels, "MIN_TOKENS", 64)
  q, k, v = qkv(1, 64, 64, 2, 32)
  attend = functools.partial(attention.attend, remat=True)  # without effect on a kernel
  with target.traced_for(["tpu"]), pltpu.force_tpu_interpret_mode():
    got = jax.jit(lambda *args: attend(*args))(q, k, v)
    plain = str(jax.make_jaxpr(lambda *args: attend(*args, mask=jnp.ones((1, 1, 1, 64), bool)))(q, k, v))
    kernel = str(jax.make_jaxpr(lambda *args: attend(*args))(q, k, v))
  assert "pallas_call" in kernel and "pallas_call" not in plain
  np.testing.assert_allclose(got, attention.attend(q, k, v), atol=2e-6)


MESH = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import tpu as pltpu
from sam3lt_jax import parallel
from sam3lt_jax.ops import attention, kernels, target
kernels.MIN_TOKENS = 64
mesh = parallel.make_mesh()
rows = parallel.batch_sharding(mesh)
q, k, v = (jnp.asarray(np.random.default_rng(i).normal(size=(4, 64, 2, 64)), jnp.bfloat16) for i in range(3))
with target.traced_for(["tpu"], mesh), pltpu.force_tpu_interpret_mode():
  split = jax.jit(lambda *a: attention.attend(*a), in_shardings=rows, out_shardings=rows)
  assert "shard_map" in str(jax.make_jaxpr(split)(q, k, v))
  got = split(*jax.device_put((q, k, v), rows))
assert len(got.addressable_shards) == 4 and got.addressable_shards[0].data.shape[0] == 1
wanted = attention.attend(q, k, v, blocked=False)
np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wanted, np.float32), atol=0.02)
"""


@pytest.mark.full  # 3 s
def test_each_device_of_a_mesh_runs_the_kernel_on_its_rows():
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
  done = subprocess.run(
    [sys.executable, "-c", MESH], env=environment, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr[-3000:]
