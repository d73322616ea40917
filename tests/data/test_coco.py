"""COCO files to records: every form of mask, phrases, negatives, crowds, and files that are wrong."""

import copy
import json
import logging

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lt_jax.config import parse_json
from sam3lt_jax.data import rle as rle_ops
from sam3lt_jax.data.annotations import images_of
from sam3lt_jax.data.coco import load_coco
from sam3lt_jax.data.load import load_records
from sam3lt_jax.data.records import Prompt, Record, RecordError
from tests.data import scenes


@pytest.fixture
def images(tmp_path):
  return scenes.write_images(tmp_path)


def one_annotation(**fields):
  """A data set of the second image with its one annotation changed; None takes a field away."""
  data = scenes.coco_dataset()
  data["images"] = data["images"][1:2]
  annotation = data["annotations"][3] | fields
  data["annotations"] = [{k: v for k, v in annotation.items() if v is not None}]
  return data


def masks_of(prompt):
  return [None if rle is None else rle_ops.decode(rle) for rle in prompt.masks]


def test_records_and_negatives(tmp_path, images):
  records = load_coco(scenes.write_json(tmp_path, scenes.coco_dataset()), images)
  assert len(records) == 3 and records.by_category
  record = records[0]
  assert record.id == 10 and record.size == (60, 80)
  red, green, blue = record.prompts
  assert [p.phrase for p in record.prompts] == ["red box", "green disc", "blue box"]
  assert [p.category_id for p in record.prompts] == [1, 2, 3] and {p.image_id for p in record.prompts} == {10}
  np.testing.assert_array_equal(red.boxes, [[5, 10, 25, 40], [50, 30, 70, 50]])
  np.testing.assert_array_equal(masks_of(red)[1], scenes.mask_of("box", 50, 30, 70, 50))
  assert red.boxes.dtype == np.float32 and red.exhaustive and red.all_of_kind
  assert len(green.boxes) == 1 and blue.boxes.shape == (0, 4) and blue.exhaustive
  np.testing.assert_array_equal(record.load_image(), scenes.picture(scenes.SCENES["a.png"]))
  assert [len(p.boxes) for p in records[2].prompts] == [0, 0, 0]
  assert records[-1].id == 12
  positives = load_coco(scenes.coco_dataset(), images, negatives=False)
  assert [len(r.prompts) for r in positives] == [2, 1, 0]


def test_every_form_of_a_mask_gives_the_same(images):
  mask = scenes.mask_of("box", 40, 0, 80, 30)
  runs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
  # Down the columns: 40 empty columns of 60, then 30 set and 30 not in each of 40 columns.
  uncompressed = [2400, *([30, 30] * 40)]
  forms = [
    [[40, 0, 80, 0, 80, 30, 40, 30]],
    [[40, 0, 60, 0, 60, 30, 40, 30], [60, 0, 80, 0, 80, 30, 60, 30]],
    {"size": [60, 80], "counts": uncompressed},
    {"size": [60, 80], "counts": runs["counts"].decode()},
    {"size": [60, 80], "counts": runs["counts"]},
  ]
  for segmentation in forms:
    prompt = load_coco(one_annotation(segmentation=segmentation), images)[0].prompts[0]
    np.testing.assert_array_equal(masks_of(prompt)[0], mask)
    np.testing.assert_array_equal(prompt.boxes, [[40, 0, 80, 30]])


def test_rle_strings_are_read_as_pycocotools_writes_them():
  rng = np.random.default_rng(0)
  for size in ((1, 1), (7, 5), (60, 80), (300, 401)):
    for share in (0.0, 0.02, 0.5, 1.0):
      mask = rng.random(size) < share
      rle = rle_ops.encode(mask)
      runs = rle_ops._runs(rle["counts"])
      ends = np.cumsum(runs)
      assert ends[-1] == mask.size and (runs >= 0).all()
      flat = np.zeros(mask.size, bool)
      for start, end in zip(ends[0::2], ends[1::2]):
        flat[start:end] = True
      np.testing.assert_array_equal(flat.reshape(mask.shape, order="F"), mask)


