"""Sources of frames: what each gives, and what is said of those that cannot be used."""

import builtins
import http.server
import re
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

from sam3lt_jax.video import frames as video_frames
from sam3lt_jax.video.frames import FrameError, ahead, natural, open_frames
from tests.video import clips


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  return clips.write(tmp_path_factory.mktemp("clips") / "clip.mp4", 30)


def images(frames):
  return [frame.image for frame in frames]


def assert_drawn(found, wanted):
  """But for what the encoder loses."""
  assert len(found) == len(wanted)
  for a, b in zip(found, wanted):
    assert a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).mean() < 4


def test_a_video_file(clip):
  frames = open_frames(clip)
  assert frames.size == (clips.HEIGHT, clips.WIDTH) and frames.rate == clips.RATE and frames.count == 30
  found = list(frames)
  assert [frame.index for frame in found] == list(range(30))
  np.testing.assert_allclose([frame.time for frame in found], np.arange(30) / clips.RATE, atol=1e-6)
  assert all(frame.image.dtype == np.uint8 for frame in found)
  assert_drawn(images(found), clips.frames(30))
  assert images(frames)[7].tobytes() == found[7].image.tobytes()  # it can be read again


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_any_frame_is_what_reading_from_the_start_gives(tmp_path, suffix):
  frames = open_frames(clips.write(tmp_path / f"clip{suffix}", 40))
  fresh = [open_frames(frames.path)[i] for i in (17, 3)]  # before anything else was read
  found = list(frames)
  for i in (30, 3, 4, 11, 12, 13, 39, 0, 38, 5):
    assert frames[i].image.tobytes() == found[i].image.tobytes() and frames[i][:2] == found[i][:2]
  for frame in fresh:
    assert frame.image.tobytes() == found[frame.index].image.tobytes()
  for start in (0, 1, 12, 25, 39, 40):
    assert [f.index for f in frames.read(start)] == list(range(start, 40))
    assert all(f.image.tobytes() == found[f.index].image.tobytes() for f in frames.read(start))


@pytest.mark.parametrize("index", [40, -1, 1000])
def test_no_such_frame(tmp_path, index):
  for source in (clips.write(tmp_path / "clip.mp4", 40), clips.frames(40)):
    with pytest.raises(IndexError, match=rf"there is no frame {index} in .*, which has 40"):
      open_frames(source)[index]


@pytest.mark.parametrize(("rotation", "corner"), [(90, "bl"), (180, "br"), (-90, "tr")])
def test_rotation_is_applied(tmp_path, rotation, corner):
  """The white corner, drawn top left, goes where a player shows it: counterclockwise."""
  frames = open_frames(clips.write(tmp_path / "clip.mp4", 4, rotation=rotation))
  turned = abs(rotation) == 90
  assert frames.size == ((clips.WIDTH, clips.HEIGHT) if turned else (clips.HEIGHT, clips.WIDTH))
  image = frames[2].image
  found = {"tl": image[:4, :4], "tr": image[:4, -4:], "bl": image[-4:, :4], "br": image[-4:, -4:]}
  assert image.shape[:2] == frames.size
  assert [name for name, part in found.items() if part.mean() > 200] == [corner]


def test_a_phone_in_portrait_is_turned_clockwise(tmp_path):
  """As phones write it, by the matrix in the file, not by the encoder's word for it."""
  path = clips.write(tmp_path / "clip.mp4", 4, rotation=90)
  data = path.read_bytes()
  left, right = (np.array([0, s, 0, -s, 0], ">i4").tobytes() for s in (-65536, 65536))
  assert data.count(left) == 1
  path.write_bytes(data.replace(left, right))
  image = open_frames(path)[0].image
  assert image[:4, -4:].mean() > 200 and image[-4:, :4].mean() < 100


def test_variable_rate_keeps_its_times(tmp_path):
  times = [0.0, 0.04, 0.2, 0.21, 0.5, 1.5, 1.533]
  frames = open_frames(clips.write(tmp_path / "clip.mp4", 7, times=times))
  found = list(frames)
  np.testing.assert_allclose([frame.time for frame in found], times, atol=1e-3)
  assert_drawn(images(found), clips.frames(7))
  assert frames[5].time == found[5].time


