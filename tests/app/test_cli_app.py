"""`sam3lt app`: what it says before there is a page."""

import contextlib
import socket
import sys
import types

import pytest

from sam3lt_jax import cli
from sam3lt_jax.cli import app


@pytest.fixture
def never(monkeypatch):
  """No model is loaded for a mistake in the arguments."""
  from sam3lt_jax.predictor import Predictor

  def load(*args, **kwargs):
    raise AssertionError("a model was loaded")

  monkeypatch.setattr(Predictor, "from_pretrained", load)


def mistake(capsys, *argv):
  assert cli.main(["app", *argv]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1, err
  return err


def test_a_port_in_use(capsys, never):
  with contextlib.closing(socket.socket()) as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    assert (
      mistake(capsys, "--port", str(port)) == f"sam3lt: error: --port {port} is in use; give another one\n"
    )


def test_an_address_that_cannot_be(capsys, never):
  assert "--port: must be a port, from 1 to 65535, got '65536'" in mistake(capsys, "--port", "65536")
  assert "--port: must be a port, from 1 to 65535, got 'x'" in mistake(capsys, "--port", "x")
  assert "--host 192.0.2.7 is no address of this machine" in mistake(capsys, "--host", "192.0.2.7")


def test_without_gradio(capsys, never, monkeypatch):
  monkeypatch.setitem(sys.modules, "gradio", None)
  monkeypatch.delitem(sys.modules, "sam3lt_jax.app.page", raising=False)
  monkeypatch.setattr(app, "_check_free", lambda host, port: None)
  assert "needs the package gradio: pip install 'sam3lt_jax[app]'" in mistake(capsys)


@pytest.mark.full  # 3 s
def test_arguments_reach_the_predictor(monkeypatch):
  pytest.importorskip("gradio")
  from sam3lt_jax.app import page
  from sam3lt_jax.predictor import Predictor

  seen = []

  def stop(blocks, host, port):
    raise KeyboardInterrupt

  def from_pretrained(source, **options):
    seen.append((source, options))
    return types.SimpleNamespace(running="CPU")

  monkeypatch.setattr(Predictor, "from_pretrained", from_pretrained)
  monkeypatch.setattr(page, "Page", lambda predictor, model, example: type("P", (), {"blocks": None}))
  monkeypatch.setattr(page, "launch", stop)
  monkeypatch.setattr(app, "_check_free", lambda host, port: None)
  for given, tracker in (
    ([], None),
    (["--tracker", "same"], True),
    (["--tracker", "facebook/sam3"], "facebook/sam3"),
  ):
    assert cli.main(["app", "--model", "x.pt", "--dtype", "bfloat16", *given]) == 130
    source, options = seen.pop()
    assert source == "x.pt" and options["dtype"] == "bfloat16" and options.get("tracker") == tracker
