"""The layouts that a checkpoint can come in, each for both text towers, and how to tell them apart.

The rules lie in `table_transformers.py` and `table_original.py`; `engine.py` applies them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from sam3lt_jax.checkpoints import table_original, table_transformers
from sam3lt_jax.checkpoints.errors import CheckpointError
from sam3lt_jax.checkpoints.rules import Layout, substitute

LAYOUTS = ("transformers", "original")

# What wraps a model puts its name before the keys, or, where it wraps a part, into them:
# DistributedDataParallel and AveragedModel, torch.compile, FSDP, checkpointed layers, Lightning's strategies.
# Trainers keep the model as a part of theirs.
_WRAPPERS = (
  (r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.", ""),
  (r"^((model|network|net|state_dict)\.)+", ""),
)
_WRAPPERS_IGNORED = ((r"n_averaged", "AveragedModel's count of updates"),)
_TRANSFORMERS_IGNORED = (
  (r"tracker_(model|neck)\..*", "the tracker of a video checkpoint"),
  (r"text_encoder\.(text_model\.)?embeddings\.position_ids", "a buffer of older versions: 0, 1, 2, ..."),
  (r"vision_encoder\.backbone\.layers\.\d+\.rotary_emb\.\w+", "RoPE, derived from the sizes"),
  (r"(.*\.)?inv_freq", "RoPE, derived from the sizes"),
)
_TRANSFORMERS_ALIASES = ((r"^detector_model\.", ""),)  # inside a video checkpoint
# CLIPTextModelWithProjection with or without its inner `text_model`.
_CLIP_ALIASES = ((r"^text_encoder\.(?=(embeddings|encoder|final_layer_norm)\.)", "text_encoder.text_model."),)
_ORIGINAL_IGNORED = (
  (
    r"backbone\.vision_backbone\.trunk\.blocks\.\d+\.attn\.freqs_cis(_real|_imag)?",
    "RoPE, derived from the sizes",
  ),
  (r"backbone\.vision_backbone\.sam2_convs\..*", "a second neck, for the tracker"),
  (
    r"geometry_encoder\.points_(direct|pool|pos_enc)_project\.\w+",
    "point prompts, which the detector does not take",
  ),
  (r"(tracker|inst_interactive_predictor)\..*", "the tracker"),
)
_ORIGINAL_ALIASES = (
  (r"^detector\.", ""),
  # Left by an image encoder's distillation; the authors' loader strips it as well.
  (r"(?<![^.])student_trunk\.", ""),
)


@functools.cache
def layout(name: str, text_kind: str = "mobileclip") -> Layout:
  """The layout `name` ("transformers" or "original") of a model whose text tower is `text_kind`.

  Raises:
    ValueError: another name or kind.
  """
  if text_kind not in ("mobileclip", "clip"):
    raise ValueError(f"text_kind must be 'mobileclip' or 'clip', got {text_kind!r}")
  clip = text_kind == "clip"
  if name == "transformers":
    text = table_transformers.CLIP if clip else table_transformers.MOBILECLIP
    aliases = _WRAPPERS + _TRANSFORMERS_ALIASES + (_CLIP_ALIASES if clip else ())
    ignored = _WRAPPERS_IGNORED + _TRANSFORMERS_IGNORED
    return Layout(name, text_kind, table_transformers.DETECTOR + text, ignored, aliases)
  if name == "original":
    text = table_original.CLIP if clip else table_original.MOBILECLIP
    rules = table_original.DETECTOR + text
    ignored, aliases = _WRAPPERS_IGNORED + _ORIGINAL_IGNORED, _WRAPPERS + _ORIGINAL_ALIASES
    return Layout(name, text_kind, rules, ignored, aliases, prefix="detector.")
  raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {name!r}")


_MARKS = {
  "transformers": r"(detector_model\.)?(vision_encoder|text_encoder|text_projection|detr_(en|de)coder)\.",
  "original": r"(detector\.)?(backbone\.(vision|language)_backbone|segmentation_head|dot_prod_scoring)\.",
}
_CLIP_MARKS = {
  "transformers": r"(detector_model\.)?text_encoder\.(text_model\.|encoder\.layers\.|text_projection\.)",
  "original": r"(detector\.)?backbone\.language_backbone\.(encoder\.transformer\.resblocks|resizer)\.",
}


def detect(keys: Iterable[str], where: str) -> Layout:
  """The layout that `keys` are written in. `where` names the file in the error.

  Raises:
    CheckpointError: the keys are of neither layout.
  """
  keys = list(keys)
  names = [substitute(key, _WRAPPERS) for key in keys]
  for name in LAYOUTS:
    if any(re.match(_MARKS[name], key) for key in names):
      clip = any(re.match(_CLIP_MARKS[name], key) for key in names)
      return layout(name, "clip" if clip else "mobileclip")
  shown = ", ".join(keys[:5]) + (", ..." if len(keys) > 5 else "")
  raise CheckpointError(
    f"{where} holds no SAM3-LiteText detector: none of its {len(keys)} keys is in a known layout ({shown})"
  )
