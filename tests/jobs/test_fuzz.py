"""A job's folder as others left it: each reader does what it can, or says in a sentence what is wrong.

As in `tests.fuzz`: cases are made from seeds, those in `KEPT` once found something.
"""

import functools
import hashlib
import json
import random
import shutil

import pytest

from sam3lt_jax.jobs.ledger import Busy, ShardWriter
from sam3lt_jax.jobs.merge import merge
from sam3lt_jax.jobs.plan import Plan
from sam3lt_jax.jobs.status import job_status, table
from tests import fuzz
from tests.fuzz import check, json_file, mutate_bytes, mutate_json
from tests.jobs import ledgers, work

KEPT = {"plan": (), "items": (), "shard": (), "digest": (87,), "part": ()}
cases = functools.partial(fuzz.cases, KEPT, fuzz.seconds(1) / 2)
NUMBER, SIZE = 10, 4


@pytest.fixture(scope="module")
def template(tmp_path_factory):
  """Shard 0 is done, with something found in it, shard 1 begun, shard 2 missing."""
  plan = work.open_plan(tmp_path_factory.mktemp("fuzz") / "job", NUMBER, SIZE)
  mask = {"size": [3, 4], "counts": "05B0"}
  result = {"phrase": "a", "question": 0, "score": 0.5, "box": [0, 0, 1, 1], "area": 5, "segmentation": mask}
  with ShardWriter(plan, plan.shards[0]) as writer:
    writer.append([work.record(item) | {"results": [result]} for item in plan.shards[0].items[:3]])
    writer.append([{"id": "0003.jpg", "uri": "x", "error": "empty", "message": "0 bytes"}])
    writer.commit()
  with ShardWriter(plan, plan.shards[1]) as writer:
    writer.append([work.record(item) for item in plan.shards[1].items[:3]])
  return plan.directory


def readers(out):
  """All there are; those that change something last."""
  return [
    lambda: table(job_status(out)),
    lambda: table(job_status(out, verify=True)),
    lambda: merge(out, out / "merged.json", failures=out / "failures.jsonl", partial=True),
    lambda: work.open_plan(out, NUMBER, SIZE),
    lambda: check_done(work.open_plan(out, NUMBER + 1, SIZE, allow_change=True, verify=True)),
    lambda: enter_all(Plan.load(out)),
  ]


def check_done(plan):
  """What counts as done after `verify` is whole."""
  assert [ledgers.damage(plan.directory, i) for i in plan.committed()] == [None] * len(plan.committed())


def enter_all(plan):
  for shard in plan.shards:
    try:
      with ShardWriter(plan, shard):
        pass
    except Busy:
      assert shard.index in plan.committed()


def edit_plan(rng, out):
  data = json.loads((out / "plan.json").read_bytes())
  json_file(rng, out / "plan.json", data)


def edit_items(rng, out):
  data = (out / "items.jsonl").read_bytes()
  lines = data.splitlines(keepends=True)
  if rng.random() < 0.5:
    data = mutate_bytes(rng, data)
  else:
    i = rng.randrange(len(lines))
    lines[i] = json.dumps(mutate_json(rng, json.loads(lines[i]))).encode() + b"\n"
    data = b"".join(lines)
  (out / "items.jsonl").write_bytes(data)


def edit_shard(rng, out):
  path = out / "shards" / "shard-00000.jsonl"
  lines = path.read_bytes().splitlines(keepends=True)
  if rng.random() < 0.3:
    data = mutate_bytes(rng, b"".join(lines))
  else:
    i = rng.randrange(len(lines))
    lines[i] = json.dumps(mutate_json(rng, json.loads(lines[i]))).encode() + b"\n"
    data = b"".join(lines)
  path.write_bytes(data)
  about = json.loads(path.with_suffix(".json").read_bytes())
  if rng.random() < 0.7:
    about |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
  path.with_suffix(".json").write_text(json.dumps(about))


def edit_digest(rng, out):
  path = out / "shards" / "shard-00000.json"
  json_file(rng, path, json.loads(path.read_bytes()))
  if rng.random() < 0.2:
    index = rng.choice((1, 2, 3, 10**6))
    for suffix in ("json", "jsonl"):
      shutil.copy(path.with_suffix(f".{suffix}"), out / "shards" / f"shard-{index:05d}.{suffix}")


def edit_part(rng, out):
  path = out / "shards" / "shard-00001.jsonl.part"
  data = path.read_bytes()
  if rng.random() < 0.5:
    record = json.loads(data.splitlines()[0])
    path.write_text(json.dumps(mutate_json(rng, record)) + "\n" + json.dumps(mutate_json(rng, record)) + "\n")
  else:
    path.write_bytes(mutate_bytes(rng, data))


@pytest.mark.full  # 3 s
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", KEPT)
def test_an_edited_folder(tmp_path, template, what):
  edit = globals()[f"edit_{what}"]
  for seed in cases(what):
    out = tmp_path / "job"
    shutil.copytree(template, out)
    edit(random.Random(seed), out)
    for read in readers(out):
      check(seed, read, ValueError)
    shutil.rmtree(out)
