"""The PyTorch reference (transformers' SAM3 classes) made importable, randomised and read out stage by stage.

Source: transformers 5.23.0 `modeling_sam3_lite_text.py` and `modeling_sam3.py`.
"""

from __future__ import annotations

import functools
import gc
import math
import sys
import types
from typing import Any

import numpy as np

_NAMES = (
  "Sam3LiteTextConfig", "Sam3LiteTextModel", "Sam3Config", "Sam3Model", "Sam3Processor", "CLIPTextConfig",
  "CLIPTextModelWithProjection",
)  # fmt: skip
# Schemas that torchvision registers meta kernels for at import, whether or not its library loaded.
_OPERATORS = ("nms", "qnms")
_libraries = []  # torch.library.Library objects undo their definitions when collected


@functools.cache
def import_reference() -> types.SimpleNamespace:
  """Imports torch, torchvision and transformers' SAM3 classes.

  On a torch whose version torchvision's compiled operators do not fit, `import torchvision` fails; here its
  Python RoIAlign then runs in their place. (Beyond the border it differs from the compiled one: a sample
  below -1 or above H is not zero.) Where the operators load, nothing is changed.

  Returns:
    A namespace with `torch`, `transformers`, `compiled_ops` (bool) and the classes used here by name.

  Raises:
    ImportError: torch, torchvision or transformers is missing, with what to install.
  """
  try:
    import torch

    compiled = _import_torchvision()
    import transformers
  except ImportError as e:
    raise ImportError(
      f"comparing with the PyTorch reference needs torch, torchvision and transformers==5.23.0 ({e}): "
      "pip install 'sam3lt_jax[verify]' brings them, on Linux with gigabytes of CUDA libraries; builds of "
      "torch and torchvision for the CPU, installed before, are enough"
    ) from e
  classes = {name: getattr(transformers, name) for name in _NAMES}
  return types.SimpleNamespace(torch=torch, transformers=transformers, compiled_ops=compiled, **classes)


def _import_torchvision() -> bool:
  """Imports torchvision, with stand-ins where its operators do not load. True: its own operators."""
  import torch

  try:
    import torchvision
  except RuntimeError as e:
    if "torchvision::" not in str(e):
      raise
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
      del sys.modules[name]  # half imported
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
      library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
    import torchvision
  if torchvision.extension._has_ops():
    return True
  # `torchvision.ops.roi_align` is the function; the module of that name is reached through sys.modules.
  module = sys.modules["torchvision.ops.roi_align"]
  # What `lazy_compile` wrapped: the same as decorating with an identity, without inductor's compilation.
  module._roi_align = getattr(module._roi_align, "__wrapped__", module._roi_align)
  return False


def build_model(config: Any) -> Any:
  """The transformers model of `config` (SAM3-LiteText or SAM 3) in eval mode, freshly initialised."""
  ref = import_reference()
  cls = ref.Sam3Model if config.model_type == "sam3" else ref.Sam3LiteTextModel
  return cls(config).eval()


def load_model(source: str) -> Any:
  """A transformers directory as its reference model, float32, eval mode."""
  ref = import_reference()
  config = ref.transformers.AutoConfig.from_pretrained(source)
  cls = ref.Sam3Model if config.model_type in ("sam3", "sam3_video") else ref.Sam3LiteTextModel
  return cls.from_pretrained(source, dtype=ref.torch.float32).eval()


