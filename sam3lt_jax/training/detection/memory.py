"""How much memory a step of fine-tuning takes, read from the compiled program; nothing is run.

    python -m sam3lt_jax.training.detection.memory --size s0 --image-size 1008

The numbers are those of the backend that compiles. XLA:CPU's temporaries are too large for a bfloat16 step:
its buffer assignment holds float32 copies of whole stacks of layers' weights and inputs (2.0 GiB for S0 at
1008 px) that a backend with bfloat16 arithmetic has no use for. To be sure, compile on the device itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp

from sam3lt_jax.config import Sam3LiteTextConfig
from sam3lt_jax.data.batches import BatchConfig
from sam3lt_jax.model import Sam3LiteText
from sam3lt_jax.training.detection.lora import LoraConfig
from sam3lt_jax.training.detection.setup import FinetuneConfig, Setup, batch_config, prepare

CHOICES = {
  "full": {},
  "frozen trunk": {"freeze": ("trunk",)},
  "LoRA rank 16": {"lora": LoraConfig(rank=16)},
}
GIB = 2**30


def abstract_batch(model_config: Sam3LiteTextConfig, config: FinetuneConfig) -> dict[str, Any]:
  """Shapes and dtypes of a training batch, see `sam3lt_jax.data.batches`."""
  d, size = config.data, config.image_size or model_config.vision.image_size
  B, K, M, N = d.batch_size, d.prompts, d.objects, d.max_boxes if d.box_prompts else 0
  T = model_config.profile.context_length
  side = batch_config(config, size).mask_side
  shapes = {
    "pixel_values": ((B, size, size, 3), "float32"),
    "input_ids": ((B, K, T), "int32"),
    "attention_mask": ((B, K, T), "int32"),
    "input_boxes": ((B, K, N, 4), "float32"),
    "input_boxes_labels": ((B, K, N), "int32"),
    "target_boxes": ((B, K, M, 4), "float32"),
    "target_masks": ((B, K, M, side, side), "uint8"),
    "target_valid": ((B, K, M), "bool"),
    "target_has_mask": ((B, K, M), "bool"),
    "prompt_valid": ((B, K), "bool"),
    "exhaustive": ((B, K), "bool"),
  }
  return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(kind)) for name, (shape, kind) in shapes.items()}


def training_memory(model_config: Sam3LiteTextConfig, config: FinetuneConfig) -> dict[str, int]:
  """Compiles the train step for shapes alone and reads its memory analysis.

  Args:
    model_config: sizes of the model.
    config: the run: image size, batch, prompts, what is frozen, adapters, remat, dtype.

  Returns:
    Bytes: arguments (state, frozen weights and batch), outputs, aliased (outputs that take the place of
    donated arguments), temporary, total = arguments + outputs - aliased + temporary; state, frozen, batch:
    parts of the arguments; and trainable: the number of trained parameters.
  """
  setup, state, batch = abstract(model_config, config)
  step = jax.jit(setup.step, donate_argnums=(0,))
  analysis = step.lower(state, setup.frozen, batch).compile().memory_analysis()
  out = {
    "arguments": analysis.argument_size_in_bytes,
    "outputs": analysis.output_size_in_bytes,
    "aliased": analysis.alias_size_in_bytes,
    "temporary": analysis.temp_size_in_bytes,
  }
  out["total"] = out["arguments"] + out["outputs"] - out["aliased"] + out["temporary"]
  for name, tree in (("state", state), ("frozen", setup.frozen), ("batch", batch)):
    out[name] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
  return out | {"trainable": sum(x.size for x in jax.tree.leaves(setup.params))}


def abstract(model_config: Sam3LiteTextConfig, config: FinetuneConfig) -> tuple[Setup, Any, dict[str, Any]]:
  model = Sam3LiteText(model_config)
  variables = jax.eval_shape(model.init_variables, jax.random.key(0))
  setup = prepare(model, variables, config)

  def state(params, batch_stats):
    return dataclasses.replace(setup, params=params, batch_stats=batch_stats).state()

  state = jax.eval_shape(state, setup.params, setup.batch_stats)
  return setup, state, abstract_batch(model_config, config)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m sam3lt_jax.training.detection.memory", description=__doc__.splitlines()[0]
  )
  parser.add_argument("--size", default="s0", choices=("s0", "s1", "l", "tiny"))
  parser.add_argument("--image-size", type=int, default=None, help="in pixels (default: the model's)")
  parser.add_argument("--batch", type=int, default=1, help="images (default: 1)")
  parser.add_argument("--prompts", type=int, default=1, help="prompts an image (default: 1)")
  parser.add_argument("--objects", type=int, default=32, help="object slots a prompt (default: 32)")
  parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
  parser.add_argument("--accumulate", type=int, default=1, help="steps an update (default: 1)")
  parser.add_argument("--moment-dtype", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--no-remat", action="store_true", help="keep what the backward pass needs")
  parser.add_argument("--only", choices=tuple(CHOICES), help="one row of the table")
  args = parser.parse_args(argv)
  from sam3lt_jax.checkpoints.random_init import RANDOM_CONFIGS

  model_config = RANDOM_CONFIGS[args.size]()
  size = args.image_size or model_config.vision.image_size
  config = FinetuneConfig(
    data=BatchConfig(batch_size=args.batch, prompts=args.prompts, objects=args.objects), dtype=args.dtype,
    remat=not args.no_remat, image_size=size, accumulate=args.accumulate, moment_dtype=args.moment_dtype,
  )  # fmt: skip
  print(
    f"{args.size} at {size} px, {args.dtype}, {args.batch} image(s) of {args.prompts} prompt(s),"
    f" remat {'off' if args.no_remat else 'on'}, compiled for {jax.default_backend()}; GiB"
  )
  columns = {"state": 9, "frozen": 9, "batch": 9, "temporary": 11, "total": 9}
  print(f"{'trained':<14}{'millions':>10}" + "".join(f"{key:>{width}}" for key, width in columns.items()))
  for name, choice in CHOICES.items():
    if args.only in (None, name):
      m = training_memory(model_config, dataclasses.replace(config, **choice))
      row = "".join(f"{m[key] / GIB:>{width}.2f}" for key, width in columns.items())
      print(f"{name:<14}{m['trainable'] / 1e6:>10.2f}{row}", flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
