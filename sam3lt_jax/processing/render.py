"""Draws results on their photo, with Pillow and numpy.

What is drawn, in this order: a light tint (each pixel in the colour of the smallest instance there, so a
wheel shows on its truck), every instance's outline with a dark rim (seen on light and on dark ground), then
names and scores. Line widths and text grow with the picture.

Who asks for a red car wants to see a red car. So the outline carries the instance's colour, and the tint is
so light that none of the eight colours that the bundled model knows looks like another under it (a test
holds that; at 0.4 it fails). Greying what is not found was tried too: it shows more, but a photo of a street
loses its street, and of a crowd nothing is left to grey.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import unicodedata
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sam3lt_jax.processing.images import load_image
from sam3lt_jax.processing.masks import drawing_order, largest_part, mask_bounds

if TYPE_CHECKING:
  from sam3lt_jax.processing.results import Results

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]

# Chosen for distance in Oklab (a test holds the least of it) and light enough to be seen on black.
PALETTE: tuple[Color, ...] = tuple(
  tuple(bytes.fromhex(code))
  for code in (
    "2e9bff ff7a1a 2fc64f f03ad0 ffd23f 8a4dff 1fd6d6 ff3b4a b6e23a c98b5a "
    "ff9ec4 0f9d8c b9a6ff a8741a 9bd8ff c2408f ffb98a 3f6be0 6fa84c e86ff0"
  ).split()
)
_FIRST_COLORS = 10
# Instances of one label share its colour, in these shades: (mixed with this grey level, by this part).
_SHADES = ((0, 0.0), (255, 0.35), (0, 0.25))
_DARK, _LIGHT = (16, 16, 16), (255, 255, 255)
# Asked in turn for characters that Pillow's own font (Latin only) lacks; used where the system has them.
_FALLBACK_FONTS = (
  *("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "msyh.ttc", "arial.ttf"),
  *("Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc"),
)
OPACITY = 0.15
_COARSE = 256  # cells a side at most, on which the place of a label is sought
_MIN_FONT = 9  # pixels; below that Pillow's font cannot be read
_LEGIBLE = 400  # the least `_unit` of a picture on which labels leave something to see
_JPEG_SIDE = 65_500  # the longest that libjpeg writes
_UNKNOWN = "\U0010ffff"  # never assigned: shows a font's sign for a missing glyph


def instance_colors(
  labels: Sequence[str], color_by: str = "auto", ids: Sequence[int] | np.ndarray | None = None
) -> list[Color]:
  """One RGB colour an instance.

  Args:
    labels: the instances' labels.
    color_by: "instance": instance i has always the same colour, whatever the label; "label": a label has the
      same colour in every picture (from its spelling; if two of a picture meet, the later moves on) and
      its instances differ in shade; "id": an id has the same colour in every frame, whatever else is in it;
      "auto": "id" where there are ids, "instance" if all labels are equal, else "label".
    ids: `Results.ids`.

  Raises:
    ValueError: another `color_by`, or "id" without ids.
  """
  if color_by not in ("auto", "id", "instance", "label"):
    raise ValueError(f"color_by must be 'auto', 'id', 'instance' or 'label', got {color_by!r}")
  if color_by == "id" and ids is None:
    raise ValueError("color_by must be 'auto', 'instance' or 'label' for results without ids, got 'id'")
  distinct = list(dict.fromkeys(labels))
  if color_by == "auto":
    color_by = "id" if ids is not None else "instance" if len(distinct) < 2 else "label"
  if color_by in ("id", "instance"):
    numbers = ids if color_by == "id" else range(len(labels))
    return [_shade(PALETTE[i % len(PALETTE)], i // len(PALETTE)) for i in map(int, numbers)]
  # Few labels share the first, most different half of the palette.
  choice = _FIRST_COLORS if len(distinct) <= _FIRST_COLORS else len(PALETTE)
  slots: dict[str, int] = {}
  for label in distinct:
    slot = zlib.crc32(label.encode("utf-8", "replace")) % choice
    while slot in slots.values() and len(slots) < choice:
      slot = (slot + 1) % choice
    slots[label] = slot
  shades = {label: itertools.count() for label in distinct}
  return [_shade(PALETTE[slots[label]], next(shades[label])) for label in labels]


def _shade(color: Color, step: int) -> Color:
  grey, part = _SHADES[step % len(_SHADES)]
  return tuple(round(c + (grey - c) * part) for c in color)


def render(
  image,
  results: Results,
  *,
  labels: bool = True,
  scores: bool = True,
  boxes: bool = False,
  outlines: bool = True,
  opacity: float = OPACITY,
  color_by: str = "auto",
  scale: float | str = 1.0,
  font: str | os.PathLike | None = None,
) -> Image.Image:
  """Draws `results` on `image`.

  Args:
    image: the photo the results belong to: anything `load_image` takes (a path, turned upright
      by its EXIF orientation; a PIL image; an array [H, W, 3] or [H, W]). It is not changed.
    labels, scores: write the names (with the ids, "truck #3"), the scores. Best scores first, and only as
      long as they cover less than a third of the picture.
    boxes: draw the boxes too. An instance with an empty mask gets its box anyhow.
    outlines: draw the masks' outlines.
    opacity: of the tint, 0 (none) to 1.
    color_by: see `instance_colors`.
    scale: size of the drawing as a multiple of the photo's. "auto": 1, or for a photo too small to be written
      on the least whole number that makes it large enough, or for one with a longer side than any JPEG has
      (65,500 pixels) the number that makes it fit; a strip stays as narrow as that leaves it.
    font: path of a TrueType font for scripts that the default fonts lack. Characters without a glyph are
      written without their accents, or else as "?".

  Returns:
    A new RGB image, the photo's size times `scale`.

  Raises:
    ValueError: the photo is not of the results' size, or an option is out of range.
  """
  if not 0 <= opacity <= 1:
    raise ValueError(f"opacity must be within [0, 1], got {opacity}")
  if scale != "auto" and (isinstance(scale, str) or not 0 < scale <= 64):
    raise ValueError(f"scale must be 'auto' or above 0 and at most 64, got {scale!r}")
  if font is not None:
    font = os.fspath(font)
    try:
      _font(font, _MIN_FONT)
    except OSError as e:
      raise ValueError(f"font must be the path of a TrueType or OpenType font, got {font!r} ({e})") from e
  canvas = Image.fromarray(load_image(image))
  if (canvas.height, canvas.width) != results.size:
    raise ValueError(
      f"image must be the one the results belong to: {results.size[0]}x{results.size[1]} (height x width), "
      f"got {canvas.height}x{canvas.width}"
    )
  colors = instance_colors(results.labels, color_by, results.ids)
  if scale == "auto":
    most = _JPEG_SIDE / max(canvas.size)
    scale = min(64, math.ceil(_LEGIBLE / _unit(canvas.size)), math.floor(most) if most >= 1 else most)
  if scale != 1:
    results = scaled(results, scale)
    canvas = canvas.resize(results.size[::-1], Image.Resampling.BICUBIC)
  line = max(1, round(_unit(canvas.size) / 220))
  bounds = (mask_bounds(one.mask) for one in results)
  crops = [None if box is None else tuple(box.astype(int).tolist()) for box in bounds]
  order = drawing_order(results.areas)
  if opacity > 0:
    _fill(canvas, results, crops, order, colors, opacity)
  draw = ImageDraw.Draw(canvas)
  for i in order:
    if outlines and crops[i] is not None:
      _outline(canvas, results[i].mask, crops[i], colors[i], line)
    if boxes or crops[i] is None:
      _rectangle(draw, results.boxes[i], colors[i], line, canvas.size)
  if labels or scores:
    _write_names(canvas, results, crops, colors, labels, scores, font)
  return canvas


def scaled(results: Results, scale: float) -> Results:
  """The results in the photo made larger or smaller, masks and boxes, to be drawn on it."""
  height, width = (max(1, round(s * scale)) for s in results.size)
  masks = [
    np.asarray(
      Image.fromarray(one.mask.astype(np.uint8) * 255).resize((width, height), Image.Resampling.BILINEAR)
    )
    for one in results
  ]
  masks = np.stack(masks) >= 128 if masks else np.zeros((0, height, width), bool)
  return dataclasses.replace(results, boxes=results.boxes * scale, masks=masks, size=(height, width))


def _unit(size: tuple[int, int]) -> float:
  """The length that line widths and text follow: the picture's mean side, less in a narrow strip."""
  return min(math.sqrt(size[0] * size[1]), 3.0 * min(size))


