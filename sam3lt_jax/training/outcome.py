"""What a finished run leaves in its directory."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax

from sam3lt_jax import storage
from sam3lt_jax.checkpoints import CheckpointError, save_pretrained
from sam3lt_jax.checkpoints.save import OtherRules, transformers_note
from sam3lt_jax.model import Sam3LiteText, Variables
from sam3lt_jax.training.run_files import checkpoint_steps


def write_outcome(
  directory: str | os.PathLike,
  model: Sam3LiteText,
  variables: Variables,
  numbers: Mapping[str, Any],
  *,
  name: str,
  title: str,
  tokenizer: Any = None,
  report: Callable[[str], Any] = print,
) -> dict[str, str]:
  """Writes model/ (our format), transformers/ (theirs), `name`.json with `numbers`, and curves.png.

  Under several processes all of them call it, and the first one writes.

  Args:
    title: of the plot of metrics.jsonl. Without matplotlib there is none, and `report` is told.
    tokenizer: see `save_pretrained`.

  Returns:
    "model", "transformers", "numbers", "plot" -> path; of the first process only.

  Raises:
    CheckpointError: the disk is full; the sentence names the checkpoint from which the same run, started
      again, writes its models. Errors of `save_pretrained` come as they are.
  """
  directory = os.fspath(directory)
  written = {}
  for part, format in (("model", "orbax"), ("transformers", "transformers")):
    written[part] = os.path.join(directory, part)
    with _room(written[part]), warnings.catch_warnings():
      warnings.simplefilter("ignore", OtherRules)
      save_pretrained(written[part], model, variables, format=format, tokenizer=tokenizer, overwrite=True)
  if note := transformers_note(model.config):
    report(f"{written['transformers']}: {note}")
  if jax.process_index():
    return {}
  written["numbers"] = os.path.join(directory, f"{name}.json")
  with _room(written["numbers"]):
    storage.write(written["numbers"], json.dumps(dict(numbers), indent=2) + "\n")
  try:
    from sam3lt_jax.training.curves import plot_run

    written["plot"] = os.path.join(directory, "curves.png")
    with _room(written["plot"]):
      plot_run(os.path.join(directory, "metrics.jsonl"), written["plot"], title)
  except ImportError as e:
    del written["plot"]
    report(f"no plot: {e}")
  return written


def _room(path: str) -> contextlib.AbstractContextManager:
  """As `storage.writing`; of `save_pretrained`, which says it itself, it says where the run is kept."""
  run = os.path.dirname(path)
  steps = checkpoint_steps(run)
  kept = "make room and write it again"
  if steps:
    kept = (
      f"the run is kept in {os.path.join(run, 'checkpoints', str(steps[-1]))}: make room and start it again,"
      " which only writes its models"
    )
  return storage.writing(path, kept, CheckpointError)
