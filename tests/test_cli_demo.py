"""`sam3lt demo`: the first command that anybody runs, with the model that comes with the package."""

import numpy as np
from PIL import Image

from sam3lt_jax import cli
from sam3lt_jax.cli import demo


def test_it_draws_finds_and_names_what_it_wrote(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.main(["demo"]) == 0
  *lines, wrote = capsys.readouterr().out.splitlines()
  assert len(lines) == demo.PHRASES and all(" found" in line for line in lines)
  found = [int(line.split(": ")[1].split()[0]) for line in lines]
  assert all(n >= 1 for n in found[:-1]) and found[-1] == 0  # the last phrase matches nothing
  assert wrote == "wrote sam3lt_out/demo_overlay.png (the scene: sam3lt_out/demo_scene.png)"
  scene, overlay = (np.asarray(Image.open(f"sam3lt_out/demo_{name}.png")) for name in ("scene", "overlay"))
  assert scene.shape == overlay.shape == (demo.SIDE, demo.SIDE, 3)
  assert 0.02 < (scene != overlay).any(-1).mean() < 0.9


def test_a_scene_and_phrases_of_ones_own(tmp_path, capsys):
  assert cli.main(["demo", "shape", "--seed", "12", "--out", str(tmp_path / "here")]) == 0
  first, wrote = capsys.readouterr().out.splitlines()
  assert first.startswith("shape: ") and str(tmp_path / "here") in wrote


def test_mistakes_are_one_line(tmp_path, capsys):
  (tmp_path / "file").write_text("in the way")
  for argv, said in (
    (["demo", "pink elephant", "--out", str(tmp_path)], "elephant"),
    (["demo", "--seed", "-3"], "--seed"),
    (["demo", "--out", str(tmp_path / "file")], "file is no directory"),
  ):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("sam3lt: running on ")]
    assert out == "" and said in err and len(lines) == 1, err
