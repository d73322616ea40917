"""From a configuration to what is trained, at which rate, and what is exported."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.checkpoints.engine import flatten
from sam3lt_jax.data.batches import BatchConfig
from sam3lt_jax.training.detection import memory, setup
from sam3lt_jax.training.detection.lora import LoraConfig
from sam3lt_jax.training.detection.setup import FinetuneConfig, prepare
from sam3lt_jax.training.optimizer import rate_factors
from tests import tiny

pytestmark = pytest.mark.full  # long: CI runs it


def shapes():
  model, variables = tiny.load(tiny.config())
  return model, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)


def factors(**fields):
  """path -> rate of that parameter at the schedule's peak."""
  made = prepare(*shapes(), FinetuneConfig(**fields))
  return {p: f * made.config.lr for p, f in rate_factors(made.optimizer, made.params).items()}


def test_published_rates_by_part_and_layer():
  """Two ViT layers: the last at 2.5e-5 * 0.9, the first at 2.5e-5 * 0.9 ** 2, what is before at * 0.9 ** 3.

  The position table at 2.5e-5: SAM 3's configuration takes `*pos_embed*` out of the decay.
  """
  rates = factors()
  expected = {
    "detr_decoder/box_head/layer1/kernel": 8e-5,
    "mask_decoder/semantic_projection/kernel": 8e-5,
    "vision_encoder/neck/fpn_layers_0/proj1/kernel": 2.5e-5,
    "vision_encoder/backbone/layers_1/mlp/fc1/kernel": 2.5e-5 * 0.9,
    "vision_encoder/backbone/layers_0/attention/q_proj/bias": 2.5e-5 * 0.81,
    "vision_encoder/backbone/embeddings/patch_embeddings/projection/kernel": 2.5e-5 * 0.729,
    "vision_encoder/backbone/embeddings/position_embeddings": 2.5e-5,
    "vision_encoder/backbone/layer_norm/scale": 2.5e-5 * 0.729,
    "text_encoder/final_layer_norm/scale": 5e-6,
    "text_projection/kernel": 5e-6,
  }
  for path, rate in expected.items():
    np.testing.assert_allclose(rates[path], rate, rtol=1e-6, err_msg=path)


def test_adapters_have_a_rate_of_their_own():
  rates = factors(lora=LoraConfig(rank=2), train=("neck", "scoring"))
  assert {round(r, 9) for p, r in rates.items() if p.endswith(("kernel/a", "kernel/b"))} == {2e-4}
  np.testing.assert_allclose(rates["vision_encoder/neck/fpn_layers_0/proj1/kernel"], 2.5e-5, rtol=1e-6)
  np.testing.assert_allclose(rates["dot_product_scoring/text_proj/kernel"], 8e-5, rtol=1e-6)


def test_schedule_counts_updates():
  made = prepare(*shapes(), FinetuneConfig(steps=1001, accumulate=4, weight_decay=0.2))
  o = made.optimizer
  assert (o.total_steps, o.warmup_steps, o.accumulate, o.weight_decay) == (251, 20, 4, 0.2)
  assert o.end_lr == pytest.approx(8e-7) and o.warmup_init_lr == 0
  assert prepare(*shapes(), FinetuneConfig(steps=50)).optimizer.warmup_steps == 5


def test_freeze_by_part_and_by_pattern():
  everything = flatten(shapes()[1]["params"])
  made = prepare(*shapes(), FinetuneConfig(freeze=("vision", "text", r"^detr_decoder/layers_0/")))
  trained, frozen = flatten(made.params), flatten(made.frozen["params"])
  assert trained.keys() | frozen.keys() == everything.keys() and not trained.keys() & frozen.keys()
  assert set(p.split("/")[0] for p in trained) == {
    "geometry_encoder", "detr_encoder", "detr_decoder", "dot_product_scoring", "mask_decoder"
  }  # fmt: skip
  assert not any(p.startswith("detr_decoder/layers_0/") for p in trained)
  assert any(p.startswith("detr_decoder/layers_1/") for p in trained)


@pytest.mark.parametrize("name", setup.PARTS)
def test_every_part_is_there(name):
  made = prepare(*shapes(), FinetuneConfig(freeze=(name,)))
  assert flatten(made.frozen["params"])


def test_lora_freezes_all_but_adapters_and_what_is_named():
  made = prepare(*shapes(), FinetuneConfig(lora=LoraConfig(rank=2), train=("scoring",)))
  trained = flatten(made.params)
  plain = {p for p in trained if not p.endswith(("kernel/a", "kernel/b"))}
  assert plain and all(p.startswith("dot_product_scoring/") for p in plain)
  assert len(trained) - len(plain) == 2 * (6 * 2 + 10 + 14 * 2)
  assert "detr_encoder/layers_0/mlp/fc1/kernel" in flatten(made.frozen["params"])


def test_what_is_trained_as_it_is_gets_no_adapter():
  made = prepare(*shapes(), FinetuneConfig(lora=LoraConfig(rank=2), train=("trunk",)))
  trained = flatten(made.params)
  adapters = {p for p in trained if p.endswith(("kernel/a", "kernel/b"))}
  assert len(adapters) == 2 * (10 + 14 * 2)
  assert "vision_encoder/backbone/layers_0/mlp/fc1/kernel" in trained


