"""The two sides behind one set of methods. Every method returns when its result is there.

Names follow the model: `vision` pixels to features, `text` tokens to features, `detect` both to raw
predictions, `forward` all three, `end_to_end` files to results.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.benchmarks import machine, timing
from tests.benchmarks.workload import Workload


class Ours:
  """This library, as its users call it."""

  whose = timing.OURS

  def __init__(self, workload: Workload, dtype: str):
    import jax

    from sam3lt_jax import Predictor, programs

    self.how = "jit"
    self._jax = jax
    self.predictor = Predictor.from_pretrained(workload.directory, dtype=dtype)
    self.model, self.variables = self.predictor.model, self.predictor.variables
    apply = self.model.apply
    jit = functools.partial(programs.jit, dtype=self.model.dtype)
    self._vision = jit(lambda v, x: apply(v, x, method="neck_maps"))
    self._text = jit(lambda v, ids, mask: apply(v, ids, mask, method="get_text_features"))
    self._prepare = jit(lambda v, vision: apply(v, vision, method="prepare"))

    def detect(v, vision, text, boxes, labels):
      if isinstance(vision, tuple):  # the neck's maps, from which the reference's detection starts as well
        vision = apply(v, vision, method="prepare")
      return apply(v, vision_embeds=vision, text_embeds=text, input_boxes=boxes, input_boxes_labels=labels)

    self._detect = jit(detect)
    self._forward = jit(apply)
    self._unseen = itertools.count(1)

  def pixels(self, array: np.ndarray) -> Any:
    return self._jax.device_put(array)

  def ids(self, tokens: tuple[np.ndarray, np.ndarray]) -> Any:
    return self._jax.device_put(tokens)

  boxes = ids

  def vision(self, pixels: Any) -> Any:
    return self._jax.block_until_ready(self._vision(self.variables, pixels))

  def text(self, ids: Any) -> Any:
    return self._jax.block_until_ready(self._text(self.variables, *ids))

  def row(self, text: Any, i: int) -> Any:
    """One phrase of several."""
    return self._jax.tree.map(lambda x: x[i : i + 1], text)

  def prepare(self, vision: Any) -> Any:
    """What phrases about one image share."""
    return self._prepare(self.variables, vision)

  def detect(self, vision: Any, text: Any, boxes: Any = (None, None)) -> Any:
    return self._jax.block_until_ready(self._detect(self.variables, vision, text, *boxes))

  def forward(self, pixels: Any, ids: Any) -> Any:
    return self._jax.block_until_ready(self._forward(self.variables, pixels, *ids))

  def end_to_end(self, paths: Sequence[str], phrase: str, threshold: float) -> int:
    """Number of instances kept."""
    # Predictor remembers the features of phrases; trailing spaces make it a new one with the same tokens.
    phrase = phrase + " " * next(self._unseen)
    results = self.predictor(list(paths), text=phrase, threshold=threshold)
    return sum(len(r) for r in results)

  def logits(self, out: Any) -> np.ndarray:
    return np.asarray(out.pred_logits, np.float32)

  def at_resolution(self, side: int) -> Ours:
    """Any multiple of the patch size runs as it is."""
    del side
    return self


class Reference:
  """transformers' model and processor, as their users call them."""

  whose = timing.REFERENCE

  def __init__(self, workload: Workload, dtype: str):
    from convert import torch_reference

    self._ref = ref = torch_reference.import_reference()
    self.how = "eager"
    self._torch = torch = ref.torch
    machine.set_up_torch()
    self._dtype = getattr(torch, dtype)
    self._device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ref.Sam3LiteTextModel.from_pretrained(workload.directory, dtype=self._dtype)
    self.model = model.eval().to(self._device)
    self._config = self.model.config
    self._vision, self._call = self.model.get_vision_features, self.model
    self.processor = self._processor(workload)

  def compiled(self) -> Reference:
    """The same model through torch.compile. For GPUs; not tried, there was none where this was written."""
    other = copy.copy(self)
    other.how = "torch.compile"
    other._vision, other._call = (self._torch.compile(f) for f in (self._vision, self._call))
    return other

  def _processor(self, workload: Workload) -> Any:
    from transformers import CLIPTokenizer
    from transformers.models.sam3.image_processing_sam3 import Sam3ImageProcessor

    with open(os.path.join(workload.directory, "tokenizer.json"), encoding="utf-8") as f:
      bpe = json.load(f)["model"]
    tokenizer = CLIPTokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])
    side = workload.config.vision.image_size
    return self._ref.Sam3Processor(Sam3ImageProcessor(size={"height": side, "width": side}), tokenizer)

  def _done(self, out: Any) -> Any:
    if self._device == "cuda":
      self._torch.cuda.synchronize()
    return out

  def _tensor(self, array: Any) -> Any:
    tensor = self._torch.as_tensor(np.array(array)) if isinstance(array, np.ndarray) else array
    return tensor.to(self._device, self._dtype if tensor.is_floating_point() else self._torch.long)

  def pixels(self, array: np.ndarray) -> Any:
    return self._tensor(array).permute(0, 3, 1, 2).contiguous()

  def ids(self, tokens: tuple[np.ndarray, np.ndarray]) -> Any:
    return tuple(self._tensor(a) for a in tokens)

  boxes = ids

  def vision(self, pixels: Any) -> Any:
    with self._torch.inference_mode():
      return self._done(self._vision(pixels))

  def length(self, tokens: tuple[np.ndarray, np.ndarray]) -> None:
    """The reference computes every token."""

  def text(self, ids: Any, length: None = None) -> Any:
    """The features with the mask, which the reference wants again at detection."""
    with self._torch.inference_mode():
      out = self._done(self.model.get_text_features(input_ids=ids[0], attention_mask=ids[1]))
    return types.SimpleNamespace(pooler_output=out.pooler_output, mask=ids[1])

  def prepare(self, vision: Any) -> Any:
    """The reference shares the features themselves."""
    return vision

  def row(self, text: Any, i: int) -> Any:
    row = slice(i, i + 1)
    return types.SimpleNamespace(pooler_output=text.pooler_output[row], mask=text.mask[row])

  def detect(self, vision: Any, text: Any, boxes: Any = (None, None)) -> Any:
    """One image's features are expanded (without a copy) to all phrases, as the reference's API asks for."""
    prompts = len(text.mask)

    def expand(maps):
      return tuple(m.expand(prompts, *m.shape[1:]) for m in maps)

    features = types.SimpleNamespace(
      fpn_hidden_states=expand(vision.fpn_hidden_states),
      fpn_position_encoding=expand(vision.fpn_position_encoding),
      hidden_states=None,
      attentions=None,
    )
    with self._torch.inference_mode():
      return self._done(
        self._call(
          vision_embeds=features,
          text_embeds=text,
          attention_mask=text.mask,
          input_boxes=boxes[0],
          input_boxes_labels=boxes[1],
        )
      )

  def forward(self, pixels: Any, ids: Any) -> Any:
    with self._torch.inference_mode():
      return self._done(self._call(pixel_values=pixels, input_ids=ids[0], attention_mask=ids[1]))

  def end_to_end(self, paths: Sequence[str], phrase: str, threshold: float) -> int:
    """Number of instances kept."""
    from PIL import Image

    images = [Image.open(path).convert("RGB") for path in paths]
    inputs = self.processor(images=images, text=[phrase] * len(images), return_tensors="pt")
    sizes = inputs.pop("original_sizes").tolist()
    with self._torch.inference_mode():
      out = self._call(**{name: self._tensor(value) for name, value in inputs.items()})
      results = self.processor.post_process_instance_segmentation(
        out, threshold=threshold, target_sizes=sizes
      )
    return sum(len(r["masks"].cpu().numpy()) for r in results)

  def logits(self, out: Any) -> np.ndarray:
    return out.pred_logits.float().cpu().numpy()

  def at_resolution(self, side: int) -> Reference:
    """Positions of the global layers are tables for the configured size; rewrites them in place."""
    vit = copy.deepcopy(self._config.vision_config.backbone_config)
    vit.image_size = side
    for layer in self.model.vision_encoder.backbone.layers:
      if layer.window_size == 0:
        table = layer.position_ids
        layer.position_ids = layer.precompute_positions(vit, 0).to(table.device, table.dtype)
    return self


Side = Ours | Reference


def load(workload: Workload, dtype: str) -> list[Side]:
  """Both sides; on a GPU the reference also through torch.compile."""
  reference = Reference(workload, dtype)
  every: list[Side] = [Ours(workload, dtype), reference]
  return [*every, reference.compiled()] if reference._device == "cuda" else every
