"""`from_pretrained`: any checkpoint to (model, variables)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax import devices
from sam3lt_jax.checkpoints import engine, infer, orbax_io, random_init, readers, sources, tables
from sam3lt_jax.checkpoints.errors import CheckpointError, reason
from sam3lt_jax.checkpoints.rules import Layout
from sam3lt_jax.config import Profile, Sam3LiteTextConfig
from sam3lt_jax.errors import explained

if TYPE_CHECKING:
  from sam3lt_jax.model import Sam3LiteText, Variables
  from sam3lt_jax.tracker import Sam3Tracker

_DTYPES = ("float32", "bfloat16", "float16")
_QUIET_SECONDS = 2.0  # a progress bar for what takes longer


@explained
def from_pretrained(
  source: str | os.PathLike,
  config: Sam3LiteTextConfig | Mapping[str, Any] | str | os.PathLike | None = None,
  profile: str | Profile | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  *,
  revision: str | None = None,
  token: str | bool | None = None,
  cache_dir: str | os.PathLike | None = None,
  local_files_only: bool = False,
  seed: int = 0,
  device: Any = None,
  progress: bool = True,
) -> tuple[Sam3LiteText, Variables]:
  """Loads a checkpoint of any known layout.

      model, variables = from_pretrained("s0")
      output = model.apply(variables, pixel_values, input_ids, attention_mask)

  Args:
    source: one of
      - "s0", "s1", "l": the released models on the hub;
      - a hub id "owner/name", or one file of it, "owner/name:path/file.pt";
      - a directory in transformers' layout (`model.safetensors` or shards with their index);
      - an original file (`.pt`; needs the extra `convert`, that is torch) or a single `.safetensors`;
      - a directory that `save_pretrained` wrote;
      - "random:s0" (also s1, l, sam3, tiny, tiny-s1, tiny-l): untrained weights drawn from `seed`, for trying
        and for benchmarks. What such a model finds means nothing.
    config: the sizes, instead of those of `config.json` or, where there is none, of the released model that
      the tensors are of: a configuration, or what `Sam3LiteTextConfig.from_json` takes.
    profile: "original", "transformers" or a `Profile`, overriding the source's. Its own is "original" for an
      original file and for random weights, "transformers" for a transformers directory, and what was saved
      for a directory of ours.
    dtype: what layers compute in: float32, bfloat16 or float16.
    param_dtype: what parameters are stored in, float32 by default. BatchNorm statistics stay float32.
    revision, token, cache_dir, local_files_only: for the hub, see `hub.download`.
    seed: of random weights.
    device: "cpu", "gpu", "gpu:1", "tpu", a jax device or sharding for every variable. Default: the first
      device.
    progress: show a bar for what takes more than 2 seconds.

  Returns:
    The `Sam3LiteText` and its variables, `{"params": ...}` and for RepMixer text encoders `"batch_stats"`.

  Raises:
    CheckpointError: (ValueError) an unknown name, a missing, truncated or corrupted file, another variant
      than `config`'s. `CheckpointMismatchError` lists every tensor that does not fit.
    ImportError: a `.pt` without torch.
    PermissionError, ConnectionError, OSError: from the hub, see `hub.download`.
  """
  found = open_checkpoint(
    source, config, profile, dtype, param_dtype, revision=revision, token=token, cache_dir=cache_dir,
    local_files_only=local_files_only, seed=seed,
  )  # fmt: skip
  return found.model, found.load(device=device, progress=progress)


@dataclasses.dataclass(frozen=True)
class Opened:
  """A checkpoint whose model is known and whose weights are not yet read, so that something may compile.

  Attributes:
    model: what the weights are for; a `Sam3Tracker` where that was asked for.
    shapes: its variables as `jax.ShapeDtypeStruct`s.
    path: the file or directory; the name of the configuration for random weights.
    random: whether the weights are drawn.
  """

  model: Sam3LiteText | Sam3Tracker
  shapes: Variables
  path: str
  random: bool
  _title: str
  _read: Callable[[Callable[[np.ndarray], Any], Any, Callable[[int], Any]], dict[str, Any]]
  _bytes: int  # that `_read` will tell of; 0: it tells of none

  def load(self, device: Any = None, progress: bool = True) -> Variables:
    """Reads the weights; see `from_pretrained`."""
    from tqdm import tqdm

    device = devices.find(device) if isinstance(device, str) else device
    with tqdm(
      total=self._bytes, desc=f"loading {self._title}", unit="B", unit_scale=True, delay=_QUIET_SECONDS,
      leave=False, disable=not (progress and self._bytes),
    ) as bar:  # fmt: skip
      return engine.unflatten(self._read(lambda array: jax.device_put(array, device), device, bar.update))


def open_checkpoint(
  source: str | os.PathLike,
  config: Sam3LiteTextConfig | Mapping[str, Any] | str | os.PathLike | None = None,
  profile: str | Profile | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  *,
  seed: int = 0,
  **hub: Any,
) -> Opened:
  """The first half of `from_pretrained`, with its arguments and errors: all but reading the weights."""
  devices.check()
  dtypes = checked_dtypes(dtype, param_dtype)
  if profile is not None:
    profile = Profile.named(profile)
  if config is not None and not isinstance(config, Sam3LiteTextConfig):
    config = Sam3LiteTextConfig.from_json(config, profile)
  elif config is not None and profile is not None:
    config = config.replace(profile=profile)
  found = sources.locate(source, **hub)
  path = found.path
  tensors = None
  if found.kind == "random":
    config = config or random_init.RANDOM_CONFIGS[path]().replace(profile=profile or "original")
    model, target = build(config, **dtypes)
  elif found.kind == "orbax":
    config = config or _directory_config(path, profile)
    if config is None:
      raise CheckpointError(f"{path} has no config.json beside its variables; pass config=")
    stored = orbax_io.stored_shapes(path)
    infer.check_counts(config, {leaf: x.shape for leaf, x in stored.items()}, path)
    model, target = build(config, **dtypes)
  else:
    make = functools.partial(_of_tensors, path, config, profile, dtypes)
    model, target, tensors = open_tensors(path, tables.detect, make)
  return opened(source, found.kind, path, model, target, seed, tensors)


def opened(
  source: Any, kind: str, path: str, model: Any, target: dict[str, Any], seed: int, tensors: Any
) -> Opened:
  """`Opened`, of the leaves `target`; tensors: (how to read them, bytes) of PyTorch's."""
  if kind == "random":
    total = sum(x.size * x.dtype.itemsize for x in target.values())
    tensors = lambda place, _, advance: random_init.random_leaves(target, seed, place, advance), total
  elif kind == "orbax":
    tensors = lambda place, device, advance: orbax_io.load(path, target, device), 0
  title = os.path.basename(os.fspath(source).rstrip(os.sep))
  return Opened(model, engine.unflatten(target), path, kind == "random", title, *tensors)


