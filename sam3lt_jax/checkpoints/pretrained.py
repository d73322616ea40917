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
from sam3lt_jax.config import Profile, Sam3LiteTextConfig
from sam3lt_jax.keywords import explained

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
  opened = open_checkpoint(
    source, config, profile, dtype, param_dtype, revision=revision, token=token, cache_dir=cache_dir,
    local_files_only=local_files_only, seed=seed,
  )  # fmt: skip
  return opened.model, opened.load(device=device, progress=progress)


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
  _read: Callable[[Callable[[np.ndarray], Any], Any, _Bar], dict[str, Any]]

  def load(self, device: Any = None, progress: bool = True) -> Variables:
    """Reads the weights; see `from_pretrained`."""
    device = devices.find(device) if isinstance(device, str) else device
    with _Bar(f"loading {self._title}", progress) as bar:
      return engine.unflatten(self._read(lambda array: jax.device_put(array, device), device, bar))


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
  if found.kind == "random":
    config = config or random_init.RANDOM_CONFIGS[path]().replace(profile=profile or "original")
    model, target = build(config, **dtypes)

    def read(place, device, bar):
      bar.start(random_init.total_bytes(target))
      return random_init.random_leaves(target, seed, place, bar.advance)

  elif found.kind == "orbax":
    config = config or _own_config(path, profile)
    stored = orbax_io.stored_shapes(path)
    infer.check_counts(config, {leaf: x.shape for leaf, x in stored.items()}, path)
    model, target = build(config, **dtypes)

    def read(place, device, bar):
      return orbax_io.load(path, target, device)

  else:
    model, target, read = _open_tensors(path, config, profile, dtypes)
  title = os.path.basename(os.fspath(source).rstrip(os.sep))
  return Opened(model, engine.unflatten(target), path, found.kind == "random", title, read)


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


def _open_tensors(
  path: str, config: Sam3LiteTextConfig | None, profile: Profile | None, dtypes: dict[str, Any]
) -> tuple[Sam3LiteText, dict[str, Any], Callable]:
  """(model, its leaves as shapes, how to read them) of a file or directory of PyTorch tensors."""
  if config is not None and config.text.fused:
    raise CheckpointError(
      "config.text.fused: this checkpoint holds RepMixer blocks as trained; load it unfused and call "
      "model.fuse"
    )
  with contextlib.ExitStack() as stack:
    stack.enter_context(readable(path))
    tensors = stack.enter_context(readers.open_tensors(path))
    layout = tables.detect(tensors, path)
    filled, _ = engine.assign(layout, {key: t.shape for key, t in tensors.items()})
    shapes = {leaf: source.shape for leaf, source in filled.items()}
    given = config is not None
    if config is None:
      # An original file is complete in itself; a config.json beside it may be any other model's.
      config = _directory_config(path, profile) if layout.name == "transformers" else None
    if config is None:
      config = infer.released_config(shapes, layout.text_kind, path, profile or layout.name)
      model, target = build(config, **dtypes)
      infer.check_released(config, shapes, {leaf: tuple(x.shape) for leaf, x in target.items()}, path)
    else:
      infer.check_variant(config, shapes, layout.text_kind, path, given=given)
      infer.check_counts(config, shapes, path)
      model, target = build(config, **dtypes)
    opened = stack.pop_all()  # stays open until the weights are read

  def read(place, device, bar):
    with opened:
      bar.start(sum(t.nbytes for t in tensors.values()))
      return engine.load_tensors(layout, tensors, target, where=path, place=place, advance=bar.advance)

  return model, target, read


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


def _own_config(directory: str, profile: Profile | None) -> Sam3LiteTextConfig:
  config = _directory_config(directory, profile)
  if config is None:
    raise CheckpointError(f"{directory} has no config.json beside its variables; pass config=")
  return config


def checked_dtypes(dtype: Any, param_dtype: Any) -> dict[str, Any]:
  """What layers compute in and parameters are stored in. Raises ValueError for another kind."""
  return {"dtype": _dtype("dtype", dtype), "param_dtype": _dtype("param_dtype", param_dtype or jnp.float32)}


def _dtype(name: str, value: Any) -> Any:
  try:
    dtype = jnp.dtype(value)
  except TypeError:
    dtype = None
  if dtype is None or dtype.name not in _DTYPES:
    raise ValueError(f"{name} must be one of {', '.join(_DTYPES)}, got {value!r}")
  return dtype


class _Bar:
  """A progress bar in bytes that shows itself only when the work takes long."""

  def __init__(self, description: str, enabled: bool):
    self._description, self._enabled, self._bar = description, enabled, None

  def __enter__(self) -> _Bar:
    return self

  def __exit__(self, *exc: object) -> None:
    if self._bar is not None:
      self._bar.close()

  def start(self, total: int) -> None:
    from tqdm import tqdm

    self._bar = tqdm(
      total=total, desc=self._description, unit="B", unit_scale=True, delay=_QUIET_SECONDS, leave=False,
      disable=not self._enabled,
    )  # fmt: skip

  def advance(self, count: int) -> None:
    self._bar.update(count)
