"""The command `sam3lt`: one verb a use, one module a verb, all of them in `VERBS`.

A verb's module has `add_arguments(parser)`, which describes its options and shows examples, and `run(args)`,
which returns the exit code. It is imported when the verb is called, so that `sam3lt --help` is quick. An
option's `dest` is the field of the library that it fills, so that a mistake in one is told of the other.

argparse, not tyro: arguments and options may stand in any order (`photo.jpg --box 1,2,3,4 "a phrase"`), a
mistake is one line on stderr, and --help ends in examples. tyro 1.0.17 does none of the three: it rejects the
phrase after an option, frames its errors over several lines, and drops a docstring's examples.

Exit codes: 0; 2 for a user's mistake (one line on stderr); 130 for Ctrl-C. Anything else is a bug of ours and
keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import NoReturn

from sam3lt_jax.errors import ArgumentError, shown

# verb -> (module, what it does in one line)
VERBS = {
  "demo": ("sam3lt_jax.cli.demo", "see it work: a drawn scene and a small model that comes with the package"),
  "segment": ("sam3lt_jax.cli.segment", "find, outline and score all that matches a phrase in photos"),
  "everything": ("sam3lt_jax.cli.everything", "all that can be told apart in photos, without a phrase"),
  "track": ("sam3lt_jax.cli.track", "follow all that matches a phrase through a video"),
  "app": ("sam3lt_jax.cli.app", "a local page: phrases, example boxes and clicks on a photo"),
  "info": ("sam3lt_jax.cli.info", "a model's parts, their parameters and bytes, and its profile"),
  "batch": ("sam3lt_jax.cli.batch", "segment a large set of images: restarts, devices, hosts"),
  "status": ("sam3lt_jax.cli.status", "how far a batch job is, its rate, and what failed"),
  "merge": ("sam3lt_jax.cli.merge", "the shards of a batch job to one COCO file or Parquet"),
  "export": ("sam3lt_jax.cli.export", "compiled-ahead programs for serving, without this package"),
  "eval": ("sam3lt_jax.cli.eval", "how good a model is on annotated images: cgF1 and COCO AP"),
  "prompts": ("sam3lt_jax.cli.prompts", "a report on a set of prompts: token lengths, context, vocabulary"),
  "distill": ("sam3lt_jax.cli.distill", "train a small text encoder to give a large one's features"),
  "finetune": ("sam3lt_jax.cli.finetune", "train the detector on annotated images: all of it, parts, LoRA"),
}
PROGRAM = "sam3lt"


class UserError(ValueError):
  """A mistake in what was typed; `main` prints its message and exits with 2."""


class _Help(argparse.RawDescriptionHelpFormatter):
  """Tells the default of an option with a value where its help does not."""

  def _get_help_string(self, action: argparse.Action) -> str | None:
    default, valued = action.default, action.option_strings and action.nargs != 0
    if not valued or not isinstance(default, (str, int, float)) or "(default: " in action.help:
      return action.help
    shown = f"{default:g}" if isinstance(default, float) else default
    return f"{action.help} (default: {shown})"


class Parser(argparse.ArgumentParser):
  """argparse that raises `UserError` instead of printing its usage and leaving."""

  def __init__(self, **kwargs):
    super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

  def error(self, message: str) -> NoReturn:
    raise UserError(f"{message} (see {self.prog} --help)")

  def parse(self, argv: Sequence[str]) -> argparse.Namespace:
    """Arguments in any order. A value that starts with a minus and a digit is a value, not an option."""
    joined: list[str] = []
    for arg in argv:
      if joined and re.match(r"-[\d.]", arg) and re.fullmatch(r"--[a-z][a-z-]*", joined[-1]):
        joined[-1] += f"={arg}"
      else:
        joined.append(arg)
    return self.parse_intermixed_args(joined)

  def option(self, field: str) -> str | None:
    """The option that fills a field: its `dest`, or one of its `fills`, if it has them."""
    for action in self._actions:
      if action.option_strings and field in (action.dest, *getattr(action, "fills", ())):
        return action.option_strings[-1]
    return None


def main(argv: Sequence[str] | None = None) -> int:
  """Runs `sam3lt` with `argv` (default: the process's own) and returns the exit code."""
  argv = list(sys.argv[1:] if argv is None else argv)
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")  # no name that a file can have ends a verb
  try:
    with warnings.catch_warnings(), _logging_in_one_line():
      warnings.showwarning = _show_warning
      return _run(argv)
  except SystemExit as e:  # --help
    return int(e.code or 0)
  except KeyboardInterrupt:
    print(f"{PROGRAM}: stopped", file=sys.stderr)
    return 130
  except BrokenPipeError:  # `sam3lt ... | head`: nobody reads on. Keeps Python from complaining at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except Exception as e:
    if not is_users_mistake(e) or os.environ.get("SAM3LT_TRACEBACK"):
      raise
    print(error_line(e), file=sys.stderr)
    return 2


def _run(argv: list[str]) -> int:
  if not argv:
    print(_help(), file=sys.stderr)
    return 2
  verb, rest = argv[0], argv[1:]
  if verb == "help" and rest:  # `sam3lt help segment`
    verb, rest = rest[0], ["--help"]
  if verb in ("-h", "--help", "help"):
    print(_help())
    return 0
  if verb in ("-V", "--version"):
    from sam3lt_jax import __version__

    print(f"{PROGRAM} {__version__}")
    return 0
  if verb not in VERBS:
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(VERBS)}"
    if os.path.exists(verb) and not near:
      hint = f"to segment it: {PROGRAM} segment {verb} 'a phrase'"
    raise UserError(f"no verb {verb!r}; {hint} (see {PROGRAM} --help)")
  module_name, summary = VERBS[verb]
  module = importlib.import_module(module_name)
  parser = Parser(prog=f"{PROGRAM} {verb}", description=summary[0].upper() + summary[1:] + ".")
  module.add_arguments(parser)
  args = parser.parse(rest)
  try:
    return module.run(args) or 0
  except ArgumentError as e:
    if option := parser.option(e.argument):
      e.argument, e.said = option, e.said.replace("=", " ", 1) if e.said.startswith("=") else e.said
    raise


