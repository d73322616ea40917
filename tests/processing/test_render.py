"""The overlay: what can be said of a picture by numbers. (How it looks was judged by eye.)"""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sam3lt_jax.processing import render as module
from sam3lt_jax.processing.render import PALETTE, instance_colors, render
from sam3lt_jax.processing.results import Results
from sam3lt_jax.shapes.scenes import COLOURS


def discs(size, circles, labels=None):
  height, width = size
  y, x = np.mgrid[:height, :width]
  masks = np.array([(x - cx) ** 2 + (y - cy) ** 2 <= r * r for cx, cy, r in circles], bool).reshape(-1, *size)
  boxes = [(cx - r, cy - r, cx + r, cy + r) for cx, cy, r in circles]
  n = len(circles)
  return Results(np.reshape(boxes, (n, 4)), np.linspace(0.95, 0.5, n), masks, labels or ["thing"] * n, size)


def flat(size, value):
  return Image.new("RGB", size[::-1], (value,) * 3)


def oklab(rgb):
  c = np.asarray(rgb) / 255
  c = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
  lms = c @ np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]).T
  return (
    np.cbrt(lms)
    @ np.array([[0.2105, 0.7936, -0.0041], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]).T
  )


@pytest.mark.parametrize("first, least", [(10, 0.095), (20, 0.08)])
def test_palette_is_distinguishable(first, least):
  colors = oklab(PALETTE[:first])
  apart = np.linalg.norm(colors[:, None] - colors[None], axis=-1)[~np.eye(first, dtype=bool)]
  assert apart.min() > least  # 0.02 is about what an eye tells apart side by side
  assert colors[:, 0].min() > 0.55  # seen on black


def test_colors_by_instance_do_not_depend_on_the_rest():
  assert instance_colors(["a"] * 30)[:5] == instance_colors(["a"] * 5)
  assert len(set(instance_colors(["a"] * 60))) == 60
  assert instance_colors(["a", "b"], color_by="instance") == instance_colors(["b", "b"])
  assert instance_colors([]) == []


def test_colors_by_label_are_stable():
  alone = instance_colors(["truck"], color_by="label")[0]
  mixed = instance_colors(["wheel", "truck", "wheel", "truck"])
  assert mixed[1] == alone
  assert len(set(mixed)) == 4  # instances of one label differ in shade
  names = [f"label {i}" for i in range(25)]
  assert len(set(instance_colors(names)[:10])) == 10  # meeting labels move on
  assert len(instance_colors(names)) == 25
  with pytest.raises(ValueError, match="color_by must be"):
    instance_colors(["a"], color_by="size")


def test_colors_by_id_do_not_depend_on_the_frame():
  size = (60, 200)
  masks = discs(size, [(30, 30, 20), (100, 30, 20), (170, 30, 20)], ["truck", "car", "truck"])
  first = dataclasses.replace(masks, ids=[4, 25, 9])
  second = first[[2, 0]]  # one object has left, the others changed places

  def seen(results, x):
    drawn = render(flat(size, 0), results, labels=False, scores=False, outlines=False, opacity=1)
    return drawn.getpixel((x, 30))

  assert [seen(first, 30), seen(first, 170)] == [seen(second, 30), seen(second, 170)]
  assert len({seen(first, 30), seen(first, 100), seen(first, 170)}) == 3
  assert seen(second, 100) == (0, 0, 0)
  assert len(set(instance_colors(["a"] * 60, ids=range(60)))) == 60
  assert instance_colors(["a", "b"], "label", ids=[1, 2]) == instance_colors(["a", "b"])
  with pytest.raises(ValueError, match=r"color_by must be .* without ids"):
    instance_colors(["a"], color_by="id")


@pytest.mark.parametrize("value", [0, 90, 255])
def test_fill_and_outline(value):
  size = (200, 300)
  results = discs(size, [(150, 100, 60)])
  picture = flat(size, value)
  out = np.asarray(render(picture, results, labels=False, scores=False, opacity=0.4)).astype(int)
  assert np.asarray(picture).max() == value  # the photo itself is not drawn on
  color = np.array(PALETTE[0])
  assert np.abs(out[100, 150] - (0.6 * value + 0.4 * color)).max() <= 2
  assert np.abs(out[10, 10] - value).max() == 0
  edge = out[100, 85:95]
  assert np.abs(edge - color).sum(axis=1).min() < 20  # the line itself
  if value:
    assert edge.sum(axis=1).min() < 0.75 * 3 * value  # its dark rim


