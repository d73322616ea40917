"""The public API under a type checker (pyright's basic rules): what a user's editor sees."""

import ast
import json
import pathlib
import shutil
import subprocess
import sys

import pytest

import sam3lt_jax

ROOT = pathlib.Path(__file__).parents[2]
USER = pathlib.Path(__file__).with_name("user.py")
CHECKED = [
  "sam3lt_jax/__init__.py",
  "sam3lt_jax/predictor.py",
  "sam3lt_jax/devices.py",
  "sam3lt_jax/errors.py",
]


def checker():
  """basedpyright is pyright with node in its wheels."""
  beside = pathlib.Path(sys.executable).with_name("basedpyright")
  return str(beside) if beside.exists() else shutil.which("basedpyright")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """What it says of user.py and of the API's own files: [(file, line, message)]."""
  if checker() is None:
    pytest.skip("no basedpyright: pip install '.[test]'")
  config = tmp_path_factory.mktemp("pyright") / "pyrightconfig.json"
  settings = {
    "include": [str(USER), *(str(ROOT / name) for name in CHECKED)],
    "typeCheckingMode": "basic",
    "reportInvalidTypeForm": "none",  # jax.Device is a variable to it
    "reportUnsupportedDunderAll": "none",
    "extraPaths": [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))],
  }
  config.write_text(json.dumps(settings))
  command = [checker(), "--project", str(config), "--outputjson", "--pythonpath", sys.executable]
  done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
  said = json.loads(done.stdout)["generalDiagnostics"]
  return [(one["file"], one["range"]["start"]["line"] + 1, one["message"]) for one in said]


def test_a_users_script(found):
  """Mistakes are found where the script says so, each with its message, and nowhere else."""
  lines = USER.read_text(encoding="utf-8").splitlines()
  wanted = {i: line.split("# error: ")[1] for i, line in enumerate(lines, 1) if "# error: " in line}
  assert len(wanted) > 8
  said = {}
  for file, line, message in found:
    if file == str(USER):
      said.setdefault(line, []).append(message)
  assert said.keys() == wanted.keys(), said
  for line, message in wanted.items():
    assert any(message in one for one in said[line]), (line, said[line])


def test_the_api_s_own_files(found):
  assert [one for one in found if one[0] != str(USER)] == []


def test_checkers_see_every_public_name():
  """The names that are imported for checkers alone are those that are resolved on first use, from there."""
  tree = ast.parse((ROOT / "sam3lt_jax/__init__.py").read_text(encoding="utf-8"))
  (block,) = [node for node in tree.body if isinstance(node, ast.If)]
  seen = {alias.asname: node.module for node in block.body for alias in node.names}
  assert seen == {name: f"sam3lt_jax.{module}" for name, module in sam3lt_jax._EXPORTS.items()}
  assert (ROOT / "sam3lt_jax/py.typed").exists()
