"""Compilation while the weights are read."""

import concurrent.futures
import logging
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax import Predictor, from_pretrained
from sam3lt_jax import predictor as predictor_module
from sam3lt_jax.programs import Program, jit, shapes_of

PHOTO = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)


@pytest.fixture
def compiled(caplog):
  """What JAX compiled from now on, by name."""
  caplog.set_level(logging.WARNING, logger="jax")
  jax.config.update("jax_log_compiles", True)  # in every thread
  yield lambda: [m.split()[1] for m in caplog.messages if m.startswith("Compiling jit(")]
  jax.config.update("jax_log_compiles", False)


NAMES = {"jit(encode_image)", "jit(encode_text)", "jit(detect)"}


@pytest.mark.parametrize(
  "source", ["random:tiny", "shapes"]
)  # text encoders with and without RepMixer blocks
def test_a_first_call_compiles_nothing_more(source, compiled, caplog):
  predictor = Predictor.from_pretrained(source)
  phrases = predictor.phrases
  for program in (predictor._encode_image, phrases.programs[phrases.lengths[0]], predictor._detect):
    assert program._awaited and all(future.exception() is None for future in program._awaited)
  assert set(compiled()) >= NAMES
  caplog.clear()
  predictor(PHOTO, text="shape")
  assert not set(compiled()) & NAMES


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
  seen = []
  model, variables = from_pretrained("random:tiny", model_known=lambda *known: seen.append(known))
  ((early, shapes),) = seen
  assert early == model and shapes == shapes_of(variables)


def test_settings_go_along_and_failures_show_in_the_call():
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    product = Program(lambda x: x @ x)
    with jax.default_matmul_precision("highest"):
      shape = product.compile_in(executor, lambda: (jnp.ones((2, 2)),))()
      assert shape == jax.ShapeDtypeStruct((2, 2), jnp.float32)
      np.testing.assert_array_equal(product(np.eye(2, dtype=np.float32)), np.eye(2))
    assert product.compiled_for() == 1
    wrong = Program(lambda x: x @ jnp.ones((3, 3)))
    early = wrong.compile_in(executor, lambda: (jnp.ones((2, 2)),))
    with pytest.raises(TypeError):
      early()
    with pytest.raises(TypeError, match="dot_general"):
      wrong(jnp.ones((2, 2)))


def test_no_image_is_encoded_while_something_compiles(monkeypatch):
  """The two together need more memory than one after the other."""
  held, order = threading.Event(), []

  def last():
    held.wait(60)
    order.append("compiled")

  monkeypatch.setattr(predictor_module, "return_freed_memory", last)
  predictor = Predictor.from_pretrained("random:tiny")
  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    image = executor.submit(lambda: (predictor.set_image(PHOTO), order.append("encoded")))
    done, _ = concurrent.futures.wait([image], timeout=0.2)
    assert not done
    held.set()
    image.result()
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
