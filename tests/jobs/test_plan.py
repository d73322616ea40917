"""The plan: frozen, the same for every host, opened again by a restart, refused where something changed."""

import errno
import itertools
import json
import multiprocessing
import os
import pathlib
import tracemalloc

import fsspec
import pytest

from sam3lt_jax.jobs import files, ledger
from sam3lt_jax.jobs import plan as plan_module
from sam3lt_jax.jobs.ledger import ShardWriter
from sam3lt_jax.jobs.plan import Plan
from sam3lt_jax.jobs.sources import Item, list_items
from tests.jobs import ledgers, work
from tests.jobs.work import FINGERPRINT, make_items, open_plan


def indices(shards):
  return [shard.index for shard in shards]


@pytest.fixture(params=["folder", "bucket"])
def out(request, tmp_path):
  """A job's folder, local and in an object store."""
  if request.param == "folder":
    yield str(tmp_path / "new" / "job")
  else:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield "memory://bucket/job"
    fs.store.clear()


def test_shards(out):
  items = make_items(10)
  items[3] = Item(
    "ünï\udcff.jpg", "/x", 12, {"width": 3, "offset": 512, "size": 9}
  )  # a name that is not UTF-8
  plan = Plan.open(out, items, FINGERPRINT, 4)
  assert len(plan.shards) == 3 and plan.num_items == 10 and plan.notes == []
  assert [len(shard.items) for shard in plan.shards] == [4, 4, 2]
  assert [plan.sizes[i] for i in range(3)] == [4, 4, 2]
  assert [item for shard in plan.shards for item in shard.items] == items
  assert indices(plan.shards) == [0, 1, 2]
  with pytest.raises(IndexError):
    plan.shards[3]
  assert plan.fingerprint == FINGERPRINT


def test_a_restart_opens_the_same_plan(out):
  first = open_plan(out, 10, 4)
  again = Plan.open(out, make_items(10), {**FINGERPRINT, "phrases": ("a", "b")}, 99)
  assert list(again.shards) == list(first.shards)  # with its own shard size
  assert list(Plan.load(out).shards) == list(first.shards)
  # The order of the listing is no change: another host may list otherwise.
  assert list(Plan.open(out, make_items(10)[::-1], FINGERPRINT, 4).shards) == list(first.shards)


def test_missing_shards_of_several_processes(out):
  plan = open_plan(out, 28, 4)
  assert indices(plan.missing()) == list(range(7))
  lists = [indices(plan.missing(i, 3)) for i in range(3)]
  assert [some[: len(range(i, 7, 3))] for i, some in enumerate(lists)] == [[0, 3, 6], [1, 4], [2, 5]]
  assert all(sorted(some) == list(range(7)) for some in lists)  # then those of the others
  if not files.is_remote(out):
    assert lists[0] == [0, 3, 6, 5, 4, 2, 1]
  for index in (0, 4):
    with ShardWriter(plan, plan.shards[index]) as writer:
      writer.append([work.record(item) for item in plan.shards[index].items])
      writer.commit()
  assert sorted(indices(plan.missing(1, 2))) == [1, 2, 3, 5, 6]
  left = plan.missing()
  assert next(left).index == 1
  with ShardWriter(plan, plan.shards[2]) as writer:  # meanwhile, by another process
    writer.append([work.record(item) for item in plan.shards[2].items])
    writer.commit()
  assert indices(left) == [3, 5, 6]


def refusal(out, items=None, fingerprint=None):
  before = {name: files.read(files.join(out, name)) for name in ("plan.json", "items.jsonl")}
  with pytest.raises(ValueError) as error:
    Plan.open(out, make_items(4) if items is None else items, fingerprint or FINGERPRINT, 4)
  assert before == {name: files.read(files.join(out, name)) for name in before}
  text = str(error.value)
  assert text.startswith(f"{out} holds another job: ")
  assert text.endswith(". To go on, give another output folder, or allow the change (--allow-change)")
  return text.removeprefix(f"{out} holds another job: ").partition(". To go on")[0]


