"""A job of clips: a clip a shard, each with files of its own; stopped, failed and done ones."""

import json
import threading

import pytest

from sam3lt_jax import cli
from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.jobs.clips import ClipConfig, run_clips
from sam3lt_jax.jobs.merge import merge
from sam3lt_jax.jobs.plan import Plan
from sam3lt_jax.jobs.run import Progress
from sam3lt_jax.jobs.sources import VIDEOS, list_items
from tests.video import clips, fake
from tests.video.test_writing import contents, small_pieces, track

__all__ = ["small_pieces"]  # a fixture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("source")
  (folder / "more").mkdir()
  for i, name in enumerate(("a.mp4", "b.mkv", "more/a.mp4")):
    clips.write(folder / name, 10 + i)
  (folder / "broken.mp4").write_text("no video")
  (folder / "notes.pdf").write_text("none of the clips")
  return folder


class Predictor(fake.Predictor):
  def __init__(self, **options):
    super().__init__(**options)
    self.clips = []

  def track(self, source, text, state=None, rate=None, threshold=None, latency=None, max_objects=None):
    self.clips.append(source.path)
    return super().track(source, text, state)


class Notes(Progress):
  def __init__(self):
    self.lines, self.done = [], 0

  def note(self, text):
    self.lines.append(text)

  def advance(self, failed):
    self.done += 1


def run(folder, out, predictors, **options):
  stop = options.pop("stop", None)
  config = ClipConfig(str(folder), str(out), fake.PHRASES, **{"davis": True, "every": 5} | options)
  notes = Notes()
  return run_clips(config, predictors=predictors, progress=notes, stop=stop), notes


def test_every_clip_has_its_files(folder, tmp_path):
  predictors = [Predictor(), Predictor()]
  summary, notes = run(folder, tmp_path / "out", predictors)
  assert (summary.images, summary.frames, summary.shards_left, summary.exit_code) == (4, 33, 0, 0)
  assert summary.failures == {"not_a_video": 1} and "broken.mp4" in notes.lines[-1] and notes.done == 4
  names = "a.mp4", "b.mkv", "more/a.mp4"
  assert sorted(path for p in predictors for path in p.clips) == [str(folder / name) for name in names]
  for name in ("a.mp4", "b.mkv", "more/a.mp4"):
    track(folder / name, tmp_path / "alone" / name, **dict.fromkeys(("threshold", "latency", "max_objects")),
          predictor=Predictor())  # fmt: skip
    assert contents(tmp_path / "out" / "clips" / name) == contents(tmp_path / "alone" / name)
  again, _ = run(folder, tmp_path / "out", [Predictor()])
  assert (again.images, again.shards_left) == (0, 0)
  plan = Plan.load(tmp_path / "out")
  found = [plan.read(i)[1][0][1] for i in range(4)]
  assert [(r["id"], r.get("frames"), r.get("objects")) for r in found] == [
    ("a.mp4", 10, 2), ("b.mkv", 11, 2), ("broken.mp4", None, None), ("more/a.mp4", 12, 2),
  ]  # fmt: skip
  with pytest.raises(ValueError, match=r"is a job of clips: what was found stands in .*clips"):
    merge(tmp_path / "out", tmp_path / "found.json")


def test_a_clip_that_was_stopped_goes_on(folder, tmp_path):
  stop = threading.Event()

  class Stopping(Predictor):
    def track(self, source, *args, **options):
      tracking = super().track(source, *args, **options)
      steps = tracking.steps

      def counted():
        for i, found in enumerate(steps()):
          if i == 7 and source.path.endswith("b.mkv"):
            stop.set()
          yield found

      tracking.steps = counted
      return tracking

  first, _ = run(folder, tmp_path / "out", [Stopping()], stop=stop)
  assert (first.images, first.shards_left, first.stopped) == (1, 3, "stopped")
  half = tmp_path / "out" / "clips" / "b.mkv"
  assert 0 < len((half / "masks.jsonl").read_text().splitlines()) < 11 and not (half / "overlay.mp4").exists()
  second, _ = run(folder, tmp_path / "out", [Predictor()])
  assert (second.images, second.shards_left) == (3, 0) and second.frames < 11 + 12
  track(folder / "b.mkv", tmp_path / "alone", **dict.fromkeys(("threshold", "latency", "max_objects")),
        predictor=Predictor())  # fmt: skip
  assert contents(half) == contents(tmp_path / "alone")


