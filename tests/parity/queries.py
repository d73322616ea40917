"""What our way finds in the reference's order: prompt by prompt, query by query."""

from __future__ import annotations

from typing import Any

import numpy as np

from sam3lt_jax import Predictor
from sam3lt_jax.processing.prompts import prompts_of
from sam3lt_jax.processing.results import Results


def predict(predictor: Predictor, threshold: float, text: Any, boxes: Any = None, box_labels: Any = None):
  """`predictor.predict`, but it puts the best first, and scores that differ by a rounding change places."""
  vision, size, _ = predictor.encoded()
  asked = predictor.engine.asked(None, size, prompts_of(text, boxes, box_labels))
  ((_, (kept,)),) = predictor.engine.run([(None, [asked])], threshold, 0.5, vision=vision)
  labels = [asked.prompts[i].phrase for i in kept.prompt]
  found = Results(kept.boxes, kept.scores, kept.masks(), labels, size)
  return found[np.lexsort((kept.query, kept.prompt))]
