"""What is compared: parts of the model, the whole from file to results, and how they scale."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tests.benchmarks.clicks import clicks
from tests.benchmarks.sides import Side
from tests.benchmarks.timing import OURS, REFERENCE, Row, Variant, measure, say
from tests.benchmarks.workload import PHRASE, Workload

Calls = dict[Variant, Callable[[], Any]]


def vision(workload: Workload, sides: Sequence[Side], dtype: str, repeats: int) -> list[Row]:
  """One image to features."""
  side = workload.config.vision.image_size
  pixels = workload.pixels(1)
  calls = {(s.whose, s.how): functools.partial(s.vision, s.pixels(pixels)) for s in sides}
  return [measure("vision", f"vision encoder, one image of {side} px", dtype, calls, repeats)]


def text(workload: Workload, sides: Sequence[Side], dtype: str, repeats: int) -> list[Row]:
  """Many phrases to features. Ours runs as `Predictor` runs it, with RepMixer blocks folded."""
  count = workload.scale.text_phrases
  calls = {(s.whose, s.how): functools.partial(s.text, s.ids(workload.tokens(count))) for s in sides}
  return [measure("text", f"text encoder, {count} phrases", dtype, calls, repeats)]


def detect(workload: Workload, sides: Sequence[Side], dtype: str, repeats: int) -> list[Row]:
  """Features of one image and of 1, 4, 16 phrases to raw predictions, and what one more phrase costs."""
  counts = workload.scale.detect_phrases
  pixels = workload.pixels(1)
  images = [s.vision(s.pixels(pixels)) for s in sides]
  note = _agreement(workload, sides, images)
  rows = []
  for count in counts:
    calls = _detections(workload, sides, images, count)
    rows.append(measure("detect", f"detection, {_plural(count, 'phrase')}", dtype, calls, repeats, note))
    note = ""
  return [*rows, _further(rows[0], counts[0], rows[-1], counts[-1])]


def _detections(workload: Workload, sides: Sequence[Side], images: Sequence[Any], count: int) -> Calls:
  """Both ways of asking several phrases of one image: together, and one after the other."""
  calls: Calls = {}
  for side, image in zip(sides, images):
    phrases = side.text(side.ids(workload.tokens(count)))
    calls[side.whose, f"{side.how}, together"] = functools.partial(side.detect, image, phrases)
    if count > 1:
      rows = [side.row(phrases, i) for i in range(count)]
      calls[side.whose, f"{side.how}, one by one"] = functools.partial(_each, side, image, rows)
  return calls


def _each(side: Side, image: Any, rows: Sequence[Any]) -> None:
  shared = side.prepare(image)
  for row in rows:
    side.detect(shared, row)


def _further(first: Row, fewest: int, last: Row, most: int) -> Row:
  def seconds(side):
    few, many = first.best(side), last.best(side)
    return {f"({many[0]})": [(many[1] - few[1]) / (most - fewest)]} if few and many else {}

  return Row(
    "detect",
    "each further phrase on the same image",
    first.dtype,
    seconds(OURS),
    seconds(REFERENCE),
    note=f"seconds for {most} phrases less those for {fewest}, by {most - fewest}",
    elsewhere=max(first.elsewhere or 0.0, last.elsewhere or 0.0),
  )


def _agreement(workload: Workload, sides: Sequence[Side], images: Sequence[Any]) -> str:
  """That both sides compute the same thing, said beside their times."""
  logits = {}
  for side, image in zip(sides, images):
    out = side.detect(image, side.text(side.ids(workload.tokens(1))))
    logits.setdefault(side.whose, side.logits(out))
  if len(logits) < 2:
    return ""
  ours, reference = logits[OURS], logits[REFERENCE]
  return (
    f"largest difference of class logits {np.abs(ours - reference).max():.1e}"
    f" (they reach {np.abs(reference).max():.1f})"
  )


def end_to_end(workload: Workload, sides: Sequence[Side], dtype: str, repeats: int) -> Iterator[Row]:
  """Image files and one phrase to boxes, scores and full-size masks as numpy arrays."""
  for count in workload.scale.batches:
    paths = [workload.photos[i % len(workload.photos)] for i in range(count)]
    calls: Calls = {}
    for side in sides:
      run = functools.partial(side.end_to_end, phrase=PHRASE, threshold=workload.threshold)
      calls[side.whose, f"{side.how}, one call"] = functools.partial(run, paths)
      if count > 1 and side.whose == REFERENCE:  # ours goes image by image inside the call
        calls[side.whose, f"{side.how}, one by one"] = lambda run=run, paths=paths: [run([p]) for p in paths]
    kept = {side.whose: side.end_to_end(paths[:1], PHRASE, workload.threshold) for side in sides}
    note = ", ".join(f"{whose} keeps {n}" for whose, n in kept.items()) + " instances in the first photo"
    what = f"file to results, {_plural(count, 'image')}, one phrase"
    yield measure("end_to_end", what, dtype, calls, repeats, note if count == 1 else "")


def scaling(
  workload: Workload, sides: Sequence[Side], dtype: str, repeats: int, done: Sequence[Row] = ()
) -> Iterator[Row]:
  """Seconds against the number of phrases, boxes and images, and against the resolution.

  done: rows of this run; what they hold is not measured again.
  """
  scale, config = workload.scale, workload.config
  pixels = workload.pixels(1)
  images = [s.vision(s.pixels(pixels)) for s in sides]
  try:
    for resolution in scale.scaling_sides:
      image = workload.pixels(1, resolution)
      calls = {}
      for side in sides:
        tokens = side.ids(workload.tokens(1))
        run = side.at_resolution(resolution).forward
        calls[side.whose, side.how] = functools.partial(run, side.pixels(image), tokens)
      name = "scaling: whole model, one image and phrase, by pixels a side"
      yield measure(name, str(resolution), dtype, calls, repeats)
  finally:
    for side in sides:
      side.at_resolution(config.vision.image_size)
  name = "scaling: detection by phrases"
  for count in scale.scaling_phrases:
    what = f"detection, {_plural(count, 'phrase')}"
    known = next((row for row in done if (row.what, row.dtype) == (what, dtype)), None)
    if known is not None:
      yield dataclasses.replace(known, part=name, what=str(count), note="")
    else:
      yield measure(name, str(count), dtype, _detections(workload, sides, images, count), repeats)
  for count in scale.scaling_images:
    batch = workload.pixels(count)
    calls = {(s.whose, s.how): functools.partial(s.vision, s.pixels(batch)) for s in sides}
    if count > 1:
      calls |= {(s.whose, f"{s.how}, one by one"): _vision_each(s, batch) for s in sides}
    yield measure("scaling: vision encoder by images", str(count), dtype, calls, repeats)
  for count in scale.scaling_boxes:
    calls = {}
    for side, image in zip(sides, images):
      phrase = side.text(side.ids(workload.tokens(1)))
      boxes = side.boxes(workload.boxes(1, count)) if count else (None, None)
      calls[side.whose, side.how] = functools.partial(side.detect, image, phrase, boxes)
    yield measure("scaling: detection of one phrase by boxes", str(count), dtype, calls, repeats)


def _vision_each(side: Side, batch: np.ndarray) -> Callable[[], None]:
  images = [side.pixels(batch[i : i + 1]) for i in range(len(batch))]

  def run() -> None:
    for image in images:
      side.vision(image)

  return run


def _plural(count: int, noun: str) -> str:
  return f"{count} {noun}{'' if count == 1 else 's'}"


PARTS: dict[str, Callable[..., Iterable[Row]]] = {
  "vision": vision,
  "text": text,
  "detect": detect,
  "clicks": clicks,
  "end_to_end": end_to_end,
  "scaling": scaling,
}


def run(
  part: str, workload: Workload, sides: Sequence[Side], dtype: str, repeats: int, done: Sequence[Row]
) -> Iterable[Row]:
  """The rows of one of `PARTS`, as they come; `done`: those that this run has already."""
  say(f"{part}, {dtype}")
  if part == "scaling":
    return scaling(workload, sides, dtype, repeats, done)
  return PARTS[part](workload, sides, dtype, repeats)
