"""Sam3Processor: a user's images, phrases and boxes to the model's arrays, and its outputs to results.

Arguments, keys and conventions are those of transformers 5.23.0 (`processing_sam3.py`,
`image_processing_sam3.py`); the class docstring lists what differs. Axes: B images, P prompts, N boxes a
prompt, T tokens, S model image side.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sam3lt_jax.config import Profile, Sam3LiteTextConfig, read_json, typed
from sam3lt_jax.errors import ArgumentError, warn
from sam3lt_jax.processing import images as image_ops
from sam3lt_jax.processing import postprocess, prompts
from sam3lt_jax.processing.arrays import to_numpy
from sam3lt_jax.processing.tokenizer import ClipTokenizer
from sam3lt_jax.processing.vocabulary import Vocabulary


class ProcessorOutput(dict):
  """A dictionary whose entries are attributes as well, as transformers' BatchFeature."""

  def __getattr__(self, name: str) -> Any:
    try:
      return self[name]
    except KeyError:
      raise AttributeError(f"no {name!r} here; there are: {', '.join(self) or 'no entries'}") from None

  @property
  def model_inputs(self) -> dict[str, Any]:
    """The entries that the model takes by these names, that is all but `original_sizes`."""
    return {k: v for k, v in self.items() if k != "original_sizes"}


