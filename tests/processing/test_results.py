"""Results: shapes, choosing, and what is written for others to read."""

import base64
import dataclasses
import io
import json
import pickle
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from sam3lt_jax.processing import results as results_module
from sam3lt_jax.processing.render import instance_colors
from sam3lt_jax.processing.results import Instance, Results, hold_masks

SIZE = (20, 30)


def make(n=4, labels=None, seed=0):
  """n rectangles of SIZE with shuffled scores."""
  rng = np.random.default_rng(seed)
  masks = np.zeros((n, *SIZE), bool)
  boxes = np.zeros((n, 4), np.float32)
  for i in range(n):
    x, y = int(rng.integers(0, 20)), int(rng.integers(0, 10))
    w, h = 2 + i, 3 + i
    masks[i, y : y + h, x : x + w] = True
    boxes[i] = x, y, x + w, y + h
  scores = rng.permutation(np.linspace(0.3, 0.9, n)).astype(np.float32)
  return Results(boxes, scores, masks, labels or [("truck", "wheel")[i % 2] for i in range(n)], SIZE)


def test_types_and_shapes():
  results = Results([[1, 2, 3, 4]], [0.5], np.ones((1, 2, 3), np.uint8), ["é"], np.array([2, 3]))
  assert results.boxes.dtype == np.float32 and results.scores.dtype == np.float32
  assert results.masks.dtype == bool and results.masks.all()
  assert results.labels == ("é",) and results.size == (2, 3)
  assert results.areas.tolist() == [6]


@pytest.mark.parametrize(
  "make_empty",
  [
    lambda: Results.empty(SIZE),
    lambda: make()[:0],
    lambda: make()[[]],
    lambda: Results([], [], [], [], SIZE),
  ],
)
def test_empty_results_keep_their_shapes(make_empty):
  results = make_empty()
  assert len(results) == 0 and list(results) == []
  assert results.boxes.shape == (0, 4) and results.boxes.dtype == np.float32
  assert results.scores.shape == (0,) and results.masks.shape == (0, *SIZE)
  assert results.masks.dtype == bool and results.labels == () and results.areas.shape == (0,)
  assert results.to_coco() == [] and results.categories() == []
  assert len(results.sort()) == 0 and not results.label_map().any()
  assert "0 instances" in repr(results)


@pytest.mark.parametrize(
  "change, name",
  [
    ({"boxes": np.zeros((3, 4))}, "boxes"),
    ({"boxes": np.zeros((4, 5))}, "boxes"),
    ({"scores": np.zeros((4, 1))}, "scores"),
    ({"masks": np.zeros((4, 20, 31))}, "masks"),
    ({"labels": ["one"]}, "boxes"),
    ({"labels": "four"}, "labels"),
    ({"size": (0, 30)}, "size"),
    ({"size": (20, 30, 3)}, "size"),
  ],
)
def test_wrong_shapes_are_named(change, name):
  good = make()
  fields = {
    "boxes": good.boxes,
    "scores": good.scores,
    "masks": good.masks,
    "labels": good.labels,
    "size": SIZE,
  }
  with pytest.raises(ValueError, match=f"^{name} must"):
    Results(**{**fields, **change})


def test_an_integer_gives_an_instance():
  results = make()
  one = results[1]
  assert isinstance(one, Instance) and one.label == "wheel" and isinstance(one.score, float)
  assert one.box.shape == (4,) and one.mask.shape == SIZE
  assert np.array_equal(results[-1].mask, results.masks[3])
  assert [r.label for r in results] == ["truck", "wheel", "truck", "wheel"]
  assert [r.score for r in results] == results.scores.tolist()
  for i in (4, -5):
    with pytest.raises(IndexError, match="4 instances"):
      results[i]


@pytest.mark.parametrize(
  "key, picked",
  [
    (slice(1, 3), [1, 2]),
    (slice(None, None, -1), [3, 2, 1, 0]),
    ([2, 0], [2, 0]),
    (np.array([-1, 1]), [3, 1]),
    ([True, False, False, True], [0, 3]),
    (np.zeros(4, bool), []),
  ],
)
def test_choosing_keeps_the_rows_together(key, picked):
  results = make()
  part = results[key]
  assert isinstance(part, Results) and part.size == SIZE
  assert np.array_equal(part.boxes, results.boxes[picked])
  assert np.array_equal(part.scores, results.scores[picked])
  assert np.array_equal(part.masks, results.masks[picked])
  assert part.labels == tuple(results.labels[i] for i in picked)


