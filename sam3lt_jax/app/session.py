"""What one visitor of the page has before them: a photo, what was asked about it, what was found.

No widget is known here. Sessions share a predictor; each keeps its own encoded photo, so that a prompt of one
never meets the photo of another. A photo is encoded once; every answer after that starts from its features.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from sam3lt_jax import __version__
from sam3lt_jax.predictor import Encoded, Predictor
from sam3lt_jax.processing.images import load_image
from sam3lt_jax.processing.render import scaled
from sam3lt_jax.processing.results import Results

Box = tuple[float, float, float, float]

SIDE = 1200  # pixels of the picture's longer side: what a screen shows, quick to send at every click
_MOST_ENLARGED = 4.0
_MOST_UNDONE = 100
_SAME = 0.5  # IoU of masks above which a find is what was refined by hand before
_ON, _OFF = (46, 204, 64), (255, 65, 54)
_WHITE, _DARK = (255, 255, 255), (16, 16, 16)


@dataclasses.dataclass(frozen=True)
class Thing:
  """An object in the photo.

  Attributes:
    found: `Results` of this one instance.
    shown: the same at the picture's size.
    clicks: (x, y, label) in pixels, label 1 on it or 0 off it, of the user about this object.
    by_hand: a click or a box around it made it what it is: another search leaves it alone.
  """

  found: Results
  shown: Results
  clicks: tuple[tuple[float, float, int], ...] = ()
  by_hand: bool = False


@dataclasses.dataclass(frozen=True)
class State:
  """What undo goes back to. `current` is the index of the thing that clicks change; None: they make one."""

  phrases: tuple[str, ...] = ()
  examples: tuple[tuple[Box, int], ...] = ()
  threshold: float | None = None
  things: tuple[Thing, ...] = ()
  current: int | None = None


class Session:
  """One photo at a time, prompted by phrases, example boxes, clicks and outlines.

  Every method that asks the model raises ValueError, with a sentence for the user, and then changes nothing.
  Threads may call it; one call waits for the other.

  Attributes:
    photo: uint8 [H, W, 3], or None. name: of its file.
    state: what was asked and found.
  """

  def __init__(self, predictor: Predictor):
    self.predictor = predictor
    self.photo: np.ndarray | None = None
    self.name = ""
    self._image: Encoded | None = None
    self._shown: Image.Image | None = None  # the photo at the picture's size
    self.state, self._history = State(), []
    self._lock = threading.RLock()

  def __deepcopy__(self, memo: Any) -> Session:
    """A new session, with nothing in it. gradio copies a page's first session for each visitor."""
    return Session(self.predictor)

  # ------------------------------------------------------------------ what there is

  @property
  def threshold(self) -> float:
    """Finds with a score above it are kept."""
    chosen = self.state.threshold
    return self.predictor.processor.profile.score_threshold if chosen is None else chosen

  @property
  def can_undo(self) -> bool:
    return bool(self._history)

  @property
  def results(self) -> Results:
    """All things, in order."""
    nothing = Results.empty(self._photo().shape[:2])
    return Results.concatenate([nothing, *(thing.found for thing in self.state.things)])

  def at(self, x: float, y: float) -> int | None:
    """The thing at a pixel, the smallest of several; None: there is none."""
    column, row = int(x), int(y)
    here = [i for i, t in enumerate(self.state.things) if t.found.masks[0, row, column]]
    return min(here, key=lambda i: np.count_nonzero(self.state.things[i].found.masks), default=None)

  # ------------------------------------------------------------------ what the user does

  def open(self, image: Any, name: str = "photo") -> None:
    """Another photo, which is encoded here, once; what was asked of the one before is forgotten.

    image: anything that `load_image` takes. name: a file's name, for the downloads.
    """
    with self._lock:
      photo = load_image(image)
      self._image = self.predictor.encode(photo)
      self.photo, self.name = photo, os.path.basename(name)
      self._shown = Results.empty(photo.shape[:2]).render(photo, scale=self._scale)
      self.state, self._history = State(threshold=self.state.threshold), []

  def find(self, phrases: Sequence[str]) -> None:
    """All that matches these phrases, and the example boxes; things made by hand stay."""
    with self._lock:
      given = dict.fromkeys(" ".join(phrase.split()) for phrase in phrases)
      self._search(phrases=tuple(phrase for phrase in given if phrase))

  def set_threshold(self, threshold: float) -> None:
    """Searches again, keeping finds with a score above it."""
    with self._lock:
      if self.photo is None:
        self.state = dataclasses.replace(self.state, threshold=threshold)
      elif threshold != self.threshold:
        self._search(threshold=threshold)

  def add_example(self, box: Sequence[float], label: int) -> None:
    """A box around something like what is sought (label 1) or unlike it (0); searches again."""
    with self._lock:
      self._search(examples=(*self.state.examples, (self._box(box), label)))

  def click(self, x: float, y: float, label: int = 1) -> None:
    """A click on (1) or off (0) the current thing, which is refined; where there is none, a new thing."""
    with self._lock:
      photo, index = self._photo(), self.state.current
      if not (0 <= x < photo.shape[1] and 0 <= y < photo.shape[0]):
        return
      if index is None:
        if not label:
          raise ValueError("choose an object first: this click says what does not belong to it")
        found = self.predictor.predict(points=[[x, y]], image=self._image)
        self._add(self._thing(found, ((x, y, 1),), True))
        return
      thing = self.state.things[index]
      clicks = (*thing.clicks, (x, y, label))
      points, labels = [[x, y] for x, y, _ in clicks], [label for *_, label in clicks]
      found = self.predictor.refine(thing.found, 0, points, labels, image=self._image)
      thing = self._thing(found, clicks, True)
      self._change(things=(*self.state.things[:index], thing, *self.state.things[index + 1 :]))

  def outline(self, box: Sequence[float]) -> None:
    """A new thing: the one object that this box lies around."""
    with self._lock:
      self._add(self._thing(self.predictor.predict(box=self._box(box), image=self._image), by_hand=True))

  def choose(self, index: int | None) -> None:
    """Which thing further clicks are about; None: the next click makes one."""
    with self._lock:
      if index is not None and not 0 <= index < len(self.state.things):
        index = None
      self.state = dataclasses.replace(self.state, current=index)

  def remove(self) -> None:
    """Takes the current thing away."""
    with self._lock:
      if self.state.current is not None:
        things = tuple(t for i, t in enumerate(self.state.things) if i != self.state.current)
        self._change(things=things, current=None)

  def undo(self) -> None:
    """Goes back to before the last change."""
    with self._lock:
      if self._history:
        self.state = self._history.pop()

  def clear(self) -> None:
    """Takes everything off the photo. Can be undone."""
    with self._lock:
      empty = State(threshold=self.state.threshold)
      if self.state != empty:
        self._change(**vars(empty))

  # ------------------------------------------------------------------ what the user sees and takes home

  def picture(self) -> Image.Image:
    """The photo with what was found, marked and clicked, at a screen's size."""
    with self._lock:
      self._photo()
      scale = self._scale
      nothing = Results.empty((self._shown.height, self._shown.width))
      shown = Results.concatenate([nothing, *(thing.shown for thing in self.state.things)])
      picture = shown.render(self._shown)
      draw = ImageDraw.Draw(picture)
      for box, label in self.state.examples:
        _rectangle(draw, [v * scale for v in box], _ON if label else _OFF)
      if self.state.current is not None:
        thing = self.state.things[self.state.current]
        mask = Image.fromarray(thing.shown.masks[0].astype(np.uint8) * 255)
        picture.paste(_WHITE, mask=ImageChops.subtract(mask.filter(ImageFilter.MaxFilter(9)), mask))
        for x, y, label in thing.clicks:
          _mark(draw, (x + 0.5) * scale, (y + 0.5) * scale, label)
      return picture

  def save(self, kind: str, folder: str | os.PathLike) -> str:
    """Writes what is seen now; returns the file.

    kind: "json": COCO; "masks": the label map, a PNG; "overlay": the photo with the masks on it, a PNG.
    """
    with self._lock:
      suffix = {"json": ".json", "masks": "_masks.png", "overlay": "_overlay.png"}[kind]
      path = os.path.join(folder, f"{os.path.splitext(self.name)[0]}{suffix}")
      if kind == "json":
        info = {"description": f"sam3lt_jax {__version__}"}
        with open(path, "w", encoding="utf-8") as f:
          json.dump({"info": info} | json.loads(self.results.with_image(self.name).to_json()), f)
      elif kind == "masks":
        self.results.save_png(path)
      else:
        self.results.save(path, self._photo(), scale="auto")
      return path

  # ------------------------------------------------------------------ how

  def _photo(self) -> np.ndarray:
    if self.photo is None:
      raise ValueError("there is no photo yet: drop one first")
    return self.photo

  @property
  def _scale(self) -> float:
    """The picture's size by the photo's."""
    return min(_MOST_ENLARGED, SIDE / max(self._photo().shape[:2]))

  def _thing(self, found: Results, clicks: tuple = (), by_hand: bool = False) -> Thing:
    return Thing(found, scaled(found, self._scale), clicks, by_hand)

  def _box(self, box: Sequence[float]) -> Box:
    """Two opposite corners, as (x1, y1, x2, y2) within the photo. Raises ValueError: the box is empty."""
    height, width = self._photo().shape[:2]
    xs = sorted(min(max(v, 0.0), float(width)) for v in box[0::2])
    ys = sorted(min(max(v, 0.0), float(height)) for v in box[1::2])
    if xs[1] - xs[0] < 1 or ys[1] - ys[0] < 1:
      raise ValueError("this box is empty: drag from one corner to the other")
    return xs[0], ys[0], xs[1], ys[1]

  def _change(self, **changes: Any) -> None:
    """The one way to a new state that undo knows of."""
    self._history = [*self._history[1 - _MOST_UNDONE :], self.state]
    self.state = dataclasses.replace(self.state, **changes)

  def _add(self, thing: Thing) -> None:
    self._change(things=(*self.state.things, thing), current=len(self.state.things))

  def _search(self, **changes: Any) -> None:
    """Finds anew what phrases and examples ask for. What was made by hand stays, once."""
    asked = dataclasses.replace(self.state, **changes)
    self._photo()
    mine = [t for t in self.state.things if t.by_hand]
    found = []
    if asked.phrases or any(label for _, label in asked.examples):
      results = self.predictor.predict(
        list(asked.phrases) or None,
        [box for box, _ in asked.examples] or None,
        [label for _, label in asked.examples] or None,
        asked.threshold,
        image=self._image,
      )
      new = [results[i : i + 1] for i in range(len(results))]
      found = [self._thing(one) for one in new if not any(_same(one, t.found) for t in mine)]
    self._change(**changes, things=(*mine, *found), current=None)


def _same(a: Results, b: Results) -> bool:
  union = np.count_nonzero(a.masks | b.masks)
  return a.labels == b.labels and np.count_nonzero(a.masks & b.masks) > _SAME * union


def _rectangle(draw: ImageDraw.ImageDraw, box: Sequence[float], color: tuple[int, int, int]) -> None:
  x1, y1, x2, y2 = box
  draw.rectangle((x1 - 2, y1 - 2, x2 + 2, y2 + 2), outline=_DARK, width=8)
  draw.rectangle(box, outline=color, width=4)


def _mark(draw: ImageDraw.ImageDraw, x: float, y: float, label: int) -> None:
  """A click: green with a plus, red with a minus."""
  draw.ellipse((x - 18, y - 18, x + 18, y + 18), fill=_WHITE)
  draw.ellipse((x - 15, y - 15, x + 15, y + 15), fill=_ON if label else _OFF)
  draw.rectangle((x - 9, y - 2, x + 9, y + 2), fill=_WHITE)
  if label:
    draw.rectangle((x - 2, y - 9, x + 2, y + 9), fill=_WHITE)
