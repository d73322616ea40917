"""Many devices and many hosts: meshes, where arrays lie on them, and compiled train steps.

    mesh = make_mesh()                                  # every device on the axis "data"
    step = data_parallel(make_train_step(loss_fn, tx), mesh)
    state = step.place_state(state)
    frozen = step.place_frozen(frozen)
    state, metrics = step(state, frozen, step.place_batch(batch))

`training.loop.fit` does that. A batch is split over the axis "data"; parameters are copied to every device,
or split as `fsdp_sharding` says. `data_parallel` is `jax.jit` over a mesh and works across hosts;
`pmap_forward` is inference by `jax.pmap`, on the devices of one host.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sam3lt_jax.ops import target

Batch = Mapping[str, np.ndarray]


# -------------------------------------------------------------------- meshes and shardings


def make_mesh(data: int | None = None, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the axes "data", over which batches are split, and "model", over which parameters may be.

  Args:
    data, model: devices along each axis; data None: all there are, divided by `model`.
    devices: None: every device of every process.

  Raises:
    ValueError: the axes do not take up all devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  for name, size in (("data", data), ("model", model)):
    if size is not None and size < 1:
      raise ValueError(f"{name}={size!r}; accepted: 1 or more devices")
  if data is None:
    if len(devices) % model:
      raise ValueError(f"model={model} does not divide the {len(devices)} devices")
    data = len(devices) // model
  if data * model != len(devices):
    raise ValueError(f"data={data} x model={model} = {data * model} devices, but there are {len(devices)}")
  # Not Explicit axes, the default: window partition's reshape is not typed for them.
  return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def host_device() -> jax.Device | None:
  """The host's CPU as a JAX device, where a whole model waits of which the devices want a part only.

  None where JAX was told to leave the CPU out.
  """
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return None


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over "data"."""
  return NamedSharding(mesh, P("data"))


def fsdp_sharding(mesh: Mesh, tree: Any, axis: str | None = None) -> Any:
  """A tree of shardings that split every array along its largest dimension that the axis divides.

  Args:
    mesh: of `make_mesh`.
    tree: arrays or shapes: parameters, a `TrainState`, a teacher.
    axis: None: "model" if it has more than one device, else "data".

  Returns:
    The same tree of `NamedSharding`. Arrays that nothing divides, scalars and PRNG keys are replicated.
  """
  if axis is None:
    axis = "model" if mesh.shape["model"] > 1 else "data"
  if axis not in mesh.shape:
    raise ValueError(f"axis={axis!r}; accepted: {', '.join(mesh.shape)}")
  size = mesh.shape[axis]

  def sharding(x):
    shape = () if is_key(x) else np.shape(x)
    fitting = [i for i, n in enumerate(shape) if n and n % size == 0]
    if size == 1 or not fitting:
      return replicated(mesh)
    largest = max(fitting, key=lambda i: shape[i])
    return NamedSharding(mesh, P(*[axis if i == largest else None for i in range(len(shape))]))

  return jax.tree.map(sharding, tree)