def test_filters():
  results = make()
  kept = results[results.scores > 0.6]
  assert len(kept) == 2 and (kept.scores > 0.6).all()
  assert results.with_label("wheel").labels == ("wheel", "wheel")
  assert len(results.with_label("truck", "wheel")) == 4 and len(results.with_label("cat")) == 0
  assert len(Results.empty(SIZE).with_label("cat")) == 0
  ordered = results.sort()
  assert np.all(np.diff(ordered.scores) < 0) and len(ordered) == 4
  assert np.array_equal(ordered.boxes[0], results.boxes[results.scores.argmax()])
  assert results.top_k(2).scores.tolist() == ordered.scores[:2].tolist()
  assert len(results.top_k(99)) == 4
  with pytest.raises(ValueError, match="k must not be negative"):
    results.top_k(-1)


def test_equal_scores_keep_their_order():
  results = Results(np.zeros((3, 4)), [0.5, 0.9, 0.5], np.zeros((3, *SIZE)), ["a", "b", "c"], SIZE)
  assert results.sort().labels == ("b", "a", "c")


@pytest.mark.parametrize(
  "key, error",
  [
    ("truck", ValueError),
    (make().labels == "truck", ValueError),  # False: a tuple is not an array
    ([True, False], ValueError),
    ([0.5], ValueError),
    (np.zeros((2, 2), int), ValueError),
    (None, ValueError),
    ([0, 4], IndexError),
  ],
)
def test_wrong_keys(key, error):
  with pytest.raises(error):
    make()[key]


def test_concatenate():
  a, b = make(2, ["x", "y"]), make(3, ["z"] * 3, seed=1)
  both = Results.concatenate([a, Results.empty(SIZE), b])
  assert len(both) == 5 and both.labels == ("x", "y", "z", "z", "z")
  assert np.array_equal(both.masks[2:], b.masks) and np.array_equal(both.boxes[:2], a.boxes)
  with pytest.raises(ValueError, match="one size"):
    Results.concatenate([a, Results.empty((5, 5))])
  with pytest.raises(ValueError, match="at least one"):
    Results.concatenate([])


def test_ids_stay_with_their_instances():
  plain = make()
  results = dataclasses.replace(plain, ids=[7, 3, 40, 3])
  assert results.ids.dtype == np.int64 and plain.ids is None and plain[:2].ids is None
  assert results[[2, 0]].ids.tolist() == [40, 7] and results[results.ids == 3].labels == ("wheel", "wheel")
  assert results.sort().ids.tolist() == results.ids[np.argsort(-results.scores)].tolist()
  assert Results.concatenate([results[:1], Results.empty(SIZE), results[2:]]).ids.tolist() == [7, 40, 3]
  assert Results.concatenate([results, plain]).ids is None
  assert results[:0].ids.shape == (0,) and Results.empty(SIZE).ids is None
  assert repr(results).splitlines()[3].startswith("  2: #40 'truck' 0.")
  assert [a["track_id"] for a in json.loads(json.dumps(results.to_coco()))] == [7, 3, 40, 3]
  assert "track_id" not in plain.to_coco()[0]
  assert pickle.loads(pickle.dumps(results)).ids.tolist() == [7, 3, 40, 3]


@pytest.mark.parametrize("ids", [[1, 2, 3], [[1], [2], [3], [4]], [0.5, 1, 2, 3], ["a", "b", "c", "d"], 5])
def test_wrong_ids_are_named(ids):
  with pytest.raises(ValueError, match=r"^ids must be 4 integers"):
    dataclasses.replace(make(), ids=ids)


def test_repr_is_short():
  text = repr(make(12))
  assert text.startswith("Results(12 instances, size=20x30)")
  assert "0: 'truck' 0." in text and "... 2 more" in text and len(text.splitlines()) == 12
  assert "1 instance," in repr(make(1))


