"""`python -m convert.verify`: the comparison itself, and the command on tiny checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import convert
from convert import verify
from tests import reference

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A tiny S0-like model with CLIP's whole vocabulary, as transformers saves it."""
  model = reference.random_torch_model(reference.tiny_config("s0", vocab_size=49408, context=16), seed=7)
  return reference.save_torch(model, tmp_path_factory.mktemp("verify") / "s0")


@pytest.fixture
def photo(tmp_path):
  path = tmp_path / "photo.png"
  Image.fromarray(verify._test_card()).save(path)
  return str(path)


def run(capsys, *argv):
  code = convert.run(verify.main, argv)
  captured = capsys.readouterr()
  return code, captured.out, captured.err


@pytest.mark.parametrize(
  ("prompt", "grid"),
  [
    (["--text", "a red disc"], 12),
    # 140 pixels: a grid of 10, which the window of 4 does not divide.
    pytest.param(
      ["--box", "90,70,230,210", "--box", "10,10,60,90", "--size", "140"], 10, marks=pytest.mark.full
    ),
  ],
)
def test_a_good_checkpoint_passes(capsys, checkpoint, photo, prompt, grid):
  code, out, err = run(capsys, checkpoint, "--image", photo, *prompt)
  assert code == 0, out + err
  lines = out.splitlines()
  start = next(i for i, line in enumerate(lines) if line.startswith("stage"))
  stages = {line.split()[0]: line.split()[1] for line in lines[start + 1 : lines.index("", start)]}
  for name in ("vit_block_0", "neck_2", "text_block_3", "text_features", "encoder_output"):
    assert name in stages
  for name in ("decoder_boxes[0]", "decoder_logits[1]", "presence_logits", "pred_masks", "semantic_seg"):
    assert name in stages
  assert stages["vit_block_3"] == f"1x{grid}x{grid}x64" and f"photo.png at {14 * grid} pixels" in out
  assert any("the same; boxes of" in line for line in lines)
  assert lines[-1] == f"all {len(stages)} stages are within their tolerance"


def test_a_word_that_a_pruned_vocabulary_has_not(capsys):
  code, _, err = run(capsys, "shapes", "--text", "truck")
  assert code == 2 and "text 'truck': the model's vocabulary was pruned to 25 tokens, and 'truck' is" in err


@pytest.mark.full
def test_the_bundled_model_and_its_own_vocabulary(capsys):
  code, out, err = run(capsys, "shapes")
  assert code == 0 and out.splitlines()[-1].endswith("stages are within their tolerance"), out + err


@pytest.mark.full  # 3 s
def test_a_wrong_weight_is_found_where_it_acts(capsys, checkpoint, monkeypatch):
  from sam3lt_jax import checkpoints

  load = checkpoints.from_pretrained

  def perturbed(*args, **kwargs):
    model, variables = load(*args, **kwargs)
    layer = variables["params"]["detr_encoder"]["layers_1"]["mlp"]["fc2"]
    layer["bias"] = layer["bias"].at[3].add(1e-2)
    return model, variables

  monkeypatch.setattr(checkpoints, "from_pretrained", perturbed)
  code, out, _ = run(capsys, checkpoint)
  assert code == 1
  assert out.splitlines()[-1].startswith("FAILED") and out.strip().endswith("the first is encoder_output")


def test_compare():
  a = {
    "vit_block_10": np.full((2, 3), 150.0, np.float32),
    "vit_block_9": np.ones((2, 3), np.float32),
    "decoder_logits": np.zeros((2, 1, 4), np.float32),
    "prompt_mask": np.array([[True, False]]),
  }
  rows = verify.compare(a, {k: v.copy() for k, v in a.items()})
  assert [r.name for r in rows] == [
    "vit_block_9", "vit_block_10", "prompt_mask", "decoder_logits[0]", "decoder_logits[1]",
  ]  # fmt: skip
  assert all(r.ok and r.difference == 0 for r in rows)
  # A stage of ten times the range may differ by ten times as much.
  assert rows[1].tolerance == pytest.approx(10 * rows[0].tolerance)

  b = {k: v.copy() for k, v in a.items()}
  b["decoder_logits"][1, 0, 2] = 2e-4
  assert [r.name for r in verify.compare(a, b) if not r.ok] == ["decoder_logits[1]"]
  b["vit_block_9"] = b["vit_block_9"][:1]
  b["prompt_mask"] = ~b["prompt_mask"]
  b["decoder_logits"][0, 0, 0] = np.nan
  del b["vit_block_10"]
  rows = verify.compare(a, b)
  assert not any(r.ok for r in rows)
  assert verify.format_rows(rows).count("MISSING") == 3


def test_summary_counts_what_a_user_sees():
  masks = np.full((1, 4, 10, 10), -1.0)
  masks[:, :, :5] = 1
  a = {
    "pred_logits": np.array([[9.0, 9.0, -9.0, 9.0]]),
    "presence_logits": np.array([[9.0]]),
    "pred_boxes": np.zeros((1, 4, 4)),
    "pred_masks": masks,
  }
  same = verify.summarise(a, a, (480, 640))
  assert "3 in the reference, 3 here, the same" in same and "0.0000 pixel" in same and "0.0000%" in same
  b = a | {"pred_logits": np.array([[9.0, -9.0, -9.0, 9.0]]), "pred_boxes": a["pred_boxes"] + 1e-3}
  b["pred_masks"] = masks.copy()
  b["pred_masks"][0, 0, 9, 9] = 1  # one of the 200 pixels of the two that both keep
  text = verify.summarise(a, b, (480, 640))
  assert "3 in the reference, 2 here, 1 differ" in text and "0.6400 pixel" in text and "0.5000%" in text


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "give either SOURCE or --random"),
    (["x", "--random", "s0"], "give either SOURCE or --random"),
    (["x", "--size", "15"], "--size must be a multiple of 14"),
    (["{checkpoint}", "--box", "1,2,3"], "--box: got '1,2,3'"),
    (["{checkpoint}", "--box", "600,10,700,90"], "not a box inside the image of 640 x 480"),
    (["{checkpoint}", "--image", "{checkpoint}/config.json"], "config.json"),
    (["./nothing-here"], "nothing-here"),
  ],
)
def test_mistakes_are_one_line_and_code_2(capsys, checkpoint, argv, message):
  argv = [a.replace("{checkpoint}", checkpoint) for a in argv]
  try:
    code, out, err = run(capsys, *argv)
  except SystemExit as e:
    captured = capsys.readouterr()
    code, out, err = e.code, captured.out, captured.err
  assert code == 2 and out == ""
  last = err.strip().splitlines()[-1]
  assert last.startswith("error: ") and message in last
  assert "Traceback" not in err
