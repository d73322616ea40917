"""The package as a whole: importing it is cheap, its names exist, its files are short, its wheel is clean."""

import ast
import graphlib
import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

import sam3lt_jax

ROOT = pathlib.Path(__file__).parent.parent
LIBRARY = ROOT / "sam3lt_jax"


def fresh(code):
  """Runs code in a new interpreter and returns what it printed."""
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout.split()


def test_import_is_fast_and_light():
  """Under two seconds of work, and without any of the heavy packages, so also without a device."""
  code = (
    "import sys, time; start = time.process_time(); import sam3lt_jax; print(time.process_time() - start);"
    "print(*[m for m in ('jax', 'jaxlib', 'flax', 'torch', 'orbax', 'transformers', 'tokenizers',"
    " 'huggingface_hub', 'pycocotools', 'matplotlib', 'PIL') if m in sys.modules])"
  )
  runs = [fresh(code) for _ in range(3)]
  assert min(float(run[0]) for run in runs) < 2.0
  assert all(run[1:] == [] for run in runs), f"imported with the package: {runs[0][1:]}"


def test_using_every_name_starts_no_device_and_no_torch():
  code = (
    "import sam3lt_jax, sys; [getattr(sam3lt_jax, n) for n in sam3lt_jax.__all__];"
    "import jax._src.xla_bridge as b; print(len(b._backends), 'torch' in sys.modules)"
  )
  assert fresh(code) == ["0", "False"]


def test_every_public_name_resolves():
  assert len(set(sam3lt_jax.__all__)) == len(sam3lt_jax.__all__)
  for name in sam3lt_jax.__all__:
    assert getattr(sam3lt_jax, name) is not None
    assert name in dir(sam3lt_jax)
  with pytest.raises(AttributeError, match="no attribute 'Sam4'"):
    _ = sam3lt_jax.Sam4


def test_public_names_are_documented():
  for name in set(sam3lt_jax.__all__) - {"__version__"}:
    assert (getattr(sam3lt_jax, name).__doc__ or "").strip(), f"{name} has no docstring"


def sources(*folders):
  return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize(
  "file", sources("sam3lt_jax", "convert", "examples"), ids=lambda f: str(f.relative_to(ROOT))
)
def test_a_file_can_be_read_in_one_sitting(file):
  """One idea a file: pieces that are always read together are not split to stay short."""
  source = file.read_text(encoding="utf-8")
  assert source.count("\n") <= (400 if file.parent.name in ("nn", "ops") else 600)
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef):
      length = node.end_lineno - node.lineno + 1
      documented = len((ast.get_docstring(node) or "").splitlines())
      assert length - documented <= 80, f"{node.name} has {length - documented} lines"
  assert ast.get_docstring(ast.parse(source)) or not source, "no module docstring"


def top_level(tree):
  """What runs when the module is imported: statements outside functions, and not for type checkers only."""
  todo = list(tree.body)
  while todo:
    node = todo.pop()
    yield node
    if isinstance(node, (ast.Try, ast.With, ast.ClassDef)):
      todo += node.body
    elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
      todo += node.body + node.orelse


