"""Reading ahead: every way an image can be bad has its code, order is kept, and memory is bounded."""

import errno
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time

import fsspec
import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from sam3lt_jax.data.records import Record
from sam3lt_jax.jobs import reading, sources
from sam3lt_jax.jobs.reading import Failure, Pixels, Reader, read_image
from sam3lt_jax.processing import images
from tests.jobs import pictures
from tests.jobs.deadly import Deadly

SIDE = 28

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  return pictures.folder(tmp_path_factory.mktemp("photos"), 6)


def items(folder):
  return list(sources.list_items(folder))


def test_pixels_are_those_of_preprocess(photos):
  for item in items(photos):
    if item.id in pictures.BAD:
      continue
    found = read_image(item, SIDE)
    wanted, size = images.preprocess(item.uri, SIDE)
    assert isinstance(found, Pixels) and found.pixels.dtype == np.uint8
    np.testing.assert_array_equal(images.normalise(found.pixels), wanted)
    assert (found.height, found.width) == size


def test_an_image_lies_as_its_exif_says(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(pictures.photo(1, 30, 50)).save(tmp_path / "a.jpg", exif=exif)
  found = read_image(items(tmp_path)[0], SIDE)
  assert (found.height, found.width) == (50, 30)


def test_each_bad_image_has_its_code(photos):
  found = {item.id: read_image(item, SIDE) for item in items(photos)}
  codes = {key: value.code for key, value in found.items() if isinstance(value, Failure)}
  assert codes == pictures.BAD
  assert found["broken/cut.jpg"].message.startswith("damaged or truncated: ")


def test_what_the_file_system_says(photos, tmp_path, monkeypatch):
  good = items(photos)[0]
  assert read_image(sources.Item("x", str(tmp_path / "no.jpg")), SIDE).code == "missing"
  assert read_image(sources.Item("x", str(tmp_path)), SIDE) == Failure("not_an_image", "a folder, no file")
  tries = []

  def refuse(error):
    def read(item):
      tries.append(item)
      raise error

    monkeypatch.setattr(sources, "open_item", read)

  refuse(PermissionError(errno.EACCES, "Permission denied"))
  assert read_image(good, SIDE) == Failure("no_permission", "Permission denied")
  refuse(RuntimeError("strange"))
  assert read_image(good, SIDE) == Failure("other", "RuntimeError: strange")
  assert len(tries) == 2
  # Storage that hiccups is asked again.
  monkeypatch.setattr(reading, "PAUSE_S", 0)
  refuse(OSError(errno.EIO, "Input/output error"))
  assert read_image(good, SIDE) == Failure("other", "Input/output error")
  assert len(tries) == 2 + reading.TRIES


def test_an_image_over_the_limit_is_not_decoded(photos, monkeypatch):
  item = items(photos)[-1]
  with Image.open(item.uri) as image:
    pixels = image.width * image.height
  with reading.pixel_limit(pixels):
    assert isinstance(read_image(item, SIDE), Pixels)
  monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
  with reading.pixel_limit(pixels - 1):
    found = read_image(item, SIDE)
  assert found.code == "too_large" and f"the limit is {pixels - 1}" in found.message


def test_the_limit_is_the_jobs_and_pillows_comes_back(tmp_path, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow alone would raise above 200
  Image.fromarray(pictures.photo(0)).save(tmp_path / "a.png")
  with Reader(SIDE, workers=1) as reader:
    [(_, _, found)] = reader.stream([("tag", items(tmp_path)[0])])
    assert isinstance(found, Pixels)
  assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("processes", [False, True])
def test_order_tags_and_marks_are_kept(photos, processes):
  works = [(i, item) for i, item in enumerate(items(photos))]
  works.insert(3, ("end", None))
  with Reader(SIDE, workers=3, processes=processes) as reader:
    found = list(reader.stream(works))
  assert [(tag, item) for tag, item, _ in found] == works
  assert found[3][2] is None
  for _, item, one in found:
    if item is not None:
      wanted = read_image(item, SIDE)
      assert type(one) is type(wanted)
      if isinstance(one, Pixels):
        np.testing.assert_array_equal(one.pixels, wanted.pixels)


def test_no_more_is_read_than_there_is_room_for(photos, monkeypatch):
  asked, reading_now, most = [], [], []
  lock = threading.Lock()

  def read(item, size):
    with lock:
      reading_now.append(item)
      most.append(len(reading_now))
    time.sleep(0.002)
    with lock:
      reading_now.remove(item)
    return Failure("other", item)

  monkeypatch.setattr(reading, "read_image", read)

  def works():
    for i in range(60):
      asked.append(i)
      yield i, str(i)

  with Reader(SIDE, workers=3, ahead=7) as reader:
    for done, (tag, _, found) in enumerate(reader.stream(works()), 1):
      assert tag == done - 1 and found.message == str(tag)
      assert len(asked) <= done + 7
  assert len(asked) == 60 and 1 < max(most) <= 3
  assert reader.waited_s > 0


def test_a_decoder_that_dies_costs_its_own_image(photos):
  good = next(item for item in items(photos) if item.id.endswith("png"))
  works = [(i, Deadly("deadly" if i == 2 else f"{i}", good.uri)) for i in range(6)]
  with Reader(SIDE, workers=2, processes=True) as reader:
    found = [one for _, _, one in reader.stream(works)]
  assert [isinstance(one, Pixels) for one in found] == [i != 2 for i in range(6)]
  assert found[2] == Failure("other", "the worker process that decoded it died")


def test_it_gives_up_waiting_when_told(photos, monkeypatch):
  release, stop = threading.Event(), threading.Event()
  monkeypatch.setattr(reading, "read_image", lambda *a: release.wait(1000))
  threading.Timer(0.1, stop.set).start()
  with Reader(SIDE, workers=1, stop=stop.is_set) as reader:
    with pytest.raises(reading.Stopped):
      list(reader.stream([(0, "item"), (1, "item")]))
    assert stop.is_set() and not release.is_set()
    release.set()


@pytest.mark.parametrize("processes", [False, True])
def test_a_hung_read_ends_with_the_job_and_so_does_a_killed_one(processes, tmp_path):
  """By SIGTERM in good order; after SIGKILL no decoder stays behind."""
  for number in (signal.SIGTERM, signal.SIGKILL):
    command = [sys.executable, "-m", "tests.jobs.hanging", str(int(processes)), str(tmp_path / "pids")]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert job.stdout.readline() == "reading\n"
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert (job.pid in pids) is not processes
    job.send_signal(number)  # who waits for the images waits 1000 s
    assert job.wait(100) == (0 if number == signal.SIGTERM else -number)
    end = time.monotonic() + 100
    while alive := [pid for pid in pids if is_alive(pid)]:
      assert time.monotonic() < end, f"{alive} stayed behind after {number!r}"
      time.sleep(0.05)
    os.remove(tmp_path / "pids")


def is_alive(pid):
  try:
    with open(f"/proc/{pid}/stat") as f:
      return f.read().rpartition(")")[2].split()[0] not in "ZX"
  except FileNotFoundError:
    return False


def test_what_is_no_file_is_a_failure(tmp_path):
  os.mkfifo(tmp_path / "a.jpg")
  with socket.socket(socket.AF_UNIX) as bound:
    bound.bind(str(tmp_path / "b.jpg"))
  (tmp_path / "c.jpg").symlink_to("/dev/zero")
  (tmp_path / "d.jpg").symlink_to("d.jpg")
  found = [read_image(item, SIDE) for item in items(tmp_path)]
  assert [one.message for one in found] == [
    "a named pipe, no file", "a socket, no file", "a device, no file", "Too many levels of symbolic links"
  ]  # fmt: skip
  assert [one.code for one in found] == [*["not_an_image"] * 3, "other"]


@pytest.mark.filterwarnings("ignore:Image was not the expected size:UserWarning")
def test_the_limit_holds_for_what_an_icon_has_inside(tmp_path):
  """Pillow decodes it before it tells its size: 195 kB took 1.6 GB."""
  out = io.BytesIO()
  Image.new("1", (3000, 3000)).save(out, "PNG")
  head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(out.getvalue()), 22)
  (tmp_path / "a.ico").write_bytes(head + out.getvalue())
  with pytest.MonkeyPatch.context() as patch, reading.pixel_limit(8_999_999):
    patch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("it was decoded"))
    found = read_image(items(tmp_path)[0], SIDE)
  assert found == Failure("too_large", "9000000 pixels; the limit is 8999999 (--max-pixels)")
  with reading.pixel_limit(9_000_000):
    assert isinstance(read_image(items(tmp_path)[0], SIDE), Pixels)


