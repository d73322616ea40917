"""COCO files to records: every form of mask, phrases, negatives, crowds, and files that are wrong."""

import copy

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam3lt_jax.data import rle as rle_ops
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


def test_box_without_a_mask(images):
  for missing in (None, []):
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
  with pytest.raises(ValueError, match=r"'green_disc' has the phrase of category 'red_box'"):
    load_coco(data, images, phrases={"green_disc": "red box"})


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
    (lambda d: d["images"][1].update(id="b"), "image 1 has no whole-number id"),
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
    ({"segmentation": [[1, 1, 5, 5]]}, "a polygon must be"),
    ({"segmentation": [[1, 1, 5, 5, float("nan"), 3]]}, "must be finite"),
    ({"segmentation": [[1, 1, 5, 5, 1e9, 3]]}, "within 100000 pixels"),
    ({"segmentation": [[90, 1, 95, 1, 95, 9]]}, "holds no pixel"),
    ({"segmentation": {"size": [80, 60], "counts": [4800]}}, r"size \[80, 60\] is not"),
    ({"segmentation": {"size": [60, 80], "counts": [100, 20]}}, "add up to 120 pixels of 4800"),
    ({"segmentation": {"size": [60, 80], "counts": "P1370000000V1"}}, "add up to"),
    ({"segmentation": {"size": [60, 80], "counts": "\x01\x02"}}, "damaged"),
    ({"segmentation": {"size": [60, 80], "counts": [-10, 4810]}}, "add up to"),
    ({"segmentation": {"size": [60, 80]}}, "counts must be"),
    ({"segmentation": "abc"}, "must be polygons or an RLE"),
    ({"segmentation": None, "bbox": [1, 2, 3]}, "bbox must be"),
    ({"segmentation": None, "bbox": [1, 2, 0, 5]}, "no area within the image of 80x60"),
    ({"segmentation": None, "bbox": None}, "bbox must be"),
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
