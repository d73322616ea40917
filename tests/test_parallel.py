import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from sam3lt_jax import parallel
from tests.training import toy

ROOT = pathlib.Path(__file__).parents[1]


def start(devices, *arguments):
  """A process of tests/parallel_worker.py with so many CPU devices."""
  return subprocess.Popen(
    [sys.executable, "-m", "tests.parallel_worker", *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def result(process, timeout=600):
  try:
    out, err = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    raise
  assert process.returncode == 0, err[-3000:]
  return json.loads(out.splitlines()[-1])


def assert_same(a, b):
  assert len(a["losses"]) == len(b["losses"]) == 6
  np.testing.assert_allclose(a["losses"], b["losses"], rtol=1e-5)
  np.testing.assert_allclose(a["values"], b["values"], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
  return result(start(8, "devices", tmp_path_factory.mktemp("eight")))


def test_one_device_learns(eight):
  assert eight["count"] == 8
  weights = eight["one"]["values"][:4]
  # Three updates with the rates 1e-6, 0.02 and 0.04, towards (1, 2, 3, 4); one of Adam is about its rate.
  assert all(0.04 < w < 0.0601 for w in weights)


@pytest.mark.parametrize("way", ["jit", "fsdp", "pmap", "fit", "fit_again"])
def test_eight_devices_are_one(eight, way):
  assert_same(eight[way], eight["one"])


def test_fsdp_splits_the_largest_dimension_that_divides(eight):
  # a [6, 16], b [16, 16], c [3] and a PRNG key.
  assert eight["specs"] == {
    "eight": {"a": [None, "data"], "b": ["data", None], "c": [], "d": []},
    "four_two": {"a": [None, "model"], "b": ["model", None], "c": [], "d": []},
  }


def test_a_teacher_that_is_split_stays_split(eight):
  assert eight["bytes"] == {"teacher": 64 * 8 * 4 // 2, "other": 64 * 8 * 4}


def test_a_step_is_traced_for_its_mesh(eight):
  assert eight["traced"] == [[["cpu"], None], [["cpu"], {"data": 4, "model": 2}]]


def test_a_batch_that_does_not_divide_is_one_sentence(eight):
  assert eight["error"] == (
    "a batch of 6 rows cannot be split evenly over 8 devices; take 8 rows, or 2 devices"
  )


@pytest.mark.full
def test_two_processes_are_one(tmp_path, eight):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  processes = [start(2, "process", tmp_path, port, number) for number in range(2)]
  first, second = [result(process) for process in processes]
  assert first["count"] == 4 and first["local"] == 2
  assert_same(first, eight["one"])
  assert first == second
  assert first["steps"][-1] == 6 and first["best"] in first["steps"]


# -------------------------------------------------------------------- in this process


def test_make_mesh_has_auto_axes_and_takes_up_all_devices():
  mesh = parallel.make_mesh(devices=jax.devices()[:1])
  assert dict(mesh.shape) == {"data": 1, "model": 1}
  assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
  for kwargs, message in [
    ({"data": 3}, "data=3 x model=1 = 3 devices, but there are 1"),
    ({"model": 2}, "model=2 does not divide the 1 devices"),
    ({"data": 0}, "data=0; accepted: 1 or more"),
  ]:
    with pytest.raises(ValueError, match=message):
      parallel.make_mesh(**kwargs, devices=jax.devices()[:1])


@pytest.mark.parametrize("rows, devices", [(8, 8), (8, 1), (16, 4)])
def test_what_divides_passes(rows, devices):
  parallel.check_divides(rows, devices)


def test_check_divides_says_what_would_fit():
  with pytest.raises(ValueError, match=r"a batch of 20 rows .* over 8 devices; take 16 rows, or 4 devices"):
    parallel.check_divides(20, 8)


def test_rows_of_a_batch_have_one_number():
  assert parallel.batch_rows({"a": np.zeros((3, 2)), "b": np.zeros(3)}) == 3
  for batch in ({"a": np.zeros(3), "b": np.zeros(2)}, {"a": np.float32(1)}, {"a": np.zeros((0, 2))}):
    with pytest.raises(ValueError, match=r"one number of rows; here: \{'a'"):
      parallel.batch_rows(batch)


def test_a_donated_step_leaves_the_callers_arrays():
  state, _ = toy.start()
  runner = toy.compiled()
  placed = runner.place_state(jax.tree.map(jax.numpy.asarray, state))
  batch = {name: x for name, x in toy.Data()[0].items() if name != "id"}
  runner(placed, runner.place_frozen({"noise": np.float32(0)}), runner.place_batch(batch))
  assert not np.any(state.params["dense"]["kernel"])  # deleted arrays raise here
  with pytest.raises(RuntimeError, match="deleted"):
    np.asarray(placed.params["dense"]["kernel"])


def test_a_state_without_average_or_statistics_is_placed_as_well():
  state = toy.start()[0].replace(ema=None, batch_stats={})
  mesh = parallel.make_mesh(1, devices=jax.devices()[:1])
  placed = parallel.data_parallel(lambda *a: a, mesh).place_state(state)
  assert placed.ema is None and placed.key.dtype == state.key.dtype
  assert toy.equal(placed, state)


def test_a_compiled_step_and_another_mesh_are_refused(tmp_path):
  class Other:
    """Stands for a mesh of other devices, of which this process has none."""

  with pytest.raises(ValueError, match="mesh: the step is compiled already"):
    toy.run(tmp_path, 2, step_fn=toy.compiled(), mesh=Other())


def test_one_process_starts_nothing(monkeypatch):
  for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
    monkeypatch.delenv(name, raising=False)
  parallel.start_distributed()
  parallel.start_distributed("127.0.0.1:1234", 1, 0)
  assert jax.process_count() == 1 and not jax.distributed.is_initialized()


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("127.0.0.1:1234",), "num_processes and process_id not given"),
    ((None, 2, 0), "coordinator_address not given"),
    (("127.0.0.1:1234", 2, 2), "process_id=2 of num_processes=2; accepted: 0 to one less"),
    (("127.0.0.1:1234", 0, 0), "process_id=0 of num_processes=0"),
    (("localhost", 2, 0), "coordinator_address='localhost'; accepted: host:port"),
    (("127.0.0.1:1234", 2, 1), "process 1 could not join the others at 127.0.0.1:1234: .*before any JAX"),
  ],
)
def test_starting_several_processes_wrongly(arguments, message):
  jax.devices()  # JAX is in use, which the last case is about
  with pytest.raises(ValueError, match=message):
    parallel.start_distributed(*arguments)


def test_the_environment_is_read(monkeypatch):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
  with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='two'; accepted: an integer"):
    parallel.start_distributed()
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  with pytest.raises(ValueError, match="process_id not given"):
    parallel.start_distributed()
