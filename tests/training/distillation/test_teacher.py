"""The teacher: which features it gives, at which context, and who it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax import from_pretrained
from sam3lt_jax.checkpoints import engine, tables
from sam3lt_jax.config import Profile
from sam3lt_jax.model import Sam3LiteText
from sam3lt_jax.training.distillation.teacher import Teacher
from tests.checkpoints.common import fixture, original_config, original_state_dict
from tests.training.distillation.common import tiny_model

TRANSFORMERS = dataclasses.replace(Profile.transformers(), pad_token_id=255)  # the last of the recorded ids


def variables_of(variant):
  """The recorded model's text part, as variables."""
  config = original_config(variant)
  leaves = engine.flatten(jax.eval_shape(Sam3LiteText(config).init_variables, jax.random.key(0)))
  state = original_state_dict(variant)
  layout = tables.layout("original", config.text.kind)
  return Sam3LiteText(config), engine.unflatten(engine.load_tensors(layout, state, leaves))


@pytest.mark.parametrize("profile", [Profile.original(), TRANSFORMERS], ids=lambda p: p.name)
def test_clip_teacher_at_16_tokens_gives_the_recorded_features(profile):
  """The authors' teacher in 16 tokens: its table of 32 rows is cut, also under a profile that resamples."""
  model, variables = variables_of("sam3")
  model = model.clone(config=model.config.replace(profile=profile))
  teacher = Teacher.of(model, variables, context_length=16)
  recorded = fixture("text_teacher_ve")
  expected = recorded["ctx16/text_memory"].transpose(1, 0, 2)
  ids = recorded["ctx16/token_ids"].astype(np.int32)
  mask = ids != 0
  if profile.mask_text_padding:  # an id 0 inside a phrase is hidden then, which was not recorded
    whole = np.all(mask[:, :-1] >= mask[:, 1:], axis=1)
    assert 3 < whole.sum() < len(ids)
    ids, mask, expected = ids[whole], mask[whole], expected[whole]
  scrambled = np.where(mask, ids, 7)  # the batch pads with what the student reads
  features = jax.jit(teacher.features)(teacher.variables, scrambled, mask)
  np.testing.assert_allclose(np.asarray(features)[mask], expected[mask], atol=2e-5)
  assert teacher.width == 32 and teacher.context_length == 16


def test_litetext_teacher_gives_the_models_own_features():
  model, variables = tiny_model()
  teacher = Teacher.of(model, variables)
  ids = np.zeros((2, 16), np.int32)
  ids[:, :3] = [[20, 7, 21], [20, 9, 21]]
  mask = np.arange(16) < np.array([[3], [3]])
  own = model.apply(variables, ids, mask, method="get_text_features").pooler_output
  got = teacher.features(teacher.variables, ids + 5 * ~mask, mask)
  np.testing.assert_array_equal(got, own)
  assert sorted(teacher.variables["params"]) == ["text_encoder", "text_projection"]


def test_teacher_is_never_differentiated():
  model, variables = tiny_model()
  teacher = Teacher.of(model, variables)
  ids = jnp.ones((1, 4), jnp.int32)
  total = lambda v: teacher.features({**teacher.variables, "params": v}, ids, ids == 1).sum()  # noqa: E731
  slope = jax.jit(jax.grad(total))(teacher.variables["params"])
  assert not any(np.any(x) for x in jax.tree.leaves(slope))


def test_identity_tells_weights_and_context_apart():
  model, variables = tiny_model()
  one, same = Teacher.of(model, variables), Teacher.of(model, variables, name="elsewhere")
  assert one.identity() == same.identity()
  assert Teacher.of(model, variables, context_length=8).identity() != one.identity()
  table = variables["params"]["text_projection"]["bias"]
  changed = {**variables, "params": {**variables["params"]}}
  changed["params"]["text_projection"] = {
    **variables["params"]["text_projection"], "bias": table.at[3].add(1e-3)
  }  # fmt: skip
  assert Teacher.of(model, changed).digest != one.digest
  changed["params"]["text_projection"] = variables["params"]["text_projection"]
  changed["params"]["detr_decoder"] = {}  # not the text part's
  assert Teacher.of(model, changed).digest == one.digest


def test_mistakes():
  with pytest.raises(ValueError, match=r"the teacher's position table has 16 rows, .* got 17"):
    Teacher.of(*from_pretrained("random:tiny", progress=False), context_length=17)
  model, variables = variables_of("sam3")
  beyond = model.clone(config=model.config.replace(profile="transformers"))
  with pytest.raises(ValueError, match="pad_token_id 49407 is beyond the teacher's vocabulary of 256"):
    Teacher.of(beyond, variables)
  with pytest.raises(ValueError, match="context_length must be at least 2"):
    Teacher.of(*from_pretrained("random:tiny", progress=False), context_length=1)
