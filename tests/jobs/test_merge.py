"""`sam3lt merge`: one COCO file that pycocotools loads, Parquet, failures; nothing is left out silently."""

import contextlib
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import tracemalloc

import fsspec
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from sam3lt_jax import cli
from sam3lt_jax.jobs import files, ledger
from sam3lt_jax.jobs.ledger import ShardWriter
from sam3lt_jax.jobs.merge import merge
from sam3lt_jax.jobs.plan import Plan
from sam3lt_jax.jobs.sources import Item

SIZE = (6, 8)  # height, width


def result(phrase, x1, y1, x2, y2, score=0.5, question=0):
  mask = np.zeros(SIZE, np.uint8, order="F")
  mask[y1:y2, x1:x2] = 1
  rle = coco_mask.encode(mask)
  return {
    "phrase": phrase, "question": question, "score": score, "box": [x1, y1, x2, y2], "area": int(mask.sum()),
    "segmentation": {"size": list(SIZE), "counts": rle["counts"].decode()},
  }  # fmt: skip


def done(item, *results):
  return {"id": item.id, "uri": item.uri, "width": SIZE[1], "height": SIZE[0], "results": list(results)}


def failed(item):
  return {"id": item.id, "uri": item.uri, "error": "truncated", "message": "it ends early"}


ITEMS = [Item(f"{name}.jpg", f"/photos/{name}.jpg") for name in "abcde"]
RECORDS = [
  done(ITEMS[0], result("cat", 1, 1, 4, 3, 0.9), result("dog", 0, 0, 8, 6, 0.4, 1)),
  done(ITEMS[1]),
  failed(ITEMS[2]),
  done(ITEMS[3], result("visual", 2, 2, 3, 3)),
  done(ITEMS[4], result("dog", 5, 0, 8, 2)),
]
FINGERPRINT = {"model": "s0", "phrases": ["dog", "bird", "cat"]}


def work(plan, records, only=None, backwards=False):
  by_id = {record["id"]: record for record in records}
  for shard in plan.missing():
    if only is None or shard.index in only:
      with ShardWriter(plan, shard) as writer:
        own = [by_id[item.id] for item in shard.items]
        writer.append(own[::-1] if backwards else own)
        writer.commit()
  return plan


@pytest.fixture
def job(tmp_path):
  return work(Plan.open(tmp_path / "job", ITEMS, FINGERPRINT, 2), RECORDS).directory


def load(path):
  with contextlib.redirect_stdout(io.StringIO()):
    return COCO(str(path))


def test_a_coco_data_set(job, tmp_path):
  merged = merge(job, tmp_path / "out.json")
  assert (merged.images, merged.results, merged.failures, merged.missing, merged.notes) == (4, 4, 1, 0, [])
  coco = load(tmp_path / "out.json")
  assert coco.loadImgs(coco.getImgIds()) == [
    {"id": i, "file_name": f"{name}.jpg", "width": 8, "height": 6}
    for i, name in ((1, "a"), (2, "b"), (4, "d"), (5, "e"))
  ]  # numbered by their place in the plan, so that another merge gives the same ids
  assert coco.dataset["categories"] == [
    {"id": 1, "name": "dog"}, {"id": 2, "name": "bird"}, {"id": 3, "name": "cat"}, {"id": 4, "name": "visual"}
  ]  # fmt: skip
  assert coco.dataset["info"]["model"] == "s0" and "phrases" not in coco.dataset["info"]
  annotations = coco.loadAnns(coco.getAnnIds())
  assert [(a["id"], a["image_id"], a["category_id"]) for a in annotations] == [
    (1, 1, 3), (2, 1, 1), (3, 4, 4), (4, 5, 1)
  ]  # fmt: skip
  first = annotations[0]
  assert (
    first["bbox"] == [1, 1, 3, 2] and first["area"] == 6 and first["score"] == 0.9 and not first["iscrowd"]
  )
  mask = coco.annToMask(first)
  assert mask.shape == SIZE and mask.sum() == 6 and mask[1:3, 1:4].all()
  assert [a["id"] for a in coco.loadAnns(coco.getAnnIds(catIds=[1]))] == [2, 4]


def test_coco_results(job, tmp_path):
  merge(job, tmp_path / "truth.json")
  merge(job, tmp_path / "results.json", results_only=True)
  truth = load(tmp_path / "truth.json")
  with contextlib.redirect_stdout(io.StringIO()):
    found = truth.loadRes(str(tmp_path / "results.json"))
  assert len(found.getAnnIds()) == 4
  results = json.loads((tmp_path / "results.json").read_text())
  assert set(results[0]) == {"image_id", "category_id", "bbox", "segmentation", "score"}
  boxes = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
  with contextlib.redirect_stdout(io.StringIO()):
    areas = [a["area"] for a in truth.loadRes(boxes).dataset["annotations"]]
  assert areas == [a["area"] for a in truth.dataset["annotations"]]  # of the masks


