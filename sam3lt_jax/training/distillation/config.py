"""DistillationConfig: every number of a distillation run; by default the authors' recipe for the student."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from sam3lt_jax.config import Profile, TextConfig
from sam3lt_jax.errors import check
from sam3lt_jax.training.distillation.losses import DistillationLossConfig
from sam3lt_jax.training.optimizer import OptimizerConfig

_PLACES = ("out", "features", "prompts", "log_every", "evaluate_every", "checkpoint_every", "shard_teacher")


# The authors' files for their three students (efficientsam3, stage1/configs/text_improved_{s0,s1,l}.yaml).
RECIPES: dict[str, dict[str, Any]] = {
  "s0": {
    "batch_size": 64, "accumulate": 2, "epochs": 100.0, "warmup": 0.1, "peak_lr": 5e-3, "end_lr": 5e-6,
    "clip_norm": 1.0, "loss": DistillationLossConfig(cosine=2.0, consistency=0.1),
  },
  "s1": {
    "batch_size": 64, "accumulate": 2, "epochs": 80.0, "warmup": 8 / 80, "peak_lr": 3e-3, "end_lr": 5e-6,
    "clip_norm": 1.0, "loss": DistillationLossConfig(cosine=1.5, consistency=0.1),
  },
  "l": {
    "batch_size": 32, "accumulate": 4, "epochs": 60.0, "warmup": 5 / 60, "peak_lr": 1e-3, "end_lr": 1e-6,
    "clip_norm": 2.0, "loss": DistillationLossConfig(cosine=1.0, consistency=0.05),
  },
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
  """A run of `distill`.

  Source of the defaults: the authors' stage 1 for text encoders (efficientsam3, their configurations, their
  trainer and the arguments of AdamW), where not said otherwise. What is None by default is taken from the
  recipe of the student, see `RECIPES`, or of S0 for a size that has none.

  Attributes:
    prompts: files of phrases, see `sam3lt_jax.data.prompts.read_prompts`.
    out: the run's directory: metrics, checkpoints, and at the end the models.
    teacher: whose text encoder is learnt from and whose detector is kept: "sam3" or a checkpoint.
    student: "s0", "s1", "l" or a `TextConfig`, see `student.student_config`.
    init: where the student's weights start, see `student.make_student`.
    profile: how the student reads phrases: "transformers" (32 tokens, padding masked and of id 49407, as
      transformers will run it) or "original" (16 tokens, as the released students were trained).
    context_length: tokens a phrase is padded and cut to, for teacher and student; None: the profile's.
    features: a directory: the teacher's features are computed into it once and read from there. None: the
      teacher runs in every step.
    held_out: share of the phrases that is evaluated on and never trained on. 0: none, and the last student is
      kept rather than the best. Ours.
    batch_size: phrases a step, over all devices.
    accumulate: steps whose mean gradient makes one update.
    epochs: passes over the phrases. steps: calls of the step instead; what is over a multiple of `accumulate`
      makes no update.
    warmup: share of the run in which the rate rises.
    peak_lr, end_lr, warmup_init_lr: learning rates for `lr_rows` phrases an update: they are multiplied by
      batch_size * accumulate / lr_rows, as the authors' trainer does, which makes the peak 1.25e-3 for S0,
      7.5e-4 for S1 and 2.5e-4 for L. lr_rows None: they are taken as they stand.
    whole_cosine, weight_decay, b1, b2, eps, clip_norm, layer_decay, ema_decay: see `OptimizerConfig`; a
      clip_norm of infinity does not clip. (The authors configure a layer decay of 0.9 for S0 and 0.95 for S1;
      in the code they published it reaches image encoders only.)
    loss: weights of the losses.
    update_batch_stats: BatchNorm of RepMixer blocks by the batch, statistics moving; False: frozen.
    dropout: in the student; the authors use none.
    dtype: what the student computes in; parameters and losses are float32.
    teacher_dtype: what the teacher computes in.
    shard_teacher: split the teacher's weights over the devices instead of a copy on each.
    seed: of the weights, the order of phrases and words, and the held-out choice.
    log_every, evaluate_every, checkpoint_every: steps; None: a 50th, a 20th and a 10th of the run (the
      last two at least 10).
  """

  prompts: tuple[str, ...]
  out: str
  teacher: str = "sam3"
  student: str | TextConfig = "s0"
  init: str = "random"
  profile: str | Profile = "transformers"
  context_length: int | None = None
  features: str | None = None
  held_out: float = 0.02
  batch_size: int | None = None
  accumulate: int | None = None
  epochs: float | None = None
  steps: int | None = None
  warmup: float | None = None
  peak_lr: float | None = None
  end_lr: float | None = None
  warmup_init_lr: float = 1e-6
  lr_rows: int | None = 512
  whole_cosine: bool = True
  weight_decay: float = 0.05
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  clip_norm: float | None = None
  layer_decay: float | None = None
  ema_decay: float | None = None
  loss: DistillationLossConfig | None = None
  update_batch_stats: bool = True
  dropout: float = 0.0
  dtype: str = "bfloat16"
  teacher_dtype: str = "float32"
  shard_teacher: bool = False
  seed: int = 0
  log_every: int | None = None
  evaluate_every: int | None = None
  checkpoint_every: int | None = None

  def __post_init__(self):
    prompts = (self.prompts,) if isinstance(self.prompts, str) else tuple(map(str, self.prompts))
    object.__setattr__(self, "prompts", prompts)
    for name, value in RECIPES.get(self.student, RECIPES["s0"]).items():
      if getattr(self, name) is None:
        object.__setattr__(self, name, value)
    if self.context_length is None:
      object.__setattr__(self, "context_length", Profile.named(self.profile).context_length)
    least = f"None, or at least the {self.accumulate} steps that make an update"
    for name, good, accepted in (
      ("prompts", bool(prompts), "one file of phrases or more"),
      ("out", bool(self.out), "a directory"),
      ("held_out", 0 <= self.held_out < 1, "a share in [0, 1)"),
      ("batch_size", self.batch_size >= 1, "1 or more phrases"),
      ("accumulate", self.accumulate >= 1, "1 or more steps"),
      ("epochs", 0 < self.epochs < math.inf, "a number above 0"),
      ("steps", self.steps is None or self.steps >= self.accumulate, least),
      ("warmup", 0 <= self.warmup <= 1, "a share in [0, 1]"),
      ("lr_rows", self.lr_rows is None or self.lr_rows >= 1, "None or 1 or more phrases"),
      ("dropout", 0 <= self.dropout < 1, "a rate in [0, 1)"),
      ("dtype", self.dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
      ("teacher_dtype", self.teacher_dtype in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
      ("seed", self.seed >= 0, "0 or more"),
    ):
      check(good, name, getattr(self, name), accepted)
    self.optimizer(self.accumulate)  # its own checks

  def total_steps(self, phrases: int) -> int:
    """Calls of the step for a set of that many phrases: `steps`, or of epochs a multiple of `accumulate`."""
    if self.steps is not None:
      return self.steps
    steps = math.ceil(self.epochs * phrases / self.batch_size)
    return -(-steps // self.accumulate) * self.accumulate

  def optimizer(self, total_steps: int) -> OptimizerConfig:
    """The optimiser of a run of `total_steps` calls of the step."""
    scale = 1.0 if self.lr_rows is None else self.batch_size * self.accumulate / self.lr_rows
    updates = max(1, total_steps // self.accumulate)
    same = ("whole_cosine weight_decay b1 b2 eps clip_norm accumulate layer_decay ema_decay").split()
    return OptimizerConfig(
      peak_lr=scale * self.peak_lr,
      end_lr=scale * self.end_lr,
      warmup_init_lr=scale * self.warmup_init_lr,
      total_steps=updates,
      warmup_steps=round(self.warmup * updates),
      **{name: getattr(self, name) for name in same},
    )

  def fingerprint(self) -> dict[str, Any]:
    """What must not change when a run goes on: all but names of places and how often things are done."""
    return {name: value for name, value in dataclasses.asdict(self).items() if name not in _PLACES}
