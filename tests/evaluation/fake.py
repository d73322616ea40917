"""A predictor that finds what it is told to, in place of a model."""

from __future__ import annotations

import numpy as np

from sam3lt_jax.processing.masks import mask_bounds
from sam3lt_jax.processing.results import Results
from tests.data import scenes


class FakePredictor:
  """Knows the drawn scenes by their pixels and answers as `answers` says.

  `answers`: phrase -> [(score, shape, x1, y1, x2, y2), ...] for every image; by default everything that is
  there, with a score of 0.9, and a box in the corner with 0.2 for each phrase that is not.
  """

  def __init__(self, answers=None):
    self.answers, self.asked, self.thresholds, self.images = answers, [], [], 0

  def set_image(self, image):
    self.images += 1
    known = {scenes.picture(objects).tobytes(): objects for objects in scenes.SCENES.values()}
    self.objects = known[np.asarray(image).tobytes()]

  def predict(self, text, threshold):
    self.asked.append(list(text))
    self.thresholds.append(threshold)
    found = []
    for phrase in text:
      if self.answers is not None:
        found += [(phrase, *answer) for answer in self.answers.get(phrase, [])]
      else:
        there = [(phrase, 0.9, *shape) for name, *shape in self.objects if name == phrase]
        found += there or [(phrase, 0.2, "box", 0, 0, 4, 4)]
    found = [f for f in found if np.float32(f[1]) > np.float32(threshold)]
    masks = np.array([scenes.mask_of(*f[2:]) for f in found]).reshape(-1, scenes.HEIGHT, scenes.WIDTH)
    boxes = np.array([mask_bounds(m) for m in masks]).reshape(-1, 4)
    return Results(boxes, [f[1] for f in found], masks, [f[0] for f in found], masks.shape[1:])
