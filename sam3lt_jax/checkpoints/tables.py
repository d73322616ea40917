"""The layouts that a checkpoint can come in, each for both text towers, and how to tell them apart.

The rules lie in `table_transformers.py`, `table_original.py`, `table_tracker.py`; `engine.py` applies them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from sam3lt_jax.checkpoints import table_original, table_tracker, table_transformers
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


# ---------------------------------------------------------------- the tracker

_TRACKER_WRAPPERS = _WRAPPERS[:1]
_TRACKER_ALIASES = {
  "original": (
    (r"^(detector\.)?inst_interactive_predictor\.model\.", "tracker."),  # inside an image model
    (r"^backbone\.vision_backbone\.sam2_convs\.", "detector.backbone.vision_backbone.sam2_convs."),
  ),
  # On the hub keys are those of `Sam3VideoModel`. `save_pretrained` of transformers 5.23.0 puts one more
  # `tracker_model.` before them; in memory a tracker alone names its own trunk and neck `vision_encoder`.
  "transformers": (
    (r"^tracker_model\.(?=(tracker_model|tracker_neck|detector_model|vision_encoder)\.)", ""),
    (r"^vision_encoder\.neck\.", "tracker_neck."),
    (r"^(?!detector_model\.|tracker_neck\.|tracker_model\.|vision_encoder\.)", "tracker_model."),
  ),
}
_TRACKER_IGNORED = {
  "original": ((r"(?!tracker\.|detector\.backbone\.vision_backbone\.sam2_convs\.).*", "the image model"),),
  "transformers": (
    (r"(detector_model|vision_encoder)\..*", "the image model"),
    (r"(.*\.)?(inv_freq|original_inv_freq|position_ids)", "derived from the sizes"),
  ),
}
_TRACKER_MARKS = {
  "original": r"(tracker|(detector\.)?inst_interactive_predictor\.model)\.sam_mask_decoder\.",
  "transformers": r"(tracker_model\.)*mask_decoder\.(obj_score_token|transformer)\.",
}
# SAM 3.1 follows sixteen objects in one pass, with other sizes and another memory.
_MULTIPLEX = r"(tracker\.model|.*(interactive|propagation)_convs)\."
WHERE_TRACKERS_ARE = (
  "SAM 3's tracker fits every SAM3-LiteText model: it is in the authors' .pt files of SAM3-LiteText and of "
  "SAM 3, and in the directory 'facebook/sam3' (transformers), not in transformers' SAM3-LiteText directories"
)


@functools.cache
def tracker_layout(name: str) -> Layout:
  """The layout `name` ("transformers" or "original") of a tracker, memory included.

  Raises:
    ValueError: another name.
  """
  rules = {
    "transformers": table_tracker.TRANSFORMERS_IMAGE + table_tracker.TRANSFORMERS_MEMORY,
    "original": table_tracker.ORIGINAL_IMAGE + table_tracker.ORIGINAL_MEMORY,
  }
  if name not in rules:
    raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {name!r}")
  return Layout(
    name,
    "",
    rules[name],
    _WRAPPERS_IGNORED + _TRACKER_IGNORED[name],
    _TRACKER_WRAPPERS + _TRACKER_ALIASES[name],
  )


def detect_tracker(keys: Iterable[str], where: str) -> Layout:
  """The layout of the tracker among `keys`. `where` names the file in the error.

  Raises:
    CheckpointError: there is none, or it is SAM 3.1's; says where to find one.
  """
  names = [substitute(key, _TRACKER_WRAPPERS) for key in keys]
  if foreign := next((key for key in names if re.match(_MULTIPLEX, key)), None):
    raise CheckpointError(
      f"{where} holds SAM 3.1's tracker ({foreign}), which is another model; {WHERE_TRACKERS_ARE}"
    )
  for name, mark in _TRACKER_MARKS.items():
    if any(re.match(mark, key) for key in names):
      return tracker_layout(name)
  raise CheckpointError(
    f"{where} holds no tracker: none of its {len(names)} keys belongs to one; {WHERE_TRACKERS_ARE}"
  )
