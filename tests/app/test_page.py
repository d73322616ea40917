"""The page in a real browser, headless: what a visitor sees, clicks and downloads."""

import base64
import importlib.util
import json
import shutil
import socket

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lt_jax import Predictor
from sam3lt_jax.processing.results import Results
from sam3lt_jax.shapes.scenes import SceneConfig, draw_scene
from tests.app import common

playwright = pytest.importorskip(
  "playwright.sync_api", reason="drives a browser with playwright: pip install it"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
  pytest.mark.full,
  pytest.mark.skipif(  # not imported to see: that takes four seconds, of every worker
    importlib.util.find_spec("gradio") is None,
    reason="the page needs gradio: pip install 'sam3lt_jax[app]'",
  ),
  pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium on the PATH (Debian: apt-get install chromium)"
  ),
]
PATIENCE = 120_000  # ms: compiling is slow
DESKTOP, PHONE = (1280, 860), (390, 844)
PHRASES = "striped shape, star"
SEEDS = 1_000_000_007, 1_000_000_011


@pytest.fixture(scope="module")
def browser():
  playwright.expect.set_options(timeout=PATIENCE)
  with playwright.sync_playwright() as started:
    made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield made
    made.close()


def serve(predictor, model, example=None):
  from sam3lt_jax.app import page

  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  blocks = page.Page(predictor, model, example).blocks
  return blocks, page.launch(blocks, "127.0.0.1", port)


@pytest.fixture(scope="module")
def shapes():
  """(predictor, address) of the bundled model, which has no tracker."""
  predictor = Predictor.from_pretrained("shapes")
  blocks, address = serve(predictor, "shapes", ("example.png", scene(SEEDS[0])))
  yield predictor, address
  blocks.close()


@pytest.fixture(scope="module")
def tiny():
  """(predictor, address) of random weights with a tracker."""
  blocks, address = serve(common.predictor(), "tiny")
  yield common.predictor(), address
  blocks.close()


@pytest.fixture
def visit(browser):
  """A function that opens a page as another visitor; asks nothing of other machines."""
  contexts, elsewhere = [], []

  def opened(address, size=DESKTOP):
    context = browser.new_context(
      viewport={"width": size[0], "height": size[1]}, has_touch=size is PHONE, accept_downloads=True
    )
    contexts.append(context)
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE)
    tab.on(
      "request",
      lambda r: None if r.url.startswith((address, "data:", "blob:")) else elsewhere.append(r.url),
    )
    tab.on("pageerror", lambda e: elsewhere.append(str(e)))
    tab.goto(address)
    says(tab, "Drop a photo to begin")
    return tab

  yield opened
  for context in contexts:
    context.close()
  assert elsewhere == []


def scene(seed):
  return draw_scene(seed, SceneConfig(side=480)).image


def says(tab, text):
  playwright.expect(tab.locator("#hint")).to_contain_text(text)


def drop(tab, path):
  """Opens a photo where there is none yet."""
  tab.set_input_files("#drop input[type=file]", path)
  tab.wait_for_selector(".stage img[src^=data]")
  return tab


@pytest.fixture
def photos(tmp_path):
  paths = []
  for seed in SEEDS:
    paths.append(tmp_path / f"scene_{seed}.png")
    Image.fromarray(scene(seed)).save(paths[-1])
  return paths


def find(tab, text):
  tab.fill("#phrases textarea", text)
  tab.keyboard.press("Enter")


def choose(tab, tool):
  tab.locator(f"#tool input[value={tool}]").check(force=True)


def at(tab, fx, fy):
  """Whole pixels of the window near a place of the picture, and what fractions of it they are."""
  tab.locator(".stage img").scroll_into_view_if_needed()
  box = tab.locator(".stage img").bounding_box()
  x, y = round(box["x"] + fx * box["width"]), round(box["y"] + fy * box["height"])
  return (x, y), ((x - box["x"]) / box["width"], (y - box["y"]) / box["height"])


def drag(tab, start, end):
  """Draws a box on the picture; returns the fractions that it spans."""
  (x1, y1), f1 = at(tab, *start)
  (x2, y2), f2 = at(tab, *end)
  tab.mouse.move(x1, y1)
  tab.mouse.down()
  tab.mouse.move((x1 + x2) / 2, (y1 + y2) / 2)
  playwright.expect(tab.locator(".band.box")).to_be_visible()
  tab.mouse.move(x2, y2)
  tab.mouse.up()
  return (*f1, *f2)


