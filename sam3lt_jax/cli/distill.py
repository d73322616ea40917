"""`sam3lt distill`: a teacher and files of phrases in; a model with a small text encoder out."""

from __future__ import annotations

import argparse
import os
import sys

from sam3lt_jax.cli import PROGRAM, UserError
from sam3lt_jax.cli.arguments import add_hosts, count, join_hosts, positive, say_nothing
from sam3lt_jax.cli.segment import RANDOM

_EPILOG = """\
examples:
  SAM 3's text encoder into the S0 student, as the authors trained it:
    sam3lt distill --teacher sam3 --student s0 --prompts noun_phrases.json --out run
  start from MobileCLIP's published weights; compute the teacher's features once:
    sam3lt distill --teacher sam3 --student s0 --init mobileclip_s0.pt \\
      --prompts noun_phrases.json lvis_v1_train.json --export-features features --out run
  compare teacher and student on a photo at the end:
    sam3lt distill --prompts phrases.txt --out run --eval-image street.jpg --eval-phrase "yellow bus"
  the first of two machines that see one folder (the other: JAX_PROCESS_ID=1); --batch is of all devices:
    JAX_COORDINATOR_ADDRESS=first:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 \\
      sam3lt distill --prompts phrases.json --batch 512 --hosts --out shared/run
  see a run of a minute with nothing downloaded (random weights: the result means nothing):
    sam3lt distill --teacher random:tiny --student tiny-s1 --prompts phrases.txt --steps 50 --out run
the same command again goes on with a run that was stopped

written to the output folder:
  metrics.jsonl, config.json   losses, rates and held-out cosine by step; the run's settings
  curves.png                   the plot of them (needs matplotlib: pip install 'sam3lt_jax[train]')
  checkpoints/                 the newest two, and the best on the held-out phrases
  distillation.json            held-out cosine before and after, agreement with the teacher on photos
  model/                       the teacher with the student's text encoder, for `sam3lt segment --model`
  transformers/                the same in transformers' layout
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.epilog = _EPILOG
  add = parser.add_argument
  add("--prompts", nargs="+", required=True, metavar="FILE",
      help="phrases: text, JSON or JSON lines, told by content; folders, too")  # fmt: skip
  add("--out", required=True, metavar="DIR", help="the run's folder; a run in it goes on")
  add("--teacher", default="sam3", metavar="sam3|ID|DIR|FILE",
      help="whose text encoder is learnt from and whose detector is kept (default: sam3)")  # fmt: skip
  add("--student", default="s0", metavar="s0|s1|l", help="size of the text encoder to train (default: s0)")
  add("--init", default="random", metavar="random|ID|DIR|FILE",
      help="where it starts: random, MobileCLIP's weights or a LiteText checkpoint (default: random)",
  )  # fmt: skip
  add("--profile", choices=("original", "transformers"), default="original",
      help="how the student reads phrases: padding and cleaning (default: original)")  # fmt: skip
  add("--context", type=count, default=16, metavar="T", help="tokens a phrase (default: 16)")
  add("--export-features", metavar="DIR",
      help="compute the teacher's features once into DIR and read them there (default: in every step)",
  )  # fmt: skip
  length = parser.add_mutually_exclusive_group()
  length.add_argument("--epochs", type=positive, default=100.0, metavar="N", help="(default: 100)")
  length.add_argument("--steps", type=count, metavar="N", help="batches to train on, instead of epochs")
  add("--batch", type=count, default=64, metavar="N", help="phrases a step (default: 64)")
  add("--accumulate", type=count, default=2, metavar="N", help="steps that make one update (default: 2)")
  add("--lr", type=positive, default=5e-3, metavar="RATE",
      help="peak rate for 512 phrases an update; it is scaled to batch x accumulate (default: 0.005)",
  )  # fmt: skip
  add("--lr-as-given", action="store_true", help="take --lr as it stands, whatever the batch")
  add("--layer-decay", type=positive, default=0.9, metavar="F",
      help="rate of a layer against the one above it; 1: all alike (default: 0.9)")  # fmt: skip
  add("--weight-decay", type=float, default=0.05, metavar="F", help="AdamW's (default: 0.05)")
  add("--ema", type=float, metavar="F", help="keep an average of the weights with this decay, and ship it")
  add("--dropout", type=float, default=0.0, metavar="F", help="in the student (default: 0)")
  add("--freeze-batch-stats", action="store_true", help="leave BatchNorm's statistics as they start")
  add("--held-out", type=float, default=0.02, metavar="SHARE",
      help="share of the phrases to evaluate on, never trained on (default: 0.02)")  # fmt: skip
  add("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
      help="the student computes in (default: bfloat16)")  # fmt: skip
  add("--seed", type=int, default=0, metavar="N", help="(default: 0)")
  add("--eval-image", action="append", default=[], metavar="PHOTO",
      help="compare student and teacher on it at the end; repeatable")  # fmt: skip
  add("--eval-phrase", action="append", default=[], metavar="PHRASE",
      help="what to ask of the photos; repeatable (default: eight held-out phrases)")  # fmt: skip
  add_hosts(parser)


def run(args: argparse.Namespace) -> int:
  for photo in args.eval_image:
    if not os.path.isfile(photo):
      raise UserError(f"--eval-image: no such photo: {photo}")
  if args.eval_phrase and not args.eval_image:
    raise UserError("--eval-phrase without --eval-image: there is nothing to ask it of")
  config = _config(args)
  leads = join_hosts(args)
  if args.teacher.startswith(RANDOM) and leads:
    print(f"{PROGRAM}: RANDOM WEIGHTS: the teacher knows nothing, nor will the student", file=sys.stderr)

  from sam3lt_jax.training.distillation.run import distill

  result = distill(
    config,
    images=args.eval_image,
    phrases=args.eval_phrase or None,
    report=None if leads else say_nothing,
  )
  if leads:
    _show(result)
  return 0


def _show(result) -> None:
  share = 1 - result.student_parameters / result.teacher_parameters
  print(
    f"text encoder: {result.student_parameters:,} parameters, the teacher's {result.teacher_parameters:,}"
    f" ({share:.0%} fewer)"
  )
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


def _config(args: argparse.Namespace):
  from sam3lt_jax.training.distillation.config import DistillationConfig

  return DistillationConfig(
    prompts=tuple(args.prompts),
    out=args.out,
    teacher=args.teacher,
    student=args.student,
    init=args.init,
    profile=args.profile,
    context_length=args.context,
    features=args.export_features,
    held_out=args.held_out,
    batch_size=args.batch,
    accumulate=args.accumulate,
    epochs=args.epochs,
    steps=args.steps,
    peak_lr=args.lr,
    lr_rows=None if args.lr_as_given else 512,
    weight_decay=args.weight_decay,
    layer_decay=None if args.layer_decay == 1 else args.layer_decay,
    ema_decay=args.ema,
    update_batch_stats=not args.freeze_batch_stats,
    dropout=args.dropout,
    dtype=args.dtype,
    seed=args.seed,
  )
