"""What an export's loader checks before anything in it runs; whole exports: tests/test_exporting.py."""

import hashlib
import json
import os
import py_compile
import random
import sys

import pytest

from sam3lt_jax import export_loader
from tests import fuzz
from tests.fuzz import check, json_file, mutate_bytes

FILES = {
  "loader.py": b"pass\n", "weights.safetensors": b"w", "vision.jaxexport": b"v", "tokenizer.json": b"{}",
  "vendor/NOTICE": b"n\n", "vendor/flatbuffers/__init__.py": b"x = 1\n",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "vendor" / "flatbuffers").mkdir(parents=True)
  for name, data in FILES.items():
    (tmp_path / name).write_bytes(data)
  files = {name: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in FILES.items()}
  manifest = {
    "format": "sam3lt_jax.export/2",
    "files": files,
    "parts": {"vision": {"file": "vision.jaxexport"}},
  }
  (tmp_path / "manifest.json").write_text(json.dumps(manifest))
  return tmp_path


def verify(folder):
  export_loader.check_files(folder, export_loader.read_manifest(folder)["files"])


def edit(folder, **changes):
  manifest = json.loads((folder / "manifest.json").read_text())
  (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def test_every_file_is_compared(folder):
  verify(folder)
  for name, data in FILES.items():
    (folder / name).write_bytes(data + b"#")
    with pytest.raises(ValueError, match=f"{name} is damaged: its SHA-256 is not the manifest's"):
      export_loader.load(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is in the manifest and not in the folder"):
      export_loader.load(folder)
    (folder / name).write_bytes(data)
  verify(folder)


@pytest.mark.parametrize("name", ["vendor/jax.py", "vendor/flatbuffers/compat.py", "more.py"])
def test_a_file_that_is_not_in_the_manifest(folder, name):
  (folder / name).write_bytes(b"print('hello')\n")
  with pytest.raises(ValueError, match=f"{name} is not in the manifest, so not of this export: remove it"):
    export_loader.load(folder)


def test_what_python_compiled_is_not_looked_at(folder):
  """It is not read either, see the next."""
  for place in ("__pycache__", "vendor/flatbuffers/__pycache__"):
    (folder / place).mkdir()
    (folder / place / "x.cpython-311.pyc").write_bytes(b"")
  verify(folder)


def test_the_vendored_code_runs_from_its_source(folder, monkeypatch):
  package = folder / "vendor" / "flatbuffers"
  source = package / "__init__.py"
  stat = source.stat()
  source.write_bytes(b"x = 2\n")
  py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
  source.write_bytes(b"x = 1\n")  # what lies compiled beside it says 2
  os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  for name in [name for name in sys.modules if name.partition(".")[0] == "flatbuffers"]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setattr(sys, "path", [str(folder / "vendor"), *sys.path])
  with pytest.raises(ValueError, match="its manifest does not fit its programs"):
    export_loader.load(folder)
  assert sys.modules["flatbuffers"].x == 1 and sys.pycache_prefix is None
  monkeypatch.delitem(sys.modules, "flatbuffers")


def test_a_program_that_was_not_compared_is_refused(folder):
  for parts in ({"vision": {"file": "../elsewhere.jaxexport"}}, {"vision": {}}, [], None):
    edit(folder, parts=parts)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: files must have a sha256 each"):
      export_loader.load(folder, verify=False)


def test_an_edited_manifest(folder):
  """As in `tests.fuzz`."""
  data, path = json.loads((folder / "manifest.json").read_text()), folder / "manifest.json"
  for seed in fuzz.cases({"manifest": ()}, fuzz.seconds(1), "manifest"):
    rng = random.Random(seed)
    if seed % 3:
      json_file(rng, path, data)
    else:
      path.write_bytes(mutate_bytes(rng, json.dumps(data).encode()))
    check(seed, lambda: verify(folder), ValueError, FileNotFoundError)


def test_phrases_that_were_not_exported():
  model = object.__new__(export_loader.Model)
  model.manifest = {"tokens": {"phrases": {"truck": {"ids": [1, 2], "mask": [True, True]}}}}
  ids, mask = model.phrases("truck", "truck")
  assert ids.shape == mask.shape == (2, 2)
  with pytest.raises(ValueError, match=r"'star': .* has 'truck'; make them with a tokenizer .* --phrases"):
    model.phrases("truck", "star")
  model.manifest["tokens"]["phrases"] = {}
  with pytest.raises(ValueError, match="which has none"):
    model.phrases("star")
