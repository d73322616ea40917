"""The model on all local devices: many images at once, each encoded once and asked many questions.

Axes: R images that run together (rows), split evenly over the devices; P questions of each that run together
(a bucket); N boxes; T tokens; Q object queries; h, w a mask as the model gives it; S side of the input.

A row's arithmetic touches no other row, and what pads a batch, a bucket or a list of boxes is masked, so that
results depend neither on neighbours nor on the number of devices. There is no collective over "data".
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sam3lt_jax import parallel
from sam3lt_jax.config import BOX_ONLY_PHRASE
from sam3lt_jax.features import TextFeatures
from sam3lt_jax.predictor import Predictor
from sam3lt_jax.processing import postprocess, prompts
from sam3lt_jax.programs import explain_memory, jit

BUCKETS = (1, 4, 16, 32)  # questions that run together, where there is an accelerator
LARGEST_BATCH = 16  # images a device, when the program's memory decides
MEMORY_SHARE = 0.85  # of the device's, to be planned with
BoxArrays = tuple[np.ndarray, np.ndarray]
_PLACED = 8  # calls' phrases kept on the devices; of large batches of many phrases they take megabytes
_TAKE = (8, 256)  # kept masks fetched at once: rounded up to a power of two within these


@dataclasses.dataclass(frozen=True)
class Call:
  """Questions that run together: `index` int [R, P] into each image's questions, -1 where there is none."""

  index: np.ndarray


class Found:
  """What one call found, with masks that are still on the devices.

  Attributes:
    image, question, query: int [K], of which row, question of it and object query.
    scores: float32 [K]. boxes: float32 [K, 4], (x1, y1, x2, y2) in units of the image's sides.
  """

  def __init__(self, image, question, query, scores, boxes, parts: list[tuple[np.ndarray, Any]]):
    self.image, self.question, self.query = image, question, query
    self.scores, self.boxes = scores, boxes
    self._parts: list[tuple[np.ndarray, Any]] | None = parts
    self._masks: np.ndarray | None = None
    self._lock = threading.Lock()

  def masks(self) -> np.ndarray:
    """Logits float32 [K, h, w]; waits for the devices, once. Any thread may ask."""
    with self._lock:
      if self._masks is None:
        parts = [(at, np.asarray(values)[: len(at)]) for at, values in self._parts]
        shape = parts[0][1].shape[1:] if parts else (1, 1)
        self._masks = np.empty((len(self.scores), *shape), np.float32)
        for at, values in parts:
          self._masks[at] = values
        self._parts = None
      return self._masks


