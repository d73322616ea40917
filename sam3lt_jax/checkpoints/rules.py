"""The language the layout tables are written in: key templates, named transforms, rules.

A rule says that the key `source` of a file holds the leaves `targets` of our tree, by a transform:

    Rule("blocks.{i}.attn.{p:q|k|v}.weight", "layers_{i}/attention/{p}_proj/kernel", "linear")

Templates are anchored: `{i}` is a number, `{p:q|k|v}` one of the alternatives, and what is equal in both
templates goes by the same name, so a rule reads in both directions.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

_FIELD = re.compile(r"\{(\w+)(?::([^{}]*))?\}")


@dataclasses.dataclass(frozen=True)
class Transform:
  """How one tensor of a file becomes one or more leaves, and back. Views wherever numpy can.

  Attributes:
    form: the file's shape: a letter is any size, a number exactly that, "3N" any multiple of three, "1+N" at
      least one.
    forward: tensor -> leaves.
    inverse: leaves -> tensor.
  """

  form: tuple[str | int, ...] | None
  forward: Callable[[np.ndarray], tuple[np.ndarray, ...]]
  inverse: Callable[[Sequence[np.ndarray]], np.ndarray]

  def accepts(self, shape: Sequence[int]) -> bool:
    if self.form is None:
      return True
    return len(shape) == len(self.form) and all(map(_size_fits, self.form, shape))

  def __str__(self) -> str:
    return "any" if self.form is None else "[" + ", ".join(map(str, self.form)) + "]"


def _size_fits(form: str | int, size: int) -> bool:
  if isinstance(form, int):
    return size == form
  return size % 3 == 0 if form == "3N" else size >= 1


def _axes(form: tuple[str | int, ...], forward: tuple[int, ...], inverse: tuple[int, ...]) -> Transform:
  return Transform(form, lambda x: (x.transpose(forward),), lambda y: y[0].transpose(inverse))


def _class_row(y: Sequence[np.ndarray]) -> np.ndarray:
  # The dropped row is the classification token of pretraining, which the detector never reads: zeros do.
  return np.concatenate([np.zeros_like(y[0][:, :1]), y[0]], axis=1)


TRANSFORMS: dict[str, Transform] = {
  "same": Transform(None, lambda x: (x,), lambda y: y[0]),
  "linear": _axes(("O", "I"), (1, 0), (1, 0)),
  "conv": _axes(("O", "I", "H", "W"), (2, 3, 1, 0), (3, 2, 0, 1)),
  "conv_transpose": _axes(("I", "O", "H", "W"), (2, 3, 0, 1), (2, 3, 0, 1)),
  "depthwise_conv": Transform(
    ("C", 1, 1, "K"),
    lambda x: (x[:, :, 0].transpose(2, 1, 0),),
    lambda y: y[0].transpose(2, 1, 0)[:, :, None],
  ),
  "conv_1x1": Transform(("O", "I", 1, 1), lambda x: (x[:, :, 0, 0].T,), lambda y: y[0].T[:, :, None, None]),
  "split_linear": Transform(
    ("3N", "I"),
    lambda x: tuple(part.T for part in np.split(x, 3)),
    lambda y: np.concatenate([part.T for part in y]),
  ),
  "split_four_rows": Transform((4, "D"), lambda x: tuple(np.split(x, 4)), np.concatenate),
  "split_bias": Transform(("3N",), lambda x: tuple(np.split(x, 3)), np.concatenate),
  "drop_class_row": Transform((1, "1+N", "D"), lambda x: (x[:, 1:],), _class_row),
  "squeeze_table": Transform((1, 1, "L", "D"), lambda x: (x[0, 0],), lambda y: y[0][None, None]),
  "squeeze_scale": Transform(("C", 1, 1), lambda x: (x[:, 0, 0],), lambda y: y[0][:, None, None]),
}


@dataclasses.dataclass(frozen=True)
class Rule:
  """`source` key template <-> `targets` leaf templates (one, or as many as the transform gives).

  Leaf templates start with the collection; without one they mean `params/`. `counter` is a key that the
  references keep beside this one and nothing reads (BatchNorm's number of batches): ignored when loading,
  written as an int64 zero when saving. `twin` is a key without fields that holds the same once more.
  """

  source: str
  targets: str | tuple[str, ...]
  transform: str = "same"
  counter: str | None = None
  twin: str | None = None

  def __post_init__(self):
    targets = (self.targets,) if isinstance(self.targets, str) else self.targets
    targets = tuple(t if t.startswith("batch_stats/") else f"params/{t}" for t in targets)
    object.__setattr__(self, "targets", targets)

  @functools.cached_property
  def fields(self) -> dict[str, str]:
    """Field name -> regex of its values, gathered over all templates of the rule."""
    found: dict[str, str] = {}
    for template in (self.source, *self.targets):
      for name, values in _FIELD.findall(template):
        if values or name not in found:
          found[name] = values or r"\d+"
    return found

  @functools.cached_property
  def source_pattern(self) -> re.Pattern[str]:
    return _compile(self.source, self.fields)

  @functools.cached_property
  def counter_pattern(self) -> re.Pattern[str] | None:
    return None if self.counter is None else _compile(self.counter, self.fields)

  @functools.cached_property
  def target_patterns(self) -> tuple[re.Pattern[str], ...]:
    return tuple(_compile(t, self.fields) for t in self.targets)

  def leaves(self, match: re.Match[str]) -> tuple[str, ...]:
    """The leaf paths of a key that matched `source_pattern`."""
    return tuple(fill(t, match.groupdict()) for t in self.targets)


def _compile(template: str, fields: Mapping[str, str]) -> re.Pattern[str]:
  pattern, position = "", 0
  for m in _FIELD.finditer(template):
    pattern += re.escape(template[position : m.start()]) + f"(?P<{m[1]}>{fields[m[1]]})"
    position = m.end()
  return re.compile(pattern + re.escape(template[position:]))  # always used with fullmatch


def fill(template: str, values: Mapping[str, str]) -> str:
  return _FIELD.sub(lambda m: values[m[1]], template)


def substitute(key: str, aliases: Sequence[tuple[str, str]]) -> str:
  """`key` with each pattern replaced in turn."""
  for pattern, replacement in aliases:
    key = re.sub(pattern, replacement, key)
  return key


@dataclasses.dataclass(frozen=True)
class Layout:
  """One way of storing the model.

  Attributes:
    name: "transformers" or "original".
    text_kind: "mobileclip" or "clip", the text tower that the rules are for; "" for the tracker.
    rules: every key that holds parameters or statistics.
    ignored: (pattern, why) of keys that hold nothing of ours. Anchored.
    aliases: (pattern, replacement) applied to a key before it is looked up: prefixes of wrapping models.
    prefix: put before every key when saving.
  """

  name: str
  text_kind: str
  rules: tuple[Rule, ...]
  ignored: tuple[tuple[str, str], ...] = ()
  aliases: tuple[tuple[str, str], ...] = ()
  prefix: str = ""

  def canonical(self, key: str) -> str:
    return substitute(key, self.aliases)

  def is_ignored(self, key: str) -> bool:
    return any(p.fullmatch(key) for p in self._ignored_patterns)

  @functools.cached_property
  def _ignored_patterns(self) -> tuple[re.Pattern[str], ...]:
    counters = tuple(r.counter_pattern for r in self.rules if r.counter_pattern is not None)
    twins = tuple(re.compile(re.escape(r.twin)) for r in self.rules if r.twin is not None)
    return tuple(re.compile(pattern) for pattern, _ in self.ignored) + counters + twins


# ------------------------------------------------------------------ of one layer: torch's names and ours


def value(source: str, target: str, transform: str = "same") -> list[Rule]:
  return [Rule(source, target, transform)]


def kernel(source: str, target: str, transform: str) -> list[Rule]:
  return [Rule(f"{source}.weight", f"{target}/kernel", transform)]


def with_bias(source: str, target: str, transform: str) -> list[Rule]:
  return [*kernel(source, target, transform), Rule(f"{source}.bias", f"{target}/bias")]


linear = functools.partial(with_bias, transform="linear")
conv = functools.partial(with_bias, transform="conv")
conv_transpose = functools.partial(with_bias, transform="conv_transpose")


def norm(source: str, target: str) -> list[Rule]:
  return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]


def batch_norm(source: str, target: str) -> list[Rule]:
  counter = f"{source}.num_batches_tracked"
  return [
    *norm(source, target),
    Rule(f"{source}.running_mean", f"batch_stats/{target}/mean"),
    Rule(f"{source}.running_var", f"batch_stats/{target}/var", counter=counter),
  ]


def embedding(source: str, target: str) -> list[Rule]:
  return [Rule(f"{source}.weight", f"{target}/embedding")]


def same(layer: Callable[..., list[Rule]], *paths: str, prefix: str = "", **options: str) -> list[Rule]:
  """Of layers with one name in both, after `prefix`: `layers.{i}.fc` is `layers_{i}/fc`."""
  targets = (re.sub(r"\.(\{[ij]\})", r"_\1", path).replace(".", "/") for path in paths)
  return [r for path, target in zip(paths, targets) for r in layer(prefix + path, target, **options)]


def fused_qkv(source: str, target: str) -> list[Rule]:
  """One tensor for query, key and value, stacked along the output axis; its name is `source` + "weight"."""
  return [
    Rule(f"{source}weight", tuple(f"{target}/{p}_proj/kernel" for p in "qkv"), "split_linear"),
    Rule(f"{source}bias", tuple(f"{target}/{p}_proj/bias" for p in "qkv"), "split_bias"),
  ]


def torch_attention(source: str, target: str, out: str = "o_proj") -> list[Rule]:
  """torch.nn.MultiheadAttention."""
  return [
    *fused_qkv(f"{source}.in_proj_", target),
    *linear(f"{source}.out_proj", f"{target}/{out}"),
  ]
