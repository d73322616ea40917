"""Exports run in a process that has jax and numpy and nothing else, and give what the library gives."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax import Predictor, exporting
from sam3lt_jax.features import TextFeatures
from sam3lt_jax.ops import attention, target
from tests import tiny

pytestmark = pytest.mark.full  # long: CI runs it

SIDE = 84
ALONE = ("jax", "jaxlib", "ml_dtypes", "numpy", "opt_einsum", "scipy")  # jax, numpy and what they require
CALLS = ((1, 1), (2, 3), (3, 2))  # images and prompts


@pytest.fixture(scope="module")
def predictor():
  return Predictor.from_pretrained("random:tiny", image_size=SIDE, compile_ahead=False)


@pytest.fixture(scope="module")
def exported(predictor, tmp_path_factory):
  """A symbolic export whose CPU branch computes attention in blocks, as at full size."""
  folder = tmp_path_factory.mktemp("export") / "model"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(attention, "BLOCK_ABOVE_BYTES", 16 << 10)
    manifest = exporting.export_model(predictor, folder, phrases=["truck", "red wheel"], name="random:tiny")
  return folder, manifest


def _site(folder: pathlib.Path) -> pathlib.Path:
  """A folder of packages that holds those of `ALONE` only."""
  folder.mkdir()
  for name in ALONE:
    (origin,) = importlib.util.find_spec(name).submodule_search_locations
    os.symlink(origin, folder / name)
    if os.path.isdir(f"{origin}.libs"):  # shared libraries of numpy and scipy
      os.symlink(f"{origin}.libs", folder / f"{name}.libs")
  return folder


def _alone(code: str, site: pathlib.Path, *args) -> str:
  """Runs `code` where nothing can be imported but the standard library and `site`; returns its output."""
  head = f"import sys; sys.path.append({str(site)!r})\n"
  done = subprocess.run(
    [sys.executable, "-I", "-S", "-c", head + textwrap.dedent(code), *map(str, args)],
    capture_output=True, text=True, timeout=300, cwd=site,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def _inputs(images: int, prompts: int, seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  mask = np.arange(16) < rng.integers(3, 17, (prompts, 1))
  return {
    "pixels": tiny.pixels(images, SIDE, seed),
    "ids": (rng.integers(1, 40_000, (prompts, 16)) * mask).astype(np.int32),
    "mask": mask,
    "boxes": rng.uniform(0.2, 0.5, (prompts, 2, 4)).astype(np.float32),
    "labels": np.array([[1, 0], [1, -10]] * prompts, np.int32)[:prompts],
    "index": np.arange(prompts)[::-1].astype(np.int32) % images,
  }


def _library(predictor, given) -> dict[str, np.ndarray]:
  """The library's own results; boxes padded to the eight slots of the export, as `Predictor` does."""
  empty = ((0, 0), (0, 8 - given["boxes"].shape[1]))
  boxes = np.pad(given["boxes"], (*empty, (0, 0)))
  labels = np.pad(given["labels"], empty, constant_values=-10)
  arrays = given | {"boxes": boxes, "labels": labels}
  return jax.tree.map(np.asarray, _compiled(predictor.model)(predictor.variables, *arrays.values()))


@functools.cache
def _compiled(model):
  def whole(variables, pixels, ids, mask, boxes, labels, index):
    vision = model.apply(variables, pixels, method="get_vision_features")
    tokens = model.apply(variables, ids, mask, method="get_text_features").pooler_output
    out = model.apply(
      variables, vision_embeds=vision, text_embeds=TextFeatures(tokens, tokens, mask),
      input_boxes=boxes, input_boxes_labels=labels, image_index=index,
    )  # fmt: skip
    return {"tokens": tokens, "map_2": vision.convolved[0]} | {k: getattr(out, k) for k in exporting.OUTPUTS}

  return tiny.jit(whole)


RUN = """
  import json
  import numpy as np
  folder, work, calls = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
  sys.path.insert(0, folder)
  import loader
  model = loader.load(folder)
  for i in range(calls):
    given = np.load(f"{work}/in_{i}.npz")
    maps = model.vision(given["pixels"])
    tokens = model.text(given["ids"], given["mask"])
    index = given["index"] if len(maps[0]) > 1 else None
    found = model.detection(maps, tokens, given["mask"], given["boxes"], given["labels"], index)
    np.savez(f"{work}/out_{i}.npz", tokens=tokens, map_2=maps[2], scores=loader.scores(found), **found)
  ids, mask = model.phrases("red wheel", "truck")
  plain = model.detection(maps, model.text(ids, mask), mask, image_index=[2, 0])
  np.savez(f"{work}/phrases.npz", ids=ids, mask=mask, **plain)
  absent = [name for name in ("sam3lt_jax", "flax", "safetensors") if loader_cannot(name)]
  print(json.dumps({"absent": absent, "flatbuffers": sys.modules["flatbuffers"].__file__}))
"""
CANNOT = """
  import importlib.util
  def loader_cannot(name):
    return importlib.util.find_spec(name) is None
"""


