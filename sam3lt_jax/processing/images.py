"""Anything a user calls an image to the model's pixels.

Three steps, each a function: `load_image` (upright RGB uint8), `resize_image` (square), `normalise` (float32
in [-1, 1]); `preprocess` is all of them. Source: the original's `sam3_image_processor.py` and transformers
5.23.0 `Sam3ImageProcessor`, whose resizing on uint8 Pillow's differs from by at most one level of 255.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from sam3lt_jax.processing.arrays import to_numpy

_ACCEPTED = (
  "a path, a PIL image, the bytes of an image file, or an array [H, W, 3] (uint8, or float in [0, 1])"
)
_ROUNDING = 0.01  # past 0 or 1, in units of the range: bfloat16's next number above 1 is 1.0078
_ORIENTATION = 0x0112  # of EXIF
_UPRIGHT = {
  2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_NO_FILE = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
# The first bytes of what people call a photo and Pillow reads with a plugin at most.
_FOREIGN = {b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}
_HEAD = 1 << 28  # bytes that may be read to learn what a file is: some formats, of few bytes, want all of it
_BETWEEN = 1 << 24  # pixels that `resize_image` may have between its passes, where the image itself has fewer


class ImageError(ValueError):
  """An image that cannot be used: its message is `name` and, right behind it, `said`.

  Attributes:
    name: "image 'a.jpg'".
    reason: "empty" (0 bytes), "not_an_image" (nor what is no regular file), "too_large" (over Pillow's limit
      on pixels), "truncated" (or damaged inside) or "other".
    said: " is ...", one sentence.
  """

  def __init__(self, name: str, reason: str, said: str):
    super().__init__(name, reason, said)
    self.name, self.reason, self.said = name, reason, said

  def __str__(self) -> str:
    return self.name + self.said


def load_image(image: Any, frame: tuple[int, int] | None = None) -> np.ndarray:
  """Reads an image as RGB.

  Args:
    image: one of
      - a path (str or PathLike), or the bytes of an image file: any format Pillow reads, first frame only.
        EXIF orientation is applied;
      - a PIL image, taken as it is: EXIF orientation is *not* applied, so that boxes and masks stay in the
        frame of the image given (as transformers does);
      - an array: [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA), uint8 in 0..255 or floating point in
        [0, 1]; a value outside by a rounding (0.01) is clipped. jax arrays and torch tensors are read, see
        `arrays.to_numpy`.
      Transparency (RGBA, LA, palette) is composited over white, as transformers 5.23.0 does (the original
      rejects it); 16-bit grey is scaled to 8 bits; CMYK, palette, bilevel and grey are converted by Pillow.
    frame: (height, width) in which a file's boxes and masks are given. Many label tools export those of the
      pixels as stored: a file that has this size as stored, and not when turned upright, is left as stored.

  Returns:
    uint8 [H, W, 3].

  Raises:
    ImageError: (ValueError) a file that is not an image, damaged or truncated, or over Pillow's pixel limit.
    OSError: a file that is not there or cannot be read.
    ValueError: an array of another layout or type, or none of what is accepted.
    MemoryError: the memory does not hold it.
  """
  if isinstance(image, (bytes, bytearray, memoryview)):
    return decode(io.BytesIO(image), f"image ({len(image)} bytes)", frame)
  if isinstance(image, (str, os.PathLike)):
    path = os.fspath(image)
    with open_file(path) as f:
      return decode(f, f"image {path!r}", frame)
  if isinstance(image, Image.Image):
    if getattr(image, "tile", None) and getattr(image, "fp", None) is None:
      raise ValueError("image is a PIL image whose file was closed before it was read; accepted: an open one")
    with _named("image"):
      image.load()  # Pillow decodes an opened file when it is first used
      return _to_rgb(image, "image")
  if isinstance(image, (list, tuple)) or not hasattr(image, "__array__"):
    raise ValueError(f"image must be {_ACCEPTED}; got {type(image).__name__}")
  return _array_to_rgb(to_numpy(image, "image"))


def open_file(path: str | os.PathLike) -> BinaryIO:
  """An image's file, for reading. A pipe or device is refused: it may be without an end, or never answer.

  Raises:
    ImageError: it is no regular file.
    ValueError: an address.
    OSError: it is not there or cannot be opened.
  """
  path = os.fspath(path)
  if isinstance(path, str) and path.startswith(("http://", "https://", "data:")):
    raise ValueError(f"image: addresses are not fetched, got {path[:80]!r}; download it and give the path")
  mode = os.stat(path).st_mode
  if not stat.S_ISREG(mode):
    kind = _NO_FILE.get(stat.S_IFMT(mode), "a device")
    raise ImageError(f"image {path!r}", "not_an_image", f" is {kind}, no file")
  return open(path, "rb")


def decode(file: BinaryIO, name: str, frame: tuple[int, int] | None = None) -> np.ndarray:
  """An opened image file as RGB: the one place that decodes files.

  Args:
    file: with seek. Its beginning is looked at before the rest is read.
    name: of the image, for messages.
    frame: as of `load_image`.

  Returns:
    uint8 [H, W, 3].

  Raises:
    ImageError: see its reasons.
    OSError: the file cannot be read. MemoryError: the memory does not hold the image.
  """
  with _named(name):
    with _open(file, name) as image:
      image.load()
      turn = _turn(image)
      if turn is not None:
        upright = image.transpose(turn)
        kept = frame is not None and upright.size != tuple(frame)[::-1] == image.size
        image = image if kept else upright
    return _to_rgb(image, name)


def check_file(path: str | os.PathLike) -> None:
  """Whether `path` begins as an image does; damage further on is not seen. Raises as `load_image`."""
  with open_file(path) as f, _named(name := f"image {os.fspath(path)!r}"), _open(f, name):
    pass


class _Measured:
  """A file of which no more is read than an image needs, whatever stands in it: the rest may be endless.

  Attributes:
    left: bytes that may still be read. least: what a read counts for, at least, as many small ones take long.
  """

  def __init__(self, file: BinaryIO):
    self._file, self.left, self.least = file, _HEAD, 256

  def __getattr__(self, name: str) -> Any:
    return getattr(self._file, name)

  def read(self, size: int | None = -1) -> bytes:
    return self._take(self._file.read, size)

  def readline(self, size: int | None = -1) -> bytes:
    return self._take(self._file.readline, size)

  def _take(self, read: Callable[[int], bytes], size: int | None) -> bytes:
    data = read(self.left + 1 if size is None or not 0 <= size <= self.left else size)
    self.left -= max(len(data), self.least)
    if self.left < 0:
      raise OSError("more bytes than its image can have")
    return data


def _open(file: BinaryIO, name: str) -> Image.Image:
  try:
    measured = _Measured(file)
    image = Image.open(measured)
    # No format has as many bytes a pixel.
    measured.left, measured.least = _HEAD + 64 * image.width * image.height, 0
    return image
  except Image.UnidentifiedImageError as e:
    if file.seek(0, io.SEEK_END) == 0:
      raise ImageError(name, "empty", " is empty (0 bytes)") from e
    file.seek(0)
    head = file.read(12)
    if head.startswith(b"\xff\xd8\xff") and (image := _plain_jpeg(file)):
      return image
    if head[4:8] == b"ftyp" and head[8:] in _FOREIGN:
      said = f" is {_FOREIGN[head[8:]]}, a format that Pillow does not read without a plugin"
      raise ImageError(name, "not_an_image", f"{said}: convert it to JPEG or PNG") from e
    raise ImageError(name, "not_an_image", " is not an image in a format that Pillow reads") from e


def _plain_jpeg(file: BinaryIO) -> Image.Image | None:
  """A JPEG opened without its metadata, of which Pillow reads more than anybody asks for.

  A resolution of an odd type, say, makes it take a sound photo for none. None where that is not what it was.
  """
  file.seek(0)
  data = file.read(_HEAD)
  kept, exif, at = [data[:2]], b"", 2
  while data[at : at + 1] == b"\xff" and (marker := data[at + 1 : at + 2]) not in (b"", b"\xda"):
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if not b"\xe1" <= marker <= b"\xed":  # JFIF's and Adobe's say what the colours are
      kept.append(data[at:end])
    elif data[at + 4 : end].startswith(b"Exif\0\0"):
      exif = data[at + 4 : end]
    at = end
  try:
    image = Image.open(io.BytesIO(b"".join([*kept, data[at:]])))
  except Image.UnidentifiedImageError:
    return None
  image.info["exif"] = exif
  return image


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
  """Whatever a decoder raises becomes one sentence with the image's name."""
  try:
    yield
  except ImageError:
    raise
  except Image.DecompressionBombError as e:
    said = f" is larger than Pillow's safety limit ({e}). If you trust it, raise the limit first: "
    said += "PIL.Image.MAX_IMAGE_PIXELS = 500_000_000 (or None for no limit)"
    raise ImageError(name, "too_large", said) from e
  except MemoryError as e:
    raise MemoryError(f"{name} is larger than the memory holds") from e
  except Exception as e:
    # Decoders raise whatever they like; an error of the file system alone has a number.
    if isinstance(e, OSError) and e.errno is not None:
      raise
    raise ImageError(name, "truncated", f" is damaged or truncated: {str(e) or type(e).__name__}") from e


