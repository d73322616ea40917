"""Predictor: images and prompts in, results out.

An image is encoded once and prompted many times. Every array inside `jit` has one of a few declared shapes
(images are resized to one size; phrases, boxes and prompts are padded to buckets and masked), so another
phrase, another number of boxes or another photo size compiles nothing new once its bucket was used.
"""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3lt_jax.config import BOX_ONLY_PHRASE, PADDING_LABEL
from sam3lt_jax.features import TextFeatures, VisionFeatures
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.ops.interpolation import interpolation_matrix
from sam3lt_jax.phrase_encoder import PhraseEncoder, pad_rows
from sam3lt_jax.processing import images as image_ops
from sam3lt_jax.processing import postprocess, prompts
from sam3lt_jax.processing.processor import Sam3Processor
from sam3lt_jax.processing.results import Results
from sam3lt_jax.programs import Program, explain_memory, return_freed_memory, shapes_of

MASK_TILE = 512  # pixels; full-size masks leave an accelerator in tiles of one compiled shape
MASK_BATCH = 8  # masks a tile


class Predictor:
  """Finds, scores and segments what phrases and example boxes ask for.

      predictor = Predictor.from_pretrained("s0")
      results = predictor("street.jpg", text=["bus", "traffic light"])
      results.render("street.jpg").save("overlay.png")

      predictor.set_image("street.jpg")                       # encode once
      predictor.predict(text="wheel")                         # prompt many times
      predictor.predict(boxes=[[80, 200, 310, 400]], box_labels=[1])

  Attributes:
    model, variables: what runs. RepMixer blocks are folded (`Sam3LiteText.fuse`) unless `fuse=False`.
    processor: the `Sam3Processor` in use; its profile's threshold and mask order are the defaults.
    phrases: the `PhraseEncoder` in use, which keeps the features of phrases.
  """

  def __init__(
    self,
    model: Sam3LiteText,
    variables: Variables,
    processor: Sam3Processor | None = None,
    *,
    fuse: bool = True,
    prompt_buckets: Sequence[int] | None = None,
    box_buckets: Sequence[int] = (8, 32, 128),
    masks_on_device: bool | None = None,
  ):
    """Args:
    model, variables: from `from_pretrained`, or your own.
    processor: default: one for the model's configuration. Its `image_size` is the size that runs.
    fuse: fold RepMixer blocks into plain convolutions.
    prompt_buckets: prompts that run together, ascending. Default: (1,) on a CPU, where batching gains
      nothing, else (1, 4, 16).
    box_buckets: boxes a prompt is padded to, ascending.
    masks_on_device: enlarge masks with jax (True) or with numpy on the host (False). Default: True where
      there is an accelerator.
    """
    on_cpu = jax.default_backend() == "cpu"
    if prompt_buckets is None:
      prompt_buckets = (1,) if on_cpu else (1, 4, 16)
    self.processor = processor or Sam3Processor(model.config)
    patch, side = model.config.vision.patch_size, self.processor.image_size
    if side < 2 * patch or side % patch:
      raise ValueError(f"image_size must be a multiple of {patch}, at least {2 * patch}, got {side}")
    if fuse:
      model, variables = model.fuse(variables)
    self.model, self.variables = model, variables
    self._prompt_buckets = _buckets("prompt_buckets", prompt_buckets)
    self._box_buckets = _buckets("box_buckets", box_buckets)
    self._masks_on_device = not on_cpu if masks_on_device is None else masks_on_device
    self.phrases = PhraseEncoder(model, self.processor)
    self._image: tuple[VisionFeatures, tuple[int, int]] | None = None

    def encode_image(variables, pixels):
      return model.apply(variables, pixels, method="get_vision_features")

    def detect(variables, vision, tokens, mask, boxes, labels):
      text = TextFeatures(tokens, tokens, mask)
      out = model.apply(
        variables, vision_embeds=vision, text_embeds=text, input_boxes=boxes, input_boxes_labels=labels
      )
      return out.pred_logits, out.presence_logits, out.pred_boxes, out.pred_masks

    self._encode_image, self._detect = Program(encode_image), Program(detect)
    self._enlarge = jax.jit(_enlarge, static_argnames="mask_order")

  @classmethod
  def from_pretrained(
    cls,
    source: str | os.PathLike,
    *,
    config: Any = None,
    profile: Any = None,
    dtype: Any = "float32",
    param_dtype: Any = None,
    image_size: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    compile_ahead: bool = True,
    **options: Any,
  ) -> Predictor:
    """Loads a checkpoint and its processor.

    Args:
      source, config, profile, revision, token, cache_dir, local_files_only: see
        `sam3lt_jax.from_pretrained`.
      dtype: what layers compute in, "float32" or "bfloat16".
      param_dtype: what parameters are stored in; default: `dtype`.
      image_size: side of the model's input in pixels, a multiple of 14; default: the configuration's (1008).
      compile_ahead: compile what a first call with a phrase needs while the weights are read.
      options: of `Predictor`.

    Raises:
      ValueError, ImportError, OSError: see `sam3lt_jax.from_pretrained`.
    """
    from sam3lt_jax.checkpoints import from_pretrained, sources

    hub_options = {
      "revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only
    }  # fmt: skip
    found = sources.locate(source, **hub_options)
    local = source if found.kind == "random" else found.path
    empty: list[Predictor] = []

    def model_known(model: Sam3LiteText, shapes: Variables) -> None:
      size, tokenizer = image_size, None
      if os.path.isdir(local):  # beside the weights may lie a tokenizer and an image size
        saved = Sam3Processor.from_pretrained(local, model.config.profile)
        tokenizer = saved.tokenizer
        size = saved.image_size if size is None else size
      processor = Sam3Processor(model.config, image_size=size, tokenizer=tokenizer)
      empty.append(cls(model, shapes, processor, **options))
      if compile_ahead:
        empty[0]._compile_ahead(background)

    background = concurrent.futures.ThreadPoolExecutor(1, "sam3lt-compile")
    try:
      model, variables = from_pretrained(
        local, config, profile, dtype, dtype if param_dtype is None else param_dtype, model_known=model_known
      )
    except BaseException:
      background.shutdown(wait=False, cancel_futures=True)
      raise
    background.shutdown(wait=False)
    (predictor,) = empty
    predictor.variables = model.fuse(variables)[1] if predictor.model.config.text.fused else variables
    return predictor

  def _compile_ahead(self, executor: concurrent.futures.Executor) -> None:
    """Compiles what a call with a phrase needs, in the executor's thread. `variables` may be shapes."""
    variables, side = shapes_of(self.variables), self.processor.image_size
    pixels = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    image = self._encode_image.compile_in(executor, lambda: (variables, pixels))
    text = self.phrases.compile_ahead(executor, variables)

    def question() -> tuple:
      P, (_, T, D) = self._prompt_buckets[0], text().shape
      tokens, mask = (jax.ShapeDtypeStruct((P, T, *s), d) for s, d in (((D,), text().dtype), ((), bool)))
      boxes, labels = self.box_arrays(prompts.Prompt.parse(BOX_ONLY_PHRASE, None, None), (side, side))
      return variables, image(), tokens, mask, boxes.repeat(P, 0), labels.repeat(P, 0)

    self._detect.compile_in(executor, question)
    # No image is encoded before all is compiled: on a CPU of 2 cores both at once end no sooner, and take 4%
    # more memory at their peak (S0, float32; `python -m tests.benchmarks.compare --parts memory start`).
    self._encode_image.call_after(executor.submit(return_freed_memory))

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
      `Results` for one image, a list of them for several: instances phrase by phrase, in query order.

    Raises:
      ValueError: naming the argument, what came and what is accepted.
      FileNotFoundError: an image path that does not exist.
      MemoryError: the device has too little memory; the message says what to lower.
    """
    threshold, mask_threshold = self._thresholds(threshold, mask_threshold)
    if not prompts.is_several(images):
      row = prompts.Prompt.parse(text, boxes, box_labels)
      vision, size = self._encode(images)
      return self._run(vision, size, row, threshold, mask_threshold)
    images = list(images)
    rows = [
      prompts.Prompt.parse(t, b, lab)
      for t, b, lab in zip(
        prompts.texts_per_image(text, len(images)),
        prompts.per_image("boxes", boxes, len(images), 2),
        prompts.per_image("box_labels", box_labels, len(images), 1),
      )
    ]
    results = []
    for image, row in zip(images, rows):
      vision, size = self._encode(image)
      results.append(self._run(vision, size, row, threshold, mask_threshold))
    return results

  def set_image(self, image: Any) -> Predictor:
    """Encodes an image (path, PIL image, array [H, W, 3]) for `predict`; returns the predictor."""
    self._image = self._encode(image)
    return self

  def predict(
    self,
    text: Any = None,
    boxes: Any = None,
    box_labels: Any = None,
    threshold: float | None = None,
    mask_threshold: float = 0.5,
  ) -> Results:
    """Prompts the image of `set_image`; arguments as in `__call__` for one image.

    Raises:
      ValueError: no image was set, or as in `__call__`.
    """
    if self._image is None:
      raise ValueError("no image is set: call set_image(image) before predict, or call the predictor itself")
    threshold, mask_threshold = self._thresholds(threshold, mask_threshold)
    return self._run(*self._image, prompts.Prompt.parse(text, boxes, box_labels), threshold, mask_threshold)

  def _thresholds(self, threshold, mask_threshold) -> tuple[float, float]:
    if threshold is None:
      threshold = self.processor.profile.score_threshold
    return (
      postprocess.check_threshold("threshold", threshold),
      postprocess.check_threshold("mask_threshold", mask_threshold),
    )

  def _encode(self, image: Any) -> tuple[VisionFeatures, tuple[int, int]]:
    pixels, size = image_ops.preprocess(image, self.processor.image_size)
    with explain_memory():
      return jax.block_until_ready(self._encode_image(self.variables, pixels[None])), size

  def use_variables(self, variables: Any) -> None:
    """Other weights of the same shapes, as after a training step; nothing is compiled anew."""
    self.variables = variables
    self.phrases.forget()

  def text_features(self, phrases: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Features [P, T, D] and mask bool [P, T] of P phrases, each computed once and kept."""
    return self.phrases(self.variables, phrases)

  def _run(
    self,
    vision: VisionFeatures,
    size: tuple[int, int],
    prompt: prompts.Prompt,
    threshold: float,
    mask_threshold: float,
  ) -> Results:
    """All phrases of one image, in batches of a bucket's size."""
    boxes, labels = self.box_arrays(prompt, size)
    tokens, mask = self.text_features(prompt.phrases)
    parts = [Results.empty(size)]
    start = 0
    while start < len(prompt.phrases):
      left = len(prompt.phrases) - start
      bucket = next((b for b in self._prompt_buckets if b >= left), self._prompt_buckets[-1])
      chunk = slice(start, start + min(bucket, left))
      with explain_memory():
        out = self._detect(
          self.variables,
          vision,
          pad_rows(tokens[chunk], bucket),
          pad_rows(mask[chunk], bucket),
          np.repeat(boxes, bucket, axis=0),
          np.repeat(labels, bucket, axis=0),
        )
        parts.append(self._results(out, prompt.phrases[chunk], size, threshold, mask_threshold))
      start = chunk.stop
    return Results.concatenate(parts)

  def box_arrays(self, prompt: prompts.Prompt, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [1, N, 4] normalised cxcywh and labels int32 [1, N] of a prompt for an image of `size`
    (height, width); N is one of the buckets.
    """
    count = len(prompt.boxes)
    most = self._box_buckets[-1]
    bucket = next((b for b in self._box_buckets if b >= count), -(-count // most) * most)
    if not count and self.processor.profile.geometry_cls == "with_any_boxes":
      bucket = 0  # under this policy even empty slots bring in the CLS token
    boxes = np.zeros((1, bucket, 4), np.float32)
    labels = np.full((1, bucket), PADDING_LABEL, np.int32)
    if count:
      rows = prompts.box_rows([prompt.boxes], "boxes")
      given = None if prompt.labels is None else [prompt.labels]
      given = prompts.label_rows(given, rows, "box_labels", "boxes")
      boxes[:, :count], labels[:, :count] = prompts.pad_boxes(rows, given, [size], "boxes")
    return boxes, labels

  def _results(self, out, phrases, size, threshold: float, mask_threshold: float) -> Results:
    """A batch of raw predictions (its first rows are `phrases`) to results."""
    logits, presence, boxes, masks = out
    n = len(phrases)
    scores = postprocess.detection_scores(np.asarray(logits)[:n], np.asarray(presence)[:n])
    row, query = np.nonzero(scores > threshold)
    boxes = postprocess.scale_boxes(np.asarray(boxes)[:n], [size] * n)
    order = self.processor.profile.mask_order
    if self._masks_on_device:
      full = self._enlarge_on_device(masks, row, query, size, mask_threshold, order)
    else:
      full = postprocess.binary_masks(np.asarray(masks)[row, query], size, mask_threshold, order)
    labels = tuple(phrases[i] for i in row)
    return Results(boxes[row, query], scores[row, query], full, labels, size)

  def _enlarge_on_device(self, masks, row, query, size, mask_threshold, order) -> np.ndarray:
    """Kept masks only, bool [N, H, W], computed tile by tile so that one program serves every size."""
    H, W = size
    h, w = masks.shape[-2:]
    out = np.empty((len(row), H, W), bool)
    rows = interpolation_matrix(h, H, -(-H // MASK_TILE) * MASK_TILE)
    columns = interpolation_matrix(w, W, -(-W // MASK_TILE) * MASK_TILE)
    for start in range(0, len(row), MASK_BATCH):
      n = min(MASK_BATCH, len(row) - start)
      at = [pad_rows(index[start : start + n], MASK_BATCH) for index in (row, query)]
      for y in range(0, H, MASK_TILE):
        for x in range(0, W, MASK_TILE):
          tile = self._enlarge(
            masks, *at, rows[y : y + MASK_TILE], columns[x : x + MASK_TILE], mask_threshold, mask_order=order
          )
          part = out[start : start + n, y : y + MASK_TILE, x : x + MASK_TILE]
          part[...] = np.asarray(tile)[:n, : part.shape[1], : part.shape[2]]
    return out


def _buckets(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
  sizes = tuple(int(s) for s in sizes)
  if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
    raise ValueError(f"{name} must be ascending positive sizes, got {sizes}")
  return sizes


def _enlarge(masks, row, query, rows, columns, mask_threshold, mask_order):
  """jitted: bool [K, tile, tile] of the masks [P, Q, h, w] at (row, query), each int32 [K]."""
  chosen = masks[row, query]
  return postprocess.upsample_and_binarise_masks(
    chosen, rows, columns, jnp.asarray(mask_threshold, jnp.float32), mask_order
  )
