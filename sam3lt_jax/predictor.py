"""Predictor: images and prompts in, results out.

A thin face of `engine.Engine`. An image is encoded once and prompted many times. Every array inside `jit`
has one of a few declared shapes, so another phrase, another number of boxes or another photo size compiles
nothing new once its bucket was used.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, cast, overload

import jax
import numpy as np

from sam3lt_jax import devices as jax_devices
from sam3lt_jax import interactive
from sam3lt_jax.engine import Asked, Engine
from sam3lt_jax.errors import ArgumentError, explained
from sam3lt_jax.features import VisionFeatures
from sam3lt_jax.kept import Kept
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.processing import images as image_ops
from sam3lt_jax.processing import postprocess, prompts
from sam3lt_jax.processing.clicks import clicks_of
from sam3lt_jax.processing.processor import Sam3Processor
from sam3lt_jax.processing.prompts import Prompt
from sam3lt_jax.processing.results import Results, hold_masks

if TYPE_CHECKING:
  from typing import Unpack

  from numpy.typing import ArrayLike
  from PIL import Image as pil

  from sam3lt_jax.checkpoints.pretrained import Opened
  from sam3lt_jax.config import Profile, Sam3LiteTextConfig
  from sam3lt_jax.tracker import Sam3Tracker

  Image = str | os.PathLike[str] | pil.Image | np.ndarray | jax.Array


class EngineOptions(TypedDict, total=False):
  """Where and in which portions a predictor runs; see `engine.Engine`, `device` excepted.

  Attributes:
    device: "cpu", "gpu", "gpu:1", "tpu", or a `jax.Device`; short for `devices` of one.
  """

  device: str | jax.Device | None
  devices: Sequence[jax.Device] | None
  model_parallel: int
  image_buckets: Sequence[int] | None
  prompt_buckets: Sequence[int] | None
  box_buckets: Sequence[int]
  masks_on_device: bool | None


class Encoded(NamedTuple):
  """An image of `Predictor.encode`, to be prompted any number of times.

  Attributes:
    vision: its features, on the devices.
    size: (height, width) of the image.
    image: what was encoded, for results to remember.
  """

  vision: VisionFeatures
  size: tuple[int, int]
  image: Any = None


class Predictor:
  """Finds, scores and segments what phrases and example boxes ask for.

      predictor = Predictor.from_pretrained("s0")
      results = predictor("street.jpg", text=["bus", "traffic light"])
      results.render("street.jpg").save("overlay.png")

      predictor.set_image("street.jpg")                       # encode once
      predictor.predict(text="wheel")                         # prompt many times
      predictor.predict(boxes=[[80, 200, 310, 400]], box_labels=[1])

      predictor = Predictor.from_pretrained("s0", tracker="facebook/sam3")    # for clicks
      predictor.set_image("street.jpg")
      wheel = predictor.predict(points=[[210, 340]])          # one object a prompt
      predictor.refine(wheel, 0, points=[[210, 340], [250, 300]], point_labels=[1, 0])

      for results in predictor.stream(paths, text="bus"):     # any number of photos, in order
        ...

  Threads may share a predictor, but for the image of `set_image`, which is one: where several are prompted in
  turn, each is kept as `image = predictor.encode(photo)` and named in `predict(..., image=image)`.

  Attributes:
    model: what runs. RepMixer blocks are folded (`Sam3LiteText.fuse`) unless `fuse=False`.
    processor: the `Sam3Processor` in use; its profile's threshold and mask order are the defaults.
    engine: the compiled programs and the weights on the devices.
    remember_images: whether results hold on to the image that they are of (`Results.image`), so that they can
      be shown. Those of `stream` remember paths only: its images may be many, or one that changes.
  """

  remember_images: bool = True

  @explained
  def __init__(
    self,
    model: Sam3LiteText,
    variables: Variables,
    processor: Sam3Processor | None = None,
    *,
    fuse: bool = True,
    tracker: tuple[Sam3Tracker, Variables] | None = None,
    **options: Unpack[EngineOptions],
  ):
    """Args:
    model, variables: from `from_pretrained`, or your own.
    tracker: for clicks: a tracker and its variables, of `tracker_from_pretrained`.
    processor: default: one for the model's configuration. Its `image_size` is the size that runs.
    fuse: fold RepMixer blocks into plain convolutions.
    options: see `EngineOptions`: device ("cpu", "gpu", "gpu:1", "tpu"), devices, image_buckets,
      prompt_buckets, box_buckets, masks_on_device, model_parallel.
    """
    of_engine: dict[str, Any] = {**options}
    device = of_engine.pop("device", None)
    if device is not None:
      if of_engine.get("devices") is not None:
        raise ArgumentError("device", " and devices were given: give one of the two")
      of_engine["devices"] = [jax_devices.find(device)]
    self.processor = processor or Sam3Processor(model.config)
    patch, side = model.config.vision.patch_size, self.processor.image_size
    if side < 2 * patch or side % patch:
      raise ArgumentError("image_size", f" must be a multiple of {patch}, at least {2 * patch}, got {side}")
    self._loaded = model
    if fuse:
      model, variables = model.fuse(variables)
    self.model = model
    self.engine = Engine(model, variables, self.processor, tracker=tracker, **of_engine)
    self._image: Encoded | None = None

  def __repr__(self) -> str:
    profile, side = self.processor.profile.name, self.processor.image_size
    clicks = ", with a tracker" if self.engine.tracker is not None else ""
    return f"Predictor({self.running}; {side} pixels, profile {profile}{clicks})"

  @property
  def running(self) -> str:
    """What it runs on and how: "CPU, float32, attention in blocks"."""
    return jax_devices.running(self.engine.devices, self.model.dtype)

  @classmethod
  @explained
  def from_pretrained(
    cls,
    source: str | os.PathLike[str],
    *,
    tracker: str | os.PathLike[str] | bool | None = None,
    config: Sam3LiteTextConfig | dict[str, Any] | str | os.PathLike[str] | None = None,
    profile: str | Profile | None = None,
    dtype: Any = "float32",
    param_dtype: Any = None,
    image_size: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    compile_ahead: bool = True,
    fuse: bool = True,
    **options: Unpack[EngineOptions],
  ) -> Predictor:
    """Loads a checkpoint and its processor.

    What is compiled is kept for the next start in the user's cache folder, see `devices.keep_compiled`.

    Args:
      source, config, profile, revision, token, cache_dir, local_files_only: see
        `sam3lt_jax.from_pretrained`.
      tracker: for clicks: where SAM 3's tracker is, see `tracker_from_pretrained`; True: in `source` itself.
      dtype: what layers compute in, "float32" or "bfloat16".
      param_dtype: what parameters are stored in; default: `dtype`.
      image_size: side of the model's input in pixels, a multiple of 14; default: the configuration's (1008).
      compile_ahead: compile what a first call with a phrase needs while the weights are read.
      fuse, options: of `Predictor`; device="gpu:1" is the second GPU.

    Raises:
      ValueError, ImportError, OSError: see `sam3lt_jax.from_pretrained`; no such device.
    """
    from sam3lt_jax.checkpoints import open_checkpoint, open_tracker

    jax_devices.keep_compiled()
    if (device := options.get("device")) is not None:  # before anything is downloaded
      options["device"] = jax_devices.find(device)
    dtypes = dtype, dtype if param_dtype is None else param_dtype
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    opened = open_checkpoint(source, config, profile, *dtypes, revision=revision, **hub)
    opened_tracker = None
    if tracker is not None and tracker is not False:
      same = tracker is True
      opened_tracker = open_tracker(
        source if same else tracker, None, None, *dtypes, revision=revision if same else None, **hub
      )
    clicks = None if opened_tracker is None else (opened_tracker.model, opened_tracker.shapes)
    predictor = cls.without_weights(opened, image_size, fuse=fuse, tracker=clicks, **options)
    if compile_ahead:
      predictor.engine.compile_ahead()
    first = predictor.engine.devices[0]
    predictor.use_variables(opened.load(first))
    if opened_tracker is not None:
      predictor.engine.use_tracker_variables(opened_tracker.load(first))
    return predictor

  @classmethod
  def without_weights(cls, opened: Opened, image_size: int | None = None, **options: Any) -> Predictor:
    """For a checkpoint of `checkpoints.open_checkpoint`, to compile while its weights are read;
    `use_variables` brings them.
    """
    directory, model = None if opened.random else opened.path, cast("Sam3LiteText", opened.model)
    processor = Sam3Processor.beside(directory, model.config, image_size)
    return cls(model, opened.shapes, processor, **options)

  @property
  def variables(self) -> Variables:
    """The weights on the devices, as they run."""
    return self.engine.variables

  def use_variables(self, variables: Any) -> None:
    """Other weights of the same shapes, as after a training step; nothing is compiled anew.

    variables: as the predictor was made with, or as they run (with RepMixer blocks folded).
    """
    if jax.tree.structure(variables) != jax.tree.structure(self.variables):
      _, variables = self._loaded.fuse(variables)
    self.engine.use_variables(variables)

  @overload
  def __call__(
    self, images: Image, text: str | Sequence[str] | None = None, boxes: ArrayLike | None = None,
    box_labels: ArrayLike | None = None, threshold: float | None = None, mask_threshold: float = 0.5,
  ) -> Results: ...  # fmt: skip

  @overload
  def __call__(
    self, images: Sequence[Image], text: str | Sequence[str | Sequence[str] | None] | None = None,
    boxes: Sequence[ArrayLike | None] | None = None, box_labels: Sequence[ArrayLike | None] | None = None,
    threshold: float | None = None, mask_threshold: float = 0.5,
  ) -> list[Results]: ...  # fmt: skip

  @explained
  def __call__(
    self,
    images: Any,
    text: Any = None,
    boxes: Any = None,
    box_labels: Any = None,
    threshold: float | None = None,
    mask_threshold: float = 0.5,
  ) -> Results | list[Results]:
    """Everything that matches, in one image or in each of several.

    Several images are decoded ahead, in threads, and run in batches where there is an accelerator.

    Args:
      images: one image (path, PIL image, array [H, W, 3]) or a list of them (or an array [B, H, W, 3]).
      text: a phrase or a list of phrases, asked of every image; for a list of images also one list of
        phrases an image. None with boxes: find what looks like the boxes.
      boxes: example boxes of the image, [[x1, y1, x2, y2], ...] in pixels; with a list of images one such
        list (or None) an image. They join every phrase.
      box_labels: 1 (like this) or 0 (not like this), one a box, nested as `boxes`. None: all 1.
      threshold: detections with a score above it are kept. None: the profile's (0.5 or 0.3).
      mask_threshold: probability above which a pixel belongs to its object.

    Returns:
      `Results` for one image, a list of them for several: instances by their score, highest first.

    Raises:
      ValueError: naming the argument, what came and what is accepted.
      FileNotFoundError: an image path that does not exist.
      MemoryError: the device has too little memory; the message says what to lower.
    """
    thresholds = self._thresholds(threshold, mask_threshold)
    if not prompts.is_several(images):
      asked = prompts.prompts_of(text, boxes, box_labels)
      one = self.engine.asked(*self._read(images), asked)
      return self._ask(one, thresholds, images if self.remember_images else None)
    images = list(images)
    rows = [
      prompts.prompts_of(*asked, image=i)
      for i, asked in enumerate(
        zip(
          prompts.texts_per_image(text, len(images)),
          prompts.per_image("boxes", boxes, len(images), 2),
          prompts.per_image("box_labels", box_labels, len(images), 1),
        )
      )
    ]
    return list(self._stream(zip(images, rows), *thresholds))

  @explained
  def stream(
    self,
    images: Iterable[Image],
    text: str | Sequence[str],
    threshold: float | None = None,
    mask_threshold: float = 0.5,
  ) -> Iterator[Results]:
    """The same phrases asked of any number of images; their `Results`, in order.

    Images are decoded ahead, in threads, and run in batches where there is an accelerator; only a few of them
    are held at any time. For millions of files, restarts included, see `sam3lt batch`.

    Args:
      images: paths, PIL images or arrays [H, W, 3], any iterable of them.
      text: a phrase or a list of phrases.
      threshold, mask_threshold: as in `__call__`.

    Raises:
      ValueError, FileNotFoundError, MemoryError: as `__call__`, when the turn comes to that image.
    """
    thresholds = self._thresholds(threshold, mask_threshold)
    asked = prompts.prompts_of(text, None, None)
    return self._stream(((image, asked) for image in images), *thresholds, paths_only=True)

  def encode(self, image: Image) -> Encoded:
    """Encodes an image (path, PIL image, array [H, W, 3]), for `predict` and `refine` to be told."""
    pixels, size = self._read(image)
    return Encoded(self.engine.encode([pixels]), size, image if self.remember_images else None)

  def set_image(self, image: Image) -> Predictor:
    """Encodes an image, the one that `predict` and `refine` mean from now on; returns the predictor."""
    self._image = self.encode(image)
    return self

  @explained
  def predict(
    self,
    text: str | Sequence[str] | None = None,
    boxes: ArrayLike | None = None,
    box_labels: ArrayLike | None = None,
    threshold: float | None = None,
    mask_threshold: float = 0.5,
    *,
    points: ArrayLike | None = None,
    point_labels: ArrayLike | None = None,
    box: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    image: Encoded | None = None,
  ) -> Results:
    """Prompts an encoded image: for all that matches, or for single objects.

    Phrases and example `boxes` find everything like them. `points`, `box` and `mask` mean one object each,
    and need a tracker; the two kinds do not mix.

    Args:
      text, boxes, box_labels, threshold, mask_threshold: as in `__call__` for one image.
      points: (x, y) in pixels: [2] or [N, 2] on and off one object, [P, N, 2] for P objects.
      point_labels: 1 (on the object) or 0 (off it), nested as `points`. None: all 1.
      box: the outline of one object, (x1, y1, x2, y2) in pixels, or [P, 4] of several.
      mask: to start from: bool [H, W] of the image, or `Results.logits` of an earlier answer, [h, w]; or P.
      image: of `encode`; None: the one of `set_image`.

    Returns:
      `Results`. For single objects one instance each, in order; its score is the IoU with the true mask that
      the model expects, its box lies around its mask. One point alone may mean a thing or a part of it: the
      mask with the best score is taken (`SamPredictor` gives all three).

    Raises:
      ValueError: no image was set, no tracker is loaded, or as in `__call__`.
    """
    vision, size, remembered = self.encoded(image)
    pointing = {"points": points, "point_labels": point_labels, "box": box, "mask": mask}
    if any(value is not None for value in pointing.values()):
      finding = {"text": text, "boxes": boxes, "box_labels": box_labels, "threshold": threshold}
      of_one, of_all = (
        next((name for name, value in kind.items() if value is not None), None)
        for kind in (pointing, finding)
      )
      if of_all is not None:
        raise ValueError(
          f"{of_one} means one object, {of_all} all that match: give one kind of prompt a call (boxes are "
          "examples of what to find, box is the outline of one object)"
        )
      self.need_tracker()
      assert vision.tracker is not None  # as there is a tracker
      clicks = clicks_of(size, vision.tracker.mask_side, points, point_labels, box, mask)
      _, mask_threshold = self._thresholds(0.5, mask_threshold)
      answer = interactive.answer(self.engine, vision, clicks, None)
      return interactive.results(self.engine, answer, size, mask_threshold).with_image(remembered)
    thresholds = self._thresholds(threshold, mask_threshold)
    asked = self.engine.asked(None, size, prompts.prompts_of(text, boxes, box_labels))
    return self._ask(asked, thresholds, remembered, vision)

  @explained
  def refine(
    self, results: Results, index: int, points: ArrayLike | None = None,
    point_labels: ArrayLike | None = None, box: ArrayLike | None = None, mask_threshold: float = 0.5, *,
    image: Encoded | None = None,
  ) -> Results:  # fmt: skip
    """`results` of an encoded image with one instance made again, from its mask and from clicks.

    Args:
      results: found by a phrase, by boxes or by clicks.
      index: which instance. Its label stays.
      points, point_labels, box: as in `predict`, of one object. Of clicks that led to the instance, give
        those that still count again.
      image: as in `predict`.

    Raises:
      ValueError: as in `predict`; the results are of an image of another size.
      IndexError: there is no such instance.
    """
    image = self.encoded(image)
    size = image.size
    if results.size != size:
      raise ArgumentError("results", f" must be of this image, {size}, got results of {results.size}")
    results[index]  # raises
    index %= len(results)
    start = results[index].mask if results.logits is None else results.logits[index]
    of_one = {"points": points, "point_labels": point_labels, "box": box, "mask": start}
    new = self.predict(**of_one, mask_threshold=mask_threshold, image=image)
    if len(new) != 1:
      raise ArgumentError("points", f" must be of one object, got {len(new)}")
    boxes, scores = results.boxes.copy(), results.scores.copy()
    boxes[index], scores[index] = new.boxes[0], new.scores[0]
    masks = (new[0].mask if k == index else one.mask for k, one in enumerate(results))
    masks = hold_masks(masks, len(results), size)
    logits = None
    if results.logits is not None and new.logits is not None:
      logits = results.logits.copy()
      logits[index] = new.logits[0]
    return dataclasses.replace(results, boxes=boxes, scores=scores, masks=masks, logits=logits)

  def generate_masks(self, image: Image, **options: Any) -> list[dict[str, Any]]:
    """Everything in an image, without being asked for anything: the masks of a grid of points.

    Args:
      image: path, PIL image or array [H, W, 3].
      options: `points_per_side=32`, `pred_iou_thresh=0.88`, `stability_score_thresh=0.95`, `crop_n_layers=0`,
        `min_mask_region_area=0`, ...: see `everything.Options`; names and defaults are segment-anything's.

    Returns:
      A record a mask, best first, as segment-anything's: `segmentation` bool [H, W] (or RLE, with
      `output_mode="coco_rle"`, which a large photo with many masks needs), `area`, `bbox` (x, y, width,
      height), `predicted_iou`, `point_coords`, `stability_score`, `crop_box`.

    Raises:
      ValueError: no tracker is loaded, or naming the option.
    """
    from sam3lt_jax import everything

    return everything.SamAutomaticMaskGenerator(self, **options).generate(image)

  def encoded(self, image: Encoded | None = None) -> Encoded:
    """`image`, or else the one of `set_image`. Raises ValueError where there is none."""
    if image is not None:
      if not isinstance(image, Encoded):
        raise ArgumentError("image", f" must be what encode(photo) returned, got {type(image).__name__}")
      return image
    if self._image is None:
      raise ValueError("no image is set: call set_image(image) before predict, or call the predictor itself")
    return self._image

  def reset_image(self) -> None:
    """Forgets the image of `set_image`."""
    self._image = None

  def need_tracker(self) -> None:
    """Raises ValueError where there is none, with how to get one."""
    if self.engine.tracker is None:
      raise ValueError(
        "no tracker is loaded, which points, outlines and masks need: "
        "Predictor.from_pretrained(source, tracker='facebook/sam3'), or tracker=True where source has one"
      )

  def _thresholds(self, threshold, mask_threshold) -> tuple[float, float]:
    if threshold is None:
      threshold = self.processor.profile.score_threshold
    return (
      postprocess.check_threshold("threshold", threshold),
      postprocess.check_threshold("mask_threshold", mask_threshold),
    )

  def _read(self, image: Any) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 [S, S, 3] and the image's (height, width)."""
    image = image_ops.load_image(image)
    return image_ops.resize_image(image, self.processor.image_size), image.shape[:2]

  def _ask(self, one: Asked, thresholds: Any, image: Any, vision: Any = None) -> Results:
    """Of one image; `vision`: where it is encoded already."""
    ((_, (kept,)),) = self.engine.run([(None, [one])], *thresholds, vision=vision)
    return _results(kept, one.prompts, image)

  def _stream(
    self,
    works: Iterable[tuple[Any, Sequence[Prompt]]],
    threshold: float,
    mask_threshold: float,
    paths_only: bool = False,
  ) -> Iterator[Results]:
    for images, kept in self.engine.run(self._batches(works), threshold, mask_threshold):
      for (image, asked), one in zip(images, kept):
        keep = self.remember_images and (isinstance(image, (str, os.PathLike)) or not paths_only)
        yield _results(one, asked.prompts, image if keep else None)

  def _batches(self, works: Iterable[tuple[Any, Sequence[Prompt]]]) -> Iterator[tuple[list, list[Asked]]]:
    """Images read ahead, in batches of the engine's rows; each batch is tagged with (image, `Asked`) of each.

    Fewer images than a batch go one a device: to compile for a batch takes longer than they do.
    """
    rows, few, batch = self.engine.rows, self.engine.ways, []
    for image, (pixels, size), asked in _ahead(self._read, works, rows):
      batch.append((image, self.engine.asked(pixels, size, asked)))
      if len(batch) == rows:
        yield batch, [one for _, one in batch]
        batch, few = [], rows
    for start in range(0, len(batch), few):
      some = batch[start : start + few]
      yield some, [one for _, one in some]


def _ahead(read: Any, works: Iterable[tuple[Any, Any]], rows: int) -> Iterator[tuple[Any, Any, Any]]:
  """(image, read(image), what is asked) of each, in order; a batch and a few more are read in advance."""
  works, workers = iter(works), image_ops.default_workers()
  waiting: collections.deque = collections.deque()
  with futures.ThreadPoolExecutor(workers, "sam3lt-read") as pool:
    try:
      while True:
        while len(waiting) < rows + 2 * workers and (work := next(works, None)) is not None:
          waiting.append((work[0], pool.submit(read, work[0]), work[1]))
        if not waiting:
          return
        image, pixels, asked = waiting.popleft()
        yield image, pixels.result(), asked
    finally:
      for _, pixels, _ in waiting:
        pixels.cancel()


def _results(kept: Kept, asked: Sequence[Prompt], image: Any) -> Results:
  labels, masks = tuple(asked[i].phrase for i in kept.prompt), cast("np.ndarray", kept.masks())
  return Results(kept.boxes, kept.scores, masks, labels, kept.size, image=image)
