import builtins
import json
import sys

import numpy as np
import pytest

from sam3lt_jax.training import curves


def write(path, lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


def run_lines(steps=100):
  for step in range(1, steps + 1):
    yield {"step": step, "time": 0.0, "loss": 3.0 / step, "mask_loss": 1.0 / step, "learning_rate": 0.1}
    if step % 25 == 0:
      yield {"step": step, "time": 0.0, "eval_f1": step / 100}


def test_panels_keep_kinds_apart_and_hold_six_at_most():
  names = ["loss", "dice_loss", "grad_norm", "eval_cosine", "eval_loss", "learning_rate", "images_per_second"]
  series = {name: ([1, 2], [0.5, 1.0]) for name in ["accuracy", *names]}
  series |= {"eval_cgF1": ([2], [61.0]), "grams": ([1], [-3.0])}
  assert curves.panels(series) == {
    "losses": ["loss", "dice_loss"],
    "evaluation: losses": ["eval_loss"],
    "evaluation": ["eval_cosine"],
    "evaluation beyond 1": ["eval_cgF1"],
    "training metrics": ["accuracy"],
    "training metrics beyond 1": ["grams"],
    "gradient norm": ["grad_norm"],
    "images a second": ["images_per_second"],
    "learning rate": ["learning_rate"],
  }
  many = curves.panels({f"m{i}": ([1], [0.1]) for i in range(8)})
  assert many == {"training metrics": [f"m{i}" for i in range(6)], "training metrics (2)": ["m6", "m7"]}


def test_smooth_is_a_centred_mean():
  # 80 values: two to each side; a line stays a line but for its ends, where the window is shorter.
  got = curves.smooth([float(i) for i in range(80)])
  np.testing.assert_allclose(got[2:-2], np.arange(2, 78))
  np.testing.assert_allclose(got[:2], [1.0, 1.5])
  np.testing.assert_allclose(curves.smooth([5.0]), [5.0])


@pytest.mark.full  # 4 s
def test_a_picture_is_drawn(tmp_path):
  pytest.importorskip("matplotlib")
  from PIL import Image

  path = write(tmp_path / "metrics.jsonl", run_lines())
  path.write_text(path.read_text() + '{"step": 101, "lo')  # a line torn by a killed process
  curves.plot_run(path, tmp_path / "run.png", title="a run")
  image = np.asarray(Image.open(tmp_path / "run.png").convert("RGB"))
  assert image.shape[0] > 500 and image.shape[1] > 1000  # two rows, two columns
  assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50


def test_mistakes(tmp_path):
  pytest.importorskip("matplotlib")
  with pytest.raises(ValueError, match=r"no such file; pass the metrics.jsonl"):
    curves.plot_run(tmp_path / "metrics.jsonl", tmp_path / "run.png")
  with pytest.raises(ValueError, match="no metric in it yet"):
    curves.plot_run(write(tmp_path / "a.jsonl", []), tmp_path / "run.png")
  with pytest.raises(ValueError, match="line 2: no JSON object"):
    (tmp_path / "b.jsonl").write_text('{"step": 1}\nhello\n')
    curves.plot_run(tmp_path / "b.jsonl", tmp_path / "run.png")
  with pytest.raises(ValueError, match=r"txt.*png"):
    curves.plot_run(write(tmp_path / "c.jsonl", run_lines(3)), tmp_path / "run.txt")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
  real = builtins.__import__

  def without(name, *args, **kwargs):
    if name.startswith("matplotlib"):
      raise ImportError(name)
    return real(name, *args, **kwargs)

  for name in [name for name in sys.modules if name.startswith("matplotlib")]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setattr(builtins, "__import__", without)
  with pytest.raises(ImportError, match=r"pip install 'sam3lt_jax\[train\]'"):
    curves.plot_run(write(tmp_path / "metrics.jsonl", run_lines(3)), tmp_path / "run.png")