def test_the_same_bytes_however_the_job_ran(job, tmp_path):
  merge(job, tmp_path / "one.json")
  other = work(Plan.open(tmp_path / "other", ITEMS, FINGERPRINT, 2), RECORDS, only=[2])
  work(other, RECORDS, backwards=True)
  merge(other.directory, tmp_path / "two.json")
  assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_image_ids_and_names_of_other_sources(tmp_path):
  items = [
    Item("70", "/coco/x/70.jpg", 70, {"file_name": "x/70.jpg", "width": 8, "height": 6}),
    Item("t/1", "/s.tar!t/1.png", None, {"offset": 512, "size": 3}),
    Item("plain.jpg", "/photos/plain.jpg"),
  ]
  plan = work(Plan.open(tmp_path / "job", items, {}, 2), [done(item) for item in items])
  merge(plan.directory, tmp_path / "out.json")
  images = load(tmp_path / "out.json").dataset["images"]
  assert [(i["id"], i["file_name"]) for i in images] == [(70, "x/70.jpg"), (72, "t/1.png"), (73, "plain.jpg")]


def test_missing_shards(tmp_path, capsys):
  plan = work(Plan.open(tmp_path / "job", ITEMS, FINGERPRINT, 2), RECORDS, only=[0, 2])
  out = tmp_path / "out.json"
  with pytest.raises(
    ValueError, match=r"1 of 3 shards are not done \(shard-00001\): run the job .*--partial"
  ):
    merge(plan.directory, out)
  assert not out.exists()
  assert cli.main(["merge", plan.directory, "--out", str(out), "--partial"]) == 0
  assert capsys.readouterr().out == f"3 images, 3 results, 0 failures, 1 shards missing\n  wrote {out}\n"
  data = load(out).dataset
  assert data["info"]["missing_shards"] == 1 and [i["id"] for i in data["images"]] == [1, 2, 5]


def test_a_damaged_shard_is_refused_by_name(job, tmp_path):
  path = ledger.path(job, 1)
  with open(path, "r+b") as f:
    f.seek(20)
    f.write(b"?")
  out = tmp_path / "out.json"
  out.write_text("an earlier one")
  for partial in (False, True):
    with pytest.raises(ValueError, match=r"shard-00001 is damaged: its content is not what .*--repair"):
      merge(job, out, partial=partial)
  assert out.read_text() == "an earlier one" and sorted(os.listdir(tmp_path)) == ["job", "out.json"]
  # A whole file with its digest, but of other images.
  os.replace(ledger.path(job, 0), path)
  digest = ledger.path(job, 1, ledger.DIGEST)
  os.replace(ledger.path(job, 0, ledger.DIGEST), digest)
  with pytest.raises(ValueError, match=r"shard-00001 is damaged: it was written as shard-00000\..*--repair"):
    merge(job, out, partial=True)
  with open(digest) as f:
    about = json.load(f)
  with open(digest, "w") as f:
    json.dump(about | {"shard": 1}, f)
  with pytest.raises(ValueError, match=r"shard-00001 is damaged: it does not hold each of its 2 .*--repair"):
    merge(job, out, partial=True)
  # Edited, and its digest file with it: the record names itself.
  with open(path) as f:
    lines = [json.loads(line) for line in f]
  lines[0] |= {"id": "c.jpg"}
  lines[1] |= {"id": "d.jpg", "results": [{"phrase": "cat"}]}
  data = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
  with open(path, "wb") as f:
    f.write(data)
  with open(digest, "w") as f:
    fresh = {"shard": 1, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "failures": 0}
    json.dump(about | fresh, f)
  with pytest.raises(ValueError, match=r"shard-00001 is damaged: the record of '.*' is none.*--repair"):
    merge(job, out, partial=True)


def test_failures_and_parquet(job, tmp_path):
  pq = pytest.importorskip("pyarrow.parquet")
  paths = [tmp_path / "r.parquet", tmp_path / "f.jsonl"]
  merged = merge(job, parquet=paths[0], failures=paths[1])
  assert [json.loads(line) for line in paths[1].read_text().splitlines()] == [RECORDS[2]]
  rows = pq.read_table(paths[0]).to_pylist()
  assert merged.results == 4 and [row["image_id"] for row in rows] == [1, 2, 3, 4, 5]
  for row, record in zip(rows, RECORDS):
    wanted = dict.fromkeys(("width", "height", "error", "message", "results")) | record
    got = {key: row[key] for key in wanted}
    for one in got["results"] or ():
      one["score"] = round(one["score"], 6)
    assert got == wanted


