"""Sine codes of positions and boxes, float32.

Source: the sine position embedding of SAM 3 (DETR's), temperature 10000.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.ops import target

TEMPERATURE = 10000.0
TWO_PI = 2.0 * np.pi


def sine_code(x: jax.Array, features: int) -> jax.Array:
  """[...] -> [..., features]: sin and cos alternating, of x divided by powers of the temperature."""
  pair = np.arange(features) // 2
  divisor = (TEMPERATURE ** (2.0 * pair / features)).astype(np.float32)
  angles = x[..., None] / divisor
  return jnp.where(np.arange(features) % 2 == 0, jnp.sin(angles), jnp.cos(angles))


def map_positions(height: int, width: int, features: int) -> jax.Array:
  """Code of every cell of a map: [height, width, features], half for y, then half for x.

  Cell i of n stands at 2 pi (i + 1) / (n + 1e-6).
  """
  y = jnp.arange(1, height + 1, dtype=jnp.float32) / (height + 1e-6) * TWO_PI
  x = jnp.arange(1, width + 1, dtype=jnp.float32) / (width + 1e-6) * TWO_PI
  y, x = sine_code(y, features // 2), sine_code(x, features // 2)
  shape = (height, width, features // 2)
  return jnp.concatenate([jnp.broadcast_to(y[:, None], shape), jnp.broadcast_to(x[None], shape)], axis=-1)


def box_code(boxes: jax.Array, features: int) -> jax.Array:
  """Normalised cxcywh boxes [..., 4] -> [..., 4 * features], in the order y, x, w, h."""
  code = sine_code(boxes * TWO_PI, features)  # [..., 4, features]
  ordered = jnp.take(code, np.array([1, 0, 2, 3]), axis=-2)
  return ordered.reshape(*boxes.shape[:-1], 4 * features)


def centre_code(boxes: jax.Array, features: int) -> jax.Array:
  """Normalised cxcywh boxes [..., 4] -> [..., 2 * features + 2]: code of y, of x, then raw h and w."""
  y, x = (sine_code(boxes[..., i] * TWO_PI, features) for i in (1, 0))
  return jnp.concatenate([y, x, boxes[..., 3:4], boxes[..., 2:3]], axis=-1)


def fourier_code(xy: jax.Array, matrix: jax.Array) -> jax.Array:
  """Places in [0, 1] [..., 2] by a matrix [2, features / 2] -> [..., features]: sines, then cosines.

  Source: Segment Anything's random spatial frequencies.
  """
  x, y = jnp.moveaxis(2.0 * xy - 1.0, -1, 0)[..., None]
  angles = TWO_PI * (x * matrix[0] + y * matrix[1])  # no product of matrices, which TPUs round to bfloat16
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def fourier_map(side: int, matrix: jax.Array) -> jax.Array:
  """The `fourier_code` of the centres of side x side cells: [side, side, features].

  A CPU computes sines of rows and of columns and puts them together by the addition theorems, 12 -> 1 ms of a
  click's 60; in a loop, as XLA would compute them anew for every cell where it can fuse them.
  """
  at = (jnp.arange(side, dtype=jnp.float32) + 0.5) / side
  if not target.current().has_cpu:
    return fourier_code(jnp.stack(jnp.meshgrid(at, at), axis=-1), matrix)
  angles = TWO_PI * (2.0 * at[:, None] - 1.0) * matrix[:, None]  # of x and of y
  (sx, sy), (cx, cy) = jax.lax.map(lambda a: (jnp.sin(a), jnp.cos(a)), angles)
  sy, cy = sy[:, None], cy[:, None]
  return jnp.concatenate([sx * cy + cx * sy, cx * cy - sx * sy], axis=-1)


def frame_code(distance: jax.Array, features: int) -> jax.Array:
  """Distances in time [...] -> [..., features]: sines, then cosines. Source: SAM 2's object pointers."""
  half = features // 2
  divisor = (TEMPERATURE ** (2.0 * (np.arange(half) // 2) / half)).astype(np.float32)
  angles = distance[..., None] / divisor
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