def test_what_has_to_be_a_mask():
  mask = scenes.mask_of("box", 40, 0, 80, 30)
  np.testing.assert_array_equal(rle_ops.decode(rle_ops.from_segmentation([GOOD], (60, 80))), mask)
  empty = {"size": [60, 80], "counts": [4800]}
  assert rle_ops.area(rle_ops.from_segmentation(empty, (60, 80))) == 0
  for segmentation, size, message in (
    ([[]], (60, 80), r"must be polygons or an RLE, got \[\[\]\]"),
    ([GOOD], (2**32, 1), "a mask has no height and width in pixels"),
    (
      {"size": [2**32 + 20, 80], "counts": [1600]},
      (2**32 + 20, 80),
      "a mask has no height and width in pixels",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      rle_ops.from_segmentation(segmentation, size)


def test_box_without_a_mask(images):
  for missing in (None, [], [[]], [[], []]):
    prompt = load_coco(one_annotation(segmentation=missing, bbox=[70, -5, 20, 15]), images)[0].prompts[0]
    assert prompt.masks == (None,)
    np.testing.assert_array_equal(prompt.boxes, [[70, 0, 80, 10]])  # clipped to the image


def test_crowds_are_left_out_and_the_prompt_is_open(images):
  data = scenes.coco_dataset()
  data["annotations"][0]["iscrowd"] = 1
  red, green = load_coco(data, images, negatives=False)[0].prompts
  assert len(red.boxes) == 1 and not red.exhaustive and green.exhaustive
  data["annotations"][1]["iscrowd"] = 1  # a phrase with crowds only is present, without objects
  prompts = load_coco(data, images)[0].prompts
  assert [(p.phrase, len(p.boxes), p.exhaustive) for p in prompts] == [
    ("red box", 0, False),
    ("green disc", 1, True),
    ("blue box", 0, True),
  ]


def test_phrases_of_annotations(images):
  data = scenes.coco_dataset()
  data["annotations"][0]["phrase"] = "the box on the left"
  data["annotations"][2]["caption"] = " a disc "
  records = load_coco(data, images)
  assert not records.by_category
  # Every annotation of category 2 brings its phrase, so "green disc" is no phrase of this file.
  assert records.phrases == {1: "red box", 3: "blue box"}
  found = {p.phrase: (len(p.boxes), p.all_of_kind) for p in records[0].prompts}
  assert found == {
    "red box": (1, True), "the box on the left": (1, False), "a disc": (1, False), "blue box": (0, True)
  }  # fmt: skip


def test_phrases_given_and_lists_of_lvis(images):
  data = scenes.coco_dataset()
  data["images"][1] |= {"neg_category_ids": [2], "not_exhaustive_category_ids": [3]}
  records = load_coco(data, images, phrases={"blue_box": "navy square"})
  blue, green = records[1].prompts
  assert (blue.phrase, blue.exhaustive) == ("navy square", False)
  assert (green.phrase, len(green.boxes)) == ("green disc", 0)
  with pytest.raises(ValueError, match=r"phrases are given for \['pink'\]"):
    load_coco(data, images, phrases={"pink": "x"})
  with pytest.raises(ValueError, match=r"category 'green_disc' has an empty phrase; give phrases"):
    load_coco(data, images, phrases={"green_disc": " "})


def asked(record):
  return {p.phrase: (len(p.boxes), p.exhaustive) for p in record.prompts}


@pytest.mark.parametrize("names", [("red_box", "red box"), ("Box", "box"), ("box_(red)", "box_(green)")])
def test_two_categories_of_one_phrase_are_one(images, names):
  data = scenes.coco_dataset()
  for category, name in zip(data["categories"], names):
    category["name"] = name
  records = load_coco(data, images)
  phrase = "red box" if names[0] == "red_box" else names[0].partition("_")[0]
  assert records.phrases == {1: phrase, 2: phrase, 3: "blue box"}
  assert asked(records[0]) == {phrase: (3, True), "blue box": (0, True)}
  assert asked(records[1]) == {"blue box": (1, True), phrase: (0, True)}
  assert {p.category_id for record in records for p in record.prompts} == {1, 3}
  same = names[0].lower().replace("_", " ") == names[1].lower()
  assert records.answers == {1: (1,) if same else (1, 2), 3: (3,)}


def with_supercategories(*above):
  """The categories red box, green disc, blue box and a fourth one, "thing", without an annotation."""
  data = scenes.coco_dataset()
  data["categories"].append({"id": 4, "name": "thing"})
  for category, name in zip(data["categories"], above):
    category["supercategory"] = name
  return data


@pytest.mark.parametrize("root", ["thing", "Thing", " thing "])
def test_a_root_that_others_only_name_is_not_asked(images, root):
  records = load_coco(with_supercategories(root, root, root, "none"), images)
  assert "thing" not in records.phrases.values()
  assert [set(asked(r)) for r in records] == [{"red box", "green disc", "blue box"}] * 3
  # Nobody's supercategory, it is a class like others; COCO's "person" is its own supercategory.
  for above in ((None,) * 4, ("none", "none", "none", "thing"), (7, ["thing"], {}, None)):
    assert asked(load_coco(with_supercategories(*above), images)[0])["thing"] == (0, True)


def test_a_supercategory_with_objects_is_open_where_its_kinds_are(images):
  # A red box is a green disc, which is a blue box: blue is annotated in the second image alone.
  records = load_coco(with_supercategories("green_disc", "blue_box"), images)
  assert asked(records[0]) == {"red box": (2, True), "green disc": (1, False), "thing": (0, True)}
  assert asked(records[1]) == {
    x: (n, True) for x, n in zip(("red box", "green disc", "blue box", "thing"), (0, 0, 1, 0))
  }
  ring = load_coco(with_supercategories("green_disc", "red_box"), images)
  assert asked(ring[0]) == {
    "red box": (2, False),
    "green disc": (1, False),
    "blue box": (0, True),
    "thing": (0, True),
  }


GOOD = [40, 0, 80, 0, 80, 30, 40, 30]  # the blue box


@pytest.mark.parametrize("part", [[], [1, 1], [1, 1, 2, 2], [1, 1, 9, 1, 9, 9, 1]])
def test_a_part_without_three_corners_goes(images, part):
  records = load_coco(one_annotation(segmentation=[part, GOOD, part]), images)
  (blue,) = [p for p in records[0].prompts if len(p.boxes)]
  np.testing.assert_array_equal(masks_of(blue)[0], scenes.mask_of("box", 40, 0, 80, 30))
  assert blue.exhaustive
  assert records.left_out == ({"a polygon of under three corners": 2} if part else {})


@pytest.mark.parametrize(
  ("fields", "reason"),
  [
    ({"segmentation": [[90, 1, 95, 1, 95, 9]]}, "a mask without a pixel"),
    ({"segmentation": [[10, 10, 10.1, 10, 10.1, 10.1]]}, "a mask without a pixel"),
    ({"segmentation": {"size": [60, 80], "counts": [4800]}}, "a mask without a pixel"),
    ({"segmentation": None, "bbox": [1, 2, 0, 5]}, "a box without area in the image"),
    ({"segmentation": None, "bbox": [90, 2, 5, 5]}, "a box without area in the image"),
    ({"segmentation": [[1, 1, 5, 5]], "bbox": None}, "a polygon of under three corners"),
  ],
)
def test_an_object_without_a_pixel_goes_and_its_image_stays(tmp_path, images, fields, reason, caplog):
  data = one_annotation(**fields)
  data["annotations"].append(scenes.coco_dataset()["annotations"][3] | {"id": 9, "category_id": 1})
  records = load_records(scenes.write_json(tmp_path, data), images)
  with caplog.at_level(logging.WARNING):
    for _ in range(3):  # however often the record is made
      record = records[0]
  # The blue box is there, though nobody knows where: neither an absent phrase nor a complete one.
  assert asked(record) == {"blue box": (0, False), "red box": (1, True), "green disc": (0, True)}
  assert records.left_out == {reason: 1}
  assert (
    len(caplog.messages) == 1 and f"1 x {reason}; now of" in caplog.text and "annotation 4" in caplog.text
  )


def test_a_mask_of_nothing_but_two_points_is_none(images):
  prompt = load_coco(one_annotation(segmentation=[[1, 1, 5, 5]]), images)[0].prompts[0]
  assert prompt.masks == (None,) and prompt.exhaustive
  np.testing.assert_array_equal(prompt.boxes, [[40, 0, 80, 30]])


def test_what_is_left_out_is_counted_in_the_log(images, caplog):
  data = one_annotation(segmentation=[[1, 1, 2, 2]] * 123, bbox=[0, 0, 9, 9])
  with caplog.at_level(logging.WARNING):
    load_coco(data, images)[0]
  counts = [message.split()[4] for message in caplog.messages]
  assert counts == ["1", "10", "100"]


def as_others_write_it(data, number):
  """`data` with every id, size, count and flag in another form."""
  data = copy.deepcopy(data)
  for entries, keys in (
    ("images", ("id", "height", "width")), ("categories", ("id",)),
    ("annotations", ("id", "image_id", "category_id", "iscrowd")),
  ):  # fmt: skip
    for entry in data[entries]:
      entry.update({key: number(entry[key]) for key in keys})
  for annotation in data["annotations"]:
    annotation["bbox"] = [number(v) for v in annotation["bbox"]]
    if isinstance(annotation["segmentation"], list):
      annotation["segmentation"] = [[number(v) for v in part] for part in annotation["segmentation"]]
    else:
      annotation["segmentation"]["size"] = [number(v) for v in annotation["segmentation"]["size"]]
  return data


@pytest.mark.parametrize("number", [float, str, lambda v: f" {v}", lambda v: f"{v}.0"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_numbers_and_encodings_of_other_exporters(tmp_path, images, number, encoding):
  data = scenes.coco_dataset()
  data["annotations"][0]["iscrowd"] = 1
  data["annotations"][3]["segmentation"] = [GOOD]
  path = tmp_path / "other.json"
  path.write_text(json.dumps(as_others_write_it(data, number)), encoding=encoding)
  expected, found = load_coco(data, images), load_records(path, images)
  for one, other in zip(expected, found, strict=True):
    assert (one.id, one.size, one.image) == (other.id, other.size, other.image)
    for p, q in zip(one.prompts, other.prompts, strict=True):
      assert (p.phrase, p.exhaustive, p.image_id, p.category_id) == (
        q.phrase,
        q.exhaustive,
        q.image_id,
        q.category_id,
      )
      assert p.masks == q.masks
      np.testing.assert_array_equal(p.boxes, q.boxes)
  # The same reader is a job's.
  items = images_of(parse_json(path.read_bytes(), "x"), "x", sizes=False)
  assert [(i.id, i.names, i.size) for i in items] == [
    (10 + k, (f"{c}.png",), (60, 80)) for k, c in enumerate("abc")
  ]
  assert type(found[0].id) is int


@pytest.mark.parametrize("crowd", [1, 1.0, "1", True, "true", "TRUE"])
def test_flags_in_every_form(images, crowd):
  for key in ("iscrowd", "is_crowd"):
    data = one_annotation(**{key: crowd})
    assert not load_coco(data, images)[0].prompts[0].exhaustive
  for no in (0, 0.0, "0", False, "false", None):
    assert load_coco(one_annotation(iscrowd=no), images)[0].prompts[0].exhaustive


def test_lvis_has_coco_url_and_lists_of_categories(tmp_path, images):
  data = scenes.lvis_dataset()
  records = load_records(scenes.write_json(tmp_path, data), images)
  assert records.federated and records[0].image == str(images / "a.png")
  assert [p.phrase for p in records[0].prompts] == ["box", "green disc"]
  assert asked(records[0]) == {"box": (2, True), "green disc": (1, False)}  # blue is not listed: not asked
  assert asked(records[1]) == {"blue box": (1, True), "box": (0, True)}
  assert asked(records[2]) == {}  # nothing is known of it
  # Below the folder of COCO, its own folders come first.
  (images / "val2017").mkdir()
  (images / "a.png").rename(images / "val2017" / "a.png")
  assert records[0].image == str(images / "val2017" / "a.png")
  assert records[0].load_image().shape == (60, 80, 3)
  data["images"][0].pop("coco_url")
  with pytest.raises(ValueError, match="image 10 has no file_name"):
    load_coco(data, images)


def broken(change):
  data = copy.deepcopy(scenes.coco_dataset())
  change(data)
  return data


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda d: d.pop("annotations"), "no list 'annotations'"),
    (lambda d: d["images"].clear() or d["annotations"].clear(), "lists no images"),
    (lambda d: d["images"][1].update(id=10), "image 1 has an id of another image"),
    (lambda d: d["images"][1].update(id="b"), "the id of image 1 must be a whole number, got 'b'"),
    (lambda d: d["images"][1].update(id=10.5), "the id of image 1 must be a whole number, got 10.5"),
    (lambda d: d["images"][1].update(id=[1]), r"the id of image 1 must be a whole number, got \[1\]"),
    (lambda d: d["images"][1].update(id=2**64), "the id of image 1 must be a whole number"),
    (lambda d: d["images"][1].update(height=2**32), "image 11 has no height and width in pixels"),
    (lambda d: d["images"][1].update(height=2**32 + 20), "image 11 has no height and width in pixels"),
    (
      lambda d: d["images"][1].update(height=float("inf")),
      "image 11 has no height and width .*got inf and 80",
    ),
    (lambda d: d["images"][1].update(width=10**400), "image 11 has no height and width in pixels"),
    (lambda d: d["images"][1].update(neg_category_ids=5), "image 11: neg_category_ids must be a list of ids"),
    (
      lambda d: d["annotations"][3].update(image_id=None),
      "annotation 4: its image_id must be a whole number",
    ),
    (lambda d: d["annotations"][3].update(category_id=[1]), "annotation 4: its category_id must be a whole"),
    (lambda d: d["annotations"][3].update(iscrowd="x"), "annotation 4: its iscrowd must be 0 or 1, got 'x'"),
    (lambda d: d.update(categories=7), "'categories' must be a list, got 7"),
    (lambda d: d["images"][1].pop("file_name"), "image 11 has no file_name"),
    (lambda d: d["images"][1].update(height=0), "image 11 has no height and width"),
    (lambda d: d["annotations"][3].update(image_id=99), "annotation 4 is of image 99"),
    (lambda d: d["annotations"][3].update(category_id=9), r"annotation 4 has neither .*category_id 9"),
    (lambda d: d["annotations"][3].update(phrase=" "), "annotation 4 has an empty phrase"),
    (lambda d: d["categories"][1].pop("name"), "category 1 has no name"),
    (lambda d: d["categories"][1].update(id=1), "'green_disc' has no id of its own"),
  ],
)
def test_wrong_files_are_named(tmp_path, images, change, message):
  path = scenes.write_json(tmp_path, broken(change))
  with pytest.raises(ValueError, match=message) as caught:
    load_coco(path, images)
  assert str(path) in str(caught.value)


def test_unreadable_files(tmp_path, images):
  path = tmp_path / "cut.json"
  path.write_text('{"images": [')
  with pytest.raises(ValueError, match=r"cut\.json is not valid JSON"):
    load_records(path, images)
  path.write_text("[1]")
  with pytest.raises(ValueError, match=r"cut\.json must hold an object"):
    load_records(path, images)
  with pytest.raises(FileNotFoundError):
    load_records(tmp_path / "none.json", images)
  with pytest.raises(FileNotFoundError, match="No such folder of images"):
    load_coco(scenes.coco_dataset(), tmp_path / "nowhere")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"segmentation": [1, 1, 5, 5, 1, 5]}, r"a polygon \[x1, .* must be a list of numbers, got 1"),
    ({"segmentation": [[1, 1, 5, [5]]]}, "a polygon .* must be a list of numbers"),
    ({"segmentation": [[1, 1, 5, 5, float("nan"), 3]]}, "must be finite"),
    ({"segmentation": [[1, 1, 5, 5, 10**400, 3]]}, "must be a list of numbers"),
    ({"segmentation": [[1, 1, 5, 5, 1e9, 3]]}, "within 10,000,000"),
    ({"segmentation": [[1, 1, 5, 5, 9e6, 3]]}, "longer than 4,000,000 pixels"),
    ({"segmentation": [[0, 0, 1e5, 1e5, 0, 1e5] * 20]}, "longer than 4,000,000 pixels"),
    ({"segmentation": {"size": [80, 60], "counts": [4800]}}, r"size \[80, 60\] is not"),
    ({"segmentation": {"size": [60, 80], "counts": [100, 20]}}, "add up to 120 pixels of 4800"),
    ({"segmentation": {"size": [60, 80], "counts": "P1370000000V1"}}, "add up to"),
    ({"segmentation": {"size": [60, 80], "counts": "\x01\x02"}}, "damaged"),
    ({"segmentation": {"size": [60, 80], "counts": [-10, 4810]}}, "add up to"),
    ({"segmentation": {"size": [60, 80], "counts": [2**62] * 4 + [4800]}}, "add up to"),
    ({"segmentation": {"size": [60, 80], "counts": [10**30]}}, "counts .* must be a list of whole numbers"),
    ({"segmentation": {"size": [60, 80], "counts": [4799.5, 0.5]}}, "counts .* must be a list of whole"),
    ({"segmentation": {"size": [2**32 + 60, 80], "counts": [4800]}}, r"size \[4294967356, 80\] is not"),
    ({"segmentation": {"size": [60, None], "counts": [4800]}}, r"size \[60, None\] is not"),
    ({"segmentation": {"size": [60, 80]}}, r"counts .* must be a list of whole numbers, got None"),
    ({"segmentation": "abc"}, "must be polygons or an RLE"),
    ({"segmentation": None, "bbox": [1, 2, 3]}, "bbox must be"),
    ({"segmentation": None, "bbox": [1, 2, 3, float("inf")]}, "bbox .* must be finite"),
    ({"segmentation": None, "bbox": [1, 2, [3], 4]}, "bbox .* must be a list of numbers"),
    ({"segmentation": None, "bbox": None}, r"bbox .* must be a list of numbers, got None"),
  ],
)
def test_damaged_annotations_are_named_when_asked_for(tmp_path, images, fields, message):
  path = scenes.write_json(tmp_path, one_annotation(**fields))
  records = load_coco(path, images)
  with pytest.raises(RecordError, match=message) as caught:
    records[0]
  assert caught.value.reason == "annotation damaged"
  assert f"{path}, image 11 (b.png), annotation 4: " in str(caught.value)


