"""Batches: the contract's shapes and types, what is in them, the same for (seed, step), and bad records."""

import dataclasses
import logging
import sys

import numpy as np
import pytest

from sam3lt_jax.config import BOX_ONLY_PHRASE, PADDING_LABEL
from sam3lt_jax.data.augment import AugmentConfig
from sam3lt_jax.data.batches import BatchConfig, DetectionBatches
from sam3lt_jax.data.coco import load_coco
from sam3lt_jax.data.examples import draw_prompts, jitter_box, make_example, shrink_mask
from sam3lt_jax.data.records import Prompt, Record, RecordError
from sam3lt_jax.processing.processor import Sam3Processor
from tests import tiny
from tests.data import scenes

CONFIG = tiny.config(vocab_size=49408)  # 84 pixels, a grid of 6, masks of 24 x 24
PROCESSOR = Sam3Processor(CONFIG)
STILL = BatchConfig(batch_size=2, prompts=3, objects=4, augment=None)


@pytest.fixture
def records(tmp_path):
  return load_coco(scenes.coco_dataset(), scenes.write_images(tmp_path))


def batches(records, config=STILL, **options):
  return DetectionBatches(records, CONFIG, config, processor=PROCESSOR, **options)


def phrase_ids(*phrases):
  return PROCESSOR(text=list(phrases))["input_ids"]


