"""Scenes and clips of drawn shapes with exact masks. Both depend on their seed and the configuration only.

A scene has 0 to 8 objects on a textured background with unnamed clutter (lines and specks). An object is a
kind in a colour, a pattern and a size, turned by up to 20 degrees, and may hide part of another one.
Everything is drawn at four times the size and averaged; a pixel belongs to the topmost object that covers
half of it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

KINDS = ("circle", "ring", "square", "triangle", "star", "cross")
COLOURS = {
  "red": (214, 40, 40),
  "orange": (247, 140, 30),
  "yellow": (245, 214, 50),
  "green": (50, 160, 70),
  "blue": (45, 95, 205),
  "purple": (130, 60, 170),
  "white": (245, 245, 245),
  "black": (25, 25, 28),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
SIZES = {"small": (0.10, 0.12), "medium": (0.14, 0.165), "large": (0.19, 0.23)}  # radius / side of the image
_TILT = 0.35  # radians, the most that an object is turned either way
_FINER = 4  # samples a pixel and axis


@dataclasses.dataclass(frozen=True)
class SceneConfig:
  """How scenes are drawn.

  Attributes:
    side: pixels; scenes are square.
    min_objects, max_objects: how many are tried, evenly drawn; fewer are placed where there is no room.
    min_visible: an object that would leave another (or itself) with a smaller visible share is not placed.
    family_share: share of scenes whose objects come from one to three kinds, so that kinds repeat.
    clutter: up to this many lines and as many specks.
  """

  side: int = 120
  min_objects: int = 0
  max_objects: int = 8
  min_visible: float = 0.5
  family_share: float = 0.6
  clutter: int = 4

  def __post_init__(self):
    if self.side < 32:
      raise ValueError(f"side must be at least 32 pixels, got {self.side}")
    if not 0 <= self.max_objects <= 32:
      raise ValueError(f"max_objects must be 0 to 32, got {self.max_objects}")
    if not 0 <= self.min_objects <= self.max_objects:
      raise ValueError(f"min_objects must be 0 to max_objects = {self.max_objects}, got {self.min_objects}")


@dataclasses.dataclass(frozen=True, eq=False)
class SceneObject:
  """One object. `mask`: bool [side, side], its visible pixels; `box`: xyxy in pixels, tight around them.

  In a clip there may be none: the box is then all 0.
  """

  kind: str
  colour: str
  pattern: str
  size: str
  mask: np.ndarray
  box: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
  """image: uint8 [side, side, 3]; objects from the back to the front."""

  seed: int
  image: np.ndarray
  objects: tuple[SceneObject, ...]


def draw_scene(seed: int, config: SceneConfig = SceneConfig()) -> Scene:
  """The scene of `seed` (a non-negative int)."""
  rng = np.random.default_rng([seed, 7])
  side = config.side
  canvas = _background(rng, side)
  _add_clutter(canvas, rng, config.clutter)
  kinds = KINDS
  if rng.random() < config.family_share:
    kinds = tuple(rng.choice(KINDS, size=int(rng.integers(1, 4)), replace=False))
  wanted = int(rng.integers(config.min_objects, config.max_objects + 1))
  placed: list[tuple[dict[str, str], np.ndarray]] = []
  whole: list[int] = []  # pixels of each object before anything hid it
  for _ in range(wanted * 3):
    if len(placed) == wanted:
      break
    look, window, cover, paint = _draw_object(rng, kinds, side)
    mask = np.zeros((side, side), bool)
    mask[window] = cover > 0.5
    left = [m & ~mask for _, m in placed]
    if any(m.sum() < config.min_visible * n for m, n in zip(left, whole)):
      continue
    placed = [(look_, m) for (look_, _), m in zip(placed, left)] + [(look, mask)]
    whole.append(int(mask.sum()))
    canvas[window] += cover[..., None] * (paint - canvas[window])
  canvas += rng.normal(0.0, rng.uniform(0.0, 6.0), canvas.shape).astype(np.float32)
  image = np.clip(canvas, 0, 255).astype(np.uint8)
  objects = tuple(SceneObject(mask=mask, box=tight_box(mask), **look) for look, mask in placed)
  return Scene(seed, image, objects)


def draw_clip(
  seed: int, frames: int, config: SceneConfig = SceneConfig(min_objects=2, max_objects=5)
) -> tuple[Scene, ...]:
  """A scene whose objects move: one `Scene` a frame, with the same objects in the same order in all of them.

  Each goes its way in a line, turning a little, in front of those before it in the order. About half of
  them turn back at the edges; the others leave the picture and come back later. An object may be hidden for
  some frames.
  """
  rng = np.random.default_rng([seed, 19])
  side = config.side
  ground = _background(rng, side)
  _add_clutter(ground, rng, config.clutter)
  noise = rng.uniform(0.0, 6.0)
  count = int(rng.integers(config.min_objects, config.max_objects + 1))
  starts = rng.uniform(0.2, 0.8, (count, 2)) * side
  speed, heading, turn = (
    rng.uniform(*ends, count) for ends in ((0.015, 0.06), (0, 2 * np.pi), (-0.08, 0.08))
  )
  # How far outside of the edges it turns back.
  beyond = np.where(rng.random(count) < 0.5, 0.3, -0.12) * side
  steps = np.stack([np.cos(heading), np.sin(heading)], 1) * speed[:, None] * side
  scenes = []
  for t in range(frames):
    canvas, masks, looks = ground.copy(), np.zeros((0, side, side), bool), []
    for i in range(count):
      at = _between(starts[i] + t * steps[i], -beyond[i], side + beyond[i])
      own = np.random.default_rng([seed, 19, i])  # the same look and paint in every frame
      look, window, cover, paint = _draw_object(own, KINDS, side, at, t * turn[i])
      mask = np.zeros((side, side), bool)
      mask[window] = cover > 0.5
      masks = np.concatenate([masks & ~mask, mask[None]])
      canvas[window] += cover[..., None] * (paint - canvas[window])
      looks.append(look)
    canvas += rng.normal(0.0, noise, canvas.shape).astype(np.float32)
    boxes = [tight_box(mask) if mask.any() else (0.0,) * 4 for mask in masks]
    objects = tuple(SceneObject(mask=m, box=box, **look) for m, box, look in zip(masks, boxes, looks))
    scenes.append(Scene(seed, np.clip(canvas, 0, 255).astype(np.uint8), objects))
  return tuple(scenes)


def _between(x: np.ndarray, low: float, high: float) -> np.ndarray:
  """x, turned back at both ends as often as it takes."""
  span = high - low
  x = np.mod(x - low, 2 * span)
  return low + np.minimum(x, 2 * span - x)


def tight_box(mask: np.ndarray) -> tuple[float, float, float, float]:
  """bool [h, w] -> xyxy in pixels around its True pixels; right and bottom edges exclusive."""
  ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)


def _draw_object(rng, kinds, side, at=None, turned=0.0):
  """(look, window of the canvas, cover float32 [h, w] in 0..1, paint float32 [h, w, 3]).

  at: (x, y) of its centre, anywhere; None: somewhere inside. turned: radians, added to its own tilt.
  """
  look = {
    "kind": str(rng.choice(kinds)),
    "colour": str(rng.choice(list(COLOURS))),
    "pattern": str(rng.choice(PATTERNS, p=(0.4, 0.2, 0.2, 0.2))),
    "size": str(rng.choice(list(SIZES))),
  }
  radius = side * rng.uniform(*SIZES[look["size"]])
  reach = int(np.ceil(radius)) + 1
  inside = rng.uniform(reach, side - reach, 2)
  x, y = inside if at is None else at
  left, top = int(np.floor(x)) - reach, int(np.floor(y)) - reach
  right, bottom = (min(max(v + 2 * reach + 1, 1), side) for v in (left, top))
  left, top = (min(max(v, 0), side - 1) for v in (left, top))
  size = (right - left, bottom - top)
  centre = np.array([x - left, y - top])
  angle = rng.uniform(-_TILT, _TILT) + turned
  cover = _cover(look["kind"], size, centre, radius, angle)
  paint = _paint(rng, look, size, centre, radius)
  return look, (slice(top, bottom), slice(left, right)), cover, paint


def _cover(kind, size, centre, radius, angle) -> np.ndarray:
  """Share of each pixel that the shape covers, float32 [h, w] in 0..1."""
  big = Image.new("L", (size[0] * _FINER, size[1] * _FINER))
  draw = ImageDraw.Draw(big)
  turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
  for outline, ink in _outlines(kind):
    points = (outline @ turn * radius + centre) * _FINER
    draw.polygon([tuple(p) for p in points], fill=ink)
  return np.asarray(big.reduce(_FINER), np.float32) / 255.0


def _outlines(kind: str):
  """Polygons in the unit circle with the ink they are filled with, in drawing order (0 cuts away)."""
  t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
  circle = np.stack([np.cos(t), np.sin(t)], 1)
  if kind == "circle":
    return [(circle, 255)]
  if kind == "ring":
    return [(circle, 255), (circle * 0.5, 0)]
  if kind == "square":
    return [(np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.78, 255)]
  if kind == "triangle":
    return [(_regular(3, [1.0]), 255)]
  if kind == "star":
    return [(_regular(5, [1.0, 0.42]), 255)]
  assert kind == "cross"
  a, b = 0.95, 0.32
  right = [[b, -b], [a, -b], [a, b], [b, b]]
  quarter = np.array([[0, 1], [-1, 0]])
  corners = [np.array(right[1:]) @ np.linalg.matrix_power(quarter, k) for k in range(4)]
  return [(np.concatenate(corners), 255)]


def _regular(corners: int, radii: list[float]) -> np.ndarray:
  """A regular polygon, or a star whose points alternate between the radii."""
  r = np.tile(radii, corners)
  t = np.arange(len(r)) / len(r) * 2 * np.pi - np.pi / 2
  return np.stack([r * np.cos(t), r * np.sin(t)], 1)


def _paint(rng, look, size, centre, radius) -> np.ndarray:
  """The object's colour in its pattern, float32 [h, w, 3]."""
  base = np.array(COLOURS[look["colour"]], np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
  other = base * 0.45 if base.mean() > 70 else base + 95  # darker, or lighter where the colour is dark
  if look["pattern"] == "plain":
    return np.broadcast_to(base, (size[1], size[0], 3))
  angle = rng.uniform(0, np.pi)
  x, y = np.arange(size[0]) + 0.5 - centre[0], np.arange(size[1]) + 0.5 - centre[1]
  u = np.cos(angle) * x[None, :] + np.sin(angle) * y[:, None]
  v = np.cos(angle) * y[:, None] - np.sin(angle) * x[None, :]
  step = radius * rng.uniform(0.3, 0.4)  # half a period, in pixels
  if look["pattern"] == "striped":
    second = np.sin(np.pi * u / step) > 0
  elif look["pattern"] == "checked":
    second = (np.sin(np.pi * u / step) > 0) ^ (np.sin(np.pi * v / step) > 0)
  else:
    du, dv = (np.abs(np.mod(a, 2 * step) - step) for a in (u, v))
    second = du**2 + dv**2 < (0.62 * step) ** 2
  return np.where(second[..., None], other, base).astype(np.float32)


def _background(rng, side: int) -> np.ndarray:
  """A muted ground: two greyish colours in a slope, with noise or faint bars; float32 [S, S, 3]."""
  ends = rng.uniform(90, 205, (2, 1)) + rng.uniform(-22, 22, (2, 3))
  angle = rng.uniform(0, 2 * np.pi)
  t = np.linspace(-0.5, 0.5, side, dtype=np.float32)
  along = np.clip(np.cos(angle) * t[None, :] + np.sin(angle) * t[:, None] + 0.5, 0, 1)[..., None]
  ground = (ends[0] * (1 - along) + ends[1] * along).astype(np.float32)
  texture = rng.integers(0, 4)
  if texture in (1, 2):  # smooth noise at one of two grains
    cells = side // (6 if texture == 1 else 24)
    noise = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    noise = np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))
    ground += (noise * rng.uniform(4, 16))[..., None]
  elif texture == 3:
    bars = np.sin(2 * np.pi * rng.uniform(4, 14) * (along[..., 0] + rng.uniform()))
    ground += (np.sign(bars) * rng.uniform(3, 10))[..., None].astype(np.float32)
  return ground


def _add_clutter(canvas: np.ndarray, rng, most: int) -> None:
  """Lines and specks, too thin or too small to be an object."""
  side = canvas.shape[0]
  picture = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
  draw = ImageDraw.Draw(picture)
  for _ in range(int(rng.integers(0, most + 1))):
    ends = rng.uniform(0, side, 4)
    draw.line([tuple(ends[:2]), tuple(ends[2:])], fill=_any_colour(rng), width=int(rng.integers(1, 3)))
  for _ in range(int(rng.integers(0, most + 1))):
    x, y = rng.uniform(0, side, 2)
    r = rng.uniform(0.005, 0.018) * side
    draw.ellipse([x - r, y - r, x + r, y + r], fill=_any_colour(rng))
  canvas[:] = np.asarray(picture)


def _any_colour(rng) -> tuple[int, int, int]:
  return tuple(int(c) for c in rng.integers(20, 236, 3))