def test_images_that_cannot_be_used(images):
  records = load_coco(scenes.coco_dataset(), images)
  (images / "a.png").unlink()
  (images / "b.png").write_bytes((images / "b.png").read_bytes()[:60])
  Image.new("RGB", (81, 60)).save(images / "c.png")
  for record, reason, message in zip(
    records,
    ("image missing", "image damaged", "image size"),
    ("no such image .*a.png", "b.png.* is ", "is 81x60 pixels, its annotations are for 80x60"),
  ):
    with pytest.raises(RecordError, match=message) as caught:
      record.load_image()
    assert caught.value.reason == reason and f"image {record.id}" in str(caught.value)


def test_a_turned_photo_is_read_in_the_frame_of_its_annotations(tmp_path):
  stored = scenes.picture(scenes.SCENES["a.png"])
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by a quarter
  path = tmp_path / "turned.png"
  Image.fromarray(stored).save(path, exif=exif)
  np.testing.assert_array_equal(Record(1, path, (60, 80), ()).load_image(), stored)
  upright = Record(1, path, (80, 60), ()).load_image()
  np.testing.assert_array_equal(upright, np.rot90(stored, -1))


def test_records_of_ones_own():
  masks = np.stack([scenes.mask_of("box", 0, 0, 10, 20), scenes.mask_of("disc", 20, 20, 40, 40)])
  prompt = Prompt.from_masks("thing", masks)
  np.testing.assert_array_equal(prompt.boxes, [[0, 0, 10, 20], [20, 20, 40, 40]])
  image = scenes.picture([])
  record = Record(7, lambda: image, (60, 80), (prompt,))
  assert record.load_image() is image and str(record) == "record 7"
  with pytest.raises(ValueError, match="one of the 3 masks of 'thing' is empty"):
    Prompt.from_masks("thing", np.concatenate([masks, masks[:1] & False]))
  with pytest.raises(ValueError, match="2 masks for 1 boxes"):
    Prompt("thing", [[0, 0, 1, 1]], prompt.masks)