def test_an_error_of_ours_ends_all_devices(folder, tmp_path):
  class Wrong(Predictor):
    def track(self, *args, **options):
      raise ArgumentError("latency", " must be at most 3, got 14")

  with pytest.raises(ArgumentError, match="latency must be at most 3"):
    run(folder, tmp_path / "out", [Wrong(), Wrong()])
  assert not list((tmp_path / "out" / "shards").glob("*.jsonl"))


def test_what_is_listed(folder, tmp_path):
  names = ["a.mp4", "b.mkv", "broken.mp4", "more/a.mp4"]
  assert [item.id for item in list_items(str(folder), kind=VIDEOS)] == names
  assert [item.id for item in list_items(str(folder), kind=VIDEOS, recursive=False)] == names[:3]
  assert [item.id for item in list_items(str(folder / "*.mp4"), kind=VIDEOS)] == ["a.mp4", "broken.mp4"]
  assert [item.id for item in list_items([str(folder / "b.mkv"), str(folder / "a.mp4")], kind=VIDEOS)] == [
    "b.mkv",
    "a.mp4",
  ]
  (tmp_path / "list.txt").write_text(f"{folder}/a.mp4\n\n{folder}/b.mkv\n")
  assert [item.uri for item in list_items(str(tmp_path / "list.txt"), kind=VIDEOS)] == [
    str(folder / "a.mp4"), str(folder / "b.mkv")
  ]  # fmt: skip


def test_one_shell_for_both_kinds_of_jobs(folder, tmp_path):
  with pytest.raises(ValueError, match="process_index and process_count go together"):
    run(folder, tmp_path / "out", [Predictor()], process_index=1)
  with pytest.raises(ValueError, match="phrases must name at least one thing"):
    ClipConfig(str(folder), str(tmp_path / "out"))
  run(folder, tmp_path / "out", [Predictor()])
  [kept] = (tmp_path / "out" / "runs").glob("*.json")
  assert json.loads(kept.read_text())["frames"] == 33
  (tmp_path / "list.txt").write_text("x/../a.mp4\nx/a.mp4\n")  # one folder for what is found
  with pytest.raises(ValueError, match=r"two clips are called x/a\.mp4"):
    run(tmp_path / "list.txt", tmp_path / "new", [Predictor()])


@pytest.mark.parametrize(
  ("message", "source"),
  [
    ("does not exist; accepted: a folder, a glob", "nowhere"),
    ("no video files match", "*.jpg"),
    ("the id 'a.mp4' occurs twice", ["a.mp4", "more/a.mp4"]),
    ("video files are read from a local disk", "gs://bucket/clips"),
  ],
)
def test_bad_sources(folder, monkeypatch, message, source):
  monkeypatch.chdir(folder)
  with pytest.raises(ValueError, match=message):
    list_items(source, kind=VIDEOS)


def test_the_command(folder, tmp_path, monkeypatch, capsys):
  from sam3lt_jax.jobs import clips as job

  monkeypatch.setattr(job, "load", lambda config: [Predictor()])
  command = ["batch", str(folder), "--video", "--prompts", *fake.PHRASES, "--out", str(tmp_path / "out"),
             "--tracker", "same", "--davis", "--json"]  # fmt: skip
  assert cli.main(command) == 0
  told = capsys.readouterr()
  assert json.loads(told.out)["frames"] == 33 and "broken.mp4" in told.err
  assert cli.main(["status", str(tmp_path / "out")]) == 0
  assert "clips    4 of 4 (100.0%), 1 failed" in capsys.readouterr().out
  assert cli.main([*command[:3], "--prompts-file", "x.txt", "--out", "y"]) == 2
  assert "--video takes --prompts" in capsys.readouterr().err
