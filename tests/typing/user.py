"""A user's script, for the type checker alone: it must find nothing here but what a line says."""

from typing import assert_type

import numpy as np
from PIL import Image

from sam3lt_jax import Predictor, Results, Sam3Processor, SamPredictor, from_pretrained, save_pretrained
from sam3lt_jax.processing.results import Instance

predictor = Predictor.from_pretrained("shapes", device="gpu:1", image_size=504, dtype="bfloat16")
photo = np.zeros((60, 90, 3), np.uint8)

assert_type(predictor("a.jpg", text="dog"), Results)
assert_type(predictor(photo, ["dog", "cat"], boxes=[[1, 2, 3, 4]], box_labels=[1]), Results)
assert_type(predictor(Image.open("a.jpg"), boxes=np.zeros((2, 4))), Results)
assert_type(predictor(["a.jpg", "b.jpg"], text="dog"), list[Results])
assert_type(predictor([photo, photo], [["dog"], ["cat", "bus"]], boxes=[[[1, 2, 3, 4]], None]), list[Results])

results = predictor.set_image("a.jpg").predict("dog", threshold=0.4)
assert_type(results, Results)
assert_type(results[0], Instance)
assert_type(results[np.int64(0)], Instance)
assert_type(results[1:], Results)
assert_type(results[results.scores > 0.5], Results)
assert_type(results[[0, 2]], Results)
assert_type([one.label for one in results], list[str])
assert_type(predictor.predict(points=[[1, 2]], point_labels=[1], box=(1, 2, 3, 4)), Results)
assert_type(predictor.refine(results, 0, points=[3, 4]), Results)
for found in predictor.stream(["a.jpg"], text=["dog"], mask_threshold=0.3):
  assert_type(found, Results)

model, variables = from_pretrained("shapes")
save_pretrained("out", model, variables, format="transformers")
Predictor(model, variables, Sam3Processor(model.config), prompt_buckets=(1, 4))
SamPredictor(predictor).set_image(photo)

predictor.predict(txt="dog")  # error: No parameter named "txt"
predictor("a.jpg", txt="dog")  # error: No overloads for "__call__"
predictor.stream(["a.jpg"], "dog", conf=0.5)  # error: No parameter named "conf"
predictor.predict("dog", threshold="high")  # error: cannot be assigned to parameter "threshold"
predictor.predict(text=3)  # error: cannot be assigned to parameter "text"
Predictor.from_pretrained("s0", device_map="auto")  # error: No parameter named "device_map"
Predictor.from_pretrained("s0", image_buckets="all")  # error: cannot be assigned to parameter "image_buckets"
Predictor(model, variables, tracker=True)  # error: cannot be assigned to parameter "tracker"
from_pretrained("s0", torch_dtype="float16")  # error: No parameter named "torch_dtype"
print(results.bxoes)  # error: Cannot access attribute "bxoes"
print(predictor("a.jpg")[0].maks)  # error: Cannot access attribute "maks"
