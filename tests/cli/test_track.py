"""`sam3lt track`: what it writes and says, mistakes in one line, signals."""

from __future__ import annotations

import json
import os
import re
import signal

import numpy as np
import pytest
from PIL import Image

from sam3lt_jax import cli
from sam3lt_jax.cli import progress
from sam3lt_jax.cli import track as verb
from sam3lt_jax.video.writing import Files, write_tracks
from tests.video import clips, fake
from tests.video.test_writing import contents, small_pieces

__all__ = ["small_pieces"]  # a fixture


class Predictor(fake.Predictor):
  def track(self, source, text, state=None, latency=None, threshold=None, max_objects=None):
    return super().track(source, text, state)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  return clips.write(tmp_path_factory.mktemp("clips") / "clip.mp4", 30, audio=True)


@pytest.fixture
def loaded(monkeypatch):
  """The arguments that a predictor was loaded for, in place of which stands one that looks for colours."""
  asked = []
  monkeypatch.setattr(verb, "_load", lambda args: asked.append(args) or Predictor(pause=asked_pause[0]))
  asked_pause = [0.0]
  asked.append(asked_pause)
  return asked


def track(*arguments):
  return cli.main(["track", *map(str, arguments)])


def test_a_clip(clip, tmp_path, loaded, capsys):
  assert track(clip, *fake.PHRASES, "--out", tmp_path / "out", "--davis") == 0
  told = capsys.readouterr().out
  assert re.search(r"clip.mp4  64x48  30 frames, [0-9.]+ frames/s  2 objects", told)
  assert "masks.jsonl, overlay.mp4, youtube_vis.json, objects.csv, davis/" in told
  files = Files(str(tmp_path / "api"), davis=True)
  options = dict.fromkeys(("latency", "threshold", "max_objects"))
  write_tracks(Predictor(), clip, files, fake.PHRASES, **options)
  assert contents(tmp_path / "out") == contents(tmp_path / "api")
  assert track(clip, *fake.PHRASES, "--out", tmp_path / "out", "--davis") == 0
  assert "nothing is left to do" in capsys.readouterr().err


def test_pictures_without_an_overlay(tmp_path, loaded, capsys):
  (tmp_path / "frames").mkdir()
  for i in range(11):
    Image.fromarray(clips.draw(i)).save(tmp_path / "frames" / f"{i}.png")
  assert (
    track(tmp_path / "frames", "red square", "--out", tmp_path / "out", "--no-overlay", "--rate", 10) == 0
  )
  assert sorted(os.listdir(tmp_path / "out")) == [
    "masks.jsonl",
    "objects.csv",
    "track.json",
    "youtube_vis.json",
  ]
  lines = [json.loads(line) for line in (tmp_path / "out" / "masks.jsonl").read_text().splitlines()]
  np.testing.assert_allclose([line["time"] for line in lines], np.arange(11) / 10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_the_same_command_goes_on(clip, tmp_path, loaded, capsys, monkeypatch, number):
  command = [clip, *fake.PHRASES, "--out", tmp_path / "out"]
  assert track(*command[:-1], tmp_path / "whole") == 0
  advance, done = progress.Progress.advance, []

  def signalled(bar):
    advance(bar)
    done.append(bar)
    if len(done) == 5:
      os.kill(os.getpid(), number)

  with monkeypatch.context() as patch:
    patch.setattr(progress.Progress, "advance", signalled)
    assert track(*command) == 128 + number
  told = capsys.readouterr().out.splitlines()[-1]
  name = signal.Signals(number).name
  found = re.fullmatch(rf"stopped by {name} after (\d+) frames(, .*)?: the same command goes on .*", told)
  assert int(found[1]) >= 5
  assert track(*command) == 0
  assert f"going on after {found[1]} frames" in capsys.readouterr().err
  assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_bar_shows_frames_a_second(clip, tmp_path, loaded, capsys, monkeypatch):
  monkeypatch.setattr(progress, "DELAY", 0.1)
  loaded[0][0] = 0.03
  assert track(clip, *fake.PHRASES, "--out", tmp_path / "out", "--no-overlay") == 0
  assert re.search(r"tracking \d+/30 \[.*frames a second, .*left\]", capsys.readouterr().err)


@pytest.mark.parametrize(
  ("message", "arguments"),
  [
    ("No such file or directory: nowhere.mp4", ["nowhere.mp4", "a", "--out", "o"]),
    ("video 'text.mp4' is no video", ["text.mp4", "a", "--out", "o"]),
    ("No such file or directory: /dev/video77", ["77", "a", "--out", "o"]),
    ("the following arguments are required: PHRASE", ["clip.mp4", "--out", "o"]),
    ("the following arguments are required: -o/--out", ["clip.mp4", "a"]),
    ("--every: must be a whole number of at least 1", ["clip.mp4", "a", "--out", "o", "--every", "0"]),
    ("--rate: must be a number above 0", ["clip.mp4", "a", "--out", "o", "--rate", "-1"]),
    ("--out 'text.mp4': ", ["clip.mp4", "a", "--out", "text.mp4"]),
  ],
)
def test_mistakes_are_one_line(clip, tmp_path, loaded, monkeypatch, capsys, message, arguments):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "text.mp4").write_text("no video")
  (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
  assert track(*arguments) == 2
  error = capsys.readouterr().err
  assert message in error and len(error.strip().splitlines()) == 1
  assert len(loaded) == 1, "a model was loaded first"


def test_a_truncated_clip_is_told(tmp_path, loaded, capsys):
  cut = clips.truncated(clips.write(tmp_path / "clip.mp4", 100, options={"movflags": "faststart"}))
  assert track(cut, *fake.PHRASES, "--out", tmp_path / "out") == 0
  assert re.search(r"warning: video .* breaks off after \d+ frames", capsys.readouterr().err)
