"""The pages, the site and the notebooks: links lead somewhere, what is shown runs."""

import pathlib
import re
import subprocess
import sys

import pytest

from sam3lt_jax import cli

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
  "README.md",
  "CONTRIBUTING.md",
  "tpu/README.md",
  *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]
NOTEBOOKS = sorted(ROOT.glob("examples/notebook_*.ipynb"))
_LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def read(page):
  return (ROOT / page).read_text(encoding="utf-8")


def anchors(text):
  """As mkdocs and the usual hosts make them of headings."""
  headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
  folder = (ROOT / page).parent
  for target, anchor in _LINK.findall(re.sub(r"`[^`]*`", "", read(page))):
    if "://" in target:
      continue
    path = folder / target if target else ROOT / page
    assert path.exists(), f"{page}: {target}"
    if anchor and path.suffix == ".md":
      assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {target}#{anchor}"


def test_the_readme_fits_on_two_screens():
  assert len(read("README.md").splitlines()) <= 125


def test_the_model_card_says_what_was_recorded():
  card, record = read("docs/model-card.md"), read("docs/shapes/README.md")
  cgf1, fresh = re.search(r"cgF1 ([\d.]+).* on (\d+)\s+scenes", card, re.DOTALL).groups()
  (row,) = (line.split("|") for line in record.splitlines() if line.startswith("| cgF1"))
  (head,) = (line.split("|") for line in record.splitlines() if line.startswith("| measure"))
  assert row[[fresh in name for name in head].index(True)].strip() == cgf1


@pytest.mark.full
def test_the_site_builds(tmp_path):
  pytest.importorskip("mkdocs_autorefs")
  build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
  done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  api = (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
  assert "Finds, scores and segments" in api and "to_yolo" in api


@pytest.mark.full
@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/phrases.md", "docs/checkpoints.md"])
def test_what_the_pages_show_runs(page, tmp_path, monkeypatch):
  """After `sam3lt demo`, whose scene they are about, with the bundled model that they name."""
  monkeypatch.chdir(tmp_path)
  assert cli.main(["demo"]) == 0
  names = {}
  for block in re.findall(r"```python\n(.*?)```", read(page), re.DOTALL):
    exec(compile(block, page, "exec"), names)
  assert len(names["results"]) >= 1


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_and_its_script_are_the_same(notebook):
  jupytext = pytest.importorskip("jupytext")
  pair = [jupytext.read(path) for path in (notebook, notebook.with_suffix(".py"))]
  cells = [[(c.cell_type, c.source, c.metadata.get("tags")) for c in one.cells] for one in pair]
  assert cells[0] == cells[1], f"jupytext --to ipynb {notebook.with_suffix('.py')}"
  assert not any(c.get("outputs") for c in pair[0].cells)


@pytest.mark.full
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path, monkeypatch):
  nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
  pytest.importorskip("ipykernel")
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  content = nbformat.read(notebook, as_version=4)
  assert sum("install" in c.metadata.get("tags", ()) for c in content.cells) == 1
  content.cells = [c for c in content.cells if "install" not in c.metadata.get("tags", ())]
  nbclient.NotebookClient(content, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
  shown = [out.get("data", {}) for c in content.cells for out in c.get("outputs", ())]
  assert any("data:image/jpeg;base64," in data.get("text/html", "") for data in shown)
  assert any("image/png" in data for data in shown)  # of matplotlib
