"""`sam3lt distill`: a teacher and files of phrases in; a model with a small text encoder out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import textwrap

from sam3lt_jax.cli import UserError
from sam3lt_jax.cli.arguments import (
  RANDOM,
  add_decays,
  add_device,
  add_hosts,
  add_out,
  filled,
  join_hosts,
  note,
)
from sam3lt_jax.cli.kinds import below_one, count, positive, whole

_EPILOG = """\
examples:
  SAM 3's text encoder into the S0 student, to be run by transformers, too (by the rules that the authors
  trained theirs under: --profile original):
    sam3lt distill --teacher sam3 --student s0 --prompts noun_phrases.json --out run
  start from MobileCLIP's published weights; compute the teacher's features once:
    sam3lt distill --teacher sam3 --student s0 --init mobileclip_s0.pt \\
      --prompts noun_phrases.json lvis_v1_train.json --export-features features --out run
  compare teacher and student on a photo at the end:
    sam3lt distill --prompts phrases.txt --out run --eval-image street.jpg --eval-phrase "yellow bus"
  the first of two machines that see one folder (the other: JAX_PROCESS_ID=1); --batch is of all devices:
    JAX_COORDINATOR_ADDRESS=first:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 \\
      sam3lt distill --prompts phrases.json --batch 512 --hosts --out shared/run
  a run with nothing downloaded: the bundled model's text encoder into one of your own size
    sam3lt demo --data drawn
    echo '{"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}' \\
      > small.json
    sam3lt distill --teacher shapes --student small.json --prompts drawn/phrases.txt --steps 600 --out run
the same command again goes on with a run that was stopped

what --student FILE.json may hold: the numbers of a text encoder (MobileCLIP-S1's where it says nothing)
{fields}

written to the output folder:
  metrics.jsonl, config.json   losses, rates and held-out cosine by step; the run's settings
  curves.png                   the plot of them (needs matplotlib, which the extra [train] brings)
  checkpoints/                 the newest two, and the best on the held-out phrases
  distillation.json            held-out cosine before and after, agreement with the teacher on photos
  model/                       the teacher with the student's text encoder, for `sam3lt segment --model`
  transformers/                the same in transformers' layout
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.epilog = _EPILOG.replace("{fields}", _fields_in_lines())
  add = parser.add_argument
  add("--prompts", nargs="+", required=True, metavar="FILE",
      help="phrases: text, JSON or JSON lines, told by content; folders, too")  # fmt: skip
  add_out(parser, None, help="the run's folder; a run in it goes on")
  add("--teacher", default="sam3", metavar="sam3|shapes|ID|DIR|FILE",
      help="whose text encoder is learnt from and whose detector is kept; shapes comes with the package",
  ).fills = ("source",)  # fmt: skip
  add("--student", default="s0", metavar="s0|s1|l|FILE.json",
      help="text encoder to train: a released size, or its numbers in a file, see below",
  )  # fmt: skip
  add("--init", default="random", metavar="random|ID|DIR|FILE",
      help="where it starts: random, MobileCLIP's weights or a LiteText checkpoint",
  )  # fmt: skip
  add("--profile", choices=("transformers", "original"), default="transformers",
      help="the rules that the student reads phrases by: those that transformers will run it by, or the"
      " authors', which transformers does not follow",
  )  # fmt: skip
  add("--context", dest="context_length", type=count, metavar="T",
      help="tokens a phrase (default: the profile's, 32 for transformers and 16 for original, or the"
      " teacher's position table where that is shorter)",
  )  # fmt: skip
  add("--export-features", dest="features", metavar="DIR",
      help="compute the teacher's features once into DIR and read them there (default: in every step)",
  )  # fmt: skip
  add("--shard-teacher", action="store_true",
      help="split the teacher's weights over the devices, where a copy on each is too much")  # fmt: skip
  length = parser.add_mutually_exclusive_group()
  length.add_argument("--epochs", type=positive, metavar="N",
      help="(default: 100 for s0 and sizes of your own, 80 for s1, 60 for l)")  # fmt: skip
  length.add_argument("--steps", type=count, metavar="N", help="batches to train on, instead of epochs")
  add("--batch", dest="batch_size", type=count, metavar="N", help="phrases a step (default: 64, 32 for l)")
  add("--accumulate", type=count, metavar="N", help="steps that make one update (default: 2, 4 for l)")
  add("--lr", dest="peak_lr", type=positive, metavar="RATE",
      help="peak rate for 512 phrases an update; it is scaled to batch x accumulate (default: 0.005 for s0"
      " and sizes of your own, 0.003 for s1, 0.001 for l)",
  )  # fmt: skip
  add("--lr-as-given", dest="lr_rows", action="store_const", const=None, default=512,
      help="take --lr as it stands, whatever the batch")  # fmt: skip
  add_decays(parser, "a layer", "1", 0.05)
  add("--dropout", type=below_one, default=0.0, metavar="F", help="in the student")
  add("--freeze-batch-stats", dest="update_batch_stats", action="store_false",
      help="leave BatchNorm's statistics as they start")  # fmt: skip
  add("--held-out", type=below_one, default=0.02, metavar="SHARE",
      help="share of the phrases to evaluate on, never trained on")  # fmt: skip
  add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="the student computes in")
  add("--seed", type=whole, default=0, metavar="N", help="of all that is drawn")
  add("--eval-image", dest="images", action="append", default=[], metavar="PHOTO",
      help="compare student and teacher on it at the end; repeatable")  # fmt: skip
  add("--eval-phrase", dest="phrases", action="append", default=[], metavar="PHRASE",
      help="what to ask of the photos; repeatable (default: eight held-out phrases)")  # fmt: skip
  add_device(parser)
  add_hosts(parser)


