"""Reading, squaring and normalising images; everything a user may hand over by mistake."""

import io
import os
import resource
import struct

import numpy as np
import pytest
from PIL import Image

from sam3lt_jax.processing import images
from sam3lt_jax.processing.images import (
  ImageError,
  check_file,
  load_image,
  normalise,
  preprocess,
  resize_image,
)
from tests.reference import import_torch_reference


def _photo(height=60, width=90, seed=0):
  """Smooth colour fields with noise and hard edges, [H, W, 3] uint8."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[:height, :width]
  base = np.stack([np.sin(x / 7) + np.cos(y / 5), np.cos(x / 11 + y / 3), np.sign(np.sin((x + y) / 9))], -1)
  return np.clip(128 + 50 * base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)


def _saved(tmp_path, image, name, **kwargs):
  path = tmp_path / name
  image.save(path, **kwargs)
  return path


def _file_bytes(image, fmt, **kwargs):
  buffer = io.BytesIO()
  image.save(buffer, fmt, **kwargs)
  return buffer.getvalue()


def test_path_bytes_pil_and_array_agree(tmp_path):
  photo = _photo()
  pil = Image.fromarray(photo)
  path = _saved(tmp_path, pil, "a.png")
  for source in (path, str(path), path.read_bytes(), pil, photo):
    loaded = load_image(source)
    assert loaded.dtype == np.uint8 and loaded.shape == (60, 90, 3)
    np.testing.assert_array_equal(loaded, photo)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_files_and_not_to_pil_images(tmp_path, orientation):
  # Four flat quadrants survive JPEG; where the red one ends up tells the orientation.
  photo = np.zeros((32, 64, 3), np.uint8)
  photo[:16, :32] = (255, 0, 0)
  photo[:16, 32:] = (0, 255, 0)
  photo[16:, :32] = (0, 0, 255)
  exif = Image.Exif()
  exif[0x0112] = orientation
  path = _saved(tmp_path, Image.fromarray(photo), "a.jpg", exif=exif, quality=95, subsampling=0)
  upright = {
    1: photo,
    2: photo[:, ::-1],
    3: photo[::-1, ::-1],
    4: photo[::-1],
    5: photo.transpose(1, 0, 2),
    6: np.rot90(photo, -1),
    7: photo[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(photo),
  }[orientation]
  for source in (path, path.read_bytes()):
    loaded = load_image(source)
    assert loaded.shape == upright.shape
    assert np.abs(loaded.astype(int) - upright).mean() < 2
  with Image.open(path) as pil:
    assert load_image(pil).shape == (32, 64, 3)


def test_grey_palette_bilevel_and_cmyk(tmp_path):
  photo = _photo()
  grey = Image.fromarray(photo).convert("L")
  expected = np.repeat(np.asarray(grey)[..., None], 3, -1)
  np.testing.assert_array_equal(load_image(grey), expected)
  np.testing.assert_array_equal(load_image(_saved(tmp_path, grey, "grey.png")), expected)
  np.testing.assert_array_equal(load_image(np.asarray(grey)), expected)
  np.testing.assert_array_equal(load_image(np.asarray(grey)[..., None]), expected)

  palette = Image.fromarray(photo).convert("P")
  np.testing.assert_array_equal(
    load_image(_saved(tmp_path, palette, "palette.png")), np.asarray(palette.convert("RGB"))
  )
  bilevel = Image.fromarray(photo).convert("1")
  assert set(np.unique(load_image(bilevel))) == {0, 255}

  flat = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
  loaded = load_image(_saved(tmp_path, flat, "cmyk.jpg", quality=95))
  assert np.abs(loaded.astype(int) - (255, 0, 0)).max() <= 4


def test_transparency_is_composited_over_white(tmp_path):
  rgba = np.zeros((4, 4, 4), np.uint8)
  rgba[..., 0] = 200
  rgba[:2, :, 3] = 255  # opaque red above
  rgba[2, :, 3] = 51  # a fifth
  for source in (Image.fromarray(rgba), _saved(tmp_path, Image.fromarray(rgba), "a.png"), rgba):
    loaded = load_image(source)
    assert loaded.shape == (4, 4, 3)
    assert (loaded[:2] == (200, 0, 0)).all()
    assert np.abs(loaded[2].astype(int) - (244, 204, 204)).max() <= 1
    assert (loaded[3] == 255).all()
  assert (load_image(Image.new("LA", (3, 3), (10, 0))) == 255).all()
  assert (load_image(Image.new("RGBa", (3, 3), (0, 0, 0, 0))) == 255).all()

  palette = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "L").convert("P")
  path = _saved(tmp_path, palette, "p.png", transparency=0)
  with Image.open(path) as opened:
    assert opened.mode == "P"
  loaded = load_image(path)
  assert (loaded[0, 0] == 255).all() and (loaded[1, 1] < 10).all()


def test_16_bit_grey_is_scaled_to_8_bit(tmp_path):
  values = np.array([[0, 128, 129], [257, 32896, 65535]], np.uint16)
  expected = np.array([[0, 0, 1], [1, 128, 255]], np.uint8)
  path = tmp_path / "wide.png"
  Image.fromarray(values).save(path)
  for source in (path, Image.fromarray(values), Image.fromarray(values.astype(np.int32))):
    loaded = load_image(source)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, np.repeat(expected[..., None], 3, -1))
  with pytest.raises(ValueError, match=r"-5\.\.7; 0\.\.65535"):
    load_image(Image.fromarray(np.array([[-5, 7]], np.int32)))


def test_float_arrays_a_rounding_outside_are_clipped():
  """As products, sums of weights and bfloat16 leave them; what is clearly outside keeps its error."""
  out = load_image(np.array([[[-1e-6, 0.5, 1 + 2e-7], [1.0078125, -0.004, 1.0]]], np.float32))
  assert out.tolist() == [[[0, 128, 255], [255, 0, 255]]]
  for wrong in (1.05, 2.0, 255.0, -0.05, -1.0, np.inf, np.nan):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
      load_image(np.array([[[0.5, 0.5, wrong]]], np.float32))


def test_closed_pil_images(tmp_path):
  """However far it was read before it was closed."""
  path = tmp_path / "a.png"
  Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(path)
  with Image.open(path) as left:
    pass
  opened, loaded, made = Image.open(path), Image.open(path), Image.new("RGB", (4, 5))
  grey, wide = Image.new("L", (3, 3)), Image.new("I;16", (3, 3))
  loaded.load()
  for image in (opened, loaded, made, grey, wide):
    image.close()
  for image in (left, opened, loaded, made, grey, wide):
    with pytest.raises(ValueError, match=r"^image.* closed"):
      load_image(image)


def test_float_arrays_in_0_1_are_scaled():
  photo = _photo()
  np.testing.assert_array_equal(load_image(photo / 255.0), photo)
  np.testing.assert_array_equal(load_image((photo / 255.0).astype(np.float32)), photo)
  np.testing.assert_array_equal(load_image(Image.fromarray(np.full((2, 2), 0.2, np.float32))), 51)


def test_one_pixel_and_a_thin_image():
  pixels, size = preprocess(np.full((1, 1, 3), (255, 0, 51), np.uint8), 28)
  assert pixels.shape == (28, 28, 3) and size == (1, 1)
  np.testing.assert_allclose(pixels, np.broadcast_to([1.0, -1.0, -0.6], pixels.shape), atol=1e-6)
  pixels, size = preprocess(_photo(1, 500), 28)
  assert pixels.shape == (28, 28, 3) and size == (1, 500)


@pytest.mark.full  # 2 s
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_12000x9000_image_is_accepted(tmp_path):
  path = _saved(tmp_path, Image.new("L", (12000, 9000), 60), "large.png", compress_level=1)
  pixels, size = preprocess(path, 56)
  assert size == (9000, 12000)
  np.testing.assert_allclose(pixels, (60 / 255 - 0.5) / 0.5, atol=1e-6)


def test_over_pillows_limit_the_error_says_how_to_raise_it(tmp_path, monkeypatch):
  path = _saved(tmp_path, Image.fromarray(_photo()), "bomb.png")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
  with pytest.raises(ValueError, match=r"bomb\.png.*MAX_IMAGE_PIXELS"):
    load_image(path)


def test_damaged_files_are_named(tmp_path):
  jpeg = _file_bytes(Image.fromarray(_photo(200, 300)), "JPEG")
  png = _file_bytes(Image.fromarray(_photo(200, 300)), "PNG")
  for name, data in (("cut.jpg", jpeg[: len(jpeg) // 2]), ("cut.png", png[: len(png) // 2])):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}.*damaged or truncated"):
      load_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"bytes\).*damaged or truncated"):
      load_image(data)
  with Image.open(tmp_path / "cut.jpg") as lazy, pytest.raises(ValueError, match="damaged or truncated"):
    load_image(lazy)
  broken = bytearray(png)
  broken[60:80] = os.urandom(20)
  with pytest.raises(ValueError, match="damaged or truncated"):
    load_image(bytes(broken))


def test_what_is_not_an_image(tmp_path):
  (tmp_path / "notes.jpg").write_text("this is text")
  with pytest.raises(ValueError, match=r"notes\.jpg.*not an image"):
    load_image(tmp_path / "notes.jpg")
  (tmp_path / "empty.png").write_bytes(b"")
  with pytest.raises(ValueError, match=r"empty\.png.*is empty \(0 bytes\)"):
    load_image(tmp_path / "empty.png")
  with pytest.raises(ValueError, match=r"is empty"):
    load_image(b"")
  with pytest.raises(FileNotFoundError, match="nowhere"):
    load_image(tmp_path / "nowhere.png")
  os.mkfifo(tmp_path / "pipe.jpg")
  for path, kind in (
    (tmp_path, "a folder"),
    (tmp_path / "pipe.jpg", "a named pipe"),
    ("/dev/zero", "a device"),
  ):
    with pytest.raises(ImageError, match=f"^image '.*' is {kind}, no file$"):
      load_image(path)
  with pytest.raises(ValueError, match="not fetched"):
    load_image("https://example.com/a.jpg")
  for thing in (None, 3, [[1, 2], [3, 4]], object(), {"a": 1}):
    with pytest.raises(ValueError, match=rf"image must be .*got {type(thing).__name__}"):
      load_image(thing)


def test_arrays_of_another_layout_or_type():
  photo = _photo()
  with pytest.raises(ValueError, match=r"\(3, 60, 90\).*channels first.*moveaxis"):
    load_image(np.moveaxis(photo, -1, 0))
  with pytest.raises(ValueError, match=r"\(1, 60, 90\).*channels first"):
    load_image(photo[None, ..., 0])
  with pytest.raises(ValueError, match=r"\(60, 90, 2\)"):
    load_image(photo[..., :2])
  with pytest.raises(ValueError, match="batch"):
    load_image(photo[None])
  for shape in ((0, 5, 3), (5, 0), (0, 0, 3)):
    with pytest.raises(ValueError, match="no pixels"):
      load_image(np.zeros(shape, np.uint8))
  for dtype in (bool, np.int32, np.uint16, np.int64):
    with pytest.raises(ValueError, match=rf"uint8 or floating point.*got {np.dtype(dtype)}"):
      load_image(photo.astype(dtype))
  with pytest.raises(ValueError, match="divide by 255"):
    load_image(photo.astype(np.float32))
  with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got -1"):
    load_image(photo / 127.5 - 1.0 - 1e-3)
  with pytest.raises(ValueError, match="nan"):
    load_image(np.full((4, 4, 3), np.nan, np.float32))


def test_normalise_every_level():
  levels = np.arange(256, dtype=np.uint8)
  out = normalise(levels)
  assert out.dtype == np.float32 and out[0] == -1 and out[-1] == 1
  np.testing.assert_allclose(out, levels / 127.5 - 1, atol=2e-7)


def test_resize_does_not_keep_the_aspect_and_leaves_the_right_size_alone():
  photo = _photo(30, 90)
  assert resize_image(photo, 56).shape == (56, 56, 3)
  square = _photo(56, 56)
  assert resize_image(square, 56) is square
  np.testing.assert_array_equal(resize_image(np.asfortranarray(photo), 56), resize_image(photo, 56))


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(400, 600), (611, 333), (900, 300), (40, 30), (1, 7)])
@pytest.mark.parametrize("side", [168, 56])
def test_resize_is_within_one_level_of_torchvision(shape, side):
  torch = import_torch_reference().torch
  from torchvision.transforms.v2 import functional as tv

  photo = _photo(*shape)
  expected = tv.resize(torch.from_numpy(photo).permute(2, 0, 1), [side, side], antialias=True)
  difference = np.abs(resize_image(photo, side).astype(int) - expected.permute(1, 2, 0).numpy().astype(int))
  assert difference.max() <= 1
  assert difference.mean() < 0.015


@pytest.mark.parametrize(
  "tag, kind, count, value",
  [
    (0x11A, 2, 3, b"72\0\0"),
    (0x10F, 11, 1, struct.pack("<f", 5)),
    (0x128, 2, 2, b"2\0\0\0"),
    (0x11A, 7, 1, b"H\0\0\0"),
    (0x11A, 4, 1, b"H\0\0\0"),
    (0x11A, 1, 1, b"H\0\0\0"),
  ],
  ids=[
    "XResolution as text",
    "Make as float",
    "ResolutionUnit as text",
    "XResolution as a byte of anything",
    "XResolution as a number",
    "XResolution as a byte",
  ],
)
def test_exif_tags_of_an_odd_type_are_nobodys_business(tag, kind, count, value):
  """Only the orientation is read; to write EXIF back, which nobody needs, would fail."""
  entries = sorted([(0x112, 3, 1, struct.pack("<HH", 6, 0)), (tag, kind, count, value)])
  rows = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
  exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + rows + b"\0\0\0\0"
  out = io.BytesIO()
  Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(out, "JPEG", exif=exif)
  assert load_image(out.getvalue()).shape == (60, 40, 3)


@pytest.mark.parametrize(
  "error", [RuntimeError("no frame"), NotImplementedError(), TypeError("odd"), KeyError(3)]
)
def test_whatever_a_decoder_raises_is_one_sentence(monkeypatch, error):
  """A damaged AVIF raises RuntimeError, some DDS NotImplementedError; a MemoryError stays one."""
  out = io.BytesIO()
  Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(out, "PNG")

  def load(self):
    raise error

  monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
  with pytest.raises(ValueError, match=r"^image \(\d+ bytes\) is damaged or truncated: \S") as caught:
    load_image(out.getvalue())
  assert caught.value.__cause__ is error
  error = MemoryError()
  with pytest.raises(MemoryError, match=r"^image \(\d+ bytes\) is larger than the memory holds"):
    load_image(out.getvalue())


def test_a_strip_is_not_made_wide_first(monkeypatch):
  """A picture of 1 x 1,500,000 pixels took 5.9 GB at 1008 px, for 1008 x 1,500,000 in between."""
  between, resize = [], Image.Image.resize

  def watch(self, size, *arguments):
    between.append(size[0] * size[1])
    return resize(self, size, *arguments)

  monkeypatch.setattr(Image.Image, "resize", watch)
  rows = np.arange(1_500_000, dtype=np.float64) * 256 // 1_500_000
  strip = np.repeat(rows.astype(np.uint8)[:, None, None], 3, -1)
  for image in (strip, strip.swapaxes(0, 1)):
    squared = resize_image(image, 1008)
    assert max(between) <= 1 << 24
    expected = (np.arange(1008) + 0.5) * 256 / 1008 - 0.5
    line = squared[:, 7, 1] if image is strip else squared[7, :, 1]
    assert np.abs(line - expected).max() <= 1
  # Photos go the way of torchvision, tall ones and those of more pixels than the bound, too.
  between.clear()
  resize_image(np.zeros((6000, 400, 3), np.uint8), 1008)
  resize_image(np.zeros((20_000, 1100, 3), np.uint8), 1008)
  assert between == [1008 * 6000, 1008**2, 1008 * 20_000, 1008**2]


@pytest.mark.parametrize(
  "head", [b"", b"\xff\xd8\xff\xe0", b"RIFF\xff\xff\xff\x7fWEBPVP8 ", b"/* XPM */", b"GIF89a\1\0\1\0"]
)
def test_a_file_is_read_as_far_as_an_image_goes(tmp_path, monkeypatch, head):
  """3 GB that are no image were read whole, and searched for minutes where a JPEG seemed to begin."""
  monkeypatch.setattr(images, "_HEAD", 1 << 24)
  path = tmp_path / "a.jpg"
  with open(path, "wb") as f:
    f.write(head)
    f.truncate(3_000_000_000)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  for read in (load_image, check_file):
    with pytest.raises(ImageError, match=r"a\.jpg' is (not an image|damaged or truncated)"):
      read(path)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning", "ignore:Metadata Warning:UserWarning")
def test_exif_that_cannot_be_read_says_nothing(tmp_path):
  """The pixels are sound: an orientation out of range or of an odd type, or EXIF that is none."""
  out = io.BytesIO()
  Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(out, "JPEG")
  tags = (
    struct.pack("<HHII", 0x112, 3, 1, 99),
    struct.pack("<HHII", 0x112, 2, 1, 54),
    struct.pack("<HHII", 0x112, 7, 9, 0),
  )
  exifs = [b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + tag + b"\0\0\0\0" for tag in tags]
  for exif in (*exifs, b"Exif\0\0", b"Exif\0\0XX*\0\1\2", b"Exif\0\0II*\0\xff\xff\xff\xff"):
    data = out.getvalue()
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]
    assert load_image(data).shape == (40, 60, 3)


def test_the_frame_of_annotations(tmp_path):
  """Label tools export the size of the pixels as stored: where only these have it, they are left so."""
  stored = _photo(40, 60)
  exif = Image.Exif()
  exif[0x0112] = 6
  path = _saved(tmp_path, Image.fromarray(stored), "a.png", exif=exif)
  upright = np.rot90(stored, -1)
  for source in (path, path.read_bytes()):
    np.testing.assert_array_equal(load_image(source, (40, 60)), stored)
    for frame in ((60, 40), (41, 60), (None, None), ("40", "60"), None):
      np.testing.assert_array_equal(load_image(source, frame), upright)
