"""Trains the bundled model from nothing: `python -m examples.shapes.train --out runs/shapes`.

Needs the extra "train" (`pip install '.[train]'`).

Stage 0 teaches a vision encoder what lies where. Stage 1 trains the teacher, a small SAM 3 with a large text
encoder, on top of it; stages 2 and 3 train both together, on masks of every pixel. Stage 4 distils the
teacher's text encoder into a student. Stage 5 trains the student's detector on, under its own text encoder,
with more negative boxes. Stage 6 brings it under transformers' rules, so that transformers finds the same:
first the text encoder, by its phrases alone ("phrases"), then the detector ("port"): that ships. Each model
is measured on 500 held-out scenes, the last one also on 2000 fresh ones. Killed and started again, it goes on
where it was. What it writes to OUT/model is what lies in sam3lt_jax/assets/shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import grain  # noqa: F401  stage 4 reads its phrases with it: better missed now than after hours
import jax
import numpy as np

from examples.shapes import evaluation, models
from examples.shapes.alignment import HEADS, AlignmentConfig, make_alignment, with_heads
from examples.shapes.data import HELD_OUT_SCENES, HELD_OUT_SEED, QuestionMix, ShapesBatches
from examples.shapes.initialization import start_locally
from examples.shapes.pretraining import HEADS as DENSE_HEADS
from examples.shapes.pretraining import (
  DenseBatches,
  dense_labels,
  make_dense_extra,
  make_dense_loss_fn,
  with_unit_maps,
)
from sam3lt_jax import parallel, save_pretrained
from sam3lt_jax.config import BOX_ONLY_PHRASE
from sam3lt_jax.model import Sam3LiteText
from sam3lt_jax.shapes.phrases import all_phrases
from sam3lt_jax.shapes.scenes import SceneConfig, draw_scene
from sam3lt_jax.training import freezing
from sam3lt_jax.training.detection.losses import DetectionLossConfig, make_detection_loss_fn
from sam3lt_jax.training.distillation import text_part
from sam3lt_jax.training.distillation.config import DistillationConfig
from sam3lt_jax.training.distillation.losses import DistillationLossConfig
from sam3lt_jax.training.distillation.run import DistillationResult, distill
from sam3lt_jax.training.distillation.step import make_distillation_loss_fn, split_student
from sam3lt_jax.training.loop import fit
from sam3lt_jax.training.optimizer import OptimizerConfig, make_optimizer
from sam3lt_jax.training.state import TrainState
from sam3lt_jax.training.step import make_train_step

STAGES = ("vision", "teacher", "refinement", "outlines", "student", "finish", "phrases", "port")
VALIDATION_SEED = 900_000_000  # scenes to watch the run by; neither trained on nor held out
VALIDATION_SCENES = 60
FRESH_SCENES, FRESH_FIRST = 2000, 10_000  # held out as well, far behind the 500


@dataclasses.dataclass(frozen=True)
class VisionRun:
  """Numbers of stage 0."""

  steps: int = 6_000
  images: int = 8
  seed: int = 2
  optimizer: OptimizerConfig = OptimizerConfig(
    peak_lr=1.2e-3, total_steps=6_000, warmup_steps=100, end_lr=1e-5, weight_decay=1e-2, muon_rms=1.5
  )


@dataclasses.dataclass(frozen=True)
class TeacherRun:
  """Numbers of stage 1. `rules`: the profile, see `models.profile`."""

  rules: str = "original"
  steps: int = 5_000
  images: int = 6
  questions: int = 6
  seed: int = 1
  scene: SceneConfig = SceneConfig(min_objects=2)
  mix: QuestionMix = QuestionMix()
  # Trained on, the vision encoder forgets: after 2,700 steps colours could be read from no map any more.
  freeze: tuple[str, ...] = ("^vision_encoder/",)
  optimizer: OptimizerConfig = OptimizerConfig(
    peak_lr=1e-3, total_steps=5_000, warmup_steps=100, end_lr=1e-5, weight_decay=1e-3, muon_rms=0.4,
    muon_for=r"(detr_encoder|detr_decoder|geometry_encoder)/layers_", ema_decay=0.998,
  )  # fmt: skip
  loss: DetectionLossConfig = DetectionLossConfig(
    class_weight=15.0, positive_weight=3.0, score_gamma=1.0, queries_scale=None, presence_weight=4.0,
    mask_weight=20.0, dice_weight=5.0, semantic_weight=10.0, semantic_dice_weight=5.0, many_weight=1.0,
    many_masks=False, scale_by_prompts=False,
  )  # fmt: skip
  alignment: AlignmentConfig = AlignmentConfig()


@dataclasses.dataclass(frozen=True)
class RefinementRun(TeacherRun):
  """Numbers of stage 2.

  Attributes:
    dense_weight: factor of stage 0's loss, which keeps the vision encoder from forgetting.
  """

  steps: int = 4_000
  seed: int = 3
  mix: QuestionMix = QuestionMix(simple=0.35, negative_box=0.15)
  freeze: tuple[str, ...] = ()
  optimizer: OptimizerConfig = OptimizerConfig(
    peak_lr=6e-4, total_steps=4_000, warmup_steps=200, end_lr=5e-6, weight_decay=1e-3, muon_rms=0.4,
    muon_for=r"(detr_encoder|detr_decoder|geometry_encoder|backbone)/layers_", ema_decay=0.998,
  )  # fmt: skip
  dense_weight: float = 4.0


@dataclasses.dataclass(frozen=True)
class OutlineRun(RefinementRun):
  """Numbers of stage 3: masks weigh ten times as much, as much as SAM 3 gives them."""

  steps: int = 3_500
  seed: int = 4
  optimizer: OptimizerConfig = dataclasses.replace(
    RefinementRun.optimizer, peak_lr=4e-4, total_steps=3_500, warmup_steps=100
  )
  loss: DetectionLossConfig = dataclasses.replace(TeacherRun.loss, mask_weight=200.0, dice_weight=20.0)


@dataclasses.dataclass(frozen=True)
class StudentRun:
  """Numbers of stage 4, fields of `DistillationConfig`."""

  steps: int = 4_000
  batch_size: int = 128
  accumulate: int = 1
  held_out: float = 0.1
  peak_lr: float = 2e-3
  end_lr: float = 1e-5
  lr_rows: int | None = None
  whole_cosine: bool = False
  layer_decay: float | None = None
  weight_decay: float = 1e-3
  ema_decay: float | None = 0.998
  dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class PhrasesRun:
  """Numbers of the first half of stage 6: the text encoder under transformers' rules."""

  steps: int = 800
  phrases: int = 128
  seed: int = 6
  optimizer: OptimizerConfig = OptimizerConfig(
    peak_lr=1e-3, total_steps=800, warmup_steps=100, end_lr=1e-5, weight_decay=0.0, ema_decay=0.998
  )


