"""`sam3lt distill` at its end on a disk that is full: one line on stderr, whose advice is true."""

import os
import pathlib
import subprocess
import sys

import pytest

from sam3lt_jax import cli, from_pretrained
from sam3lt_jax.shapes.phrases import all_phrases
from tests import mounts

ROOT = pathlib.Path(__file__).parents[3]
# The command in a process of its own, without the bars that a slow machine shows, as in conftest.py.
COMMAND = """
import sys
from sam3lt_jax import cli
from sam3lt_jax.checkpoints import pretrained
from sam3lt_jax.cli import progress
progress.DELAY = pretrained._QUIET_SECONDS = 3600.0
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.full
def test_the_models_are_written_when_there_is_room(tmp_path, capsys):
  (tmp_path / "phrases.txt").write_text("\n".join(all_phrases()[:100]))
  with mounts.tmpfs(tmp_path / "disk", "size=64m") as small:
    run = small / "run"
    argv = (
      f"distill --teacher shapes --student tiny-s1 --context 8 --prompts {tmp_path}/phrases.txt"
      f" --held-out 0.2 --steps 4 --batch 16 --out {run}"
    ).split()
    assert cli.main(argv) == 0
    left = sorted(os.listdir(run))
    filler = mounts.fill(small, 300_000)
    command = [sys.executable, "-c", COMMAND, *argv]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert failed.returncode == 2
    assert failed.stderr == (
      "sam3lt: running on CPU, bfloat16, attention in blocks\n"
      f"sam3lt: error: {run}/model is not written: no space is left on its disk; the run is kept in"
      f" {run}/checkpoints/4: make room and start it again, which only writes its models\n"
    )
    assert sorted(os.listdir(run)) == left
    from_pretrained(run / "model", progress=False)  # the one of before
    filler.unlink()
    capsys.readouterr()
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "nothing is left to do: all 4 steps are done" in out and f"wrote {run}/model, " in out
