"""What several verbs share: options, and what is made of them."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any

from sam3lt_jax import storage
from sam3lt_jax.cli import PROGRAM
from sam3lt_jax.cli.kinds import below_one, count, fraction, not_negative, up_to_one, whole
from sam3lt_jax.cli.progress import busy

if TYPE_CHECKING:
  from sam3lt_jax.predictor import Predictor

RANDOM = "random:"
RANDOM_WARNING = "RANDOM WEIGHTS: no trained model was loaded; the masks and scores below mean nothing"


def add_model(
  parser: argparse.ArgumentParser,
  dtype: str = "to compute in",
  profile: str | None = None,
  rules: str = "which PyTorch reference to follow",
) -> None:
  """--model, --profile (`rules`: its help, None: the checkpoint's own), --image-size, --dtype and --device,
  of `Predictor.from_pretrained`; `load` reads them.
  """
  add = parser.add_argument
  add("-m", "--model", default="s0", metavar="s0|s1|l|shapes|ID|DIR|FILE",
      help="released variant, the bundled model (shapes), hub id, folder, or .pt file; random:s0 for random"
      " weights",
  ).fills = ("source",)  # fmt: skip
  add("--profile", choices=("original", "transformers"), default=profile,
      help=rules if profile else f"{rules} (default: the checkpoint's own)")  # fmt: skip
  add("--image-size", type=count, metavar="PIXELS",
      help="side of the model's input, a multiple of 14 (default: the model's)")  # fmt: skip
  add("--dtype", choices=("float32", "bfloat16"), default="float32", help=dtype)
  add_device(parser)


def add_thresholds(parser: argparse.ArgumentParser) -> None:
  """--threshold and --mask-threshold, of `Predictor.__call__`."""
  add = parser.add_argument
  add("--threshold", type=fraction, metavar="T", help="keep scores above T, 0 to 1 (default: the profile's)")
  add("--mask-threshold", type=fraction, default=0.5, metavar="T",
      help="keep pixels of a probability above T, 0 to 1")  # fmt: skip


def add_decays(parser: argparse.ArgumentParser, layers: str, layer_decay: str, weight_decay: float) -> None:
  """Decays of a training run: of rates (1 becomes None), of weights, of their average. layers: "a layer"."""
  add = parser.add_argument
  add("--layer-decay", type=lambda text: None if (decay := up_to_one(text)) == 1 else decay, metavar="F",
      default=layer_decay, help=f"rate of {layers} against the one above it; 1: all alike")  # fmt: skip
  add("--weight-decay", type=not_negative, default=weight_decay, metavar="F", help="AdamW's")
  add("--ema", dest="ema_decay", type=below_one, metavar="F",
      help="keep an average of the weights with this decay, and ship it")  # fmt: skip


def add_device(parser: argparse.ArgumentParser) -> None:
  """--device, which `start` reads."""
  parser.add_argument("--device", metavar="cpu|gpu|gpu:1|tpu",
      help="what to run on (default: what JAX finds, an accelerator first)")  # fmt: skip


def add_out(parser: argparse.ArgumentParser, default: str | None = "sam3lt_out", **more: Any) -> None:
  """-o, --out. default None: it must be given."""
  usual = {"metavar": "DIR", "help": "output folder", "required": default is None}
  parser.add_argument("-o", "--out", default=default, **usual | more)


def start(args: argparse.Namespace) -> None:
  """Before anything else of JAX: chooses --device and keeps what is compiled for the next call.

  Raises:
    ValueError: no such device here.
  """
  from sam3lt_jax import devices

  devices.use(args.device)
  devices.keep_compiled(getattr(args, "compilation_cache", None))  # which batch has an option for
  devices.check(args.device)


def note(text: str) -> None:
  """A line for the reader, on stderr."""
  print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


def load(args: argparse.Namespace, warning: str = RANDOM_WARNING, **options: Any) -> Predictor:
  """The predictor of `add_model`'s and `add_tracker`'s arguments; says what it runs on.

  warning: said where its weights are random. options: of `Predictor.from_pretrained`.
  """
  start(args)
  if args.model.startswith(RANDOM):
    note(warning)
  for name in ("image_size", "dtype", "tracker"):
    if getattr(args, name, None) is not None:
      options[name] = getattr(args, name)
  with busy(f"loading {args.model}"):
    from sam3lt_jax.predictor import Predictor

    predictor = Predictor.from_pretrained(args.model, profile=args.profile, **options)
  note(f"running on {predictor.running}")
  return predictor


def add_tracker(parser: argparse.ArgumentParser, required: bool = False) -> None:
  """--tracker, of `Predictor.from_pretrained`."""
  parser.add_argument("--tracker", required=required, metavar="ID|DIR|FILE|same",
      type=lambda text: True if text == "same" else text,
      help="where SAM 3's tracker is, which clicks need: 'facebook/sam3', a folder, a .pt file of SAM 3 or "
      "SAM3-LiteText; 'same': in --model itself",
  )  # fmt: skip


def add_tracking(parser: argparse.ArgumentParser) -> None:
  """What following objects through clips needs: --tracker, and options of `VideoPredictor.track` and
  `video.writing.Files`.
  """
  add_tracker(parser)
  parser.set_defaults(tracker="facebook/sam3")
  add = parser.add_argument
  add("--max-objects", type=count, metavar="N", help="of a clip at a time, over all phrases")
  add("--latency", type=whole, metavar="N",
      help="frames that a frame is held back, for objects that turn out to be none (default: 14)",
  )  # fmt: skip
  add("--every", type=count, metavar="N",
      help="frames from a saved state to the next (default: those of half a minute)")  # fmt: skip
  add("--no-overlay", dest="overlay", action="store_false", help="do not draw the objects on the video")
  add("--davis", action="store_true", help="a palette PNG a frame, as DAVIS wants results")


def filled(kind: type, args: argparse.Namespace) -> dict[str, Any]:
  """What `args` say of the fields of a dataclass, by name: each option's `dest` is a field."""
  return {f.name: getattr(args, f.name) for f in dataclasses.fields(kind) if hasattr(args, f.name)}


def make_folder(folder: str, name: str = "out") -> None:
  """Makes the folder of an option. Raises ArgumentError if nothing can be written there."""
  storage.check_directory(folder, name)
  os.makedirs(folder, exist_ok=True)


def add_hosts(parser: argparse.ArgumentParser) -> None:
  """The option that `join_hosts` reads, beside `add_device`'s."""
  parser.add_argument("--hosts", action="store_true",
      help="train together with the same command on other hosts that see --out, too: found by"
      " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, else by what Slurm, Open MPI, GKE or a"
      " TPU slice tells",
  )  # fmt: skip


def join_hosts(args: argparse.Namespace) -> bool:
  """`start`, after waiting for the others where --hosts asks for it, which says what it runs on. Whether this
  process is the one that talks.

  Raises:
    ValueError: the others did not come, or the variables contradict each other; no such device here.
  """
  import jax

  from sam3lt_jax import devices, parallel

  if args.hosts:
    devices.use(args.device)
    parallel.start_distributed(auto="JAX_COORDINATOR_ADDRESS" not in os.environ)
  start(args)
  leads = jax.process_index() == 0
  if leads:
    note(f"running on {devices.running(jax.devices(), args.dtype)}")
  return leads
