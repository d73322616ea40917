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
# Phrases and boxes

You name a thing, and you get a mask, a box and a score for every instance of it. This notebook runs with
the small model that comes with the package, on drawn scenes. For photos set `MODEL = "s0"` below; that
downloads about 2 GB.
"""

# %% tags=["install"]
# %pip install -q "sam3lt_jax[viz]"

# %%
import json

import matplotlib.pyplot as plt

from sam3lt_jax import Predictor, Results
from sam3lt_jax.shapes.scenes import SceneConfig, draw_scene

MODEL = "shapes"
photo = draw_scene(3_000_000_183, SceneConfig(480, min_objects=6)).image  # or the path of a photo, with "s0"
predictor = Predictor.from_pretrained(MODEL)

# %% [markdown]
"""
## Ask by a phrase

The first call compiles the model. What a cell returns shows itself: the picture and a table.
"""

# %%
results = predictor(photo, text=["orange star", "black square"])
results

# %% [markdown]
"""
## Ask by an example

The image is encoded once by `set_image`. Then each question is cheap. A box says "like this"; with a
label of 0 it says "not like this".
"""

# %%
predictor.set_image(photo)
predictor.predict(boxes=[[96, 17, 237, 154]])

# %%
predictor.predict(text="shape", boxes=[[349, 281, 446, 378]], box_labels=[0])

# %% [markdown]
"""
## Work with what was found
"""

# %%
shapes = predictor.predict(text="shape")
best = shapes[shapes.scores > 0.85]
best.to_pandas()

# %%
print(best.to_yolo()[:60], "...")
assert len(Results.from_coco(json.loads(best.to_json()))) == len(best)

# %% [markdown]
"""
The bundled model knows 945 phrases and says so:
"""

# %%
if MODEL == "shapes":
  try:
    predictor.predict(text="dog")
  except ValueError as e:
    print(e)

# %% [markdown]
"""
## Pictures

`plot` draws on matplotlib axes, `save` writes a file, and options choose what is drawn.
"""

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 5))
shapes.plot(axes[0])
shapes.plot(axes[1], labels=False, scores=False, opacity=0.5)
