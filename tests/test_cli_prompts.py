"""`sam3lt prompts`: what it prints and writes, with and without a model, and a user's mistakes."""

import json
import subprocess
import sys

import pytest

from sam3lt_jax import cli
from tests import tiny


@pytest.fixture
def phrases(tmp_path):
  path = tmp_path / "phrases.txt"
  sizes, colours, things = ("small", "large"), ("red", "blue", "old"), ("dog", "car", "cup", "hat")
  lines = [f"{s} {c} {t}" for s in sizes for c in colours for t in things]
  path.write_text("\n".join([*lines, "", "Small RED dog"]))
  return path


def test_table_and_files(phrases, tmp_path, capsys):
  out = tmp_path / "new" / "folder"
  assert cli.main(["prompts", str(phrases), "--out", str(out), "--context", "4"]) == 0
  printed = capsys.readouterr().out
  assert "24 distinct phrases (left out as duplicates: 1), profile original" in printed
  assert f"{phrases}: text, 26 records, 24 new" in printed and "skipped: 1 empty" in printed
  assert "      4   100.0%      0.0%   24 (100.00%)     20.00%" in printed
  assert printed.endswith(f"wrote {out}/report.json, {out}/report.png\n")
  report = json.loads((out / "report.json").read_text())
  assert report["lengths"]["mean"] == 5 and report["vocabulary"]["used"] == 9 and report["dimensions"] == {}
  assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_json_of_several_files(phrases, tmp_path, capsys):
  lvis = tmp_path / "lvis.json"
  lvis.write_text(
    json.dumps({"categories": [{"name": "baseball_bat", "synonyms": ["baseball_bat", "club"]}]})
  )
  argv = ["prompts", str(phrases), str(lvis), "--synonyms", "--profile", "transformers", "--json"]
  assert cli.main([*argv, "--out", str(tmp_path / "out")]) == 0
  report = json.loads(capsys.readouterr().out)
  assert report["phrases"] == 26 and report["profile"] == "transformers"
  assert [s["format"] for s in report["sources"]] == ["text", "COCO"]
  assert report == json.loads((tmp_path / "out" / "report.json").read_text())


def test_with_a_model(phrases, tmp_path, capsys):
  with tiny.hurry():
    argv = ["prompts", str(phrases), "--model", "random:tiny", "--out", str(tmp_path / "out"), "--json"]
    assert cli.main(argv) == 0
  out, err = capsys.readouterr()
  report = json.loads(out)
  assert report["model"] == "random:tiny" and "RANDOM WEIGHTS" in err
  assert report["dimensions"]["phrase features"]["points"] == 24


def test_without_matplotlib(phrases, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  assert cli.main(["prompts", str(phrases), "--out", str(tmp_path / "out")]) == 0
  out, err = capsys.readouterr()
  skipped, plots = err.splitlines()  # the first is what the library logs
  assert skipped.startswith("sam3lt: warning: ") and " skipped: " in skipped
  assert plots.startswith("sam3lt: warning: plots need the package matplotlib") and "report.png" not in out
  assert (tmp_path / "out" / "report.json").exists()


def test_no_model_needs_no_jax(phrases, tmp_path):
  """It tells of prompts on a machine without an accelerator or the time to start one."""
  code = (
    "import sys; from sam3lt_jax import cli; code = cli.main(sys.argv[1:]);"
    "print(code, 'jax' in sys.modules, file=sys.stderr)"
  )
  command = [sys.executable, "-c", code, "prompts", str(phrases), "--out", str(tmp_path / "out")]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
  assert done.stderr.splitlines()[-1] == "0 False"


@pytest.mark.parametrize(
  "argv, says",
  [
    ([], "the following arguments are required: FILE"),
    (["gone.txt"], "no such file of prompts: gone.txt"),
    (["{bad}"], "line 2, column 1: not valid JSON"),
    (["{phrases}", "--context", "1"], "--context: must be a number of tokens, at least 2, got '1'"),
    (["{phrases}", "--out", "{phrases}"], "is no directory; accepted: a directory"),
    (["{phrases}", "--model", "s00"], "did you mean"),
    (["{phrases}", "--model", "random:tiny", "--context", "17"], "17 tokens"),
  ],
)
def test_mistakes(argv, says, phrases, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "bad.json").write_text('["a",\n]')
  argv = [a.format(phrases=phrases, bad=tmp_path / "bad.json") for a in argv]
  with tiny.hurry():
    assert cli.main(["prompts", *argv]) == 2
  err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sam3lt: error")]
  assert len(err) == 1 and says in err[0]