def build(config: Sam3LiteTextConfig, dtype: Any, param_dtype: Any) -> tuple[Sam3LiteText, dict[str, Any]]:
  """The model of `config`, and its leaves as shapes and dtypes, flat.

  Raises:
    CheckpointError: sizes that no model can be made of.
  """
  from sam3lt_jax.model import Sam3LiteText

  model = Sam3LiteText(config, dtype=dtype, param_dtype=param_dtype)
  try:
    return model, abstract_leaves(model)
  except Exception as e:  # JAX and Flax have one each for what does not fit together
    raise CheckpointError(f"no model can be made of this configuration: {reason(e)}") from e


def abstract_leaves(model: Sam3LiteText) -> dict[str, Any]:
  """Leaf path -> `jax.ShapeDtypeStruct` of every variable of `model`; nothing is computed."""
  return dict(_abstract_leaves(model.config, jnp.dtype(model.param_dtype)))


@functools.lru_cache(maxsize=32)
def _abstract_leaves(config: Sam3LiteTextConfig, param_dtype: Any) -> dict[str, Any]:
  from sam3lt_jax.model import Sam3LiteText

  model = Sam3LiteText(config, param_dtype=param_dtype)
  return engine.flatten(jax.eval_shape(model.init_variables, jax.random.key(0)))


def open_tensors(
  path: str, detect: Callable[..., Any], make: Callable[..., tuple[Any, dict[str, Any]]]
) -> tuple[Any, dict[str, Any], tuple[Callable, int]]:
  """A file or directory of PyTorch tensors: (model, its leaves as shapes, (how to read them, bytes of them)).

  Args:
    detect: (tensors, path) -> layout.
    make: (layout, leaf path -> shape in the file) -> (model, its leaves).
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(readable(path))
    tensors = stack.enter_context(readers.open_tensors(path))
    layout = detect(tensors, path)
    filled, _ = engine.assign(layout, {key: t.shape for key, t in tensors.items()})
    model, target = make(layout, {leaf: source.shape for leaf, source in filled.items()})
    held = stack.pop_all()  # stays open until the weights are read

  def read(place, device, advance):
    with held:
      return engine.load_tensors(layout, tensors, target, where=path, place=place, advance=advance)

  return model, target, (read, sum(tensors[key].nbytes for key in {s.key for s in filled.values()}))


def _of_tensors(
  path: str,
  config: Sam3LiteTextConfig | None,
  profile: Profile | None,
  dtypes: dict[str, Any],
  layout: Layout,
  shapes: dict[str, Any],
) -> tuple[Sam3LiteText, dict[str, Any]]:
  given = config is not None
  if given and config.text.fused:
    raise CheckpointError(
      "config.text.fused: this checkpoint holds RepMixer blocks as trained; load it unfused and call "
      "model.fuse"
    )
  if config is None and layout.name == "transformers":
    # An original file is complete in itself; a config.json beside it may be any other model's.
    config = _directory_config(path, profile)
  if config is not None:
    infer.check_variant(config, shapes, layout.text_kind, path, given=given)
    infer.check_counts(config, shapes, path)
    return build(config, **dtypes)
  config = infer.released_config(shapes, layout.text_kind, path, profile or layout.name)
  model, target = build(config, **dtypes)
  infer.check_released(config, shapes, {leaf: tuple(x.shape) for leaf, x in target.items()}, path)
  return model, target


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
  """A file that may not be read is said so in one sentence."""
  try:
    yield
  except PermissionError as e:
    raise CheckpointError(f"{e.filename or path} cannot be read: permission denied") from e


def sizes_file(path: str) -> str | None:
  """The `config.json` in a directory, or beside a file in transformers' layout."""
  directory = path if os.path.isdir(path) else os.path.dirname(path)
  file = os.path.join(directory, "config.json")
  if not os.path.lexists(file):
    return None
  readers.check_file(file)
  return file


def _directory_config(path: str, profile: Profile | None) -> Sam3LiteTextConfig | None:
  file = sizes_file(path)
  return None if file is None else Sam3LiteTextConfig.from_json(file, profile)


def checked_dtypes(dtype: Any, param_dtype: Any) -> dict[str, Any]:
  """What layers compute in and parameters are stored in. Raises ValueError for another kind."""
  found = {}
  for name, value in (("dtype", dtype), ("param_dtype", param_dtype or jnp.float32)):
    with contextlib.suppress(TypeError):
      found[name] = jnp.dtype(value)
    if name not in found or found[name].name not in _DTYPES:
      raise ValueError(f"{name} must be one of {', '.join(_DTYPES)}, got {value!r}")
  return found
