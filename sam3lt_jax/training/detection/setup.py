"""What a fine-tuning run trains and how: configuration -> trainable and frozen parameters, optimiser, step.

Works on arrays as on shapes (`jax.ShapeDtypeStruct`), so that `memory` can look at a full-size step without
making its weights.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.checkpoints.engine import flatten, unflatten
from sam3lt_jax.data.batches import BatchConfig
from sam3lt_jax.errors import ArgumentError, check
from sam3lt_jax.model import Sam3LiteText
from sam3lt_jax.training import freezing
from sam3lt_jax.training.detection import lora as lora_ops
from sam3lt_jax.training.detection.lora import LoraConfig
from sam3lt_jax.training.detection.losses import DetectionLossConfig, make_detection_loss_fn
from sam3lt_jax.training.optimizer import OptimizerConfig, layer_factors, make_optimizer
from sam3lt_jax.training.state import TrainState
from sam3lt_jax.training.step import TrainStep, make_train_step

Tree = dict[str, Any]

# What `freeze` calls the parts of the model; anything else is a regular expression over paths.
PARTS = {
  "vision": "^vision_encoder/",
  "trunk": "^vision_encoder/backbone/",
  "neck": "^vision_encoder/neck/",
  "text": "^text_(encoder|projection)/",
  "geometry": "^geometry_encoder/",
  "encoder": "^detr_encoder/",
  "decoder": "^detr_decoder/",
  "scoring": "^dot_product_scoring/",
  "masks": "^mask_decoder/",
}
_NO_ADAPTER = r"(?!.*/kernel/[ab]$)"
_ADAPTER = r"/kernel/[ab]$"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
  """Numbers of a fine-tuning run. Rates, decay and clipping default to SAM 3's published fine-tuning figures.

  Attributes:
    steps: calls of the train step, each on one batch.
    data: batches, prompts, augmentation and their seed, see `sam3lt_jax.data.batches.BatchConfig`. Its
      `mask_side` None is the image's side here, see `batch_config`.
    loss: weights of the losses.
    freeze: parts (see `PARTS`) or regular expressions over parameter paths that stay as they are.
    lora: adapters; then everything else is frozen except what `train` finds.
    train: with `lora`, regular expressions (or parts) of parameters that are trained beside the adapters.
    lr, vision_lr, text_lr, lora_lr: peak rates of the detector, of the vision encoder, of the text encoder
      with its projection, and of adapters wherever they are.
    layer_decay: the trunk's top layer learns at vision_lr * layer_decay, each one below at layer_decay times
      that, what comes before the first of them likewise; the position table and the neck at vision_lr. None:
      all alike.
    end_lr: share of the peak that is left at the end of the cosine.
    warmup_steps: updates of linear warm-up from 0; None: a tenth of the run, at most 20.
    weight_decay, clip_norm, moment_dtype, accumulate, ema_decay: see `OptimizerConfig`.
    one_to_many: train with the second set of decoder rows that is matched to several queries an object.
    dropout: apply the profile's dropout and drop path (drop path not in a frozen trunk).
    dtype: what layers compute in. Trained parameters and their averages are float32 in any case.
    remat: compute layers a second time in the backward pass, to fit in memory.
    image_size: side of the model's input; None: the model's own.
    seed: of adapters and dropout (`data.seed` is that of the data).

  Raises:
    ValueError: a number out of its range, or `train` without `lora`.
  """

  steps: int = 1000
  data: BatchConfig = BatchConfig(batch_size=1)
  loss: DetectionLossConfig = DetectionLossConfig()
  freeze: tuple[str, ...] = ()
  lora: LoraConfig | None = None
  train: tuple[str, ...] = ()
  lr: float = 8e-5
  vision_lr: float = 2.5e-5
  text_lr: float = 5e-6
  lora_lr: float = 2e-4
  layer_decay: float | None = 0.9
  end_lr: float = 0.01
  warmup_steps: int | None = None
  weight_decay: float = 0.1
  clip_norm: float | None = 0.1
  moment_dtype: str = "float32"
  accumulate: int = 1
  ema_decay: float | None = None
  one_to_many: bool = True
  dropout: bool = True
  dtype: str = "float32"
  remat: bool = False
  image_size: int | None = None
  seed: int = 0

  def __post_init__(self):
    for name in ("freeze", "train"):
      given = getattr(self, name)
      if isinstance(given, str):
        raise ArgumentError(name, f"={given!r}; accepted: a list of parts or regular expressions")
      object.__setattr__(self, name, tuple(given))
    for name, good, accepted in (
      ("steps", self.steps >= 1, "1 or more"),
      ("lr", self.lr > 0, "a number above 0"),
      ("vision_lr", self.vision_lr >= 0, "a number of 0 or more"),
      ("text_lr", self.text_lr >= 0, "a number of 0 or more"),
      ("lora_lr", self.lora_lr >= 0, "a number of 0 or more"),
      ("end_lr", 0 <= self.end_lr <= 1, "a share within [0, 1]"),
      ("dtype", self.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
      ("moment_dtype", self.moment_dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
      ("train", not self.train or self.lora is not None, "nothing, without lora (use freeze)"),
      ("accumulate", self.accumulate >= 1, "1 or more calls"),
      ("seed", self.seed >= 0, "0 or more"),
    ):
      check(good, name, getattr(self, name), accepted)

  def fingerprint(self) -> dict[str, Any]:
    """All of it as JSON can hold it."""
    return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class Setup:
  """A run before its first step.

  Attributes:
    model: as it is trained (remat, one_to_many, dtype).
    params: the trainable tree, float32: parameters by their names, and adapters as `{"a", "b"}` in a kernel's
      place.
    frozen: what the step gets beside the state: {"params": ...}.
    batch_stats: BatchNorm statistics, {} without. They are not updated.
    tx, step: optimiser and train step.
    optimizer: its numbers.
  """

  model: Sam3LiteText
  params: Tree
  frozen: Tree
  batch_stats: Tree
  tx: Any
  step: TrainStep
  optimizer: OptimizerConfig
  config: FinetuneConfig

  def state(self) -> TrainState:
    """The state before the first step."""
    key = jax.random.key(self.config.seed)
    ema = self.config.ema_decay is not None
    return TrainState.create(self.params, self.tx, key, batch_stats=self.batch_stats, ema=ema)


def batch_config(config: FinetuneConfig, image_size: int) -> BatchConfig:
  """`config.data` with true masks as large as the image, as SAM 3 is trained: predicted ones are enlarged."""
  return dataclasses.replace(config.data, mask_side=config.data.mask_side or image_size)


def prepare(model: Sam3LiteText, variables: Mapping[str, Any], config: FinetuneConfig) -> Setup:
  """Splits the parameters, makes adapters, optimiser and step.

  Args:
    model, variables: from `from_pretrained` (unfused), or their shapes.
    config: the run.

  Raises:
    ValueError: a pattern that finds nothing, nothing left to train, fused RepMixer blocks.
  """
  if model.config.text.fused:
    raise ValueError("model: its RepMixer blocks are folded (fuse), which cannot be trained; load it unfused")
  base = variables["params"]
  trainable, frozen = split(base, config)
  paths = flatten(trainable)
  trunk_learns = any(path.startswith("vision_encoder/backbone/") for path in paths)
  c = model.config
  if not trunk_learns:  # dropping its branches would only add noise to features that cannot adapt
    c = c.replace(vision=dataclasses.replace(c.vision, drop_path_rate=0.0))
  trained_model = model.clone(
    config=c, dtype=jnp.dtype(config.dtype), remat=config.remat, one_to_many=config.one_to_many
  )
  optimizer = optimizer_config(config, trainable)
  tx, schedule = make_optimizer(optimizer, trainable)
  loss_fn = make_detection_loss_fn(
    trained_model,
    config.loss,
    merge=lambda params, frozen: merged(params, frozen["params"], config.lora),
    deterministic=not config.dropout,
  )
  step = make_train_step(loss_fn, tx, ema_decay=config.ema_decay, schedule=schedule)
  return Setup(
    model=trained_model,
    params=trainable,
    frozen={"params": _cast_kernels(frozen, trained_model.dtype, paths)},
    batch_stats=variables.get("batch_stats", {}),
    tx=tx,
    step=step,
    optimizer=optimizer,
    config=config,
  )


def split(params: Mapping[str, Any], config: FinetuneConfig) -> tuple[Tree, Tree]:
  """(trainable, frozen) of a model's parameters, adapters among the trainable ones.

  Trainable leaves are float32. With adapters of a kernel, the kernel is frozen.
  """
  if config.lora is None:
    trainable, frozen = freezing.split(params, freeze=_patterns(config.freeze))
  else:
    if config.freeze:
      raise ArgumentError(
        "freeze", f"={config.freeze!r} with lora, which freezes everything; name what to train in 'train'"
      )
    trainable, frozen = {}, dict(params)
    if config.train:
      trainable, frozen = freezing.split(params, train=_patterns(config.train))
    trainable = freezing.merge(trainable, _adapters(frozen, config))
  return jax.tree.map(lambda x: _astype(x, np.float32), trainable), frozen


def _adapters(frozen: Mapping[str, Any], config: FinetuneConfig) -> Tree:
  key = jax.random.key(config.seed)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), frozen)

  def make():
    return lora_ops.init_lora(shapes, config.lora, key)

  abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(frozen))
  return jax.eval_shape(make) if abstract else make()


def merged(trainable: Mapping[str, Any], frozen: Mapping[str, Any], lora: LoraConfig | None) -> Tree:
  """The model's whole parameter tree; works in the step."""
  if lora is None:
    return freezing.merge(trainable, frozen)
  adapters, rest = lora_ops.split_adapters(trainable)
  return lora_ops.apply_lora(freezing.merge(rest, frozen), adapters, lora)


