"""What both sides get: one checkpoint of random weights, photos, phrases. Written once a run."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pathlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
  from sam3lt_jax import Sam3LiteTextConfig, Sam3Processor

# The reference's own process imports this module and must not pay for jax: imports of either side's packages
# stand in the functions.
PHOTO = pathlib.Path(__file__).parents[2] / "examples" / "coffee.jpg"
PHRASE = "coffee cup"
PROFILE = "transformers"  # what the reference computes: same ids, same context of 32 tokens
SEED = 0
KEPT = 10  # detections that one phrase keeps, so that post-processing has an ordinary amount of work
SPREAD = 3.0  # standard deviation of the queries' class logits, of which the model clamps what is beyond 12
VOCABULARY = 49408  # of the real tokenizer, also at the tiny size
SIZES = ("s0", "s1", "l", "tiny")
_ADJECTIVES = ("red", "small", "wooden", "old", "striped", "shiny", "open", "round")
_NOUNS = ("cup", "spoon", "table", "person with a hat")


@dataclasses.dataclass(frozen=True)
class Scale:
  """How far the measurements reach at one size of the model."""

  text_phrases: int = 32
  detect_phrases: tuple[int, ...] = (1, 4, 16)
  batches: tuple[int, ...] = (1, 4)
  scaling_phrases: tuple[int, ...] = (1, 2, 4, 8, 16)
  scaling_boxes: tuple[int, ...] = (0, 1, 4, 16, 64)
  scaling_images: tuple[int, ...] = (1, 2, 4)
  scaling_sides: tuple[int, ...] = (336, 504, 672, 1008)
  peak_side: int = 4096  # of the square matrices that the machine's peak is measured with


FULL = Scale()
TINY = Scale(4, (1, 2), (1, 2), (2, 3), (1,), (2,), (56,), 256)


@dataclasses.dataclass(frozen=True)
class Workload:
  """A prepared run. Attributes: `directory` a checkpoint in transformers' layout; `photos` files;
  `threshold` the score above which the reference keeps `KEPT` detections of `PHRASE` in the first photo."""

  size: str
  directory: str
  photos: tuple[str, ...]
  threshold: float

  @property
  def config(self) -> Sam3LiteTextConfig:
    return config(self.size)

  @property
  def scale(self) -> Scale:
    return TINY if self.size == "tiny" else FULL

  def pixels(self, count: int = 1, side: int | None = None) -> np.ndarray:
    """float32 [count, side, side, 3] of the photos, over and over."""
    paths = [self.photos[i % len(self.photos)] for i in range(count)]
    return np.asarray(_processor(self.config, side)(images=paths).pixel_values)

  def tokens(self, count: int) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and attention_mask [count, T] of as many different phrases."""
    out = _processor(self.config)(text=phrases(count))
    return np.asarray(out.input_ids), np.asarray(out.attention_mask)

  def boxes(self, prompts: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes float32 [prompts, count, 4], normalised cxcywh, and labels int32 [prompts, count]."""
    rng = np.random.default_rng(SEED)
    boxes = np.concatenate([rng.uniform(0.3, 0.7, (count, 2)), rng.uniform(0.1, 0.4, (count, 2))], axis=1)
    labels = np.arange(count) % 4 != 3  # three of four are positive
    shape = (prompts, count)
    return (
      np.broadcast_to(boxes.astype(np.float32), (*shape, 4)).copy(),
      np.broadcast_to(labels.astype(np.int32), shape).copy(),
    )


def phrases(count: int) -> list[str]:
  """Different noun phrases of two to five words."""
  every = [f"{adjective} {noun}" for noun in _NOUNS for adjective in _ADJECTIVES]
  if count > len(every):
    raise ValueError(f"count must be at most {len(every)}, got {count}")
  return every[:count]


def config(size: str) -> Sam3LiteTextConfig:
  """The configuration of "s0", "s1", "l" or "tiny"."""
  if size == "tiny":
    from tests import tiny

    return tiny.config(PROFILE, vocab_size=VOCABULARY)
  from sam3lt_jax.config import Sam3LiteTextConfig

  return getattr(Sam3LiteTextConfig, size)(PROFILE)


def _processor(config: Sam3LiteTextConfig, side: int | None = None) -> Sam3Processor:
  from sam3lt_jax import Sam3Processor

  return Sam3Processor(config, image_size=side)


def prepare(size: str, directory: str) -> Workload:
  """Draws the weights, spreads the scores, writes checkpoint, tokenizer and photos into `directory`."""
  from convert import torch_reference

  ref = torch_reference.import_reference()
  data = {k: v for k, v in config(size).to_json().items() if k != "sam3lt_jax"}
  model = torch_reference.randomise_(torch_reference.build_model(ref.Sam3LiteTextConfig(**data)), SEED)
  workload = Workload(size, directory, _photos(directory), 0.0)
  threshold = _spread_scores(model, workload)
  model.save_pretrained(directory)
  _processor(config(size)).tokenizer.save(os.path.join(directory, "tokenizer.json"))
  del model
  gc.collect()
  return dataclasses.replace(workload, threshold=threshold)


def _photos(directory: str) -> tuple[str, ...]:
  """The bundled photo and its mirror images, so that a batch does not read one file over and over."""
  transposes = (None, *(Image.Transpose(i) for i in (0, 1, 3)))  # left-right, top-bottom, half a turn
  paths = []
  with Image.open(PHOTO) as photo:
    for i, transpose in enumerate(transposes):
      path = os.path.join(directory, f"photo_{i}.jpg")
      (photo if transpose is None else photo.transpose(transpose)).convert("RGB").save(path, quality=95)
      paths.append(path)
  return tuple(paths)


def _spread_scores(model, workload: Workload) -> float:
  """Makes scores differ between queries; returns the threshold that keeps `KEPT` of the first photo.

  Random weights score all queries nearly alike, less apart than bfloat16 resolves: one side would keep all of
  them there and the other none, and their post-processing would not be the same work. So the projection of
  the queries is centred and scaled, which does the same to the class logits.
  """
  import torch

  inputs = _processor(workload.config)(images=workload.photos[0], text=PHRASE)
  tensors = {k: torch.from_numpy(np.array(v)) for k, v in inputs.model_inputs.items()}
  tensors["pixel_values"] = tensors["pixel_values"].permute(0, 3, 1, 2)
  ints = {k: v.long() for k, v in tensors.items() if not v.is_floating_point()}
  projection, projected = model.dot_product_scoring.query_proj, []
  hook = projection.register_forward_hook(lambda module, args, out: projected.append(out))
  with torch.inference_mode():
    out = model(**(tensors | ints))
    hook.remove()
    logits = out.pred_logits[0]
    factor = SPREAD / logits.std()
    mean = projected[0][-1].reshape(-1, projected[0].shape[-1]).mean(dim=0)
  with torch.no_grad():
    projection.bias.copy_(factor * (projection.bias - mean))
    projection.weight.mul_(factor)
  presence = torch.sigmoid(out.presence_logits[0])
  scores = torch.sigmoid(factor * (logits - logits.mean())) * presence
  ranked = np.sort(scores.float().numpy())[::-1]
  kept = min(KEPT, len(ranked) // 2)
  return float((ranked[kept - 1] + ranked[kept]) / 2)


def to_json(workload: Workload) -> str:
  """For a child process."""
  return json.dumps(dataclasses.asdict(workload))


def from_json(text: str) -> Workload:
  data = json.loads(text)
  return Workload(**(data | {"photos": tuple(data["photos"])}))
