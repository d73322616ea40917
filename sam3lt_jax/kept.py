"""What was kept of an image's detections, on the host, and its masks on their way there.

Axes: R images, P prompts of each, Q queries, K kept instances, h, w a mask as the
model gives it, H, W the image.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sam3lt_jax.ops.interpolation import interpolation_matrix
from sam3lt_jax.processing import postprocess
from sam3lt_jax.processing.results import PackedMasks, hold_masks
from sam3lt_jax.programs import Program, explain_memory

TILE = 1024  # pixels; full-size masks leave an accelerator in tiles of one compiled shape, a bit a pixel
TOGETHER = 8  # masks a tile

# k -> bool [H, W] of the k-th kept instance; waits for the device. Any thread may call it.
MaskOf = Callable[[int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kept:
  """The instances of one image, highest score first; equal scores by prompt and query.

  Attributes:
    prompt, query: int [K], which of the image's prompts each answers, and the object query that did.
    scores: float32 [K], 0 to 1.
    boxes: float32 [K, 4], (x1, y1, x2, y2) in pixels, within the image.
    size: (height, width) of the image.
    mask: k -> bool [H, W].
  """

  prompt: np.ndarray
  query: np.ndarray
  scores: np.ndarray
  boxes: np.ndarray
  size: tuple[int, int]
  mask: MaskOf

  def __len__(self) -> int:
    return len(self.scores)

  def masks(self) -> np.ndarray | PackedMasks:
    """All of them, for `Results`: bool [K, H, W], or packed."""
    return hold_masks(map(self.mask, range(len(self))), len(self), self.size)

  @classmethod
  def join(cls, parts: Sequence[Kept], size: tuple[int, int]) -> Kept:
    """Of one image, what several calls found, in order; of no call, nothing."""
    places = [(one, k) for one in parts for k in range(len(one))]
    none = {"prompt": np.zeros(0, int), "query": np.zeros(0, int), "scores": np.zeros(0, np.float32)}
    prompt, query, scores, boxes = (
      np.concatenate([empty, *(getattr(one, name) for one in parts)])
      for name, empty in (none | {"boxes": np.zeros((0, 4), np.float32)}).items()
    )
    order = np.lexsort((query, prompt, -scores))

    def mask(k: int) -> np.ndarray:
      one, own = places[order[k]]
      return one.mask(own)

    return cls(prompt[order], query[order], scores[order], boxes[order], size, mask)


class MaskSource:
  """Masks of kept queries, enlarged to their images: on the devices, or with numpy by whoever asks."""

  def __init__(self, mesh: Mesh, on_device: bool, order: postprocess.MaskOrder):
    self._on_device, self._order = on_device, order
    self._enlarge = Program("enlarge", functools.partial(_enlarge, mask_order=order), mesh, None)

    @functools.lru_cache(maxsize=64)
    def matrix(device: jax.Device, inside: int, length: int, start: int) -> jax.Array:
      whole = interpolation_matrix(inside, length, -(-length // TILE) * TILE)
      return jax.device_put(whole[start : start + TILE], device)

    self._matrix = matrix

  def of(
    self,
    masks: jax.Array,
    at: tuple[np.ndarray, np.ndarray, np.ndarray],
    sizes: Sequence[tuple[int, int]],
    mask_threshold: float,
  ) -> list[MaskOf]:
    """masks [R, P, Q, h, w] on the devices, at: (row, slot, query) int [K] each, rows ascending; sizes: of
    the first rows. Returns one function a size.
    """
    row, slot, query = at
    shards = sorted(
      (s for s in masks.addressable_shards if s.replica_id == 0), key=lambda s: s.index[0].start or 0
    )
    own = masks.shape[0] // len(shards)
    found = []
    for i, size in enumerate(sizes):
      mine = np.flatnonzero(row == i)
      local = (np.full(len(mine), i % own), slot[mine], query[mine])
      shard = shards[i // own].data
      found.append((self._tiles if self._on_device else self._copies)(shard, local, size, mask_threshold))
    return found

  def _copies(self, shard: jax.Array, at: tuple, size: tuple[int, int], threshold: float) -> MaskOf:
    logits = np.asarray(shard)[at] if len(at[0]) else ()  # on a CPU a view: copies what is kept
    return lambda k: postprocess.binary_mask(logits[k], size, threshold, self._order)

  def _tiles(self, shard: jax.Array, at: tuple, size: tuple[int, int], threshold: float) -> MaskOf:
    """Starts enlarging; each tile of some masks is on its way to the host as soon as it is there."""
    H, W = size
    h, w = shard.shape[-2:]
    (device,) = shard.devices()
    flat = np.ravel_multi_index(at, shard.shape[:3]).astype(np.int32)
    bound = np.float32(threshold)
    tiles: list[dict[tuple[int, int], jax.Array]] = []
    for start in range(0, len(flat), TOGETHER):
      some = flat[start : start + TOGETHER]
      some = jax.device_put(np.pad(some, (0, TOGETHER - len(some))), device)
      tiles.append({})
      for y in range(0, H, TILE):
        for x in range(0, W, TILE):
          matrices = self._matrix(device, h, H, y), self._matrix(device, w, W, x)
          with explain_memory():
            tile = self._enlarge((), shard, some, *matrices, jax.device_put(bound, device))
          tile.copy_to_host_async()
          tiles[-1][y, x] = tile

    def mask(k: int) -> np.ndarray:
      out = np.empty(size, bool)
      for (y, x), tile in tiles[k // TOGETHER].items():
        part = out[y : y + TILE, x : x + TILE]
        with explain_memory():
          bits = np.asarray(tile)[k % TOGETHER, : part.shape[0]]
        part[...] = np.unpackbits(bits, axis=-1, count=part.shape[1])
      return out

    return mask


def _enlarge(_, masks, at, rows, columns, mask_threshold, mask_order):
  """uint8 [K, tile, tile / 8], bits of the masks at the flat places `at` [K] of [R, P, Q, h, w]."""
  chosen = masks.reshape(-1, *masks.shape[-2:])[at]
  large = postprocess.upsample_and_binarise_masks(chosen, rows, columns, mask_threshold, mask_order)
  return jnp.packbits(large, axis=-1)
