"""Teaches a small text encoder to give a large one's features, and puts it in the large model's place.

    python examples/distill_text_encoder.py [TEACHER [STUDENT [PROMPTS [STEPS]]]]

By default the bundled model's text encoder, all the phrases that it knows, and a student of a quarter of its
size, so that it ends in about a minute with nothing downloaded. For the real model:
`sam3 s0 noun_phrases.json`, and STEPS for 100 passes over the file.
"""

import dataclasses
import pathlib
import sys

import scene
from shapes import models

from sam3lt_jax import from_pretrained
from sam3lt_jax.shapes.phrases import all_phrases
from sam3lt_jax.training.distillation.config import DistillationConfig
from sam3lt_jax.training.distillation.run import distill

TEACHER, STEPS = "shapes", 600
OUTPUT = "distilled"
# A `TextConfig` of one's own; "s0", "s1" and "l" are the released ones.
STUDENT = dataclasses.replace(
  models.student_config("transformers").text,
  hidden_size=32,
  intermediate_size=96,
  num_hidden_layers=3,
  use_repmixer_blocks=False,
)


def write_phrases(path: pathlib.Path) -> str:
  path.parent.mkdir(exist_ok=True)
  path.write_text("\n".join(all_phrases()))
  return str(path)


def main(teacher=TEACHER, student=STUDENT, prompts=None, steps=STEPS) -> None:
  config = DistillationConfig(
    teacher=teacher,
    student=student,
    prompts=prompts or write_phrases(pathlib.Path(OUTPUT, "phrases.txt")),
    out=OUTPUT,
    steps=int(steps),
  )
  result = distill(config, images=[scene.draw()], phrases=scene.PHRASES)

  before, after = (x["heldout_cosine"] for x in (result.before, result.after))
  print(f"{fewer(result)} text parameters, held-out cosine {before:.3f} -> {after:.3f}")
  print(result.agreement)
  print(f"wrote {', '.join(result.written.values())}")
  model, _ = from_pretrained(result.written["model"])  # or result.model, result.variables
  print(f"the student has {model.config.text.num_hidden_layers} layers")


def fewer(result) -> str:
  share = result.student_parameters / result.teacher_parameters - 1
  return f"{abs(share):.1%} {'fewer' if share < 0 else 'more'}"


if __name__ == "__main__":
  main(*sys.argv[1:])