def download(tab, kind):
  with tab.expect_download() as waiting:
    tab.click(f"#save-{kind}")
  return waiting.value


def coco(tab) -> Results:
  """What the JSON file says, as results."""
  with open(download(tab, "json").path(), encoding="utf-8") as f:
    data = json.load(f)
  names = {category["id"]: category["name"] for category in data["categories"]}
  found, (photo,) = data["annotations"], data["images"]
  return Results(
    [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in found)],
    [a["score"] for a in found],
    np.stack([coco_mask.decode(a["segmentation"]) for a in found]).astype(bool),
    tuple(names[a["category_id"]] for a in found),
    (photo["height"], photo["width"]),
  )


def alike(found, wanted, pixels=0.0):
  assert found.labels == wanted.labels and len(found) > 0
  np.testing.assert_allclose(found.scores, wanted.scores, atol=2e-3 if pixels else 1e-6)
  assert (found.masks != wanted.masks).mean() <= pixels


def test_a_phrase_and_the_downloads(shapes, visit, photos, tmp_path):
  predictor, address = shapes
  tab = drop(visit(address), photos[0])
  assert tab.is_disabled("#save-json") and tab.is_disabled("#undo")
  find(tab, PHRASES)
  wanted = predictor(photos[0], text=PHRASES.split(", "))
  says(tab, f"{len(wanted)} found")
  alike(coco(tab), wanted)
  masks = download(tab, "masks")
  assert masks.suggested_filename == f"{photos[0].stem}_masks.png"
  np.testing.assert_array_equal(np.asarray(Image.open(masks.path())), wanted.label_map())
  overlay = download(tab, "overlay")
  assert overlay.suggested_filename == f"{photos[0].stem}_overlay.png"
  np.testing.assert_array_equal(Image.open(overlay.path()), wanted.render(photos[0], scale="auto"))


def test_a_box_is_an_example_and_undo_takes_it_back(shapes, visit, photos):
  predictor, address = shapes
  tab = drop(visit(address), photos[0])
  bare = tab.get_attribute(".stage img", "src")
  says(tab, "Drag a box around an example")
  thing = draw_scene(SEEDS[0], SceneConfig(side=480)).objects[0]
  x1, y1, x2, y2 = (v / 480 for v in thing.box)
  box = drag(tab, (x2, y1), (x1, y2))  # any corner first
  says(tab, " found.")
  box = np.array(box).reshape(2, 2) * 480
  corners = [*box.min(axis=0), *box.max(axis=0)]
  alike(coco(tab), predictor.predict(boxes=[corners], image=predictor.encode(photos[0])), pixels=1e-3)
  choose(tab, "pick")
  says(tab, "Click on a found object to choose it")
  tab.mouse.click(*at(tab, *np.argwhere(thing.mask).mean(axis=0)[::-1] / 480)[0])
  says(tab, "You chose object 1")
  tab.mouse.click(*at(tab, 0.01, 0.01)[0])
  says(tab, "Click on a found object to choose it")
  assert not tab.is_visible(".band")  # the mark of a click goes, also where nothing is hit
  tab.mouse.click(*at(tab, *np.argwhere(thing.mask).mean(axis=0)[::-1] / 480)[0])
  says(tab, "You chose object 1")
  tab.click("#remove")
  tab.wait_for_selector("#save-json:disabled")
  for _ in range(2):
    tab.click("#undo")
  tab.wait_for_function("(bare) => document.querySelector('.stage img').src === bare", arg=bare)
  tab.wait_for_selector("#undo:disabled")