def test_changes_are_refused_and_named(out):
  open_plan(out, 4)
  other = {"model": "l", "phrases": ["a", "c"], "dtype": "bfloat16"}
  assert refusal(out, fingerprint=other) == (
    'model was "m" and is now "l"; phrases was ["a", "b"] and is now ["a", "c"]; '
    'dtype was null and is now "bfloat16"'
  )
  many = {**FINGERPRINT, "phrases": ["a long phrase"] * 100}
  assert len(refusal(out, fingerprint=many)) < 200
  moved = [*make_items(3), Item("0003.jpg", "/elsewhere/0003.jpg")]
  say = "the source has other images, "
  assert refusal(out, make_items(6)) == f"{say}2 new (such as '0004.jpg')"
  assert refusal(out, make_items(3)) == f"{say}1 gone (such as '0003.jpg')"
  assert refusal(out, moved) == f"{say}1 at another place (such as '0003.jpg')"
  both = refusal(out, make_items(4, start=1), {**FINGERPRINT, "model": "l"})
  assert both == (
    f"model was \"m\" and is now \"l\"; {say}1 new (such as '0004.jpg'), 1 gone (such as '0000.jpg')"
  )


def test_new_items_become_new_shards(out):
  work.finish(open_plan(out, 6, 4))
  before = list(Plan.load(out).shards)
  plan = Plan.open(out, make_items(13), FINGERPRINT, 3, allow_change=True)
  assert plan.notes == [
    "changed: the source has other images, 7 new (such as '0006.jpg'); shards added for the new ones: 3"
  ]
  assert list(plan.shards)[:2] == before and plan.num_items == 13
  assert [len(shard.items) for shard in plan.shards] == [4, 2, 3, 3, 1]
  assert sorted(indices(plan.missing())) == [2, 3, 4]
  # What was agreed on is no change any more, also without allow_change, and a second change adds to it.
  assert list(Plan.open(out, make_items(13), FINGERPRINT, 3).shards) == list(plan.shards)
  third = Plan.open(out, make_items(14), FINGERPRINT, 4, allow_change=True)
  assert list(third.shards)[:5] == list(plan.shards) and third.shards[5].items[0].id == "0013.jpg"
  assert list(plan.shards) == list(third.shards)[:5]  # one that was opened before goes on by its own
  if not files.is_remote(out):
    work.finish(third)
    work.check_whole(out, 14)


def test_items_that_are_gone_or_moved(out):
  open_plan(out, 4, 2)
  now = [Item("0001.jpg", "/new/1"), *make_items(3, start=2)]
  plan = Plan.open(out, now, FINGERPRINT, 2, allow_change=True)
  assert "those gone are kept, the new places are used from now on" in plan.notes[0]
  assert [item.uri for shard in plan.shards for item in shard.items] == [
    "/photos/0000.jpg", "/new/1", "/photos/0002.jpg", "/photos/0003.jpg", "/photos/0004.jpg"
  ]  # fmt: skip
  assert Plan.open(out, now, FINGERPRINT, 2).notes == []


def test_another_fingerprint_is_for_what_is_not_done(tmp_path):
  plan = open_plan(tmp_path, 8, 4)
  with ShardWriter(plan, plan.shards[0]) as writer:
    writer.append([work.record(item) for item in plan.shards[0].items])
    writer.commit()
  with ShardWriter(plan, plan.shards[1]) as writer:
    writer.append([work.record(plan.shards[1].items[0])])
    with pytest.raises(ValueError, match=r"another job works on .*shard-00001\); end it first"):
      Plan.open(tmp_path, make_items(8), {"model": "l"}, 4, allow_change=True)
  changed = Plan.open(tmp_path, make_items(8), {"model": "l"}, 4, allow_change=True)
  assert changed.notes == [
    'changed: model was "m" and is now "l"; phrases was ["a", "b"] and is now null; '
    "committed shards kept as they are: 1; started ones that begin again: 1"
  ]
  assert changed.fingerprint == {"model": "l"} and changed.settings != plan.settings
  # The job that was opened before must not write what the new settings did not make.
  with pytest.raises(ValueError, match="was changed by another job"), ShardWriter(plan, plan.shards[1]):
    pass
  assert ledgers.started(str(tmp_path)) == set()
  work.finish(changed)
  assert [ledger.read_shard(str(tmp_path), i)[0]["settings"] for i in (0, 1)] == [
    plan.settings,
    changed.settings,
  ]
  work.check_whole(tmp_path, 8)


