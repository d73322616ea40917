"""The quick tests on other versions of Python, each with the newest releases of all that the package needs.

    python -m tests.matrix 3.11 3.12 3.13
    python -m tests.matrix 3.13 -- tests/test_predictor.py tests/test_cli.py

Each version (python3.12 on the PATH, or the path of an interpreter) gets a virtual environment in .matrix/,
which is kept and brought up to date, so that a second run is short. Comparisons with torch are left out. What
the classifiers of pyproject.toml name has passed here.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[1]
VERSIONS = """
import importlib.metadata, sys
names = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow", "grain"
print(sys.version.split()[0], *(f"{name} {importlib.metadata.version(name)}" for name in names))
"""


def test(python: str, selection: Sequence[str]) -> int:
  """The exit code of pytest under `python`; what was installed and its last line are printed."""
  folder = ROOT / ".matrix" / pathlib.Path(python).name
  mine = str(folder / "bin/python")
  subprocess.run([python, "-m", "venv", str(folder)], check=True)
  install = [mine, "-m", "pip", "install", "--quiet", "--upgrade", "--upgrade-strategy", "eager"]
  subprocess.run([*install, "-e", ".[test-core]"], cwd=ROOT, check=True)
  subprocess.run([mine, "-c", VERSIONS], check=True)
  tests = [mine, "-m", "pytest", "-q", "-m", "not full and not torch", "-p", "no:cacheprovider", *selection]
  return subprocess.run(tests, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}).returncode


def main(argv: Sequence[str]) -> int:
  cut = list(argv).index("--") if "--" in argv else len(argv)
  names, selection = argv[:cut], argv[cut + 1 :]
  pythons = [shutil.which(name) or shutil.which(f"python{name}") for name in names]
  if not names or None in pythons:
    print(
      f"usage: python -m tests.matrix 3.12 ... [-- pytest's arguments]; found: {pythons}", file=sys.stderr
    )
    return 2
  failed = [python for python in pythons if test(python, selection)]
  print(f"{len(pythons) - len(failed)} of {len(pythons)} versions passed", *failed)
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
