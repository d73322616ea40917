"""What the detector should have said: the true objects of each prompt, padded to a fixed number of slots.

Axes: B images, K prompts an image, P = B * K prompts, M object slots, h, w rows and columns of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class DetectionTargets:
  """The true objects.

  Attributes:
    boxes: float32 [P, M, 4] normalised cxcywh.
    masks: [P, M, h, w], 0 or 1 in any dtype, of any size that the predicted masks are resized to.
    valid: bool [P, M], the slot holds an object.
    has_mask: bool [P, M], the object's mask is known.
    prompt_valid: bool [P]; a prompt that only pads the batch adds nothing to any loss.
    exhaustive: bool [P], all objects of the prompt are listed; where not, a query without an object is not
      told that it found nothing.
  """

  boxes: jax.Array
  masks: jax.Array
  valid: jax.Array
  has_mask: jax.Array
  prompt_valid: jax.Array
  exhaustive: jax.Array

  @classmethod
  def from_batch(cls, batch: Mapping[str, jax.Array]) -> DetectionTargets:
    """From a batch's `target_boxes`, `target_masks`, ... [B, K, ...], see `sam3lt_jax.data.batches`."""

    def flat(x):
      return x.reshape(-1, *x.shape[2:])

    valid = flat(batch["target_valid"]).astype(bool)
    prompt_valid = flat(batch["prompt_valid"]).astype(bool)
    valid = valid & prompt_valid[:, None]
    return cls(
      boxes=flat(batch["target_boxes"]).astype(jnp.float32),
      masks=flat(batch["target_masks"]),
      valid=valid,
      has_mask=flat(batch["target_has_mask"]).astype(bool) & valid,
      prompt_valid=prompt_valid,
      exhaustive=flat(batch["exhaustive"]).astype(bool),
    )