def test_times_begin_at_the_first_frame(tmp_path):
  times = [3.0 + i / clips.RATE for i in range(20)]
  frames = open_frames(clips.write(tmp_path / "clip.mkv", 20, times=times))
  np.testing.assert_allclose([frame.time for frame in frames], np.arange(20) / clips.RATE, atol=1e-3)


def test_short_clips_know_their_length_whatever_the_file_says(tmp_path):
  for suffix in (".ts", ".mkv", ".mp4"):
    assert open_frames(clips.write(tmp_path / f"clip{suffix}", 9)).count == 9


def test_measured(tmp_path):
  frames = open_frames(clips.write(tmp_path / "clip.ts", 33))
  assert frames.measure() == 33 == frames.count == frames.measure()
  cut = open_frames(clips.truncated(clips.write(tmp_path / "a.mp4", 60, options={"movflags": "faststart"})))
  assert cut.count == 60 > cut.measure() == len([frame.index for frame in cut.read()]) > 20
  assert open_frames(clips.frames(3)).measure() == 3
  with pytest.raises(ValueError, match="the iterator can be read once"):
    open_frames(iter(clips.frames(3))).measure()


# ---------------------------------------------------------------- pictures


@pytest.fixture
def folder(tmp_path):
  for i in range(12):
    Image.fromarray(clips.draw(i)).save(tmp_path / f"frame{i}.png")
  (tmp_path / "notes.txt").write_text("no picture")
  return tmp_path


def test_folders_globs_and_lists(folder, monkeypatch):
  paths = [folder / f"frame{i}.png" for i in range(12)]  # by number: frame2 before frame10
  for source in (folder, str(folder / "*.png"), paths, clips.frames(12), list(clips.frames(12))):
    frames = open_frames(source, rate=10)
    found = list(frames)
    assert frames.count == 12 and frames.size == (clips.HEIGHT, clips.WIDTH)
    np.testing.assert_array_equal(images(found), clips.frames(12))
    assert [frame.time for frame in found] == [i / 10 for i in range(12)]
    np.testing.assert_array_equal(frames[10].image, clips.draw(10))
    assert [frame.index for frame in frames.read(9)] == [9, 10, 11]
  assert open_frames([Image.fromarray(clips.draw(3))])[0].image.tobytes() == clips.draw(3).tobytes()
  assert natural("a2") < natural("a10") < natural("b1")


def test_an_iterator_is_read_once(folder):
  asked = []

  def camera():
    for i in range(20):
      asked.append(i)
      yield clips.draw(i)

  frames = open_frames(camera())
  assert frames.count is None and frames.live and frames.size == (clips.HEIGHT, clips.WIDTH)
  first = next(iter(frames))
  assert first.index == 0 and asked == [0]  # nobody asks a live source for more than is wanted
  with pytest.raises(ValueError, match="the iterator was read before, and can be read once"):
    list(frames)
  with pytest.raises(ValueError, match="can be read once"):
    frames[3]
  frames = open_frames(clips.draw(i) for i in range(5))
  np.testing.assert_array_equal(images(frames), clips.frames(5))


