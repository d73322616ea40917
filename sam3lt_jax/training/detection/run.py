"""finetune: a checkpoint and annotated images in, a better checkpoint out."""

from __future__ import annotations

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from sam3lt_jax import parallel, storage
from sam3lt_jax.checkpoints.engine import flatten
from sam3lt_jax.config import Profile, TextConfig
from sam3lt_jax.data.batches import DetectionBatches
from sam3lt_jax.data.records import Record
from sam3lt_jax.errors import ArgumentError, check
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.predictor import Predictor
from sam3lt_jax.processing.processor import Sam3Processor
from sam3lt_jax.training import rules
from sam3lt_jax.training.detection.setup import FinetuneConfig, batch_config, exported, prepare
from sam3lt_jax.training.loop import fit
from sam3lt_jax.training.outcome import write_outcome
from sam3lt_jax.training.run_files import check_unchanged, working_in
from sam3lt_jax.training.state import TrainState

# What of an evaluation goes to metrics.jsonl; all of it is in finetune.json.
_SHOWN = ("cgF1", "pmF1", "IL_MCC", "mean_matched_iou")

Report = Callable[[str], Any]


class Choice(NamedTuple):
  """By which measure on the validation records the best state is chosen ("cgF1", "pmF1"; None: the last state
  is taken), and why; of equals, the latest."""

  measure: str | None
  why: str


def choose(scores: Mapping[str, float] | None) -> Choice:
  """cgF1 where it is defined: it needs phrases that are absent as well as phrases that are present.

  Args:
    scores: `CgF1.compute()` of the validation records, of any model; None: there are none.
  """
  if scores is None:
    return Choice(None, "there are no validation images")
  if not scores["positive_pairs"]:
    return Choice(None, "no phrase that is asked of the validation images is present in them")
  if not scores["negative_pairs"]:
    return Choice("pmF1", "every phrase that is asked of the validation images is present, where cgF1 is 0")
  return Choice("cgF1", "the validation images are asked for phrases that are present and absent")


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
  """What `finetune` gives.

  Attributes:
    model, variables: the fine-tuned model with its parameters as numpy arrays, adapters merged. What was
      frozen is bit for bit what it was.
    before, after: `CgF1.compute()` of held-out records before the run and of what is returned; None without
      any.
    choice: which of its states is returned.
    trained_parameters: how many numbers were trained.
    written: name -> path.
  """

  model: Sam3LiteText
  variables: Variables
  before: dict[str, float] | None
  after: dict[str, float] | None
  choice: Choice
  trained_parameters: int
  written: dict[str, str]


