"""`sam3lt app`: a local page to find and point at things on a photo."""

from __future__ import annotations

import argparse
import contextlib
import errno
import socket
import threading

from sam3lt_jax.cli.arguments import add_model, add_tracker, load
from sam3lt_jax.cli.kinds import number
from sam3lt_jax.errors import ArgumentError, needed

_EPILOG = """\
examples:
  nothing downloaded: the bundled model, which knows drawn shapes; phrases and example boxes
    sam3lt app --model shapes
  phrases, boxes and clicks
    sam3lt app --model s0 --tracker facebook/sam3
  the tracker is in the model's own file
    sam3lt app --model sam3_litetext.pt --tracker same
  for others on the network, too
    sam3lt app --host 0.0.0.0 --port 8000
"""
PORT = 7860
_port = number(int, lambda n: 1 <= n <= 65535, "a port, from 1 to 65535")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.epilog = _EPILOG
  add_model(parser)
  add_tracker(parser)
  add = parser.add_argument
  add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
  add("--port", type=_port, default=PORT, metavar="N", help="port to listen at")


def run(args: argparse.Namespace) -> int:
  _check_free(args.host, args.port)
  with needed("the page needs", "gradio", "app"):
    from sam3lt_jax.app import page

  example = None
  if args.model == "shapes":  # which knows no photos
    from sam3lt_jax.cli.demo import SEED, SIDE
    from sam3lt_jax.shapes.scenes import SceneConfig, draw_scene

    example = "scene.png", draw_scene(SEED, SceneConfig(side=SIDE)).image
  made = page.Page(load(args), args.model, example)
  address = page.launch(made.blocks, args.host, args.port)
  print(f"{address}  (Ctrl-C stops it)", flush=True)
  threading.Event().wait()
  return 0


def _check_free(host: str, port: int) -> None:
  """Before a model is loaded for nothing. Raises ArgumentError."""
  try:
    kind, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with contextlib.closing(socket.socket(kind)) as s:
      s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      s.bind(where)
  except OSError as e:
    if e.errno == errno.EADDRINUSE:
      raise ArgumentError("port", f" {port} is in use; give another one") from e
    if e.errno == errno.EACCES:
      raise ArgumentError("port", f" {port} is not for every user; give one above 1023") from e
    raise ArgumentError("host", f" {host} is no address of this machine ({e.strerror})") from e
