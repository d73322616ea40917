"""Programs compiled for v5e by the TPU's own compiler, and the table that tells of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from sam3lt_jax.checkpoints.random_init import RANDOM_CONFIGS
from sam3lt_jax.config import Sam3LiteTextConfig
from sam3lt_jax.ops import target
from tests.benchmarks import flops
from tests.tpu import compile_small
from tests.tpu.conftest import ROOT
from tpu import compile
from tpu.chips import COMPILED

NEEDS_LIBTPU = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'sam3lt_jax[tpu]'"
)


ONE_CHIP = {"size": "s0", "topology": "v5e:2x2", "chips": 1}


def image_flops(config: Sam3LiteTextConfig) -> int:
  """Of `engine.encode` by the configuration: trunk, neck, and what all prompts share of the detector."""
  parts = flops.by_part(config, config.profile.context_length, 0)
  image = sum(parts[part] for part in (flops.PATCHES, flops.WINDOWED, flops.GLOBAL, flops.NECK))
  tokens, C = (config.vision.image_size // config.vision.patch_size) ** 2, config.detr_encoder.hidden_size
  convolved = flops._linear(4 * tokens, 9 * C, C) + flops._linear(16 * tokens, 9 * C, C)
  return image + flops._attention(tokens, tokens, C) + convolved


def run(*arguments: str, timeout: int) -> str:
  usual = {name: value for name, value in os.environ.items() if name != "JAX_DEFAULT_MATMUL_PRECISION"}
  done = subprocess.run(
    [sys.executable, "-m", *arguments],
    cwd=ROOT, env=usual | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=timeout,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


@pytest.fixture(scope="module")
def small():
  return json.loads(run("tests.tpu.compile_small", timeout=900).splitlines()[-1])


@NEEDS_LIBTPU
@pytest.mark.full
def test_a_small_model_has_the_kernels_and_no_collective(small):
  assert len(small) == 4
  for name, found in small.items():
    assert found["collectives"] == {}, name
    if name.startswith("clicks"):
      assert found["kernels"] == {}  # few tokens: nothing to save
      continue
    # The trunk's two layers and the first of the fusion encoder's two; the second, and the decoder's.
    vision, detection = {"windowed_attention": 3}, {"windowed_attention": 1, "biased_attention": 1}
    assert found["kernels"] == (vision if name.startswith("vision") else detection), name
    assert found["temporaries"] < 4 << 20, name  # one global layer's scores alone would be 42 MB


@NEEDS_LIBTPU
@pytest.mark.full
def test_the_compilers_flops_are_those_of_the_configuration(small):
  """The kernels' own are among them, which the compiler knows from us."""
  assert 1.0 < small["vision, 1 image, 1"]["flops"] / image_flops(compile_small.small()) < 1.05


@NEEDS_LIBTPU
@pytest.mark.full
@pytest.mark.large
def test_full_size_vision_meets_its_goals_and_the_table_says_so():
  """Takes minutes; what the table says of the other programs is not compiled again."""
  line = run("tpu.compile", "--only", "vision, 1", "--chips", "1", timeout=1800).splitlines()[-1]
  cells = [cell.strip() for cell in line.strip("| ").split("|")]
  assert cells[:2] == ["1", "vision, 1 image"] and cells[10:] == ["33 x windowed_attention", "none"]
  temporaries, flops, accessed = (float(cells[i]) for i in (3, 5, 6))
  assert accessed <= 20 and temporaries <= 0.2 and flops < 6
  (row,) = [r for r in rows() if ONE_CHIP.items() <= r.items() and r["program"] == "vision, 1 image"]
  assert accessed == pytest.approx(row["accessed"] / 1e9, rel=0.05)
  assert flops == pytest.approx(row["flops"] / 1e12, rel=0.02)


@pytest.mark.full  # 15 programs
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_every_program_can_be_traced_for(platform):
  """The training step among them, gradients of each platform's own forms."""
  for make in compile.programs(RANDOM_CONFIGS["tiny"](), 1).values():
    program = make()
    with target.traced_for([platform]):
      jax.jit(program.function).trace(*program.arguments)


# -------------------------------------------------------------------- the table