def run(args: argparse.Namespace) -> int:
  from sam3lt_jax.training.distillation.config import DistillationConfig

  _check(args)
  numbers = _student_numbers(args.student) if args.student.endswith(".json") else None
  # Its checks come before anything is downloaded.
  config = DistillationConfig(**filled(DistillationConfig, args))
  leads = join_hosts(args)
  if args.teacher.startswith(RANDOM) and leads:
    note("RANDOM WEIGHTS: the teacher knows nothing, nor will the student")
  config = _fitted(config, args, numbers)

  from sam3lt_jax.training.distillation.run import distill

  result = distill(
    config,
    images=args.images,
    phrases=args.phrases or None,
    report=None if leads else lambda line: None,
  )
  if leads:
    _show(result)
  return 0


def _check(args: argparse.Namespace) -> None:
  for path in args.prompts:
    if not os.path.exists(path):
      raise UserError(f"--prompts: no such file: {path}")
  for photo in args.images:
    if not os.path.isfile(photo):
      raise UserError(f"--eval-image: no such photo: {photo}")
  if args.phrases and not args.images:
    raise UserError("--eval-phrase without --eval-image: there is nothing to ask it of")
  from sam3lt_jax.checkpoints.random_init import RANDOM_CONFIGS

  if not args.student.endswith(".json") and args.student not in RANDOM_CONFIGS:
    names = ", ".join(RANDOM_CONFIGS)
    raise UserError(f"--student must be one of {names}, or FILE.json, got {args.student!r}")
  if args.shard_teacher and args.features:
    raise UserError("--shard-teacher with --export-features: the steps then read files and run no teacher")


def _show(result) -> None:
  student, teacher = result.student_parameters, result.teacher_parameters
  print(f"text encoder: {student:,} parameters, the teacher's {teacher:,} ({fewer(student, teacher)})")
  if result.after is not None:
    cosine, error = (
      f"{result.before[name]:.4g} -> {result.after[name]:.4g}" for name in ("heldout_cosine", "heldout_mse")
    )
    mean = result.before["mean_feature_cosine"]
    print(
      f"held-out phrases: cosine {cosine} (the mean feature, whatever the phrase: {mean:.4g}), squared error"
      f" {error}"
    )
  if result.agreement is not None:
    print(f"against the teacher: {result.agreement}")
  print(f"wrote {', '.join(result.written.values())}")


def fewer(student: int, teacher: int) -> str:
  """How much smaller one number of parameters is: "88% fewer", "10% more", "as many"."""
  if student == teacher:
    return "as many"
  return f"{abs(student / teacher - 1):.0%} {'fewer' if student < teacher else 'more'}"


def _fitted(config, args: argparse.Namespace, numbers: dict | None):
  """The configuration with what the teacher decides where nothing was asked for: context and vocabulary."""
  from sam3lt_jax.config import TextConfig
  from sam3lt_jax.training.distillation.teacher import ALIASES
  from sam3lt_jax.training.rules import saved_config

  asked = args.context_length is not None
  if asked and numbers is None:
    return config
  teacher, context = saved_config(ALIASES.get(args.teacher.lower(), args.teacher)), config.context_length
  if not asked:
    # What `Teacher.of` cuts; a table that is resampled serves any length.
    if teacher and (teacher.text.kind == "clip" or teacher.profile.position_policy == "slice"):
      context = min(context, teacher.text.max_position_embeddings)
    context = min(context, (numbers or {}).get("max_position_embeddings", context))
  changes = {"context_length": context}
  if numbers is not None:
    words = TextConfig() if teacher is None else teacher.text
    own = {"vocab_size": words.vocab_size, "max_position_embeddings": context}
    changes["student"] = TextConfig(**own | numbers)
  return dataclasses.replace(config, **changes)


def _student_numbers(path: str) -> dict:
  """What a file of --student says, each a field of `TextConfig` and of its kind."""
  from sam3lt_jax.config import read_json, typed

  fields, numbers = _student_fields(), read_json(path)
  try:
    if not isinstance(numbers, dict):
      raise ValueError("it must hold an object")
    for name, value in numbers.items():
      if name not in fields:
        raise ValueError(f"no such field: {name}; accepted: {', '.join(fields)}")
      numbers[name] = value = typed(name, value, fields[name])
      if isinstance(value, str) and value not in ("mobileclip", "clip"):
        raise ValueError(f"{name} must be mobileclip or clip, got {value!r}")
      if not isinstance(value, (str, bool)) and value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
  except ValueError as e:
    raise UserError(f"--student: {path}: {e}") from None
  return numbers


def _student_fields() -> dict:
  """Field -> default, of the text encoders that can be trained."""
  from sam3lt_jax.config import TextConfig

  return {f.name: f.default for f in dataclasses.fields(TextConfig) if f.name != "fused"}


def _fields_in_lines() -> str:
  ours = {"vocab_size": "the teacher's", "max_position_embeddings": "--context"}
  shown = [f"{name} ({ours.get(name) or json.dumps(value)})" for name, value in _student_fields().items()]
  return "\n".join(textwrap.wrap(", ".join(shown), 105, initial_indent="  ", subsequent_indent="  "))