def check_divides(batch_size: int, devices: int) -> None:
  """Raises ValueError unless `devices` divides `batch_size`."""
  if devices < 1 or batch_size % devices:
    near = max(batch_size // max(devices, 1), 1) * devices
    raise ValueError(
      f"a batch of {batch_size} rows cannot be split evenly over {devices} devices; take {near} rows, or"
      f" {math.gcd(batch_size, devices)} devices"
    )


def batch_rows(batch: Batch) -> int:
  """The length of the leading axis, which all arrays of a batch share. ValueError if they do not."""
  rows = {name: np.shape(x)[0] if np.ndim(x) else 0 for name, x in batch.items()}
  if len(set(rows.values())) != 1 or not all(rows.values()):
    raise ValueError(f"the arrays of a batch have one number of rows; here: {rows}")
  return next(iter(rows.values()))


# -------------------------------------------------------------------- compiled steps


class JitStep:
  """A train step compiled for a mesh: the batch is split over "data", sums over rows become collectives.

  step(state, frozen, batch) -> (state, metrics) takes what `place_*` return.
  """

  def __init__(self, step: Callable, mesh: Mesh, *, state_sharding: Any = None, donate: bool = True):
    """Args:
    step: (state, frozen, batch) -> (state, metrics), of `make_train_step`.
    mesh: of `make_mesh`.
    state_sharding: None: the state on every device; or `fsdp_sharding(mesh, state)`.
    donate: the new state takes the place of the old one, which cannot be used after the call.
    """
    state_sharding = replicated(mesh) if state_sharding is None else state_sharding
    self.mesh, self._state_sharding = mesh, state_sharding
    self._compiled = jax.jit(
      step,
      in_shardings=(state_sharding, None, batch_sharding(mesh)),
      out_shardings=(state_sharding, replicated(mesh)),
      donate_argnums=(0,) if donate else (),
    )

  def __call__(self, state: Any, frozen: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
    platform = self.mesh.devices.flat[0].platform
    with target.traced_for([platform], self.mesh if self.mesh.size > 1 else None):
      return self._compiled(state, frozen, batch)

  def place_state(self, state: Any) -> Any:
    """A copy of `state` on the mesh: donating it leaves the caller's arrays alone."""
    return _copy_to(state, self._shardings(state))

  def abstract_state(self, state: Any) -> Any:
    """Shapes, dtypes and shardings of `place_state(state)`, to restore a checkpoint into."""
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=s), state, self._shardings(state)
    )

  def place_frozen(self, frozen: Any) -> Any:
    """Weights that stay, on every device; those that lie on the mesh already (`fsdp_sharding`) stay there."""
    on_mesh = lambda x: isinstance(x, jax.Array) and getattr(x.sharding, "mesh", None) == self.mesh  # noqa: E731
    shardings = jax.tree.map(lambda x: x.sharding if on_mesh(x) else replicated(self.mesh), frozen)
    return jax.tree.map(lambda x, s: x if on_mesh(x) else jax.device_put(_to_host(x), s), frozen, shardings)

  def place_batch(self, batch: Batch) -> dict[str, jax.Array]:
    """This process's rows of a batch on its devices, as part of the whole batch of all processes.

    batch: name -> [rows of this process, ...]. Every process brings as many.

    Raises:
      ValueError: the rows cannot be split evenly over this process's devices, or differ between arrays.
    """
    here = [any(d.process_index == jax.process_index() for d in row) for row in self.mesh.devices]
    check_divides(batch_rows(batch), sum(here))
    split = batch_sharding(self.mesh)
    return {name: jax.make_array_from_process_local_data(split, np.asarray(x)) for name, x in batch.items()}

  def _shardings(self, state: Any) -> Any:
    if isinstance(self._state_sharding, jax.sharding.Sharding):
      return jax.tree.map(lambda _: self._state_sharding, state)
    return self._state_sharding


data_parallel = JitStep  # as one reads it where a step is made


def pmap_forward(
  model: Any, variables: Any, devices: Sequence[jax.Device] | None = None
) -> Callable[..., Any]:
  """The image model under `jax.pmap`: each device has a copy of the weights and takes its share of the rows.

      forward = pmap_forward(model, variables)
      output = forward(pixel_values, input_ids, attention_mask)

  `jax.jit` over `make_mesh` does the same and can split weights as well; `Predictor` and batch jobs use that.

  Args:
    model, variables: of `from_pretrained`.
    devices: None: all of this process.

  Returns:
    A function of pixel_values [R, S, S, 3], input_ids [R, T] and optionally attention_mask, input_boxes and
    input_boxes_labels, as `Sam3LiteText` takes them: row r of all is prompt r and its image. It returns the
    model's output with R rows, split over the devices, and raises ValueError if these do not divide R.
  """
  devices = jax.local_devices() if devices is None else list(devices)
  # A copy on each device, made once: weights that lie elsewhere, pmap would send again at every call.
  variables = jax.device_put(variables, replicated(Mesh(np.array(devices), ("data",))))
  mapped = jax.pmap(
    lambda variables, inputs: model.apply(variables, **inputs), in_axes=(None, 0), devices=devices
  )

  def forward(
    pixel_values, input_ids, attention_mask=None, *, input_boxes=None, input_boxes_labels=None
  ) -> Any:
    inputs = {
      "pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask,
      "input_boxes": input_boxes, "input_boxes_labels": input_boxes_labels,
    }  # fmt: skip
    inputs = {name: x for name, x in inputs.items() if x is not None}
    rows, n = batch_rows(inputs), len(devices)
    check_divides(rows, n)
    shares = {name: x.reshape(n, rows // n, *x.shape[1:]) for name, x in inputs.items()}
    return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), mapped(variables, shares))

  return forward


