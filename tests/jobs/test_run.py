"""A whole job in this process: the predictor's results, restarts, and ways to end early."""

import json
import os
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from sam3lt_jax.engine import Engine
from sam3lt_jax.jobs import files, ledger, pipeline, reading, run, status
from sam3lt_jax.jobs import results as job_results
from sam3lt_jax.jobs.questions import Questions
from sam3lt_jax.jobs.run import JobConfig, Progress, run_job
from sam3lt_jax.jobs.sources import list_items
from sam3lt_jax.jobs.status import job_status
from tests import tiny
from tests.jobs import pictures

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools

COUNT = 20  # good images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  return pictures.folder(tmp_path_factory.mktemp("photos"), COUNT)


@pytest.fixture(scope="module")
def compiled():
  """Programs are compiled once for all jobs here; two images a batch, two questions together."""
  one = pictures.predictor()
  with tiny.hurry():
    return Engine(
      one.model, one.variables, one.processor, image_buckets=(2,), prompt_buckets=(2,),
      devices=jax.local_devices()[:1],
    )  # fmt: skip


@pytest.fixture(autouse=True)
def shared(compiled, monkeypatch):
  monkeypatch.setattr(run, "Engine", lambda *given, **options: compiled)


@pytest.fixture
def narrow(monkeypatch):
  """Little is in work at any time, so that a job stopped at an image has much left."""
  monkeypatch.setattr(pipeline, "FLUSH_RECORDS", 1)
  writer = pipeline.Writer
  monkeypatch.setattr(pipeline, "Writer", lambda room, on_record: writer(2, on_record))


@pytest.fixture
def job(photos, tmp_path):
  """Runs a job with small shards into tmp_path/out; options as of `JobConfig` and `run_job`."""

  def start(progress=None, stop=None, **options):
    given = {
      "source": str(photos),
      "out": str(tmp_path / "out"),
      "shard_size": 4,
      "threshold": 0.0,
      "workers": 2,
    }
    if "prompts_file" not in options:
      given["phrases"] = pictures.PHRASES
    config = JobConfig(**given | options)
    return run_job(config, predictor=pictures.predictor(), progress=progress, stop=stop)

  return start


class After(Progress):
  """Calls `act` when so many images were written; remembers everything."""

  def __init__(self, images=0, act=lambda: None):
    self.images, self.act, self.notes, self.failed = images, act, [], 0

  def advance(self, failed):
    self.failed += failed
    self.images -= 1
    if self.images == 0:
      self.act()

  def note(self, text):
    self.notes.append(text)


def by_predictor(photos, key, phrases=pictures.PHRASES, **options):
  return pictures.predictor()(photos / key, text=list(phrases), threshold=0.0, **options)


def test_results_are_the_predictors(job, photos, tmp_path):
  summary = job()
  found = pictures.records(tmp_path / "out")
  assert {key: r["error"] for key, r in found.items() if "error" in r} == pictures.BAD
  good = {key: r for key, r in found.items() if "error" not in r}
  assert len(good) == COUNT
  for key, record in good.items():
    wanted = by_predictor(photos, key)
    pictures.assert_same_results(job_results.to_results(record), wanted)
    scores, boxes = ([one[name] for one in record["results"]] for name in ("score", "box"))
    assert scores == sorted(scores, reverse=True)
    corners = np.reshape(boxes, (-1, 2, 2))
    assert (corners >= 0).all() and (corners <= wanted.size[::-1]).all()
    assert record["uri"] == str(photos / key) and [record["height"], record["width"]] == list(wanted.size)
  assert (summary.images, summary.instances) == (COUNT + 3, sum(len(r["results"]) for r in good.values()))
  assert summary.failures == {"empty": 1, "not_an_image": 1, "truncated": 1}
  assert (summary.shards, summary.shards_done, summary.shards_left) == (6, 6, 0)
  assert summary.exit_code == 0 and summary.stopped is None and 0 < summary.device_busy <= 1
  fingerprint = json.loads((tmp_path / "out/plan.json").read_text())["fingerprint"]
  assert fingerprint["phrases"] == list(pictures.PHRASES)
  assert (fingerprint["threshold"], fingerprint["profile"], fingerprint["dtype"]) == (
    0.0,
    "original",
    "float32",
  )
  [kept] = (tmp_path / "out/runs").glob("*.json")
  assert json.loads(kept.read_text())["images"] == COUNT + 3