def module_imports(tree):
  """Packages imported when the module is."""
  found = set()
  for node in top_level(tree):
    if isinstance(node, ast.Import):
      found |= {alias.name.partition(".")[0] for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and not node.level:
      found.add(node.module.partition(".")[0])
  return found


HEAVY = {"torch", "torchvision", "transformers", "tensorflow", "cv2"}


def test_torch_is_never_imported_with_a_module():
  for file in sources("sam3lt_jax"):
    heavy = module_imports(ast.parse(file.read_text(encoding="utf-8"))) & HEAVY
    assert not heavy, f"{file.relative_to(ROOT)} imports {heavy}"


def test_layers_import_downwards_only():
  """ops <- nn <- model <- predictor; config imports nothing of ours; processing and data see no nn."""
  allowed = {
    "ops": {"ops"},
    "nn": {"ops", "nn"},
    "errors.py": set(),
    "storage.py": {"errors"},
    "config.py": {"config_schema", "errors"},
    "config_schema.py": {"config"},
    "processing": {"config", "processing", "ops", "errors"},
    "data": {"config", "processing", "data", "errors"},
    "fusing.py": {"config", "model"},
    "features.py": set(),
    "model.py": {"config", "features", "nn", "ops", "fusing"},
    "programs.py": {"ops"},
    "phrase_table.py": {"parallel", "processing", "programs"},
    "kept.py": {"ops", "processing", "programs"},
    "engine.py": {
      "config",
      "features",
      "kept",
      "model",
      "parallel",
      "phrase_table",
      "processing",
      "programs",
      "errors",
      "ops",
      "stages",
      "tracker",
    },
    "stages.py": {"features", "model", "ops", "processing", "tracker"},
    "tracker.py": {"config", "features", "nn", "ops"},
    "interactive.py": {"engine", "features", "predictor", "processing"},  # the last in a function
    "devices.py": {"errors", "ops"},
    "predictor.py": {
      "checkpoints",
      "config",
      "devices",
      "engine",
      "errors",
      "everything",
      "features",
      "interactive",
      "kept",
      "model",
      "processing",
      "tracker",
    },
    "video": {
      "checkpoints",
      "config",
      "data",
      "engine",
      "errors",
      "features",
      "kept",
      "ops",
      "parallel",
      "predictor",
      "processing",
      "programs",
      "storage",
      "tracker",
      "video",
    },
  }
  for place, wanted in allowed.items():
    path = LIBRARY / place
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
      for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sam3lt_jax"):
          parts = node.module.split(".")[1:2] or [alias.name for alias in node.names]
          allowed_here = wanted | ({"checkpoints", "data"} if place == "processing" else set())
          assert set(parts) <= allowed_here, f"{file.relative_to(ROOT)} imports {node.module}"


def test_no_two_files_import_each_other():
  """Nor does a ring of them, of what is imported with a module."""
  dotted = lambda f: ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")  # noqa: E731
  files = {dotted(f): f for f in sources("sam3lt_jax")}
  needs = {}
  for module, file in files.items():
    found = set()
    for node in top_level(ast.parse(file.read_text(encoding="utf-8"))):
      if isinstance(node, ast.ImportFrom) and not node.level:
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name if name in files else node.module for name in inside}
    needs[module] = found & files.keys() - {module, "sam3lt_jax"}
  assert len(list(graphlib.TopologicalSorter(needs).static_order())) >= len(needs)  # CycleError names a ring


def test_no_path_of_a_machine_in_the_sources():
  for file in sources("sam3lt_jax", "convert", "examples"):
    source = file.read_text(encoding="utf-8")
    for folder in ("work", "root", "home"):
      assert f"/{folder}/" not in source, f"{file.relative_to(ROOT)} names a folder of some machine"


def test_the_citation_is_of_this_version():
  cff = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
  assert f"\nversion: {sam3lt_jax.__version__}\n" in cff and f'version = "{sam3lt_jax.__version__}"' in (
    ROOT / "pyproject.toml"
  ).read_text(encoding="utf-8")


@pytest.mark.full
def test_wheel_holds_the_library_and_nothing_else(tmp_path):
  pytest.importorskip("build")
  pytest.importorskip("hatchling")
  command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  (wheel,) = tmp_path.glob("*.whl")
  names = zipfile.ZipFile(wheel).namelist()
  info = f"sam3lt_jax-{sam3lt_jax.__version__}.dist-info"
  assert {name.partition("/")[0] for name in names} == {"sam3lt_jax", info}
  files = [f for f in LIBRARY.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
  assert {name for name in names if name.startswith("sam3lt_jax/")} == {
    str(f.relative_to(ROOT)) for f in files
  }
  assert any(name.endswith("licenses/LICENSE") for name in names)
  assert any(name.endswith("licenses/sam3lt_jax/assets/NOTICE") for name in names)
  # It imports from where it lies, without the checkout.
  code = "import sam3lt_jax; print(sam3lt_jax.__file__, sam3lt_jax.Profile.original().name)"
  env = os.environ | {"PYTHONPATH": str(wheel)}
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
  )
  assert wheel.name in done.stdout and "original" in done.stdout