def test_to_coco_is_json_and_decodes_to_the_masks():
  results = make()
  annotations = json.loads(json.dumps(results.to_coco(image_id=7, first_id=5)))
  assert [a["id"] for a in annotations] == [5, 6, 7, 8]
  assert [a["category_id"] for a in annotations] == [1, 2, 1, 2]
  assert results.categories() == [{"id": 1, "name": "truck"}, {"id": 2, "name": "wheel"}]
  for annotation, one in zip(annotations, results):
    assert annotation["image_id"] == 7 and annotation["iscrowd"] == 0
    assert annotation["segmentation"]["size"] == [20, 30]
    assert isinstance(annotation["segmentation"]["counts"], str)
    assert np.array_equal(coco_mask.decode(annotation["segmentation"]).astype(bool), one.mask)
    assert annotation["area"] == one.mask.sum()
    x1, y1, x2, y2 = one.box.tolist()
    assert annotation["bbox"] == [x1, y1, x2 - x1, y2 - y1]
    assert annotation["score"] == pytest.approx(one.score)


def test_to_coco_category_ids():
  results = make()
  ids = [a["category_id"] for a in results.to_coco(category_ids={"wheel": 10, "truck": 20})]
  assert ids == [20, 10, 20, 10]
  with pytest.raises(ValueError, match=r"category_ids must hold every label, missing \['wheel'\]"):
    results.to_coco(category_ids={"truck": 1})


def test_pycocotools_loads_the_results(capsys):
  results = make()
  truth = COCO()
  truth.dataset = {
    "info": {},
    "images": [{"id": 1, "height": SIZE[0], "width": SIZE[1]}],
    "categories": results.categories(),
    "annotations": [],
  }
  truth.createIndex()
  loaded = truth.loadRes(results.to_coco())
  assert loaded.getAnnIds(catIds=[2]) == [2, 4]
  assert np.array_equal(loaded.annToMask(loaded.loadAnns([3])[0]).astype(bool), results.masks[2])


def test_to_supervision():
  supervision = pytest.importorskip("supervision")
  results = make()
  detections = results.to_supervision()
  assert isinstance(detections, supervision.Detections) and len(detections) == 4
  assert np.array_equal(detections.xyxy, results.boxes)
  assert np.array_equal(np.asarray(detections.mask), results.masks)
  assert np.array_equal(detections.confidence, results.scores)
  assert detections.class_id.tolist() == [0, 1, 0, 1]
  assert detections.data["class_name"].tolist() == list(results.labels)
  assert detections.tracker_id is None
  assert dataclasses.replace(results, ids=[7, 3, 40, 5]).to_supervision().tracker_id.tolist() == [7, 3, 40, 5]
  assert len(Results.empty(SIZE).to_supervision()) == 0


def test_supervision_missing_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "supervision", None)
  with pytest.raises(ImportError, match=r"pip install 'sam3lt_jax\[viz\]'"):
    make().to_supervision()


def test_boxes_are_clipped_to_the_image():
  results = Results([[-3, 2, 40, 25], [np.nan, 0, 5, 5]], [0.5, 0.4], np.zeros((2, *SIZE)), ["a", "b"], SIZE)
  assert results.boxes[0].tolist() == [0, 2, 30, 20] and np.isnan(results.boxes[1, 0])


def test_no_repr_prints_a_mask():
  results = make()
  assert "array" not in repr(results) and "False" not in repr(results)
  one = results[1]
  assert repr(one).startswith("Instance('wheel' 0.") and f"mask of {one.mask.sum()} pixels)" in repr(one)
  assert "False" not in repr(list(results)) and len(repr(one)) < 100


def photo(folder):
  path = folder / "a <photo>.png"
  Image.new("RGB", SIZE[::-1], (200, 10, 10)).save(path)
  return path


def test_the_image_is_remembered_and_forgotten(tmp_path):
  path = photo(tmp_path)
  results = make().with_image(path)
  assert results.image is path and make().image is None
  drawn = np.asarray(results.render())
  assert np.array_equal(drawn, np.asarray(make().render(Image.open(path))))
  for same in (results[:], results.sort(), results.with_label("truck", "wheel"), results.clean(1)):
    assert same.image is path
  assert Results.concatenate([make(), results]).image is path
  assert results.with_image(None).image is None
  with pytest.raises(ValueError, match=r"image must be given: these results do not remember theirs"):
    make().render()


