"""Properties of the model: order, padding and neighbours change nothing.

One compiled call (3 prompts, 3 box slots, 8 tokens, 2 images) a profile serves all of them; hypothesis
chooses what stands in it.
"""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3lt_jax import Profile
from sam3lt_jax.config import PADDING_LABEL
from sam3lt_jax.features import TextFeatures, VisionFeatures
from tests import tiny

P, N, T, B = 3, 3, 8, 2
PROFILES = ("original", pytest.param("transformers", marks=pytest.mark.full))  # each is compiled
# The rows of one program; sums over slots run in another order when slots change places.
ATOL = 1e-5
few = settings(max_examples=8, deadline=None, derandomize=True, database=None)


class Call:
  """A detection on fixed random features, prompts as numpy arrays: what the properties rearrange."""

  def __init__(self, profile):
    self.model, self.variables = tiny.load(tiny.config(profile))
    self._run = tiny.jit(self._detect)

  def _detect(self, variables, maps, tokens, mask, boxes, labels, index):
    out = self.model.apply(
      variables,
      vision_embeds=VisionFeatures(maps[2], None, maps[:2]),
      text_embeds=TextFeatures(tokens, tokens, mask),
      input_boxes=boxes,
      input_boxes_labels=labels,
      image_index=index,
    )
    return {name: getattr(out, name) for name in tiny.OUTPUTS}

  def __call__(self, prompts, maps=None):
    """prompts: dict of arrays [P, ...]; returns dict of arrays [P, ...]."""
    out = self._run(self.variables, MAPS if maps is None else maps, **prompts)
    return {name: np.asarray(value) for name, value in out.items()}


@pytest.fixture(scope="module")
def calls():
  return {profile: Call(profile) for profile in ("original", "transformers")}


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


MAPS = tuple(normal(B, n, n, 16, seed=n) for n in (8, 4, 2))


def mixed(tokens=T, slots=N):
  """Three prompts: text and two boxes; text alone; text and one negative box. The last slots are padding."""
  labels = np.full((P, slots), PADDING_LABEL, np.int32)
  boxes = np.zeros((P, slots, 4), np.float32)
  if slots:
    labels[0, :2], labels[2, 0] = 1, 0
    boxes[0, :2], boxes[2, 0] = [[0.5, 0.5, 0.4, 0.3], [0.2, 0.7, 0.3, 0.3]], [0.6, 0.4, 0.5, 0.2]
  features = np.zeros((P, tokens, 16), np.float32)
  features[:, :6] = normal(P, 6, 16, seed=1)
  mask = np.arange(tokens) < np.array([[6], [4], [5]])
  index = np.array([0, 1, 1], np.int32)
  return {"tokens": features, "mask": mask, "boxes": boxes, "labels": labels, "index": index}


def take(prompts, rows):
  return {name: value[np.asarray(rows)] for name, value in prompts.items()}


def assert_rows(out, wanted, rows=slice(None), wanted_rows=slice(None), atol=ATOL):
  for name in tiny.OUTPUTS:
    np.testing.assert_allclose(out[name][rows], wanted[name][wanted_rows], atol=atol, err_msg=name)


@pytest.mark.full  # 4 s
@pytest.mark.parametrize("profile", PROFILES)
@few
@given(order=st.permutations(range(P)))
def test_permuting_prompts_permutes_results(calls, profile, order):
  call, prompts = calls[profile], mixed()
  assert_rows(call(take(prompts, order)), call(prompts), slice(None), list(order))


@pytest.mark.parametrize("profile", PROFILES)
@few
@given(order=st.permutations(range(N)))
def test_permuting_boxes_changes_nothing(calls, profile, order):
  """Padding in front of boxes and between them included."""
  call, prompts = calls[profile], mixed()
  moved = prompts | {name: prompts[name][:, list(order)] for name in ("boxes", "labels")}
  assert_rows(call(moved), call(prompts))


@pytest.mark.parametrize("profile", PROFILES)
@few
@given(seed=st.integers(0, 1000), size=st.sampled_from([0.1, 1.0, 1e3]))
def test_what_stands_in_padding_slots_changes_nothing(calls, profile, seed, size):
  call, prompts = calls[profile], mixed()
  tokens = np.where(prompts["mask"][..., None], prompts["tokens"], size * normal(P, T, 16, seed=seed))
  padding = (prompts["labels"] == PADDING_LABEL)[..., None]
  boxes = np.where(padding, size * normal(P, N, 4, seed=seed), prompts["boxes"])
  assert_rows(call(prompts | {"tokens": tokens, "boxes": boxes.astype(np.float32)}), call(prompts), atol=0)


