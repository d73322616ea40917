"""What a visitor of the page does, without the page."""

import copy
import io
import json
import threading

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lt_jax.app.session import SIDE, Session
from tests.app.common import HEIGHT, ON, OTHER, WIDTH, image, predictor

LOW = 0.01  # a score that finds of a model with random weights are above


@pytest.fixture
def session():
  made = Session(predictor())
  made.set_threshold(LOW)
  made.open(image(), "folder/scene.png")
  return made


def same(a, b):
  assert a.labels == b.labels
  for name in ("boxes", "scores", "masks"):
    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def direct(**asked):
  return predictor().predict(**asked, image=predictor().encode(image()))


def test_phrases_find_what_the_predictor_finds(session):
  session.find([" a  star", "", "ring", "a star"])
  assert session.state.phrases == ("a star", "ring")
  same(session.results, direct(text=["a star", "ring"], threshold=LOW))
  assert len(session.state.things) > 2
  session.find([])
  assert session.state.things == ()


def test_example_boxes_join_the_phrases(session):
  session.find(["a star"])
  session.add_example((40, 50, 10, 20), 1)  # any two corners
  session.add_example((-5, 0, 8, 200), 0)  # cut to the photo
  boxes = [[10, 20, 40, 50], [0, 0, 8, HEIGHT]]
  assert [list(box) for box, _ in session.state.examples] == boxes
  same(session.results, direct(text=["a star"], boxes=boxes, box_labels=[1, 0], threshold=LOW))
  session.find([])
  same(session.results, direct(boxes=boxes, box_labels=[1, 0], threshold=LOW))
  session.undo()
  session.undo()
  session.undo()
  session.find([])
  session.add_example((0, 0, 8, 8), 0)
  assert session.state.things == ()  # nothing is asked for by what it is not


def test_a_click_makes_an_object_and_more_refine_it(session):
  session.click(*ON)
  first = direct(points=[ON])
  same(session.results, first)
  assert session.state.current == 0
  session.click(*OTHER, 0)
  points = {"points": [ON, OTHER], "point_labels": [1, 0]}
  refined = predictor().refine(first, 0, **points, image=predictor().encode(image()))
  same(session.results, refined)
  session.choose(None)
  session.click(*OTHER)
  assert len(session.state.things) == 2 and session.state.current == 1
  np.testing.assert_array_equal(session.results.masks[0], refined.masks[0])
  session.click(WIDTH, 3)  # beside the photo
  assert len(session.state.things[1].clicks) == 1


def test_an_outline_is_one_object(session):
  session.outline((50, 50, 10, 20))
  same(session.results, direct(box=[10, 20, 50, 50]))
  assert session.state.current == 0


def test_what_is_found_can_be_refined_and_then_stays(session):
  session.find(["a star"])
  before = session.results
  session.choose(1)
  session.click(*ON)
  after = session.results
  assert after.labels == before.labels
  np.testing.assert_array_equal(after.masks[0], before.masks[0])
  mine = session.state.things[1]
  assert mine.clicks == ((*ON, 1),)
  session.find(["ring"])
  assert session.state.things[0] is mine and set(session.results.labels[1:]) == {"ring"}
  session.find(["a star"])
  assert session.state.things[0] is mine
  overlaps = [
    np.count_nonzero(t.found.masks & mine.found.masks) / np.count_nonzero(t.found.masks | mine.found.masks)
    for t in session.state.things[1:]
  ]
  assert max(overlaps, default=0) <= 0.5


def test_undo_goes_back_a_step_and_clear_is_a_step(session):
  seen = [session.results]
  session.find(["a star"])
  seen.append(session.results)
  session.click(*ON)
  seen.append(session.results)
  session.click(*OTHER, 0)
  seen.append(session.results)
  session.remove()
  assert len(session.state.things) == len(seen[1])
  session.clear()
  assert not session.state.things and not session.state.phrases
  session.undo()
  session.undo()
  for wanted in reversed(seen):
    same(session.results, wanted)
    assert session.can_undo == (wanted is not seen[0])
    session.undo()
  same(session.results, seen[0])


def test_a_photo_is_encoded_once(session):
  started = []
  engine = predictor().engine
  engine.on_start = lambda start, output: started.append(output)
  try:
    session.open(image(1))
    encoded = len(started)
    session.find(["a star"])
    session.add_example((10, 10, 40, 40), 1)
    session.click(*ON)
    session.click(*OTHER, 0)
    session.undo()
    session.picture()
    session.set_threshold(0.2)
    assert (encoded, len(started)) == (1, 6)
  finally:
    engine.on_start = lambda start, output: None