def test_html_shows_a_picture_and_a_table(tmp_path):
  results = dataclasses.replace(make(12, ["<b>"] * 12), ids=range(50, 62), image=photo(tmp_path))
  text = results._repr_html_()
  assert text.count("<tr>") == 1 + 10 + 1 and "... 2 more" in text and "12 instances in 30 x 20" in text
  assert "<b>" not in text and "&lt;b&gt; #50" in text
  encoded = re.search(r'src="data:image/jpeg;base64,([^"]+)"', text)[1]
  assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (30, 20)
  large = Results.empty((3000, 400)).with_image(np.zeros((3000, 400, 3), np.uint8))._repr_html_()
  encoded = re.search(r'src="data:image/jpeg;base64,([^"]+)"', large)[1]
  assert max(Image.open(io.BytesIO(base64.b64decode(encoded))).size) == 480
  for without in (
    results.with_image(None),
    results.with_image("gone.png"),
    results.with_image(np.zeros((1, 2))),
  ):
    assert "<img" not in without._repr_html_() and "#50" in without._repr_html_()


def test_save_plot_and_show(tmp_path, monkeypatch):
  results = make().with_image(photo(tmp_path))
  drawn = np.asarray(results.render(boxes=True))
  assert results.save(tmp_path / "out.png", boxes=True) == str(tmp_path / "out.png")
  assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), drawn)
  results.save(tmp_path / "out.JPG")
  assert Image.open(tmp_path / "out.JPG").format == "JPEG"
  with pytest.raises(ValueError, match=r"path must end as a picture's name does .*got 'overlay': "):
    results.save("overlay")

  shown = []
  monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(np.asarray(self)))
  results.show(boxes=True)
  assert np.array_equal(shown[0], drawn)

  figure = pytest.importorskip("matplotlib.figure").Figure()
  ax = figure.subplots()
  assert results.plot(ax, boxes=True) is ax
  assert np.array_equal(ax.images[0].get_array(), drawn) and not ax.axison


def test_show_in_a_notebook(tmp_path, monkeypatch):
  shown = []
  display = types.SimpleNamespace(display=shown.append)
  notebook = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1), display=display)
  monkeypatch.setitem(sys.modules, "IPython", notebook)
  make().show(photo(tmp_path))
  assert shown[0].size == (30, 20)


def test_to_json_and_from_coco(tmp_path):
  results = dataclasses.replace(make(), ids=[7, 3, 40, 5], image=tmp_path / "a.png")
  (tmp_path / "a.json").write_text(results.to_json(indent=1))
  with pytest.raises(ValueError, match=r"image_id must be no file's name, got 'found\.json'"):
    results.to_json("found.json")  # as of a data frame: nothing would be written
  data = json.loads(results.to_json(image_id="x"))
  assert data["images"] == [{"id": "x", "height": 20, "width": 30, "file_name": str(tmp_path / "a.png")}]
  for source in (data, tmp_path / "a.json"):
    back = Results.from_coco(source)
    assert np.array_equal(back.masks, results.masks) and np.allclose(back.boxes, results.boxes)
    assert back.labels == results.labels and np.allclose(back.scores, results.scores)
    assert back.ids.tolist() == [7, 3, 40, 5] and back.size == SIZE
  assert len(Results.from_coco(json.loads(Results.empty(SIZE).to_json()))) == 0
  assert COCO(str(tmp_path / "a.json")).getAnnIds() == [1, 2, 3, 4]


def test_from_coco_of_others():
  row = {"image_id": 2, "category_id": 9, "segmentation": [[2, 3, 12, 3, 12, 8, 2, 8]]}
  data = {
    "images": [{"id": 1, "height": 4, "width": 4}, {"id": 2, "height": 20, "width": 30}],
    "annotations": [row, {**row, "image_id": 1}, {"image_id": 2, "category_id": 9, "segmentation": []}],
    "categories": [],
  }
  results = Results.from_coco(data, image_id=2)
  assert results.labels == ("9",) and results.scores.tolist() == [1] and results.ids is None
  assert results.areas.tolist() == [50] and results.boxes[0].tolist() == [2, 3, 12, 8]
  with pytest.raises(ValueError, match=r"image_id must be given for a data set of 2 images"):
    Results.from_coco(data)
  with pytest.raises(ValueError, match=r"image_id must be the id of one of 2 images, got 3"):
    Results.from_coco(data, 3)
  with pytest.raises(ValueError, match=r"coco must be a COCO data set: an entry of it has no 'images'"):
    Results.from_coco({"annotations": []})
  bad = {**row, "id": 5, "segmentation": {"size": [1, 1], "counts": [1]}}
  with pytest.raises(ValueError, match=r"annotation 5: the RLE's size"):
    Results.from_coco({**data, "annotations": [bad]}, 2)


