"""Sources: every kind to the same items on every host, local and in an object store, and what is refused."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time

import fsspec
import pytest

from sam3lt_jax.jobs import files
from sam3lt_jax.jobs.sources import Item, expand_braces, list_items
from tests.jobs.work import read_bytes


def fill(root, *names):
  """Files that hold their own name."""
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(name.encode())


def ids(source, **options):
  return [item.id for item in list_items(source, **options)]


def make_tar(path, *members):
  """Members are (name, bytes)."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w") as tar:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def bucket():
  """The URL of an empty folder in fsspec's memory, which stands for a bucket."""
  fs = fsspec.filesystem("memory")
  fs.store.clear()
  fs.pseudo_dirs[:] = [""]
  yield "memory://bucket"
  fs.store.clear()


def put(url, data):
  with fsspec.open(url, "wb") as f:
    f.write(data)


def test_folder(tmp_path):
  fill(
    tmp_path, "b.jpg", "a/2.PNG", "a/1.webp", "a/b/c.tiff", "Z.JPEG", "notes.txt", "noext",
    ".hidden.jpg", ".git/x.jpg", "a/._1.webp",
  )  # fmt: skip
  items = list_items(tmp_path)
  assert [item.id for item in items] == ["Z.JPEG", "a/1.webp", "a/2.PNG", "a/b/c.tiff", "b.jpg"]
  assert [item.uri for item in items] == [str(tmp_path / item.id) for item in items]
  assert all(read_bytes(item) == item.id.encode() for item in items)
  assert ids(tmp_path, recursive=False) == ["Z.JPEG", "b.jpg"]
  assert ids(f"file://{tmp_path}") == ids(tmp_path)


def test_items_are_a_sequence_and_travel_to_other_processes(tmp_path):
  fill(tmp_path, *(f"{i}.jpg" for i in range(5)))
  items = list_items(tmp_path)
  assert len(items) == 5 and items[-1].id == "4.jpg"
  assert [item.id for item in items[1:3]] == ["1.jpg", "2.jpg"]
  with pytest.raises(IndexError):
    items[5]
  assert pickle.loads(pickle.dumps(items[2])) == items[2]
  assert list(pickle.loads(pickle.dumps(items))) == list(items)
  assert items[0].meta == {} and items[0].coco_id is None and hash(items[0]) != hash(items[1])


def test_a_folder_given_relatively_is_the_same_source(tmp_path, monkeypatch):
  fill(tmp_path / "photos", "1.jpg")
  monkeypatch.chdir(tmp_path)
  assert list(list_items("photos")) == list(list_items("./photos/")) == list(list_items(tmp_path / "photos"))


def test_linked_folders_are_followed_but_not_in_a_circle(tmp_path):
  fill(tmp_path, "real/1.jpg", "photos/2.jpg")
  (tmp_path / "photos" / "linked").symlink_to(tmp_path / "real")
  (tmp_path / "real" / "up").symlink_to(tmp_path / "real")
  assert ids(tmp_path / "photos") == ["2.jpg", "linked/1.jpg"]


def test_glob(tmp_path):
  fill(tmp_path, "a/1.jpg", "a/2.png", "b/c/3.jpg", "b/notes.txt", "b/4.dat", "[x]/5.jpg")
  assert ids(f"{tmp_path}/*/*.jpg") == ["[x]/5.jpg", "a/1.jpg"]
  assert ids(f"{tmp_path}/b/**") == ["c/3.jpg"]  # of what a pattern catches besides, only images
  assert ids(f"{tmp_path}/b/*.dat") == ["4.dat"]
  assert ids(f"{tmp_path}/[x]") == ["5.jpg"]  # a folder of that name, no pattern
  assert list_items(f"{tmp_path}/*/*.jpg")[1].uri == str(tmp_path / "a/1.jpg")
  with pytest.raises(ValueError, match=r"no images match .*/\*\.bmp"):
    list_items(f"{tmp_path}/*.bmp")


