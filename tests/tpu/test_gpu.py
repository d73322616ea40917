"""Programs compiled for a GPU that is not there, and what is counted in them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.tpu.conftest import ROOT
from tpu import gpu

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
HAS_PLUGIN = any(importlib.util.find_spec(name) for name in PLUGINS)

PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_add (p0: bf16[8,12], p1: bf16[4]) -> bf16[8,4] {
  %p0 = bf16[8,12]{1,0} parameter(0)
  %slice.1 = bf16[8,4]{1,0} slice(%p0), slice={[0:8], [4:8]}
  %p1 = bf16[4]{0} parameter(1)
  %broadcast = bf16[8,4]{1,0} broadcast(%p1), dimensions={1}
  ROOT %add = bf16[8,4]{1,0} add(%slice.1, %broadcast)
}

ENTRY %main.1 (x: bf16[8,6], w: bf16[6,12], b: bf16[4]) -> (bf16[8,4], pred[2]) {
  %x = bf16[8,6]{1,0} parameter(0)
  %w = bf16[6,12]{1,0} parameter(1)
  %b = bf16[4]{0} parameter(2)
  %dot.1 = (bf16[8,12]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul"
  %result = bf16[8,12]{1,0} get-tuple-element(%dot.1), index=0
  %fused.1 = bf16[8,4]{1,0} fusion(%result, %b), kind=kLoop, calls=%fused_add, metadata={op_name="jit(f)/norm/add"}
  %fmha = (bf16[8,4]{1,0}, u8[0]{0}) custom-call(%fused.1, %fused.1), custom_call_target="__cudnn$fmhaSoftmax"
  %copy.1 = pred[2]{0} copy(%x)
  ROOT %tuple = (bf16[8,4]{1,0}, pred[2]{0}) tuple(%fused.1, %copy.1)
}
"""  # noqa: E501


def test_kernels_are_read_from_the_program():
  product, norm, attention, copy = gpu.kernels_of(PROGRAM)
  assert product == (
    "product",
    2 * (8 * 6 + 6 * 12 + 8 * 12),
    "(bf16[8,12], s8[4194304])",
    "",
  )  # no workspace
  assert norm == (
    "fusion",
    2 * (8 * 4 + 4 + 8 * 4),
    "bf16[8,4]",
    "jit(f)/norm/add",
  )  # of the product, a slice
  assert attention[:2] == ("attention", 2 * 3 * 8 * 4)
  assert copy[:2] == ("copy", 2 * 8 * 6 + 2)


def test_a_loop_is_not_counted():
  looped = PROGRAM.replace("%copy.1 = pred[2]{0} copy(%x)", "%copy.1 = pred[2]{0} while(%x), body=%fused_add")
  assert gpu.kernels_of(looped) is None


def test_the_table():
  row = gpu.Row(4, "vision", 2_000_000_000, 30_000_000, 0, gpu.kernels_of(PROGRAM), {"all-reduce": 2})
  cells = [cell.strip() for cell in gpu.table([row], "h200").splitlines()[-1].split("|")[1:-1]]
  assert cells[:9] == ["4", "vision", "2.00", "0.03", "0.00", "4", "1", "1", "0"]
  assert cells[9:] == ["2", "0.0", "0.0", "2 x all-reduce"]
  assert "| loops |" in gpu.table([row, gpu.Row(1, "training", 0, 0, 0, None, {})], "h200").splitlines()[-1]


def test_some_rows_of_a_document_are_replaced():
  row = lambda cards, program, bytes: gpu.Row(cards, program, bytes, 0, 0, None, {})  # noqa: E731
  before = [row(1, "vision", 10**9), row(1, "detection", 10**9), row(4, "vision", 10**9)]
  document = f"# Title\n\n{gpu.table(before, 'h200')}\n"
  after = gpu.replaced(document, gpu.table([row(4, "vision", 3 * 10**9)], "h200"))
  assert after == document.replace("| 4 | vision | 1.00 |", "| 4 | vision | 3.00 |") != document
  with pytest.raises(SystemExit, match="the document lacks vision on 8 card"):
    gpu.replaced(document, gpu.table([row(8, "vision", 1)], "h200"))


def test_mistakes_are_named(capsys):
  without = "needs jax's plugin for CUDA: pip install 'sam3lt_jax[cuda]'"
  only = "only: no program's name holds 'training, 2'" if HAS_PLUGIN else without
  for arguments, said in (
    (["--cards", "0"], "cards must be at least 1, got 0"),
    (["--only", "training, 2"], only),
  ):
    with pytest.raises(SystemExit):
      gpu.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.skipif(not HAS_PLUGIN, reason="needs jax's plugin for CUDA: pip install 'sam3lt_jax[cuda]'")
def test_full_size_detection_has_cudnns_attention_and_no_more_kernels_than_the_page_says():
  done = subprocess.run(
    [sys.executable, "-m", "tpu.gpu", "--only", "detection, 1 prompt", "--cards", "1"],
    cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=900,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]

  def figures(text):
    line = next(line for line in text.splitlines() if line.startswith("| 1 | detection, 1 prompt |"))
    return [cell.strip() for cell in line.split("|")[6:9]]  # kernels, products, attention

  found, told = figures(done.stdout), figures((ROOT / "docs/gpu.md").read_text())
  assert found[2] == told[2] == "5" and int(found[0]) <= int(told[0])