def _turn(image: Image.Image) -> Image.Transpose | None:
  """What turns the stored pixels upright. EXIF that cannot be read says nothing.

  Not `ImageOps.exif_transpose`, which writes all of EXIF back and stumbles over tags of an odd type.
  """
  try:
    return _UPRIGHT.get(image.getexif().get(_ORIENTATION))
  except Exception:
    return None


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
  if image.width == 0 or image.height == 0:
    raise ImageError(name, "other", f" has no pixels, its size is {image.width}x{image.height}")
  if image.mode.startswith("I"):
    return _wide_grey_to_rgb(np.asarray(image), name)
  if image.mode == "F":
    try:
      return _array_to_rgb(np.asarray(image), name)
    except ValueError as e:
      raise ImageError(name, "other", str(e).removeprefix(name)) from e
  mode = image.mode
  try:
    if mode in ("La", "RGBa"):  # premultiplied alpha converts to its plain mode only
      image = image.convert(mode.upper())
    if "A" in image.getbands() or image.info.get("transparency") is not None:
      image = image.convert("RGBA")
      white = Image.new("RGBA", image.size, (255, 255, 255, 255))
      image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))
  except ValueError as e:
    raise ImageError(name, "other", f" has mode {mode!r}, which cannot be converted to RGB: {e}") from e