class Sam3Processor:
  """Prepares prompts for `Sam3LiteText` and reads its outputs, with transformers' arguments.

  Differences from transformers 5.23.0's `Sam3Processor`:
    - numpy arrays come back (jax arrays on request), `pixel_values` channels-last, ids and labels int32;
    - context length, padding id, cleaning, default threshold and mask order are the profile's. A phrase over
      the context is cut with a warning (transformers lets it grow; `truncation=False` does so here);
    - one phrase for several images or box lists becomes one row each (transformers' model repeats it
      instead);
    - several prompts on one image are accepted: P rows of prompts beside one row of pixels (give the model
      `image_index`);
    - what transformers passes on silently is an error here: counts that do not match, inverted boxes, NaN,
      labels other than 1, 0 and -10; and a real box with a coordinate of exactly -10 is not taken for
      padding;
    - masks are bool [N, H, W] and have the image's size also when nothing was found.

  Attributes:
    profile: the reference profile followed.
    image_size: S, side of the model's input in pixels.
    tokenizer: the `ClipTokenizer` in use, loaded when first needed.
    vocabulary: the phrases that a model of few words knows, or None: any.
  """

  vocabulary: Vocabulary | None = None

  def __init__(
    self,
    config: Sam3LiteTextConfig | Profile | str = "original",
    image_size: int | None = None,
    tokenizer: ClipTokenizer | None = None,
  ):
    """Args:
      config: the model's configuration, or only a profile ("original", "transformers" or a `Profile`).
      image_size: overrides the configuration's; 1008 with a profile alone.
      tokenizer: overrides the configuration's, else the bundled public CLIP table. Its own profile
        decides how it cleans and pads.

    Raises:
      ValueError: an image size that is not a positive whole number, or a `config` of another kind.
    """
    full = config if isinstance(config, Sam3LiteTextConfig) else None
    if full is None and not isinstance(config, (Profile, str)):
      raise ValueError(f"config must be a Sam3LiteTextConfig or a profile, got {type(config).__name__}")
    self.profile = full.profile if full else Profile.named(config)
    if image_size is None:
      image_size = full.vision.image_size if full else 1008
    if isinstance(image_size, bool) or not isinstance(image_size, numbers.Integral) or image_size < 1:
      raise ArgumentError("image_size", f" must be a positive whole number of pixels, got {image_size!r}")
    self.image_size = int(image_size)
    self._vocab_size = full.text.vocab_size if full else None
    self._own_vocabulary = full.tokenizer if full else None
    self._tokenizer = tokenizer

  def __repr__(self) -> str:
    return f"Sam3Processor({self.image_size} pixels, profile {self.profile.name})"

  @property
  def tokenizer(self) -> ClipTokenizer:
    if self._tokenizer is None:
      if self._own_vocabulary is None:
        self._tokenizer = ClipTokenizer(profile=self.profile)
      else:
        self._tokenizer = ClipTokenizer.of_json(self._own_vocabulary, self.profile)
    return self._tokenizer

  @classmethod
  def from_pretrained(cls, source: Any, profile: str | Profile | None = None) -> Sam3Processor:
    """The processor of a checkpoint.

    Args:
      source: a directory (its `config.json`, `tokenizer.json`, `processor_config.json` or
        `preprocessor_config.json`, whichever are there), an original `.pt` file (profile "original", public
        CLIP table), a hub id or "s0", "s1", "l" (downloaded), a `Sam3LiteTextConfig`, or a model with a
        `config`.
      profile: overrides the source's.

    Raises:
      FileNotFoundError: a path that does not exist.
      ValueError: a source of another kind, or files that cannot be read.
    """
    config = source if isinstance(source, Sam3LiteTextConfig) else getattr(source, "config", None)
    if isinstance(config, Sam3LiteTextConfig):
      return cls(config if profile is None else config.replace(profile=profile))
    if not isinstance(source, (str, os.PathLike)):
      raise ValueError(
        f"source must be a directory, file, hub id, configuration or model, got {type(source).__name__}"
      )
    path = os.fspath(source)
    if not os.path.exists(path):
      path = _download(path)
    if os.path.isfile(path):
      return cls(Profile.named(profile or "original"))
    if os.path.isfile(os.path.join(path, "config.json")):
      return cls.beside(path, Sam3LiteTextConfig.from_json(path, profile))
    return cls.beside(path, Profile.named(profile or "transformers"))

  @classmethod
  def beside(
    cls, directory: str | None, config: Sam3LiteTextConfig | Profile, image_size: int | None = None
  ) -> Sam3Processor:
    """For a model of `config` whose weights lie in `directory`, with the tokenizer, the image size and the
    vocabulary that lie there; a file, or None, has none of them.
    """
    if directory is None or not os.path.isdir(directory):
      return cls(config, image_size=image_size)
    made = cls(config, _saved_image_size(directory) if image_size is None else image_size)
    if os.path.isfile(os.path.join(directory, "tokenizer.json")):
      made._tokenizer = ClipTokenizer.from_file(directory, made.profile)
    made.vocabulary = Vocabulary.beside(directory)
    return made

  def check_phrases(self, phrases: Iterable[str]) -> None:
    """Raises ValueError for a phrase that the model of this processor cannot know: see `vocabulary`."""
    if self.vocabulary is not None:
      self.vocabulary.check(phrases)

  def __call__(
    self,
    images: Any = None,
    text: str | Sequence[str | None] | None = None,
    segmentation_maps: Any = None,
    input_boxes: Any = None,
    input_boxes_labels: Any = None,
    original_sizes: Any = None,
    return_tensors: str | None = None,
    *,
    truncation: bool = True,
  ) -> ProcessorOutput:
    """Args (all optional):
      images: one image or a list of B (what `images.load_image` takes), or an array [B, H, W, 3].
      text: a phrase, or one a prompt. None in a list, or no text at all, beside boxes: "visual". An empty
        phrase is accepted, as in both references, with a warning: it asks for nothing in particular.
      segmentation_maps: not supported; labels for training are prepared elsewhere.
      input_boxes: one list of boxes a prompt, each box (x1, y1, x2, y2) in pixels of its image: nested lists
        `[prompt][box][4]` with None or [] for a prompt without boxes, or an array [P, N, 4]. A box may reach
        over the image's edge and is not clipped; one that lies wholly outside draws a warning.
      input_boxes_labels: `[prompt][box]`, 1 (like this), 0 (not like this) or -10 (ignore). Default: all 1.
      original_sizes: (height, width) a prompt, in place of images, where only prompts are prepared.
      return_tensors: None or "np" for numpy, "jax" for jax arrays (`original_sizes` stays numpy).
      truncation: see `ClipTokenizer.__call__`.

    Returns:
      A dictionary with attribute access; what was not asked for is absent:
        pixel_values: float32 [B, S, S, 3] in [-1, 1].
        original_sizes: int64 [B, 2], (height, width) in pixels.
        input_ids, attention_mask: int32 [P, T]; 1 = token.
        input_boxes: float32 [P, N, 4], (centre x, centre y, width, height) in units of the image's sides;
          padding, and boxes labelled -10, are (-10, -10, 0, 0).
        input_boxes_labels: int32 [P, N]; padding is -10.

    Raises:
      ValueError: naming the argument, what was received and what is accepted.
      FileNotFoundError: an image path that does not exist.
    """
    if return_tensors not in (None, "np", "jax"):
      raise ValueError(
        f"return_tensors must be None, 'np' or 'jax' (numpy is what comes), got {return_tensors!r}"
      )
    if segmentation_maps is not None:
      raise ValueError("segmentation_maps is not supported: this processor prepares images and prompts only")
    if images is None and text is None and input_boxes is None and original_sizes is None:
      raise ValueError("give at least one of images, text and input_boxes")
    out = ProcessorOutput()
    sizes = None
    if images is not None:
      out["pixel_values"], sizes = preprocess_all(images, self.image_size)
    if original_sizes is not None:
      given = postprocess.check_sizes("original_sizes", original_sizes)
      if sizes is not None and sizes != given:
        raise ValueError(f"original_sizes {given} contradict the images, whose sizes are {sizes}")
      sizes = given
    if sizes is not None:
      out["original_sizes"] = np.asarray(sizes, np.int64).reshape(-1, 2)

    boxes = None if input_boxes is None else prompts.box_rows(input_boxes)
    if boxes is None and input_boxes_labels is not None:
      raise ValueError("input_boxes_labels were given without input_boxes")
    phrases = prompts.phrase_rows(text, boxes, sizes)
    if phrases is not None:
      self.check_phrases(phrases)
      out["input_ids"], out["attention_mask"] = self._tokenize(phrases, truncation)
    if boxes is not None:
      labels = prompts.label_rows(input_boxes_labels, boxes)
      sizes = prompts.sizes_for(boxes, sizes)
      if any(len(row) for row in boxes):
        out["input_boxes"], out["input_boxes_labels"] = prompts.pad_boxes(boxes, labels, sizes)
    if return_tensors == "jax":
      import jax.numpy as jnp

      return ProcessorOutput({k: v if k == "original_sizes" else jnp.asarray(v) for k, v in out.items()})
    return out

  def _tokenize(self, phrases: list[str], truncation: bool) -> tuple[np.ndarray, np.ndarray]:
    for phrase in phrases:
      if not phrase.strip():
        warn(f"text {phrase!r} is empty: it names nothing to look for")
    if self.tokenizer.pruned:  # an unknown word is many tokens: it is to be named, not cut off
      self._check_vocabulary(phrases, self.tokenizer(phrases, truncation=False)[0])
    ids, mask = self.tokenizer(phrases, truncation=truncation)
    self._check_vocabulary(phrases, ids)
    return ids, mask

  def _check_vocabulary(self, phrases: list[str], ids: np.ndarray) -> None:
    size = self._vocab_size
    if size is None or ids.max() < size:
      return
    if not self.tokenizer.pruned:
      raise ValueError(
        f"the tokenizer gives id {ids.max()}, but the model's vocabulary has {size}; "
        "give the tokenizer that belongs to the model: Sam3Processor(config, tokenizer=...)"
      )
    phrase = phrases[int(np.argmax((ids >= size).any(axis=1)))]
    words = [w for w in phrase.split() if max(self.tokenizer.encode(w)) >= size]
    raise ValueError(
      f"text {phrase!r}: the model's vocabulary was pruned to {size} tokens, and"
      f" {', '.join(map(repr, words)) or 'a part of this'} is not among them"
    )

  def post_process_object_detection(
    self, outputs: Any, threshold: float | None = None, target_sizes: Any = None
  ) -> list[dict[str, np.ndarray]]:
    """Model outputs to boxes.

    Args:
      outputs: the model's output struct or a mapping, with pred_logits [P, Q], pred_boxes [P, Q, 4] and
        presence_logits [P, 1] (or None).
      threshold: detections with a score above it are kept. None: the profile's.
      target_sizes: (height, width) in pixels, one a prompt; None leaves boxes in units of the image's sides.

    Returns:
      One dictionary a prompt, in query order (not sorted, no suppression of overlaps, as both references):
      "scores" float32 [N] and "boxes" float32 [N, 4], (x1, y1, x2, y2), not clipped to the image.

    Raises:
      ValueError: a threshold outside [0, 1], or sizes that are not one (height, width) a prompt.
    """
    results = self._detections(outputs, threshold, target_sizes)
    return [{"scores": scores, "boxes": boxes} for scores, boxes, _, _ in results]

  def post_process_instance_segmentation(
    self,
    outputs: Any,
    threshold: float | None = None,
    mask_threshold: float = 0.5,
    target_sizes: Any = None,
  ) -> list[dict[str, np.ndarray]]:
    """Model outputs to instances: as `post_process_object_detection`, and pred_masks [P, Q, h, w] to masks.

    Args:
      mask_threshold: probability above which a pixel belongs to the instance.
      target_sizes: also the size of the masks; None leaves them at (h, w).

    Returns:
      "scores", "boxes" and "masks" bool [N, H, W] a prompt; N = 0 gives [0, H, W] (transformers: int64, and
      low resolution where nothing was found). Upsampling and sigmoid happen in the profile's order.
    """
    mask_threshold = postprocess.check_threshold("mask_threshold", mask_threshold)
    masks = _output(outputs, "pred_masks")
    return [
      {
        "scores": scores,
        "boxes": boxes,
        "masks": postprocess.binary_masks(masks[i][keep], size, mask_threshold, self.profile.mask_order),
      }
      for i, (scores, boxes, keep, size) in enumerate(self._detections(outputs, threshold, target_sizes))
    ]

  def _detections(self, outputs: Any, threshold: float | None, target_sizes: Any) -> list[tuple]:
    """A prompt at a time: (scores [N], boxes [N, 4], keep bool [Q], size or None)."""
    threshold = postprocess.check_threshold(
      "threshold", self.profile.score_threshold if threshold is None else threshold
    )
    boxes = _output(outputs, "pred_boxes")
    presence = _output(outputs, "presence_logits", optional=True)
    scores = postprocess.detection_scores(_output(outputs, "pred_logits"), presence)
    sizes = [None] * len(scores)
    if target_sizes is not None:
      sizes = postprocess.check_sizes("target_sizes", target_sizes, len(scores))
      boxes = postprocess.scale_boxes(boxes, np.asarray(sizes))
    keep = scores > threshold
    return [(s[k], b[k], k, size) for s, b, k, size in zip(scores, boxes, keep, sizes)]

  def post_process_semantic_segmentation(
    self,
    outputs: Any,
    target_sizes: Any = None,
    threshold: float = 0.5,
    return_segmentation_scores: bool = False,
  ) -> list[np.ndarray] | list[ProcessorOutput]:
    """Model outputs to one map a prompt of everything that matches it.

    Args:
      outputs: with semantic_seg [P, 1, h, w] logits.
      target_sizes: (height, width) in pixels, one a prompt; None leaves the maps at (h, w).
      threshold: probability above which a pixel matches.
      return_segmentation_scores: the probabilities as well.

    Returns:
      One uint8 [H, W] a prompt with 1 where it matches (transformers: int64); or dictionaries with that as
      "segmentation" and "segmentation_scores" float32 [1, H, W]. Upsampling and sigmoid as the
      profile orders them.
    """
    threshold = postprocess.check_threshold("threshold", threshold)
    logits = _output(outputs, "semantic_seg")
    sizes = [logits.shape[-2:]] * len(logits)
    if target_sizes is not None:
      sizes = postprocess.check_sizes("target_sizes", target_sizes, len(logits))
    results = []
    for values, size in zip(logits, sizes):
      if self.profile.mask_order == "sigmoid_then_upsample":
        scores = postprocess.resize_masks(postprocess.sigmoid(values), size)
      else:
        scores = postprocess.sigmoid(postprocess.resize_masks(values, size))
      segmentation = (scores[0] > threshold).astype(np.uint8)
      results.append(ProcessorOutput(segmentation=segmentation, segmentation_scores=scores))
    return results if return_segmentation_scores else [r.segmentation for r in results]