def rows():
  return json.loads(COMPILED.read_text())


def test_the_document_is_made_of_the_data():
  assert (ROOT / "docs" / "tpu.md").read_text() == compile.document(rows())


def test_the_programs_fit_and_talk_to_nobody():
  for row in rows():
    memory = row["arguments"] + row["temporaries"] + row["outputs"]
    assert memory < 16e9, row["program"]
    if "training" not in row["program"]:
      assert not row["collectives"], row["program"]
      without = row["program"].startswith(("clicks", "the tracker's neck", "reading"))  # few tokens, or none
      assert bool(row["kernels"]) != without, row["program"]


def test_full_size_flops_are_those_of_the_configuration():
  (row,) = [r for r in rows() if ONE_CHIP.items() <= r.items() and r["program"] == "vision, 8 images"]
  assert 1.0 < row["flops"] / 8 / image_flops(Sam3LiteTextConfig.s0()) < 1.05


def test_new_rows_replace_old_ones():
  old = [{"size": "s0", "topology": "v5e:2x2", "chips": c, "program": "p", "date": "then"} for c in (1, 4)]
  new = [old[1] | {"date": "now"}, old[0] | {"size": "s1"}]
  assert compile.merged(old, new) == [old[0], new[0], new[1]]


def test_kernels_and_collectives_are_read_from_the_program():
  class Compiled:
    def as_text(self):
      return (
        '  %windowed_attention.3 = bf16[1]{0} custom-call(%a, %b), custom_call_target="tpu_custom_call"\n'
        '  %windowed_attention = bf16[1]{0} custom-call(%a), custom_call_target="tpu_custom_call"\n'
        '  %custom-call.2 = bf16[1]{0} custom-call(%a), custom_call_target="ConcatBitcast"\n'
        "  %ar = f32[] all-reduce-start(%c)\n  %d = f32[] all-reduce-done(%ar)\n"
        "  %r = f32[] reduce-window(%c)\n"
        '\nENTRY %main {\n  %f = f32[] fusion(%c), backend_config={"estimated_cycles":"70"}\n'
        '  %g = f32[] fusion(%c), backend_config={"estimated_cycles":"7"}\n}\n'
      )

    def cost_analysis(self):
      return {"flops": 2.0, "bytes accessed": 3.0}

    def memory_analysis(self):
      class Memory:
        argument_size_in_bytes, temp_size_in_bytes, output_size_in_bytes, alias_size_in_bytes = 5, 6, 7, 4

      return Memory()

  found = compile.figures(Compiled())
  assert found.kernels == {"windowed_attention": 2} and found.collectives == {"all-reduce": 1}
  assert (found.arguments, found.temporaries, found.outputs, found.memory) == (5, 6, 3, 14)
  assert (found.flops, found.accessed, found.cycles) == (2.0, 3.0, 77)
  looped = Compiled()
  looped.as_text = lambda: "  %w = (f32[]) while(%a), body=%b\n"
  assert compile.figures(looped).flops is None


MISTAKES = {
  "topology 'v5e:3x7' cannot be compiled for: ": ["--topology", "v5e:3x7"],
  "only: no program's name holds 'training, 2'": ["--only", "training, 2"],
  "chips must be 1 to 4, got [9]": ["--chips", "9"],
}
ALL_MISTAKES = """
import json, sys
from tpu import compile
for arguments in json.loads(sys.argv[1]):
  try:
    sys.exit(f"{arguments} returned {compile.main(arguments)}")
  except SystemExit as e:
    print("exit", e.code, file=sys.stderr)
"""


@NEEDS_LIBTPU
@pytest.mark.full  # a process with libtpu
def test_mistakes_are_named():
  """In one process: to start JAX and libtpu takes longer than they do."""
  done = subprocess.run(
    [sys.executable, "-c", ALL_MISTAKES, json.dumps(list(MISTAKES.values()))],
    cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=120,
  )  # fmt: skip
  assert done.returncode == 0 and done.stderr.count("exit 2\n") == 3, done.stderr[-2000:]
  for message in MISTAKES:
    assert message in done.stderr, done.stderr[-2000:]