@dataclasses.dataclass(frozen=True)
class FinishRun(TeacherRun):
  """Numbers of stage 5: it starts from the student as float16 keeps it, and leaves its text encoder alone."""

  steps: int = 4_000
  seed: int = 5
  mix: QuestionMix = QuestionMix(absent=0.3, simple=0.4, positive_box=0.12, negative_box=0.25)
  freeze: tuple[str, ...] = ("^text_encoder/",)
  optimizer: OptimizerConfig = dataclasses.replace(
    RefinementRun.optimizer, peak_lr=3e-4, total_steps=4_000, warmup_steps=100
  )
  loss: DetectionLossConfig = OutlineRun.loss


@dataclasses.dataclass(frozen=True)
class PortRun(FinishRun):
  """Numbers of the second half of stage 6: the detector, which hears no CLS token where there is no box."""

  steps: int = 180
  images: int = 4
  questions: int = 4
  seed: int = 7
  mix: QuestionMix = QuestionMix(absent=0.25, simple=0.4, positive_box=0.15, negative_box=0.3)
  freeze: tuple[str, ...] = ("^text_encoder/", "^vision_encoder/")
  optimizer: OptimizerConfig = dataclasses.replace(
    FinishRun.optimizer, peak_lr=3e-4, total_steps=180, warmup_steps=10, ema_decay=0.97
  )
  rules: str = "transformers"


def pretrain_vision(run: VisionRun, directory: str) -> tuple[Any, Any]:
  """Stage 0: the parameters of the vision encoder and of the heads that read its maps."""
  model = Sam3LiteText(models.teacher_config())
  # Compiled as one, what is not asked for is not drawn.
  draw = jax.jit(lambda key: model.init_variables(key)["params"]["vision_encoder"])
  start = draw(jax.random.key(run.seed))
  loss_fn, init = make_dense_loss_fn(model, models.mask_side())
  params = init(start, jax.random.key(run.seed))
  tx, schedule = make_optimizer(run.optimizer, params)
  state = fit(
    TrainState.create(params, tx, jax.random.key(run.seed)),
    make_train_step(loss_fn, tx, schedule=schedule),
    DenseBatches(images=run.images, side=models.mask_side(), seed=run.seed),
    total_steps=run.steps,
    directory=directory,
    mesh=parallel.make_mesh(),
    log_every=100,
    checkpoint_every=1000,
    fingerprint={"run": dataclasses.asdict(run), "scene": dataclasses.asdict(SceneConfig())},
  )
  trained = jax.tree.map(np.asarray, state.params)
  some = DenseBatches(images=32, side=models.mask_side(), seed=run.seed)[0]
  return with_unit_maps(model, trained["vision_encoder"], trained["heads"], some["pixel_values"])