def test_each_image_its_own_questions(job, photos, tmp_path):
  box = [5.0, 6.0, 30.0, 28.5]
  lines = [
    {"id": "001.png", "text": ["a dog", "wheel"]},
    {"id": "002.png", "boxes": [box]},
    {"id": "004.png", "text": "a dog", "boxes": [box, [1, 1, 9, 9]], "box_labels": [1, 0]},
    {"id": "sub/003.png", "text": "wheel"},
  ]
  (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  progress = After()
  summary = job(progress, prompts_file=str(tmp_path / "q.jsonl"))
  found = pictures.records(tmp_path / "out")
  assert summary.images == COUNT + 3 and sum(len(r.get("results", ())) > 0 for r in found.values()) == 4
  running = "running on CPU, float32, attention in blocks"
  assert progress.notes == ["nothing is asked of 19 of 23 images", running]
  read = lambda key: job_results.to_results(found[key])  # noqa: E731
  pictures.assert_same_results(read("001.png"), by_predictor(photos, "001.png", ["a dog", "wheel"]))
  pictures.assert_same_results(read("sub/003.png"), by_predictor(photos, "sub/003.png", ["wheel"]))
  boxed = pictures.predictor()(photos / "002.png", boxes=[box], threshold=0.0)
  pictures.assert_same_results(read("002.png"), boxed)
  both = by_predictor(photos, "004.png", ["a dog"], boxes=[box, [1, 1, 9, 9]], box_labels=[1, 0])
  pictures.assert_same_results(read("004.png"), both)
  assert found["007.png"]["results"] == [] and found["007.png"]["width"] == pictures.photo(7).shape[1]


def test_a_restart_finds_nothing_to_do_and_another_question_is_refused(job, tmp_path, monkeypatch):
  job()
  before = {p: p.read_bytes() for p in (tmp_path / "out/shards").iterdir()}
  with pytest.raises(ValueError, match="phrases was"):
    job(phrases=["a dog"])
  monkeypatch.setattr(run, "Engine", lambda *a, **k: pytest.fail("devices were prepared for nothing"))
  again = job()
  assert again.images == 0 and str(again) == f"nothing to do: all {COUNT + 3} images were done before"
  assert {p: p.read_bytes() for p in (tmp_path / "out/shards").iterdir()} == before


def test_stopped_and_started_again(job, tmp_path, narrow):
  whole = job()
  wanted = pictures.records(tmp_path / "out")
  shutil.rmtree(tmp_path / "out")
  stop = threading.Event()
  first = job(After(6, stop.set), stop)
  assert first.stopped == "stopped" and first.exit_code == 0 and "goes on from here" in str(first)
  assert 6 <= first.images < COUNT
  parts = list((tmp_path / "out/shards").glob("*.part"))
  assert parts and not list((tmp_path / "out/shards").glob("*.lock"))
  second = job()
  assert second.images == COUNT + 3 - first.images and second.images_before == first.images
  assert first.instances + second.instances == whole.instances
  assert pictures.records(tmp_path / "out") == wanted  # to the last digit: the same programs
  assert not list((tmp_path / "out/shards").glob("*.part"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(job, tmp_path, number, narrow):
  before = signal.getsignal(number)
  summary = job(After(3, lambda: os.kill(os.getpid(), number)))
  assert summary.exit_code == 128 + number and summary.stopped == f"stopped by {signal.Signals(number).name}"
  assert 3 <= summary.images < COUNT and summary.shards_left > 0
  assert signal.getsignal(number) is before
  assert job().shards_left == 0 and len(pictures.records(tmp_path / "out")) == COUNT + 3


def test_too_many_failures_stop_it(job, tmp_path):
  source = pictures.folder(tmp_path / "bad", 5, bad=False)
  for i in range(25):
    (source / f"z{i:02d}.jpg").write_text("no image")
  summary = job(source=str(source), shard_size=50)
  # Five good ones, then bad ones: over a half of at least 20 from the 20th on.
  assert summary.exit_code == 1 and summary.too_many_failures and summary.shards_left == 1
  assert summary.stopped.startswith("15 of 20 images failed, more than the accepted share of 0.5")
  assert "z14.jpg: not an image" in summary.stopped
  accepted = job(source=str(source), shard_size=50, max_failures=1)
  assert accepted.exit_code == 0 and accepted.failures["not_an_image"] > 0
  found = pictures.records(tmp_path / "out")
  assert sum("error" in r for r in found.values()) == 25 and len(found) == 30


def test_few_images_may_all_fail(job, tmp_path):
  (tmp_path / "bad").mkdir()
  for i in range(pipeline.FEWEST - 1):
    (tmp_path / f"bad/{i}.jpg").touch()
  summary = job(source=str(tmp_path / "bad"))
  assert summary.exit_code == 0 and summary.failures == {"empty": pipeline.FEWEST - 1}
  assert summary.device_busy is None and "images failed: 19 empty" in str(summary)


def test_a_full_disk_is_said_and_what_is_written_stays(job, tmp_path, monkeypatch):
  append = ledger.ShardWriter.append
  written = []

  def full(self, records):
    if len(written) > 4:
      raise files.CannotWrite("x is not written: no space is left on its disk")
    append(self, records)
    written.extend(records)

  monkeypatch.setattr(ledger.ShardWriter, "append", full)
  monkeypatch.setattr(pipeline, "FLUSH_RECORDS", 1)
  threads = threading.active_count()
  with pytest.raises(ValueError, match="no space is left"):
    job()
  assert threading.active_count() <= threads + 2  # post-processing may still end
  monkeypatch.undo()
  assert not list((tmp_path / "out/shards").glob("*.lock"))


def test_two_jobs_on_one_folder(job, photos, tmp_path):
  """Not by a restart: at the same time, as a mistake."""
  predictor, made = pictures.predictor(), []
  config = JobConfig(
    str(photos), str(tmp_path / "out"), phrases=pictures.PHRASES, threshold=0.0, shard_size=2
  )
  both = [
    threading.Thread(target=lambda: made.append(run_job(config, predictor=predictor))) for _ in range(2)
  ]
  for thread in both:
    thread.start()
  for thread in both:
    thread.join(120)
  assert len(made) == 2
  last = job(shard_size=2)
  assert sum(s.images for s in made) + last.images == COUNT + 3
  assert len(pictures.records(tmp_path / "out")) == COUNT + 3


def test_two_processes_share_and_take_over(job, tmp_path):
  """One process does its own shards, then those that the other one left."""
  summary = job(process_index=1, process_count=2)
  assert summary.process == "1 of 2" and summary.shards_left == 0
  digests = sorted(
    (tmp_path / "out/shards").glob("*.json"), key=lambda p: json.loads(p.read_text())["committed"]
  )
  order = [int(p.stem.rpartition("-")[2]) for p in digests]
  assert order == [1, 3, 5, 4, 2, 0]


def test_an_object_store_gets_whole_shards(job, tmp_path, narrow):
  fsspec = pytest.importorskip("fsspec")
  out = f"memory://{tmp_path.name}/out"
  stop = threading.Event()
  first = job(After(6, stop.set), stop, out=out, overlays=1)
  assert 0 < first.shards_done < 6
  second = job(out=out, overlays=1)
  assert first.shards_done + second.shards_done == second.shards == 6
  fs = fsspec.filesystem("memory")
  lines = [line for path in fs.glob(f"{out}/shards/*.jsonl") for line in fs.cat_file(path).splitlines()]
  assert len({json.loads(line)["id"] for line in lines}) == len(lines) == COUNT + 3
  assert len(fs.ls(f"{out}/overlays")) == 1 and len(fs.ls(f"{out}/runs")) >= 1


def test_overlays_of_a_sample(job, tmp_path):
  job(overlays=3, source=str(pictures.folder(tmp_path / "few", 6, bad=False)))
  drawn = sorted((tmp_path / "out/overlays").iterdir())
  assert len(drawn) == 3 and {p.suffix for p in drawn} == {".jpg"}
  with Image.open(drawn[0]) as image:
    assert np.asarray(image).std() > 0


def test_an_overlay_that_cannot_be_drawn_is_left_out(tmp_path, caplog, monkeypatch):
  """Its file is gone meanwhile, or cut: the job has its results already."""
  monkeypatch.setattr(reading, "PAUSE_S", 0)
  [item, cut] = list_items(pictures.folder(tmp_path / "few", 2, bad=False))
  overlays = job_results.Overlays(str(tmp_path / "out"), [item, cut], 2)
  os.remove(item.uri)
  os.truncate(cut.uri, 100)
  for one in (item, cut):
    overlays.draw(one, {"id": one.id, "uri": one.uri, "width": 5, "height": 4, "results": []})
  assert not list((tmp_path / "out/overlays").iterdir())
  assert "No such file" in caplog.text and "damaged or truncated" in caplog.text


def test_coco_ids_stay(job, photos, tmp_path):
  images = [{"id": 40 + i, "file_name": f"{i:03d}.png", "width": 1, "height": 1} for i in (1, 2)]
  (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
  job(source=str(tmp_path / "coco.json"), images=str(photos))
  assert {key: r["coco_id"] for key, r in pictures.records(tmp_path / "out").items()} == {"41": 41, "42": 42}


def test_shards_fit_the_job(photos, tmp_path):
  made = run_job(
    JobConfig(str(photos), str(tmp_path / "out"), phrases=["a dog"], threshold=0.0),
    predictor=pictures.predictor(),
  )
  assert made.shards == 2  # of 16 at least


@pytest.mark.parametrize(
  "given, message",
  [
    ({"phrases": (), "prompts_file": None}, "give either phrases .* or a file"),
    ({"prompts_file": "x", "phrases": ["a"]}, "give either phrases .* or a file"),
    ({"max_failures": 1.5}, "max_failures must be a share within 0 and 1, got 1.5"),
    ({"workers": 0}, "workers must be a whole number of at least 1, got 0"),
    ({"process_index": 1}, "process_index and process_count go together"),
    ({"process_index": 2, "process_count": 2}, "process_index=2 of process_count=2"),
    ({"threshold": 2}, r"threshold must be in \[0, 1\]"),
    ({"phrases": [" "]}, "a phrase is empty"),
    ({"source": "no/such"}, "no/such"),
  ],
)
def test_bad_configurations(job, given, message):
  with pytest.raises(ValueError, match=message):
    job(**given)


def test_compiling_is_no_part_of_the_rate(job, compiled, monkeypatch, tmp_path):
  """`sam3lt status` divides by the time since the first program was started, as the summary does."""
  encode, waited = compiled._encode, []

  def slow(*given):
    if not waited:
      waited.append(time.sleep(1.5))  # as if it was compiled
    return encode(*given)

  monkeypatch.setattr(compiled, "_encode", slow)
  monkeypatch.setattr(type(compiled), "waited_s", property(lambda self: 1.5 * len(waited)))
  monkeypatch.setattr(status, "WINDOW", 1e9)
  summary = job(shard_size=100)
  out = str(tmp_path / "out")
  rest = summary.seconds - 1.5
  assert summary.shards == 1 and rest > ledger.read_shard(out, 0)[0]["seconds"]
  assert job_status(out).rate > summary.images / rest


def test_another_model_has_another_digest():
  predictor = pictures.predictor()
  digest = run.digest(predictor.variables)
  assert digest == run.digest(predictor.variables)
  leaves, structure = jax.tree.flatten(predictor.variables)
  leaves[3] = leaves[3] + 1e-3
  assert run.digest(jax.tree.unflatten(structure, leaves)) != digest


def test_a_model_is_loaded_by_its_name(photos):
  config = JobConfig(str(photos), "out", phrases=["a"], model="random:tiny", dtype="bfloat16", image_size=84)
  engine, weights = run.load(config, 1, ahead=False)
  assert engine.processor.image_size == 84 and engine.model.config.text.fused
  assert engine.devices == jax.local_devices() and not engine.programs()["encode"]
  assert run.load(config, 1, ahead=False)[1] == weights
  fingerprint = run.fingerprint(config, engine, Questions.of_phrases(config.phrases), weights)
  assert (fingerprint["model"], fingerprint["dtype"], fingerprint["weights"]) == (
    "random:tiny", "bfloat16", weights,
  )  # fmt: skip


def test_before_the_first_record_a_job_compiles_what_it_meets_and_no_more(job, monkeypatch):
  """One program of each kind, whatever other buckets there are; ahead, in threads, and none twice."""
  made = []

  class Watched(Engine):
    def __init__(self, *given, **options):
      super().__init__(*given, **options | {"image_buckets": (2,), "prompt_buckets": (1, 2, 4, 8)})
      made.append(self)

  counts = []
  monkeypatch.setattr(run, "Engine", Watched)
  with tiny.hurry():
    job(After(1, lambda: counts.append({n: len(p) for n, p in made[0].programs().items()})))
  assert counts == [{"encode": 1, "detect": 1, "read": 1}]
  assert {n: len(p) for n, p in made[0].programs().items()} == counts[0]  # nor afterwards
