"""What test_sharded.py runs on two devices: in a process of its own, as JAX starts with their number.

python -m tests.training.distillation.sharded_worker DIRECTORY

Prints one JSON object in its last line: for "whole" and "split" the losses, the held-out cosine, and the
bytes of the teacher that the step was given and that its first device holds of it.
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax

from sam3lt_jax import parallel
from sam3lt_jax.training.distillation import run
from sam3lt_jax.training.distillation.config import DistillationConfig
from tests.training.distillation.common import PHRASES, tiny_model, tokenizer


def teacher_bytes(frozen) -> list[int]:
  leaves = jax.tree.leaves(frozen["teacher"])
  first = jax.local_devices()[0]
  held = (s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == first)
  return [sum(x.nbytes for x in leaves), sum(held)]


def distilled(directory: pathlib.Path, split: bool) -> dict:
  config = DistillationConfig(
    prompts=str(directory / "phrases.txt"), out=str(directory / f"split-{split}"), teacher="tiny",
    student="tiny-s1", steps=4, batch_size=16, accumulate=2, held_out=0.2, lr_rows=None, peak_lr=1e-2,
    context_length=8, dtype="float32", log_every=1, shard_teacher=split,
  )  # fmt: skip
  given = []
  call = parallel.JitStep.__call__

  def spy(self, state, frozen, batch):
    given.append(teacher_bytes(frozen))
    return call(self, state, frozen, batch)

  parallel.JitStep.__call__ = spy
  try:
    result = run.distill(config, teacher=tiny_model(), tokenizer=tokenizer(), report=lambda line: None)
  finally:
    parallel.JitStep.__call__ = call
  lines = [
    json.loads(line) for line in (directory / f"split-{split}" / "metrics.jsonl").read_text().split("\n")[:-1]
  ]
  losses = [line["loss"] for line in lines if "loss" in line]
  return {"losses": losses, "cosine": result.after["heldout_cosine"], "bytes": given[-1]}


def main() -> None:
  directory = pathlib.Path(sys.argv[1])
  (directory / "phrases.txt").write_text("\n".join(PHRASES))
  found = {name: distilled(directory, split) for name, split in (("whole", False), ("split", True))}
  print(json.dumps(found | {"devices": jax.device_count()}))


if __name__ == "__main__":
  main()
