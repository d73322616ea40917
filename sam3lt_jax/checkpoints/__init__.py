"""Checkpoints: load any of the known layouts, save our own or transformers'.

`from_pretrained` and `save_pretrained` are the doors. Behind them: `sources` finds the files (`hub` downloads
them), `readers` opens them, `tables` says what belongs where, `engine` applies the tables, `infer` tells
which model the tensors are of.
"""

from sam3lt_jax.checkpoints.errors import CheckpointError, CheckpointMismatchError
from sam3lt_jax.checkpoints.pretrained import from_pretrained, open_checkpoint
from sam3lt_jax.checkpoints.save import save_pretrained
from sam3lt_jax.checkpoints.summary import PartSize, parameter_summary
from sam3lt_jax.checkpoints.tracker import open_tracker, tracker_from_pretrained

__all__ = [
  "CheckpointError",
  "CheckpointMismatchError",
  "PartSize",
  "from_pretrained",
  "open_checkpoint",
  "open_tracker",
  "parameter_summary",
  "save_pretrained",
  "tracker_from_pretrained",
]