def _fill(canvas, results: Results, crops, order, colors, opacity: float) -> None:
  """Each pixel takes the colour of one instance only: blending all of them makes mud of thirty."""
  free = np.ones(results.size, bool)
  for i in reversed(order):
    if crops[i] is None:
      continue
    x1, y1, x2, y2 = crops[i]
    shown = results[i].mask[y1:y2, x1:x2] & free[y1:y2, x1:x2]
    free[y1:y2, x1:x2] &= ~shown
    canvas.paste(colors[i], crops[i], Image.fromarray(shown.astype(np.uint8) * round(255 * opacity)))


def _dilate(mask: np.ndarray, radius: int) -> np.ndarray:
  """Grows True by a disc of `radius` pixels. [h, w] -> [h, w]; what leaves the array is lost."""
  height, width = mask.shape
  out, row, reach = mask.copy(), mask.copy(), 0
  # From the disc's top row (narrowest) to its middle: `row` is the mask grown sideways by `reach`.
  for dy in range(radius, -1, -1):
    wanted = int(math.sqrt((radius + 0.5) ** 2 - dy * dy))
    for dx in range(reach + 1, min(wanted, width - 1) + 1):
      row[:, dx:] |= mask[:, : width - dx]
      row[:, : width - dx] |= mask[:, dx:]
    reach = max(reach, wanted)
    if dy < height:
      out[dy:] |= row[: height - dy]
      out[: height - dy] |= row[dy:]
  return out