def test_list_file(tmp_path):
  fill(tmp_path, "photos/b.jpg", "photos/a.jpg", "c.dat")
  path = tmp_path / "list.txt"
  path.write_bytes(f"\ufeffphotos/b.jpg\r\n\n  photos/a.jpg \n{tmp_path}/c.dat\ngs://bucket/d.jpg\n".encode())
  items = list_items(path)
  assert [item.id for item in items] == [
    "photos/b.jpg", "photos/a.jpg", f"{tmp_path}/c.dat", "gs://bucket/d.jpg"
  ]  # fmt: skip
  assert [item.uri for item in items[:2]] == [str(tmp_path / "photos/b.jpg"), str(tmp_path / "photos/a.jpg")]
  assert items[3].uri == "gs://bucket/d.jpg" and read_bytes(items[2]) == b"c.dat"
  path.write_text("a.jpg\nb.jpg\na.jpg\n")
  with pytest.raises(ValueError, match=r"the id 'a.jpg' occurs twice: .*a\.jpg \(from .*list\.txt\) and "):
    list_items(path)
  path.write_bytes(b"a.jpg\n\xff\xfe\n")
  with pytest.raises(ValueError, match=r"list\.txt, line 2: not UTF-8"):
    list_items(path)
  path.write_bytes(b"\n \n")
  with pytest.raises(ValueError, match=r"list\.txt names nothing"):
    list_items(path)


def coco(path, *names, **more):
  images = [{"id": 10 - i, "file_name": name, "width": 4, "height": 3} for i, name in enumerate(names)]
  path.write_text(json.dumps({"images": images, "annotations": []} | more))


def test_coco(tmp_path):
  fill(tmp_path, "images/a.jpg", "images/x/b.jpg", "else/a.jpg")
  path = tmp_path / "instances.json"
  coco(path, "a.jpg", "x/b.jpg")
  items = list_items(path)
  assert items[0] == Item(
    "9", f"{tmp_path}/images/x/b.jpg", 9, {"file_name": "x/b.jpg", "width": 4, "height": 3}
  )
  assert [item.coco_id for item in items] == [9, 10]
  assert list_items(path, images=tmp_path / "else")[1].uri == f"{tmp_path}/else/a.jpg"
  coco(path, "else/a.jpg")
  assert list_items(path)[0].uri == f"{tmp_path}/else/a.jpg"  # beside it
  coco(path, "nowhere.jpg")
  with pytest.raises(
    ValueError, match=r"images of .*instances.json are not beside it.*nowhere.jpg.*--images"
  ):
    list_items(path)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "instances.json is not valid JSON"),
    ("[" * 100_000, "instances.json is not valid JSON: maximum recursion"),
    ('{"annotations": []}', "instances.json has no list 'images'; it has: 'annotations'"),
    ('{"images": []}', "lists no image"),
    ('{"images": [{"id": "a", "file_name": "a.jpg"}]}', "the id of image 0 must be a whole number, got 'a'"),
    ('{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2}]}', "image 2 has no file_name"),
    (
      '{"images": [{"id": 1, "file_name": "a.jpg"}, {"id": "1", "file_name": "b.jpg"}]}',
      "image 1 has an id of",
    ),
    (
      '{"images": [{"id": 1, "file_name": "a.jpg", "height": 4294967316, "width": 9}]}',
      "image 1 has no height and width in pixels",
    ),
  ],
)
def test_bad_coco(tmp_path, text, message):
  path = tmp_path / "instances.json"
  path.write_text(text)
  with pytest.raises(ValueError, match=message):
    list_items(path)


def test_coco_as_others_write_it(tmp_path):
  """A byte-order mark, numbers as text, no size, and LVIS's images, which have a URL in place of a name."""
  fill(tmp_path, "val2017/1.jpg", "train2017/2.jpg", "flat/1.jpg")
  urls = [f"http://images.cocodataset.org/{name}" for name in ("val2017/1.jpg", "train2017/2.jpg")]
  images = [{"id": "1", "coco_url": urls[0], "height": "3.0", "width": 4.0}, {"id": 2.0, "coco_url": urls[1]}]
  path = tmp_path / "lvis.json"
  path.write_text(json.dumps({"images": images}), encoding="utf-8-sig")
  first, second = list_items(path)
  assert first == Item(
    "1", f"{tmp_path}/val2017/1.jpg", 1, {"file_name": "val2017/1.jpg", "width": 4, "height": 3}
  )
  assert second == Item("2", f"{tmp_path}/train2017/2.jpg", 2, {"file_name": "train2017/2.jpg"})
  assert list_items(path, images=tmp_path / "flat")[1].uri == f"{tmp_path}/flat/2.jpg"


