"""`sam3lt finetune`: a model and annotated images in; a model that knows them out."""

from __future__ import annotations

import argparse
import hashlib
import os

from sam3lt_jax.cli import UserError
from sam3lt_jax.cli.arguments import (
  RANDOM,
  add_decays,
  add_hosts,
  add_model,
  add_out,
  filled,
  join_hosts,
  note,
)
from sam3lt_jax.cli.kinds import count, fraction, positive, whole
from sam3lt_jax.cli.progress import busy

_EPILOG = """\
examples:
  LoRA adapters on a data set in COCO's format, a tenth of its images held out to measure cgF1:
    sam3lt finetune --annotations train.json --images photos --held-out 0.1 --lora-rank 16 --out run
  all but the vision and text encoders, another file to measure on:
    sam3lt finetune --annotations train.json --images photos --freeze vision text \\
      --validation val.json --validation-images photos_val --out run
  all of it, on one device of 16 GB: bfloat16, layers computed twice, 4 steps of one phrase an update
    sam3lt finetune --annotations train.json --images photos --dtype bfloat16 --remat --prompts 1 \\
      --accumulate 4 --moment-dtype bfloat16 --out run
  a run with nothing downloaded: the bundled model on drawn scenes
    sam3lt demo --data drawn
    sam3lt finetune --model shapes --annotations drawn/train.json --images drawn/images --lora-rank 8 \\
      --steps 40 --validation drawn/val.json --out run
the same command again goes on with a run that was stopped

what --freeze and --train take: vision (made of trunk and neck), text, geometry, encoder, decoder, scoring,
masks, or a regular expression over parameter paths such as 'vision_encoder/backbone/layers_[0-7]/'

written to the output folder:
  metrics.jsonl, config.json   losses, rates and scores by step; the run's settings
  curves.png                   the plot of them (needs matplotlib, which the extra [train] brings)
  checkpoints/                 the newest two, and the best on held-out images
  finetune.json                cgF1 and its parts before and after; the state chosen, by what and why
  model/                       the fine-tuned model, adapters merged, for `sam3lt segment --model`
  transformers/                the same in transformers' layout
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.usage = "%(prog)s --annotations FILE --images DIR --out DIR [options]"
  parser.epilog = _EPILOG
  add = parser.add_argument_group("data").add_argument
  add("--annotations", required=True, metavar="FILE", help="COCO or SA-Co JSON")
  add("--images", required=True, metavar="DIR", help="the folder that the annotations' file names are in")
  add("--validation", metavar="FILE",
      help="annotations to measure cgF1 on, and to keep the best by (by pmF1, where every phrase is present)",
  )  # fmt: skip
  add("--validation-images", metavar="DIR", help="the folder of its images (default: --images)")
  add("--held-out", type=fraction, metavar="SHARE",
      help="instead: this share of the images, drawn at random",
  ).fills = ("share",)  # fmt: skip
  add("--iou", choices=("segm", "bbox"), default="segm",
      help="measure by masks or, where annotations have none, by boxes")  # fmt: skip
  add("--batch", dest="batch_size", type=count, default=1, metavar="N",
      help="images a step, over all devices")  # fmt: skip
  add("--prompts", type=count, default=4, metavar="N", help="phrases an image")
  add("--objects", type=count, default=32, metavar="N", help="objects a phrase, the largest")
  add("--negatives", type=fraction, default=0.5, metavar="SHARE", help="absent phrases among them")
  add("--box-prompts", type=fraction, default=0.0, metavar="SHARE",
      help="present phrases that come with example boxes")  # fmt: skip
  add("--no-augment", dest="augment", action="store_false", help="no flip, zoom, crop or colour of images")
  add("--mask-side", type=count, metavar="PX",
      help="side of the true masks, to which predicted ones are made larger (default: the model's input; a"
      " quarter takes a sixteenth of the memory)",
  )  # fmt: skip
  model = parser.add_argument_group("model")
  add = model.add_argument
  add_model(
    model,
    profile="transformers",
    rules="the rules that it is trained under and will have; transformers runs every model by its own",
  )
  add("--freeze", nargs="+", default=[], metavar="PART", help="parts that stay as they are, see below")
  add("--lora-rank", dest="rank", type=count, metavar="R",
      help="train adapters of this rank and nothing else but what --train names")  # fmt: skip
  add("--lora-alpha", dest="alpha", type=positive, metavar="F",
      help="scale of the adapters is this over R (default: R)")  # fmt: skip
  add("--train", nargs="+", default=[], metavar="PART",
      help="with --lora-rank: parts trained beside the adapters")  # fmt: skip
  add("--no-dropout", dest="dropout", action="store_false", help="train without dropout and drop path")
  add("--no-one-to-many", dest="one_to_many", action="store_false",
      help="train without the second set of decoder rows")  # fmt: skip
  add("--mask-points", type=count, metavar="N",
      help="mask losses at N random points a mask instead of every pixel")  # fmt: skip
  add("--remat", action="store_true", help="less memory: compute layers twice")
  add("--moment-dtype", choices=("float32", "bfloat16"), default="float32",
      help="to keep Adam's mean of gradients in; bfloat16 saves 2 bytes each",
  )  # fmt: skip
  run = parser.add_argument_group("run")
  add = run.add_argument
  add_out(run, None, dest="directory", help="the run's folder; a run in it goes on")
  add("--steps", type=count, default=1000, metavar="N", help="batches to train on")
  add("--accumulate", type=count, default=1, metavar="N", help="steps that make one update")
  for name, default, what in (
    ("lr", 8e-5, "the detector"), ("vision-lr", 2.5e-5, "the vision encoder"),
    ("text-lr", 5e-6, "the text encoder"), ("lora-lr", 2e-4, "adapters"),
  ):  # fmt: skip
    add(f"--{name}", type=positive, default=default, metavar="RATE", help=f"peak rate of {what}")
  add_decays(run, "a vision layer", "0.9", 0.1)
  add("--clip", dest="clip_norm", type=positive, default=0.1, metavar="F", help="norm gradients are cut to")
  add("--evaluate-every", type=count, metavar="N", help="steps (default: a tenth of the run)")
  add("--checkpoint-every", type=count, metavar="N", help="steps (default: a tenth of the run)")
  add("--seed", type=whole, default=0, metavar="N", help="of all that is drawn")
  add_hosts(run)


def run(args: argparse.Namespace) -> int:
  _check(args)
  config = _config(args)
  records, validation = _records(args)
  leads = join_hosts(args)
  if args.model.startswith(RANDOM) and leads:
    note("RANDOM WEIGHTS: the model starts knowing nothing")

  from sam3lt_jax.training.detection.run import finetune

  result = finetune(
    args.model,
    records,
    args.directory,
    config,
    validation=validation,
    iou_type=args.iou,
    profile=args.profile,
    evaluate_every=args.evaluate_every,
    checkpoint_every=args.checkpoint_every,
    fingerprint={
      "annotations": _facts(args.annotations),
      "held_out": args.held_out,
      "iou": args.iou,
      "validation_annotations": _facts(args.validation) if args.validation else None,
    },
    report=None if leads else lambda line: None,
  )
  if leads:
    print(f"wrote {', '.join(result.written.values())}")
  return 0


def _check(args: argparse.Namespace) -> None:
  if args.validation and args.held_out:
    raise UserError("--validation and --held-out: give one of the two")
  if args.validation_images and not args.validation:
    raise UserError("--validation-images without --validation")
  if args.rank is None and (args.train or args.alpha):
    raise UserError("--train and --lora-alpha need --lora-rank; without it, all but --freeze is trained")
  if args.rank is not None and args.freeze:
    raise UserError("--freeze with --lora-rank, which freezes everything; name what to train with --train")


def _config(args: argparse.Namespace):
  from sam3lt_jax.data.augment import AugmentConfig
  from sam3lt_jax.data.batches import BatchConfig
  from sam3lt_jax.training.detection.lora import LoraConfig
  from sam3lt_jax.training.detection.losses import DetectionLossConfig
  from sam3lt_jax.training.detection.setup import FinetuneConfig

  augment = AugmentConfig() if args.augment else None
  given = filled(FinetuneConfig, args) | {
    "data": BatchConfig(**filled(BatchConfig, args) | {"augment": augment}),
    "loss": DetectionLossConfig(**filled(DetectionLossConfig, args)),
    "lora": args.rank and LoraConfig(rank=args.rank, alpha=args.alpha or float(args.rank)),
  }
  return FinetuneConfig(**given)


def _records(args: argparse.Namespace):
  """What to train on, and what to measure on (None: nothing)."""
  from sam3lt_jax.data.load import load_records
  from sam3lt_jax.training.detection.run import hold_out

  with busy("reading the annotations"):
    records = load_records(args.annotations, args.images)
    if args.validation:
      return records, load_records(args.validation, args.validation_images or args.images)
  if args.held_out is None:
    return records, None
  return hold_out(records, args.held_out, args.seed)


def _facts(path: str) -> dict:
  """What tells an annotation file from another one under its name, of the same size, too."""
  with open(path, "rb") as f:
    return {"name": os.path.basename(path), "sha256": hashlib.file_digest(f, "sha256").hexdigest()}