def _outline(canvas, mask: np.ndarray, crop: Box, color: Color, line: int) -> None:
  """A coloured line on the mask's inner edge and a dark, half transparent rim outside of it."""
  rim = max(1, line // 2)
  margin = rim + 2
  x1, y1 = max(0, crop[0] - margin), max(0, crop[1] - margin)
  x2, y2 = min(canvas.width, crop[2] + margin), min(canvas.height, crop[3] + margin)
  # A border of background all around, also beyond the picture: a cut off object's outline is closed.
  inside = np.pad(mask[y1:y2, x1:x2], margin)
  edge = inside & _dilate(~inside, line)
  outside = _dilate(inside, rim) & ~inside
  for part, paint, alpha in ((outside, (0, 0, 0), 140), (edge, color, 255)):
    alpha_map = Image.fromarray(part.astype(np.uint8) * alpha)
    if line > 1:  # at one pixel a blur would only make the line faint
      alpha_map = alpha_map.filter(ImageFilter.BoxBlur(0.5))
    alpha_map = alpha_map.crop((margin, margin, margin + x2 - x1, margin + y2 - y1))
    canvas.paste(paint, (x1, y1, x2, y2), alpha_map)


def _rectangle(draw: ImageDraw.ImageDraw, box: np.ndarray, color: Color, line: int, size) -> None:
  if not np.all(np.isfinite(box)):
    return
  x1, x2 = sorted(float(np.clip(v, 0, size[0] - 1)) for v in box[[0, 2]])
  y1, y2 = sorted(float(np.clip(v, 0, size[1] - 1)) for v in box[[1, 3]])
  draw.rectangle((x1, y1, x2, y2), outline=_DARK, width=line + 2 * (line > 1))
  draw.rectangle((x1, y1, x2, y2), outline=color, width=line)


@functools.lru_cache(maxsize=32)
def _font(path: str | None, size: int):
  return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)


