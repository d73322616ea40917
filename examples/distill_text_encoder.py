"""Teaches a small text encoder to give a large one's features, and puts it in the large model's place.

    python examples/distill_text_encoder.py [TEACHER [STUDENT [PROMPTS [STEPS]]]]

By default a tiny untrained teacher and phrases made up here, so that it ends in about a minute and shows how
it goes; its masks mean nothing, and as its features are much alike, a high cosine comes cheap. In earnest:
`sam3 s0 noun_phrases.json`, STEPS of 100 passes over the file.
"""

import itertools
import pathlib
import sys

import scene

from sam3lt_jax import from_pretrained
from sam3lt_jax.training.distillation.config import DistillationConfig
from sam3lt_jax.training.distillation.run import distill

TEACHER, STUDENT, STEPS = "random:tiny", "tiny-s1", 60
OUTPUT = "distilled"


def write_phrases(path: pathlib.Path) -> str:
  words = ("small large", "red green blue grey", "circle square car dog cup")
  path.parent.mkdir(exist_ok=True)
  path.write_text("\n".join(map(" ".join, itertools.product(*(w.split() for w in words)))))
  return str(path)


def main(teacher=TEACHER, student=STUDENT, prompts=None, steps=STEPS) -> None:
  config = DistillationConfig(
    teacher=teacher,
    student=student,
    prompts=prompts or write_phrases(pathlib.Path(OUTPUT, "phrases.txt")),
    out=OUTPUT,
    steps=int(steps),
    batch_size=16,
    held_out=0.2 if prompts is None else 0.02,
    lr_rows=None if prompts is None else 512,  # a rate for 512 phrases an update would be slow here
  )
  result = distill(config, images=[scene.draw()], phrases=["red circle", "small blue square"])

  fewer = 1 - result.student_parameters / result.teacher_parameters
  before, after = (x["heldout_cosine"] for x in (result.before, result.after))
  print(f"{fewer:.1%} fewer text parameters, held-out cosine {before:.3f} -> {after:.3f}")
  print(result.agreement)
  print(f"wrote {', '.join(result.written.values())}")
  model, _ = from_pretrained(result.written["model"])  # or result.model, result.variables
  print(f"the student has {model.config.text.num_hidden_layers} layers")


if __name__ == "__main__":
  main(*sys.argv[1:])
