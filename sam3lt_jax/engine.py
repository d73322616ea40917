"""The engine: compiled programs over a set of devices, the same for one photo and for a million.

    images uint8 -> encode -> `VisionFeatures` on the devices
    phrases      -> read   -> rows of a table on the devices
    both         -> detect -> `Detections` on the devices
    images and clicks -> click -> `Clicked` on the devices, where there is a tracker
    of which     -> keep   -> scores and boxes on the host, the masks of what is kept on their way there

`Predictor` is this with few rows, a batch job with many.

Axes: R images that run together (rows), split evenly over the devices; P prompts of each that run
together; N boxes; T tokens; Q object queries; S side of the input; h, w a mask as the model gives it;
H, W the image.

A row's arithmetic touches no other row, and what pads rows, prompts or boxes is masked, so that results
depend neither on neighbours nor on the number of devices. No device reads another's rows.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sam3lt_jax import parallel
from sam3lt_jax.config import BOX_ONLY_PHRASE
from sam3lt_jax.errors import ArgumentError
from sam3lt_jax.features import Clicks, Detections, Prompts, TrackerFeatures, VisionFeatures
from sam3lt_jax.kept import Kept, MaskSource
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.phrase_table import PhraseTable
from sam3lt_jax.processing import postprocess
from sam3lt_jax.processing.clicks import ClickArrays
from sam3lt_jax.processing.processor import Sam3Processor
from sam3lt_jax.processing.prompts import Prompt, box_arrays
from sam3lt_jax.programs import Ahead, Program, explain_memory
from sam3lt_jax.stages import Clicked, click, detect, encode, encode_frames, neck, read
from sam3lt_jax.tracker import Sam3Tracker

# One rule for what runs together: the smallest of these that holds what there is, the last over and over.
IMAGE_BUCKETS = (1, 8)  # images a device, where there is an accelerator
PROMPT_BUCKETS = (1, 2, 4, 8, 16)  # prompts of an image, likewise
BOX_BUCKETS = (8, 32, 128)  # example boxes of a prompt
PHRASE_BATCHES = (8, 64)  # phrases that are encoded at once
CLICK_BUCKETS = (1, 8, 64)  # objects of an image that are asked for by clicks, likewise
POINT_BUCKETS = (4, 16, 64)  # points of an object
MOST_PROMPTS = 32  # prompts a device at once, of all its images; each takes some 0.2 GB at 1008 px
MEMORY_SHARE = 0.85  # of a device's, to be planned with

Tag = TypeVar("Tag")


@dataclasses.dataclass
class Asked:
  """An image and what is asked of it.

  Attributes:
    pixels: uint8 [S, S, 3]; given up once they are on the device.
    size: (height, width) of the image as it was.
    prompts: what is sought, in the order of the results.
    boxes: of each prompt (boxes float32 [N, 4], labels int32 [N]), see `Engine.box_arrays`.
  """

  pixels: np.ndarray | None
  size: tuple[int, int]
  prompts: Sequence[Prompt]
  boxes: Sequence[tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Call:
  """Prompts that run together: `index` int [R, P] into each image's prompts, -1 where there is none."""

  index: np.ndarray
  phrases: list[list[str]]  # [R][P]
  boxes: np.ndarray
  labels: np.ndarray