def test_tars(tmp_path):
  make_tar(
    tmp_path / "s-000.tar", ("./t/01.jpg", b"one"), ("t/01.json", b"{}"), ("t/._01.jpg", b"no"),
    ("t/00.PNG", b"two, longer"), ("t/" + "long" * 60 + ".jpg", b"three"),
  )  # fmt: skip
  make_tar(tmp_path / "s-001.tar", ("t/02.jpg", b"four"))
  make_tar(tmp_path / "s-010.tar", ("t/10.jpg", b"ten"))
  expected = ["t/01", "t/00", "t/" + "long" * 60, "t/02"]
  items = list_items(f"{tmp_path}/s-{{000..001}}.tar")
  assert [item.id for item in items] == expected
  assert list(map(read_bytes, items)) == [b"one", b"two, longer", b"three", b"four"]
  assert items[1].uri == f"{tmp_path}/s-000.tar!t/00.PNG"
  assert ids(tmp_path) == ids(f"{tmp_path}/*.tar") == [*expected, "t/10"]
  assert ids(tmp_path / "s-010.tar") == ["t/10"]
  assert ids([f"{tmp_path}/s-010.tar", f"{tmp_path}/s-001.tar"]) == ["t/10", "t/02"]


def test_bad_tars(tmp_path):
  make_tar(tmp_path / "a.tar", ("1.jpg", b"x" * 3000))
  make_tar(tmp_path / "b.tar", ("1.jpg", b"y"))
  with pytest.raises(ValueError, match=r"id '1' occurs twice: .*a\.tar!1\.jpg .* and .*b\.tar!1\.jpg"):
    list_items(tmp_path)
  with pytest.raises(ValueError, match=r"no such tar shard: .*c\.tar"):
    list_items(f"{tmp_path}/{{a,c}}.tar")
  make_tar(tmp_path / "empty.tar", ("1.json", b"{}"))
  with pytest.raises(ValueError, match=r"no images in the tar shards .*empty\.tar"):
    list_items(tmp_path / "empty.tar")
  (tmp_path / "no.tar").write_bytes(b"not a tar" * 100)
  with pytest.raises(ValueError, match=r"no\.tar is not a whole tar file"):
    list_items(tmp_path / "no.tar")
  os.mkfifo(tmp_path / "pipe.tar")
  with pytest.raises(ValueError, match=r"pipe\.tar is no regular file"):
    list_items(tmp_path / "pipe.tar")
  with pytest.raises(ValueError, match=r"x\.tar\.gz: a compressed tar"):
    list_items("x.tar.gz")


def test_every_image_of_a_tar_is_an_item(tmp_path):
  """Dots and hidden parts in a name, several images of a sample, links: none vanishes, no two share an id."""
  names = [
    "0001.jpg", "0001.png", "0001.seg.png", "a_jpg.rf.0a1b.jpg", "photo.v1.jpg", "photo.v2.jpg", "22.05.JPG",
    ".hidden/x.jpg", ".y.jpg", "b..jpg", "./c.d/e.f.webp",
  ]  # fmt: skip
  make_tar(tmp_path / "s.tar", *((name, name.encode()) for name in names), ("._z.jpg", b"AppleDouble"))
  items = list_items(tmp_path / "s.tar")
  assert [read_bytes(item).decode() for item in items] == names
  assert [item.id for item in items] == [
    "0001", "0001.png", "0001.seg", "a_jpg.rf.0a1b", "photo.v1", "photo.v2", "22.05", ".hidden/x", ".y", "b.",
    "c.d/e.f",
  ]  # fmt: skip
  with tarfile.open(tmp_path / "s.tar", "a") as tar:
    for kind, name, target in (
      (tarfile.LNKTYPE, "d/hard.jpg", "0001.jpg"), (tarfile.SYMTYPE, "d/soft.jpg", "../photo.v1.jpg"),
      (tarfile.SYMTYPE, "gone.jpg", "nowhere.jpg"), (tarfile.DIRTYPE, "folder.jpg", ""),
    ):  # fmt: skip
      info = tarfile.TarInfo(name)
      info.type, info.linkname = kind, target
      tar.addfile(info)
  hard, soft, gone = list_items(tmp_path / "s.tar")[len(names) :]
  assert (read_bytes(hard), read_bytes(soft)) == (b"0001.jpg", b"photo.v1.jpg")
  with pytest.raises(FileNotFoundError):  # a failure of this image, named, when the job comes to it
    read_bytes(gone)


def test_tars_under_odd_paths(tmp_path):
  for path in ("X.TAR", "d.tar!/s.tar", "e.Tar!x/T.TaR"):
    make_tar(tmp_path / path, ("a.tar!b.jpg", b"one"), ("c.jpg", b"two"))
    for source in (tmp_path / path, (tmp_path / path).parent if "/" in path else tmp_path / path):
      assert [read_bytes(item) for item in list_items(source)] == [b"one", b"two"]
  assert list_items(tmp_path / "X.TAR")[0].meta.keys() == {"offset", "size"}  # as jobs begun earlier have it
  make_tar(tmp_path / "cat.tar", ("z.jpg", b"three"))
  both = (tmp_path / "X.TAR").read_bytes() + (tmp_path / "cat.tar").read_bytes()
  (tmp_path / "cat.tar").write_bytes(both)
  assert ids(tmp_path / "cat.tar") == ["a.tar!b", "c", "z"]