def test_bad_arguments(tmp_path):
  item = Item("a", "/a")
  for items, fingerprint, size, message in [
    ([], {}, 4, "items must hold at least one image"),
    ([item], {"x": float("nan")}, 4, "not JSON compliant"),
  ]:
    with pytest.raises(ValueError, match=message):
      Plan.open(tmp_path / "job", items, fingerprint, size)
  with pytest.raises(ValueError, match="holds no job"):
    Plan.load(tmp_path / "job")  # none of these left a plan
  assert len(Plan.open(tmp_path / "job", [item], {}, 4).shards) == 1


def test_damaged_plans(tmp_path):
  out = tmp_path / "job"
  with pytest.raises(ValueError, match=r"job is no folder; accepted: the output folder of a job"):
    Plan.load(out)
  open_plan(out, 4)
  items, plan = out / "items.jsonl", out / "plan.json"
  sound = items.read_bytes()
  items.write_bytes(sound.replace(b"0002", b"0009"))
  with pytest.raises(ValueError, match=r"items\.jsonl is not what was planned"):
    open_plan(out, 4).shards[0]
  items.write_bytes(sound + sound.splitlines(keepends=True)[-1])
  with pytest.raises(ValueError, match=r"items\.jsonl is not what was planned"):
    open_plan(out, 4).shards[0]
  items.unlink()
  with pytest.raises(ValueError, match=r"items\.jsonl is missing"):
    open_plan(out, 4).shards[0]
  items.write_bytes(sound)
  content = json.loads(plan.read_text())
  for bad in ("{", "[]", "{}", '{"format": 2}', json.dumps(content | {"shards": []})):
    plan.write_text(bad)
    with pytest.raises(ValueError, match=r"plan\.json is damaged"):
      open_plan(out, 4)
  plan.write_text(json.dumps(content | {"format": 99}))
  with pytest.raises(ValueError, match="another version"):
    open_plan(out, 4)
  plan.write_text(json.dumps(content | {"shards": [3, 1]}))
  with pytest.raises(
    ValueError, match=r"plan\.json is damaged: it was edited; undo that, or move plan\.json away"
  ):
    open_plan(out, 4)
  content.pop("digest")  # as earlier versions wrote it
  plan.write_text(json.dumps(content))
  with pytest.raises(ValueError, match=r"of an earlier version of this program: move plan\.json away"):
    open_plan(out, 4)
  plan.unlink()
  assert len(open_plan(out, 4).shards[0].items) == 4


def test_an_edited_items_file_is_named_before_it_is_compared(tmp_path):
  open_plan(tmp_path, 4)
  for data in (b"garbage\n", None):
    (tmp_path / "items.jsonl").unlink() if data is None else (tmp_path / "items.jsonl").write_bytes(data)
    with pytest.raises(
      ValueError, match=r"items\.jsonl is (missing|not what was planned).*move plan\.json away"
    ):
      open_plan(tmp_path, 6, allow_change=True)


def test_a_lost_plan_is_made_again_from_the_shards(out):
  plan = open_plan(out, 10, 4)
  for index in (0, 2):
    with ShardWriter(plan, plan.shards[index]) as writer:
      writer.append([work.record(item) for item in reversed(plan.shards[index].items)])
      writer.commit()
  if not files.is_remote(out):
    with ShardWriter(plan, plan.shards[1]) as writer:
      writer.append([work.record(plan.shards[1].items[0])])
  drop(out, "plan.json")
  with pytest.raises(ValueError, match=r"holds no plan\.json, but 2 shards: start the job's command again"):
    Plan.load(out)
  again = open_plan(out, 10, 99)
  assert list(again.shards) == list(plan.shards) and again.settings == plan.settings
  assert (
    again.notes[0] == "plan.json was missing: made anew from the source, which the 2 shards that are done fit"
  )
  # What was begun may have been begun with other settings.
  assert again.notes[1:] == ([] if files.is_remote(out) else
                             ["plan.json was missing; started shards that begin again: 1"])  # fmt: skip
  assert indices(again.missing()) == [1]
  work.finish(again)
  drop(out, "plan.json")
  drop(out, "items.jsonl")
  assert list(open_plan(out, 10, 4).missing()) == []


def drop(out, name):
  path = files.join(out, name)
  if files.is_remote(path):
    fsspec.filesystem("memory").rm(path)
  else:
    os.unlink(path)


