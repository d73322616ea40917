"""Every example runs, on a tiny model, as a user would run it."""

import pathlib
import runpy
import sys

import pytest
from PIL import Image

from sam3lt_jax import from_pretrained
from tests import tiny

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch):
  """Python puts a script's folder on the path."""
  monkeypatch.syspath_prepend(str(EXAMPLES))


EXPECTED = {
  "segment_photo.py": ("Results(60 instances, size=480x480)", "wrote segment_photo.png"),
  "many_prompts_one_image.py": ("orange star: ", "not like the square: ", "all at once: ["),
  "use_the_model_directly.py": (
    "pixel_values: float32 (1, 168, 168, 3)", "pred_masks: (1, 20, 48, 48)", "prompt tokens: (1, 18, 32)",
    "480, 480)",
  ),
  "pmap_over_devices.py": ("pred_masks (2, 20, 48, 48), by device: {", "found, masks ("),
}  # fmt: skip
# Tested beside what they train with; the bundled model by default.
TRAINING = ("distill_text_encoder.py", "finetune_detector.py")


def test_every_script_is_tested():
  scripts = [f.name for f in EXAMPLES.glob("*.py") if "__main__" in f.read_text(encoding="utf-8")]
  assert sorted([*EXPECTED, *TRAINING]) == sorted(scripts)


@pytest.mark.full
@pytest.mark.parametrize("script", EXPECTED)
def test_example_on_its_own_picture(script, tmp_path, monkeypatch, capsys):
  """`python examples/script random:tiny`, in this process, where compiling can be hurried."""
  from_pretrained("random:tiny", progress=False)  # traces the shapes, which are kept, outside of `hurry`
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", [script, "random:tiny"])
  with tiny.hurry():
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
  printed = capsys.readouterr().out
  for text in EXPECTED[script]:
    assert text in printed
  if script == "segment_photo.py":
    assert Image.open(tmp_path / "segment_photo.png").size == (480, 480)


BUNDLED = {
  "segment_photo.py": ("Results(7 instances, size=480x480)", "wrote segment_photo.png"),
  "many_prompts_one_image.py": (
    "orange star: 2 found", "like the star: 2 found", "wrote many_prompts.png", "all at once: [2, 2, 3, 2]",
  ),
  "use_the_model_directly.py": ("2 found, masks (2, 480, 480)",),
  "pmap_over_devices.py": ("2 found, masks (2, 480, 480)\n2 found, masks (2, 480, 480)",),
}  # fmt: skip


@pytest.mark.parametrize(
  "script", [pytest.param(s, marks=() if s == "segment_photo.py" else pytest.mark.full) for s in BUNDLED]
)
def test_example_with_the_bundled_model(script, tmp_path, monkeypatch, capsys):
  """`python examples/script shapes`: it finds what is there, and draws it."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", [script, "shapes"])
  runpy.run_path(str(EXAMPLES / script), run_name="__main__")
  printed = capsys.readouterr().out
  for text in BUNDLED[script]:
    assert text in printed


@pytest.mark.parametrize("script", EXPECTED)
def test_example_uses_a_released_model_by_default(script):
  assert runpy.run_path(str(EXAMPLES / script), run_name="example")["MODEL"] == "s0"
