"""What transformers finds with a directory that we wrote: the same objects, not only the same tensors.

With trained weights: the bundled model, and one that `finetune` leaves. Random weights (`test_transformers`)
say that the functions agree; these, that what a user trains here is of use there.
"""

from __future__ import annotations

import numpy as np
import pytest

from examples.shapes.evaluation import held_out_scenes, questions_about
from sam3lt_jax import Predictor, from_pretrained, save_pretrained
from sam3lt_jax.checkpoints import sources
from sam3lt_jax.cli import main
from sam3lt_jax.training.rules import fitting, saved_config
from tests.reference import import_torch_reference

pytestmark = [pytest.mark.torch, pytest.mark.full]

MARGIN = 0.02  # a score so near to the threshold may fall on either side


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """The bundled model as `save_pretrained` writes it for transformers."""
  directory = tmp_path_factory.mktemp("bundled") / "transformers"
  model = from_pretrained("shapes", progress=False)
  save_pretrained(directory, *model, format="transformers", tokenizer=sources.bundled("shapes"))
  return directory


def their_finds(ref, directory):
  """(image, question) -> (scores, boxes, masks) that transformers finds, at its own threshold."""
  model = ref.transformers.Sam3LiteTextModel.from_pretrained(directory, dtype="float32").eval()
  processor = ref.transformers.AutoProcessor.from_pretrained(directory)

  def find(image, question):
    kwargs = {}
    if question.boxes:
      kwargs = {
        "input_boxes": [list(map(list, question.boxes))],
        "input_boxes_labels": [list(question.labels)],
      }
    inputs = processor(images=[image], text=[question.text], return_tensors="pt", **kwargs)
    with ref.torch.no_grad():
      out = model(**{k: v for k, v in inputs.items() if k != "original_sizes"})
    found = processor.post_process_instance_segmentation(
      out, threshold=0.3, target_sizes=inputs["original_sizes"].tolist()
    )[0]
    return (found[name].numpy() for name in ("scores", "boxes", "masks"))

  return find


def compare(ref, directory, scenes: int) -> int:
  """Asks both for every question about some scenes; returns how many objects both found."""
  # With their order of enlarging and squashing masks. The bundled model has the other, which moves borders.
  rules = fitting("transformers", saved_config(directory))
  theirs, ours = their_finds(ref, directory), Predictor.from_pretrained(directory, profile=rules)
  plain = Predictor.from_pretrained(directory)
  both = 0
  for scene in held_out_scenes(scenes, 900_000_000):
    for asked in questions_about(scene):
      q = asked.question
      given = {"boxes": [list(b) for b in q.boxes], "box_labels": list(q.labels)} if q.boxes else {}
      mine = ours(scene.image, text=q.text, threshold=0.3, **given)
      own = plain(scene.image, text=q.text, threshold=0.3, **given)
      np.testing.assert_allclose(own.scores, mine.scores, atol=1e-4)
      np.testing.assert_allclose(own.boxes, mine.boxes, atol=1e-2)
      scores, boxes, masks = theirs(scene.image, q)
      order = np.argsort(-scores), np.argsort(-mine.scores)
      keep = [int((x > 0.3 + MARGIN).sum()) for x in (scores, mine.scores)]
      assert abs(len(scores) - len(mine)) <= sum(x < 0.3 + MARGIN for x in (*scores, *mine.scores)), q
      for i in range(min(keep)):
        a, b = order[0][i], order[1][i]
        np.testing.assert_allclose(mine.scores[b], scores[a], atol=5e-3, err_msg=q.text)
      for a in order[0][: min(keep)]:  # equal scores may stand in another order
        box = np.abs(mine.boxes - boxes[a]).max(axis=1)
        b = int(box.argmin())
        assert box[b] < 0.5, q
        mask = masks[a].astype(bool)
        assert (mask & mine.masks[b]).sum() >= 0.97 * (mask | mine.masks[b]).sum(), q
        both += 1
  return both


def test_the_bundled_model_finds_there_what_it_finds_here(written):
  assert compare(import_torch_reference(), written, 6) > 30


def test_what_finetune_leaves_finds_there_what_it_finds_here(tmp_path):
  ref = import_torch_reference()
  assert main(["demo", "--data", str(tmp_path / "drawn")]) == 0
  argv = (
    f"finetune --model shapes --annotations {tmp_path}/drawn/train.json --images {tmp_path}/drawn/images"
    f" --lora-rank 4 --steps 4 --out {tmp_path}/run"
  )
  assert main(argv.split()) == 0
  assert compare(ref, tmp_path / "run" / "transformers", 6) > 20