@pytest.mark.parametrize("field", ["checksum", "size", "negative size", "long name", "no header"])
def test_a_damaged_header_is_said_once(tmp_path, field):
  """Not the end of the tar, behind which images would vanish, nor memory for what it promises."""
  path = tmp_path / "s.tar"
  make_tar(path, ("1.jpg", b"x" * 700), ("2.jpg", b"y"), ("3.jpg", b"z"))
  data = bytearray(path.read_bytes())
  head = 1536  # of 2.jpg
  if field == "checksum":
    data[head + 150] ^= 1
  elif field == "no header":
    data[head : head + 512] = b"\x01" * 512
  else:
    info = tarfile.TarInfo("2.jpg")
    info.size = {"size": 1 << 40, "negative size": -(1 << 20), "long name": 1 << 33}[field]
    info.type = tarfile.GNUTYPE_LONGNAME if field == "long name" else tarfile.REGTYPE
    data[head : head + 512] = info.tobuf(tarfile.GNU_FORMAT)
  path.write_bytes(data)
  with pytest.raises(ValueError, match=r"s\.tar is not a whole tar file: \S"):
    list_items(path)


def test_links_list_every_picture_once(tmp_path):
  """To the folder itself, to each other, to nothing; by a plain listing and by a pattern with **."""
  root = tmp_path / "photos"
  fill(root, "1.jpg", "a/2.jpg", "b/3.jpg", "b/c/4.jpg")
  links = {"self": ".", "a/to_b": "../b", "b/to_a": "../a", "b/c/up": "../..", "0": "b/c"}
  for link, target in (links | {"x": "../more", "y": "../more/d"}).items():
    (root / link).symlink_to(target)
  fill(tmp_path / "more", "5.jpg", "d/6.jpg")
  own = ["1.jpg", "a/2.jpg", "b/3.jpg", "b/c/4.jpg", "x/5.jpg", "x/d/6.jpg"]
  assert ids(root) == own
  (root / "loop").symlink_to("loop")
  (root / "loop.jpg").symlink_to("loop.jpg")
  assert ids(root) == [*own[:4], "loop.jpg", *own[4:]]
  assert ids(f"{root}/**/*.jpg") == ids(root) and ids(f"{root}/**/c/*.jpg") == ["b/c/4.jpg"]
  assert ids(f"{root}/*/**") == [*own[1:4], *own[4:]]
  with pytest.raises(ValueError, match="no images match"):
    list_items(f"{tmp_path}/nowhere/**/*.jpg")


def test_braces():
  assert expand_braces("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
  assert expand_braces("{x,y}/{0..1}.tar") == ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]
  for bad in ("a{0..1.tar", "{3..1}.tar", "{a}.tar", "{0..999999999999}.tar"):
    with pytest.raises(ValueError, match=r"braces hold a range {000\.\.009} of up to 1,000,000 shards"):
      expand_braces(bad)


def test_mixture_and_single_files(tmp_path):
  fill(tmp_path, "x/1.jpg", "x/2.jpg", "y/3.jpg", "y/1.jpg")
  assert ids([tmp_path / "x", f"{tmp_path}/y/3.jpg"]) == ["1.jpg", "2.jpg", f"{tmp_path}/y/3.jpg"]
  with pytest.raises(ValueError) as error:
    list_items([tmp_path / "x", tmp_path / "y"])
  assert str(error.value) == (
    f"the id '1.jpg' occurs twice: {tmp_path}/x/1.jpg (from {tmp_path}/x) "
    f"and {tmp_path}/y/1.jpg (from {tmp_path}/y)"
  )


def test_nothing_there(tmp_path):
  (tmp_path / "model.bin").write_bytes(b"")
  (tmp_path / "empty").mkdir()
  cases = [
    (tmp_path / "empty", "no images in the folder .*empty or its subfolders"),
    (tmp_path / "gone", "source .*gone does not exist; accepted: a folder, a glob"),
    (tmp_path / "model.bin", "is none of those accepted: a folder"),
    ("  ", "got an empty string"),
    ([], "got none"),
  ]
  for source, message in cases:
    with pytest.raises(ValueError, match=message):
      list_items(source)
  fill(tmp_path / "both", "a.jpg")
  make_tar(tmp_path / "both" / "b.tar", ("1.jpg", b""))
  with pytest.raises(ValueError, match=r"holds images \(a\.jpg\) and tar shards \(b\.tar\); say which"):
    list_items(tmp_path / "both")