def is_key(x: Any) -> bool:
  """Whether `x`, an array or a shape, is a typed PRNG key."""
  return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _to_host(x: Any) -> Any:
  """numpy of what this process can read, which can be put anywhere."""
  return np.asarray(x) if not isinstance(x, jax.Array) or x.is_fully_addressable else x


def _copy_to(tree: Any, shardings: Any) -> Any:
  """Fresh arrays. `jax.device_put` may return the caller's own buffers, which a donated step then deletes."""
  leaves, structure = jax.tree.flatten(tree)
  keys = [jax.random.key_impl(x) if is_key(x) else None for x in leaves]
  host = [_to_host(x if impl is None else jax.random.key_data(x)) for x, impl in zip(leaves, keys)]

  def copy(arrays):
    as_given = [x if i is None else jax.random.wrap_key_data(x, impl=i) for x, i in zip(arrays, keys)]
    return jax.tree.map(jnp.copy, jax.tree.unflatten(structure, as_given))

  return jax.jit(copy, out_shardings=shardings)(host)


# -------------------------------------------------------------------- several hosts


def start_distributed(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  auto: bool = False,
  timeout_s: int = 300,
) -> None:
  """Joins this process with the others, before any other use of JAX. One process alone: nothing to do.

  Args:
    coordinator_address: "host:port" of process 0, the same in every process.
    num_processes, process_id: how many there are, and which this is (from 0).
    auto: let JAX find the three out, on TPU pods, Slurm, Open MPI and Kubernetes.
    timeout_s: how long to wait for the others.

  With no argument, the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID are read.

  Raises:
    ValueError: some of the three without the others, numbers out of range, JAX already in use, or the others
      did not come.
  """
  if not auto and coordinator_address is num_processes is process_id is None:
    coordinator_address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _integer("JAX_NUM_PROCESSES")
    process_id = _integer("JAX_PROCESS_ID")
  given = {
    "coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id,
  }  # fmt: skip
  missing = [name for name, value in given.items() if value is None]
  if num_processes == 1 or (len(missing) == 3 and not auto):
    return
  if missing and not auto:
    raise ValueError(f"several processes need {', '.join(given)}; {' and '.join(missing)} not given")
  if num_processes is not None and (num_processes < 1 or not 0 <= (process_id or 0) < num_processes):
    raise ValueError(f"process_id={process_id} of num_processes={num_processes}; accepted: 0 to one less")
  if coordinator_address is not None and ":" not in coordinator_address:
    raise ValueError(f"coordinator_address={coordinator_address!r}; accepted: host:port")
  try:
    jax.distributed.initialize(**given, initialization_timeout=timeout_s)
  except (RuntimeError, ValueError) as e:
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise ValueError(
      f"process {process_id} could not join the others at {coordinator_address}: {reason}"
    ) from e


def _integer(variable: str) -> int | None:
  text = os.environ.get(variable)
  if text is None:
    return None
  try:
    return int(text)
  except ValueError:
    raise ValueError(f"{variable}={text!r}; accepted: an integer") from None