def randomise_(model: Any, seed: int) -> Any:
  """Gives every parameter, statistic of a BatchNorm and matrix of positions a value that outputs depend on.

  In place; returns `model`.

  transformers draws layer scales of 1e-5, zero biases, unit norms and 0/1 statistics, behind which mistakes
  hide. Scales are chosen so that activations stay of order 1 to 15 through the whole depth.
  """
  torch = import_reference().torch
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    done = set()
    for path, module in model.named_modules():
      for name, tensor in _own_tensors(module):
        if id(tensor) in done:
          continue
        done.add(id(tensor))
        mean, scale = _distribution(path, module, name, tensor)
        noise = torch.rand if name == "running_var" else torch.randn
        value = noise(tensor.shape, generator=generator).mul_(scale).add_(mean)
        if isinstance(module, _norms(torch)) and name == "weight":
          value = value.clamp_(mean - 0.6, mean + 0.6)  # a norm scale near zero would switch its channel off
        tensor.copy_(value)
    for module in model.modules():  # a tracker's matrix that codes points: a weight, if no parameter
      if (matrix := dict(module.named_buffers(recurse=False)).get("positional_embedding")) is not None:
        matrix.copy_(torch.randn(matrix.shape, generator=generator))
  return model


def _norms(torch: Any) -> tuple[type, ...]:
  return (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.modules.batchnorm._BatchNorm)


def _own_tensors(module: Any) -> list[tuple[str, Any]]:
  """The parameters and statistics that `module` itself holds, without derived buffers (positions, RoPE)."""
  tensors = list(module.named_parameters(recurse=False))
  buffers = dict(module.named_buffers(recurse=False))
  return tensors + [(n, buffers[n]) for n in ("running_mean", "running_var") if buffers.get(n) is not None]


# Gains of single layers, by the end of their path. The default of a layer is 1.
_GAINS = {
  "o_proj": 0.7,  # residual branches: 32 of them add up
  "out_proj": 0.7,
  "mlp.fc2": 0.7,
  "q_proj": 1.4,  # attention that prefers some keys
  "k_proj": 1.4,
  "dot_product_scoring.text_proj": 2.0,
  "dot_product_scoring.query_proj": 2.0,
  "presence_head.layer3": 2.0,
  "box_rpb_embed_x.layer2": 2.0,
  "box_rpb_embed_y.layer2": 2.0,
  "mask_decoder.semantic_projection": 3.0,
}


def _distribution(path: str, module: Any, name: str, tensor: Any) -> tuple[float, float]:
  """(mean, scale) of one tensor of `module`, which lies at `path` in the model."""
  torch = import_reference().torch
  if isinstance(module, _norms(torch)):
    return {"weight": (1.0, 0.3), "bias": (0.0, 0.2), "running_mean": (0.0, 0.3), "running_var": (0.5, 1.5)}[
      name
    ]
  if isinstance(module, torch.nn.Embedding):
    return 0.0, 1.0
  if name == "layer_scale":
    return 0.5, 0.1
  if name == "bias":
    return 0.0, 0.2
  if tensor.ndim < 2 or "position_embedding" in name:
    return 0.0, 0.5
  gain = next((g for end, g in _GAINS.items() if path.endswith(end)), 1.0)
  if path.endswith("mask_embedder.layers.2"):  # a mask logit sums one product a channel
    gain = 4.0 / math.sqrt(tensor.shape[0])
  if isinstance(module, torch.nn.ConvTranspose2d):
    fan_in = tensor.shape[0]  # stride = kernel: one tap an output
  else:
    fan_in = tensor[0].numel()
  return 0.0, gain / math.sqrt(fan_in)