def preprocess_all(images: Any, side: int) -> tuple[np.ndarray, list[tuple[int, int]]]:
  """One image, several or an array [B, H, W, C] to (float32 [B, side, side, 3], (height, width) of each)."""
  images = images if prompts.is_several(images) else [images]
  if not len(images):
    raise ValueError("images must hold at least one image, got none")
  pixels, sizes = zip(*(image_ops.preprocess(image, side) for image in images))
  return np.stack(pixels), list(sizes)


def _output(outputs: Any, name: str, optional: bool = False) -> np.ndarray | None:
  value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
  if value is None:
    if optional:
      return None
    raise ValueError(f"outputs has no {name}")
  return to_numpy(value, f"outputs.{name}").astype(np.float32, copy=False)


def _download(source: str) -> str:
  from sam3lt_jax.checkpoints import hub, sources

  if source in sources.BUNDLED:
    return sources.bundled(source)
  source = sources.ALIASES.get(source.lower(), source)
  if hub.parse_source(source) is None:
    raise FileNotFoundError(f"source: there is no file, directory or hub id {source!r}")
  return hub.download(source)


def _saved_image_size(path: str) -> int | None:
  """The image size that transformers saved beside a checkpoint, if it did."""
  for name in ("processor_config.json", "preprocessor_config.json"):
    file = os.path.join(path, name)
    try:
      data = read_json(file)
    except FileNotFoundError:
      continue
    try:
      size = (data.get("image_processor") or data).get("size") or {}
      height, width = size.get("height"), size.get("width")
    except AttributeError:
      raise ValueError(f"{file}: expected an object with image_processor and size, objects as well") from None
    if height != width:
      raise ValueError(f"{file}: only square sizes are supported, got {size}")
    if height is not None:
      return typed(f"{file}: size.height", height, 0)
  return None
