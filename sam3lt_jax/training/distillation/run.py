"""distill: from a teacher, a student's sizes and files of phrases to a model that can be shipped."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from sam3lt_jax import parallel, storage
from sam3lt_jax.checkpoints.orbax_io import barrier
from sam3lt_jax.config import Profile, TextConfig
from sam3lt_jax.data.prompts import read_prompts
from sam3lt_jax.errors import ArgumentError, renamed
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.processing.processor import Sam3Processor
from sam3lt_jax.processing.tokenizer import ClipTokenizer
from sam3lt_jax.training import freezing, rules
from sam3lt_jax.training.distillation import features as feature_files
from sam3lt_jax.training.distillation import text_part
from sam3lt_jax.training.distillation.config import DistillationConfig
from sam3lt_jax.training.distillation.evaluate import (
  Agreement,
  agreement,
  make_feature_evaluator,
  mean_feature_cosine,
)
from sam3lt_jax.training.distillation.step import make_distillation_loss_fn, split_student
from sam3lt_jax.training.distillation.student import InitReport, make_student
from sam3lt_jax.training.distillation.teacher import Teacher, load_model
from sam3lt_jax.training.loop import fit
from sam3lt_jax.training.optimizer import make_optimizer
from sam3lt_jax.training.outcome import write_outcome
from sam3lt_jax.training.prompts import prompt_batches, split_prompts, token_rows
from sam3lt_jax.training.run_files import check_unchanged, working_in
from sam3lt_jax.training.state import TrainState
from sam3lt_jax.training.step import make_train_step

EVALUATED_AT_MOST = 4096  # held-out phrases
ASKED = 8  # held-out phrases asked of every picture at the end

Report = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class DistillationResult:
  """What `distill` gives.

  Attributes:
    model, variables: the teacher's model with the student's text encoder.
    init: where the student's weights came from.
    before, after: of held-out phrases, see `make_feature_evaluator`; None without any. `before` has
      "mean_feature_cosine" as well, see `evaluate.mean_feature_cosine`.
    agreement: with the teacher on pictures; None without any.
    teacher_parameters, student_parameters: of the text encoders.
    written: name -> path of what was written.
  """

  model: Sam3LiteText
  variables: Variables
  init: InitReport
  before: dict[str, float] | None
  after: dict[str, float] | None
  agreement: Agreement | None
  teacher_parameters: int
  student_parameters: int
  written: dict[str, str]


def distill(
  config: DistillationConfig,
  *,
  teacher: tuple[Sam3LiteText, Variables] | None = None,
  tokenizer: ClipTokenizer | None = None,
  images: Sequence[Any] = (),
  phrases: Sequence[str] | None = None,
  mesh: jax.sharding.Mesh | None = None,
  report: Report | None = None,
) -> DistillationResult:
  """Distils the teacher's text encoder and puts the student in its place.

  A run that was stopped goes on where it was, and gives the same numbers; one that had ended only evaluates
  and writes the models again. Under several processes every one calls this with the same arguments.

  Args:
    config: the run.
    teacher: (model, variables) instead of loading `config.teacher`, which then only is its name.
    tokenizer: for teacher and student, of a vocabulary of their own; its profile decides how it cleans. None:
      the one saved beside the teacher, else CLIP's.
    images: pictures (paths, PIL, arrays) to compare the two models on at the end.
    phrases: what is asked of every picture; None: eight held-out phrases.
    mesh: of `parallel.make_mesh`; None: all devices.
    report: called with each line for the reader; None: print.

  Returns:
    The result. Under `config.out` lie metrics.jsonl, config.json, checkpoints/, distillation.json, curves.png
    (with matplotlib), model/ (our format) and transformers/ (transformers' layout).

  Raises:
    ValueError: anything in `config` that cannot be: an unknown teacher or student, widths, vocabularies or
      contexts that do not fit, no phrases, a changed run in `out`, another process works there, or nothing
      can be written there. Errors of `fit`, `read_prompts`, `from_pretrained`, `save_pretrained` come as they
      are.
    NonFiniteLoss: names the phrases of the batch (in its message, the first 16).
  """
  report = report or functools.partial(print, flush=True)
  storage.check_directory(config.out, "out")
  with working_in(config.out):
    run = _Run(config, teacher, tokenizer, mesh, report)
    variables = run.student_variables(run.train())
    after = run.evaluate(variables) if run.held else None
    model, spliced = text_part.splice(run.student, variables, *run.whole)
    found = None
    if len(images):
      asked = list(phrases) if phrases else (run.held or run.phrases)[:ASKED]
      on_device = jax.device_put((spliced, run.whole[1]), jax.local_devices()[0])
      found = agreement(
        (model, on_device[0]), (run.whole[0], on_device[1]), images, asked, tokenizer=tokenizer
      )
    sizes = [optax.tree.size(x["params"]) for x in (run.teacher.variables, variables)]
    numbers = {
      "before": run.before,
      "after": after,
      "agreement": None if found is None else dataclasses.asdict(found),
      "teacher_text_parameters": sizes[0],
      "student_text_parameters": sizes[1],
      "init": str(run.init),
    }
    written = write_outcome(
      config.out, model, spliced, numbers,
      name="distillation", title="distillation", tokenizer=tokenizer, report=report,
    )  # fmt: skip
    return DistillationResult(model, spliced, run.init, run.before, after, found, *sizes, written)


class _Run:
  """A run that is ready to start: all of it read, loaded and checked, cheapest first."""

  def __init__(self, config: DistillationConfig, teacher, tokenizer, mesh, report: Report):
    self.config = c = config
    self.report = report
    if c.features is not None:
      storage.check_directory(c.features, "features")
      feature_files.check_target(c.features)
    profile = Profile.named(c.profile)
    prompts = read_prompts(c.prompts, profile)
    self.phrases, self.held = _split(c, prompts.phrases, profile)
    report(
      f"{len(prompts.phrases):,} phrases, {len(self.held):,} of them held out;"
      f" {prompts.duplicates:,} duplicates"
    )
    self.mesh = parallel.make_mesh() if mesh is None else mesh
    parallel.check_divides(c.batch_size, self.mesh.shape["data"])
    self.total = c.total_steps(len(self.phrases))
    self.facts = c.fingerprint() | {
      "total_steps": self.total,
      "phrases": len(self.phrases),
      "phrases_sha256": feature_files.phrases_digest(self.phrases),
    }
    check_unchanged(c.out, self.facts, partly=True)
    self.whole = teacher
    if teacher is None:
      with renamed("source", "teacher"):
        self.whole = load_model(c.teacher, dtype=c.teacher_dtype, device=parallel.host_device())
    self.teacher = Teacher.of(*self.whole, context_length=c.context_length, name=c.teacher)
    if tokenizer is None:
      profile = rules.fitting(profile, self.whole[0].config)
    else:  # a vocabulary of its own has its own padding
      own = {name: getattr(tokenizer.profile, name) for name in ("pad_token_id", "text_cleaning")}
      profile = dataclasses.replace(profile, **own)
    self.student, self.start, self.init = make_student(
      c.student, c.init, teacher=self.whole[0].config, profile=profile, context_length=c.context_length,
      seed=c.seed,
    )  # fmt: skip
    report(f"student: {self.init}; profile {self.student.config.profile.name}, {c.context_length} tokens")
    self.facts |= {
      "teacher_identity": self.teacher.identity(),
      "student_text": dataclasses.asdict(self.student.config.text),
    }
    # `fit` does, too, but after the features are exported and the start is evaluated.
    check_unchanged(c.out, self.facts)
    words = tokenizer or Sam3Processor(self.student.config).tokenizer
    self.batches = prompt_batches(
      self.phrases, words, c.batch_size, c.context_length, c.seed, word_shuffle=c.loss.consistency > 0,
      process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    everything = [*self.phrases, *self.held]
    _check_vocabulary(words, everything, self.student, c.context_length)
    if c.features is not None:
      stored = _stored_features(c, self.teacher, everything, words, report)
      self.batches = self.batches.map(lambda batch: batch | {"teacher_features": stored[batch["id"]]})
    self.before = None
    if self.held:
      self.evaluate, mean = _evaluator(self.student, self.teacher, self.held, words)
      self.before = self.evaluate(jax.tree.map(np.asarray, self.start)) | {"mean_feature_cosine": mean}
      report(
        f"before training: cosine with the teacher on held-out phrases {self.before['heldout_cosine']:.4f}"
        f" (of the mean feature, whatever the phrase: {mean:.4f})"
      )
    self.params, self.frozen, self.stats = split_student(self.start)

  def train(self) -> TrainState:
    """The state after the last step, or, where phrases are held out, the best evaluated."""
    c, total = self.config, self.total
    tx, schedule = make_optimizer(c.optimizer(total), self.params)
    on_the_fly = c.features is None
    loss_fn = make_distillation_loss_fn(
      self.student,
      self.teacher if on_the_fly else None,
      c.loss,
      update_batch_stats=c.update_batch_stats,
      dropout=c.dropout,
      dtype=c.dtype,
    )
    frozen = {"params": self.frozen}
    if on_the_fly:
      frozen["teacher"] = self.teacher.variables
      if c.shard_teacher:
        host = jax.tree.map(np.asarray, frozen["teacher"])
        frozen["teacher"] = jax.device_put(host, parallel.fsdp_sharding(self.mesh, host))
    ema = c.ema_decay is not None
    return fit(
      TrainState.create(self.params, tx, jax.random.key(c.seed), batch_stats=self.stats, ema=ema),
      make_train_step(loss_fn, tx, ema_decay=c.ema_decay, schedule=schedule),
      self.batches,
      total_steps=total,
      directory=c.out,
      frozen=frozen,
      mesh=self.mesh,
      log_every=c.log_every or max(1, total // 50),
      evaluate=(lambda state: self.evaluate(self.student_variables(state))) if self.held else None,
      evaluate_every=c.evaluate_every or max(10, total // 20),
      checkpoint_every=c.checkpoint_every or max(10, total // 10),
      best=("eval_heldout_cosine", "max") if self.held else None,
      take_best=bool(self.held),
      fingerprint=self.facts,
      report=self.report,
      unit="phrases",
      record_name=self.phrases.__getitem__,
    )

  def student_variables(self, state: TrainState) -> Variables:
    """The whole text part on the host: what it was trained to (its average, if one is kept)."""
    params, stats = jax.tree.map(np.asarray, (state.averaged(), state.batch_stats))
    variables = {"params": freezing.merge(params, jax.tree.map(np.asarray, self.frozen))}
    return variables | ({"batch_stats": stats} if stats else {})


def _split(config: DistillationConfig, phrases: list[str], profile: Profile) -> tuple[list[str], list[str]]:
  train, held = split_prompts(phrases, config.held_out, config.seed, profile)
  said = f"={config.held_out}: none of the {len(phrases)} phrases is"
  if config.held_out and not held:
    raise ArgumentError("held_out", f"{said} held out; give more, or 0 for none")
  if not train:
    raise ArgumentError("held_out", f"{said} left to train")
  return train, held[:EVALUATED_AT_MOST]


def _check_vocabulary(tokenizer: Any, phrases: Sequence[str], student: Sam3LiteText, length: int) -> None:
  words = student.config.text.vocab_size
  if words == TextConfig().vocab_size:
    phrases = phrases[:256]  # one token of theirs beyond it is another tokenizer's
  ids, _ = token_rows(list(phrases), tokenizer, length)
  beyond = [phrase for phrase, row in zip(phrases, ids) if row.max() >= words]
  if beyond:
    shown = ", ".join(map(repr, beyond[:3])) + (", ..." if len(beyond) > 3 else "")
    raise ArgumentError(
      "prompts",
      f": {len(beyond)} of them have words that are not among the teacher's {words} tokens: {shown}; "
      "leave them out, or pass the tokenizer that belongs to the teacher",
    )


def _stored_features(config, teacher: Teacher, phrases, tokenizer, report: Report):
  """The exported features, made by the first process where they are not there yet."""
  if jax.process_index() == 0:
    # Beside the folder: it must be empty, or hold features, to be written into.
    with storage.exclusive(os.path.abspath(os.path.expanduser(config.features)) + ".lock", wait=1):
      feature_files.export_features(config.features, teacher, phrases, tokenizer, report=report)
  barrier("sam3lt-teacher-features")
  return feature_files.TeacherFeatures(config.features)


def _evaluator(student: Sam3LiteText, teacher: Teacher, held: Sequence[str], tokenizer: Any):
  """(variables -> metrics on the held-out phrases, what the mean feature scores there).

  The teacher reads them once, here.
  """
  encode = feature_files.encoder(teacher, tokenizer, 64)
  batches = []
  for start in range(0, len(held), 256):
    ids, mask = token_rows(list(held[start : start + 256]), tokenizer, teacher.context_length)
    wanted = encode(held[start : start + 256])
    batches.append({"input_ids": ids, "attention_mask": mask, "teacher_features": wanted})
  return make_feature_evaluator(student, batches), mean_feature_cosine(batches)