@pytest.mark.parametrize("name", COLOURS)
def test_a_colour_that_was_asked_for_stays_that_colour(name):
  """Under every tint of `render` it still looks more like itself than like another."""
  colors, size = np.array(list(COLOURS.values())), (60, 90)
  mine, near = list(COLOURS).index(name), oklab(colors)
  for i, tint in enumerate(instance_colors(["a"] * 60)):
    results = dataclasses.replace(discs(size, [(45, 30, 25)]), ids=[i])
    photo = Image.new("RGB", size[::-1], COLOURS[name])
    seen = render(photo, results, labels=False, scores=False).getpixel((45, 30))
    assert np.linalg.norm(near - oklab(seen), axis=1).argmin() == mine, (tint, seen)
    assert seen != COLOURS[name] or tint == COLOURS[name]  # and it is tinted


def test_options_switch_things_off():
  size = (120, 160)
  results, picture = discs(size, [(80, 60, 30)]), flat(size, 128)
  nothing = render(picture, results, labels=False, scores=False, outlines=False, opacity=0)
  assert np.array_equal(np.asarray(nothing), np.asarray(picture))
  with_box = np.asarray(
    render(picture, results, labels=False, scores=False, outlines=False, opacity=0, boxes=True)
  )
  assert tuple(with_box[30, 80]) == PALETTE[0] and tuple(with_box[60, 50]) == PALETTE[0]
  assert tuple(with_box[60, 80]) == (128, 128, 128)
  full, bare = render(picture, results), render(picture, results, labels=False, scores=False)
  assert not np.array_equal(np.asarray(full), np.asarray(bare))


def test_the_smaller_instance_shows_on_the_larger():
  size = (100, 100)
  for circles in ([(50, 50, 40), (50, 50, 12)], [(50, 50, 12), (50, 50, 40)]):
    results = discs(size, circles)
    out = np.asarray(render(flat(size, 0), results, labels=False, scores=False, opacity=1))
    small = 0 if circles[0][2] == 12 else 1
    assert tuple(out[50, 50]) == PALETTE[small] and tuple(out[50, 25]) == PALETTE[1 - small]


def test_overlaps_stay_translucent():
  size = (100, 100)
  results = discs(size, [(50, 50, 20 + i) for i in range(20)])
  out = np.asarray(render(flat(size, 255), results, labels=False, scores=False, outlines=False, opacity=0.4))
  assert out[50, 50].max() > 0.6 * 255  # twenty blends would leave nothing of the photo


def test_empty_mask_gets_its_box_and_wild_boxes_do_no_harm():
  size = (80, 80)
  boxes = [(20, 20, 60, 60), (np.nan, 0, np.inf, 5), (70, 70, -900, 1e9)]
  results = Results(boxes, [0.9, 0.8, 0.7], np.zeros((3, *size)), ["a"] * 3, size)
  out = np.asarray(render(flat(size, 0), results, labels=False, scores=False))
  assert tuple(out[20, 40]) == PALETTE[0]
  assert render(flat(size, 0), results).size == (80, 80)


@pytest.mark.parametrize("kind", ["RGB", "L", "RGBA", "P", "CMYK", "LA", "1", "array", "grey array", "path"])
def test_kinds_of_images(kind, tmp_path):
  size = (40, 60)
  results, picture = discs(size, [(30, 20, 10)]), flat(size, 200)
  if kind == "array":
    picture = np.asarray(picture)
  elif kind == "grey array":
    picture = np.asarray(picture.convert("L"))
  elif kind == "path":
    picture.save(tmp_path / "p.png")
    picture = tmp_path / "p.png"
  else:
    picture = picture.convert(kind)
  out = render(picture, results)
  assert out.mode == "RGB" and out.size == (60, 40)


def test_paths_are_turned_upright(tmp_path):
  picture = flat((60, 40), 10)  # stored 40 wide, 60 high; orientation 6: to be turned by 90 degrees
  exif = Image.Exif()
  exif[0x0112] = 6
  picture.save(tmp_path / "turned.jpg", exif=exif)
  assert render(tmp_path / "turned.jpg", discs((40, 60), [(30, 20, 10)])).size == (60, 40)