class Forward:
  """Compiled vision encoder and detector over the devices of this process.

  Attributes:
    rows: R, images that run together: `batch` times the devices that batches are split over.
    batch: images a device.
    devices: how many there are.
    compile_s: seconds spent compiling so far, or fetching what was compiled earlier.
  """

  def __init__(
    self,
    predictor: Predictor,
    *,
    batch: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    model_parallel: int = 1,
    pmap: bool = False,
    buckets: Sequence[int] | None = None,
    questions: int = 1,
    on_start: Callable[[float, jax.Array], None] | None = None,
  ):
    """Args:
    predictor: the model, its weights and processor. It encodes the phrases.
    batch: images a device. None: as many, in powers of two up to 16, as fit in 85% of a device's memory by
      the compiled programs' memory analysis; 1 on devices that do not tell their memory, as CPUs.
    devices: None: all of this process.
    model_parallel: devices that share one copy of the weights; 1: a copy on each.
    pmap: run by `jax.pmap` instead of `jax.jit` over a mesh.
    buckets: questions of an image that run together, ascending. None: (1,) on a CPU, where batching gains
      nothing, else (1, 4, 16, 32).
    questions: the most an image will be asked, as far as is known: what memory is planned for.
    on_start: called with the time (`time.perf_counter`) and one of the outputs of each program started.

    Raises:
      ValueError: naming the argument.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    if batch is not None and batch < 1:
      raise ValueError(f"batch must be at least 1, got {batch}")
    if pmap and model_parallel != 1:
      raise ValueError(f"pmap keeps a copy of the weights on each device: model_parallel={model_parallel}")
    if buckets is None:
      buckets = (1,) if devices[0].platform == "cpu" else BUCKETS
    self._buckets = tuple(int(b) for b in buckets)
    if not self._buckets or min(self._buckets) < 1 or list(self._buckets) != sorted(set(self._buckets)):
      raise ValueError(f"buckets must be ascending positive sizes, got {self._buckets}")
    self._predictor, self._model = predictor, predictor.model
    self._pmap, self.devices = pmap, len(devices)
    self._host_views = devices[0].platform == "cpu"
    self.mesh = parallel.make_mesh(model=model_parallel, devices=devices)
    self._ways = self.mesh.shape["data"]
    boxes, labels = predictor.box_arrays(prompts.Prompt([""], [], None), (1, 1))
    self._no_boxes = boxes[0], labels[0]
    self._programs: dict[tuple, Any] = {}
    self._phrases: collections.OrderedDict[tuple, tuple[Any, Any]] = collections.OrderedDict()
    self.compile_s = 0.0
    self._on_start = on_start or (lambda start, output: None)
    self._place_weights(devices)
    self._take = jax.jit(lambda masks, at: masks.reshape(-1, *masks.shape[-2:])[at])
    self.batch = 1
    if batch is None:
      batch = choose_batch(self._memory_needed(questions), _memory_limit(devices))
    self.batch, self.rows = batch, batch * self._ways

  def _place_weights(self, devices: Sequence[jax.Device]) -> None:
    variables = self._predictor.variables
    self._batch_sharding = parallel.batch_sharding(self.mesh)
    if self._pmap:
      self._batch_sharding = NamedSharding(Mesh(np.array(devices), ("data",)), P("data"))
      shardings = self._batch_sharding
      variables = jax.tree.map(
        lambda x: np.broadcast_to(np.asarray(x)[None], (len(devices), *x.shape)), variables
      )
    elif self.mesh.shape["model"] > 1:
      shardings = parallel.fsdp_sharding(self.mesh, variables, "model")
    else:
      shardings = parallel.replicated(self.mesh)
    with explain_memory():
      self._variables = jax.block_until_ready(jax.device_put(variables, shardings))
    self._variable_shardings = jax.tree.map(lambda x: x.sharding, self._variables)

  # ---------------------------------------------------------------- programs

  def _encode(self, variables, pixels):
    """pixels uint8 [R, S, S, 3] -> maps [R, h, w, D]. Bytes travel to the device, a quarter of float32."""
    pixels = (pixels.astype(jnp.float32) / 255 - 0.5) / 0.5
    return self._model.apply(variables, pixels, method="get_vision_features")

  def _detect(self, variables, maps, tokens, mask, boxes, labels):
    """tokens [R, P, T, D], mask [R, P, T], boxes [R, P, N, 4], labels [R, P, N] -> logits [R, P, Q], presence
    [R, P, 1], boxes [R, P, Q, 4], masks [R, P, Q, h, w]."""
    lead = tokens.shape[:2]
    flat = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731
    spread = lambda m: flat(jnp.broadcast_to(m[:, None], (*lead, *m.shape[1:])))  # noqa: E731
    out = self._model.apply(
      variables,
      vision_embeds=jax.tree.map(spread, maps),
      text_embeds=TextFeatures(flat(tokens), flat(tokens), flat(mask)),
      input_boxes=flat(boxes),
      input_boxes_labels=flat(labels),
    )
    found = (out.pred_logits, out.presence_logits, out.pred_boxes, out.pred_masks)
    return tuple(x.reshape(*lead, *x.shape[1:]) for x in found)

  def _program(self, name: str, *arguments) -> Any:
    """Compiled for the arguments' shapes (arrays or `jax.ShapeDtypeStruct`s)."""
    leaves, structure = jax.tree.flatten(arguments)
    key = (name, structure, *((x.shape, np.dtype(x.dtype)) for x in leaves))
    if key not in self._programs:
      function = {"encode": self._encode, "detect": self._detect}[name]
      start = time.perf_counter()
      if self._pmap:
        lazy = jax.pmap(function, axis_name="data", devices=list(self.mesh.devices.flat))
      else:
        split = (self._batch_sharding,) * len(arguments)
        lazy = jit(
          function, in_shardings=(self._variable_shardings, *split), out_shardings=self._batch_sharding
        )
      with explain_memory():
        self._programs[key] = lazy.lower(self._variables, *arguments).compile()
      self.compile_s += time.perf_counter() - start
    return self._programs[key]

  def _run(self, name: str, *arguments):
    program = self._program(name, *arguments)
    start = time.perf_counter()
    with explain_memory():
      out = program(self._variables, *arguments)
    self._on_start(start, min(jax.tree.leaves(out), key=lambda x: x.size))
    return out

  def _place(self, array: np.ndarray):
    """[R, ...] split over the devices; for pmap [devices, R / devices, ...]."""
    if self._pmap:
      array = array.reshape(self._ways, -1, *array.shape[1:])
    return jax.device_put(array, self._batch_sharding)

  def hlo(self) -> list[str]:
    """The optimised programs compiled so far, to see what they do."""
    return [program.as_text() for program in self._programs.values()]

  # ---------------------------------------------------------------- calls

  def encode(self, pixels: Sequence[np.ndarray]) -> Any:
    """Starts encoding 1 to R images, uint8 [S, S, 3] each; returns their maps, on the devices."""
    rows = np.stack([*pixels, *[np.zeros_like(pixels[0])] * (self.rows - len(pixels))])
    return self._run("encode", self._place(rows))

  def box_arrays(self, question: Any, size: tuple[int, int]) -> BoxArrays:
    """Boxes float32 [N, 4] and labels int32 [N] of a question about an image of `size`, N one of the buckets.

    Raises:
      ValueError: a box that is inverted or not finite.
    """
    if not question.boxes:
      return self._no_boxes
    given = prompts.Prompt([""], [list(box) for box in question.boxes], list(question.labels))
    boxes, labels = self._predictor.box_arrays(given, size)
    return boxes[0], labels[0]

  def calls(self, arrays: Sequence[Sequence[BoxArrays]]) -> list[Call]:
    """How the questions of up to R images, given as their `box_arrays`, are asked in few calls.

    Questions with different numbers of boxes (by bucket) run apart, so that an image's results do not depend
    on how many boxes another image brings.
    """
    by_boxes: dict[int, list[list[int]]] = {}
    for row, asked in enumerate(arrays):
      for i, (_, labels) in enumerate(asked):
        by_boxes.setdefault(len(labels), [[] for _ in arrays])[row].append(i)
    calls = []
    for _, slots in sorted(by_boxes.items()):
      start, most = 0, max(map(len, slots))
      while start < most:
        bucket = next((b for b in self._buckets if b >= most - start), self._buckets[-1])
        index = np.full((self.rows, bucket), -1)
        for row, asked in enumerate(slots):
          chunk = asked[start : start + bucket]
          index[row, : len(chunk)] = chunk
        calls.append(Call(index))
        start += bucket
    return calls

  def detect(
    self, maps: Any, call: Call, questions: Sequence[Sequence[Any]], arrays: Sequence[Sequence[BoxArrays]]
  ) -> Any:
    """Starts one call.

    Args:
      maps: of `encode`, of the same images.
      call: of `calls(arrays)`.
      questions: of each image.
      arrays: their `box_arrays`.

    Returns:
      The raw outputs, on the devices, for `kept`.
    """
    row, slot = (int(at[0]) for at in np.nonzero(call.index >= 0))
    some = row, call.index[row, slot]  # stands where there is no question
    at = [[(row, i) if i >= 0 else some for i in line] for row, line in enumerate(call.index)]
    phrases = tuple(tuple(questions[row][i].text or BOX_ONLY_PHRASE for row, i in line) for line in at)
    tokens, mask = self._placed_phrases(phrases)
    boxes, labels = (
      np.stack([np.stack([arrays[row][i][part] for row, i in line]) for line in at]) for part in (0, 1)
    )
    return self._run("detect", maps, tokens, mask, self._place(boxes), self._place(labels))

  def _placed_phrases(self, phrases: tuple[tuple[str, ...], ...]) -> tuple[Any, Any]:
    """Features [R, P, T, D] and mask of phrases, on the devices; each phrase is encoded once."""
    if phrases not in self._phrases:
      unique = list(dict.fromkeys(phrase for row in phrases for phrase in row))
      features, mask = self._predictor.text_features(unique)
      where = {phrase: i for i, phrase in enumerate(unique)}
      at = np.array([[where[phrase] for phrase in row] for row in phrases])
      self._phrases[phrases] = self._place(features[at]), self._place(mask[at])
    self._phrases.move_to_end(phrases)
    while len(self._phrases) > _PLACED:
      self._phrases.popitem(last=False)
    return self._phrases[phrases]

  def kept(self, raw: Any, call: Call, threshold: float) -> Found:
    """Waits for a call's scores and starts fetching the masks of those above `threshold`, and only those."""
    logits, presence, boxes, masks = raw
    with explain_memory():
      shaped = lambda x, n: np.asarray(x).reshape(*call.index.shape, *x.shape[-n:])  # noqa: E731
      logits, presence, boxes = shaped(logits, 1), shaped(presence, 1), shaped(boxes, 2)
    scores = postprocess.detection_scores(logits, presence)
    row, slot, query = np.nonzero((scores > threshold) & (call.index >= 0)[..., None])
    return Found(
      row, call.index[row, slot], query, scores[row, slot, query], boxes[row, slot, query],
      self._masks_of(masks, scores.shape, row, slot, query),
    )  # fmt: skip

  def _masks_of(self, masks, shape, row, slot, query) -> list[tuple[np.ndarray, Any]]:
    """[(which of the kept, their masks on the device)]: each device gathers its own."""
    R, slots, Q = shape
    own = R // self._ways
    shards = [s for s in masks.addressable_shards if s.replica_id == 0]
    parts = []
    for i, shard in enumerate(sorted(shards, key=lambda s: s.index[0].start or 0)):
      at = np.flatnonzero(row // own == i)
      local = ((row[at] - i * own) * slots + slot[at]) * Q + query[at]
      if len(at) and self._host_views:  # of the device's memory: copies what is kept
        parts.append((at, np.asarray(shard.data).reshape(-1, *masks.shape[-2:])[local]))
        continue
      for start in range(0, len(at), _TAKE[1]):
        some = local[start : start + _TAKE[1]]
        size = max(_TAKE[0], 1 << (len(some) - 1).bit_length())
        padded = np.zeros(size, np.int32)
        padded[: len(some)] = some
        taken = self._take(shard.data, jax.device_put(padded, shard.device))
        taken.copy_to_host_async()
        parts.append((at[start : start + _TAKE[1]], taken))
    return parts

  # ---------------------------------------------------------------- memory

  def _memory_needed(self, questions: int):
    """batch -> bytes a device, of this batch's programs, weights and what the pipeline holds."""
    config = self._model.config
    side, width = self._predictor.processor.image_size, config.detr_encoder.hidden_size
    bucket = next((b for b in self._buckets if b >= questions), self._buckets[-1])

    copies = 2 if self._pmap else 1  # beside the stacked one the predictor's own
    weights = copies * sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(self._variables))

    def needed(batch: int) -> float:
      lead = (self._ways, batch) if self._pmap else (batch * self._ways,)

      def shape(*rest, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((*lead, *rest), dtype, sharding=self._batch_sharding)

      try:
        encode = self._program("encode", shape(side, side, 3, dtype=jnp.uint8))
        features, _ = self._predictor.text_features(["a"])
        tokens, boxes = features.shape[1], len(self._no_boxes[1])
        detect = self._program(
          "detect",
          jax.tree.map(lambda m: shape(*m.shape[len(lead) :], dtype=m.dtype), encode.out_info),
          shape(bucket, tokens, width, dtype=features.dtype),
          shape(bucket, tokens, dtype=jnp.bool_),
          shape(bucket, boxes, 4),
          shape(bucket, boxes, dtype=jnp.int32),
        )
      except MemoryError:
        return float("inf")
      e, d = encode.memory_analysis(), detect.memory_analysis()
      vision, raw = e.output_size_in_bytes, d.output_size_in_bytes
      # While one runs, the outputs of the call before and the next images' maps and pixels are there as well.
      # The weights are counted here: a program's analysis leaves out those that it does not use.
      pixels = 2 * batch * side * side * 3
      return weights + pixels + max(e.temp_size_in_bytes, d.temp_size_in_bytes) + 2 * vision + 2 * raw

    return needed


def _memory_limit(devices: Sequence[jax.Device]) -> float | None:
  """Bytes of the smallest device that a job may plan with; None where devices do not tell."""
  limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
  return MEMORY_SHARE * min(limits) if all(limits) else None


def choose_batch(needed, limit: float | None, most: int = LARGEST_BATCH) -> int:
  """The largest power of two up to `most` whose memory, `needed(batch)` in bytes, is within `limit`.

  It is estimated from a batch of one and of two, then checked on the program itself. None: 1, and nothing is
  compiled for it.
  """
  if limit is None:
    return 1
  one, two = needed(1), needed(2)
  if two > limit:
    return 1
  grows = max(two - one, 1.0)
  batch = 2
  while batch < most and one + grows * (2 * batch - 1) <= limit:
    batch *= 2
  while batch > 2 and needed(batch) > limit:
    batch //= 2
  return batch