def train_teacher(run: TeacherRun, vision: Any, directory: str) -> Any:
  """Stage 1: text encoder and detector, from random weights, on the vision encoder of stage 0."""
  params = Sam3LiteText(models.teacher_config()).init_variables(jax.random.key(run.seed))["params"]
  params |= {"vision_encoder": vision, "detr_decoder": start_locally(params["detr_decoder"])}
  params = with_heads(params, models.WIDTH)
  model = Sam3LiteText(models.teacher_config())
  return train_detector(
    run, model, params, directory, models.mask_side(), extra=make_alignment(run.alignment)
  )


def refine_teacher(run: RefinementRun, params: Any, directory: str) -> Any:
  """Stages 2 and 3: everything, from the parameters of the stage before with stage 0's heads."""
  aligned = make_alignment(run.alignment)
  dense = make_dense_extra(models.mask_side(), run.dense_weight)

  def extra(*given):
    (a, told), (b, more) = aligned(*given), dense(*given)
    return a + b, told | more

  return train_detector(
    run, Sam3LiteText(models.teacher_config()), params, directory, run.scene.side, extra=extra,
    labels=lambda scene: dense_labels(scene, models.mask_side()),
  )  # fmt: skip


def finish_student(run: FinishRun, model: Sam3LiteText, variables: Any, directory: str) -> Any:
  """Stage 5, and the second half of stage 6: the student's variables after it."""
  variables = rounded(variables)
  stats = variables.get("batch_stats", {})
  params = train_detector(run, model, variables["params"], directory, run.scene.side, batch_stats=stats)
  return {**variables, "params": params}


def rounded(variables: Any) -> Any:
  """The parameters as float16 keeps them, float32."""
  half = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), variables["params"])
  return {**variables, "params": half}


class PhraseBatches:
  """Batches of phrases, `batches[step]`, with what the text encoder shall give for them.

  That is what it gave under the authors' rules, but for the end token. In a prompt without a box transformers
  has no CLS token, which the detector is used to: the end token gives its mean over scenes. ("visual" always
  comes with a box, and so with a CLS token.)
  """

  def __init__(self, run: PhrasesRun, model: Sam3LiteText, variables: Any):
    self._run = run
    phrases = [*all_phrases(), BOX_ONLY_PHRASE]
    ids, mask = models.tokenizer()(phrases)
    read = jax.jit(lambda v, *x: model.apply(v, *x, method="get_text_features").pooler_output)
    features = np.array(read(variables, ids, mask))
    last = mask.sum(axis=1) - 1
    alone = np.array([phrase != BOX_ONLY_PHRASE for phrase in phrases])
    features[alone, last[alone]] = mean_cls(model, variables)
    self._ids, self._mask = models.tokenizer(PortRun.rules)(phrases)
    self._features = np.zeros((*self._ids.shape, features.shape[-1]), np.float32)
    self._features[:, : ids.shape[1]] = features

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    rows = np.random.default_rng([self._run.seed, step]).choice(len(self._ids), self._run.phrases, False)
    names = {"input_ids": self._ids, "attention_mask": self._mask, "teacher_features": self._features}
    return {name: values[rows] for name, values in names.items()}


def mean_cls(model: Sam3LiteText, variables: Any, scenes: int = 100) -> np.ndarray:
  """[D]: the CLS token of a prompt without a box under the authors' rules, the mean over training scenes."""
  images = np.stack([draw_scene(i, SceneConfig()).image for i in range(scenes)])
  ids, mask = models.tokenizer()(["shape"] * scenes)

  def read(variables, images, ids, mask):
    taps = model.apply(variables, images, ids, mask, output_intermediates=True).intermediates
    return taps["prompt_tokens"][:, -1].mean(axis=0)

  return np.asarray(jax.jit(read)(variables, images.astype(np.float32) / 127.5 - 1.0, ids, mask))


