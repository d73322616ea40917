"""Compilation while the weights are read."""

import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax import Predictor, from_pretrained
from sam3lt_jax.checkpoints import open_checkpoint
from sam3lt_jax.programs import Ahead, jit

PHOTO = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)


@pytest.fixture
def compiled(caplog):
  """What JAX compiled from now on, by name."""
  caplog.set_level(logging.WARNING, logger="jax")
  jax.config.update("jax_log_compiles", True)  # in every thread
  yield lambda: [m.split()[1] for m in caplog.messages if m.startswith("Compiling jit(")]
  jax.config.update("jax_log_compiles", False)


NAMES = {"jit(encode)", "jit(read)", "jit(detect)"}


@pytest.mark.parametrize(
  "source", [pytest.param("random:tiny", marks=pytest.mark.full), "shapes"]
)  # text encoders with and without RepMixer blocks
def test_a_first_call_compiles_nothing_more(source, compiled, caplog):
  predictor = Predictor.from_pretrained(source)
  predictor.engine._ahead.wait()
  assert set(compiled()) >= NAMES
  caplog.clear()
  predictor(PHOTO, text="shape")
  assert not set(compiled()) & NAMES
  assert {name: len(made) for name, made in predictor.engine.programs().items()} == dict.fromkeys(
    ("encode", "read", "detect"), 1
  )


@pytest.mark.full  # 3 s
def test_it_can_be_left_out_and_changes_nothing(compiled):
  plain = Predictor.from_pretrained("random:tiny-s1", compile_ahead=False)
  assert not set(compiled()) & NAMES
  ahead = Predictor.from_pretrained("random:tiny-s1")
  for a, b in zip(jax.tree.leaves(plain.variables), jax.tree.leaves(ahead.variables), strict=True):
    np.testing.assert_array_equal(a, b)
  a, b = (p(PHOTO, text="shape", threshold=0.0) for p in (plain, ahead))
  np.testing.assert_array_equal(a.scores, b.scores)
  np.testing.assert_array_equal(a.boxes, b.boxes)


def test_the_model_is_known_before_its_weights():
  opened = open_checkpoint("random:tiny")
  model, variables = from_pretrained("random:tiny")
  assert opened.model == model and opened.random
  assert opened.shapes == jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
  for a, b in zip(jax.tree.leaves(opened.load()), jax.tree.leaves(variables), strict=True):
    np.testing.assert_array_equal(a, b)


def test_no_image_is_encoded_on_a_cpu_while_something_compiles(monkeypatch):
  """The two together need more memory than one after the other."""
  held, order = threading.Event(), []

  def wait(self):
    held.wait(60)
    order.append("compiled")

  monkeypatch.setattr(Ahead, "wait", wait)
  predictor = Predictor.from_pretrained("random:tiny")
  image = threading.Thread(target=lambda: (predictor.set_image(PHOTO), order.append("encoded")))
  image.start()
  image.join(0.2)
  assert order == []
  held.set()
  image.join()
  assert order == ["compiled", "encoded"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="an option of XLA for CPUs")
def test_loops_do_not_hold_their_results_all_at_once():
  """Ten loops one after the other need the memory of about one."""

  def loops(x):
    for i in range(10):
      x = jax.lax.map(lambda row, i=i: jnp.tanh(row @ row.T @ row + i), x)
    return x

  x = jax.ShapeDtypeStruct((16, 64, 64), jnp.float32)
  plain, ours = (f(loops).lower(x).compile().memory_analysis().temp_size_in_bytes for f in (jax.jit, jit))
  assert ours < plain / 3 and ours < 3 * 4 * x.size
