"""The old place of `sam3lt_jax.data`: what imports from here still works, and is told where it is now."""

import importlib
import sys
import warnings

warnings.warn("sam3lt_jax.training.data is sam3lt_jax.data now", DeprecationWarning, stacklevel=2)
for _name in ("augment", "batches", "coco", "examples", "load", "records", "rle", "saco"):
  globals()[_name] = importlib.import_module(f"sam3lt_jax.data.{_name}")
  sys.modules[f"{__name__}.{_name}"] = globals()[_name]
