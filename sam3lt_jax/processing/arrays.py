"""Whatever a user calls an array, to numpy: the one place that knows the kinds there are."""

from __future__ import annotations

from typing import Any

import numpy as np


def to_numpy(value: Any, name: str) -> np.ndarray:
  """An array of numpy, jax or torch, a sequence of numbers, or anything else that numpy reads.

  A torch tensor may need a gradient and lie on any device. Numbers of a kind that numpy itself does not have
  (bfloat16, the kinds of 8 bits and fewer) become float32, which holds all of them.

  Args:
    name: of the argument, for the message.

  Raises:
    ValueError: it has no values, or they cannot be reached.
  """
  try:
    if hasattr(value, "detach"):  # torch's
      value = value.detach().cpu()
      try:
        return np.asarray(value)
      except TypeError:  # bfloat16
        return np.asarray(value.float())
    try:
      array = np.asarray(value)
    except Exception:
      if not isinstance(value, (list, tuple)):
        raise
      array = np.asarray(plain(value, name))  # of tensors that need a gradient
    return array.astype(np.float32) if array.dtype.isbuiltin == 2 else array  # ml_dtypes, as jax has them
  except Exception as e:  # each library raises its own
    raise ValueError(f"{name} cannot be read as an array: {str(e) or type(e).__name__}") from e


def plain(value: Any, name: str) -> Any:
  """Numbers, strings and lists (of lists) of them, of whatever holds them: arrays, tuples, scalars.

  Raises:
    ValueError: as `to_numpy`.
  """
  if isinstance(value, (list, tuple)):
    return [plain(one, name) for one in value]
  return to_numpy(value, name).tolist() if hasattr(value, "__array__") else value
