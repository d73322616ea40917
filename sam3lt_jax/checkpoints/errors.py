"""What goes wrong with a checkpoint: all of it a `ValueError`, each case its own sentence."""

from __future__ import annotations

import dataclasses


class CheckpointError(ValueError):
  """A checkpoint that cannot be found, read, understood or written."""


@dataclasses.dataclass
class Problems:
  """Everything that does not fit between the keys of a file and the leaves of a model.

  Attributes:
    unmapped: keys that no rule of the layout knows.
    unexpected: keys with a rule, whose leaf the model does not have.
    doubled: keys or leaves claimed more than once.
    missing: leaves (loading) or keys (saving) that nothing fills.
    wrong_shape: shapes that differ.
    wrong_dtype: tensors that are not floating point.
    not_finite: tensors with NaN or infinity in them.
  """

  unmapped: list[str] = dataclasses.field(default_factory=list)
  unexpected: list[str] = dataclasses.field(default_factory=list)
  doubled: list[str] = dataclasses.field(default_factory=list)
  missing: list[str] = dataclasses.field(default_factory=list)
  wrong_shape: list[str] = dataclasses.field(default_factory=list)
  wrong_dtype: list[str] = dataclasses.field(default_factory=list)
  not_finite: list[str] = dataclasses.field(default_factory=list)

  def __bool__(self) -> bool:
    return any(getattr(self, f.name) for f in dataclasses.fields(self))


_HEADINGS = {
  "unmapped": "no rule of the layout knows",
  "unexpected": "the model has no place for",
  "doubled": "claimed more than once",
  "missing": "nothing fills",
  "wrong_shape": "wrong shape",
  "wrong_dtype": "not floating point",
  "not_finite": "NaN or infinity in",
}


class CheckpointMismatchError(CheckpointError):
  """Keys, leaves and shapes that do not fit together; the message and `problems` list all of them."""

  def __init__(self, where: str, problems: Problems):
    self.problems = problems
    lines = [f"{where} does not fit:"]
    for name, heading in _HEADINGS.items():
      found = sorted(getattr(problems, name))
      if found:
        lines.append(f"  {heading} ({len(found)}):")
        lines += [f"    {line}" for line in found]
    super().__init__("\n".join(lines))


def reason(e: BaseException) -> str:
  """What a library raised, in one short line."""
  text = (str(e).strip() or "?").splitlines()[0]
  return f"{type(e).__name__}: {text[:200]}"