def _help() -> str:
  width = max(map(len, VERBS))
  verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in VERBS.items())
  return f"""usage: {PROGRAM} VERB ...

SAM3-LiteText in JAX: name a thing, get its masks.

verbs:
{verbs}

examples:
  {PROGRAM} segment street.jpg "yellow school bus"
  {PROGRAM} info s0

{PROGRAM} VERB --help tells a verb's options and shows more examples."""


def is_users_mistake(e: BaseException) -> bool:
  """Whether `e` was raised on purpose, for the user to read: by our own code, or by the file system.

  The same kinds of exceptions out of numpy or jax are bugs of ours, whose traceback is wanted.
  """
  if isinstance(e, (UserError, OSError)):
    return True
  if not isinstance(e, (ValueError, ImportError, MemoryError)):
    return False
  *_, (frame, _) = traceback.walk_tb(e.__traceback__)
  return any(str(name).startswith("sam3lt_jax") for name in (frame.f_globals["__name__"], type(e).__module__))


def error_line(e: BaseException) -> str:
  message = str(e).strip() or type(e).__name__
  if isinstance(e, OSError) and e.strerror and e.filename is not None:
    message = f"{e.strerror}: {shown(e.filename)}"  # without [Errno 2]
  return f"{PROGRAM}: error: {_printable(message)}"


def _printable(message: object) -> str:
  """As `shown`, of a message that may have several lines of its own."""
  return "\n".join(map(shown, str(message).split("\n")))


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
  print(f"{PROGRAM}: warning: {_printable(message)}", file=sys.stderr)


class _LogLine(logging.Handler):
  """What the library logs, as warnings are shown."""

  def emit(self, record: logging.LogRecord) -> None:
    print(f"{PROGRAM}: {record.levelname.lower()}: {_printable(record.getMessage())}", file=sys.stderr)


@contextlib.contextmanager
def _logging_in_one_line() -> Iterator[None]:
  """Shows the library's own log from warnings on; that of other packages goes where they send it."""
  logger, handler = logging.getLogger("sam3lt_jax"), _LogLine(logging.WARNING)
  propagate, logger.propagate = logger.propagate, False
  logger.addHandler(handler)
  try:
    yield
  finally:
    logger.removeHandler(handler)
    logger.propagate = propagate