def test_a_folder_that_may_not_be_read_is_not_left_out(tmp_path, monkeypatch):
  fill(tmp_path, "a/1.jpg", "b/2.jpg")
  scandir = os.scandir

  def refuse(path):
    if str(path).endswith("/b"):
      raise PermissionError(13, "Permission denied", path)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  for source in (tmp_path, f"{tmp_path}/**/*.jpg"):
    with pytest.raises(PermissionError, match="/b"):
      list_items(source)


def test_object_store(bucket, tmp_path):
  for name in ("b.jpg", "a/1.png", "a/.h/2.png", ".x.jpg", "a/t.txt"):
    put(f"{bucket}/p/{name}", name.encode())
  items = list_items(f"{bucket}/p/")
  assert [(item.id, item.uri) for item in items] == [
    ("a/1.png", f"{bucket}/p/a/1.png"), ("b.jpg", f"{bucket}/p/b.jpg")
  ]  # fmt: skip
  assert [read_bytes(item) for item in items] == [b"a/1.png", b"b.jpg"]
  assert ids(f"{bucket}/p", recursive=False) == ["b.jpg"]
  globbed = list_items(f"{bucket}/p/**/*.png")
  assert globbed[0].uri.startswith("memory://") and globbed[-1].id == "a/1.png"
  assert read_bytes(globbed[-1]) == b"a/1.png"
  put(f"{bucket}/list.txt", b"p/b.jpg\nmemory://bucket/p/a/1.png\n")
  assert [read_bytes(item) for item in list_items(f"{bucket}/list.txt")] == [b"b.jpg", b"a/1.png"]
  put(f"{bucket}/c.json", json.dumps({"images": [{"id": 5, "file_name": "p/b.jpg"}]}).encode())
  assert list_items(f"{bucket}/c.json")[0].uri == f"{bucket}/p/b.jpg"
  make_tar(tmp_path / "s.tar", ("1.jpg", b"one"), ("2.jpg", b"two"))
  put(f"{bucket}/t/s-0.tar", (tmp_path / "s.tar").read_bytes())
  for source in (f"{bucket}/t", f"{bucket}/t/*.tar", f"{bucket}/t/s-{{0..0}}.tar", f"{bucket}/t/s-0.tar"):
    assert [read_bytes(item) for item in list_items(source)] == [b"one", b"two"]
  with pytest.raises(ValueError, match="does not exist"):
    list_items(f"{bucket}/gone")


def test_packages_that_are_missing_are_named(monkeypatch):
  with pytest.raises(ValueError, match="the scheme nonsense:// is not known"):
    files.exists("nonsense://x/y.jpg")
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(ImportError, match=r"gs:// needs a package: pip install .*\[jobs\]' gcsfs"):
    list_items("gs://bucket/photos")
  monkeypatch.setitem(sys.modules, "fsspec", None)
  with pytest.raises(ImportError, match=r"memory:// needs a package: pip install .*\[jobs\]"):
    list_items("memory://bucket/photos")


def test_many_files_list_quickly_and_stay_small(tmp_path):
  """4,000 files: well under a second, and no object a file."""
  for folder in range(4):
    (tmp_path / f"{folder:02d}").mkdir()
    for i in range(1000):
      (tmp_path / f"{folder:02d}" / f"{i:04d}.jpg").touch()
  start = time.process_time()
  items = list_items(tmp_path)
  seconds = time.process_time() - start
  assert len(items) == 4_000 and items[2_345].id == "02/0345.jpg"
  assert seconds < 0.5, f"{seconds:.2f} s of CPU; 0.02 were measured"
  assert all(isinstance(row, str) for part in items._parts for row in part.rows)


def test_nothing_heavy_is_imported():
  """Neither by the modules of this half of `jobs`, nor by the verbs that need them."""
  code = (
    "import sys; from sam3lt_jax.jobs import sources, plan, ledger, status, merge;"
    "import sam3lt_jax.cli.status, sam3lt_jax.cli.merge;"
    "print([m for m in ('jax', 'jaxlib', 'flax', 'numpy', 'PIL', 'fsspec', 'pyarrow', 'pycocotools')"
    " if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"
