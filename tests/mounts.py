"""Real disks that are too small or read-only, where this machine lets us mount them."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def tmpfs(where: pathlib.Path, *options: str) -> Iterator[pathlib.Path]:
  """A file system in memory, mounted with `options` ("size=300k"); skips the test where it cannot be."""
  where.mkdir(exist_ok=True)
  if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid():
    pytest.skip("mounting a small disk needs root")
  command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(where)]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
  try:
    yield where
  finally:
    subprocess.run(["umount", "-l", str(where)], check=True)  # -l: a save that failed may hold a file open


def fill(disk: pathlib.Path, leave: int) -> pathlib.Path:
  """Writes a file that leaves so many bytes free; delete it to make room."""
  filler = disk / "filler"
  with open(filler, "wb") as f:
    os.posix_fallocate(f.fileno(), 0, shutil.disk_usage(disk).free - leave)
  return filler