# ---------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize(
  ("error", "message", "make"),
  [
    (FileNotFoundError, "No such file or directory: '.*nowhere.mp4'", lambda p: p / "nowhere.mp4"),
    (FileNotFoundError, "No such file or directory: '.*nowhere.png'", lambda p: p / "nowhere.png"),
    (ValueError, "video '.*text.mp4' is no video that FFmpeg decodes", lambda p: p / "text.mp4"),
    (ValueError, r"video '.*empty.mp4' is empty \(0 bytes\)", lambda p: p / "empty.mp4"),
    (ValueError, "frame 0: image '.*text.png' is not an image", lambda p: p / "text.png"),
    (ValueError, "no pictures in the folder '.*nothing'", lambda p: p / "nothing"),
    (ValueError, r"no pictures match '.*\*.jpg'", lambda p: str(p / "*.jpg")),
    (ValueError, "the list holds no frames", lambda p: []),
    (ValueError, "the array holds no frames", lambda p: np.zeros((0, 4, 4, 3), np.uint8)),
    (ValueError, "the iterator holds no frames", lambda p: iter(())),
    (ValueError, "frame 0: image has no pixels", lambda p: np.zeros((2, 0, 4, 3), np.uint8)),
    (ValueError, r"source must be an array .*, got shape \(4, 4, 3\)", lambda p: np.zeros((4, 4, 3))),
    (ValueError, "source must be a video file, .*; got float", lambda p: 1.5),
    (ValueError, "source must be a video file, .*; got NoneType", lambda p: None),
    (ValueError, "source must be a video file, .*; got dict", lambda p: {}),
    (ValueError, "source must be a video file, .*; got -1", lambda p: -1),
    (OSError, "/dev/video77", lambda p: 77),
    (OSError, "refused|unreachable|No such", lambda p: "rtsp://127.0.0.1:9/none"),
  ],
)  # fmt: skip
def test_bad_sources(tmp_path, error, message, make):
  (tmp_path / "text.mp4").write_text("no video" * 100)
  (tmp_path / "text.png").write_text("no picture")
  (tmp_path / "empty.mp4").touch()
  (tmp_path / "nothing").mkdir()
  with pytest.raises(error, match=message) as raised:
    open_frames(make(tmp_path))
  assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- live


@pytest.fixture
def stream(tmp_path):
  """100 frames by HTTP as (address, bytes sent); `cut`: the connection is lost there."""
  noise = [np.random.default_rng(i).integers(0, 255, (96, 128, 3)).astype(np.uint8) for i in range(100)]
  path = clips.write(tmp_path / "clip.ts", images=noise)
  data, cuts = path.read_bytes(), []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      self.send_response(200)
      self.send_header("Content-Type", "video/mp2t")
      self.send_header("Content-Length", str(len(data)))
      self.end_headers()
      self.wfile.write(data[: cuts[0] if cuts else None])

    def log_message(self, *_):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://me:secret@127.0.0.1:{server.server_port}/clip", path, cuts
    server.shutdown()


def test_an_address(stream):
  address, path, _ = stream
  with open_frames(address) as frames:
    assert frames.live and frames.count is None and frames.rate == clips.RATE and "secret" not in frames.name
    for got, wanted in zip(frames, open_frames(path), strict=True):
      assert got.index == wanted.index and got.image.tobytes() == wanted.image.tobytes()
      assert abs(got.time - wanted.time) < 1e-6
    with pytest.raises(ValueError, match="was read before, and can be read once"):
      next(iter(frames))