@pytest.mark.parametrize("profile", PROFILES)
@few
@given(keep=st.integers(0, P - 1), seed=st.integers(0, 1000), boxes=st.booleans())
def test_a_result_does_not_depend_on_its_neighbours(calls, profile, keep, seed, boxes):
  """All other prompts replaced, with boxes in all of them or in none, and the other image as well."""
  call, prompts = calls[profile], mixed()
  others = np.arange(P) != keep
  changed = {name: value.copy() for name, value in prompts.items()}
  changed["tokens"][others] = normal(P, T, 16, seed=seed)[others]
  changed["mask"][others] = np.arange(T) < 1 + seed % T
  changed["boxes"][others] = 0.5
  changed["labels"][others] = seed % 2 if boxes else PADDING_LABEL
  image = prompts["index"][keep]
  maps = tuple(np.where(np.arange(B)[:, None, None, None] == image, m, -2 * m) for m in MAPS)
  out, before = call(changed, maps), call(prompts)
  assert_rows(out, before, keep, keep)
  assert all(
    np.abs(out["pred_masks"][i] - before["pred_masks"][i]).max() > 1e-2 for i in np.flatnonzero(others)
  )


@pytest.mark.parametrize("profile", PROFILES)
def test_padding_to_more_tokens_and_boxes_changes_nothing(calls, profile):
  """Other shapes, so another program: 6 tokens and no box slots, against 8 tokens and 3 empty slots."""
  call, padded = calls[profile], mixed()
  padded["labels"][:] = PADDING_LABEL
  assert_rows(call(mixed(tokens=6, slots=0)), call(padded))


@pytest.mark.parametrize("profile", PROFILES)
def test_what_should_matter_does(calls, profile):
  """The tests above would pass on a model that ignores its prompt."""
  call, prompts = calls[profile], mixed()
  before = call(prompts)
  longer = prompts | {"mask": np.ones((P, T), bool)}
  flipped = prompts | {"labels": np.where(prompts["labels"] == 1, 0, prompts["labels"])}
  moved = prompts | {"boxes": prompts["boxes"] * np.float32(0.8)}
  other_image = prompts | {"index": 1 - prompts["index"]}
  for name, changed, row in (
    ("mask", longer, 1),
    ("label", flipped, 0),
    ("box", moved, 2),
    ("image", other_image, 1),
  ):
    difference = np.abs(call(changed)["pred_masks"][row] - before["pred_masks"][row]).max()
    assert difference > 1e-3, (name, difference)


def test_phrases_do_not_see_each_other_and_tokens_may_see_padding():
  """Padding ids: hidden from plain blocks under "transformers", part of the phrase under "original"."""
  ids, mask = tiny.phrases(3, T)
  other_padding = np.where(mask == 1, ids, 7)
  other_phrases = np.concatenate([ids[:1], np.full_like(ids[1:], 5)])
  for profile, hidden in (("original", False), ("transformers", True)):
    config = tiny.config(profile)
    text = dataclasses.replace(config.text, use_repmixer_blocks=False, num_hidden_layers=1)
    model, variables = tiny.load(config.replace(text=text))
    run = tiny.jit(lambda v, ids, model=model: model.apply(v, ids, mask, method="get_text_features"))
    before, padded, replaced = (
      np.asarray(run(variables, x).pooler_output) for x in (ids, other_padding, other_phrases)
    )
    np.testing.assert_allclose(replaced[0], before[0], atol=ATOL)
    change = np.abs(padded - before)[mask == 1].max()
    assert change == 0 if hidden else change > 1e-3, (profile, change)


@pytest.mark.torch
@pytest.mark.full
def test_with_any_boxes_is_what_transformers_does_to_a_mixed_batch(tmp_path):
  """transformers lets the CLS token into every row of a call that passes boxes; ours does only on request."""
  from sam3lt_jax import from_pretrained
  from tests import reference

  size = {"image_size": 28, "vit_layers": 1, "global_layers": (0,), "hidden_size": 16, "queries": 6}
  torch_model = reference.random_torch_model(reference.tiny_config("s1", **size, num_hidden_layers=1))
  reference.save_torch(torch_model, tmp_path)
  ids, mask = tiny.phrases(2)
  inputs = {
    "pixel_values": tiny.pixels(2, 28), "input_ids": ids, "attention_mask": mask,
    "input_boxes": np.array([[[0.5, 0.5, 0.4, 0.6]], [[0, 0, 0, 0]]], np.float32),
    "input_boxes_labels": np.array([[1], [PADDING_LABEL]], np.int32),
  }  # fmt: skip
  wanted = reference.run_stages(torch_model, inputs)

  def run(profile):
    model, variables = from_pretrained(tmp_path, profile=profile, progress=False)
    out = tiny.jit(lambda v: model.apply(v, **inputs))(variables)
    return jax.tree.map(np.asarray, {name: getattr(out, name) for name in tiny.OUTPUTS})

  independent = run(Profile.transformers())
  mixed_batch = run(dataclasses.replace(Profile.transformers(), geometry_cls="with_any_boxes"))
  tolerance = {
    "pred_masks": 5e-4,
    "pred_boxes": 1e-5,
    "pred_logits": 1e-4,
    "presence_logits": 1e-4,
    "semantic_seg": 5e-4,
  }
  for name, atol in tolerance.items():
    np.testing.assert_allclose(mixed_batch[name], wanted[name].reshape(mixed_batch[name].shape), atol=atol)
    np.testing.assert_allclose(independent[name][0], mixed_batch[name][0], atol=atol)  # the row with a box
  assert np.abs(independent["pred_logits"][1] - mixed_batch["pred_logits"][1]).max() > 1e-2
