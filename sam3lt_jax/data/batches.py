"""Records to the detector's batches: shuffled, drawn, augmented, stacked; the same for the same (seed, step).

The order and the random numbers are grain's, by position alone: any step can be asked for at any time, which
is what makes a run resume exactly.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence

import numpy as np

from sam3lt_jax.config import Sam3LiteTextConfig
from sam3lt_jax.data.examples import Example, PromptConfig, make_example
from sam3lt_jax.data.records import Record, RecordError
from sam3lt_jax.errors import check, needed
from sam3lt_jax.processing.processor import Sam3Processor

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class BatchConfig(PromptConfig):
  """As `PromptConfig`, and:

  Attributes:
    batch_size: B, images of a batch, over all processes together.
    shuffle: another order each epoch; False, the records' own.
    seed: of the order and of everything drawn.
    mask_side: h = w of the targets' masks. None: the model's own, 4 x its grid of tokens.
  """

  batch_size: int = 8
  shuffle: bool = True
  seed: int = 0
  mask_side: int | None = None

  def __post_init__(self):
    super().__post_init__()
    check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more images")
    check(self.seed >= 0, "seed", self.seed, "0 or more")
    check(self.mask_side is None or self.mask_side >= 1, "mask_side", self.mask_side, "1 or more cells")


class DetectionBatches:
  """Batches by step: `batches[step]` is a dictionary of arrays, for any step from 0 on, without end.

  A batch holds, with B images (of this process), K prompts an image, T tokens, N example boxes, M objects and
  masks of h x w (see `examples.make_example`):
    pixel_values: f32 [B, S, S, 3] in [-1, 1].
    input_ids, attention_mask: i32 [B, K, T].
    input_boxes: f32 [B, K, N, 4] normalised cxcywh; input_boxes_labels: i32 [B, K, N], 1 or -10 (padding).
    target_boxes: f32 [B, K, M, 4] normalised cxcywh; target_masks: u8 [B, K, M, h, w], 0 or 1.
    target_valid, target_has_mask: bool [B, K, M]; prompt_valid, exhaustive: bool [B, K].
    id: i64 [B], of the records.

  A record that cannot be used is counted, logged once, and replaced by the next one of the data set that can.

  Attributes:
    dataset: the `grain.MapDataset` behind it, for its iterators and prefetching.
    skipped: reason to number of records found unusable so far.
    mask_side: h = w.
  """

  def __init__(
    self,
    records: Sequence[Record],
    model_config: Sam3LiteTextConfig,
    config: BatchConfig | None = None,
    *,
    processor: Sam3Processor | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Args:
      records: what to train on.
      model_config: for the image size, the tokens and the masks' side.
      config: see `BatchConfig`.
      processor: default: one for the model's configuration. Its `image_size` is used.
      process_index, process_count: of several hosts; each gets its own B / process_count rows of a batch.

    Raises:
      ValueError: no records, or a batch that the processes do not divide.
      ImportError: grain is not installed.
    """
    config = config or BatchConfig()
    if not len(records):
      raise ValueError("records must hold at least one record, got none")
    check(0 <= process_index < process_count, "process_index", process_index, f"0 to {process_count - 1}")
    good = config.batch_size % process_count == 0
    check(good, "batch_size", config.batch_size, f"a multiple of the {process_count} processes")
    self.config, self._records = config, records
    self._processor = processor or Sam3Processor(model_config)
    self.mask_side = config.mask_side or 4 * (self._processor.image_size // model_config.vision.patch_size)
    self.skipped: dict[str, int] = {}
    self._bad: dict[int, RecordError] = {}
    self._lock = threading.Lock()
    with needed("batches need", "grain", "train"):
      import grain
    order = grain.MapDataset.range(len(records)).seed(config.seed)
    order = order.shuffle() if config.shuffle else order
    # Numbers are drawn by position before the rows are dealt out: a row does not depend on the process count.
    examples = order.repeat(None).random_map(_with_seed)[process_index::process_count].map(self._example)
    self.dataset = examples.batch(config.batch_size // process_count)

  def __getitem__(self, step: int) -> Example:
    """The batch of a step.

    Raises:
      ValueError: a negative step, or no record of the data set can be used.
    """
    if step < 0:
      raise ValueError(f"step must not be negative, got {step}")
    return self.dataset[int(step)]

  def _example(self, element: tuple[int, int]) -> Example:
    start, seed = element
    for offset in range(len(self._records)):
      index = (int(start) + offset) % len(self._records)
      if index in self._bad:
        continue
      try:
        # A generator of its own: what replaces a bad record does not depend on how far that one got.
        rng = np.random.default_rng([seed, offset])
        return make_example(self._records[index], self.config, self._processor, self.mask_side, rng)
      except RecordError as e:
        with self._lock:
          if index in self._bad:
            continue
          self._bad[index] = e
          self.skipped[e.reason] = self.skipped.get(e.reason, 0) + 1
        _log.warning("skipped (%s): %s", e.reason, e)
    example = next(iter(self._bad.values()))
    raise ValueError(f"none of the {len(self._records)} records can be used; for instance {example}")


def _with_seed(index: int, rng: np.random.Generator) -> tuple[int, int]:
  return int(index), int(rng.integers(2**63))
