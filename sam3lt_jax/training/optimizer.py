"""AdamW (or Muon) with warm-up and cosine, clipping, accumulation, and rates by layer and by name."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sam3lt_jax.checkpoints.engine import flatten
from sam3lt_jax.errors import ArgumentError, check

Schedule = Callable[[Any], jax.Array]

# Only these are stacks of which the lowest layer is farthest from the loss. "" is a tree that is one encoder.
_TOWERS = ("", "text_encoder", "backbone")
_FIRST = ("embeddings", "layer_norm")  # before the first layer; the norms after the last have other names
_LAYER = re.compile(r"(?:(?P<tower>.*)/)?layers_(?P<index>\d+)/.*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Numbers of the optimiser. The defaults are those of the authors' distillation of the text encoder.

  Every count of steps here is a count of optimiser updates. With `accumulate` = 2, two calls of the train
  step make one update: 1000 calls are `total_steps` = 500.

  Attributes:
    peak_lr, end_lr, warmup_init_lr: the rate starts at `warmup_init_lr`, rises linearly for `warmup_steps`
      updates to `peak_lr`, and falls along half a cosine to `end_lr` at `total_steps`, where it stays.
    whole_cosine: the cosine begins with the first update, and the warm-up stands in front of its first part,
      as the authors' scheduler has it: the rate then drops a little where the warm-up ends. False: it begins
      there.
    weight_decay: AdamW's, for parameters of two and more dimensions. Those of one (biases, norms, layer
      scales) have none.
    b1, b2, eps: Adam's.
    moment_dtype: what Adam's mean of gradients is kept in, "float32" or "bfloat16", which takes 2 bytes a
      parameter less. The mean of squares stays float32.
    muon_rms: matrices (parameters of two dimensions) whose path `muon_for` finds (`re.search`; default: those
      of layers) get, in place of Adam's update, Muon's: their momentum, orthogonalised, scaled to this root
      mean square before the rate. 0.2 is about what Adam's updates have. Networks trained from nothing learn
      from far fewer images by it; it costs matrix products that do not shrink with the batch. None: Adam for
      all of them.
    clip_norm: gradients are scaled down to this global norm; None: not clipped.
    accumulate: calls whose mean gradient makes one update.
    layer_decay: the rate of a layer `n` layers below an encoder's top is multiplied by this to the power `n`;
      see `layer_factors`. None: no decay.
    lr_scale: (pattern, factor): parameters whose path ("text_encoder/layers_0/mlp/fc1/kernel") the regular
      expression finds (`re.search`) learn at `factor` times the rate. Factors of several patterns multiply.
    ema_decay: for an average of the parameters, given on to `make_train_step`; None: no average.

  Raises:
    ValueError: a number out of its range.
  """

  peak_lr: float
  total_steps: int
  end_lr: float = 5e-6
  warmup_init_lr: float = 1e-6
  warmup_steps: int = 0
  whole_cosine: bool = False
  weight_decay: float = 0.05
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  moment_dtype: str = "float32"
  muon_rms: float | None = None
  muon_for: str = r"layers_\d+/"
  clip_norm: float | None = 1.0
  accumulate: int = 1
  layer_decay: float | None = None
  lr_scale: tuple[tuple[str, float], ...] = ()
  ema_decay: float | None = None

  def __post_init__(self):
    object.__setattr__(self, "lr_scale", tuple((str(p), float(f)) for p, f in self.lr_scale))
    number = "a number of 0 or more"
    for name, good, accepted in (
      ("peak_lr", self.peak_lr > 0, "a number above 0"),
      ("end_lr", self.end_lr >= 0, number),
      ("warmup_init_lr", self.warmup_init_lr >= 0, number),
      ("weight_decay", self.weight_decay >= 0, number),
      ("total_steps", self.total_steps >= 1, "1 or more updates"),
      ("warmup_steps", 0 <= self.warmup_steps <= self.total_steps, f"0 to total_steps = {self.total_steps}"),
      ("b1", 0 <= self.b1 < 1, "a number in [0, 1)"),
      ("b2", 0 <= self.b2 < 1, "a number in [0, 1)"),
      ("eps", self.eps > 0, "a number above 0"),
      ("moment_dtype", self.moment_dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
      ("muon_rms", self.muon_rms is None or self.muon_rms > 0, "None or a number above 0"),
      ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "None or a number above 0"),
      ("accumulate", self.accumulate >= 1, "1 or more calls"),
      ("layer_decay", self.layer_decay is None or 0 < self.layer_decay <= 1, "None or in (0, 1]"),
      ("ema_decay", self.ema_decay is None or 0 <= self.ema_decay < 1, "None or in [0, 1)"),
      ("lr_scale", all(factor >= 0 for _, factor in self.lr_scale), "factors of 0 or more"),
    ):
      check(good, name, getattr(self, name), accepted)


def make_schedule(config: OptimizerConfig) -> Schedule:
  """The learning rate, float32 [], of the update that follows `count` others (int, or an int array)."""
  c = config

  def schedule(count):
    count = jnp.minimum(jnp.asarray(count, jnp.float32), c.total_steps)
    warm = c.warmup_init_lr + (c.peak_lr - c.warmup_init_lr) * count / max(c.warmup_steps, 1)
    begin = 0 if c.whole_cosine else c.warmup_steps
    done = (count - begin) / max(c.total_steps - begin, 1)
    cosine = c.end_lr + (c.peak_lr - c.end_lr) * 0.5 * (1 + jnp.cos(math.pi * done))
    return jnp.where(count < c.warmup_steps, warm, cosine).astype(jnp.float32)

  return schedule