def _wide_grey_to_rgb(grey: np.ndarray, name: str) -> np.ndarray:
  """Modes "I;16*", and "I", as which older Pillow opens 16-bit PNG: 0..65535 to 0..255, rounded."""
  low, high = int(grey.min()), int(grey.max())
  if low < 0 or high > 65535:
    said = f" is integer grey with values {low}..{high}; 0..65535 (16 bit) is accepted"
    raise ImageError(name, "other", said)
  grey = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
  return np.repeat(grey[..., None], 3, axis=-1)


def _array_to_rgb(array: np.ndarray, name: str = "image") -> np.ndarray:
  shape = array.shape
  if array.ndim == 2:
    array = array[..., None]
  if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
    hint = ""
    if array.ndim == 3 and shape[0] in (1, 3, 4):
      hint = ". It looks channels first: give np.moveaxis(image, 0, -1)"
    elif array.ndim == 4:
      hint = ". It looks like a batch: give its images one by one"
    raise ValueError(f"{name} must be an array [H, W, 3], got shape {shape}{hint}")
  if array.size == 0:
    raise ValueError(f"{name} has no pixels, got shape {shape}")
  if np.issubdtype(array.dtype, np.floating):
    low, high = float(array.min()), float(array.max())
    if not (low >= -_ROUNDING and high <= 1.0 + _ROUNDING):  # written so that NaN fails
      hint = "; divide by 255, or give uint8" if 0 <= low and high <= 255 else ""
      raise ValueError(f"{name}: a floating-point array must lie in [0, 1], got {low:g}..{high:g}{hint}")
    array = np.rint(array.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
  elif array.dtype != np.uint8:
    raise ValueError(f"{name}: an array must be uint8 or floating point in [0, 1], got {array.dtype}")
  if array.shape[-1] == 1:
    return np.repeat(array, 3, axis=-1)
  if array.shape[-1] == 4:
    return _to_rgb(Image.fromarray(np.ascontiguousarray(array)), name)
  return array


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
  """Squares an image as both references do: the aspect ratio is not kept, nothing is padded.

  Bilinear with antialiasing on uint8, by Pillow: within one level of torchvision's, for one value in a
  hundred. A float resize would be off at one in seven.

  Args:
    image: uint8 [H, W, 3].
    size: side of the result in pixels.

  Returns:
    uint8 [size, size, 3].
  """
  if image.shape[:2] == (size, size):
    return image
  height, width = image.shape[:2]
  # Width first, as torchvision: it rounds between the passes, and Pillow, asked for both at once, turns them
  # round for tall images, where up to a quarter of the values would then be one level off. Of a strip, narrow
  # and 17 times as high as `size` or more, the width alone would be made larger than the memory.
  first = (size, height) if height * size <= max(height * width, _BETWEEN) else (width, size)
  between = Image.fromarray(np.ascontiguousarray(image)).resize(first, Image.Resampling.BILINEAR)
  return np.array(between.resize((size, size), Image.Resampling.BILINEAR))


def normalise(image: np.ndarray) -> np.ndarray:
  """(x / 255 - 0.5) / 0.5: uint8 of any shape to float32 in [-1, 1]."""
  pixels = image.astype(np.float32)
  pixels /= 255
  pixels -= 0.5
  pixels /= 0.5
  return pixels


def preprocess(image: Any, size: int = 1008) -> tuple[np.ndarray, tuple[int, int]]:
  """Everything between a user's image and the model.

  Args:
    image: what `load_image` takes.
    size: side of the model's input in pixels.

  Returns:
    (pixel_values float32 [size, size, 3] in [-1, 1], (height, width) of the image in pixels).
  """
  image = load_image(image)
  return normalise(resize_image(image, size)), image.shape[:2]


def default_workers() -> int:
  """Cores that this process may use, at least 2 and at most 16: beyond that reading, not decoding, limits."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return min(max(cores, 2), 16)
