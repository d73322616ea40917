"""The loss as a function of parameters: statistics, dropout, precision, and where the teacher comes from."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.checkpoints.engine import flatten
from sam3lt_jax.config import TextConfig
from sam3lt_jax.training.distillation.losses import DistillationLossConfig, distillation_loss
from sam3lt_jax.training.distillation.step import make_distillation_loss_fn, split_student
from sam3lt_jax.training.distillation.student import make_student
from sam3lt_jax.training.distillation.teacher import Teacher
from sam3lt_jax.training.optimizer import OptimizerConfig, make_optimizer
from sam3lt_jax.training.state import TrainState
from sam3lt_jax.training.step import make_train_step
from tests import tiny

TEACHER = Teacher.of(*tiny.load(tiny.config()), context_length=6)
TEXT = TextConfig(
  vocab_size=300, hidden_size=16, intermediate_size=32, projection_dim=8, num_attention_heads=2,
  num_hidden_layers=2, max_position_embeddings=6, use_repmixer_blocks=True, layer_scale_init_value=0.5,
)  # fmt: skip
STUDENT, VARIABLES, _ = make_student(TEXT, teacher=TEACHER.model.config, context_length=6)
PARAMS, FROZEN, STATS = split_student(VARIABLES)
KEY = jax.random.key(0)


def batch(rows=4):
  (ids, mask), (other, other_mask) = tiny.phrases(rows), tiny.phrases(rows, seed=1)
  return {
    "input_ids": ids, "attention_mask": mask, "shuffled_ids": other, "shuffled_attention_mask": other_mask
  }  # fmt: skip


@functools.cache
def compiled(teacher=TEACHER, gradient=False, **options):
  loss_fn = make_distillation_loss_fn(STUDENT, teacher, **options)
  return tiny.jit(jax.value_and_grad(loss_fn, has_aux=True) if gradient else loss_fn)


def run(key=KEY, data=None, teacher=TEACHER, **options):
  """(loss, (metrics, statistics)), or with `gradient` ((loss, (metrics, statistics)), gradients)."""
  frozen = {"params": FROZEN} | ({} if teacher is None else {"teacher": teacher.variables})
  return compiled(teacher, **options)(PARAMS, frozen, STATS, batch() if data is None else data, key)


def features(variables, ids, mask):
  return STUDENT.apply(variables, ids, mask, method="get_text_features").pooler_output


def wanted():
  b = batch()
  return tiny.jit(TEACHER.features)(TEACHER.variables, b["input_ids"], b["attention_mask"])


@pytest.mark.full  # 3 s
def test_pooled_head_is_frozen_and_everything_else_learns():
  assert sorted(flatten(FROZEN)) == ["text_encoder/projection/kernel"]
  grads = run(gradient=True)[1]
  assert [path for path, g in flatten(grads).items() if not np.any(g)] == []


@pytest.mark.full  # 3 s
def test_frozen_statistics_give_the_loss_of_the_features():
  loss, (metrics, stats) = run(update_batch_stats=False)
  chex.assert_trees_all_equal(stats, STATS)
  b = batch()
  ours = features(VARIABLES, b["input_ids"], b["attention_mask"])
  shuffled = features(VARIABLES, b["shuffled_ids"], b["shuffled_attention_mask"])
  args = ours, wanted(), b["attention_mask"], shuffled, b["shuffled_attention_mask"]
  expected, parts = distillation_loss(*args)
  assert float(loss) == pytest.approx(float(expected), rel=1e-5)
  for name, value in parts.items():
    assert float(metrics[name]) == pytest.approx(float(value), rel=1e-4)


def test_moving_statistics_see_the_prompts_and_then_the_shuffled_prompts():
  stats = run()[1][1]
  b, variables = batch(), VARIABLES
  for ids, mask in (("input_ids", "attention_mask"), ("shuffled_ids", "shuffled_attention_mask")):
    _, changed = STUDENT.apply(
      variables, b[ids], b[mask], update_batch_stats=True, method="get_text_features", mutable=["batch_stats"]
    )
    variables = {**variables, **changed}
  for path, value in flatten(stats).items():
    np.testing.assert_allclose(value, flatten(variables["batch_stats"])[path], rtol=1e-5, atol=1e-6)
    assert not np.array_equal(value, flatten(STATS)[path])


def test_features_from_the_batch_equal_the_teacher_in_the_step():
  on_the_fly = run()[0]
  from_disk = run(teacher=None, data=batch() | {"teacher_features": wanted()})[0]
  assert float(on_the_fly) == pytest.approx(float(from_disk), rel=1e-6)
  half = run(teacher=None, data=batch() | {"teacher_features": wanted().astype(jnp.float16)})[0]
  assert float(on_the_fly) == pytest.approx(float(half), rel=2e-3)


def test_without_consistency_no_shuffled_prompts_are_needed():
  data = {k: v for k, v in batch().items() if not k.startswith("shuffled")}
  metrics = run(data=data, config=DistillationLossConfig(consistency=0.0))[1][0]
  assert sorted(metrics) == ["cosine_loss", "feature_cosine", "mse"]


def test_dropout_follows_its_key():
  still = [float(run(key=jax.random.key(i), update_batch_stats=False)[0]) for i in (0, 1)]
  assert still[0] == still[1]
  options = {"dropout": 0.2, "update_batch_stats": False}
  moving = [float(run(key=jax.random.key(i), **options)[0]) for i in (0, 1, 0)]
  assert moving[0] == moving[2] and moving[0] != moving[1] and moving[0] != still[0]


@pytest.mark.full  # 4 s
def test_bfloat16_compute_keeps_float32_losses_statistics_and_gradients():
  (loss, aux), grads = run(dtype="bfloat16", gradient=True)
  assert {x.dtype for x in jax.tree.leaves((loss, aux, grads))} == {jnp.dtype("float32")}
  exact = run()[0]
  assert float(loss) != float(exact) and float(loss) == pytest.approx(float(exact), rel=0.03)


def test_padding_of_the_batch_does_not_reach_the_loss():
  """RepMixer convolutions see padding: a student without them, under a profile that masks attention."""
  plain = TextConfig(
    vocab_size=300, hidden_size=16, intermediate_size=32, projection_dim=8, num_attention_heads=2,
    num_hidden_layers=1, max_position_embeddings=6,
  )  # fmt: skip
  profile = tiny.config().profile.__class__.transformers()
  profile = profile.__class__(**{**profile.__dict__, "pad_token_id": 299})
  student, variables, _ = make_student(plain, teacher=TEACHER.model.config, context_length=6, profile=profile)
  params, frozen, stats = split_student(variables)
  loss_fn = tiny.jit(make_distillation_loss_fn(student, TEACHER))
  losses = []
  for pad in (0, 7):
    b = batch()
    for ids, mask in (("input_ids", "attention_mask"), ("shuffled_ids", "shuffled_attention_mask")):
      b[ids] = np.where(b[mask], b[ids], pad).astype(np.int32)
    losses.append(loss_fn(params, {"params": frozen, "teacher": TEACHER.variables}, stats, b, KEY)[0])
  assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


@pytest.mark.full  # 5 s
def test_a_step_with_the_optimiser_moves_the_student_and_nothing_else():
  tx, schedule = make_optimizer(OptimizerConfig(peak_lr=1e-3, total_steps=10, layer_decay=0.9), PARAMS)
  step = make_train_step(make_distillation_loss_fn(STUDENT, TEACHER), tx, schedule=schedule)
  frozen = {"params": FROZEN, "teacher": TEACHER.variables}
  state, metrics = tiny.jit(step)(TrainState.create(PARAMS, tx, KEY, batch_stats=STATS), frozen, batch())
  assert metrics["finite"] == 1 and 0 < metrics["learning_rate"] <= 1e-3
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, PARAMS)
  assert moved["text_projection"]["kernel"] and moved["text_encoder"]["embeddings"]["token_embedding"]


def test_mistakes():
  with pytest.raises(ValueError, match=r"dropout=1.0; accepted: a rate"):
    make_distillation_loss_fn(STUDENT, TEACHER, dropout=1.0)
  wide = tiny.load(tiny.config())[0].config
  wide = wide.replace(detr_encoder=wide.detr_encoder.__class__(hidden_size=32, num_attention_heads=2))
  with pytest.raises(ValueError, match="projected to a width of 32, the teacher's to 16"):
    make_distillation_loss_fn(STUDENT.clone(config=wide), TEACHER)