def test_a_lost_connection_keeps_what_came(stream):
  address, path, cuts = stream
  cuts.append(path.stat().st_size // 2)
  found = []
  with open_frames(address) as frames, pytest.raises(FrameError) as raised:
    found.extend(frames)  # keeps what it was given
  assert 40 < len(found) < 60
  assert re.fullmatch(rf"stream '.*' broke off after {len(found)} frames: .*\w", str(raised.value))


def test_a_camera_may_be_closed_while_it_is_read(monkeypatch):
  """FFmpeg's test picture in place of a device. The thread that decodes ahead is in the middle of a frame."""
  monkeypatch.setattr(video_frames, "_camera", lambda number: ("testsrc=size=64x48:rate=10", "lavfi"))
  for _ in range(5):
    frames = open_frames(0)
    read = iter(frames)
    first = [next(read) for _ in range(3)]
    assert [(frame.index, frame.time, frame.image.shape) for frame in first] == [
      (0, 0.0, (48, 64, 3)), (1, 0.1, (48, 64, 3)), (2, 0.2, (48, 64, 3)),
    ]  # fmt: skip
    frames.close()
    assert len(list(read)) < 20  # what was decoded; then it ends


def test_a_rate_must_be_positive():
  with pytest.raises(ValueError, match="rate must be above 0, got 0"):
    open_frames(clips.frames(2), rate=0)


def test_a_sound_file_is_no_video(tmp_path):
  import av

  with av.open(str(tmp_path / "song.mp4"), "w") as container:
    stream = container.add_stream("aac", rate=16000, layout="mono")
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 16000
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  with pytest.raises(ValueError, match=r"song\.mp4' is no video, or one that was cut off"):
    open_frames(tmp_path / "song.mp4")


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv"])
def test_what_a_truncated_file_holds_is_given_and_the_loss_is_told(tmp_path, name):
  whole = clips.write(tmp_path / name, 100, options={"movflags": "faststart"} if name == "clip.mp4" else None)
  frames = open_frames(clips.truncated(whole))
  with pytest.warns(UserWarning, match="breaks off after [0-9]+ frames"):
    found = list(frames)
  assert 20 < len(found) < 90 and str(len(found)) in frames.problem and frames.count == len(found)
  for a, b in zip(found[:-4], open_frames(whole)):
    assert a.image.tobytes() == b.image.tobytes()
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    list(open_frames(whole))
  cut = clips.truncated(clips.write(tmp_path / "late_index.mp4", 30))
  with pytest.raises(ValueError, match="cut off"):
    open_frames(cut)


def test_damage_inside_is_told(tmp_path):
  path = clips.write(tmp_path / "clip.mp4", 100, options={"movflags": "faststart"})
  data = bytearray(path.read_bytes())
  middle = len(data) * 6 // 10
  data[middle : middle + 300] = bytes(300)
  path.write_bytes(data)
  frames = open_frames(path)
  with pytest.warns(UserWarning, match="damaged near frame|breaks off after"):
    found = list(frames)
  assert len(found) > 50
  assert frames[80].image.tobytes() == found[80].image.tobytes()


def test_the_size_must_stay(tmp_path):
  message = r"frame 2 of .* is 32x48 pixels and the frames before it 64x48"
  pictures = [clips.draw(0), clips.draw(1), clips.draw(2)[:, :32]]
  for source in (pictures, iter(pictures)):
    found = []
    with pytest.raises(ValueError, match=message):
      found.extend(open_frames(source))
    assert len(found) == 2  # what came before is kept
  parts = [tmp_path / "a.h264", tmp_path / "b.h264"]  # streams that may stand one behind the other
  clips.write(parts[0], 20)
  clips.write(parts[1], images=clips.frames(20, width=80))
  joined = tmp_path / "joined.h264"
  joined.write_bytes(parts[0].read_bytes() + parts[1].read_bytes())
  found = []
  with pytest.raises(ValueError, match="is 80x48 pixels and the frames before it 64x48"):
    found.extend(open_frames(joined))
  assert len(found) == 20


def test_without_av(clip, monkeypatch):
  plain = builtins.__import__

  def lacking(name, *args, **kwargs):
    if name == "av":
      raise ImportError("No module named 'av'")
    return plain(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", lacking)
  with pytest.raises(ImportError, match=r"video needs the package av: pip install 'sam3lt_jax\[video\]'"):
    open_frames(clip)
  assert open_frames(clips.frames(2)).count == 2  # pictures do not need it


# ---------------------------------------------------------------- decoding ahead


def threads():
  return [t for t in threading.enumerate() if t.name == "sam3lt-frames"]


def test_who_stops_early_leaves_nothing_running(clip, complaints):
  for frame in open_frames(clip):
    if frame.index == 2:
      break
  del frame
  reading = iter(open_frames(clip))
  next(reading)
  assert threads()
  reading.close()
  assert not threads() and not complaints


def test_only_so_many_wait():
  made = []

  def items():
    for i in range(100):
      made.append(i)
      yield i

  reading = ahead(items(), 3)
  assert next(reading) == 0
  for _ in range(50):
    threading.Event().wait(0.01)
  assert len(made) <= 6
  assert list(reading) == list(range(1, 100))


def test_an_error_ahead_is_raised_in_its_place():
  def items():
    yield 1
    raise ValueError("no more")

  reading = ahead(items(), 3)
  assert next(reading) == 1
  with pytest.raises(ValueError, match="no more"):
    next(reading)
