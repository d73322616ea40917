"""What passes from the encoders to the detector, and may be kept for other prompts or other images.

Axes: B images, P prompts, T text tokens, D detector width, h, w rows and columns of a map.
"""

from __future__ import annotations

import flax.struct
import jax


@flax.struct.dataclass
class VisionFeatures:
  """What an image becomes.

  Attributes:
    fpn_hidden_states: three maps [B, h, w, D] of 4, 2 and 1 times the token grid (288, 144, 72 at 1008 px).
  """

  fpn_hidden_states: tuple[jax.Array, ...]


@flax.struct.dataclass
class PreparedFeatures:
  """What the detector computes of an image whatever the prompt, from `Sam3LiteText.prepare`.

  Attributes:
    image: [B, h, w, D], the coarsest map.
    mixed: [B, h, w, D], the same after the self-attention of the fusion encoder's first layer.
    convolved: the finer maps, [B, 4h, 4w, D] and [B, 2h, 2w, D], through the pixel decoder's convolutions.
  """

  image: jax.Array
  mixed: jax.Array
  convolved: tuple[jax.Array, ...]


@flax.struct.dataclass
class TextFeatures:
  """What a phrase becomes. Names follow transformers, whose `pooler_output` is a whole sequence here.

  Attributes:
    last_hidden_state: [P, T, text width] after the text encoder's final LayerNorm.
    pooler_output: [P, T, D] tokens projected to the detector's width; what the detector reads.
    attention_mask: bool [P, T], True for tokens of the phrase.
  """

  last_hidden_state: jax.Array
  pooler_output: jax.Array
  attention_mask: jax.Array
