"""What arguments are called here that other libraries, or people, call otherwise."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from sam3lt_jax.errors import ArgumentError

F = TypeVar("F", bound=Callable[..., Any])

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

  Where it takes `**options`, their names are those of the `TypedDict` that it unpacks.
  """
  parameters = inspect.signature(function).parameters.values()
  known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
  options = next((p.annotation for p in parameters if p.kind is p.VAR_KEYWORD), None)

  @functools.wraps(function)
  def call(*args, **kwargs):
    accepted = known if options is None else [*known, *_names(function, options)]
    for name in kwargs:
      if name not in accepted:
        raise _unknown(function, name, [n for n in accepted if n not in ("self", "cls")])
    return function(*args, **kwargs)

  return call  # type: ignore[return-value]


def _names(function: Any, unpacked: str) -> list[str]:
  """The fields of the TypedDict in an annotation "Unpack[Name]"."""
  return list(function.__globals__[unpacked.removeprefix("Unpack[").removesuffix("]")].__annotations__)


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