@pytest.mark.parametrize("size", [(1, 1), (43, 64), (64, 43), (7, 900), (600, 5), (1200, 1600)])
def test_any_size(size):
  height, width = size
  radius = max(1, min(size) // 3)
  results = discs(size, [(width // 2, height // 2, radius), (0, 0, radius)], ["truck", "a much longer label"])
  for value in (0, 255):
    assert render(flat(size, value), results, boxes=True).size == (width, height)


def test_lines_and_text_grow_with_the_picture():
  def line(scale):
    size = (100 * scale, 100 * scale)
    results = discs(size, [(50 * scale, 50 * scale, 30 * scale)])
    out = np.asarray(render(flat(size, 0), results, labels=False, scores=False, opacity=0))
    return np.count_nonzero(out[50 * scale, : 50 * scale, 2] > PALETTE[0][2] / 2)

  assert line(1) <= 2 and line(10) >= 3 and line(20) >= 5


def labels_of(size, results, monkeypatch, **options):
  """The labels' rectangles and texts, as they are drawn."""
  spots, texts = [], []
  rectangle, write = ImageDraw.ImageDraw.rounded_rectangle, ImageDraw.ImageDraw.text

  def note_rectangle(self, xy, *args, **kwargs):
    spots.append(tuple(xy))
    return rectangle(self, xy, *args, **kwargs)

  def note_text(self, xy, text, *args, **kwargs):
    texts.append(text)
    return write(self, xy, text, *args, **kwargs)

  monkeypatch.setattr(ImageDraw.ImageDraw, "rounded_rectangle", note_rectangle)
  monkeypatch.setattr(ImageDraw.ImageDraw, "text", note_text)
  render(flat(size, 100), results, **options)
  return spots, texts


@pytest.mark.parametrize("size", [(43, 64), (300, 400), (1500, 2000), (30, 900)])
def test_labels_stay_in_the_picture(size, monkeypatch):
  height, width = size
  r = max(2, min(size) // 4)
  corners = [(0, 0, r), (width, 0, r), (0, height, r), (width, height, r), (width // 2, height // 2, r)]
  spots, texts = labels_of(size, discs(size, corners, ["a label of some length"] * 5), monkeypatch)
  assert spots and len(spots) == len(texts)
  for x1, y1, x2, y2 in spots:
    assert 0 <= x1 < x2 < width and 0 <= y1 < y2 < height


def test_labels_do_not_hide_each_other(monkeypatch):
  rng = np.random.default_rng(3)
  size = (600, 800)
  circles = [
    (int(rng.integers(80, 720)), int(rng.integers(80, 520)), int(rng.integers(30, 90))) for _ in range(30)
  ]
  spots, _ = labels_of(size, discs(size, circles), monkeypatch)
  assert len(spots) == 30
  hidden = 0
  for i, a in enumerate(spots):
    for b in spots[:i]:
      hidden += max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
  area = sum((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in spots)
  assert hidden < 0.02 * area


def test_a_label_stands_by_the_main_part(monkeypatch):
  size = (600, 800)
  body = discs(size, [(600, 450, 90)])
  masks = body.masks.copy()
  masks[0, 20:23, 30:60] = True  # a sliver, far away
  (spot,), _ = labels_of(size, dataclasses.replace(body, masks=masks), monkeypatch)
  assert 450 < spot[0] and spot[2] < 750 and 300 < spot[1]


def test_a_label_keeps_off_other_objects(monkeypatch):
  size = (600, 800)
  over, under = (400, 200, 90), (400, 390, 90)  # above the lower disc, where its label would go, is the upper
  spots, texts = labels_of(size, discs(size, [over, under], ["over", "under"]), monkeypatch)
  x1, y1, x2, y2 = spots[[text.startswith("under") for text in texts].index(True)]
  upper = discs(size, [over]).masks[0]
  assert upper[int(y1) : int(y2), int(x1) : int(x2)].mean() < 1 / 16


def test_what_two_phrases_found_is_labelled_twice_at_one_place(monkeypatch):
  size = (600, 800)
  spots, _ = labels_of(size, discs(size, [(400, 300, 60)] * 2, ["star", "shape"]), monkeypatch)
  for x1, y1, x2, y2 in spots:
    assert x1 < 470 and x2 > 330 and 190 < y1 and y2 < 410


def test_a_crowd_does_not_bury_the_photo(monkeypatch):
  size = (120, 160)
  spots, texts = labels_of(size, discs(size, [(80, 60, 5 + i % 40) for i in range(100)]), monkeypatch)
  area = sum((x2 - x1 + 1) * (y2 - y1 + 1) for x1, y1, x2, y2 in spots)
  assert 1 <= len(spots) < 100 and area <= 120 * 160 / 3
  assert texts[0] == "thing 0.95"  # the best are the ones that stay


def test_names_and_scores(monkeypatch):
  size = (300, 400)
  results = discs(size, [(200, 150, 50)], ["truck"])
  assert labels_of(size, results, monkeypatch)[1] == ["truck 0.95"]
  assert labels_of(size, results, monkeypatch, scores=False)[1] == ["truck"]
  assert labels_of(size, results, monkeypatch, labels=False)[1] == ["0.95"]
  tracked = dataclasses.replace(results, ids=[3])
  assert labels_of(size, tracked, monkeypatch)[1] == ["truck #3 0.95"]
  long = discs((60, 80), [(40, 30, 20)], ["an endless description " * 5])
  (text,) = labels_of((60, 80), long, monkeypatch)[1]
  assert text.startswith("an") and text.endswith("... 0.95")


@pytest.mark.parametrize(
  "label, readable",
  [
    ("naïve café", None),
    ("日本語", None),
    ("🚚🚚", None),
    ("top\nleft\t!", "top left !"),
    ("", ""),
    ("\ud800", None),
  ],
)
def test_labels_outside_ascii(label, readable, monkeypatch):
  size = (300, 400)
  (text,) = labels_of(size, discs(size, [(200, 150, 50)], [label]), monkeypatch)[1]
  assert text.endswith("0.95")
  if readable is not None:
    assert text == f"{readable} 0.95".strip()


def test_missing_glyphs_become_plain_letters(monkeypatch):
  monkeypatch.setattr(module, "_system_fonts", lambda: ())
  monkeypatch.setattr(module, "_has_glyph", lambda path, char: char.isascii())
  assert module._writable("Crème brûlée 語", None) == ("Creme brulee ?", None)


def test_a_font_of_ones_own(tmp_path):
  size = (100, 200)
  results = discs(size, [(100, 50, 30)])
  with pytest.raises(ValueError, match="font must be the path of a TrueType or OpenType font"):
    render(flat(size, 0), results, font=tmp_path / "none.ttf")


def test_scale():
  size = (43, 64)
  results, picture = discs(size, [(32, 20, 10)]), flat(size, 128)
  assert render(picture, results, scale=2.5).size == (160, 108)
  assert render(picture, results, scale="auto").size == (64 * 8, 43 * 8)
  assert render(flat((600, 800), 0), discs((600, 800), []), scale="auto").size == (800, 600)
  assert render(picture, Results.empty(size), scale=2).size == (128, 86)
  # What is drawn of a strip stays what a JPEG and the memory hold.
  for size, drawn in (((1, 20_000), (60_000, 3)), ((200_000, 1), (1, 65_500)), ((131_000, 4), (2, 65_500))):
    assert render(flat(size, 128), Results.empty(size), scale="auto").size == drawn


@pytest.mark.parametrize(
  "options, message",
  [
    ({"opacity": 1.5}, "opacity must be"),
    ({"scale": 0}, "scale must be"),
    ({"scale": "big"}, "scale must be"),
    ({"color_by": "x"}, "color_by must be"),
    ({"image": np.full((40, 60, 3), 255.0)}, "image: a floating-point array must lie in"),
    ({"image": np.zeros((3, 40, 60), np.uint8)}, "image must be an array"),
    ({"image": flat((41, 60), 0)}, "image must be the one the results belong to: 40x60"),
  ],
)
def test_wrong_options(options, message):
  options = {"image": flat((40, 60), 0), **options}
  with pytest.raises(ValueError, match=message):
    render(results=discs((40, 60), [(30, 20, 10)]), **options)


def test_results_render_passes_options_on():
  size = (60, 80)
  results, picture = discs(size, [(40, 30, 20)]), flat(size, 50)
  assert np.array_equal(
    np.asarray(results.render(picture, boxes=True)), np.asarray(render(picture, results, boxes=True))
  )


def test_dilate_is_a_disc():
  point = np.zeros((21, 21), bool)
  point[10, 10] = True
  y, x = np.mgrid[-10:11, -10:11]
  for radius in (1, 2, 5, 8):
    assert np.array_equal(module._dilate(point, radius), x**2 + y**2 <= (radius + 0.5) ** 2)
  assert module._dilate(np.ones((1, 1), bool), 9).all()