def test_to_yolo_fills_to_the_masks():
  """One polygon an instance: with a hole, of two parts, of a single pixel, cut by the border, and of none."""
  y, x = np.mgrid[:120, :160]
  ring = (abs(np.hypot(x - 60, y - 60) - 30) < 12) | (np.hypot(x - 130, y - 30) < 9)
  single, corner = np.zeros((2, 120, 160), bool)
  single[50, 70], corner[80:, 100:] = True, True
  masks = np.stack([ring, corner, single, np.zeros_like(ring)])
  results = Results(np.zeros((4, 4)), np.ones(4), masks, ["ring", "corner", "dot", "ring"], (120, 160))
  lines = results.to_yolo().splitlines()
  assert [line.split()[0] for line in lines] == ["0", "1", "2"]
  assert results.to_yolo({"ring": 5, "corner": 6, "dot": 7}).startswith("5 ")
  for line, mask in zip(lines, masks):
    points = np.array(line.split()[1:], float).reshape(-1, 2)
    assert points.min() >= 0 and points.max() <= 1
    finer = Image.new("1", (1600, 1200))
    ImageDraw.Draw(finer).polygon([(p[0] * 1600, p[1] * 1200) for p in points], fill=1)
    filled = np.asarray(finer)[5::10, 5::10]  # at the middles of the pixels
    assert np.array_equal(filled, mask)
  with pytest.raises(ValueError, match=r"class_ids must hold every label, missing \['corner', 'dot'\]"):
    results.to_yolo({"ring": 0})


def test_to_pandas():
  pandas = pytest.importorskip("pandas")
  frame = make().to_pandas()
  assert isinstance(frame, pandas.DataFrame) and len(frame) == 4
  assert list(frame.columns) == ["label", "score", "x1", "y1", "x2", "y2", "area"]
  assert frame.area.tolist() == make().areas.tolist() and frame.x2.tolist() == make().boxes[:, 2].tolist()
  assert dataclasses.replace(make(), ids=[7, 3, 40, 5]).to_pandas().id.tolist() == [7, 3, 40, 5]
  assert len(Results.empty(SIZE).to_pandas()) == 0


@pytest.mark.parametrize(
  "method, package", [("to_pandas", "pandas"), ("to_yolo", "contourpy"), ("plot", "matplotlib")]
)
def test_a_missing_package_says_what_to_install(method, package, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ImportError, match=rf"{package}: pip install 'sam3lt_jax\[viz\]'"):
    getattr(make(), method)()


def test_clean():
  mask = np.zeros(SIZE, bool)
  mask[2:12, 2:12] = True
  mask[5:7, 5:7] = False  # a hole of 4
  mask[15:17, 20:23] = True  # a speck of 6
  speck = np.zeros(SIZE, bool)
  speck[0, :3] = True
  results = Results(np.zeros((2, 4)), [0.9, 0.8], [mask, speck], ["a", "b"], SIZE)
  assert results.clean().areas.tolist() == results.areas.tolist() == [102, 3]
  assert results.clean(hole_area=3, speck_area=5).areas.tolist() == [102, 3]
  assert results.clean(hole_area=4).areas.tolist() == [106, 3]
  assert results.clean(speck_area=6).areas.tolist() == [96, 3]  # the second is all that there is of it
  assert results.clean(hole_area=4, speck_area=6).masks[0, 2:12, 2:12].all()
  assert results.areas.tolist() == [102, 3]
  with pytest.raises(ValueError, match=r"speck_area must be a number of pixels, 0 or more, got -1"):
    results.clean(speck_area=-1)


def overlapping():
  """A small square drawn within a large one, whichever comes first."""
  masks = np.zeros((3, *SIZE), bool)
  masks[0, 5:8, 5:8] = True
  masks[1, 2:15, 2:15] = True
  masks[2, 18:, 28:] = True
  return Results(np.zeros((3, 4)), [0.4, 0.9, 0.5], masks, ["a", "b", "a"], SIZE)