@functools.lru_cache(maxsize=4096)
def _has_glyph(path: str | None, char: str) -> bool:
  """Whether the font draws `char` as something else than its sign for "missing"."""
  font = _font(path, 24)
  if char.isspace():
    return True
  drawn, missing = font.getmask(char), font.getmask(_UNKNOWN)
  return drawn.size != missing.size or bytes(drawn) != bytes(missing)


@functools.lru_cache(maxsize=1)
def _system_fonts() -> tuple[str, ...]:
  found = []
  for name in _FALLBACK_FONTS:
    try:
      _font(name, 24)
    except OSError:
      continue
    found.append(name)
  return tuple(found)


def _writable(text: str, font: str | None) -> tuple[str, str | None]:
  """The text as it can be written, and the font that writes most of it."""
  text = " ".join("".join(c if c.isprintable() else " " for c in text).split())

  def lacking(path):
    return sum(not _has_glyph(path, char) for char in text)

  if lacking(font):
    font = min((font, *_system_fonts()), key=lacking)
  written = []
  for char in text:
    if not _has_glyph(font, char):
      plain = [c for c in unicodedata.normalize("NFKD", char) if not unicodedata.combining(c)]
      char = "".join(c if _has_glyph(font, c) else "?" for c in plain) if plain else ""
    written.append(char)
  return "".join(written), font