@pytest.fixture(scope="module")
def ran(exported, tmp_path_factory):
  """What the loader computed in its own process: (its last line, inputs, outputs, outputs for phrases)."""
  work = tmp_path_factory.mktemp("run")
  given = [_inputs(*call, seed=i) for i, call in enumerate(CALLS)]
  for i, arrays in enumerate(given):
    np.savez(work / f"in_{i}.npz", **arrays)
  printed = _alone(CANNOT + RUN, _site(work / "site"), exported[0], work, len(CALLS))
  outputs = [dict(np.load(work / f"out_{i}.npz")) for i in range(len(CALLS))]
  return json.loads(printed), given, outputs, dict(np.load(work / "phrases.npz"))


def test_the_loader_runs_with_jax_and_numpy_alone(ran, exported):
  said = ran[0]
  assert said["absent"] == ["sam3lt_jax", "flax", "safetensors"]
  assert pathlib.Path(said["flatbuffers"]).is_relative_to(exported[0] / "vendor")


@pytest.mark.parametrize("call", range(len(CALLS)), ids=lambda i: f"{CALLS[i][0]}x{CALLS[i][1]}")
def test_any_number_of_images_and_prompts_gives_the_librarys_results(ran, predictor, call):
  _, given, outputs, _ = ran
  expected, got = _library(predictor, given[call]), outputs[call]
  scores = got.pop("scores")
  assert sorted(got) == sorted(expected)
  for name, value in expected.items():
    assert got[name].shape == value.shape and got[name].dtype == np.float32
    np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=2e-5 * np.abs(value).max(), err_msg=name)
  sigmoid = [1 / (1 + np.exp(-expected[k])) for k in ("pred_logits", "presence_logits")]
  np.testing.assert_allclose(scores, sigmoid[0] * sigmoid[1], atol=1e-5)


def test_phrases_kept_at_export_need_no_tokenizer_and_no_boxes(ran, predictor):
  got = ran[3]
  ids, mask = predictor.processor.tokenizer(["red wheel", "truck"])
  np.testing.assert_array_equal(got["ids"], ids)
  np.testing.assert_array_equal(got["mask"], mask.astype(bool))
  given = ran[1][-1] | {
    "ids": ids, "mask": mask.astype(bool), "index": np.array([2, 0], np.int32),
    "boxes": np.zeros((2, 0, 4), np.float32), "labels": np.zeros((2, 0), np.int32),
  }  # fmt: skip
  expected = _library(predictor, given)
  for name in ("pred_logits", "pred_boxes", "pred_masks"):
    value = expected[name]
    np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=2e-5 * np.abs(value).max(), err_msg=name)


def test_the_manifest_says_what_is_in_the_folder(exported, predictor):
  folder, manifest = exported
  assert json.loads((folder / "manifest.json").read_text()) == manifest
  for name, file in manifest["files"].items():
    content = (folder / name).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
  there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}
  assert there == {*manifest["files"], "manifest.json"} and "vendor/flatbuffers/builder.py" in there
  parts = manifest["parts"]
  assert parts["vision"]["inputs"] == [{"name": "pixels", "shape": ["b", SIDE, SIDE, 3], "dtype": "float32"}]
  assert parts["text"]["outputs"] == [{"name": "tokens", "shape": ["p", 16, 32], "dtype": "float32"}]
  shapes = {x["name"]: x["shape"] for x in parts["detection"]["inputs"] + parts["detection"]["outputs"]}
  assert shapes["map_0"] == ["b", 6, 6, 32] and shapes["boxes"] == ["p", 8, 4]
  assert shapes["image_index"] == ["p"] and shapes["pred_masks"] == ["p", 20, 24, 24]
  assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
  assert manifest["score_threshold"] == predictor.processor.profile.score_threshold
  assert manifest["versions"]["jax"] == jax.__version__


def test_weights_lie_beside_the_programs_and_only_those_that_are_read(exported, predictor):
  from safetensors.numpy import load_file

  from sam3lt_jax.checkpoints import engine
  from sam3lt_jax.export_loader import read_safetensors

  folder, manifest = exported
  stored, ours = load_file(folder / "weights.safetensors"), read_safetensors(folder / "weights.safetensors")
  leaves = engine.flatten(predictor.variables)
  assert set(stored) == {name for part in manifest["parts"].values() for name in part["weights"]}
  assert set(leaves) - set(stored)  # the unused level of the neck, CLIP's own text head
  assert not any("fpn_layers_3" in name for name in stored)
  for name, value in stored.items():
    np.testing.assert_array_equal(value, leaves[name])
    np.testing.assert_array_equal(ours[name], value)
  programs = sum((folder / f"{part}.jaxexport").stat().st_size for part in manifest["parts"])
  assert programs < (folder / "weights.safetensors").stat().st_size / 10


