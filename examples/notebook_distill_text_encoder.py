# ---
# jupyter:
#   jupytext:
#     cell_markers: '"""'
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
"""
# Distilling a smaller text encoder

A student learns to give the teacher's text features. Then it stands in the teacher's model, and the rest
of the model does not notice. Here the teacher is the bundled model, and the student is about a quarter of
its size. With SAM 3 as the teacher the same lines are the recipe of the SAM3-LiteText paper:
`teacher="facebook/sam3"`, `student="s0"`, and a file of noun phrases.
"""

# %% tags=["install"]
# %pip install -q "sam3lt_jax[train,viz]"

# %%
import dataclasses
import json
import pathlib

import matplotlib.pyplot as plt

from sam3lt_jax import Predictor, from_pretrained
from sam3lt_jax.shapes.phrases import all_phrases
from sam3lt_jax.shapes.scenes import SceneConfig, draw_scene
from sam3lt_jax.training.distillation.config import DistillationConfig
from sam3lt_jax.training.distillation.run import distill

OUT = pathlib.Path("distilled_notebook")
STEPS = 300  # half a minute on two cores

# %% [markdown]
"""
## The student

A text encoder is described by a `TextConfig`. This one is narrower than the teacher's and has fewer
layers.
"""

# %%
teacher, _ = from_pretrained("shapes")
student = dataclasses.replace(
  teacher.config.text,
  hidden_size=32,
  intermediate_size=96,
  num_hidden_layers=3,
  use_repmixer_blocks=False,
)

# %% [markdown]
"""
## The phrases

The teacher reads them, so no picture and no annotation is needed. A tenth is held out to measure.
"""

# %%
OUT.mkdir(exist_ok=True)
phrases = OUT / "phrases.txt"
phrases.write_text("\n".join(all_phrases()))
config = DistillationConfig(
  teacher="shapes", student=student, prompts=str(phrases), out=str(OUT), steps=STEPS
)
result = distill(config)
print(f"text parameters: {result.teacher_parameters:,} -> {result.student_parameters:,}")
print(f"held-out cosine: {result.before['heldout_cosine']:.3f} -> {result.after['heldout_cosine']:.3f}")

# %%
lines = [json.loads(line) for line in (OUT / "metrics.jsonl").read_text().splitlines()]
steps = [line["step"] for line in lines if "loss" in line]
plt.plot(steps, [line["loss"] for line in lines if "loss" in line])
plt.xlabel("step")
plt.ylabel("loss")

# %% [markdown]
"""
## The student in the teacher's place
"""

# %%
photo = draw_scene(3_000_000_183, SceneConfig(480, min_objects=6)).image
predictor = Predictor.from_pretrained(result.written["model"])
predictor(photo, text=["orange star", "black square"])