def test_parquet_without_the_package(job, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  assert cli.main(["merge", job, "--parquet", str(tmp_path / "r.parquet")]) == 2
  assert "Parquet needs the package pyarrow: pip install 'sam3lt_jax[jobs]'" in capsys.readouterr().err
  assert os.listdir(tmp_path) == ["job"]


def test_names_that_are_not_utf8(tmp_path):
  pq = pytest.importorskip("pyarrow.parquet")
  item = Item(os.fsdecode(b"caf\xe9.jpg"), "/photos/" + os.fsdecode(b"caf\xe9.jpg"))
  plan = work(Plan.open(tmp_path / "job", [item], {}, 1), [done(item)])
  merge(plan.directory, tmp_path / "o.json", parquet=tmp_path / "o.parquet")
  assert load(tmp_path / "o.json").dataset["images"][0]["file_name"] == item.id
  assert pq.read_table(tmp_path / "o.parquet")["id"].to_pylist() == ["caf\ufffd.jpg"]


def test_memory_does_not_grow_with_the_images(tmp_path):
  """Shards of one size, 4 and 16 of them: the same peak."""
  peaks = []
  for shards in (4, 16):
    items = [Item(f"{i:05d}", f"/{i:05d}") for i in range(25 * shards)]
    found = [result("cat", 0, 0, 4, 4)] * 20
    plan = work(Plan.open(tmp_path / str(shards), items, {}, 25), [done(item, *found) for item in items])
    tracemalloc.start()
    merged = merge(
      plan.directory, tmp_path / "o.json", parquet=tmp_path / "o.parquet", failures=tmp_path / "o.jsonl"
    )
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert merged.results == 500 * shards
  assert peaks[1] < 1.2 * peaks[0], peaks


def test_object_store(tmp_path):
  fs = fsspec.filesystem("memory")
  fs.store.clear()
  plan = work(Plan.open("memory://bucket/job", ITEMS, FINGERPRINT, 2), RECORDS)
  merge(plan.directory, "memory://bucket/out.json", parquet="memory://bucket/out.parquet")
  merge(plan.directory, tmp_path / "out.json")
  assert files.read("memory://bucket/out.json") == (tmp_path / "out.json").read_bytes()
  assert files.read("memory://bucket/out.parquet").startswith(b"PAR1")
  fs.store.clear()


def test_a_change_of_settings_is_noted(tmp_path):
  work(Plan.open(tmp_path / "job", ITEMS, FINGERPRINT, 2), RECORDS, only=[0])
  work(Plan.open(tmp_path / "job", ITEMS, {"model": "l"}, 2, allow_change=True), RECORDS)
  merged = merge(tmp_path / "job", tmp_path / "o.json")
  assert merged.notes == ["the settings were changed during the job: 2 kinds of shards were merged"]
  names = [c["name"] for c in load(tmp_path / "o.json").dataset["categories"]]
  assert names == ["cat", "dog", "visual"]  # as they turn up, where the plan names no phrases


def test_the_verb(job, tmp_path, capsys):
  paths = [str(tmp_path / name) for name in ("o.json", "f.jsonl")]
  assert cli.main(["merge", "--out", paths[0], job, "--failures", paths[1]]) == 0
  out, err = capsys.readouterr()
  assert out == f"4 images, 4 results, 1 failures\n  wrote {', '.join(paths)}\n" and err == ""
  for argv, message in [
    ([job], "nothing to write: give --out, --parquet or --failures"),
    ([job, "--failures", paths[1], "--results-only"], "--results-only says what --out holds"),
    ([job, "--out", paths[0], "--failures", paths[0]], "the files must be different ones"),
    ([str(tmp_path), "--out", paths[0]], "holds no job"),
    ([job, "--out", str(tmp_path / "gone" / "o.json")], "is not written"),
    ([job, "--out", str(tmp_path)], "is not written"),
  ]:
    assert cli.main(["merge", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sam3lt: error: ") and message in err and err.count("\n") == 1


def test_a_full_disk(job, tmp_path, monkeypatch, capsys):
  def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  assert cli.main(["merge", job, "--out", str(tmp_path / "o.json")]) == 2
  assert "o.json is not written: no space is left on its disk" in capsys.readouterr().err
  assert os.listdir(tmp_path) == ["job"]


def test_the_verbs_do_not_import_jax(job, tmp_path):
  code = (
    "import sys; from sam3lt_jax.cli import main;"
    f"codes = [main(['status', {job!r}]), main(['merge', {job!r}, '--out', {str(tmp_path / 'o.json')!r}])];"
    "print(codes, [m for m in ('jax', 'jaxlib', 'flax', 'numpy', 'pyarrow', 'fsspec') if m in sys.modules])"
  )
  found = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
  )
  assert found.stdout.splitlines()[-1] == "[0, 0] []"