def assert_equal(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def made(record, config, seed=0):
  return make_example(record, config, PROCESSOR, 24, np.random.default_rng(seed))


def test_shapes_and_types(records):
  config = BatchConfig(batch_size=2, prompts=3, objects=5, box_prompts=0.5, max_boxes=2)
  out = batches(records, config)[0]
  T = CONFIG.profile.context_length
  expected = {
    "pixel_values": ((2, 84, 84, 3), np.float32),
    "input_ids": ((2, 3, T), np.int32),
    "attention_mask": ((2, 3, T), np.int32),
    "input_boxes": ((2, 3, 2, 4), np.float32),
    "input_boxes_labels": ((2, 3, 2), np.int32),
    "target_boxes": ((2, 3, 5, 4), np.float32),
    "target_masks": ((2, 3, 5, 24, 24), np.uint8),
    "target_valid": ((2, 3, 5), np.bool_),
    "target_has_mask": ((2, 3, 5), np.bool_),
    "prompt_valid": ((2, 3), np.bool_),
    "exhaustive": ((2, 3), np.bool_),
    "id": ((2,), np.int64),
  }
  assert {key: (value.shape, value.dtype.type) for key, value in out.items()} == expected
  assert np.abs(out["pixel_values"]).max() <= 1
  assert set(np.unique(out["target_masks"])) == {0, 1}
  # Without box prompts there are no slots for boxes.
  assert batches(records)[0]["input_boxes"].shape == (2, 3, 0, 4)


def test_an_image_without_augmentation(records):
  record = records[0]
  out = made(record, dataclasses.replace(STILL, negatives=0.0))
  np.testing.assert_array_equal(out["pixel_values"], PROCESSOR(record.load_image())["pixel_values"][0])
  assert out["id"] == 10 and out["prompt_valid"].tolist() == [True, True, False]
  ids = phrase_ids("red box", "green disc", BOX_ONLY_PHRASE)
  red = int((out["input_ids"] == ids[0]).all(-1).argmax())
  green = 1 - red
  np.testing.assert_array_equal(out["input_ids"][[red, green, 2]], ids)
  assert out["target_valid"][red].tolist() == [True, True, False, False]
  np.testing.assert_array_equal(out["target_has_mask"], out["target_valid"])
  # x 5..25 of 80, y 10..40 of 60.
  np.testing.assert_allclose(out["target_boxes"][red, 0], [15 / 80, 25 / 60, 20 / 80, 30 / 60], atol=1e-7)
  # 24 cells over 80 pixels: x 1.5 .. 7.5 cells; half cells are not more than half. y 4 .. 16 cells.
  mask = np.zeros((24, 24), np.uint8)
  mask[4:16, 2:7] = 1
  np.testing.assert_array_equal(out["target_masks"][red, 0], mask)
  disc = shrink_mask(scenes.mask_of("disc", 30, 5, 50, 25), (24, 24))
  np.testing.assert_array_equal(out["target_masks"][green, 0], disc)
  assert not out["target_boxes"][red, 2:].any() and not out["target_masks"][red, 2:].any()
  assert not out["target_valid"][2].any() and out["attention_mask"][2].any()


def test_negatives_are_present_prompts_without_objects(records):
  out = made(records[2], STILL)
  assert out["prompt_valid"].any() and not out["target_valid"].any()
  np.testing.assert_array_equal(out["exhaustive"], out["prompt_valid"])
  only = made(records[0], dataclasses.replace(STILL, negatives=1.0))
  np.testing.assert_array_equal(only["input_ids"][0], phrase_ids("blue box")[0])
  assert only["prompt_valid"].tolist() == [True, False, False]


def prompt(phrase, objects=1, **options):
  return Prompt(phrase, [[10, 10, 30, 30]] * objects, **options)


def test_share_of_negatives():
  both = Record(
    1, "", (60, 80), tuple([prompt(f"p{i}") for i in range(9)] + [prompt(f"n{i}", 0) for i in range(9)])
  )
  few = Record(2, "", (60, 80), (prompt("p0"), prompt("p1"), *both.prompts[9:]))
  rng = np.random.default_rng(0)
  for share in (0.0, 0.25, 0.5, 1.0):
    config = BatchConfig(prompts=6, negatives=share)
    for record in (both, few) if share < 1 else (both,):
      drawn = [draw_prompts(record, config, rng) for _ in range(400)]
      counts = np.array([[p.phrase[0] == "n" for p in row].count(True) for row in drawn])
      sizes = np.array([len(row) for row in drawn])
      assert abs(counts.sum() / sizes.sum() - share) < 0.05
      if record is both:
        assert (sizes == 6).all()
      assert all(len({p.phrase for p in row}) == len(row) for row in drawn)  # no phrase twice
  first = {row[0].phrase for row in drawn}
  assert len(first) > 3  # in random order


def test_what_cannot_be_asked():
  rng = np.random.default_rng(0)
  unknown = Record(1, "", (60, 80), (prompt("crowd", 0, exhaustive=False),), "file.json, image 1")
  for record, share in (
    (unknown, 0.5),
    (Record(2, "", (60, 80), ()), 0.5),
    (Record(3, "", (60, 80), (prompt("absent", 0),)), 0.0),
    (Record(4, "", (60, 80), (prompt("there"),)), 1.0),
  ):
    with pytest.raises(RecordError, match="no phrase that could be asked") as caught:
      draw_prompts(record, BatchConfig(negatives=share), rng)
    assert caught.value.reason == "no prompts"
  present = Record(5, "", (60, 80), (*unknown.prompts, prompt("there")))
  assert [p.phrase for p in draw_prompts(present, BatchConfig(negatives=0.5), rng)] == ["there"]


def still_record(*prompts):
  return Record(1, lambda: np.zeros((60, 80, 3), np.uint8), (60, 80), prompts)


def test_boxes_alone_have_no_mask():
  out = made(still_record(prompt("thing", 2)), dataclasses.replace(STILL, negatives=0.0))
  assert out["target_valid"][0].sum() == 2 and not out["target_has_mask"].any()
  np.testing.assert_allclose(out["target_boxes"][0, 0], [0.25, 20 / 60, 0.25, 20 / 60], atol=1e-7)


def test_a_mask_that_vanishes_is_no_mask():
  dot = np.zeros((1, 60, 80), bool)
  dot[0, 30, 40] = True  # one pixel of the 8.3 in a cell
  out = made(still_record(Prompt.from_masks("dot", dot)), STILL)
  assert out["target_valid"][0, 0] and not out["target_has_mask"].any()


def test_more_objects_than_slots_keep_the_largest():
  boxes = [[0, 0, 5, 5], [0, 0, 40, 40], [0, 0, 10, 10], [0, 0, 20, 20], [0, 0, 30, 30], [0, 0, 6, 6]]
  out = made(still_record(Prompt("many", boxes)), STILL)
  np.testing.assert_allclose(out["target_boxes"][0, :, 2] * 80, [40, 10, 20, 30], rtol=1e-6)
  assert out["prompt_valid"][0] and not out["exhaustive"][0]
  fits = made(still_record(Prompt("many", boxes[:4])), STILL)
  assert fits["exhaustive"][0]


def test_objects_cropped_away_make_a_negative_and_slivers_nothing():
  """Zoomed in on a window of a quarter, an object at the corner is whole, cut, a sliver or gone."""
  masks = scenes.mask_of("box", 0, 0, 12, 12)[None]
  record = still_record(Prompt.from_masks("corner", masks))
  config = dataclasses.replace(
    STILL, negatives=0.0, augment=AugmentConfig(flip=0, scale=(2, 2), aspect=1, min_visible=0.5)
  )
  seen = set()
  for seed in range(80):
    out = made(record, config, seed)
    state = bool(out["target_valid"][0].any()), bool(out["exhaustive"][0]), bool(out["prompt_valid"][0])
    seen.add(state)
    if out["target_has_mask"][0, 0]:
      rows, columns = np.nonzero(out["target_masks"][0, 0])
      cx, cy, w, h = out["target_boxes"][0, 0] * 24
      # The box goes around the mask, to the half cell that the mask is rounded by.
      assert abs(columns.min() - (cx - w / 2)) <= 0.51 and abs(columns.max() + 1 - (cx + w / 2)) <= 0.51
      assert abs(rows.min() - (cy - h / 2)) <= 0.51 and abs(rows.max() + 1 - (cy + h / 2)) <= 0.51
  # An object; a negative; neither.
  assert seen == {(True, True, True), (False, True, True), (False, False, False)}


def test_box_prompts():
  masks = np.stack([scenes.mask_of("box", 0, 0, 20, 20), scenes.mask_of("box", 40, 20, 60, 50)])
  record = still_record(Prompt.from_masks("thing", masks), prompt("absent", 0))
  config = dataclasses.replace(
    STILL, box_prompts=1.0, box_only=0.5, max_boxes=2, box_jitter=0.1, negatives=0.5
  )
  ids = phrase_ids("thing", "absent", BOX_ONLY_PHRASE)
  counts, alone = set(), []
  for seed in range(60):
    out = made(record, config, seed)
    for k in np.flatnonzero(out["prompt_valid"]):
      labels, boxes = out["input_boxes_labels"][k], out["input_boxes"][k]
      if not out["target_valid"][k].any():
        np.testing.assert_array_equal(out["input_ids"][k], ids[1])
        assert (labels == PADDING_LABEL).all()
        continue
      count = int((labels == 1).sum())
      counts.add(count)
      assert labels.tolist() == [1] * count + [PADDING_LABEL] * (2 - count)
      assert (boxes[count:] == [-10, -10, 0, 0]).all()
      # Each is near another one of the objects.
      near = np.abs(boxes[:count, None] - out["target_boxes"][k, None, :2]).max(-1).argmin(1)
      assert len(set(near)) == count
      for box, true in zip(boxes, out["target_boxes"][k][near]):
        assert (np.abs(box - true) <= 0.2 * np.tile(true[2:], 2) + 1e-6).all() and (box != true).any()
      alone.append((out["input_ids"][k] == ids[2]).all())
      assert alone[-1] or (out["input_ids"][k] == ids[0]).all()
      assert out["target_valid"][k].sum() == 2  # all of the kind are sought
  assert counts == {1, 2} and 0.25 < np.mean(alone) < 0.75
  single = still_record(dataclasses.replace(record.prompts[0], all_of_kind=False))
  for seed in range(10):  # a box does not ask for this phrase, which stays
    out = made(single, dataclasses.replace(config, box_only=1.0, negatives=0.0), seed)
    np.testing.assert_array_equal(out["input_ids"][0], ids[0])


def test_jitter_stays_within_the_image():
  rng = np.random.default_rng(0)
  for _ in range(50):
    x1, y1, x2, y2 = jitter_box(np.array([0, 0, 80, 30], np.float32), (60, 80), 0.4, rng)
    assert 0 <= x1 < x2 <= 80 and 0 <= y1 < y2 <= 42


def test_shrink_mask_is_the_area_average():
  rng = np.random.default_rng(0)
  for _ in range(60):
    (H, W), (h, w) = rng.integers(1, 40, 2), rng.integers(1, 30, 2)
    mask = rng.random((H, W)) < rng.random()
    # On a grid that both sizes divide, by counting.
    shares = mask.repeat(h, 0).repeat(w, 1).reshape(h, H, w, W).mean((1, 3))
    np.testing.assert_array_equal(shrink_mask(mask, (h, w)), shares > 0.5 + 1e-9)


def test_the_same_for_seed_and_step(records):
  config = dataclasses.replace(STILL, augment=AugmentConfig(), box_prompts=0.5, seed=3)
  first, again = batches(records, config), batches(records, config)
  forward = [first[step] for step in range(6)]
  for step in (5, 0, 3):  # in another order, in another object
    assert_equal(again[step], forward[step])
  other = batches(records, dataclasses.replace(config, seed=4))
  assert any((other[s]["pixel_values"] != forward[s]["pixel_values"]).any() for s in range(3))
  # Three epochs of 3 records in 4.5 batches of 2: each record once an epoch, in changing order.
  ids = np.concatenate([batch["id"] for batch in forward])
  epochs = [ids[i : i + 3].tolist() for i in (0, 3, 6, 9)]
  assert all(sorted(epoch) == [10, 11, 12] for epoch in epochs) and len(set(map(tuple, epochs))) > 1
  # The same record is drawn anew each time.
  images = [b["pixel_values"][i] for b in forward for i in range(2) if b["id"][i] == 10]
  assert (images[0] != images[1]).any()
  plain = batches(records, dataclasses.replace(config, shuffle=False))
  assert np.concatenate([plain[s]["id"] for s in range(3)]).tolist() == [10, 11, 12] * 2
  with pytest.raises(ValueError, match="step must not be negative"):
    plain[-1]


def test_processes_share_a_batch(records):
  config = dataclasses.replace(STILL, batch_size=4, augment=AugmentConfig())
  whole = batches(records, config)[1]
  parts = [batches(records, config, process_index=i, process_count=2)[1] for i in range(2)]
  for key, value in whole.items():
    np.testing.assert_array_equal(value, np.stack([parts[0][key], parts[1][key]], 1).reshape(value.shape))
  with pytest.raises(ValueError, match="batch_size=4; accepted: a multiple of the 3 processes"):
    batches(records, config, process_count=3)
  with pytest.raises(ValueError, match="process_index"):
    batches(records, config, process_index=2, process_count=2)


def test_bad_records_are_counted_once_and_replaced(tmp_path, caplog):
  images = scenes.write_images(tmp_path)
  data = scenes.coco_dataset()
  data["images"].append(data["images"][1] | {"id": 13, "file_name": "gone.png"})
  data["annotations"][3]["segmentation"] = [["x", 2]]
  good = batches(load_coco(scenes.coco_dataset(), images), dataclasses.replace(STILL, shuffle=False))
  assert good.skipped == {}
  config = dataclasses.replace(STILL, shuffle=False, augment=AugmentConfig())
  dataset = batches(load_coco(data, images), config)
  with caplog.at_level(logging.WARNING):
    first = [dataset[step] for step in range(4)]
  # 11 is damaged: 12 stands in. 13 has no image: 10 does.
  assert np.concatenate([b["id"] for b in first]).tolist() == [10, 12, 12, 10] * 2
  assert dataset.skipped == {"annotation damaged": 1, "image missing": 1}
  messages = [r.message for r in caplog.records]
  assert len(messages) == 2
  assert "skipped (annotation damaged): annotations, image 11 (b.png), annotation 4" in messages[0]
  assert "gone.png" in messages[1]
  # The stand-ins do not depend on what was met before.
  assert_equal(batches(load_coco(data, images), config)[3], first[3])


def test_nothing_but_bad_records(tmp_path):
  data = scenes.coco_dataset()
  (tmp_path / "empty").mkdir()
  dataset = batches(load_coco(data, tmp_path / "empty"))
  with pytest.raises(ValueError, match=r"none of the 3 records can be used; for instance .*no such image"):
    dataset[0]
  assert dataset.skipped == {"image missing": 3}
  with pytest.raises(ValueError, match="at least one record"):
    batches([])


def test_grain_iterates_over_the_same(records):
  dataset = batches(records)
  for step, batch in zip(range(3), dataset.dataset.to_iter_dataset()):
    assert_equal(batch, dataset[step])


def test_without_grain(records, monkeypatch):
  monkeypatch.setitem(sys.modules, "grain", None)
  with pytest.raises(ImportError, match=r"pip install 'sam3lt_jax\[train\]'"):
    batches(records)


@pytest.mark.parametrize(
  ("field", "value"),
  [("batch_size", 0), ("prompts", 0), ("objects", 0), ("max_boxes", 0), ("negatives", 1.5),
   ("box_prompts", -1), ("box_only", 2), ("box_jitter", 0.5), ("mask_side", 0), ("seed", -1)],
)  # fmt: skip
def test_wrong_settings(field, value):
  with pytest.raises(ValueError, match=field):
    BatchConfig(**{field: value})


def test_another_mask_side(records):
  assert batches(records).mask_side == 24
  out = batches(records, dataclasses.replace(STILL, mask_side=10))
  assert out.mask_side == 10 and out[0]["target_masks"].shape[-2:] == (10, 10)
