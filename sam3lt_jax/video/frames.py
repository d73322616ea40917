"""Anything a user calls a video to frames, upright RGB uint8, one after the other and decoded ahead.

Video files and streams are decoded by PyAV (`pip install 'sam3lt_jax[video]'`), pictures by
`processing.images`. A frame's number counts what was decoded, so that it does not depend on what a file says
of itself, and `frames[i]` is the frame that reading from the start gives as number i, to the bit.

Axes: T frames, H, W the video.
"""

from __future__ import annotations

import abc
import array
import contextlib
import glob
import itertools
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from sam3lt_jax.errors import ArgumentError, needed, shown, warn
from sam3lt_jax.processing.arrays import to_numpy
from sam3lt_jax.processing.images import load_image
from sam3lt_jax.storage import is_image

RATE = 25.0  # frames a second, where neither the source nor the caller says
_AHEAD = 1 << 28  # bytes of frames that wait decoded
_LOOKED_AT = 16  # frames that opening a file decodes, to tell whether it is shorter
_STEP = 64  # frames that `frames[i]` decodes on from the last one asked for, rather than to seek
_WAIT = 30.0  # seconds without anything from a stream
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_ACCEPTED = (
  "a video file, a folder of frames, a glob, a list of pictures, an array [T, H, W, 3], an iterator of"
  " pictures, the number of a camera or the address of a stream"
)

Item = TypeVar("Item")


class FrameError(ValueError):
  """A frame that cannot be used, in the middle of a clip: what came before it stands."""


class Frame(NamedTuple):
  """One frame: its number from 0 on, seconds since the first one, and `image`, uint8 [H, W, 3] RGB."""

  index: int
  time: float
  image: np.ndarray