def run_stages(model: Any, inputs: dict[str, np.ndarray], *, delete: bool = False) -> dict[str, np.ndarray]:
  """Runs the reference once and reads out its stages under the names of our intermediates.

  Args:
    model: from `build_model` or `load_model`.
    inputs: `pixel_values` [B, H, W, 3] (channels last, as here), `input_ids`, `attention_mask` [B, T] and
      optionally `input_boxes` [B, N, 4] normalised cxcywh with `input_boxes_labels` [B, N].
    delete: drop the model's parameters afterwards, to make room for what runs next.

  Returns:
    float32 arrays: vit_block_{i} [B, h, w, D], neck_{i} [B, h, w, C], text_embeddings and text_block_{i}
    [B, T, width], text_features [B, T, C],
    prompt_tokens [B, L, C], prompt_mask [B, L] bool, encoder_output [B, S, C], decoder_hidden_states
    [layers, B, Q, C], decoder_boxes [layers, B, Q, 4] cxcywh as predicted *by* each layer, decoder_logits
    [layers, B, Q], decoder_presence_logits [layers, B, 1], pixel_embed [B, h, w, C], and the outputs
    pred_masks, pred_boxes, pred_logits, presence_logits, semantic_seg in the reference's own layout.
  """
  torch = import_reference().torch
  tensors = {k: torch.from_numpy(np.array(v)) for k, v in inputs.items() if v is not None}
  tensors["pixel_values"] = tensors["pixel_values"].permute(0, 3, 1, 2).contiguous()
  for name in ("input_ids", "attention_mask", "input_boxes_labels"):
    if name in tensors:
      tensors[name] = tensors[name].long()
  stages: dict[str, np.ndarray] = {}
  hooks = _stage_hooks(model, stages)
  try:
    with torch.no_grad():
      out = model(**tensors)
  finally:
    for hook in hooks:
      hook.remove()
  for name in ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg"):
    stages[name] = _numpy(getattr(out, name))
  if delete:
    model.to("meta")
    del out, tensors
    gc.collect()
  return stages


def _numpy(x: Any) -> np.ndarray:
  x = x.detach()
  return (x if x.dtype == import_reference().torch.bool else x.float()).cpu().numpy().copy()


def _stage_hooks(model: Any, stages: dict[str, np.ndarray]) -> list[Any]:
  hooks = []

  def on(module, function):
    hooks.append(module.register_forward_hook(function, with_kwargs=True))

  for i, layer in enumerate(model.vision_encoder.backbone.layers):
    on(layer, lambda m, a, k, out, i=i: stages.update({f"vit_block_{i}": _numpy(_first(out))}))

  text = getattr(model.text_encoder, "text_model", model.text_encoder)  # SAM 3's is a CLIP model
  on(text.embeddings, lambda m, a, k, out: stages.update(text_embeddings=_numpy(out)))
  for i, layer in enumerate(getattr(text, "encoder", text).layers):
    on(layer, lambda m, a, k, out, i=i: stages.update({f"text_block_{i}": _numpy(_first(out))}))

  def neck(_module, _args, _kwargs, out):
    for i, level in enumerate(out[0]):
      stages[f"neck_{i}"] = _numpy(level.permute(0, 2, 3, 1))

  def encoder(_module, _args, kwargs, out):
    stages["prompt_tokens"] = _numpy(kwargs["text_features"])
    if kwargs.get("text_mask") is not None:
      stages["prompt_mask"] = _numpy(kwargs["text_mask"])
    stages["encoder_output"] = _numpy(out.last_hidden_state)

  def decoder(module, _args, _kwargs, out):
    torch = import_reference().torch
    stages["decoder_hidden_states"] = _numpy(out.intermediate_hidden_states)
    stages["decoder_presence_logits"] = _numpy(out.presence_logits)
    # The output's boxes are those that go *into* each layer; what a layer predicts is one step later.
    boxes = out.reference_boxes.clamp(0, 1)
    logit = torch.log(boxes.clamp(min=1e-3) / (1 - boxes).clamp(min=1e-3))
    stages["decoder_boxes"] = _numpy((logit + module.box_head(out.intermediate_hidden_states)).sigmoid())

  def scoring(_module, _args, _kwargs, out):
    stages["decoder_logits"] = _numpy(out.squeeze(-1))

  def pixels(_module, _args, _kwargs, out):
    stages["pixel_embed"] = _numpy(out.permute(0, 2, 3, 1))

  on(model.vision_encoder.neck, neck)
  on(model.text_projection, lambda m, a, k, out: stages.update(text_features=_numpy(out)))
  on(model.detr_encoder, encoder)
  on(model.detr_decoder, decoder)
  on(model.dot_product_scoring, scoring)
  on(model.mask_decoder.pixel_decoder, pixels)
  return hooks


def _first(out: Any) -> Any:
  return out[0] if isinstance(out, tuple) else out
