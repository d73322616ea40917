"""What several verbs share: kinds of numbers for argparse's `type`, options, the output folder."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from sam3lt_jax import storage
from sam3lt_jax.cli import PROGRAM
from sam3lt_jax.cli.progress import busy

if TYPE_CHECKING:
  from sam3lt_jax.predictor import Predictor

RANDOM = "random:"
RANDOM_WARNING = "RANDOM WEIGHTS: no trained model was loaded; the masks and scores below mean nothing"

TRACKER = "facebook/sam3"  # of the verbs that cannot do without one


def count(text: str) -> int:
  """A whole number of at least 1."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
  return int(text)


def whole(text: str) -> int:
  """A whole number of at least 0."""
  if not text.isdecimal():
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 0, got {text!r}")
  return int(text)


def positive(text: str) -> float:
  """A number above 0."""
  value = _number(text)
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
  return value


def fraction(text: str) -> float:
  """A number within 0 and 1."""
  value = _number(text)
  if not 0 <= value <= 1:
    raise argparse.ArgumentTypeError(f"must be a number within [0, 1], got {text!r}")
  return value


def not_negative(text: str) -> float:
  """A number of at least 0."""
  value = _number(text)
  if not 0 <= value < math.inf:
    raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text!r}")
  return value


def below_one(text: str) -> float:
  """A number from 0 to below 1."""
  value = _number(text)
  if not 0 <= value < 1:
    raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, got {text!r}")
  return value


def up_to_one(text: str) -> float:
  """A number above 0, up to 1."""
  value = _number(text)
  if not 0 < value <= 1:
    raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, got {text!r}")
  return value


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
      " weights (default: s0)",
  ).fills = ("source",)  # fmt: skip
  default = profile or "the checkpoint's own"
  add("--profile", choices=("original", "transformers"), default=profile,
      help=f"{rules} (default: {default})")  # fmt: skip
  add("--image-size", type=count, metavar="PIXELS",
      help="side of the model's input, a multiple of 14 (default: the model's)")  # fmt: skip
  add("--dtype", choices=("float32", "bfloat16"), default="float32", help=f"{dtype} (default: float32)")
  add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
  """--device, which `start` reads."""
  parser.add_argument("--device", metavar="cpu|gpu|gpu:1|tpu",
      help="what to run on (default: what JAX finds, an accelerator first)")  # fmt: skip


def add_out(parser: argparse.ArgumentParser, default: str | None = "sam3lt_out", **more: Any) -> None:
  """-o, --out. default None: it must be given."""
  usual = {"metavar": "DIR", "help": f"output folder (default: {default})", "required": default is None}
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
  for name in ("image_size", "dtype"):
    if getattr(args, name, None) is not None:
      options[name] = getattr(args, name)
  if getattr(args, "tracker", None) is not None:
    options["tracker"] = tracker_of(args)
  with busy(f"loading {args.model}"):
    from sam3lt_jax.predictor import Predictor

    predictor = Predictor.from_pretrained(args.model, profile=args.profile, **options)
  note(f"running on {predictor.running}")
  return predictor


def add_tracker(parser: argparse.ArgumentParser, required: bool = False) -> None:
  """--tracker, of `Predictor.from_pretrained`; read it with `tracker_of`."""
  parser.add_argument(
    "--tracker",
    required=required,
    metavar="ID|DIR|FILE|same",
    help="where SAM 3's tracker is, which clicks need: 'facebook/sam3', a folder, a .pt file of SAM 3 or "
    "SAM3-LiteText; 'same': in --model itself",
  )


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


def tracker_of(args: argparse.Namespace) -> str | bool | None:
  """`tracker` of `Predictor.from_pretrained`."""
  return True if args.tracker == "same" else args.tracker


def filled(kind: type, args: argparse.Namespace) -> dict[str, Any]:
  """What `args` say of the fields of a dataclass, by name: each option's `dest` is a field."""
  return {f.name: getattr(args, f.name) for f in dataclasses.fields(kind) if hasattr(args, f.name)}


def make_folder(folder: str, name: str = "out") -> None:
  """Makes the folder of an option. Raises ArgumentError if nothing can be written there."""
  storage.check_directory(folder, name)
  os.makedirs(folder, exist_ok=True)


def add_hosts(parser: argparse.ArgumentParser) -> None:
  """The option that `join_hosts` reads, beside `add_device`'s."""
  parser.add_argument(
    "--hosts",
    action="store_true",
    help="train together with the same command on other hosts that see --out, too: found by"
    " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, else by what Slurm, Open MPI, GKE or a"
    " TPU slice tells",
  )


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


def say_nothing(line: str) -> None:
  """The `report` of a process that does not talk."""


def _number(text: str) -> float:
  """NaN, which compares false, for what is no number."""
  try:
    return float(text)
  except ValueError:
    return math.nan