def test_clicks_make_and_refine_an_object(tiny, visit, tmp_path):
  predictor, address = tiny
  Image.fromarray(common.image()).save(tmp_path / "photo.png")
  tab = drop(visit(address), tmp_path / "photo.png")
  assert not tab.is_visible("#no-tracker")
  says(tab, "Click on an object")
  (x, y), (fx, fy) = at(tab, 0.3, 0.4)
  tab.mouse.click(x, y)
  says(tab, "Click on what else belongs to object 1")
  image, scale = predictor.encode(common.image()), np.array([common.WIDTH, common.HEIGHT])
  points = [scale * (fx, fy)]
  wanted = predictor.predict(points=points, image=image)
  alike(coco(tab), wanted, pixels=2e-3)
  shown = tab.get_attribute(".stage img", "src")
  (x, y), (fx, fy) = at(tab, 0.7, 0.7)
  tab.mouse.click(x, y, button="right")
  tab.wait_for_function("(shown) => document.querySelector('.stage img').src !== shown", arg=shown)
  refined = predictor.refine(wanted, 0, [*points, scale * (fx, fy)], [1, 0], image=image)
  alike(coco(tab), refined, pixels=2e-3)
  choose(tab, "around")
  says(tab, "Drag a box around one object")
  box = drag(tab, (0.2, 0.2), (0.6, 0.7))
  tab.wait_for_function("document.querySelector('#objects input').value.startsWith('2: ')")
  outlined = predictor.predict(box=np.multiply(box, [*scale, *scale]), image=image)
  alike(coco(tab), Results.concatenate([refined, outlined]), pixels=2e-3)
  tab.click("#clear")
  tab.wait_for_selector("#clear:disabled")


def test_two_visitors_at_once(shapes, visit, photos):
  predictor, address = shapes
  tabs = [drop(visit(address), photo) for photo in photos]
  for tab in tabs:
    find(tab, "shape")
  for tab in tabs:
    says(tab, " found.")
  first, second = (coco(tab) for tab in tabs)
  for found, photo in zip((first, second), photos):
    alike(found, predictor(photo, text="shape"))
  assert len(first) != len(second) or (first.masks != second.masks).any()
  tabs[0].click("#clear")
  tabs[0].wait_for_selector("#save-json:disabled")
  alike(coco(tabs[1]), second)


def test_a_file_that_is_no_image(shapes, visit, photos, tmp_path):
  _, address = shapes
  wrong, cut = tmp_path / "notes.png", tmp_path / "cut.png"
  wrong.write_text("no image at all")
  cut.write_bytes(photos[0].read_bytes()[:5000])
  tab = visit(address)
  tab.set_input_files("#drop input[type=file]", wrong)
  says(tab, "The file notes.png cannot be opened: image (15 bytes) is not an image")
  drop(tab, photos[0])
  find(tab, "shape")
  says(tab, " found.")
  before = coco(tab)
  tab.set_input_files("#another input[type=file]", cut)
  says(tab, "The file cut.png cannot be opened: image (5000 bytes) is damaged or truncated")
  alike(coco(tab), before)
  # Dropped on the picture, another photo is opened, and what stands in the box is asked of it.
  tab.evaluate(
    """(data) => {
      const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), files = new DataTransfer();
      files.items.add(new File([bytes], 'dropped.png', {type: 'image/png'}));
      const event = new DragEvent('drop', {dataTransfer: files, bubbles: true, cancelable: true});
      document.querySelector('.stage img').dispatchEvent(event);
    }""",
    base64.b64encode(photos[1].read_bytes()).decode(),
  )
  playwright.expect(tab.locator("#hint")).not_to_contain_text("cannot be opened")
  assert download(tab, "json").suggested_filename == "dropped.json"


def test_without_a_tracker_it_says_what_to_do(shapes, visit):
  _, address = shapes
  tab = visit(address)
  text = tab.inner_text("#no-tracker")
  assert "tracker, which is not loaded" in text and "sam3lt app --model s0 --tracker facebook/sam3" in text
  tools = tab.locator("#tool input").evaluate_all("all => all.map((one) => one.value)")
  assert tools == ["like", "unlike", "pick"]
  tab.click("#example")
  says(tab, "Drag a box around an example")
  assert tab.is_visible(".stage img") and not tab.is_visible("#drop")


def test_on_a_phone(tiny, visit, tmp_path):
  _, address = tiny
  Image.fromarray(common.image()).save(tmp_path / "photo.png")
  tab = drop(visit(address, PHONE), tmp_path / "photo.png")
  box = tab.locator(".stage img").bounding_box()
  assert box["width"] > 320 and box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0]
  assert tab.evaluate("document.documentElement.scrollWidth") == PHONE[0]
  tab.touchscreen.tap(*at(tab, 0.3, 0.4)[0])
  says(tab, "Click on what else belongs to object 1")
  choose(tab, "off")
  says(tab, "Click on what does not belong to object 1")
  shown = tab.get_attribute(".stage img", "src")
  tab.touchscreen.tap(*at(tab, 0.7, 0.7)[0])
  tab.wait_for_function("(shown) => document.querySelector('.stage img').src !== shown", arg=shown)