class Engine:
  """A model's compiled programs and its weights on a set of devices.

  Attributes:
    image_buckets: images a device that run together, ascending.
    ways: devices (or groups of `model_parallel` of them) that images are split over.
    on_start: called with the time (`time.perf_counter`) and one output of each program that is started on
      images, for whoever keeps time; None: nobody does.
  """

  def __init__(
    self,
    model: Sam3LiteText,
    variables: Variables,
    processor: Sam3Processor,
    *,
    devices: Sequence[jax.Device] | None = None,
    model_parallel: int = 1,
    image_buckets: Sequence[int] | None = None,
    prompt_buckets: Sequence[int] | None = None,
    box_buckets: Sequence[int] = BOX_BUCKETS,
    masks_on_device: bool | None = None,
    tracker: tuple[Sam3Tracker, Variables] | None = None,
  ):
    """Args:
    variables: arrays, or `jax.ShapeDtypeStruct`s to compile with until `use_variables` brings them.
    devices: None: JAX's default one.
    model_parallel: devices that share one copy of the weights; 1: a copy on each.
    image_buckets: images a device that run together, ascending. None: (1, 8), and (1,) on a CPU, where
      batching gains nothing.
    prompt_buckets: prompts of an image that run together, ascending. None: (1, 2, 4, 8, 16), and (1,) on a
      CPU. At most 32 prompts of all its images run on a device at once.
    box_buckets: boxes that a prompt is padded to, ascending.
    masks_on_device: enlarge masks with jax (True) or with numpy on the host (False). None: True where there
      is an accelerator.
    tracker: and its variables, like `variables`: images are then encoded for it as well.

    Raises:
      ValueError: naming the argument.
    """
    devices = [jnp.zeros(()).device] if devices is None else list(devices)
    if not devices or not all(isinstance(device, jax.Device) for device in devices):
      raise ArgumentError("devices", f" must be a list of at least one jax.Device, got {devices}")
    on_cpu = devices[0].platform == "cpu"
    if image_buckets is None:
      image_buckets = (1,) if on_cpu else IMAGE_BUCKETS
    if prompt_buckets is None:
      prompt_buckets = (1,) if on_cpu else PROMPT_BUCKETS
    self.image_buckets = _ascending("image_buckets", image_buckets)
    self._prompt_buckets = _ascending("prompt_buckets", prompt_buckets)
    self._box_buckets = _ascending("box_buckets", box_buckets)
    self._click_buckets = CLICK_BUCKETS[: 2 if on_cpu else None]
    masks_on_device = not on_cpu if masks_on_device is None else masks_on_device
    self.model, self.processor = model, processor
    self.mesh = mesh = parallel.make_mesh(model=model_parallel, devices=devices)
    self.ways, self._on_cpu = mesh.shape["data"], on_cpu
    self._split, everywhere = parallel.batch_sharding(mesh), parallel.replicated(mesh)
    self.on_start: Callable[[float, jax.Array], None] | None = None

    self._programs: list[Program] = []
    program = functools.partial(self.program, dtype=model.dtype)
    self.tracker, self.tracker_variables = tracker or (None, None)
    if tracker is not None:
      v, leaf = model.config.vision, tracker[1]["params"]["neck"]["fpn_layers_2"]["proj1"]
      width, patch = leaf["kernel"].shape[2], self.tracker.config.patch_size
      if (width, patch) != (v.hidden_size, v.patch_size):
        raise ArgumentError(
          "tracker",
          f" must be for this model's trunk ({v.hidden_size} wide, patches of {v.patch_size} pixels), got one"
          f" for {width} and {patch}",
        )
    self._encode = program(encode, self._split, model, tracker is not None)
    self._detect, self._read = program(detect, self._split, model), program(read, everywhere, model)
    if tracker is not None:
      self._neck, self._click = (program(f, self._split, self.tracker) for f in (neck, click))
      self._encode_frames = program(encode_frames, self._split, model, self.tracker)
    self.phrases = PhraseTable(self._read, processor, mesh, PHRASE_BATCHES[: 1 if on_cpu else None])
    self._masks = MaskSource(mesh, masks_on_device, processor.profile.mask_order)
    # Both references enlarge a tracker's logits.
    self.click_masks = MaskSource(mesh, masks_on_device, "upsample_then_sigmoid")
    self._ahead = Ahead()
    self.use_variables(variables)
    if tracker is not None:
      self.use_tracker_variables(self.tracker_variables)

  def program(
    self,
    function: Callable,
    out: NamedSharding,
    *models: Any,
    name: str | None = None,
    **options: Any,
  ) -> Program:
    """A program of this engine's devices, which counts among its `programs`.

    Args:
      function: of (*models, constants, *arguments); the program takes what follows the models.
      out: where results lie.
      name: None: the function's.
      options: see `Program`.
    """
    partial = functools.partial(function, *models)
    made = Program(name or function.__name__, partial, self.mesh, out, **options)
    self._programs.append(made)
    return made

  def use_variables(self, variables: Variables) -> None:
    """Other weights of the same shapes, as after a training step; nothing is compiled anew."""
    self.variables = self._weights(variables)
    self.phrases.forget()

  def use_tracker_variables(self, variables: Variables) -> None:
    """The same for the tracker."""
    self.tracker_variables = self._weights(variables)

  def _weights(self, variables: Variables) -> Variables:
    where = parallel.fsdp_sharding(self.mesh, variables, "model")
    with explain_memory():
      return jax.tree.map(_placed, variables, where)

  @property
  def devices(self) -> list[jax.Device]:
    return list(self.mesh.devices.flat)

  @property
  def rows(self) -> int:
    """R when there are many images."""
    return self.image_buckets[-1] * self.ways

  def _rows(self, images: int) -> int:
    return self.ways * _bucket(-(-images // self.ways), self.image_buckets)

  @property
  def waited_s(self) -> float:
    """Seconds that calls have waited for compilation."""
    return sum(p.waited_s for p in self._programs)

  def programs(self) -> dict[str, list[jax.stages.Compiled]]:
    """What is compiled by now, by name."""
    return {p.name: p.compiled() for p in self._programs}

  # ---------------------------------------------------------------- ahead of the first call

  def compile_ahead(self, images: int = 1, prompts: int = 1) -> None:
    """Compiles in the background what so many images with so many phrases each will need."""
    pixels, vision, asked = self._shapes(self._rows(images), prompts)
    self._ahead.compile(self._read, self.variables, *self.phrases.inputs([BOX_ONLY_PHRASE]))
    self._ahead.compile(self._detect, self.variables, vision, asked)
    self._ahead.compile(self._encode, self.variables, pixels)
    if self.tracker is not None:
      features, clicks, offset = self._click_shapes(pixels.shape[0])
      grid, D = features.image.shape[1], self.model.config.vision.hidden_size
      trunk = jax.ShapeDtypeStruct((pixels.shape[0], grid, grid, D), self.model.dtype)
      self._ahead.compile(self._neck, self.tracker_variables, _placed(trunk, self._split))
      self._ahead.compile(self._click, self.tracker_variables, features, clicks, offset)

  def _click_shapes(self, R: int) -> tuple[TrackerFeatures, Clicks, jax.ShapeDtypeStruct]:
    """Arguments of `click` for one object and few points about each of R images; nothing is traced."""
    grid, D = self.processor.image_size // self.tracker.config.patch_size, self.tracker.config.hidden_size
    P, N = self._click_buckets[0], POINT_BUCKETS[0]

    def shape(*axes: int, dtype: Any = self.tracker.dtype) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((R, *axes), dtype, sharding=self._split)

    fine = shape(grid, grid, 16, D // 8), shape(grid, grid, 4, D // 4)
    clicks = Clicks(
      shape(P, N, 2, dtype=np.float32), shape(P, N, dtype=np.int32), shape(P, N, dtype=bool)
    )  # fmt: skip
    offset = jax.ShapeDtypeStruct((), np.float32, sharding=parallel.replicated(self.mesh))
    return TrackerFeatures(shape(grid, grid, D), fine), clicks, offset

  def _shapes(self, R: int, prompts: int) -> tuple[Any, VisionFeatures, Prompts]:
    """Arguments of `encode` and `detect` for R images, so many prompts and no boxes; nothing is traced."""
    config, side, dtype = self.model.config, self.processor.image_size, self.model.dtype
    grid, D = side // config.vision.patch_size, config.detr_encoder.hidden_size
    P, T = _bucket(prompts, self._buckets_for(R)), config.profile.context_length
    boxes, labels = self.box_arrays(Prompt(BOX_ONLY_PHRASE), (side, side))

    def shape(*axes: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct((R, *axes), dtype, sharding=self._split)

    coarse = shape(grid, grid, D)
    without_boxes = shape(1, D) if config.profile.geometry_cls == "always" else None
    finer = tuple(shape(n * grid, n * grid, D) for n in (4, 2))
    vision = VisionFeatures(coarse, coarse, finer, without_boxes=without_boxes)
    asked = Prompts(
      shape(P, T, D), shape(P, T, dtype=bool),
      shape(P, *boxes.shape, dtype=boxes.dtype), shape(P, *labels.shape, dtype=labels.dtype),
    )  # fmt: skip
    return shape(side, side, config.vision.num_channels, dtype=np.uint8), vision, asked

  def fit_memory(self, prompts: int) -> None:
    """Halves the images a device until their compiled programs fit its memory, where devices tell it.

    prompts: of each image, as far as is known. What is compiled for this is what then runs.
    """
    limits = [(d.memory_stats() or {}).get("bytes_limit") for d in self.devices]
    while all(limits) and self.rows > self.ways:
      if self.memory_needed(prompts) <= MEMORY_SHARE * min(limits):
        break
      self.image_buckets = (self.image_buckets[-1] // 2,)

  def memory_needed(self, prompts: int) -> float:
    """Bytes a device of the programs for `rows` images, the weights, and what waits beside them."""
    pixels, vision, asked = self._shapes(self.rows, prompts)
    self._ahead.compile(self._detect, self.variables, vision, asked)  # both at the same time
    try:
      e = self._encode.compile(self.variables, pixels).memory_analysis()
      d = self._detect.compile(self.variables, vision, asked).memory_analysis()
    except jax.errors.JaxRuntimeError:  # not even a plan of it fits
      return float("inf")
    # While one runs, the outputs of the call before and the next images' features are there as well. The
    # weights are counted here: a program's analysis leaves out those that it does not use.
    weights = sum(map(_bytes_here, jax.tree.leaves((self.variables, self.tracker_variables))))
    held = 2 * (e.output_size_in_bytes + d.output_size_in_bytes) + 2 * _bytes_here(pixels)
    return weights + held + max(e.temp_size_in_bytes, d.temp_size_in_bytes)

  # ---------------------------------------------------------------- images and prompts

  def box_arrays(self, prompt: Prompt, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [N, 4] normalised cxcywh and labels int32 [N] of a prompt about an image of `size`
    (height, width); N is one of the buckets, 0 without boxes.

    Raises:
      ValueError: a box or label that cannot be meant.
    """
    count, most = len(prompt.boxes), self._box_buckets[-1]
    # None for none: what the geometry encoder says then is among the image's features.
    slots = _bucket(count, (0, *self._box_buckets)) if count <= most else -(-count // most) * most
    return box_arrays(prompt, size, slots)

  def asked(self, pixels: np.ndarray | None, size: tuple[int, int], prompts: Sequence[Prompt]) -> Asked:
    """An image with its prompts, checked.

    Raises:
      ValueError: a box or label that cannot be meant, a phrase that the model cannot know.
    """
    self.processor.check_phrases(prompt.text for prompt in prompts if prompt.text)
    boxes: list[tuple[np.ndarray, np.ndarray]] = []
    for i, prompt in enumerate(prompts):
      same = i and prompt.boxes is prompts[i - 1].boxes and prompt.labels is prompts[i - 1].labels
      boxes.append(boxes[-1] if same else self.box_arrays(prompt, size))
    return Asked(pixels, size, prompts, boxes)

  def encode(self, pixels: Sequence[np.ndarray], clicks: bool = True) -> VisionFeatures:
    """Starts encoding 1 to `rows` images, uint8 [S, S, 3] each; their features, on the devices, have as
    many rows as the bucket that holds them.

    clicks: for the tracker as well, where there is one.
    """
    vision = self._run(self._encode, self.variables, self._pixels(pixels))
    if self.tracker is None:
      return vision
    with explain_memory():
      found = self._neck(self.tracker_variables, vision.trunk) if clicks else None
    return vision.replace(tracker=found, trunk=None)

  def encode_frames(self, pixels: Sequence[np.ndarray]) -> TrackerFeatures:
    """The same for the tracker alone, as when objects are followed that nobody seeks by phrase."""
    variables = self.variables, self.tracker_variables
    return self._run(self._encode_frames, variables, self._pixels(pixels))

  def _pixels(self, pixels: Sequence[np.ndarray]) -> jax.Array:
    if self._on_cpu:
      # No image is encoded before all is compiled: on a CPU of 2 cores both at once end no sooner, and take
      # 4% more memory at their peak (S0, float32; `python -m tests.benchmarks.compare --parts memory start`).
      self._ahead.wait()
    padding = [np.zeros_like(pixels[0])] * (self._rows(len(pixels)) - len(pixels))
    return jax.device_put(np.stack([*pixels, *padding]), self._split)

  def calls(self, asked: Sequence[Asked]) -> list[Call]:
    """How the prompts of up to R images are asked in few calls.

    Prompts with different numbers of boxes (by bucket) run apart, so that an image's results do not depend on
    how many boxes another image brings.
    """
    rows = self._rows(len(asked))
    buckets = self._buckets_for(rows)
    by_boxes: dict[int, list[list[int]]] = {}
    for row, one in enumerate(asked):
      for i, (_, labels) in enumerate(one.boxes):
        by_boxes.setdefault(len(labels), [[] for _ in asked])[row].append(i)
    calls = []
    for _, slots in sorted(by_boxes.items()):
      start, most = 0, max(map(len, slots))
      while start < most:
        bucket = _bucket(most - start, buckets)
        index = np.full((rows, bucket), -1)
        for row, mine in enumerate(slots):
          chunk = mine[start : start + bucket]
          index[row, : len(chunk)] = chunk
        calls.append(_call(index, asked))
        start += bucket
    return calls

  def _buckets_for(self, rows: int) -> tuple[int, ...]:
    """Those that keep a device within `MOST_PROMPTS`; one prompt an image goes always."""
    most = MOST_PROMPTS // (rows // self.ways)
    return tuple(b for b in self._prompt_buckets if b <= most) or self._prompt_buckets[:1]

  def detect(self, vision: VisionFeatures, call: Call) -> Detections:
    """Starts one call on the features of `encode`, of the same images."""
    tokens, mask = self.phrases.tokens(self.variables, call.phrases)
    prompts = Prompts(tokens, mask, *jax.device_put((call.boxes, call.labels), self._split))
    return self._run(self._detect, self.variables, vision.replace(tracker=None, trunk=None), prompts)

  def click(
    self, vision: VisionFeatures, clicks: ClickArrays, offset: float = 1.0
  ) -> Iterator[tuple[int, Clicked]]:
    """Starts prompts about the first image of `vision`, some at a time.

    Args:
      vision: of `encode`.
      clicks: of `processing.clicks.clicks_of`, one row an object.
      offset: of the stability that is handed out.

    Yields:
      (how many of the prompts, in order, and their answers in row 0; rows and slots beyond are padding).
    """
    P, N = clicks.valid.shape
    slots = _bucket(N, POINT_BUCKETS)
    slots = max(slots, -(-N // slots) * slots)
    rows = vision.image.shape[0]
    padded = jax.tree.map(
      lambda x: np.pad(x, ((0, 0), (0, slots - N), (0, 0))[: x.ndim]),
      {"points": clicks.points, "labels": clicks.labels, "valid": clicks.valid},
    )
    if clicks.masks is not None:
      padded |= {"masks": clicks.masks, "has_mask": clicks.has_mask}
    start = 0
    while start < P:
      count = _bucket(P - start, self._click_buckets)
      some = {name: x[start : start + count] for name, x in padded.items()}
      own = len(some["valid"])

      rest = (0, rows - 1), (0, count - own)
      filled = {n: np.pad(x[None], (*rest, *[(0, 0)] * (x.ndim - 1))) for n, x in some.items()}
      asked = Clicks(**jax.device_put(filled, self._split))
      bound = jax.device_put(np.float32(offset), parallel.replicated(self.mesh))
      yield own, self._run(self._click, self.tracker_variables, vision.tracker, asked, bound)
      start += own

  def keep(
    self,
    found: Detections,
    call: Call,
    sizes: Sequence[tuple[int, int]],
    threshold: float,
    mask_threshold: float,
  ) -> list[Kept]:
    """Waits for a call's scores, and starts fetching the masks of those above `threshold`, and only those.

    Args:
      sizes: (height, width) of each image.
      threshold: scores above it are kept. mask_threshold: see `postprocess.binary_masks`.

    Returns:
      One `Kept` an image, for `Kept.join` to put in order.
    """
    with explain_memory():
      scores, boxes = jax.device_get((found.scores, found.boxes))
    row, slot, query = np.nonzero((scores > threshold) & (call.index >= 0)[..., None])
    masks = self._masks.of(found.masks, (row, slot, query), sizes, mask_threshold)
    kept = []
    for i, size in enumerate(sizes):
      mine = np.flatnonzero(row == i)
      at = row[mine], slot[mine], query[mine]
      pixels = postprocess.clip_boxes(postprocess.scale_boxes(boxes[at], size), size)
      kept.append(Kept(call.index[at[:2]], query[mine], scores[at], pixels, size, masks[i]))
    return kept

  def run(
    self,
    batches: Iterable[tuple[Tag, Sequence[Asked]]],
    threshold: float,
    mask_threshold: float,
    vision: VisionFeatures | None = None,
  ) -> Iterator[tuple[Tag, list[Kept]]]:
    """(tag, up to `rows` images) in; (tag, one `Kept` an image) out, in order.

    The devices have the next call in hand while the last one's results are fetched. A batch without images
    passes through in its place. vision: of the images, where they are encoded already.
    """
    pending: tuple | None = None  # the call that the devices have

    def finish() -> Iterator[tuple[Tag, list[Kept]]]:
      if pending is None:
        return
      tag, asked, parts, call, found, last = pending
      kept = self.keep(found, call, [one.size for one in asked], threshold, mask_threshold)
      for mine, one in zip(parts, kept):
        mine.append(one)
      if last:
        yield tag, [Kept.join(mine, one.size) for mine, one in zip(parts, asked)]

    for tag, asked in batches:
      features = self.encode([a.pixels for a in asked], clicks=False) if asked and vision is None else vision
      for one in asked:
        one.pixels = None  # 3 MB each, and no longer needed
      self.phrases.add(self.variables, [p.phrase for one in asked for p in one.prompts])
      calls = self.calls(asked)
      parts: list[list[Kept]] = [[] for _ in asked]
      for i, call in enumerate(calls):
        found = self.detect(features, call)
        yield from finish()
        pending = tag, asked, parts, call, found, i == len(calls) - 1
      if not calls:
        yield from finish()
        pending = None
        yield tag, [Kept.join([], one.size) for one in asked]
    yield from finish()

  def _run(self, program: Program, weights: Any, *arguments: Any) -> Any:
    start = time.perf_counter()
    with explain_memory():
      out = program(weights, *arguments)
    if self.on_start is not None:
      self.on_start(start, min(jax.tree.leaves(out), key=lambda x: x.size))
    return out


def _call(index: np.ndarray, asked: Sequence[Asked]) -> Call:
  row, slot = (int(at[0]) for at in np.nonzero(index >= 0))
  some = row, index[row, slot]  # stands where there is no prompt
  at = [[(row, i) if i >= 0 else some for i in line] for row, line in enumerate(index)]
  boxes, labels = (
    np.stack([np.stack([asked[row].boxes[i][part] for row, i in line]) for line in at]) for part in (0, 1)
  )
  return Call(index, [[asked[row].prompts[i].phrase for row, i in line] for line in at], boxes, labels)


def _bucket(count: int, sizes: Sequence[int]) -> int:
  """The smallest of `sizes` that holds `count`, or the largest."""
  return next((size for size in sizes if size >= count), sizes[-1])


def _ascending(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
  sizes = tuple(int(s) for s in sizes)
  if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
    raise ArgumentError(name, f" must be ascending positive sizes, got {sizes}")
  return sizes


def _placed(leaf: Any, where: NamedSharding) -> Any:
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
  return jax.device_put(leaf, where)


def _bytes_here(x: Any) -> int:
  """Of an array or a shape with its sharding, the bytes on one device."""
  return int(np.prod(x.sharding.shard_shape(x.shape))) * np.dtype(x.dtype).itemsize
