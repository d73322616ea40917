"""SAM3-LiteText in pure JAX/Flax: find, segment and score all that matches a phrase or example boxes.

    from sam3lt_jax import Predictor
    predictor = Predictor.from_pretrained("s0")
    predictor("street.jpg", text=["yellow school bus"]).render("street.jpg").save("overlay.png")

Glossary of axes, used in every signature: B images, P prompts, T tokens (or queries inside attention),
S keys (or image side in pixels), N boxes (or heads inside attention), L prompt tokens, Q object queries,
H, W (h, w) rows and columns, D width, C channels.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names, for checkers and editors
  from sam3lt_jax.checkpoints import from_pretrained as from_pretrained
  from sam3lt_jax.checkpoints import save_pretrained as save_pretrained
  from sam3lt_jax.checkpoints import tracker_from_pretrained as tracker_from_pretrained
  from sam3lt_jax.config import Profile as Profile
  from sam3lt_jax.config import Sam3LiteTextConfig as Sam3LiteTextConfig
  from sam3lt_jax.config import TrackerConfig as TrackerConfig
  from sam3lt_jax.config import TrackerProfile as TrackerProfile
  from sam3lt_jax.everything import SamAutomaticMaskGenerator as SamAutomaticMaskGenerator
  from sam3lt_jax.features import TextFeatures as TextFeatures
  from sam3lt_jax.features import VisionFeatures as VisionFeatures
  from sam3lt_jax.interactive import SamPredictor as SamPredictor
  from sam3lt_jax.model import Sam3LiteText as Sam3LiteText
  from sam3lt_jax.model import Sam3LiteTextOutput as Sam3LiteTextOutput
  from sam3lt_jax.predictor import Predictor as Predictor
  from sam3lt_jax.processing.processor import Sam3Processor as Sam3Processor
  from sam3lt_jax.processing.results import Results as Results
  from sam3lt_jax.processing.tracker_processor import Sam3TrackerProcessor as Sam3TrackerProcessor
  from sam3lt_jax.tracker import Sam3Tracker as Sam3Tracker
  from sam3lt_jax.tracker import Sam3TrackerOutput as Sam3TrackerOutput
  from sam3lt_jax.video.predictor import VideoPredictor as VideoPredictor

# Names are resolved on first use, so that importing the package stays fast and touches no device.
_MODULES = {
  "checkpoints": "from_pretrained save_pretrained tracker_from_pretrained",
  "config": "Profile Sam3LiteTextConfig TrackerConfig TrackerProfile",
  "everything": "SamAutomaticMaskGenerator",
  "features": "TextFeatures VisionFeatures",
  "interactive": "SamPredictor",
  "model": "Sam3LiteText Sam3LiteTextOutput",
  "predictor": "Predictor",
  "processing.processor": "Sam3Processor",
  "processing.results": "Results",
  "processing.tracker_processor": "Sam3TrackerProcessor",
  "tracker": "Sam3Tracker Sam3TrackerOutput",
  "video.predictor": "VideoPredictor",
}
_EXPORTS = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = sorted([*_EXPORTS, "__version__"])


def __getattr__(name: str):
  if name not in _EXPORTS:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
  globals()[name] = value
  return value


def __dir__():
  return sorted([*globals(), *_EXPORTS])
