"""Stand-ins for gcloud, kubectl, sbatch and others, which record how they were called."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]
_STAND_IN = """\
  #!{python}
  import json, os, shutil, sys
  name, argv, record = os.path.basename(sys.argv[0]), sys.argv[1:], {record!r}
  entry = {{"program": name, "argv": argv, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}}
  if "-f" in argv and "-" in argv:
    entry["stdin"] = sys.stdin.read()
  if "scp" in argv:
    shutil.copyfile(argv[argv.index("scp") + 1], os.path.join(record, "sent.tar.gz"))
  with open(os.path.join(record, "calls.jsonl"), "a") as f:
    f.write(json.dumps(entry) + "\\n")
  for i, (words, answers) in enumerate(json.load(open(os.path.join(record, "answers.json")))):
    if all(w in [name, *argv] for w in words):
      count = os.path.join(record, f"count_{{i}}")
      n = int(open(count).read()) if os.path.exists(count) else 0
      open(count, "w").write(str(n + 1))
      code, text = answers[min(n, len(answers) - 1)]
      print(text)
      sys.exit(code)
"""


@dataclasses.dataclass
class Run:
  """How a script ended: exit code, output, and what it called."""

  code: int
  out: str
  err: str
  calls: list[dict]

  def commands(self) -> list[str]:
    """The verbs called, in order: "tpu-vm create", "kubectl apply", ..."""
    names = []
    for call in self.calls:
      words = [w for w in call["argv"] if not w.startswith("-")]
      names.append(" ".join(words[2:4]) if call["program"] == "gcloud" else call["program"])
    return names


@pytest.fixture
def script(tmp_path):
  """script(name, *arguments, answers=..., **variables) runs tpu/<name> among stand-ins.

  `answers` is a list of (words of a call, [(exit code, output), ...] one after the other, the last repeated).
  """
  programs, record = tmp_path / "bin", tmp_path / "record"
  programs.mkdir()
  record.mkdir()
  for name in ("gcloud", "kubectl", "sbatch", "srun", "uv", "gpu-python"):
    path = programs / name
    path.write_text(textwrap.dedent(_STAND_IN).format(python=sys.executable, record=str(record)))
    path.chmod(0o755)

  def run(name, *arguments, answers=(), folder=ROOT / "tpu", **variables) -> Run:
    (record / "answers.json").write_text(json.dumps(list(answers)))
    keep = {k: os.environ[k] for k in ("LANG", "LC_ALL") if k in os.environ}
    path = f"{programs}:{os.path.dirname(sys.executable)}:/usr/bin:/bin"
    env = keep | {"PATH": path, "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "POLL": "0"}
    done = subprocess.run(
      ["bash", str(folder / name), *arguments],
      env=env | {k: str(v) for k, v in variables.items()},
      capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    calls = record / "calls.jsonl"
    entries = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
    return Run(done.returncode, done.stdout, done.stderr, entries)

  run.record = record
  return run
