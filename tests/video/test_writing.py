"""What a tracked clip leaves in its folder, and that kills do not change a byte of it."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys

import av
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lt_jax.storage import CannotWrite, FileLock
from sam3lt_jax.video import overlay, writing
from sam3lt_jax.video.frames import open_frames
from sam3lt_jax.video.writing import Files, davis_palette, write_tracks
from tests import mounts
from tests.kills import kill_after
from tests.video import clips, fake


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  return clips.write(tmp_path_factory.mktemp("clips") / "clip.mp4", 40, audio=True)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
  monkeypatch.setattr(overlay, "PIECE", 8)


def track(source, out, predictor=None, phrases=fake.PHRASES, **options):
  kinds = {name: options.pop(name) for name in ("overlay", "davis", "every") if name in options}
  files = Files(str(out), **{"davis": True, "every": 5} | kinds)
  return write_tracks(predictor or fake.Predictor(), source, files, phrases, **options)


def contents(out):
  """name -> bytes of all files."""
  return {
    os.path.relpath(os.path.join(folder, name), out): open(os.path.join(folder, name), "rb").read()
    for folder, _, names in os.walk(out)
    for name in names
  }


@pytest.fixture(scope="module")
def whole(clip, tmp_path_factory):
  """The folder of a run that nothing interrupted."""
  before, overlay.PIECE = overlay.PIECE, 8
  out = tmp_path_factory.mktemp("whole") / "out"
  written = track(clip, out)
  overlay.PIECE = before
  assert (written.frames, written.before, written.objects, written.stopped) == (40, 0, 2, False)
  return out


def test_the_lines(whole, clip):
  lines = [json.loads(line) for line in (whole / "masks.jsonl").read_text().splitlines()]
  found = list(fake.Predictor().track(clip, text=fake.PHRASES))
  assert [line["frame"] for line in lines] == list(range(40))
  for line, frame in zip(lines, found):
    assert line["time"] == frame.time and [a["id"] for a in line["annotations"]] == frame.ids.tolist()
    for a, mask, score in zip(line["annotations"], frame.masks, frame.scores):
      np.testing.assert_array_equal(coco_mask.decode(a["segmentation"]), mask)
      assert a["area"] == mask.sum() and np.float32(a["score"]) == score
      x, y, width, height = a["bbox"]
      rows, columns = np.nonzero(mask)
      assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
      assert a["category_id"] == a["id"] + 1  # as the fake numbers them


def test_the_overlay_has_the_times_and_the_sound(whole, clip):
  drawn, source = list(open_frames(whole / "overlay.mp4")), list(open_frames(clip))
  assert [frame.time for frame in drawn] == [frame.time for frame in source]
  found = list(fake.Predictor().track(clip, text=fake.PHRASES))
  for a, b in zip(drawn, found):
    wanted = np.asarray(b.render())
    off = [np.abs(a.image.astype(int) - image.astype(int)).mean() for image in (wanted, b.image)]
    assert off[0] < 12 and 1.5 * off[0] < off[1]  # small letters in colours suffer from H.264
  sounds = []
  for path in (whole / "overlay.mp4", clip):
    with av.open(str(path)) as container:
      sounds.append([(p.pts, bytes(p)) for p in container.demux(container.streams.audio[0]) if p.size])
  assert sounds[0] == sounds[1] and len(sounds[0]) > 10


def test_the_overlay_of_variable_times_and_odd_sizes(tmp_path):
  times = [0.0, 0.04, 0.2, 0.21, 0.5, 1.5, 1.533, 1.6, 1.7, 1.9]
  clip = clips.write(tmp_path / "clip.mp4", 10, times=times)
  track(clip, tmp_path / "out")
  found = [frame.time for frame in open_frames(tmp_path / "out" / "overlay.mp4")]
  np.testing.assert_allclose(found, times, atol=1e-3)
  odd = clips.frames(10, 47, 63)
  track(odd, tmp_path / "odd")
  drawn = list(open_frames(tmp_path / "odd" / "overlay.mp4"))
  assert len(drawn) == 10 and drawn[0].image.shape == (48, 64, 3)


def test_the_end_files(whole):
  results = json.loads((whole / "youtube_vis.json").read_text())
  lines = [json.loads(line) for line in (whole / "masks.jsonl").read_text().splitlines()]
  assert [(r["video_id"], r["id"], r["category_id"]) for r in results] == [(1, 0, 1), (1, 1, 2)]
  for r in results:
    assert len(r["segmentations"]) == 40
    for line, mask in zip(lines, r["segmentations"]):
      there = {a["id"]: a["segmentation"] for a in line["annotations"]}
      assert mask == there.get(r["id"])
  rows = (whole / "objects.csv").read_text().splitlines()
  assert rows[0] == "id,phrase,first_frame,last_frame,frames,score"
  assert [row.split(",")[:5] for row in rows[1:]] == [
    ["0", "red square", "0", "39", "40"],
    ["1", "blue square", "0", "39", "40"],
  ]
  about = json.loads((whole / "track.json").read_text())
  assert about["done"]["frames"] == 40 and about["phrases"] == fake.PHRASES
  assert sorted(os.listdir(whole)) == [
    "davis", "masks.jsonl", "objects.csv", "overlay.mp4", "track.json", "youtube_vis.json",
  ]  # fmt: skip


def test_davis(whole, clip):
  palette = davis_palette()
  assert palette[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
  assert palette[255].tolist() == [224, 224, 192]  # as the data set's own files have it
  assert len(os.listdir(whole / "davis")) == 40
  for frame in fake.Predictor().track(clip, text=fake.PHRASES):
    image = Image.open(whole / "davis" / f"{frame.index:05d}.png")
    assert image.mode == "P" and image.getpalette()[:6] == [0, 0, 0, 128, 0, 0]
    numbers = np.asarray(image)
    assert set(np.unique(numbers)) <= {0, 1, 2}
    np.testing.assert_array_equal(numbers == 1, frame.masks[0])


def test_objects_are_sorted_in_groups_where_they_are_many(whole, tmp_path, monkeypatch):
  monkeypatch.setattr(writing, "_GROUP", 1)
  found = writing.objects(str(whole / "masks.jsonl"))
  writing.write_vis(str(tmp_path / "vis.json"), str(whole / "masks.jsonl"), found, 40)
  assert (tmp_path / "vis.json").read_bytes() == (whole / "youtube_vis.json").read_bytes()


def test_a_clip_without_a_find(tmp_path):
  clip = clips.write(tmp_path / "clip.mp4", 9)
  written = track(clip, tmp_path / "out", phrases=["green square"])
  assert written.objects == 0 and json.loads((tmp_path / "out" / "youtube_vis.json").read_text()) == []
  assert (tmp_path / "out" / "objects.csv").read_text().count("\n") == 1
  assert len(list(open_frames(tmp_path / "out" / "overlay.mp4"))) == 9


# ---------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize("after", [1, 4, 9, 23, 39])
def test_stopped_and_started_again(clip, whole, tmp_path, after):
  done = []
  stopped = track(
    clip, tmp_path, stop=lambda: len(done) >= after, on_frame=lambda n, count: done.append((n, count))
  )
  assert stopped.stopped == (stopped.frames < 40) and done[-1] == (stopped.frames, 40)
  assert not (tmp_path / "track.json").read_text().count("done") or after == 39
  notes = []
  written = track(clip, tmp_path, note=notes.append)
  assert written.frames == 40 and written.before == (stopped.frames if stopped.stopped else 40)
  assert notes
  assert contents(tmp_path) == contents(whole)


def test_done_is_done(clip, whole):
  before, notes = contents(whole), []
  written = track(clip, whole, note=notes.append)
  assert (written.frames, written.before, written.objects) == (40, 40, 2)
  assert "nothing is left to do" in notes[0] and contents(whole) == before


def life(clip, out, frames, delay):
  overlay.PIECE = 8
  track(clip, out, fake.Predictor(pause=0.01), every=3, on_frame=kill_after(frames, delay))


@pytest.mark.full  # a process a kill
def test_twenty_kills(clip, whole, tmp_path):
  seed = random.randrange(10**6)
  print(f"seed {seed}")  # shown by pytest where the test fails
  rng, context, ends = random.Random(seed), multiprocessing.get_context("forkserver"), []
  context.set_forkserver_preload(["tests.video.test_writing"])
  folder, lines = tmp_path / "out", tmp_path / "out" / "masks.jsonl"
  while ends.count(-signal.SIGKILL) < 20:
    life_of = (clip, folder, rng.randrange(12), rng.uniform(0, 0.05))
    process = context.Process(target=life, args=life_of, daemon=True)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    ends.append(process.exitcode)
    print(life_of[2:], process.exitcode, lines.read_bytes().count(b"\n") if lines.exists() else 0)
    if process.exitcode == 0:  # it came to its end first: that is right, and the next ones begin anew
      assert contents(folder) == contents(whole)
      shutil.rmtree(folder)
  track(clip, folder)
  assert contents(folder) == contents(whole)


def test_a_kill_at_any_file_of_the_end(clip, whole, tmp_path):
  """The folder as it is at each step of the end is what a kill there leaves: from all a run ends the same."""
  out, left, watching = tmp_path / "out", [], False

  def watch(event, args):
    nonlocal watching
    if not watching or event not in ("open", "os.rename", "os.remove", "os.rmdir"):
      return
    if str(args[0]).startswith(str(out)) or not os.path.isabs(str(args[0])):  # rmtree's names are in a folder
      watching = False
      left.append(shutil.copytree(out, tmp_path / f"{len(left)}"))
      watching = True

  def on_frame(done, count):
    nonlocal watching
    watching = done == count

  sys.addaudithook(watch)  # for good: it can only be told not to look
  track(clip, out, on_frame=on_frame)
  watching = False
  ends = ["done" in json.loads((folder / "track.json").read_text()) for folder in left]
  assert ends.count(False) > 10 and ends.count(True) > 5
  for folder in left:
    track(clip, folder)
    assert contents(folder) == contents(whole) and not (folder / ".state").exists()


def test_a_piece_that_is_missing_is_drawn_again(clip, whole, tmp_path):
  steps = []
  track(clip, tmp_path, stop=lambda: len(steps) > 25, on_frame=lambda *a: steps.append(a))
  (piece,) = (tmp_path / ".state").glob("overlay-*0.mp4")
  piece.unlink()
  track(clip, tmp_path)
  assert contents(tmp_path) == contents(whole)


def test_pieces_are_the_same_on_every_cpu(tmp_path, monkeypatch):
  noise = np.random.default_rng(0).integers(0, 60, (12, 48, 64, 3)).astype(np.uint8)
  made, encoder = [], overlay._ENCODER
  for instructions in (
    "",
    ":asm=SSE2",
    ":asm=0",
  ):  # these stand in the file: compare pictures
    monkeypatch.setattr(overlay, "_ENCODER", encoder | {"x264-params": encoder["x264-params"] + instructions})
    pieces = overlay.Overlay(str(tmp_path / f"pieces{len(made)}"))
    for image in clips.frames(12) // 2 + noise:
      pieces.add(image)
    pieces.join(str(tmp_path / "joined.mp4"), np.arange(12) / 25, None)
    made.append(np.stack([frame.image for frame in open_frames(tmp_path / "joined.mp4")]))
  np.testing.assert_array_equal(made[1], made[0])
  np.testing.assert_array_equal(made[2], made[0])


# ---------------------------------------------------------------- what goes wrong


def test_another_question_needs_another_folder(clip, whole):
  before = contents(whole)
  for options, what in (
    ({"phrases": ["red square"]}, "phrases"),
    ({"predictor": fake.Predictor(delay=4)}, "model"),
    ({"davis": False}, "davis"),
  ):
    with pytest.raises(ValueError, match=rf"out=.* holds tracks of another run \(other {what}\)"):
      track(clip, whole, **options)
  with pytest.raises(ValueError, match=r"other source"):
    track(clips.frames(4), whole)
  assert contents(whole) == before


def test_two_at_once(clip, tmp_path):
  lock = FileLock(str(tmp_path / ".lock"))
  assert lock.acquire()
  try:
    with pytest.raises(ValueError, match="another process writes to"):
      track(clip, tmp_path)
  finally:
    lock.release()


def test_no_folder(clip, tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="file is no directory"):
    track(clip, tmp_path / "file" / "out")


def test_a_truncated_clip_is_tracked_as_far_as_it_goes(tmp_path):
  cut = clips.truncated(clips.write(tmp_path / "clip.mp4", 100, options={"movflags": "faststart"}))
  with pytest.warns(UserWarning, match="breaks off after"):
    written = track(cut, tmp_path / "out")
  assert 20 < written.frames < 90 and not written.stopped
  assert len(list(open_frames(tmp_path / "out" / "overlay.mp4"))) == written.frames


def test_a_frame_of_another_size_ends_the_clip(tmp_path):
  pictures = [*clips.frames(10), clips.draw(0)[:, :30]]
  notes = []
  written = track(pictures, tmp_path, note=notes.append)
  assert written.frames == 10 and "frame 10 of the list is 30x48 pixels" in notes[-1]
  assert json.loads((tmp_path / "track.json").read_text())["done"]["notes"] == notes[-1:]


def test_a_live_source_ends_where_it_is_stopped(tmp_path):
  def camera():
    for i in range(10**6):
      yield clips.draw(i)

  done = []
  written = track(camera(), tmp_path, stop=lambda: len(done) >= 6, on_frame=lambda *a: done.append(a))
  assert not written.stopped and written.frames >= 9  # what waited is put out
  assert len((tmp_path / "masks.jsonl").read_text().splitlines()) == written.frames


def test_a_full_disk(clip, whole, tmp_path):
  with mounts.tmpfs(tmp_path / "disk", "size=150k") as disk:
    with pytest.raises(CannotWrite, match="no space is left on its disk; what was tracked before is kept"):
      track(clip, disk)
    bigger = tmp_path / "out"
    shutil.copytree(disk, bigger)
  track(clip, bigger)
  assert contents(bigger) == contents(whole)