class Frames(contextlib.AbstractContextManager):
  """A source of frames, see `open_frames`. Iterating reads from the start, decoding ahead in a thread.

  Attributes:
    name: of the source, for messages.
    size: (height, width) of every frame.
    rate: frames a second, on average.
    count: how many frames there are; of a long video what its file says, which may be wrong; None where
      nothing says it (a stream, an iterator).
    live: it can be read once, and only forwards (a stream, an iterator).
    problem: what was wrong with a file, one sentence, known once it was read to its end; None: nothing.
    path: of a video file; None for anything else.
  """

  live = False
  path: str | None = None

  def __init__(self, name: str, size: tuple[int, int], rate: float, count: int | None):
    self.name, self.size, self.rate, self.count = name, size, rate, count
    self.problem: str | None = None

  def read(self, start: int = 0) -> Iterator[Frame]:
    """Frames from number `start` on. At the end of a damaged file a warning says what was lost.

    Raises:
      ValueError: a frame that cannot be used, or of another size than those before it; a live source that
        was read before.
      OSError: a file that cannot be read.
    """
    made = self._frames(start)
    if self._is_slow:
      made = ahead(made, max(2, min(16, _AHEAD // (3 * self.size[0] * self.size[1]))))
    with contextlib.closing(made):
      yield from made
    if self.problem is not None:
      warn(self.problem)

  def __iter__(self) -> Iterator[Frame]:
    return self.read()

  def __getitem__(self, index: int) -> Frame:
    """Frame number `index`, 0 or more; exact, also in a video file.

    Raises:
      IndexError: there is no such frame. ValueError: a live source.
    """
    if isinstance(index, bool) or not isinstance(index, (int, np.integer)):
      raise ValueError(f"a frame's number must be a whole number, got {index!r}")
    if self.live:
      raise ValueError(f"{self.name} can be read once, from its start on: it has no frames to be asked for")
    frame = self._frame(int(index)) if index >= 0 else None
    if frame is None:
      has = "" if self.count is None else f", which has {self.count}"
      raise IndexError(f"there is no frame {index} in {self.name}{has}")
    return frame

  def measure(self) -> int:
    """How many frames there are, exactly: a file is decoded to its end for it. Raises ValueError if live."""
    if self.live:
      raise ValueError(f"{self.name} can be read once: how many frames it has is known at its end")
    return self.count

  @property
  def identity(self) -> dict[str, Any]:
    """What tells this source from another, wherever it lies: plain JSON values."""
    return {"size": list(self.size)}

  def close(self) -> None:
    """Lets files and cameras go."""

  def __exit__(self, *exception: Any) -> None:
    self.close()

  # What each kind does.

  _is_slow = False  # a frame takes long enough to be made ahead

  @abc.abstractmethod
  def _frames(self, start: int) -> Iterator[Frame]: ...

  def _frame(self, index: int) -> Frame | None: ...  # of what is not live

  def _checked(self, index: int, time: float, image: np.ndarray) -> Frame:
    if image.shape[:2] != self.size:
      (height, width), (H, W) = image.shape[:2], self.size
      raise FrameError(
        f"frame {index} of {self.name} is {width}x{height} pixels and the frames before it {W}x{H}: all"
        " frames of a clip must be of one size"
      )
    return Frame(index, time, image)


def open_frames(source: Any, rate: float | None = None) -> Frames:
  """Opens a source of frames.

  Args:
    source: one of
      - a video file, whatever FFmpeg decodes: frames upright by its rotation, times as they stand in it;
      - a folder of pictures, or a glob of them, in natural order (frame2 before frame10);
      - a list of paths, arrays or PIL images; an array [T, H, W, 3]; anything else that yields pictures, such
        as a generator, which is read once;
      - a whole number, that camera of the machine, or an address (rtsp://, http://, ...): read once.
    rate: frames a second of sources of pictures, which do not say it. Default: 25.

  Raises:
    ValueError: it is none of these, no video, or holds no frame.
    OSError: it is not there, or cannot be read. ImportError: a video, and PyAV is not installed.
  """
  if rate is not None and not 0 < rate < float("inf"):
    raise ArgumentError("rate", f" must be above 0, got {rate!r}")
  if isinstance(source, Frames):
    return source
  if isinstance(source, (bool, dict, set, bytes, bytearray)):
    raise ArgumentError("source", f" must be {_ACCEPTED}; got {type(source).__name__}")
  if isinstance(source, (int, np.integer)):
    return _Stream(f"camera {source}", *_camera(int(source)))
  if isinstance(source, (str, os.PathLike)):
    return _named(os.fspath(source), rate)
  if not isinstance(source, Iterable) and not hasattr(source, "__array__"):
    raise ArgumentError("source", f" must be {_ACCEPTED}; got {type(source).__name__}")
  if hasattr(source, "__array__") or hasattr(source, "detach"):
    clip = to_numpy(source, "source")
    if clip.ndim != 4:
      raise ArgumentError("source", f" must be an array [T, H, W, 3], got shape {clip.shape}")
    return _Pictures("the array", list(clip), rate)
  if isinstance(source, Sequence):
    return _Pictures("the list", source, rate)
  return _Iterated(source, rate)


def _named(source: str, rate: float | None) -> Frames:
  if _ADDRESS.match(source):
    return _Stream(f"stream {shown(re.sub(r'//[^/@]*@', '//', source))!r}", source)  # without a password
  if os.path.isdir(source):
    found = [os.path.join(source, name) for name in os.listdir(source) if is_image(name) and name[0] != "."]
    if not found:
      raise ValueError(f"no pictures in the folder {shown(source)!r}")
    return _Pictures(f"folder {shown(source)!r}", sorted(found, key=natural), rate)
  if not os.path.exists(source) and glob.has_magic(source):
    found = [path for path in glob.glob(source, recursive=True) if is_image(path)]
    if not found:
      raise ValueError(f"no pictures match {shown(source)!r}")
    return _Pictures(shown(source), sorted(found, key=natural), rate)
  if is_image(source) and not source.lower().endswith(".gif"):
    os.stat(source)  # says in the system's words that there is none
    return _Pictures(f"picture {shown(source)!r}", [source], rate)
  return _Video(source)


def natural(name: str) -> list[tuple[int, str]]:
  """A key to sort names by: numbers in them count as numbers, frame2 before frame10."""
  parts = re.split(r"(\d+)", name)
  return [(int(part), part) if i % 2 else (0, part) for i, part in enumerate(parts)]


# ---------------------------------------------------------------- pictures


class _Pictures(Frames):
  """A list of paths, arrays or PIL images."""

  def __init__(self, name: str, pictures: Sequence[Any], rate: float | None):
    self._pictures = pictures
    if not len(pictures):
      raise ValueError(f"{name} holds no frames")
    self._is_slow = isinstance(pictures[0], (str, os.PathLike))
    super().__init__(name, _picture(pictures[0], 0).shape[:2], rate or RATE, len(pictures))

  @property
  def identity(self) -> dict[str, Any]:
    paths = [os.path.basename(p) for p in self._pictures if isinstance(p, (str, os.PathLike))]
    return super().identity | {"frames": self.count, "names": [*paths[:1], *paths[-1:]], "rate": self.rate}

  def _frames(self, start: int) -> Iterator[Frame]:
    for index in range(start, len(self._pictures)):
      yield self._frame(index)

  def _frame(self, index: int) -> Frame | None:
    if index >= len(self._pictures):
      return None
    return self._checked(index, index / self.rate, _picture(self._pictures[index], index))


class _Live(Frames):
  """Frames that come once."""

  live = True
  _was_read = False

  def __init__(self, name: str, rate: float, made: Iterator[tuple[float | None, np.ndarray]], none: str):
    """made: seconds, None where the rate says them, and image of each frame. none: said if there is none."""
    first = next(made, None)
    if first is None:
      raise ValueError(f"{name} {none}")
    self._made = itertools.chain([first], made)
    super().__init__(name, first[1].shape[:2], rate, None)

  def _frames(self, start: int) -> Iterator[Frame]:
    if self._was_read:
      raise ValueError(f"{self.name} was read before, and can be read once")
    self._was_read = True
    for index, (time, image) in enumerate(self._made):
      frame = self._checked(index, index / self.rate if time is None else time, image)
      if index >= start:
        yield frame


class _Iterated(_Live):
  """An iterator of pictures, read once; in the caller's thread, as it may be anything."""

  def __init__(self, source: Iterable[Any], rate: float | None):
    made = ((None, _picture(picture, index)) for index, picture in enumerate(source))
    super().__init__("the iterator", rate or RATE, made, "holds no frames")


def _picture(picture: Any, index: int) -> np.ndarray:
  try:
    return load_image(picture)
  except ValueError as e:
    raise FrameError(f"frame {index}: {e}") from e


# ---------------------------------------------------------------- video


def import_av() -> Any:
  """PyAV. Raises ImportError, with how to get it."""
  with needed("video needs", "av", "video"):
    import av
  return av


class _Video(Frames):
  """A video file.

  Nothing about its frames is taken from the file's index: reading from the start notes each frame's time
  stamp, and a seek looks for the one that was noted. Where that fails the file is read from its start.
  """

  _is_slow = True

  def __init__(self, path: str):
    name = f"video {shown(path)!r}"
    self.path, self._lock = path, threading.Lock()
    if os.stat(path).st_size == 0:
      raise ValueError(f"{name} is empty (0 bytes)")
    # Of frames 0, 1, ..., as far as they were decoded: the stamps that a seek looks for, and seconds.
    self._stamps, self._times = array.array("q"), array.array("d")
    self._stamped = True  # by stamps that increase
    self._cursor: tuple[Iterator[tuple[int, Any]], int] | None = None
    self._measured = False  # it was read to its end
    self._broken: int | None = None  # the first packet, about a frame each, that could not be decoded
    self.name = name
    with self._opened() as (container, stream):
      rate = stream.average_rate or stream.guessed_rate
      said, self._base = stream.frames, stream.time_base
      self._ends, self._is_cut = _duration(stream), _is_cut(stream, os.stat(path).st_size)
      if not said and rate and (self._ends or container.duration):
        said = round(float(rate) * (self._ends or container.duration / 1e6))
      first = []
      for frame in _decoded(container, stream):
        first.append(frame)
        if len(first) == _LOOKED_AT:
          break
    if not first:
      raise ValueError(f"{name} holds no frame that can be decoded")
    stamps = [frame.pts for frame in first]
    self._by_rate = None in stamps or any(a >= b for a, b in itertools.pairwise(stamps))  # as AVI has it
    self._start = stamps[0]
    count = len(first) if len(first) < _LOOKED_AT else max(said, _LOOKED_AT) if said else None
    super().__init__(name, _upright(first[0]).shape[:2], float(rate or RATE), count)

  @property
  def identity(self) -> dict[str, Any]:
    return super().identity | {"name": os.path.basename(self.path), "bytes": os.stat(self.path).st_size}

  def measure(self) -> int:
    if not self._measured:
      for _ in self._numbered(1 << 62):
        pass
    return self.count

  @contextlib.contextmanager
  def _opened(self) -> Iterator[tuple[Any, Any]]:
    container = _open(self.path, self.name)
    with container:
      stream = _video_stream(container, self.name)
      stream.thread_type = "AUTO"
      yield container, stream

  def _numbered(self, at: int) -> Iterator[tuple[int, Any]]:
    """(number, decoded frame) from number `at` on."""
    if self._stamped and 0 < at < len(self._stamps):
      with self._opened() as (container, stream):
        first, decoded = self._sought(container, stream, self._stamps[at])
        if first is not None:
          for index, frame in enumerate(itertools.chain([first], decoded), at):
            self._note(index, frame)
            yield index, frame
          return
    with self._opened() as (container, stream):
      index, last = -1, None

      def broke(packet: int, end: Exception | None = None) -> None:
        self._broken = packet if self._broken is None else min(packet, self._broken)

      for index, frame in enumerate(_decoded(container, stream, broke)):
        self._note(index, frame)
        last = frame
        if index >= at:
          yield index, frame
      self._ended(index + 1, last)

  def _sought(self, container: Any, stream: Any, stamp: int) -> tuple[Any, Iterator[Any]]:
    """The frame with this stamp, None where it is not found, and those after it."""
    with contextlib.suppress(import_av().error.FFmpegError):  # some formats cannot be sought in
      container.seek(stamp, stream=stream)  # to a frame before it that needs no other
    decoded = _decoded(container, stream)
    first = next((frame for frame in decoded if frame.pts is None or frame.pts >= stamp), None)
    return (first if first is not None and first.pts == stamp else None), decoded

  def _note(self, index: int, frame: Any) -> None:
    with self._lock:
      if index < len(self._times):
        return
      before = self._times[-1] if index else -1 / self.rate
      seconds = index / self.rate
      if not self._by_rate:
        seconds = before if frame.pts is None else float((frame.pts - self._start) * self._base)
        if seconds <= before:
          seconds = before + 1 / self.rate
      self._stamped &= frame.pts is not None and (not index or frame.pts > self._stamps[-1])
      if self._stamped:
        self._stamps.append(frame.pts)
      self._times.append(seconds)

  def _ended(self, count: int, last: Any) -> None:
    """Whether that is where the file was meant to end."""
    self.count, self._measured, early = count, True, False
    if self._ends is not None and last is not None and last.time is not None:
      early = self._ends - last.time > 1.0
    if early or self._is_cut:
      self.problem = f"{self.name} breaks off after {count} frames: the file is cut off"
    elif self._broken is not None:
      self.problem = f"{self.name} is damaged near frame {self._broken}; {count} frames were decoded"

  def _frames(self, start: int) -> Iterator[Frame]:
    for index, frame in self._numbered(start):
      yield self._checked(index, self._times[index], _upright(frame))

  def _frame(self, index: int) -> Frame | None:
    if self._cursor is None or not self._cursor[1] <= index < self._cursor[1] + _STEP:
      self.close()
      self._cursor = self._numbered(index), 0
    numbered = self._cursor[0]
    found = next((one for one in numbered if one[0] >= index), None)
    if found is None:
      self.close()
      return None
    self._cursor = numbered, index + 1
    return self._checked(found[0], self._times[found[0]], _upright(found[1]))

  def close(self) -> None:
    if self._cursor is not None:
      self._cursor[0].close()
      self._cursor = None


class _Stream(_Live):
  """A camera or an address: frames as they come."""

  _is_slow = True

  def __init__(self, name: str, address: str, format: str | None = None):
    self._container = _open(address, name, format)
    self._lock, self._is_closed = threading.Lock(), False
    try:
      stream = _video_stream(self._container, name)
      rate = float(stream.average_rate or stream.guessed_rate or RATE)
      super().__init__(name, rate, self._pictures(stream), "sends no frames")
    except BaseException:
      self._container.close()
      raise

  def _pictures(self, stream: Any) -> Iterator[tuple[float | None, np.ndarray]]:
    begin, count, lost = None, 0, None

    def broke(packet: int, end: Exception | None = None) -> None:
      nonlocal lost
      lost = end

    decoded = _decoded(self._container, stream, broke)
    while True:
      with self._lock:  # who reads a closed container ends the process
        frame = None if self._is_closed else next(decoded, None)
      if frame is None:
        break
      begin, count = frame.time or 0.0 if begin is None else begin, count + 1
      yield None if frame.time is None else frame.time - begin, _upright(frame)
    if lost is not None:
      raise FrameError(f"{self.name} broke off after {count} frames: {lost.strerror}")

  def close(self) -> None:
    with self._lock:
      self._is_closed = True
      self._container.close()


def _open(address: str, name: str, format: str | None = None) -> Any:
  av = import_av()
  try:
    return av.open(address, format=format, timeout=_WAIT)
  except OSError:
    raise
  except (av.error.FFmpegError, ValueError) as e:
    raise ValueError(
      f"{name} is no video that FFmpeg decodes, or one that was cut off: {e.strerror or e}"
      if isinstance(e, av.error.FFmpegError)
      else f"{name} cannot be opened: {e}"
    ) from e


def _decoded(
  container: Any, stream: Any, broke: Callable[..., None] = lambda packet, end=None: None
) -> Iterator[Any]:
  """What can be decoded from where the container stands.

  broke: told of each packet that cannot, and of the error with which reading ended.
  """
  av, packets = import_av(), container.demux(stream)
  for number in itertools.count():
    try:
      packet = next(packets, None)  # the last one is empty: what the decoder still holds
    except av.error.FFmpegError as e:
      broke(number, e)
      return
    if packet is None:
      return
    if packet.is_corrupt:
      broke(number)
    try:
      frames = packet.decode()
    except av.error.EOFError:
      return
    except av.error.FFmpegError:
      broke(number)
      continue
    yield from frames


def _video_stream(container: Any, name: str) -> Any:
  av = import_av()
  cover = av.stream.Disposition.attached_pic  # of a song
  stream = next((s for s in container.streams.video if not s.disposition & cover), None)
  if stream is None:
    raise ValueError(f"{name} is no video, or one that was cut off: there are no frames in it")
  return stream


def _duration(stream: Any) -> float | None:
  """Seconds of a stream, where its file says it exactly: Matroska does."""
  told = re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", ""))
  return None if told is None else 3600 * int(told[1]) + 60 * int(told[2]) + float(told[3])


def _is_cut(stream: Any, size: int) -> bool:
  """Whether the file's index, where it has one, names bytes beyond its end."""
  entries = getattr(stream, "index_entries", None)  # of newer PyAV
  return bool(entries) and entries[-1].pos + entries[-1].size > size


def _camera(number: int) -> tuple[str, str]:
  """(address, FFmpeg's name for the system's cameras)."""
  import sys

  if number < 0:
    raise ArgumentError("source", f" must be {_ACCEPTED}; got {number}")
  if sys.platform == "darwin":
    return str(number), "avfoundation"
  if sys.platform == "win32":
    return f"video={number}", "dshow"
  return f"/dev/video{number}", "v4l2"


def _upright(frame: Any) -> np.ndarray:
  """A decoded frame as uint8 [H, W, 3], turned as its file says: by whole quarters, counterclockwise."""
  image = frame.to_ndarray(format="rgb24")
  quarters = round(frame.rotation / 90) % 4
  return np.ascontiguousarray(np.rot90(image, quarters)) if quarters else image


# ---------------------------------------------------------------- ahead of who asks

_END = object()


def ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
  """`items`, made in a thread of its own, up to `depth` ahead; closed early, it ends the thread."""
  waiting: queue.Queue = queue.Queue(depth)
  stop = threading.Event()

  def put(item: Any) -> bool:
    while not stop.is_set():
      with contextlib.suppress(queue.Full):
        waiting.put(item, timeout=0.1)
        return True
    return False

  def work() -> None:
    try:
      for item in items:
        if not put((item, None)):
          return
      put((_END, None))
    except BaseException as e:
      put((_END, e))
    finally:
      items.close()

  thread = threading.Thread(target=work, name="sam3lt-frames", daemon=True)
  thread.start()
  try:
    while True:
      item, error = waiting.get()
      if error is not None:
        raise error
      if item is _END:
        return
      yield item
  finally:
    stop.set()
    thread.join(_WAIT)