def test_a_lost_plan_that_cannot_be_made_again_says_what_to_do(tmp_path):
  work.finish(open_plan(tmp_path, 10, 4))
  os.unlink(tmp_path / "plan.json")
  for number in (9, 3):
    with pytest.raises(ValueError, match=r"3 shards that are done but no plan\.json.*source of before"):
      open_plan(tmp_path, number, 4)
  with pytest.raises(
    ValueError, match=r"another model, other phrases or options\. To go on, give another output"
  ):
    Plan.open(tmp_path, make_items(10), {"model": "l"}, 4)
  assert not (tmp_path / "plan.json").exists()
  # A damaged shard says nothing of the plan, and is done again.
  (tmp_path / "shards" / "shard-00001.jsonl").write_bytes(b"")
  plan = open_plan(tmp_path, 10, 4)
  assert (
    "shard-00001 is damaged: it has 0 of" in plan.notes[0]
    and "the 2 shards that are done fit" in plan.notes[1]
  )
  work.finish(plan)
  work.check_whole(tmp_path, 10)


def test_stray_shards_make_no_job_done(tmp_path):
  """As many files as there are shards, but not theirs."""
  plan = open_plan(tmp_path, 10, 4)
  work.finish(plan)
  shards = tmp_path / "shards"
  for suffix in ("jsonl", "json"):
    os.replace(shards / f"shard-00002.{suffix}", shards / f"shard-00007.{suffix}")
  (shards / "shard-2.jsonl").write_bytes(b"")  # no name of ours
  assert not Plan.is_done(tmp_path) and plan.committed() == {0, 1}
  again = open_plan(tmp_path, 10, 4)
  assert indices(again.missing()) == [2]
  assert again.notes == ["shard-00007 is no shard of this job, which has 3, and is left alone"]
  # A file in a shard's place that no job wrote.
  (shards / "shard-00002.jsonl").touch()
  again = open_plan(tmp_path, 10, 4)
  assert again.notes[0].startswith("shard-00002 is damaged: its digest file is missing: it is done again")
  assert indices(again.missing()) == [2]
  assert len(again.set_damaged_aside(strays=True)) == 1 and (shards / "shard-00007.jsonl.damaged").exists()
  work.finish(again)
  (shards / "shard-2.jsonl").unlink()
  work.check_whole(tmp_path, 10)


def test_swapped_and_foreign_shards_are_found_by_verify(tmp_path):
  plan = open_plan(tmp_path / "job", 12, 4)
  work.finish(plan)
  shards = tmp_path / "job" / "shards"

  def swap(suffix, a="shard-00000", b="shard-00001"):
    first, second = (shards / f"{name}.{suffix}" for name in (a, b))
    data = first.read_bytes()
    os.replace(second, first)
    second.write_bytes(data)

  swap("jsonl"), swap("json")
  assert open_plan(tmp_path / "job", 12, 4).notes == [
    f"shard-0000{i} is damaged: it was written as shard-0000{1 - i}: it is done again" for i in (0, 1)
  ]
  work.finish(plan)
  other = Plan.open(tmp_path / "other", make_items(12, start=100), FINGERPRINT, 4)
  work.finish(other)
  for suffix in ("jsonl", "json"):  # a whole shard of another job
    os.replace(tmp_path / "other" / "shards" / f"shard-00001.{suffix}", shards / f"shard-00001.{suffix}")
  assert open_plan(tmp_path / "job", 12, 4, verify=True).notes == [
    "shard-00001 is damaged: it does not hold each of its 4 images once: it is done again"
  ]


