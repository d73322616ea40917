"""Drawn clips: shapes that move, as frames and as video files."""

from __future__ import annotations

import fractions
import pathlib
from collections.abc import Sequence

import av
import numpy as np

HEIGHT, WIDTH, RATE = 48, 64, 25
_TICKS = 1000  # a second


def draw(index: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
  """uint8 [H, W, 3]: a red square goes right, a blue one left, the top left corner is white."""
  image = np.full((height, width, 3), 40, np.uint8)
  image[:6, :6] = 255
  at = index * 2 % (width - 12)
  image[10:22, at : at + 12] = (220, 30, 30)
  image[28:40, width - 12 - at : width - at] = (30, 60, 220)
  return image


def frames(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
  """uint8 [T, H, W, 3]."""
  return np.stack([draw(i, height, width) for i in range(count)])


def write(
  path: pathlib.Path,
  count: int = 30,
  *,
  rotation: int = 0,
  times: Sequence[float] | None = None,
  audio: bool = False,
  images: Sequence[np.ndarray] | None = None,
  key_every: int = 12,
  options: dict[str, str] | None = None,
) -> pathlib.Path:
  """A clip by H.264 with B-frames, and a tone where `audio`.

  Args:
    rotation: degrees counterclockwise by which a player turns it.
    times: seconds of each frame. images: the frames, of one size each; default: `count` drawn ones.
    key_every: frames from a key frame to the next.
  """
  images = frames(count) if images is None else images
  height, width = images[0].shape[:2]
  with av.open(str(path), "w", options=options or {}) as container:
    stream = container.add_stream("libx264", rate=RATE)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.time_base = fractions.Fraction(1, _TICKS)
    stream.codec_context.options = {"threads": "1", "crf": "10", "g": str(key_every), "preset": "veryfast"}
    if rotation:
      stream.set_display_rotation(rotation)
    sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
    for i, image in enumerate(images):
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
      frame.pts = round((i / RATE if times is None else times[i]) * _TICKS)
      frame.time_base = fractions.Fraction(1, _TICKS)
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
    if sound is not None:
      tone = np.sin(np.arange(16000 * len(images) // RATE) * 0.17).astype(np.float32)
      for start in range(0, len(tone), 1024):
        part = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="fltp", layout="mono")
        part.sample_rate, part.pts = 16000, start
        container.mux(sound.encode(part))
      container.mux(sound.encode(None))
  return path


def truncated(path: pathlib.Path, share: float = 0.6) -> pathlib.Path:
  """A copy that ends early. (MP4 has its index at the end, unless written with movflags=faststart.)"""
  data = path.read_bytes()
  cut = path.with_name(f"cut_{path.name}")
  cut.write_bytes(data[: int(len(data) * share)])
  return cut