def port_phrases(
  run: PhrasesRun, model: Sam3LiteText, variables: Any, directory: str
) -> tuple[Sam3LiteText, Any]:
  """Stage 6, first half: the text encoder gives under transformers' rules what it gave under the authors'.

  Its position table gets a row for each of transformers' 32 tokens. Returns the model and its variables.
  """
  variables = rounded(variables)
  ported = Sam3LiteText(models.student_config(PortRun.rules))
  table = variables["params"]["text_encoder"]["embeddings"]["position_embedding"]
  more = ported.config.text.max_position_embeddings - len(table)
  text = jax.tree.map(np.asarray, text_part.text_variables(variables))
  text["params"]["text_encoder"]["embeddings"]["position_embedding"] = np.pad(table, ((0, more), (0, 0)))
  params, frozen, stats = split_student(text)
  loss = DistillationLossConfig(consistency=0.0)
  tx, schedule = make_optimizer(run.optimizer, params)
  loss_fn = make_distillation_loss_fn(ported, None, loss, update_batch_stats=False)
  ema = run.optimizer.ema_decay
  state = fit(
    TrainState.create(params, tx, jax.random.key(run.seed), batch_stats=stats, ema=ema is not None),
    make_train_step(loss_fn, tx, ema_decay=ema, schedule=schedule),
    PhraseBatches(run, model, variables),
    frozen={"params": frozen},
    total_steps=run.steps,
    directory=directory,
    mesh=parallel.make_mesh(),
    log_every=100,
    fingerprint={"run": dataclasses.asdict(run)},
    unit="phrases",
  )  # fmt: skip
  learned = jax.tree.map(np.asarray, freezing.merge(state.averaged(), frozen))
  return ported, {**variables, "params": {**variables["params"], **learned}}


def train_detector(
  run: TeacherRun,
  model: Sam3LiteText,
  params: Any,
  directory: str,
  mask_side: int,
  *,
  batch_stats: Any = None,
  extra: Callable | None = None,
  **data_options: Any,
) -> Any:
  """Parameters after the run, those of the heads among them."""
  batch_stats = batch_stats or {}
  tokenizer = models.tokenizer(run.rules)
  data = ShapesBatches(
    tokenizer,
    images=run.images,
    questions=run.questions,
    mask_side=mask_side,
    scene=run.scene,
    mix=run.mix,
    seed=run.seed,
    **data_options,
  )
  params, frozen = freezing.split(params, freeze=run.freeze)
  loss_fn = make_detection_loss_fn(
    model.clone(one_to_many=True),
    run.loss,
    merge=freezing.merge,
    deterministic=True,
    extra=extra,
  )
  tx, schedule = make_optimizer(run.optimizer, params)
  step = make_train_step(loss_fn, tx, ema_decay=run.optimizer.ema_decay, schedule=schedule)
  state = TrainState.create(params, tx, jax.random.key(run.seed), batch_stats=batch_stats, ema=True)

  def evaluate(state: TrainState):
    scenes = evaluation.held_out_scenes(VALIDATION_SCENES, VALIDATION_SEED)
    variables = as_variables(freezing.merge(state.averaged(), frozen)) | {"batch_stats": batch_stats}
    found = evaluation.evaluate(model, variables, tokenizer, scenes)
    return {k: v for k, v in found.items() if not k.startswith("questions")}

  state = fit(
    state, step, data, frozen=frozen,
    total_steps=run.steps,
    directory=directory,
    mesh=parallel.make_mesh(),
    log_every=50,
    evaluate=evaluate,
    evaluate_every=1000,
    checkpoint_every=500,
    best=("eval_cgF1", "max"),
    fingerprint={"run": dataclasses.asdict(run)},
  )  # fmt: skip
  return jax.tree.map(np.asarray, freezing.merge(state.averaged(), frozen))


def as_variables(params: Any) -> dict[str, Any]:
  """The model's variables, without the heads that only training reads."""
  return {"params": {name: part for name, part in params.items() if name not in (HEADS, DENSE_HEADS)}}


def distil_student(run: StudentRun, teacher: tuple[Sam3LiteText, Any], directory: str) -> DistillationResult:
  """Stage 4: the teacher's detector under a student text encoder that gives the same features."""
  os.makedirs(directory, exist_ok=True)
  phrases = os.path.join(directory, "phrases.txt")
  with open(phrases, "w", encoding="utf-8") as f:
    f.write("\n".join([*all_phrases(), BOX_ONLY_PHRASE]) + "\n")
  config = DistillationConfig(
    prompts=(phrases,),
    out=os.path.join(directory, "run"),
    teacher="shapes teacher",
    student=models.student_config().text,
    profile=models.tokenizer().profile,
    context_length=models.CONTEXT,
    features=os.path.join(directory, "teacher_features"),
    **dataclasses.asdict(run),
  )
  return distill(config, teacher=teacher, tokenizer=models.tokenizer())


