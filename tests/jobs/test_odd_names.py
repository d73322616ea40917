"""Names as file systems allow them: line ends, escapes for the terminal, bytes that are no UTF-8."""

import os
import subprocess
import sys

from sam3lt_jax.errors import shown
from sam3lt_jax.jobs.ledger import ShardWriter
from sam3lt_jax.jobs.plan import Plan
from sam3lt_jax.jobs.sources import list_items
from tests.jobs import work
from tests.jobs.work import read_bytes

NAMES = ["a\nb.jpg", "\x1b]0;title\x07.jpg", os.fsdecode(b"\xff\xe9.jpg"), "\u202egpj.x.jpg"]


def test_what_is_shown():
  plain = "plain – 写真 \u00a0.jpg"
  assert shown(plain) == plain and shown(5) == "5"
  assert [shown(name) for name in NAMES] == [
    r"a\nb.jpg", r"\x1b]0;title\x07.jpg", r"\udcff\udce9.jpg", r"\u202egpj.x.jpg"
  ]  # fmt: skip


def test_a_job_has_them_as_they_are_and_status_shows_them_escaped(tmp_path):
  photos = tmp_path / "photos\x1b[2J"
  photos.mkdir()
  for name in NAMES:
    (photos / name).write_bytes(b"no image")
  items = list_items(photos)
  assert sorted(item.id for item in items) == sorted(NAMES)
  plan = Plan.open(tmp_path / "job\n\udcff", items, work.FINGERPRINT, 10)
  assert [read_bytes(item) for item in plan.shards[0].items] == [b"no image"] * len(NAMES)
  with ShardWriter(plan, plan.shards[0]) as writer:
    for kind, item in enumerate(plan.shards[0].items):
      writer.append([{"id": item.id, "uri": item.uri, "error": str(kind), "message": f"of {item.uri}"}])
    writer.commit()
  done = subprocess.run(
    [sys.executable, "-m", "sam3lt_jax", "status", plan.directory],
    env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
    capture_output=True,
  )
  out = done.stdout.decode("utf-8")
  assert done.returncode == 0, done.stderr.decode()
  assert all(f"{shown(name)}: of " in out for name in NAMES) and r"job\n\udcff" in out
  assert all(line.isprintable() for line in out.splitlines())
