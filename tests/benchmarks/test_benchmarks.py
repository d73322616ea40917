"""The benchmark command on a tiny model: that it measures what it says, not how fast anything is."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest

from sam3lt_jax import Sam3LiteTextConfig
from tests.benchmarks import beside_keras_hub, compare, flops, report, timing, workload
from tests.benchmarks.timing import OURS, REFERENCE, Row
from tests.reference import import_torch_reference

pytestmark = pytest.mark.full  # long: CI runs it


def test_sides_take_turns_after_a_warm_up(monkeypatch):
  monkeypatch.setattr(timing, "PAUSE", 0.0)
  monkeypatch.setattr(timing, "SHORT", 0.0)
  order = []
  calls = {(OURS, "jit"): lambda: order.append("a"), (REFERENCE, "eager"): lambda: order.append("b")}
  samples = timing.interleave(calls, repeats=3)
  assert order == ["a", "b"] * 4
  assert {k: len(v) for k, v in samples.items()} == {(OURS, "jit"): 3, (REFERENCE, "eager"): 3}


def test_short_calls_count_once_awake(monkeypatch):
  monkeypatch.setattr(timing, "PAUSE", 0.0)
  calls = []
  samples = timing.interleave({(OURS, "jit"): lambda: calls.append(0)}, repeats=2)
  assert len(calls) == 1 + 2 * 2 and len(samples[OURS, "jit"]) == 2


def test_slow_rows_repeat_less(monkeypatch):
  monkeypatch.setattr(timing, "PAUSE", 0.0)
  monkeypatch.setattr(timing, "ROW_SECONDS", 0.0)
  assert len(timing.interleave({(OURS, "jit"): lambda: None}, repeats=5)[OURS, "jit"]) == 2
  assert len(timing.interleave({(OURS, "jit"): lambda: None}, repeats=1)[OURS, "jit"]) == 1


def test_each_side_gets_its_faster_way():
  row = Row("detect", "x", "float32", {"a": [3.0, 1.0, 2.0], "b": [9.0]}, {"c": [4.0], "d": [8.0, 2.0]})
  assert row.best(OURS) == ("a", 2.0) and row.best(REFERENCE) == ("c", 4.0) and row.ratio == 0.5
  assert Row.from_json(json.loads(json.dumps(row.to_json()))) == row
  assert dataclasses.replace(row, reference={}).ratio is None


def test_flops_of_the_released_size():
  """About 5.9 TFLOP an image were measured for S1."""
  total = sum(flops.by_part(Sam3LiteTextConfig.s1("transformers"), tokens=32, boxes=0).values())
  assert 5.5e12 < total < 6.1e12


@pytest.mark.torch
@pytest.mark.parametrize("boxes", [0, 3])
def test_flops_are_those_that_torch_counts(boxes):
  ref = import_torch_reference()
  from torch.utils.flop_counter import FlopCounterMode

  from convert import torch_reference

  config = workload.config("tiny")
  data = {k: v for k, v in config.to_json().items() if k != "sam3lt_jax"}
  # Attention written out: torch does not count its CPU kernel.
  parts = ref.Sam3LiteTextConfig(**data, attn_implementation="eager")
  model = torch_reference.build_model(parts)
  side, tokens = config.vision.image_size, 7
  inputs = {
    "pixel_values": ref.torch.zeros(1, 3, side, side),
    "input_ids": ref.torch.ones(1, tokens, dtype=ref.torch.long),
    "attention_mask": ref.torch.ones(1, tokens, dtype=ref.torch.long),
  }
  if boxes:
    inputs["input_boxes"] = ref.torch.full((1, boxes, 4), 0.5)
  with ref.torch.inference_mode(), FlopCounterMode(display=False) as counter:
    model(**inputs)
  counts = {name: sum(by.values()) for name, by in counter.get_flop_counts().items()}
  root = type(model).__name__

  def counted(path):
    return counts.get(f"{root}.{path}", 0)

  ours = flops.by_part(config, tokens, boxes)
  trunk = ours[flops.PATCHES] + ours[flops.WINDOWED] + ours[flops.GLOBAL]
  unused = len(config.vision.scale_factors) - 1
  neck = counted("vision_encoder.neck") - counted(f"vision_encoder.neck.fpn_layers.{unused}")
  expected = {
    "trunk": (trunk, counted("vision_encoder.backbone")),
    "neck": (ours[flops.NECK], neck),
    "text": (ours[flops.TEXT], counted("text_encoder") + counted("text_projection")),
    "geometry": (ours.get(flops.GEOMETRY, 0), counted("geometry_encoder")),
    "fusion": (ours[flops.FUSION], counted("detr_encoder")),
    "scores": (ours[flops.SCORES], counted("dot_product_scoring")),
    "masks": (ours[flops.MASKS], counted("mask_decoder")),
  }
  for part, (here, there) in expected.items():
    assert here == pytest.approx(there, rel=0.02), part
  # The boxes' last refinement is computed outside the decoder, over all layers.
  assert ours[flops.DECODER] == pytest.approx(counted("detr_decoder"), rel=0.05)


def test_a_page_keeps_what_stands_around_its_tables(tmp_path):
  page = tmp_path / "page.md"
  page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
  report.write_page(page, [])
  assert page.read_text().startswith("before") and page.read_text().endswith("after\n")
  assert "old" not in page.read_text()
  page.write_text("no markers")
  with pytest.raises(ValueError, match="has no"):
    report.write_page(page, [])


@pytest.mark.parametrize("content", ["{}", "not json", "[]"])
def test_files_of_others_are_refused(tmp_path, content, capsys):
  (tmp_path / "a.json").write_text(content)
  assert compare.main(["--load", f"{tmp_path}/a.json"]) == 2
  assert "not a file that --json wrote" in capsys.readouterr().err


def test_mistakes_are_said_before_measuring(tmp_path, capsys):
  (tmp_path / "page.md").write_text("no markers")
  assert compare.main(["--size", "tiny", "--write", f"{tmp_path}/page.md"]) == 2
  assert "has no" in capsys.readouterr().err
  assert compare.main(["--size", "tiny", "--json", f"{tmp_path}/missing/a.json"]) == 2
  assert "no folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """One run of the command with all parts; (its JSON, its page's text, the folder)."""
  torch = import_torch_reference().torch
  folder = tmp_path_factory.mktemp("benchmarks")
  command = f"--size tiny --dtype float32 --repeats 1 --json {folder}/run.json --write {folder}/page.md"
  threads = torch.get_num_threads()
  torch.set_num_threads(1)  # tests share the cores; waiting for each other torch's threads would spin
  try:
    with pytest.MonkeyPatch.context() as patch:
      patch.setenv("OMP_NUM_THREADS", "1")
      assert compare.main(command.split()) == 0
  finally:
    torch.set_num_threads(threads)
  return json.loads((folder / "run.json").read_text()), (folder / "page.md").read_text(), folder


@pytest.mark.torch
def test_every_part_is_measured_on_both_sides(finished):
  data, _, _ = finished
  assert data["complete"] and data["size"] == "tiny" and data["repeats"] == 1
  assert "--size tiny" in data["command"]
  assert {"cpu", "cores", "versions", "date", "jax_backend"} <= set(data["machine"])
  assert {"jax", "torch", "transformers"} <= set(data["machine"]["versions"])
  of_part = {part: [r for r in data["rows"] if r["part"].startswith(part)] for part in compare.PARTS}
  for part in ("vision", "text", "detect", "clicks", "end_to_end", "scaling", "memory", "start"):
    assert of_part[part], part
  for row in data["rows"]:
    assert row["dtype"] == "float32" and row["unit"] in ("s", "MB")
    samples = [v for values in row["ours"].values() for v in values]
    assert samples and np.isfinite(samples).all(), row["what"]
    if "compilation" not in row["what"].lower() and "tracing" not in row["what"]:
      assert row["reference"], row["what"]
    if row["part"] != "detect" or "further" not in row["what"]:  # a difference of two small times
      assert min(samples) >= 0, row["what"]
  assert len({r["part"] for r in of_part["scaling"]}) == 4
  phrases = next(r for r in of_part["detect"] if "2 phrases" in r["what"])
  assert set(phrases["ours"]) == {"jit, together", "jit, one by one"}
  assert set(phrases["reference"]) == {"eager, together", "eager, one by one"}


@pytest.mark.torch
def test_both_sides_compute_the_same(finished):
  data, _, _ = finished
  note = next(r["note"] for r in data["rows"] if r["what"] == "detection, 1 phrase")
  assert float(note.split("class logits ")[1].split(" ")[0]) < 1e-4
  kept = next(r["note"] for r in data["rows"] if r["what"].startswith("file to results, 1 image"))
  assert kept.startswith("ours keeps 3, reference keeps 3")


@pytest.mark.torch
def test_the_profile_has_every_part(finished):
  data, _, _ = finished
  parts = {share["part"]: share for share in data["profile"]}
  named = {flops.WINDOWED, flops.GLOBAL, flops.NECK, flops.TEXT, flops.GEOMETRY, flops.FUSION}
  assert named | {flops.DECODER, flops.SCORES, flops.MASKS, "file to results"} <= set(parts)
  for part in named:
    assert parts[part]["seconds"] > 0 and parts[part]["gflop"] > 0, part
  whole = parts["file to results"]
  assert whole["gflop"] == pytest.approx(sum(s["gflop"] for s in data["profile"]) - whole["gflop"])
  assert all(gflops > 0 for gflops in data["peaks"]["float32"].values())


@pytest.mark.torch
def test_the_page_is_written_and_can_be_put_together_again(finished, capsys):
  _, page, folder = finished
  for heading in ("# Speed and memory", "| Vision encoder |", "| Memory |", "### Scaling: ", "### Profile"):
    assert heading in page
  assert "keras-hub" in page
  assert compare.main(["--load", f"{folder}/run.json", "--write", f"{folder}/again.md"]) == 0
  assert (folder / "again.md").read_text() == page
  assert capsys.readouterr().out.strip() in page


def test_beside_keras_hub_says_what_is_missing(tmp_path, capsys):
  with pytest.raises(SystemExit):
    beside_keras_hub.main(["--python", str(tmp_path / "nowhere")])
  assert "--python must be an interpreter" in capsys.readouterr().err
  without = beside_keras_hub.Side(beside_keras_hub.KERAS, sys.executable, "tiny", "float32")
  with pytest.raises(SystemExit, match="keras-hub ended with status 1"):
    without.call()
