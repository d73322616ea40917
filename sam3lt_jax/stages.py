"""What the engine compiles, as pure functions of weights and arrays: the way of images, phrases and clicks.

Axes as in `engine`: R images, P prompts of each, T tokens, S side of the input, D width, M mask tokens, h, w
a mask as the model gives it.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from sam3lt_jax.features import Clicks, Detections, Prompts, TrackerFeatures, VisionFeatures
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.ops.stability import stability
from sam3lt_jax.processing import postprocess
from sam3lt_jax.tracker import Sam3Tracker


def encode(model: Sam3LiteText, with_trunk: bool, variables: Variables, pixels: jax.Array) -> VisionFeatures:
  """Images uint8 [R, S, S, 3]: a quarter of the bytes that float32 would take to the device.

  with_trunk: leave the trunk's map for a tracker that may be asked.
  """
  trunk = _trunk(model, variables, pixels)
  vision = model.apply(variables, trunk, method="read_trunk")
  return vision.replace(trunk=trunk) if with_trunk else vision


def _trunk(model: Sam3LiteText, variables: Variables, pixels: jax.Array) -> jax.Array:
  return model.apply(variables, (pixels.astype(jnp.float32) / 255 - 0.5) / 0.5, method="trunk_map")


def neck(tracker: Sam3Tracker, variables: Variables, trunk: jax.Array) -> TrackerFeatures:
  """The trunk's map [R, h, w, D_trunk] for the tracker."""
  return tracker.apply(variables, trunk, method="get_image_features")


def encode_frames(
  model: Sam3LiteText, tracker: Sam3Tracker, variables: tuple[Variables, Variables], pixels: jax.Array
) -> TrackerFeatures:
  """Images uint8 [R, S, S, 3] for the tracker alone."""
  return neck(tracker, variables[1], _trunk(model, variables[0], pixels))


def read(model: Sam3LiteText, variables: Variables, ids: jax.Array, mask: jax.Array) -> jax.Array:
  """Phrases, ids int32 [P, T] and mask bool [P, T], to their features [P, T, D]."""
  return model.apply(variables, ids, mask, method="get_text_features").pooler_output


def detect(model: Sam3LiteText, variables: Variables, vision: VisionFeatures, prompts: Prompts) -> Detections:
  """P prompts about each of R images; `prompts` and the result have the leading axes [R, P]."""
  lead = prompts.mask.shape[:2]
  spread = lambda m: jnp.broadcast_to(m[:, None], (*lead, *m.shape[1:]))  # noqa: E731
  flat = lambda x: x.reshape(lead[0] * lead[1], *x.shape[2:])  # noqa: E731
  vision, prompts = jax.tree.map(lambda m: flat(spread(m)), vision), jax.tree.map(flat, prompts)
  out = model.apply(variables, vision, prompts, method="detect")
  scores = postprocess.detection_scores(out.pred_logits, out.presence_logits)
  found = Detections(scores, out.pred_boxes, out.pred_masks)
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)


@flax.struct.dataclass
class Clicked:
  """What the tracker says of P prompts about each of R images, by mask token: see `Sam3Tracker.decode`.

  Attributes:
    masks: float32 [R, P, M, h, w] logits. ious: float32 [R, P, M].
    object_score_logits: float32 [R, P]. single: int32 [R, P], which mask answers where one is asked for.
    stability: float32 [R, P, M], see `ops.stability`.
  """

  masks: jax.Array
  ious: jax.Array
  object_score_logits: jax.Array
  single: jax.Array
  stability: jax.Array


def click(
  tracker: Sam3Tracker, variables: Variables, features: TrackerFeatures, clicks: Clicks, offset: jax.Array
) -> Clicked:
  """P prompts about each of R images; `clicks` and the result have the leading axes [R, P].

  offset: float32 [], of the stability that is handed out.
  """
  lead = clicks.valid.shape[:2]
  flat = jax.tree.map(lambda x: x.reshape(lead[0] * lead[1], *x.shape[2:]), clicks)
  decoded = tracker.apply(variables, features, flat, method="decode")
  single = tracker.apply(variables, decoded, method="single")
  stable = stability(decoded.masks, offset)
  found = Clicked(decoded.masks, decoded.ious, decoded.object_score_logits[:, 0], single, stable)
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), found)