def report(
  name: str, model: Sam3LiteText, variables: Any, directory: str, count: int = HELD_OUT_SCENES, skip: int = 0,
  rules: str = "original",
) -> dict[str, Any]:  # fmt: skip
  """Answers on `count` held-out scenes after the first `skip`, printed and written to `{name}.json`."""
  scenes = evaluation.held_out_scenes(count, HELD_OUT_SEED + skip)
  found = evaluation.evaluate(model, variables, models.tokenizer(rules), scenes)
  with open(os.path.join(directory, f"{name}.json"), "w", encoding="utf-8") as f:
    json.dump(found, f, indent=2)
    f.write("\n")
  print(f"{name} on {count} held-out scenes: {json.dumps(found)}", flush=True)
  return found


def ship(model: Sam3LiteText, variables: Any, directory: str) -> None:
  """The student in float16, as `from_pretrained("shapes")` reads it."""
  half = jax.tree.map(lambda x: np.asarray(x, np.float16), variables["params"])
  stats = jax.tree.map(np.asarray, variables.get("batch_stats", {}))
  save_pretrained(
    directory,
    model,
    {"params": half, **({"batch_stats": stats} if stats else {})},
    format="transformers",
    tokenizer=models.tokenizer(PortRun.rules),
    overwrite=True,
  )
  size = sum(os.path.getsize(os.path.join(directory, f)) for f in os.listdir(directory))
  print(f"wrote {directory} ({size / 1e6:.1f} MB)")


@dataclasses.dataclass(frozen=True)
class Runs:
  """All stages; `held_out`, `fresh`: scenes that models are measured on."""

  vision: VisionRun = VisionRun()
  teacher: TeacherRun = TeacherRun()
  refinement: RefinementRun = RefinementRun()
  outlines: OutlineRun = OutlineRun()
  student: StudentRun = StudentRun()
  finish: FinishRun = FinishRun()
  phrases: PhrasesRun = PhrasesRun()
  port: PortRun = PortRun()
  held_out: int = HELD_OUT_SCENES
  fresh: int = FRESH_SCENES


def train(runs: Runs, out: str, stop_after: str = STAGES[-1]) -> None:
  """Every stage up to `stop_after`, each in a folder of `out` named after it."""
  os.makedirs(out, exist_ok=True)
  folder = {stage: os.path.join(out, stage) for stage in STAGES}
  vision, dense_heads = pretrain_vision(runs.vision, folder["vision"])
  if stop_after == "vision":
    return
  params = train_teacher(runs.teacher, vision, folder["teacher"])
  if stop_after == "teacher":
    return
  params = refine_teacher(runs.refinement, {**params, DENSE_HEADS: dense_heads}, folder["refinement"])
  if stop_after == "refinement":
    return
  params = refine_teacher(runs.outlines, params, folder["outlines"])
  teacher, variables = Sam3LiteText(models.teacher_config()), as_variables(params)
  before = report("teacher", teacher, variables, out, runs.held_out)
  if stop_after == "outlines":
    return
  result = distil_student(runs.student, (teacher, variables), folder["student"])
  after = report("student", result.model, result.variables, out, runs.held_out)
  sizes = {"teacher": result.teacher_parameters, "student": result.student_parameters}
  with open(os.path.join(out, "sizes.json"), "w", encoding="utf-8") as f:
    json.dump(sizes, f)
  share = result.student_parameters / result.teacher_parameters
  print(f"text parameters: {result.student_parameters} of {result.teacher_parameters} ({share:.1%})")
  kept = after["cgF1"] / max(before["cgF1"], 1e-9)
  print(f"cgF1: {after['cgF1']:.2f} of {before['cgF1']:.2f} ({kept:.1%} kept)")
  if stop_after == "student":
    return
  variables = finish_student(runs.finish, result.model, result.variables, folder["finish"])
  report("finish", result.model, variables, out, runs.held_out)
  if stop_after == "finish":
    return
  model, variables = port_phrases(runs.phrases, result.model, variables, folder["phrases"])
  if stop_after == "phrases":
    return
  variables = finish_student(runs.port, model, variables, folder["port"])
  report("port", model, variables, out, runs.held_out, rules=runs.port.rules)
  # The 500 have been looked at while the stages were made; nobody has chosen anything by these.
  report("fresh", model, variables, out, runs.fresh, skip=FRESH_FIRST, rules=runs.port.rules)
  ship(model, variables, os.path.join(out, "model"))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", default="runs/shapes", help="folder for checkpoints, logs and the model")
  parser.add_argument("--stop-after", choices=STAGES, default=STAGES[-1])
  args = parser.parse_args()
  train(Runs(), args.out, args.stop_after)


if __name__ == "__main__":
  main()
