"""Commands run from a checkout: `python -m convert.from_torch`, `convert.to_transformers`, `convert.verify`.

Not installed with the library. Reading an original `.pt` needs PyTorch alone (the extra `convert`; a build
for the CPU is enough), comparing with the references torch, torchvision and transformers (`verify`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

DTYPES = ("float32", "bfloat16", "float16")


def run(main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None) -> int:
  """Calls a command's `main`: 0 done, 1 a comparison failed, 2 a user's mistake told in one line."""
  try:
    return main(argv) or 0
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130
  except (ValueError, OSError, ImportError) as e:
    print(f"error: {e}", file=sys.stderr)
    return 2


def add_source(parser: argparse.ArgumentParser) -> None:
  """The arguments that say which checkpoint is meant, the same for every command."""
  parser.add_argument(
    "source",
    metavar="SOURCE",
    nargs="?" if parser.prog.endswith("verify") else None,
    help="hub id (owner/name, or owner/name:path/file.pt), directory, .pt or .safetensors file; s0, s1, l: "
    "the released models",
  )
  parser.add_argument("--revision", help="branch, tag or commit of a hub id")
  parser.add_argument("--token", help="hub token (default: HF_TOKEN, or what `hf auth login` stored)")
  parser.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept")
  parser.add_argument(
    "--config", metavar="JSON", help="config.json of the model, for a file that comes without one"
  )


def source_options(args: argparse.Namespace) -> dict[str, str | None]:
  """`add_source`'s options as arguments of `from_pretrained`."""
  names = ("revision", "token", "cache_dir", "config")
  return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def check_out(path: str, overwrite: bool) -> str:
  """A directory to write: new, empty, or `--overwrite`. Asked first, before anything long."""
  if os.path.isfile(path):
    raise ValueError(f"OUT: {path} is a file; give a directory")
  if os.path.isdir(path) and os.listdir(path) and not overwrite:
    raise ValueError(f"OUT: {path} is not empty; pass --overwrite to replace it as a whole")
  return path


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def parser(name: str, doc: str) -> argparse.ArgumentParser:
  """An argument parser that shows the command's own docstring and tells mistakes in one line."""
  return _Parser(
    prog=f"python -m convert.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
  )