def _fitted(name: str, score: str, path: str | None, size: int, room: int):
  """Text and font that take at most `room` pixels: a smaller font first, then a cut name, then nothing."""
  text = f"{name} {score}".strip()
  while size > _MIN_FONT and _font(path, size).getlength(text) > room:
    size = max(_MIN_FONT, size - max(1, size // 8))
  font = _font(path, size)
  while name and font.getlength(text) > room:
    name = name[:-1].rstrip()
    text = f"{name}... {score}".strip() if name else score
  return (text if font.getlength(text) <= room else ""), font


def _write_names(
  canvas, results: Results, crops, colors, labels: bool, scores: bool, font: str | None
) -> None:
  """Names by their instances' main parts, best score first, each where it covers other names least, and then
  other instances.
  """
  draw = ImageDraw.Draw(canvas)
  unit = _unit(canvas.size)
  size = round(max(_MIN_FONT, min(12, unit / 24), unit / 48))
  pad = max(1, size // 5)
  placed: list[Box] = []
  room = canvas.width * canvas.height / 3
  step = -(-max(canvas.size) // _COARSE)
  coarse = [one.mask[::step, ::step] for one in results]
  taken, same = _overlaps(coarse)
  for i in np.argsort(-results.scores, kind="stable"):
    name = results.labels[i] if results.ids is None else f"{results.labels[i]} #{results.ids[i]}"
    name, chosen = _writable(name, font) if labels else ("", font)
    score = f"{results.scores[i]:.2f}" if scores else ""
    text, used = _fitted(name, score, chosen, size, canvas.width - 2 * pad)
    if not text:
      continue
    ascent, descent = used.getmetrics()
    width, height = math.ceil(used.getlength(text)) + 2 * pad, ascent + descent + pad
    room -= width * height
    if room < 0 and placed:
      return
    part, box = _main_part(coarse[i], step, crops[i], results.boxes[i])
    spots = _spots(part, box, step, width, height)
    others = taken - sum(coarse[j].astype(int) for j in same[i])
    spot = _place(spots, (width, height), canvas.size, placed, others, step)
    placed.append(spot)
    ink = _DARK if _luminance(colors[i]) > 0.3 else _LIGHT
    corners = (spot[0], spot[1], spot[2] - 1, spot[3] - 1)
    draw.rounded_rectangle(corners, radius=pad, fill=colors[i], outline=_DARK)
    draw.text((spot[0] + pad, spot[1] + pad / 2), text, font=used, fill=ink)


def _luminance(color: Color) -> float:
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
  return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def _overlaps(coarse: Sequence[np.ndarray]) -> tuple[np.ndarray | int, list[np.ndarray]]:
  """Of masks, bool [h, w] each: (how many lie on each pixel, int [h, w]; which are the same thing as each of
  them, found by another phrase: itself, and those of an IoU of 0.5 or more).
  """
  if not coarse:
    return 0, []
  flat = np.stack([mask[::2, ::2].ravel() for mask in coarse]).astype(np.float32)
  both, areas = flat @ flat.T, flat.sum(axis=1)
  same = (2 * both >= areas[:, None] + areas[None] - both) & (both > 0) | np.eye(len(flat), dtype=bool)
  return np.sum(coarse, axis=0, dtype=np.int32), [np.flatnonzero(row) for row in same]


def _main_part(
  coarse: np.ndarray, step: int, crop: Box | None, box: np.ndarray
) -> tuple[np.ndarray | None, Box]:
  """(the largest part of a mask, bool [h, w], every `step`-th pixel; the box around it in pixels). None and
  the box of the whole where there is no mask, or one too thin to be met.
  """
  if crop is None:
    return None, tuple(int(v) for v in np.nan_to_num(box))
  if not coarse.any():
    return None, crop
  part = largest_part(coarse)
  x1, y1, x2, y2 = (int(v) * step for v in mask_bounds(part))
  return part, (x1, y1, min(x2, crop[2]), min(y2, crop[3]))


def _spots(part: np.ndarray | None, box: Box, step: int, width: int, height: int) -> list[tuple[int, int]]:
  """Corners (x, y) where the label of an instance may go, best first: on top of it, inside, below, beside;
  inside comes last for an instance that the label would hide.
  """
  x1, y1, x2, y2 = box

  def edges(x):
    """Its first and last row under a label from column x on: round things have empty corners."""
    if part is None:
      return y1, y2
    start = max(x, x1)
    rows = np.flatnonzero(part[:, start // step : -(-(start + width) // step)].any(axis=1)) * step
    return (int(rows[0]), min(int(rows[-1]) + step, y2)) if len(rows) else (y1, y2)

  columns = (x1, max(x1, x2 - width), (x1 + x2 - width) // 2)
  above = [(x, edges(x)[0] - height) for x in columns]
  below = [(x, edges(x)[1]) for x in columns]
  middle = [(columns[2], y1 + (y2 - y1 - height) * part // 4) for part in (2, 1, 3)]
  inside = [(x1, y1), (x2 - width, y1), *middle, (x1, y2 - height), (x2 - width, y2 - height)]
  beside = [(x, (y1 + y2 - height) // 2) for x in (x2, x1 - width)]
  if 4 * width * height < (x2 - x1) * (y2 - y1):
    return [*above, *inside, *below, *beside]
  stacked = [(x, y - height) for x, y in above] + [(x, y + height) for x, y in below]
  return [*above, *below, *stacked, *beside, *inside]


def _place(
  spots, size: tuple[int, int], picture: tuple[int, int], placed: Sequence[Box], others: np.ndarray, step: int
) -> Box:
  """The spot, pushed into the picture, that covers the labels already placed least, and of equals other
  instances (to an eighth of the label); the earlier of equals.

  others: int [h, w], how many other instances lie on every `step`-th pixel.
  """
  best, least = None, (math.inf, math.inf)
  for x, y in spots:
    left = min(max(x, 0), max(0, picture[0] - size[0]))
    top = min(max(y, 0), max(0, picture[1] - size[1]))
    right, bottom = left + size[0], top + size[1]
    covered = 0
    for p in placed:
      covered += max(0, min(right, p[2]) - max(left, p[0])) * max(0, min(bottom, p[3]) - max(top, p[1]))
    under = others[top // step : -(-bottom // step), left // step : -(-right // step)] > 0
    cost = covered, round(8 * float(under.mean()))
    if cost < least:
      best, least = (left, top, right, bottom), cost
  return best