def test_save_png_label_map(tmp_path):
  results = overlapping()
  path = tmp_path / "masks.png"
  assert results.save_png(path) == [str(path)]
  image = Image.open(path)
  numbers = np.asarray(image)
  assert image.mode == "P" and numbers.shape == SIZE
  assert np.array_equal(numbers, results.label_map())
  assert numbers[6, 6] == 1 and numbers[3, 3] == 2 and numbers[19, 29] == 3 and numbers[0, 0] == 0
  rgb = np.asarray(image.convert("RGB"))
  assert tuple(rgb[6, 6]) == instance_colors(results.labels)[0] and tuple(rgb[0, 0]) == (0, 0, 0)


def test_save_png_separate_keeps_overlaps(tmp_path):
  results = overlapping()
  paths = results.save_png(tmp_path / "m.png", separate=True)
  assert [p.rsplit("_", 1)[1] for p in paths] == ["000.png", "001.png", "002.png"]
  for path, mask in zip(paths, results.masks):
    assert np.array_equal(np.asarray(Image.open(path).convert("L")) == 255, mask)
  assert not (tmp_path / "m.png").exists()


def test_save_png_empty_and_many(tmp_path):
  Results.empty(SIZE).save_png(tmp_path / "none.png")
  assert not np.asarray(Image.open(tmp_path / "none.png")).any()
  assert Results.empty(SIZE).save_png(tmp_path / "none.png", separate=True) == []
  masks = np.zeros((300, *SIZE), bool)
  masks.reshape(300, -1)[np.arange(300), np.arange(300)] = True
  many = Results(np.zeros((300, 4)), np.ones(300), masks, ["x"] * 300, SIZE)
  many.save_png(tmp_path / "many.png")
  numbers = np.asarray(Image.open(tmp_path / "many.png"))
  assert numbers.max() == 300 and np.array_equal(numbers, many.label_map())
  with pytest.raises(ValueError, match=r"path must end in \.png"):
    many.save_png(tmp_path / "many.jpg")


def test_masks_of_a_huge_picture_are_held_a_bit_a_pixel(monkeypatch):
  """What counts, chooses, draws and writes takes them one at a time; `masks` alone makes all of them."""
  whole = make(5)
  monkeypatch.setattr(results_module, "PACKED_ABOVE", whole.masks.size - 1)
  packed = Results(
    whole.boxes, whole.scores, hold_masks(iter(whole.masks), 5, SIZE), whole.labels, whole.size
  )
  held = packed.__dict__["_packed"]
  assert held.bits.nbytes == 5 * 20 * 4 < whole.masks.nbytes / 7  # rows of 30 pixels in 4 bytes
  assert np.array_equal(packed[3].mask, whole.masks[3]) and packed[-1].mask.dtype == bool
  assert np.array_equal(packed.areas, whole.areas) and np.array_equal(packed.label_map(), whole.label_map())
  assert packed.to_coco() == whole.to_coco()
  photo = np.zeros((*SIZE, 3), np.uint8)
  assert packed.render(photo).tobytes() == whole.render(photo).tobytes()
  both = Results.concatenate([packed, packed.sort()[:4]])
  assert "masks" not in both.__dict__ and len(both) == 9
  assert np.array_equal(both[6].mask, whole.sort().masks[1])
  assert "masks" not in packed.__dict__ and "masks" not in packed[[0, 2]].__dict__
  assert np.array_equal(packed[[2, 0]].masks, whole.masks[[2, 0]])
  assert np.array_equal(pickle.loads(pickle.dumps(packed)).masks, whole.masks)
  assert np.array_equal(packed.masks, whole.masks) and packed.masks is packed.masks
  with pytest.raises(AttributeError, match="no attribute 'mask'"):
    _ = packed.mask
  with pytest.raises(ValueError, match="masks must be 2 of size"):
    Results(whole.boxes[:2], whole.scores[:2], held, whole.labels[:2], SIZE)


def test_ordinary_masks_are_held_as_they_are():
  assert isinstance(hold_masks(iter(make().masks), 4, SIZE), np.ndarray)