def test_every_platform_has_its_lowering_and_none_a_kernel_of_its_own(exported):
  folder, manifest = exported
  for part in manifest["parts"].values():
    program = jax.export.deserialize(bytearray((folder / part["file"]).read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    assert program.nr_devices == 1
    targets = set(re.findall(r"custom_call @([\w.]+)", program.mlir_module()))
    assert targets <= {"shape_assertion"}, targets


def test_blocked_attention_is_for_the_cpu_only():
  """One program; which form of attention runs is decided where it runs."""
  q = jax.ShapeDtypeStruct((1, 2304, 2, 8), jnp.float32)
  cases = {("cpu",): (True, False), ("tpu",): (False, False), ("cpu", "tpu"): (True, True)}
  for platforms, (loops, chooses) in cases.items():
    with target.traced_for(platforms):
      program = jax.export.export(jax.jit(lambda *a: attention.attend(*a)), platforms=platforms)(q, q, q)
    text = program.mlir_module()
    assert ("stablehlo.while" in text, "stablehlo.case" in text) == (loops, chooses)


def test_fixed_numbers_leave_no_symbol(predictor):
  variables = jax.eval_shape(lambda: predictor.variables)
  parts = exporting.export_parts(
    predictor.model, variables, image_size=SIDE, platforms=["tpu"], batch=2, prompts=5, boxes=0
  )
  shapes = {n: x.shape for part in parts.values() for n, x in (part.inputs | part.outputs).items()}
  assert shapes["pixels"] == (2, SIDE, SIDE, 3) and shapes["ids"] == (5, 16)
  assert shapes["pred_logits"] == (5, 20) and shapes["map_2"] == (2, 24, 24, 32)
  assert "boxes" not in shapes and "labels" not in shapes
  assert all(isinstance(d, int) for shape in shapes.values() for d in shape)


def test_a_damaged_or_foreign_export_is_refused(exported, tmp_path):
  from sam3lt_jax import export_loader

  folder, manifest = exported
  for name in [*manifest["files"], "manifest.json"]:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(folder / name, tmp_path / name)
  damaged = bytearray((folder / "weights.safetensors").read_bytes())
  damaged[-1] ^= 1
  (tmp_path / "weights.safetensors").unlink()
  (tmp_path / "weights.safetensors").write_bytes(damaged)
  with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
    export_loader.load(tmp_path)
  (tmp_path / "manifest.json").unlink()
  (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": "another/2"}))
  with pytest.raises(ValueError, match=r"format must be sam3lt_jax\.export/2, got 'another/2'"):
    export_loader.load(tmp_path)


def test_the_loader_names_prompts_that_fit_no_image(exported):
  from sam3lt_jax import export_loader

  model = export_loader.Model.__new__(export_loader.Model)
  model.manifest, model._parts = exported[1], {}
  maps, tokens, mask = [np.zeros((2, 24, 24, 32))], np.zeros((3, 16, 32)), np.ones((3, 16))
  with pytest.raises(ValueError, match="3 prompts for 2 images: pass image_index"):
    model.detection(maps, tokens, mask)
  with pytest.raises(ValueError, match=r"image_index must be 3 numbers from 0 to 1, got \[0, 1, 2\]"):
    model.detection(maps, tokens, mask, image_index=[0, 1, 2])
  with pytest.raises(ValueError, match="8 slots a prompt, got 9 boxes"):
    model.detection(maps, tokens, mask, boxes=np.zeros((3, 9, 4)), image_index=[0, 1, 1])


@pytest.mark.parametrize(
  "options, message",
  [
    ({"platforms": ["gpu"]}, r"platforms must be some of cpu, cuda, tpu, rocm, each once, got \['gpu'\]"),
    ({"platforms": []}, r"platforms must be some of .*, got \[\]"),
    ({"batch": 0}, "batch must be a whole number from 1, or 'symbolic', got 0"),
    ({"prompts": "some"}, "prompts must be a whole number from 1, or 'symbolic', got 'some'"),
    ({"boxes": -1}, "boxes must be a whole number from 0, got -1"),
    ({"boxes": "symbolic"}, "boxes must be a whole number from 0, got 'symbolic'"),
  ],
)
def test_mistakes_are_named_before_anything_is_written(predictor, tmp_path, options, message):
  with pytest.raises(ValueError, match=message):
    exporting.export_model(predictor, tmp_path / "new", **options)
  assert not (tmp_path / "new").exists()


def test_a_folder_with_files_is_left_alone(predictor, tmp_path):
  (tmp_path / "mine.txt").write_text("mine")
  with pytest.raises(ValueError, match="directory must be new or empty"):
    exporting.export_model(predictor, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_leaves_nothing_behind(predictor, tmp_path, monkeypatch):
  monkeypatch.setattr(exporting, "export_parts", lambda *a, **k: {})

  def fail(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(exporting, "_write_weights", fail)
  with pytest.raises(OSError, match="No space left"):
    exporting.export_model(predictor, tmp_path / "new")
  assert list(tmp_path.iterdir()) == []