def test_a_shard_that_cannot_be_read_is_not_done_again(tmp_path, monkeypatch):
  """The system's trouble of the moment, or a store's: nothing is thrown away for it."""
  fs, out = fsspec.filesystem("memory"), "memory://bucket/trouble"
  work.finish(open_plan(out, 10, 4))
  cat, there = type(fs).cat_file, files.names(f"{out}/shards")

  def trouble(self, path, **options):
    if path.endswith("shard-00001.json"):
      raise RuntimeError("503")
    return cat(self, path, **options)

  with monkeypatch.context() as patch:
    patch.setattr(type(fs), "cat_file", trouble)
    with pytest.raises(OSError, match="RuntimeError: 503"):
      open_plan(out, 10, 4)
  assert files.names(f"{out}/shards") == there and open_plan(out, 10, 4).notes == []
  work.finish(open_plan(tmp_path, 10, 4))
  read = files.read

  def refuse(path, *args):
    if "shard-00001" in path:
      raise OSError(errno.EIO, os.strerror(errno.EIO))
    return read(path, *args)

  monkeypatch.setattr(files, "read", refuse)
  with pytest.raises(OSError, match="Input/output error"):
    open_plan(tmp_path, 10, 4)
  monkeypatch.undo()
  assert open_plan(tmp_path, 10, 4).notes == []


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
  (tmp_path / "file").write_bytes(b"")
  with pytest.raises(files.CannotWrite, match=r"file/job/shards is not written: Not a directory; what was"):
    open_plan(tmp_path / "file" / "job")

  def refuse(*_args, **_more):
    raise OSError(errno.EROFS, "Read-only file system")

  with monkeypatch.context() as patch:
    patch.setattr(os, "makedirs", refuse)
    with pytest.raises(
      files.CannotWrite, match=r"job/shards is not written: Read-only file system; what was"
    ):
      open_plan(tmp_path / "job")

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full)
    with pytest.raises(
      files.CannotWrite, match=r"items\.jsonl is not written: no space is left on its disk; "
    ):
      open_plan(tmp_path / "job")
  assert sorted(os.listdir(tmp_path / "job")) == ["shards"]
  assert open_plan(tmp_path / "job").num_items == 20


def begin(directory, number, barrier, answers):
  barrier.wait(60)
  try:
    plan = open_plan(directory, number, 3)
    answers.put(("opened", [item.id for shard in plan.shards for item in shard.items]))
  except ValueError as e:
    answers.put(("refused", str(e)))


def test_jobs_that_begin_at_the_same_moment_agree(tmp_path):
  """Four open one new folder at once: one kind of job wins, the other is refused, no plan is mixed."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["tests.jobs.work"])
  for attempt in range(2):
    barrier, answers = context.Barrier(4), context.Queue()
    jobs = [
      context.Process(target=begin, args=(tmp_path / str(attempt), number, barrier, answers), daemon=True)
      for number in (9, 9, 10, 10)
    ]
    for job in jobs:
      job.start()
    found = [answers.get(timeout=60) for _ in jobs]
    for job in jobs:
      job.join(60)
    opened = [ids for what, ids in found if what == "opened"]
    assert len(opened) == 2 and opened[0] == opened[1]
    assert all("holds another job" in text for what, text in found if what == "refused")


def test_an_overwritten_plan_of_an_object_store_is_noticed(monkeypatch):
  """No lock there: whoever put plan.json first finds the other's, and is refused or joins it."""
  fs = fsspec.filesystem("memory")
  fs.store.clear()
  out, put = "memory://bucket/race", plan_module._write

  def overwritten(directory, content):
    put(directory, content)
    put(directory, content | {"fingerprint": {"model": "of the other job"}})

  monkeypatch.setattr(plan_module, "_write", overwritten)
  with pytest.raises(ValueError, match='model was "of the other job" and is now "m"'):
    open_plan(out, 4)


def test_a_large_plan_is_small_in_memory(tmp_path):
  """5,000 items (made as they are asked for): the plan and its shards hold none of them."""
  (tmp_path / "list.txt").write_text("".join(f"folder/{i:07d}.jpg\n" for i in range(5_000)))
  items = list_items(tmp_path / "list.txt")
  tracemalloc.start()
  plan = Plan.open(tmp_path / "job", items, {}, 100)
  assert sum(len(shard.items) for shard in plan.shards) == 5_000
  again = Plan.open(tmp_path / "job", items, {}, 100)
  assert again.shards[15].items[7].id == "folder/0001507.jpg"
  held, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert held < 50_000 and peak < 500_000, (held, peak)


def test_nothing_is_listed_per_shard(tmp_path, monkeypatch):
  """10,000 shards: `missing` reads the folder once, and only the shards that it gives."""
  plan = Plan.open(tmp_path, make_items(10_000), {}, 1)
  calls = []
  monkeypatch.setattr(files, "names", lambda folder: calls.append(folder) or os.listdir(folder))
  first = list(itertools.islice(plan.missing(), 3))
  assert indices(first) == [0, 1, 2] and calls == [str(pathlib.Path(tmp_path) / "shards")]