def test_sessions_do_not_mix(session):
  other = copy.deepcopy(session)
  assert other.photo is None and other.state.things == ()
  other.open(image(1), "other.png")
  session.click(*ON)
  other.click(*ON)
  alone = predictor().predict(points=[ON], image=predictor().encode(image(1)))
  same(session.results, direct(points=[ON]))
  same(other.results, alone)
  assert np.abs(session.results.scores - other.results.scores).max() > 0
  wanted, failed = session.results, []

  def ask(asked, result):
    for _ in range(5):
      asked.undo()
      asked.click(*ON)
      try:
        same(asked.results, result)
      except AssertionError as e:
        failed.append(e)

  threads = [threading.Thread(target=ask, args=pair) for pair in ((session, wanted), (other, alone))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not failed


def test_the_smallest_object_at_a_pixel(session):
  session.find(["a star"])
  covered = session.results.masks
  row, column = np.argwhere(covered.any(axis=0))[0]
  index = session.at(column + 0.9, row)
  here = [i for i in range(len(covered)) if covered[i, row, column]]
  assert index in here and covered[index].sum() == min(covered[i].sum() for i in here)
  session.clear()
  assert session.at(3, 3) is None


def test_the_picture_shows_all_of_it(session):
  empty = session.picture()
  assert max(empty.size) <= SIDE and empty.width * HEIGHT == empty.height * WIDTH
  session.outline((20, 10, 60, 50))
  session.click(*ON)
  marked = np.asarray(session.picture())
  scale = marked.shape[1] / WIDTH
  at = int((ON[1] + 0.5) * scale) + 5, int((ON[0] + 0.5) * scale) + 5  # beside the white plus
  assert marked[at].tolist() == [46, 204, 64]
  session.clear()
  np.testing.assert_array_equal(session.picture(), empty)
  session.add_example((20, 10, 60, 50), 0)
  assert np.asarray(session.picture())[int(10 * scale), int(40 * scale)].tolist() == [255, 65, 54]


def test_downloads(session, tmp_path):
  session.find(["a star", "ring"])
  session.choose(None)
  session.click(*ON)
  results = session.results
  with open(session.save("json", tmp_path), encoding="utf-8") as f:
    coco = json.load(f)
  assert coco["images"] == [{"id": 1, "file_name": "scene.png", "height": HEIGHT, "width": WIDTH}]
  assert coco["info"]["description"].startswith("sam3lt_jax ")
  names = {category["id"]: category["name"] for category in coco["categories"]}
  assert tuple(names[a["category_id"]] for a in coco["annotations"]) == results.labels
  for annotation, mask in zip(coco["annotations"], results.masks, strict=True):
    np.testing.assert_array_equal(coco_mask.decode(annotation["segmentation"]), mask)
  masks = session.save("masks", tmp_path)
  np.testing.assert_array_equal(np.asarray(Image.open(masks)), results.label_map())
  overlay = session.save("overlay", tmp_path)
  np.testing.assert_array_equal(Image.open(overlay), results.render(image(), scale="auto"))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["scene.json", "scene_masks.png", "scene_overlay.png"]


def test_mistakes_are_sentences_and_change_nothing(session):
  session.click(*ON)
  before = session.results
  session.choose(None)
  with pytest.raises(ValueError, match="is not an image in a format that Pillow reads"):
    session.open(b"no image at all")
  with pytest.raises(ValueError, match="choose an object first"):
    session.click(*OTHER, 0)
  with pytest.raises(ValueError, match="this box is empty: drag from one corner"):
    session.add_example((5, 5, 5.2, 40), 1)
  with pytest.raises(ValueError, match="this box is empty"):
    session.outline((200, 5, 300, 40))
  same(session.results, before)
  assert session.name == "scene.png" and session.state.examples == ()
  for act in (lambda s: s.click(*ON), lambda s: s.find(["a"]), lambda s: s.picture(), lambda s: s.results):
    with pytest.raises(ValueError, match="there is no photo yet"):
      act(Session(predictor()))


def test_a_turned_photo_is_seen_upright():
  photo = Image.fromarray(image())
  exif = photo.getexif()
  exif[0x0112] = 6  # to be turned by 90 degrees clockwise
  data = io.BytesIO()
  photo.save(data, "PNG", exif=exif)
  session = Session(predictor())
  session.open(data.getvalue())
  session.click(HEIGHT - 2.0, WIDTH - 2.0)
  assert session.results.size == (WIDTH, HEIGHT)
