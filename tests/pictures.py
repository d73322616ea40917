"""The pictures of README.md and docs/, but for docs/shapes: `python -m tests.pictures [NAME ...]`.

many_prompts   examples/many_prompts_one_image.py with the bundled model
photo          a real photo under that model, which knows shapes only
training       two panels of the curves that training the bundled model left, docs/shapes/teacher.jsonl
app            the page of `sam3lt app`, in headless Chromium, wide and at a phone's width
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import runpy
import sys
import tempfile

from PIL import Image

from sam3lt_jax import Predictor

ROOT = pathlib.Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
SCENE = 1_000_000_006
CURVES = "loss", "eval_f1", "eval_mask_iou", "eval_presence_accuracy"


def many_prompts() -> None:
  sys.path.insert(0, str(ROOT / "examples"))
  script = runpy.run_path(str(ROOT / "examples/many_prompts_one_image.py"))
  with tempfile.TemporaryDirectory() as folder:
    here = os.getcwd()
    os.chdir(folder)
    script["main"]("shapes")
    sheet = Image.open(script["OUTPUT"]).convert("RGB")
    os.chdir(here)
  sheet.resize((1200, 1200 * sheet.height // sheet.width), Image.LANCZOS).save(
    IMAGES / "many_prompts.jpg", quality=82
  )


def photo() -> None:
  found = Predictor.from_pretrained("shapes")(ROOT / "examples/coffee.jpg", text=["white shape"])
  print(found)
  found.render().save(IMAGES / "photo.jpg", quality=85)


def training() -> None:
  from sam3lt_jax.training.curves import plot_run

  lines = map(json.loads, (ROOT / "docs/shapes/teacher.jsonl").read_text().splitlines())
  chosen = [{k: v for k, v in line.items() if k in ("step", *CURVES)} for line in lines]
  with tempfile.TemporaryDirectory() as folder:
    metrics = pathlib.Path(folder, "metrics.jsonl")
    metrics.write_text("".join(json.dumps(line) + "\n" for line in chosen if len(line) > 1))
    plot_run(metrics, IMAGES / "training.png")


def app() -> None:
  from playwright import sync_api

  from tests.app import test_page as page

  predictor = Predictor.from_pretrained("shapes", tracker=True)
  blocks, address = page.serve(predictor, "shapes")
  sync_api.expect.set_options(timeout=page.PATIENCE)
  with sync_api.sync_playwright() as started, tempfile.TemporaryDirectory() as folder:
    browser = started.chromium.launch(executable_path=page.CHROMIUM, args=["--no-sandbox"])
    scene = pathlib.Path(folder, "scene.png")
    Image.fromarray(page.scene(SCENE)).save(scene)
    for name, (width, height) in (("app", page.DESKTOP), ("app_phone", page.PHONE)):
      tab = browser.new_page(viewport={"width": width, "height": height})
      tab.set_default_timeout(page.PATIENCE)
      tab.goto(address)
      page.drop(tab, scene)
      page.find(tab, "striped shape, yellow circle")
      tab.wait_for_selector("#save-json:enabled")
      tab.mouse.click(*page.at(tab, 0.2, 0.4)[0])
      page.says(tab, "Click on what else belongs to object")
      tab.evaluate("window.scrollTo(0, 0)")
      shot = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
      shot.quantize(256, dither=Image.Dither.NONE).save(IMAGES / f"{name}.png", optimize=True)
    browser.close()
  blocks.close()


if __name__ == "__main__":
  made = {f.__name__: f for f in (many_prompts, photo, training, app)}
  for name in sys.argv[1:] or made:
    made[name]()