def test_drop_path_stays_out_of_a_frozen_trunk():
  rate = lambda **fields: prepare(*shapes(), FinetuneConfig(**fields)).model.config.vision.drop_path_rate  # noqa: E731
  assert rate() == 0.1
  assert rate(freeze=("trunk",)) == 0
  assert rate(lora=LoraConfig(rank=2)) == 0.1  # adapters in the trunk
  assert rate(lora=LoraConfig(rank=2, targets=("detr_encoder/.*fc1",))) == 0


def test_frozen_kernels_are_kept_in_the_compute_dtype_without_changing_anything():
  model, variables = tiny.load(tiny.config())
  config = FinetuneConfig(dtype="bfloat16", lora=LoraConfig(rank=2, targets=("detr_encoder/.*fc1",)))
  made = prepare(model, variables, config)
  frozen = flatten(made.frozen["params"])
  assert frozen["vision_encoder/backbone/layers_0/mlp/fc1/kernel"].dtype == jnp.bfloat16
  assert frozen["detr_encoder/layers_0/mlp/fc1/kernel"].dtype == jnp.float32  # the adapter adds to it
  assert frozen["vision_encoder/backbone/layer_norm/scale"].dtype == jnp.float32
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(made.params))
  run = tiny.jit(lambda params: made.model.apply({**variables, "params": params}, **tiny.inputs()).pred_masks)
  whole = setup.merged(made.params, made.frozen["params"], config.lora)
  np.testing.assert_array_equal(run(whole), run(variables["params"]))


def test_export_is_what_the_step_computed_with():
  """Adapters merged by numpy equal those applied in the step; what was frozen comes back bit for bit."""
  model, variables = tiny.load(tiny.config())
  config = FinetuneConfig(lora=LoraConfig(rank=2), train=("scoring",))
  made = prepare(model, variables, config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), made.params)
  inside = flatten(setup.merged(params, made.frozen["params"], config.lora))
  outside = flatten(setup.exported(params, variables["params"], config.lora))
  start = flatten(variables["params"])
  assert inside.keys() == outside.keys() == start.keys()
  adapted = {p.rpartition("/")[0] for p in flatten(made.params)}
  for path, value in outside.items():
    np.testing.assert_allclose(value, inside[path], atol=1e-6, err_msg=path)
    if path in adapted or path.startswith("dot_product_scoring/"):
      assert np.any(value != start[path]), path
    else:
      np.testing.assert_array_equal(value, start[path], err_msg=path)


def test_fingerprint_is_json_and_complete():
  config = FinetuneConfig(lora=LoraConfig(rank=3), data=BatchConfig(batch_size=2))
  data = json.loads(json.dumps(config.fingerprint()))
  assert data["lora"]["rank"] == 3 and data["data"]["batch_size"] == 2
  assert set(data) == {f.name for f in dataclasses.fields(FinetuneConfig)}


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"steps": 0}, "steps=0; accepted: 1 or more"),
    ({"lr": 0.0}, "lr=0.0; accepted: a number above 0"),
    ({"vision_lr": float("nan")}, "vision_lr=nan; accepted: a number of 0 or more"),
    ({"end_lr": 2.0}, r"end_lr=2.0; accepted: a share within \[0, 1\]"),
    ({"dtype": "int8"}, "dtype='int8'; accepted: 'float32' or 'bfloat16'"),
    ({"freeze": "vision"}, "freeze='vision'; accepted: a list of parts"),
    ({"train": ("scoring",)}, "train=.*accepted: nothing, without lora"),
    ({"seed": -1}, "seed=-1; accepted: 0 or more"),
  ],
)
def test_config_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    FinetuneConfig(**fields)


@pytest.mark.parametrize(
  "fields, message",
  [
    (
      {"freeze": ("visoin_encoder",)},
      "freeze: 'visoin_encoder' matches no parameter; near names: vision_encoder",
    ),
    ({"freeze": (".",)}, "nothing is left to train"),
    ({"lora": LoraConfig(rank=2), "freeze": ("text",)}, "with lora, which freezes everything"),
    ({"lora": LoraConfig(rank=99)}, "rank=99 is more than"),
  ],
)
def test_setup_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    prepare(*shapes(), FinetuneConfig(**fields))


def test_fused_models_are_refused():
  model, variables = tiny.load(tiny.config())
  with pytest.raises(ValueError, match="folded"):
    prepare(*model.fuse(variables), FinetuneConfig())


def test_memory_table_of_a_small_program():
  """Arguments by hand: state = parameters and two moments (and counters); donated state is aliased."""
  config = FinetuneConfig(
    freeze=("vision", "text", "encoder", "geometry", "masks"), dropout=False, one_to_many=False,
    data=BatchConfig(batch_size=2, prompts=1, objects=2),
  )  # fmt: skip
  m = memory.training_memory(tiny.config(), config)
  batch_stats = sum(4 * x.size for x in jax.tree.leaves(shapes()[1]["batch_stats"]))
  assert 0 < m["state"] - 3 * 4 * m["trainable"] - batch_stats < 40  # the step, two counts, the key
  batch = memory.abstract_batch(tiny.config(), config)
  assert batch["target_masks"].shape == (2, 1, 2, 84, 84) and batch["input_boxes"].shape == (2, 1, 0, 4)
  assert m["batch"] == 2 * (84 * 84 * 3 * 4 + 2 * 16 * 4 + 2 * 16 + 2 * 84 * 84 + 2 * 2 + 2)
  assert m["aliased"] >= 12 * m["trainable"]
  assert m["total"] == m["arguments"] + m["outputs"] - m["aliased"] + m["temporary"]
  assert m["temporary"] > 0