def layer_factors(params: Mapping[str, Any], layer_decay: float) -> dict[str, float]:
  """What the rate of every parameter is multiplied by under layer-wise rate decay.

  It holds for the two encoders, which are stacks: `text_encoder` and `vision_encoder/backbone`, and for a
  tree that is an encoder itself. With N layers, `layers_{i}` has depth i + 1, `embeddings` and the trunk's
  norm before its first layer (`layer_norm`) depth 0, and the rest of the encoder (final norm, projection)
  depth N + 1; the factor is layer_decay ** (N + 1 - depth). The trunk's position table and all parameters
  outside have the factor 1. (SAM 3's `get_layer_id`, and `*pos_embed*: 1` in its fine-tuning configuration.)

  Args:
    params: the trainable parameters, nested.
    layer_decay: in (0, 1].

  Returns:
    path ("text_encoder/layers_0/mlp/fc1/kernel") -> factor.

  Raises:
    ValueError: no encoder with layers among them.
  """
  paths = list(flatten(params))
  layers: dict[str, int] = {}
  for path in paths:
    match = _LAYER.fullmatch(path)
    tower = match and (match["tower"] or "")
    if match and tower.rsplit("/", 1)[-1] in _TOWERS:
      layers[tower] = max(layers.get(tower, 0), int(match["index"]) + 1)
  if not layers:
    raise ArgumentError(
      "layer_decay",
      f"={layer_decay}: none of the trainable parameters is in a layer of text_encoder or"
      f" vision_encoder/backbone; pass layer_decay=None (they are under: {', '.join(list(params)[:8])})",
    )

  def factor(path: str) -> float:
    for tower, count in layers.items():
      prefix = f"{tower}/" if tower else ""
      if path.startswith(prefix):
        name, *inner = path[len(prefix) :].split("/")
        index = re.fullmatch(r"layers_(\d+)", name)
        if index:
          return layer_decay ** (count - int(index[1]))
        first = name in _FIRST and "position_embeddings" not in inner
        return layer_decay ** (count + 1) if first else 1.0
    return 1.0

  return {path: factor(path) for path in paths}


def rate_factors(config: OptimizerConfig, params: Mapping[str, Any]) -> dict[str, float]:
  """path -> what the scheduled rate of that parameter is multiplied by: `layer_decay` times `lr_scale`.

  Raises:
    ValueError: a pattern of `lr_scale` that is no regular expression or finds no parameter.
  """
  factors = dict.fromkeys(flatten(params), 1.0)
  if config.layer_decay is not None:
    factors = layer_factors(params, config.layer_decay)
  for pattern, scale in config.lr_scale:
    try:
      found = [path for path in factors if re.search(pattern, path)]
    except re.error as e:
      raise ValueError(f"lr_scale: {pattern!r} is no regular expression ({e})") from e
    if not found:
      some = ", ".join(list(factors)[:5])
      raise ValueError(
        f"lr_scale: {pattern!r} finds none of {len(factors)} trainable parameters ({some}, ...)"
      )
    for path in found:
      factors[path] *= scale
  return factors


def make_optimizer(
  config: OptimizerConfig, params: Mapping[str, Any]
) -> tuple[optax.GradientTransformation, Schedule]:
  """AdamW with the rates of `config`.

  In this order: mean of `accumulate` gradients, clipping of that mean, Adam (or Muon), weight decay, factors
  by layer and name, the scheduled rate. Factors hold for the weight decay as well, as with torch's parameter
  groups.

  Args:
    config: the numbers.
    params: the trainable parameters, nested; names and dimensions are read, not values.

  Returns:
    (tx, schedule): the transformation, and updates done (int) -> rate of the next (float32 []).

  Raises:
    ValueError: a pattern that finds nothing, or layer decay with no layers.
  """
  factors, schedule = rate_factors(config, params), make_schedule(config)

  def scale(updates, _):
    return jax.tree_util.tree_map_with_path(
      lambda path, update: update * factors["/".join(str(part.key) for part in path)], updates
    )

  parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
  adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=config.moment_dtype)
  parts.append(adam if config.muon_rms is None else _muon_or(adam, config))
  if config.weight_decay:
    parts.append(optax.add_decayed_weights(config.weight_decay, mask=has_weight_decay))
  if any(factor != 1 for factor in factors.values()):
    parts.append(optax.stateless(scale))
  parts.append(optax.scale_by_learning_rate(schedule))
  tx = optax.chain(*parts)
  if config.accumulate > 1:
    tx = optax.MultiSteps(tx, config.accumulate).gradient_transformation()
  return tx, schedule


def _muon_or(adam: optax.GradientTransformation, config: OptimizerConfig) -> optax.GradientTransformation:
  """Muon for the matrices that the configuration names, `adam` for everything else."""

  def rule(path, x):
    found = re.search(config.muon_for, "/".join(str(part.key) for part in path))
    return "muon" if found and jnp.ndim(x) == 2 else "adam"

  def dimensions(params):  # the default marks a whole tree, which fails on the parts that are Adam's
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)

  def to_rms(updates, _):  # an orthogonal matrix [m, n] has a root mean square of max(m, n) ** -0.5
    return jax.tree.map(lambda x: x * (config.muon_rms * max(x.shape) ** 0.5), updates)

  muon = optax.contrib.scale_by_muon(weight_dimension_numbers=dimensions)
  return optax.partition(
    {"muon": optax.chain(muon, optax.stateless(to_rms)), "adam": adam},
    lambda params: jax.tree_util.tree_map_with_path(rule, params),
  )


def has_weight_decay(params: Any) -> Any:
  """A tree of bool: True for parameters of two and more dimensions."""
  return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)
