import re

import jax
import ml_dtypes
import numpy as np
import pytest

from sam3lt_jax.checkpoints import engine
from sam3lt_jax.checkpoints.errors import CheckpointError, CheckpointMismatchError
from sam3lt_jax.checkpoints.rules import Layout, Rule

LAYOUT = Layout(
  "toy",
  "mobileclip",
  rules=(
    Rule("blocks.{i}.fc.weight", "block_{i}/fc/kernel", "linear"),
    Rule("blocks.{i}.qkv", ("block_{i}/q", "block_{i}/k", "block_{i}/v"), "split_linear"),
    Rule("norm{n:1|2}.bias", "norm{n}/bias"),
    Rule("bn.var", "batch_stats/bn/var", counter="bn.count"),
    Rule("{p:ambiguous}.weight", "a/{p}"),
    Rule("ambiguous.weight", "b/ambiguous"),
  ),
  ignored=((r"derived\..*", "noise"), (r"norm2\.bias", "clashes with a rule, on purpose")),
  aliases=((r"^wrapped\.", ""),),
  prefix="wrapped.",
)


def shape(*sizes, dtype=np.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


def tensors():
  rng = np.random.default_rng(0)
  return {
    "wrapped.blocks.0.fc.weight": rng.normal(size=(4, 3)).astype(np.float32),
    "wrapped.blocks.0.qkv": rng.normal(size=(6, 5)).astype(np.float32),
    "norm1.bias": rng.normal(size=7).astype(np.float32),
    "bn.var": rng.normal(size=2).astype(np.float32),
    "bn.count": np.array(3),
    "derived.table": np.zeros((9, 9), np.complex64),
  }


def target():
  return {
    "params/block_0/fc/kernel": shape(3, 4),
    "params/block_0/q": shape(5, 2),
    "params/block_0/k": shape(5, 2),
    "params/block_0/v": shape(5, 2),
    "params/norm1/bias": shape(7),
    "batch_stats/bn/var": shape(2),
  }


def test_load_and_export_round_trip():
  given = tensors()
  seen = []
  leaves = engine.load_tensors(LAYOUT, given, target(), advance=seen.append)
  assert list(leaves) == list(target())
  np.testing.assert_array_equal(leaves["params/block_0/fc/kernel"], given["wrapped.blocks.0.fc.weight"].T)
  np.testing.assert_array_equal(leaves["params/block_0/k"], given["wrapped.blocks.0.qkv"][2:4].T)
  assert sum(seen) == 4 * (12 + 30 + 7 + 2)
  entries = engine.export_tensors(LAYOUT, leaves)
  assert set(entries) == {
    "wrapped.blocks.0.fc.weight", "wrapped.blocks.0.qkv", "wrapped.norm1.bias", "wrapped.bn.var",
    "wrapped.bn.count",
  }  # fmt: skip
  for entry in entries.values():
    built = entry.build()
    assert (built.shape, built.dtype) == (entry.shape, entry.dtype)
    assert built.flags.c_contiguous
    assert built.nbytes == entry.nbytes
  counter = entries["wrapped.bn.count"].build()
  assert (counter.dtype, counter.shape, int(counter)) == (np.int64, (), 0)
  np.testing.assert_array_equal(entries["wrapped.blocks.0.qkv"].build(), given["wrapped.blocks.0.qkv"])
  np.testing.assert_array_equal(entries["wrapped.norm1.bias"].build(), given["norm1.bias"])


def test_leaves_are_copies_in_the_asked_dtype():
  given = tensors()
  wanted = target() | {"params/norm1/bias": shape(7, dtype=ml_dtypes.bfloat16)}
  leaves = engine.load_tensors(LAYOUT, given, wanted)
  assert leaves["params/norm1/bias"].dtype == ml_dtypes.bfloat16
  for leaf in leaves.values():
    assert leaf.flags.c_contiguous
    assert not any(np.shares_memory(leaf, t) for t in given.values())


def test_leaves_are_where_xla_takes_them_without_a_copy():
  for shape in ((3,), (5, 7), (300, 300)):
    for array in (np.ones(shape, np.float32), np.ones(shape, np.float32).T):
      copy = engine._copy(array, np.float16)
      assert copy.ctypes.data % 64 == 0 and copy.flags.c_contiguous and copy.dtype == np.float16
      np.testing.assert_array_equal(copy, array)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats_are_cast(dtype):
  given = {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in tensors().items()}
  leaves = engine.load_tensors(LAYOUT, given, target())
  assert all(leaf.dtype == np.float32 for leaf in leaves.values())
  np.testing.assert_array_equal(leaves["params/norm1/bias"], given["norm1.bias"].astype(np.float32))


def test_every_problem_is_listed_at_once():
  given = tensors()
  given |= {
    "mystery.one": np.zeros(1, np.float32),
    "mystery.two": np.zeros(1, np.float32),
    "blocks.7.fc.weight": np.zeros((1, 1), np.float32),  # the model has no block 7
    "ambiguous.weight": np.zeros(1, np.float32),  # two rules
    "norm2.bias": np.zeros(1, np.float32),  # a rule and the list of ignored
    "blocks.0.fc.weight": np.zeros((4, 3), np.float32),  # the same leaf as the wrapped key
  }
  given["wrapped.blocks.0.qkv"] = np.zeros((7, 5), np.float32)  # not three parts
  given["norm1.bias"] = np.zeros(8, np.float32)  # other size
  given["bn.var"] = np.zeros(2, np.int8)
  wanted = target() | {"params/extra/one": shape(2), "params/extra/two": shape(3)}
  with pytest.raises(CheckpointMismatchError) as caught:
    engine.load_tensors(LAYOUT, given, wanted, where="file.pt")
  p, text = caught.value.problems, str(caught.value)
  assert p.unmapped == ["mystery.one", "mystery.two"]
  assert p.unexpected == ["blocks.7.fc.weight (would be params/block_7/fc/kernel)"]
  assert sorted(line.split(":")[0] for line in p.doubled) == [
    "ambiguous.weight", "norm2.bias", "params/block_0/fc/kernel",
  ]  # fmt: skip
  assert p.missing == ["params/extra/one [2]", "params/extra/two [3]"]
  assert sorted(line.split(":")[0] for line in p.wrong_shape) == ["norm1.bias", "wrapped.blocks.0.qkv"]
  assert p.wrong_dtype == ["bn.var: int8"]
  assert text.startswith("file.pt (layout 'toy') does not fit:")
  for found in (p.unmapped, p.unexpected, p.doubled, p.missing, p.wrong_shape, p.wrong_dtype):
    assert all(line in text for line in found)
    assert re.search(rf"\({len(found)}\):", text)
  assert isinstance(caught.value, CheckpointError) and isinstance(caught.value, ValueError)


def test_nothing_is_read_when_something_does_not_fit():
  class Untouchable:
    shape, dtype = (7,), np.dtype(np.float32)

    def read(self):
      raise AssertionError("read")

  with pytest.raises(CheckpointMismatchError):
    engine.load_tensors(LAYOUT, {"norm1.bias": Untouchable(), "mystery": Untouchable()}, target())


def test_every_export_problem_is_listed_at_once():
  leaves = {
    "params/block_0/q": np.zeros((5, 2)),  # k and v absent
    "params/block_1/fc/kernel": np.zeros((2, 2, 2)),  # not a matrix
    "params/nowhere/kernel": np.zeros(1),
    "params/nowhere/bias": np.zeros(1),
  }
  with pytest.raises(CheckpointMismatchError) as caught:
    engine.export_tensors(LAYOUT, leaves)
  p = caught.value.problems
  assert p.unmapped == ["params/nowhere/kernel", "params/nowhere/bias"]
  assert p.missing == ["wrapped.blocks.0.qkv: params/block_0/k, params/block_0/v absent"]
  assert [line.split(":")[0] for line in p.wrong_shape] == ["wrapped.blocks.1.fc.weight"]
  parts = {f"params/block_0/{p}": np.zeros((5, 2)) for p in "qk"} | {"params/block_0/v": np.zeros((4, 2))}
  with pytest.raises(CheckpointMismatchError, match="cannot be undone"):
    engine.export_tensors(LAYOUT, parts)


def test_shapes_alone_do():
  entries = engine.export_tensors(LAYOUT, target())
  assert entries["wrapped.blocks.0.qkv"].shape == (6, 5)
  assert entries["wrapped.blocks.0.fc.weight"].nbytes == 48


@pytest.mark.parametrize(
  ("dtype", "floating"),
  [
    (np.float16, True),
    (ml_dtypes.bfloat16, True),
    (np.int8, False),
    (np.complex64, False),
    (np.bool_, False),
  ],
)
def test_is_floating(dtype, floating):
  assert engine.is_floating(dtype) == floating


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_all_finite(dtype):
  x = np.random.default_rng(0).normal(size=(3, 70_001)).astype(dtype)
  info = ml_dtypes.finfo(dtype)
  x[1, 2:5] = info.max, info.min, info.smallest_subnormal
  assert engine.all_finite(x) and engine.all_finite(x[:0]) and engine.all_finite(np.zeros((), dtype))
  for value in (np.nan, -np.nan, np.inf, -np.inf):
    for place in ((0, 0), (1, 40_000), (2, 70_000)):
      bad = x.copy()
      bad[place] = value
      assert not engine.all_finite(bad)


def test_tensors_with_nan_are_all_named():
  given = tensors()
  given["norm1.bias"][0] = np.nan
  given["wrapped.blocks.0.qkv"][5, 4] = -np.inf
  with pytest.raises(CheckpointMismatchError, match=r"NaN or infinity in \(2\):") as caught:
    engine.load_tensors(LAYOUT, given, target())
  assert sorted(caught.value.problems.not_finite) == [
    "norm1.bias (params/norm1/bias)", "wrapped.blocks.0.qkv (params/block_0/v)",
  ]  # fmt: skip
