"""What a user is told: a mistake by the argument's name, a package that is missing, names from outside."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
import numbers
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class ArgumentError(ValueError):
  """A value that an argument does not accept: its message is `argument` and, right behind it, `said`.

  Attributes:
    argument: the name of the argument or field, "peak_lr".
    said: " must be ..., got 3", "=3; accepted: ..." or ": why".
  """

  def __init__(self, argument: str, said: str):
    super().__init__(argument, said)
    self.argument, self.said = argument, said

  def __str__(self) -> str:
    return f"{self.argument}{self.said}"


def check(good: bool, name: str, value: Any, accepted: str) -> None:
  """Raises ArgumentError "name=value; accepted: ..." unless `good`; NaN compares false, so it is refused."""
  if not good:
    raise ArgumentError(name, f"={value!r}; accepted: {accepted}")


def check_whole(
  name: str, value: Any, least: int = 0, most: float = math.inf, what: str = "a whole number"
) -> None:
  """Raises ArgumentError unless `value` is a whole number from `least` to `most`; True and 2.0 are none."""
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if not (whole and least <= int(value) <= most):
    bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
    raise ArgumentError(name, f" must be {what} {bounds}, got {value!r}")


@contextlib.contextmanager
def renamed(theirs: str, ours: str) -> Iterator[None]:
  """What a function inside calls `theirs` is called `ours` by who called this one."""
  try:
    yield
  except ArgumentError as e:
    if e.argument == theirs:
      e.argument = ours
    raise


@contextlib.contextmanager
def needed(by: str, package: str, extra: str) -> Iterator[None]:
  """Around an import: without the package, ImportError says who needs it ("plots need") and how to get it."""
  try:
    yield
  except ImportError as e:
    raise ImportError(f"{by} the package {package}: pip install 'sam3lt_jax[{extra}]' ({e})") from e


def warn(message: str, category: type[Warning] = UserWarning) -> None:
  """Warns at the user's own line: the innermost that is none of this package's."""
  frame, level = sys._getframe(1), 2
  while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
    frame, level = frame.f_back, level + 1
  warnings.warn(message, category, stacklevel=level)


def shown(name: object) -> str:
  """A name (of a file, a phrase) for a message, terminal or log: one line, whatever is in it.

  What would not be printed as a character stands as its escape: line ends, ESC, marks that turn the writing
  round, and the bytes of a file's name that are no UTF-8. Python's own `repr` does the same, in quotes.
  """
  text = str(name)
  if text.isprintable():
    return text
  return "".join(
    c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode()
    for c in text
  )


# -------------------------------------------------------------------- names that others have for arguments

# Their name -> ours. transformers, ultralytics and segment-anything have most of these.
_OURS = {
  "bboxes": "boxes",
  "bf16": "dtype='bfloat16' of from_pretrained",
  "checkpoint": "source of from_pretrained",
  "classes": "text",
  "conf": "threshold",
  "confidence": "threshold",
  "device_map": "device of from_pretrained ('cpu', 'gpu', 'gpu:1', 'tpu'; devices for several)",
  "fp16": "dtype='bfloat16' of from_pretrained",
  "half": "dtype='bfloat16' of from_pretrained",
  "image": "images",
  "imgsz": "image_size of from_pretrained (a multiple of 14)",
  "input_boxes": "boxes",
  "input_boxes_labels": "box_labels",
  "input_labels": "point_labels of predict, after set_image(image)",
  "input_points": "points of predict, after set_image(image)",
  "labels": "box_labels",
  "mask_input": "mask of predict, after set_image(image)",
  "max_det": "results.top_k(number)",
  "multimask_output": "SamPredictor, which gives three masks a point",
  "point_coords": "points of predict, after set_image(image)",
  "point_labels": "point_labels of predict, after set_image(image)",
  "points": "points of predict, after set_image(image)",
  "pretrained_model_name_or_path": "source",
  "prompt": "text",
  "prompts": "text",
  "query": "text",
  "score_threshold": "threshold",
  "source": "images",
  "stream": "the method stream(images, text), for any number of images",
  "text_prompt": "text",
  "torch_dtype": "dtype of from_pretrained ('float32' or 'bfloat16')",
}


class KeywordError(ArgumentError, TypeError):
  """An argument of a name that the function does not have."""


def explained(function: F) -> F:
  """`function`, which says what an argument that it does not have is called here.

  Where it takes `**options`, their names are those of the `TypedDict` that it unpacks, "Unpack[Name]".
  """
  parameters = inspect.signature(function).parameters.values()
  known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
  for options in (p.annotation for p in parameters if p.kind is p.VAR_KEYWORD):
    known += function.__globals__[options.removeprefix("Unpack[").removesuffix("]")].__annotations__

  @functools.wraps(function)
  def call(*args, **kwargs):
    for name in kwargs:
      if name not in known:
        raise _unknown(function, name, [n for n in known if n not in ("self", "cls")])
    return function(*args, **kwargs)

  return call  # type: ignore[return-value]


def _unknown(function: Any, name: str, accepted: list[str]) -> KeywordError:
  ours = _OURS.get(name)
  if ours is None:
    near = difflib.get_close_matches(name, accepted, n=1)
    ours = near[0] if near else None
  short = (ours or "").partition(" of from_pretrained")[0].partition("=")[0]
  if ours and short in accepted:  # said where it is accepted
    ours = ours.replace(" of from_pretrained", "")
  hint = f"here it is {ours}" if ours else f"accepted: {', '.join(accepted)}"
  owner = function.__qualname__.removesuffix(".__init__").removesuffix(".__call__")
  return KeywordError(name, f" is no argument of {owner}; {hint}")
