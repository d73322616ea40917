"""Every loss against a case worked by hand; padding, absent phrases and the whole sum on a tiny model."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.model import Sam3LiteText, Sam3LiteTextOutput
from sam3lt_jax.training.detection import losses
from sam3lt_jax.training.detection.losses import DetectionLossConfig
from sam3lt_jax.training.detection.targets import DetectionTargets
from tests import tiny

HALF = math.log(2)  # cross entropy of a logit of 0
LEFT, RIGHT = [0.25, 0.5, 0.5, 1.0], [0.75, 0.5, 0.5, 1.0]

# As one program each: outside of one, every operation is compiled alone.
detection_loss = jax.jit(losses.detection_loss, static_argnums=2)
score_loss = jax.jit(losses.score_loss, static_argnums=4)
mask_losses = jax.jit(losses.mask_losses, static_argnums=4, static_argnames="queries")
semantic_losses = jax.jit(losses.semantic_losses, static_argnums=2)


def targets(boxes, valid, masks=None, prompt_valid=None, exhaustive=None) -> DetectionTargets:
  valid = jnp.array(valid)
  masks = jnp.zeros((*valid.shape, 2, 2)) if masks is None else jnp.array(masks)
  every = jnp.ones(valid.shape[0], bool)
  return DetectionTargets(
    boxes=jnp.array(boxes, jnp.float32),
    masks=masks,
    valid=valid,
    has_mask=valid,
    prompt_valid=every if prompt_valid is None else jnp.array(prompt_valid),
    exhaustive=every if exhaustive is None else jnp.array(exhaustive),
  )


def test_focal_loss_by_hand():
  # p = 0.5: one: alpha * 0.5^2 * log 2; zero: (1 - alpha) * 0.5^2 * log 2.
  value = losses.focal_loss(jnp.zeros(2), jnp.array([1.0, 0.0]), alpha=0.25, gamma=2.0)
  np.testing.assert_allclose(value, [0.25 * 0.25 * HALF, 0.75 * 0.25 * HALF], rtol=1e-6)


def test_dice_loss_by_hand():
  # Probabilities of 0.5 on four pixels, two of them true: 1 - (2 * 1 + 1) / (2 + 2 + 1).
  value = losses.dice_loss(jnp.zeros(4), jnp.array([1.0, 1.0, 0.0, 0.0]))
  np.testing.assert_allclose(value, 0.4, rtol=1e-6)
  sure = losses.dice_loss(jnp.array([50.0, -50.0]), jnp.array([1.0, 0.0]))
  np.testing.assert_allclose(sure, 0.0, atol=1e-6)


def test_score_loss_by_hand():
  # Query 0 is on its object (IoU 1) with p = 0.5: target 0.5^0.25 = 0.8409; cross entropy at logit 0 is log 2
  # whatever the target. Times positive_weight 10. Query 1 has none: p^2 * log 2. Two queries, one prompt.
  t = targets([[LEFT]], [[True]])
  match = jnp.array([[[[1.0], [0.0]]]])
  boxes = jnp.array([[[LEFT, RIGHT]]])
  config = DetectionLossConfig(queries_scale=None)
  value = score_loss(jnp.zeros((1, 1, 2)), boxes, match, t, config)
  np.testing.assert_allclose(value, [(10 * HALF + 0.25 * HALF) / 2], rtol=1e-6)
  value = score_loss(jnp.zeros((1, 1, 2)), boxes, match, t, DetectionLossConfig(queries_scale=200))
  np.testing.assert_allclose(value, [(10 * HALF + 0.25 * HALF) / 200], rtol=1e-6)


def test_score_target_is_probability_and_iou():
  # At logit 2 the gradient of the matched query's loss is weight * (p - target): with IoU 0.5,
  # target = p^0.25 * 0.5^0.75.
  t = targets([[LEFT]], [[True]])
  boxes = jnp.array([[[[0.125, 0.5, 0.25, 1.0]]]])  # half of LEFT
  config = DetectionLossConfig(queries_scale=None, positive_weight=1.0)
  match = jnp.ones((1, 1, 1, 1))
  gradient = jax.grad(lambda x: score_loss(x, boxes, match, t, config).sum())(jnp.full((1, 1, 1), 2.0))
  p = 1 / (1 + math.exp(-2))
  np.testing.assert_allclose(gradient.ravel(), [p - p**0.25 * 0.5**0.75], rtol=1e-5)


def test_absent_phrases_teach_presence_only():
  t = targets([[LEFT], [LEFT]], [[True], [False]])
  match = jnp.array([[[[1.0]], [[0.0]]]])
  boxes = jnp.array([[[LEFT], [LEFT]]])

  def score(logits):
    return score_loss(logits, boxes, match, t, DetectionLossConfig()).sum()

  gradient = jax.grad(score)(jnp.ones((1, 2, 1)))
  assert gradient[0, 0, 0] != 0 and gradient[0, 1, 0] == 0
  # Presence: logit 0 for "present", log(3) for "absent" (p = 0.75): half of (log 2 + log 4), two prompts.
  value = losses.presence_loss(jnp.array([[[0.0], [math.log(3.0)]]]), t)
  np.testing.assert_allclose(value, [0.5 * (math.log(2) + math.log(4)) / 2], rtol=1e-6)


def test_unlisted_objects_are_not_punished():
  t = targets([[LEFT]], [[True]], exhaustive=[False])
  match = jnp.array([[[[1.0], [0.0]]]])
  boxes = jnp.array([[[LEFT, RIGHT]]])
  logits = jnp.ones((1, 1, 2))
  gradient = jax.grad(lambda x: score_loss(x, boxes, match, t, DetectionLossConfig()).sum())(logits)
  assert gradient[0, 0, 0] != 0 and gradient[0, 0, 1] == 0


def test_box_losses_by_hand():
  # Query 1 answers for LEFT but sits on RIGHT: L1 is 0.5. IoU is 0 and the union fills the hull: GIoU is 0.
  t = targets([[LEFT]], [[True]])
  match = jnp.array([[[[0.0], [1.0]]]])
  l1, giou = losses.box_losses(jnp.array([[[LEFT, RIGHT]]]), match, t, jnp.array(1.0))
  np.testing.assert_allclose([l1[0], giou[0]], [0.5, 1.0], atol=1e-6)


def test_mask_losses_take_the_objects_own_query():
  masks = jnp.stack([jnp.full((2, 2), 9.0), jnp.zeros((2, 2))])[None]  # query 1 is undecided everywhere
  t = targets([[LEFT]], [[True]], masks=[[[[1, 1], [0, 0]]]])
  match = jnp.array([[[0.0], [1.0]]])
  config = DetectionLossConfig()
  focal, dice = mask_losses(masks, match, t, jnp.array(1.0), config)
  np.testing.assert_allclose(focal, (0.25 + 0.75) / 2 * 0.25 * HALF, rtol=1e-6)
  np.testing.assert_allclose(dice, 0.4, rtol=1e-6)


def test_mask_losses_of_several_queries_an_object():
  # Both queries answer for the object, the sure one rightly: its losses are 0, so the sum is the other's.
  true = jnp.array([[[[1, 1], [0, 0]]]])
  masks = jnp.stack([jnp.where(true[0, 0] > 0, 50.0, -50.0), jnp.zeros((2, 2)), jnp.full((2, 2), 9.0)])[None]
  t = targets([[LEFT]], [[True]], masks=true)
  match = jnp.array([[[1.0], [1.0], [0.0]]])
  focal, dice = mask_losses(masks, match, t, jnp.array(1.0), DetectionLossConfig(), queries=4)
  np.testing.assert_allclose(focal, (0.25 + 0.75) / 2 * 0.25 * HALF, rtol=1e-6)
  np.testing.assert_allclose(dice, 0.4, rtol=1e-6)


def test_masks_of_another_size_are_resized_and_points_agree_on_flat_masks():
  masks = jnp.full((1, 1, 2, 2), -3.0)
  t = targets([[LEFT]], [[True]], masks=jnp.ones((1, 1, 8, 8)))
  match, one = jnp.ones((1, 1, 1)), jnp.array(1.0)
  every = mask_losses(masks, match, t, one, DetectionLossConfig())
  config = DetectionLossConfig(mask_points=64)  # as many points as pixels: the dice loss has the same +1
  points = mask_losses(masks, match, t, one, config, jax.random.key(0))
  np.testing.assert_allclose(every, points, rtol=1e-5)
  with pytest.raises(ValueError, match="mask_points needs a key"):
    mask_losses(masks, match, t, one, config)


def test_semantic_loss_is_of_the_union_and_skips_absent_phrases():
  masks = jnp.array([[[[1, 0], [0, 0]], [[0, 1], [0, 0]]], [[[0, 0], [0, 0]], [[0, 0], [0, 0]]]])
  t = targets([[LEFT, RIGHT]] * 2, [[True, True], [False, False]], masks=masks)
  logits = jnp.stack([jnp.zeros((1, 2, 2)), jnp.full((1, 2, 2), 20.0)])
  focal, dice = semantic_losses(logits, t, DetectionLossConfig())
  np.testing.assert_allclose(focal, (0.6 + 0.4) / 2 * 0.25 * HALF, rtol=1e-6)
  np.testing.assert_allclose(dice, 0.4, rtol=1e-6)


def output_with_masks() -> Sam3LiteTextOutput:
  """Two queries of one layer, each a second time in the one-to-many rows; the first sits on LEFT."""
  logits, boxes = jnp.zeros((1, 1, 2)), jnp.array([[[LEFT, RIGHT]]])
  masks = jnp.zeros((1, 2, 2, 2))
  taps = {
    "decoder_logits": logits, "decoder_boxes": boxes, "decoder_presence_logits": jnp.zeros((1, 1, 1)),
    "one_to_many_logits": logits, "one_to_many_boxes": boxes, "one_to_many_masks": masks,
  }  # fmt: skip
  return Sam3LiteTextOutput(masks, boxes[0], logits[0], jnp.zeros((1, 1)), jnp.zeros((1, 1, 2, 2)), taps)


def whole(output, t, **config):
  return detection_loss(output, t, DetectionLossConfig(**config))


def test_one_to_many_rows_have_mask_losses_of_the_published_weight():
  t = targets([[LEFT]], [[True]], masks=[[[[1, 1], [0, 0]]]])
  output = output_with_masks()
  loss, metrics = whole(output, t)
  without, _ = whole(output, t, many_masks=False)
  # One query is matched (IoU 1); at logits of 0 its focal loss is log(2) / 8 and its dice loss 0.4.
  expected = 2.0 * (200.0 * 0.125 * HALF + 10.0 * 0.4)
  np.testing.assert_allclose(loss - without, expected, rtol=1e-5)
  np.testing.assert_allclose(metrics["mask"], 0.125 * HALF, rtol=1e-6)  # of the one-to-one rows, as ever


def test_the_whole_is_scaled_by_the_root_of_the_number_of_prompts():
  t = targets([[LEFT]], [[True]], masks=[[[[1, 1], [0, 0]]]])
  four = jax.tree.map(lambda x: jnp.repeat(x, 4, axis=0), t)
  output = output_with_masks()
  stacked = output.replace(
    **{
      name: jnp.repeat(getattr(output, name), 4, axis=0)
      for name in ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
    },
    intermediates={
      k: jnp.repeat(x, 4, axis=0 if k == "one_to_many_masks" else 1) for k, x in output.intermediates.items()
    },
  )
  one, _ = whole(output, t)
  loss, _ = whole(stacked, four)
  np.testing.assert_allclose(loss, 2 * one, rtol=1e-5)
  plain, _ = whole(stacked, four, scale_by_prompts=False)
  np.testing.assert_allclose(plain, one, rtol=1e-5)
  padded = dataclasses.replace(
    four, prompt_valid=jnp.arange(4) < 1, valid=four.valid & (jnp.arange(4) < 1)[:, None],
    has_mask=four.has_mask & (jnp.arange(4) < 1)[:, None],
  )  # fmt: skip
  loss, _ = whole(stacked, padded)
  np.testing.assert_allclose(loss, one, rtol=1e-5)  # what pads the batch is no prompt


@pytest.fixture(scope="module")
def setup():
  model = Sam3LiteText(tiny.config(), one_to_many=True)
  with tiny.hurry():
    variables = model.init_variables(jax.random.key(0))
  rng = np.random.default_rng(0)
  B, K, M, S = 2, 2, 3, tiny.SIDE
  side = S // 14 * 4
  masks = np.zeros((B, K, M, side, side), np.uint8)
  masks[..., 2:9, 3:8] = 1
  valid = np.array([[[1, 1, 0], [1, 0, 0]], [[0, 0, 0], [1, 1, 1]]], bool)
  batch = {
    "pixel_values": rng.uniform(-1, 1, (B, S, S, 3)).astype(np.float32),
    "input_ids": rng.integers(1, 200, (B, K, 6)).astype(np.int32),
    "attention_mask": np.ones((B, K, 6), np.int32),
    "input_boxes": np.full((B, K, 1, 4), 0.5, np.float32),
    "input_boxes_labels": np.full((B, K, 1), -10, np.int32),
    "target_boxes": rng.uniform(0.2, 0.6, (B, K, M, 4)).astype(np.float32),
    "target_masks": masks,
    "target_valid": valid,
    "target_has_mask": valid,
    "prompt_valid": np.ones((B, K), bool),
    "exhaustive": np.ones((B, K), bool),
  }
  loss_fn = losses.make_detection_loss_fn(model, deterministic=True)
  gradient = tiny.jit(jax.value_and_grad(loss_fn, has_aux=True))

  def run(**changes):
    stats = variables.get("batch_stats", {})
    return gradient(variables["params"], {}, stats, batch | changes, jax.random.key(1))

  return batch, run


@pytest.mark.full
def test_the_whole_loss_reaches_every_part(setup):
  _, run = setup
  (loss, (metrics, _)), gradients = run()
  assert np.isfinite(loss) and set(metrics) >= {"score", "presence", "l1", "giou", "mask", "dice", "semantic"}
  for part, tree in gradients.items():
    norm = sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(tree))
    assert np.isfinite(norm), part
    # Without a box prompt only its CLS token goes through the geometry encoder, which is enough.
    assert norm > 0, part


@pytest.mark.full
def test_padding_prompts_and_empty_slots_change_nothing(setup):
  batch, run = setup
  (loss, _), _ = run()
  boxes, masks = batch["target_boxes"].copy(), batch["target_masks"].copy()
  boxes[~batch["target_valid"]] = 0.9
  masks[~batch["target_valid"]] = 1
  (other, _), _ = run(target_boxes=boxes, target_masks=masks)
  assert float(other) == float(loss)
  # With prompt 1 of image 0 switched off, its own targets and tokens no longer matter.
  off = batch["prompt_valid"].copy()
  off[0, 1] = False
  (without, _), _ = run(prompt_valid=off)
  boxes = batch["target_boxes"].copy()
  boxes[0, 1] = 0.3
  ids = batch["input_ids"].copy()
  ids[0, 1] = 7
  (again, _), _ = run(prompt_valid=off, target_boxes=boxes, input_ids=ids)
  np.testing.assert_allclose(again, without, rtol=1e-6)
  assert float(without) != float(loss)


def test_without_intermediates_it_says_so():
  output = Sam3LiteTextOutput(*[jnp.zeros(())] * 5)
  with pytest.raises(ValueError, match="output_intermediates=True"):
    losses.detection_loss(output, targets([[LEFT]], [[True]]))