def test_members_of_tars_and_objects_are_read_as_files_are(tmp_path, monkeypatch):
  """And asked for again only where the storage failed."""
  photo = pictures.photo(3, 300, 400)
  out = io.BytesIO()
  Image.fromarray(photo).save(out, "PNG", compress_level=0)
  data = out.getvalue()
  with tarfile.open(tmp_path / "s.tar", "w") as tar:
    for name in ("1.png", "2.png"):
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  cut = list(sources.list_items(tmp_path / "s.tar"))[1]
  fs = fsspec.filesystem("memory")
  fs.pipe("/reading/a.png", data)
  fs.pipe("/reading/empty.png", b"")
  wanted = images.resize_image(photo, SIDE)
  remote = list(sources.list_items("memory://reading"))
  for item in [*sources.list_items(tmp_path / "s.tar"), remote[0]]:
    np.testing.assert_array_equal(read_image(item, SIDE).pixels, wanted)
  os.truncate(tmp_path / "s.tar", cut.meta["offset"] + 100_000)
  assert read_image(cut, SIDE).code == "truncated"
  assert read_image(remote[1], SIDE).code == "empty"
  assert read_image(sources.Item("x", "memory://reading/gone.png"), SIDE).code == "missing"
  monkeypatch.setattr(reading, "PAUSE_S", 0)
  tries, read = [], type(fs).cat_file

  def hiccup(self, path, start=None, end=None):
    tries.append(start)
    if len(tries) == 1:
      raise RuntimeError("503")
    return read(self, path, start, end)

  monkeypatch.setattr(type(fs), "cat_file", hiccup)
  assert isinstance(read_image(remote[0], SIDE), Pixels)
  monkeypatch.setattr(type(fs), "cat_file", lambda *a, **b: (_ for _ in ()).throw(TimeoutError()))
  assert read_image(remote[0], SIDE) == Failure("other", "Connection timed out")


def test_the_frame_of_the_annotations_is_kept(tmp_path):
  """Where a COCO source has the size of the stored pixels, as in `data.Record.load_image`."""
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(pictures.photo(1, 30, 50)).save(tmp_path / "a.jpg", exif=exif)
  sizes = {}
  for height, width in ((30, 50), (50, 30)):
    entry = {"id": 1, "file_name": "a.jpg", "height": height, "width": width}
    (tmp_path / "c.json").write_text(json.dumps({"images": [entry], "annotations": []}))
    [item] = sources.list_items(tmp_path / "c.json")
    found = read_image(item, SIDE)
    sizes[height, width] = (found.height, found.width)
    record = Record(1, tmp_path / "a.jpg", (height, width), ())
    np.testing.assert_array_equal(images.resize_image(record.load_image(), SIDE), found.pixels)
  assert sizes == {(30, 50): (30, 50), (50, 30): (50, 30)}