def exported(trainable: Mapping[str, Any], params: Mapping[str, Any], lora: LoraConfig | None) -> Tree:
  """The model's whole parameter tree for export, as numpy.

  Args:
    trainable: the trained tree.
    params: the parameters that the run started from: what was frozen is taken from here bit for bit, and what
      was trained gets their dtypes.
    lora: the adapters' configuration, merged into their kernels.
  """
  trainable = jax.tree.map(np.asarray, trainable)
  adapters, rest = lora_ops.split_adapters(trainable)
  start = flatten(params)
  whole = start | {path: x.astype(start[path].dtype) for path, x in flatten(rest).items()}
  whole = unflatten({path: np.asarray(x) for path, x in whole.items()})
  return lora_ops.merge_lora(whole, adapters, lora) if lora is not None else whole


def optimizer_config(config: FinetuneConfig, trainable: Mapping[str, Any]) -> OptimizerConfig:
  """The optimiser's numbers; rates by part and layer become `lr_scale` patterns."""
  updates = -(-config.steps // config.accumulate)
  warmup = min(20, updates // 10) if config.warmup_steps is None else min(config.warmup_steps, updates)
  return OptimizerConfig(
    peak_lr=config.lr,
    total_steps=updates,
    end_lr=config.end_lr * config.lr,
    warmup_init_lr=0.0,
    warmup_steps=warmup,
    weight_decay=config.weight_decay,
    clip_norm=config.clip_norm,
    moment_dtype=config.moment_dtype,
    accumulate=config.accumulate,
    lr_scale=_rates(config, trainable),
    ema_decay=config.ema_decay,
  )


def _rates(config: FinetuneConfig, trainable: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
  """(pattern, factor of lr), each pattern finding something."""
  rates = [
    (f"^vision_encoder/{_NO_ADAPTER}", config.vision_lr / config.lr),
    (f"^text_(encoder|projection)/{_NO_ADAPTER}", config.text_lr / config.lr),
    (_ADAPTER, config.lora_lr / config.lr),
  ]
  paths = flatten(trainable)
  layered = any(re.match(r"vision_encoder/backbone/layers_\d+/" + _NO_ADAPTER, path) for path in paths)
  if layered and config.layer_decay is not None:
    trunk = {"vision_encoder": {"backbone": trainable["vision_encoder"]["backbone"]}}
    factors = {p.split("/")[2]: f for p, f in layer_factors(trunk, config.layer_decay).items() if f != 1}
    alike = f"(?!position_embeddings){_NO_ADAPTER}"  # the table lies in `embeddings` and has the full rate
    rates += [(f"^vision_encoder/backbone/{name}/{alike}", f) for name, f in factors.items()]
  return tuple((p, f) for p, f in rates if f != 1 and any(re.search(p, path) for path in paths))


def _patterns(names: tuple[str, ...]) -> list[str]:
  return [PARTS.get(name, name) for name in names]


def _cast_kernels(frozen: Tree, dtype: Any, trainable: Mapping[str, Any]) -> Tree:
  """Frozen kernels in the compute dtype, as layers cast them anyway; but not those with adapters."""
  adapted = {path.rpartition("/")[0] for path in trainable if re.search(_ADAPTER, path)}

  def cast(path, x):
    return _astype(x, dtype) if path.endswith("/kernel") and path not in adapted and x.dtype != dtype else x

  return unflatten({path: cast(path, x) for path, x in flatten(frozen).items()})


def _astype(x: Any, dtype: Any) -> Any:
  return jax.ShapeDtypeStruct(x.shape, dtype) if isinstance(x, jax.ShapeDtypeStruct) else x.astype(dtype)