def finetune(
  source: str | os.PathLike | tuple[Sam3LiteText, Variables],
  records: Sequence[Record],
  directory: str | os.PathLike,
  config: FinetuneConfig | None = None,
  *,
  validation: Sequence[Record] | None = None,
  iou_type: str = "segm",
  profile: str | Profile | None = "transformers",
  processor: Sam3Processor | None = None,
  mesh: jax.sharding.Mesh | None = None,
  log_every: int | None = None,
  evaluate_every: int | None = None,
  checkpoint_every: int | None = None,
  fingerprint: Mapping[str, Any] | None = None,
  report: Report | None = None,
) -> FinetuneResult:
  """Fine-tunes the detector and writes it in both formats.

  A run that was stopped goes on where it was and gives the same numbers, to the digit; one that had ended
  only evaluates and writes the models again. Under several processes every one calls this with the same
  arguments.

  Args:
    source: what `from_pretrained` takes, or (model, variables), unfused.
    records: what to train on, see `sam3lt_jax.data`.
    directory: of the run.
    config: its numbers; None: the defaults.
    validation: records held out; then cgF1 on them is measured and the best state is the result (see
      `Choice`), otherwise the last.
    iou_type: what cgF1 compares: "segm" masks, "bbox" boxes (for annotations without masks).
    profile: the rules that the model is trained under and will have, see `from_pretrained`: by default those
      of transformers, where `transformers/` then finds what the model finds here. None: the source's own; as
      for (model, variables), which have theirs.
    processor: for (model, variables) with a tokenizer of its own.
    mesh: of `parallel.make_mesh`; None: all devices.
    log_every, evaluate_every, checkpoint_every: in steps; None: a 50th, a tenth, a tenth of the run.
    fingerprint: further facts (of the data, say) that must not change when the run goes on.
    report: called with each line for the reader; None: print.

  Returns:
    The result. In `directory` lie metrics.jsonl, config.json, checkpoints/, finetune.json, curves.png (with
    matplotlib), model/ (our format) and transformers/ (transformers' layout).

  Raises:
    ValueError: patterns that find nothing, numbers out of range, a batch that the devices do not divide, a
      changed run in `directory`, another process works there, or nothing can be written there. Errors of
      `fit`, `from_pretrained`, `save_pretrained` come as they are.
  """
  config = config or FinetuneConfig()
  report = report or functools.partial(print, flush=True)
  mesh = parallel.make_mesh() if mesh is None else mesh
  parallel.check_divides(config.data.batch_size, mesh.shape["data"])
  storage.check_directory(directory, "directory")
  with working_in(directory):
    facts = {
      "finetune": config.fingerprint(),
      "records": len(records),
      "validation": 0 if validation is None else len(validation),
      **(fingerprint or {}),
    }
    check_unchanged(directory, facts, partly=True)  # before a model is loaded: that can take minutes
    predictor = _load(source, config, profile, processor)
    run = _Run(config, predictor, validation, iou_type)
    report(
      f"{run.trained:,} of {optax.tree.size(run.start['params']):,} parameters are trained"
      f"{f', adapters of rank {config.lora.rank} among them' if config.lora else ''}; {len(records):,} images"
    )
    report(f"profile {predictor.model.config.profile.name}: the rules that it is trained under and will have")
    data = DetectionBatches(
      records,
      predictor.model.config,
      batch_config(config, predictor.processor.image_size),
      processor=predictor.processor,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    facts |= run.fingerprint()
    check_unchanged(directory, facts)  # `fit` does, too, but after the evaluation
    before = run.evaluate(run.start)
    choice = choose(before)
    which = f"state of the best {choice.measure} (of equals, the latest)" if choice.measure else "last state"
    report(f"the {which} will be kept: {choice.why}")
    state = fit(
      run.first_state(),
      run.setup.step,
      data,
      total_steps=config.steps,
      directory=directory,
      frozen=run.setup.frozen,
      mesh=mesh,
      evaluate=None if validation is None else run.evaluate_state,
      best=(f"eval_{choice.measure}", "max") if choice.measure else None,
      take_best=True,
      fingerprint=facts,
      report=report,
      log_every=log_every or max(1, config.steps // 50),
      evaluate_every=evaluate_every or max(1, config.steps // 10),
      checkpoint_every=checkpoint_every or max(1, config.steps // 10),
    )
    return run.finish(state, before, choice, directory, report)


def hold_out(
  records: Sequence[Record], share: float, seed: int = 0
) -> tuple[Sequence[Record], Sequence[Record]]:
  """Splits records at random, the same way for the same `seed`: (to train on, held out), each in order.

  Raises:
    ValueError: a share outside (0, 1), a seed below 0, or one of the two parts would be empty.
  """
  check(seed >= 0, "seed", seed, "0 or more")
  check(0 < share < 1, "share", share, "a number between 0 and 1")
  count = round(len(records) * share)
  if not 0 < count < len(records):
    raise ArgumentError("share", f"={share} of {len(records)} records leaves one of the two parts empty")
  order = np.random.default_rng(seed).permutation(len(records))
  return _Part(records, np.sort(order[count:])), _Part(records, np.sort(order[:count]))


class _Part(Sequence):
  """Some records of a sequence; each is made when it is asked for."""

  def __init__(self, records: Sequence[Record], indices: np.ndarray):
    self._records, self._indices = records, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Record:
    return self._records[int(self._indices[index])]


def _load(source: Any, config: FinetuneConfig, profile: Any, processor: Sam3Processor | None) -> Predictor:
  """Model, variables and processor, as a predictor."""
  if not isinstance(source, tuple):
    if processor is not None:
      raise ValueError("processor is for (model, variables); a checkpoint brings its own")
    profile = profile and rules.fitting(profile, rules.saved_config(source))
    predictor = Predictor.from_pretrained(
      source, profile=profile, dtype=config.dtype, param_dtype="float32",
      image_size=config.image_size, fuse=False, compile_ahead=False,
    )  # fmt: skip
    predictor.processor.vocabulary = None  # it is to learn other words
    return predictor
  model, variables = source
  processor = processor or Sam3Processor(model.config, image_size=config.image_size)
  if config.image_size not in (None, processor.image_size):
    raise ArgumentError("image_size", f"={config.image_size}, but the processor's is {processor.image_size}")
  return Predictor(model.clone(dtype=config.dtype), variables, processor, fuse=False)


class _Run:
  """A run that is ready to start, and what evaluates its states."""

  def __init__(self, config: FinetuneConfig, predictor: Predictor, validation, iou_type: str):
    self.config, self.validation, self.iou_type = config, validation, iou_type
    model = predictor.model
    # On the host: the devices get what the step takes, and the whole only for an evaluation.
    self.start: Variables = jax.tree.map(np.asarray, predictor.variables)
    with jax.default_device(parallel.host_device()):
      self.setup = prepare(model, self.start, config)
    vision = dataclasses.replace(model.config.vision, image_size=predictor.processor.image_size)
    self.model = model.clone(config=model.config.replace(vision=vision), dtype=config.dtype)
    self.trained = optax.tree.size(self.setup.params)
    self._predictor, self._shapes = predictor, jax.eval_shape(lambda: self.start)
    predictor.use_variables(self._shapes)  # its weights give the devices' memory back

  def first_state(self) -> TrainState:
    with jax.default_device(parallel.host_device()):  # `fit` puts a copy on the devices
      return self.setup.state()

  def variables(self, state: TrainState) -> Variables:
    """The whole model at `state` (its average, if one is kept), on the host."""
    params = exported(state.averaged(), self.start["params"], self.config.lora)
    return {**self.start, "params": params}

  def evaluate_state(self, state: TrainState) -> dict[str, float]:
    scores = self.evaluate(self.variables(state))
    return {name: scores[name] for name in _SHOWN}

  def evaluate(self, variables: Variables) -> dict[str, float] | None:
    """cgF1 and its parts on the validation records; None without any."""
    if self.validation is None:
      return None
    from sam3lt_jax.evaluation.run import evaluate

    predictor = self._predictor
    predictor.use_variables(jax.device_put(variables, jax.local_devices()[0]))
    try:
      found = evaluate(predictor, self.validation, iou_types=(self.iou_type,))
    finally:
      predictor.use_variables(self._shapes)
    return found["cgf1"][self.iou_type]

  def fingerprint(self) -> dict[str, Any]:
    """What the loaded model adds to it."""
    digest = 0
    for path, leaf in sorted(flatten(self.start).items()):
      digest = zlib.crc32(
        np.ascontiguousarray(leaf).view(np.uint8).reshape(-1), zlib.crc32(path.encode(), digest)
      )
    return {"model": self.model.config.to_json(), "start_crc32": digest}

  def finish(self, state: TrainState, before, choice: Choice, directory, report: Report) -> FinetuneResult:
    """Measures and writes the model of `state`."""
    variables = self.variables(state)
    after = self.evaluate(variables)
    if before is not None:
      name = choice.measure or "cgF1"
      then, now = (f"{x[name]:.2f}" if name == "cgF1" else f"{x[name]:.4f}" for x in (before, after))
      report(f"{name} on held-out images: {then} before, {now} after {int(state.step)} steps")
    numbers = {
      "step": int(state.step),
      "chosen_by": choice._asdict(),
      "before": before,
      "after": after,
      "trained_parameters": self.trained,
    }
    own = self.model.config.text.vocab_size != TextConfig().vocab_size
    written = write_outcome(
      directory, self.model, variables, numbers, name="finetune", title="fine-tuning",
      tokenizer=self._predictor.processor.tokenizer if own else None, report=report,
    )  # fmt: skip
    return FinetuneResult(self.model, variables, before, after, choice, self.trained, written)
