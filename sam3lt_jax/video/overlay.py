"""The video with its objects drawn on it, encoded in pieces of so many frames that are joined in the end.

A piece is encoded whole, from the same pictures by the same settings, so that it has the same bytes whenever
and however often it is made: a clip that was interrupted ends in the same file.
"""

from __future__ import annotations

import contextlib
import heapq
import io
import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from sam3lt_jax import storage
from sam3lt_jax.video.frames import import_av

PIECE = 128  # frames
TICKS = 90_000  # a second: whole numbers of them for every usual rate
# x264 gives the same bytes for the same number of threads only and, unless it is told to, for one CPU only:
# in a virtual machine under load one file in a hundred differed. Without B-frames packets are in order.
_ENCODER = {
  "crf": "20", "preset": "veryfast", "bf": "0", "threads": "4", "x264-params": "cpu-independent=1",
}  # fmt: skip
_BT709 = 1  # FFmpeg's number for it, of matrix, primaries and transfer alike
_NAME = re.compile(r"overlay-(\d{6})\.mp4")


class Overlay:
  """Pieces of the drawn video in a folder.

  Attributes:
    next: the number of the frame that `add` wants.
  """

  def __init__(self, folder: str, done: int = 0):
    """done: frames that are known; of pieces only those that hold no others are kept."""
    self._folder, self._encoder, self._buffer = folder, None, None
    os.makedirs(folder, exist_ok=True)
    there = {int(m[1]) for m in map(_NAME.fullmatch, os.listdir(folder)) if m}
    whole = next(i for i in range(done // PIECE + 1) if i not in there or i == done // PIECE)
    for number in there:
      if number >= whole:
        os.unlink(self._path(number))
    self.next = whole * PIECE

  def _path(self, number: int) -> str:
    return os.path.join(self._folder, f"overlay-{number:06d}.mp4")

  def add(self, image: np.ndarray) -> None:
    """The next frame, uint8 [H, W, 3]."""
    if self._encoder is None:
      self._buffer = io.BytesIO()
      self._encoder = _Encoder(self._buffer, image.shape[:2])
    self._encoder.add(image, self.next % PIECE)
    self.next += 1
    if self.next % PIECE == 0:
      self._finish()

  def _finish(self) -> None:
    if self._encoder is not None:
      self._encoder.close()
      with storage.atomic(self._path((self.next - 1) // PIECE), alone=True) as f:
        f.write(self._buffer.getbuffer())
      self._encoder = None

  def join(self, path: str, times: Sequence[float], source: str | None) -> str | None:
    """Writes all of them as `path`.

    Args:
      times: seconds of each frame.
      source: a video file, whose sound is kept.

    Returns:
      What became of the sound, if it could not be kept.
    """
    self._finish()
    av, said = import_av(), None
    with contextlib.ExitStack() as stack:
      file = stack.enter_context(storage.atomic(path, alone=True))
      out = stack.enter_context(av.open(file, "w", format="mp4"))
      with av.open(self._path(0)) as first:
        video = out.add_stream_from_template(first.streams.video[0])
      video.time_base = Fraction(1, TICKS)
      parts = [self._packets(video, times)]
      container = stack.enter_context(av.open(source)) if source is not None else None
      for sound in container.streams.audio[:1] if container else ():
        codec = sound.codec_context.name
        if codec in out.supported_codecs:
          parts.append(_sound(container, sound, out.add_stream_from_template(sound)))
        else:
          said = f"its sound ({codec}) cannot stand in an MP4 file and is left out"
      for _, packet in heapq.merge(*parts, key=lambda part: part[0]):
        out.mux(packet)
    return said

  def _packets(self, video: Any, times: Sequence[float]) -> Iterator[tuple[float, Any]]:
    av, index = import_av(), 0
    stamps = [round(time * TICKS) for time in times]
    last = stamps[-1] - stamps[-2] if len(stamps) > 1 else TICKS // 25
    stamps.append(stamps[-1] + last)
    for number in range(-(-len(times) // PIECE)):
      with av.open(self._path(number)) as piece:
        for packet in piece.demux(video=0):
          if not packet.size:
            continue
          packet.stream, packet.time_base = video, Fraction(1, TICKS)
          packet.pts = packet.dts = stamps[index]
          packet.duration = stamps[index + 1] - stamps[index]
          yield times[index], packet
          index += 1


class _Encoder:
  def __init__(self, file: io.BytesIO, size: tuple[int, int]):
    av = import_av()
    self._odd = [(0, size[0] % 2), (0, size[1] % 2), (0, 0)]  # H.264 has colours for 2 x 2 pixels together
    self._container = av.open(file, "w", format="mp4")
    stream = self._stream = self._container.add_stream("libx264", rate=25, options=_ENCODER)
    stream.height, stream.width, stream.pix_fmt = size[0] + size[0] % 2, size[1] + size[1] % 2, "yuv420p"
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = 1

  def add(self, image: np.ndarray, index: int) -> None:
    av = import_av()
    if any(after for _, after in self._odd):
      image = np.pad(image, self._odd, mode="edge")
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
    frame.pts, frame.time_base = index, Fraction(1, 25)
    self._container.mux(self._stream.encode(frame))

  def close(self) -> None:
    self._container.mux(self._stream.encode(None))
    self._container.close()


def _sound(source: Any, stream: Any, out: Any) -> Iterator[tuple[float, Any]]:
  """The packets of a file's sound, in time with its frames, each with its seconds."""
  pictures, base = source.streams.video[0], stream.time_base
  shift = round(float((pictures.start_time or 0) * pictures.time_base) / base)
  for packet in source.demux(stream):
    if packet.size and packet.dts is not None and packet.pts is not None:
      packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
      packet.stream = out
      yield float(packet.dts * base), packet
