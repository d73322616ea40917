"""The command line, with a predictor that paints squares: what is read, written, printed and returned."""

import dataclasses
import importlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import types
import warnings

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from tqdm import tqdm

from sam3lt_jax import cli, errors
from sam3lt_jax.checkpoints.errors import CheckpointError
from sam3lt_jax.cli import progress, segment
from sam3lt_jax.config import Sam3LiteTextConfig
from sam3lt_jax.processing.results import Results

HEIGHT, WIDTH = 60, 80


class FakePredictor:
  """Two squares a phrase, scores 0.9 and 0.4; remembers what it was asked."""

  calls: list
  loaded: list
  running = "paper, float32"

  def __init__(self, config):
    self.model = types.SimpleNamespace(config=config)

  @classmethod
  def from_pretrained(cls, source, profile=None, dtype="float32", **more):
    cls.loaded.append((source, profile, dtype, *more.values()))
    if source == "s00":
      raise CheckpointError("no model 's00'; did you mean 's0'?")
    return cls(Sam3LiteTextConfig.s0(profile or "original"))

  def __call__(self, images, text=None, boxes=None, box_labels=None, threshold=None, mask_threshold=0.5):
    self.calls.append(
      {"text": text, "boxes": boxes, "box_labels": box_labels, "threshold": threshold, "mask": mask_threshold}
    )
    size = images.shape[:2]
    threshold = self.model.config.profile.score_threshold if threshold is None else threshold
    found = [Results.empty(size)]
    for k, label in enumerate(text or ["visual"]):
      for score in (0.4, 0.9):
        x = 5 + 20 * k + round(10 * score)
        mask = np.zeros((1, *size), bool)
        mask[0, 10:30, x : x + 15] = True
        if score >= threshold:
          found.append(Results([[x, 10, x + 15, 30]], [score], mask, [label], size))
    return Results.concatenate(found).sort()


@pytest.fixture
def fake(monkeypatch):
  module = types.ModuleType("sam3lt_jax.predictor")
  module.Predictor = FakePredictor
  monkeypatch.setitem(sys.modules, "sam3lt_jax.predictor", module)
  FakePredictor.calls, FakePredictor.loaded = [], []
  return FakePredictor


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A working folder with photo.jpg, other.png, notes.txt and a file `wheel` that is no image."""
  monkeypatch.chdir(tmp_path)
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8))
  picture.save("photo.jpg")
  picture.save("other.png")
  (tmp_path / "notes.txt").write_text("not an image")
  (tmp_path / "wheel").write_text("neither")
  return tmp_path


def mistake(capsys, *argv):
  """Runs a wrong command line and returns its one line on stderr, but for what it ran on."""
  assert cli.main(argv) == 2
  out, err = capsys.readouterr()
  err = err.replace("sam3lt: running on paper, float32\n", "")
  assert out == "" and err.startswith("sam3lt: error: ") and err.count("\n") == 1, err
  return err.removeprefix("sam3lt: error: ").strip()


def test_segment_writes_everything(fake, folder, capsys):
  assert cli.main(["segment", "photo.jpg", "truck", "a wheel"]) == 0
  out, err = capsys.readouterr()
  assert err == "sam3lt: running on paper, float32\n"
  assert fake.loaded == [("s0", None, "float32")]
  assert fake.calls == [
    {"text": ["truck", "a wheel"], "boxes": None, "box_labels": None, "threshold": None, "mask": 0.5}
  ]
  assert sorted(p.name for p in (folder / "sam3lt_out").iterdir()) == [
    "photo.json", "photo_masks.png", "photo_overlay.jpg"
  ]  # fmt: skip
  overlay = Image.open("sam3lt_out/photo_overlay.jpg")
  assert overlay.size[0] % WIDTH == 0 and overlay.size[0] * HEIGHT == overlay.size[1] * WIDTH
  assert set(np.unique(np.asarray(Image.open("sam3lt_out/photo_masks.png")))) == {0, 1, 2}
  assert "photo.jpg  80x60" in out and "2 found" in out and "photo_overlay.jpg" in out
  rows = [line.split() for line in out.splitlines() if line.startswith("    ")][1:]
  assert rows[0] == ["0", "0.900", "truck", "14.0", "10.0", "29.0", "30.0", "6.25"]
  assert rows[1][:4] == ["1", "0.900", "a", "wheel"]


def test_segment_coco_loads(fake, folder, capsys):
  assert cli.main(["segment", "photo.jpg", "truck", "wheels", "--threshold", "0.1"]) == 0
  with open("sam3lt_out/photo.json", encoding="utf-8") as f:
    data = json.load(f)
  assert data["images"] == [{"id": 1, "file_name": "photo.jpg", "height": HEIGHT, "width": WIDTH}]
  assert data["categories"] == [{"id": 1, "name": "truck"}, {"id": 2, "name": "wheels"}]
  assert data["info"]["model"] == "s0" and data["info"]["random_weights"] is False
  assert data["info"]["profile"] == "original" and data["info"]["threshold"] == 0.1
  coco = COCO("sam3lt_out/photo.json")
  assert len(coco.getAnnIds(imgIds=[1], catIds=[2])) == 2
  results = coco.loadRes(data["annotations"])
  first = results.loadAnns(results.getAnnIds())[0]
  assert coco_mask.decode(first["segmentation"])[10:30, 14:29].all()
  assert [a["score"] for a in data["annotations"]] == pytest.approx([0.9, 0.9, 0.4, 0.4])


def test_segment_options_in_any_order(fake, folder, capsys):
  argv = ["segment", "--box", "-1,2,30,40", "photo.jpg", "--dtype", "bfloat16", "a truck", "--box=5,6,7,8:0"]
  argv += ["--out", "deep/er", "--profile", "transformers", "--mask-threshold", "0.4", "--model", "some/dir"]
  assert cli.main([*argv, "--text", "photo.jpg", "--threshold", "0.25", "--separate-masks"]) == 0
  assert fake.loaded == [("some/dir", "transformers", "bfloat16")]
  (call,) = fake.calls
  assert call["text"] == ["a truck", "photo.jpg"]
  assert call["boxes"] == [[-1, 2, 30, 40], [5, 6, 7, 8]] and call["box_labels"] == [1, 0]
  assert call["threshold"] == 0.25 and call["mask"] == 0.4
  masks = sorted(p.name for p in (folder / "deep" / "er").glob("*.png"))
  assert masks == [f"photo_masks_{i:03d}.png" for i in range(4)]
  assert "photo_masks_000.png to photo_masks_003.png" in capsys.readouterr().out


def test_segment_short_options_size_and_number(fake, folder, capsys):
  argv = ["segment", "photo.jpg", "truck", "-m", "s1", "-o", "here", "--image-size", "504", "--top-k", "1"]
  assert cli.main(argv) == 0
  assert fake.loaded == [("s1", None, "float32", 504)]
  assert [a["score"] for a in json.loads((folder / "here/photo.json").read_text())["annotations"]] == [
    pytest.approx(0.9)
  ]
  assert cli.main([*argv, "--threshold", "0.1", "--top-k", "2", "--json"]) == 0
  data = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert [a["score"] for a in data["annotations"]] == pytest.approx([0.9, 0.4])


def test_segment_clean(fake, folder, monkeypatch):
  found = fake.__call__

  def with_holes(self, *args, **options):
    results = found(self, *args, **options)
    masks = results.masks.copy()
    masks[:, 15:17, 20] = False
    return dataclasses.replace(results, masks=masks)

  monkeypatch.setattr(fake, "__call__", with_holes)
  for more, area in ((["--clean", "1"], 298), (["--clean", "2"], 300), ([], 298)):
    assert cli.main(["segment", "photo.jpg", "truck", *more]) == 0
    (kept,) = json.loads((folder / "sam3lt_out/photo.json").read_text())["annotations"]
    assert kept["area"] == area


def test_segment_box_alone(fake, folder, capsys):
  assert cli.main(["segment", "photo.jpg", "--box", "1,2,3,4"]) == 0
  assert fake.calls[0]["text"] is None and fake.calls[0]["boxes"] == [[1, 2, 3, 4]]
  with open("sam3lt_out/photo.json", encoding="utf-8") as f:
    assert json.load(f)["categories"] == [{"id": 1, "name": "visual"}]
  assert "visual" in capsys.readouterr().out


def test_segment_json_is_all_of_stdout(fake, folder, capsys):
  assert cli.main(["segment", "photo.jpg", "other.png", "truck", "--json", "--model", "random:s0"]) == 0
  data = json.loads(capsys.readouterr().out)
  assert [i["file_name"] for i in data["images"]] == ["photo.jpg", "other.png"]
  assert [a["id"] for a in data["annotations"]] == [1, 2, 3, 4]
  assert [a["image_id"] for a in data["annotations"]] == [1, 1, 2, 2]
  assert data["info"]["random_weights"] is True and "RANDOM" in data["info"]["warning"]
  coco = COCO()
  coco.dataset = data
  coco.createIndex()
  assert len(coco.imgs) == 2


def test_random_weights_are_announced(fake, folder, capsys):
  assert cli.main(["segment", "photo.jpg", "truck", "--model", "random:s0"]) == 0
  err = capsys.readouterr().err
  assert err.count("RANDOM WEIGHTS") == 2 and "mean nothing" in err
  assert fake.loaded[0][0] == "random:s0"


def test_segment_folder_and_equal_names(fake, folder, capsys):
  (folder / "a").mkdir()
  (folder / "b").mkdir()
  for name in ("a/X.png", "b/x.jpg", "b/readme.txt"):
    (folder / name).write_bytes((folder / "other.png").read_bytes())
  assert cli.main(["segment", "a", "b", "truck"]) == 0
  assert sorted(p.name for p in (folder / "sam3lt_out").glob("*.json")) == ["X.json", "x_2.json"]
  assert len(fake.calls) == 2


def test_segment_nothing_found(fake, folder, capsys):
  assert cli.main(["segment", "photo.jpg", "truck", "--threshold", "0.95"]) == 0
  out = capsys.readouterr().out
  assert "nothing found with a score above 0.95 (a lower --threshold finds more)" in out
  with open("sam3lt_out/photo.json", encoding="utf-8") as f:
    assert json.load(f)["annotations"] == []
  assert (folder / "sam3lt_out" / "photo_overlay.jpg").exists()


def test_one_broken_photo_does_not_stop_the_others(fake, folder, capsys):
  (folder / "cut.jpg").write_bytes((folder / "photo.jpg").read_bytes()[:900])
  assert cli.main(["segment", "cut.jpg", "photo.jpg", "truck"]) == 2
  out, err = capsys.readouterr()
  assert "1 found" in out and "cut.jpg" in err and "1 of 2 photos failed" in err and "Traceback" not in err
  assert (folder / "sam3lt_out" / "photo.json").exists()
  assert "truncated" in mistake(capsys, "segment", "cut.jpg", "truck")


def test_a_folder_is_listed_as_a_job_lists_it(fake, folder, capsys):
  """Hidden files are no photos, nor is a folder with a photo's name; what is none is named, the rest done."""
  (folder / "a").mkdir()
  (folder / "a/folder.jpg").mkdir()
  for name, data in {
    "good.jpg": (folder / "photo.jpg").read_bytes(),
    "._good.jpg": b"\0\5\x16\7\0\2\0\0Mac OS X        ",
    "head.jpg": (folder / "photo.jpg").read_bytes()[:300],
    "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200),
    "zero.png": b"",
  }.items():
    (folder / "a" / name).write_bytes(data)
  os.mkfifo("a/pipe.jpg")
  assert cli.main(["segment", "a", "truck"]) == 2
  out, err = capsys.readouterr()
  assert "a/good.jpg" in out and len(fake.calls) == 1
  assert err.splitlines() == [
    "sam3lt: error: image 'a/head.jpg' is damaged or truncated: Truncated File Read",
    "sam3lt: error: image 'a/phone.heic' is HEIC, a format that Pillow does not read without a plugin: "
    "convert it to JPEG or PNG",
    "sam3lt: error: image 'a/pipe.jpg' is a named pipe, no file",
    "sam3lt: error: image 'a/zero.png' is empty (0 bytes)",
    "sam3lt: running on paper, float32",
    "sam3lt: 4 of 5 photos failed",
  ]
  os.remove("a/good.jpg")
  assert cli.main(["segment", "a", "truck"]) == 2 and len(fake.loaded) == 1  # no model is loaded for nothing


def test_names_are_shown_in_one_plain_line(fake, folder):
  """To a terminal that takes UTF-8 and nothing else; what is written has the name as it is."""
  names = ["two\nlines.jpg", "\x1b[31mred.jpg", os.fsdecode(b"latin-\xe9.jpg"), "\u202egpj.x.jpg"]
  for name in names:
    (folder / name).write_bytes((folder / "photo.jpg").read_bytes())
    (folder / ("cut" + name)).write_bytes(b"no image")
  code = (
    "import sys, types, tests.test_cli as t; from sam3lt_jax import cli;"
    "m = types.ModuleType('sam3lt_jax.predictor'); m.Predictor = t.FakePredictor; t.FakePredictor.calls = [];"
    "t.FakePredictor.loaded = []; sys.modules[m.__name__] = m; sys.exit(cli.main(sys.argv[1:]))"
  )
  root = str(pathlib.Path(__file__).parent.parent)
  done = subprocess.run(
    [sys.executable, "-c", code, "segment", *names, *("cut" + name for name in names), "truck"],
    env=os.environ | {"PYTHONIOENCODING": "utf-8:strict", "PYTHONPATH": root},
    capture_output=True,
  )
  out, err = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
  assert done.returncode == 2 and "4 of 8 photos failed" in err, err
  assert all(line.isprintable() for line in [*out.splitlines(), *err.splitlines()])
  for name in names:
    plain = errors.shown(name)
    assert f"{plain}  80x60" in out and f"{plain[:-4]}_overlay.jpg" in out and f"cut{plain}" in err
    assert os.path.exists(f"sam3lt_out/{name[:-4]}.json")


def test_table_is_cut_and_labels_are_one_line():
  n = 50
  masks = np.ones((n, 4, 5), bool)
  results = Results(np.zeros((n, 4)), np.ones(n), masks, ["two\nlines"] * n, (4, 5))
  lines = segment.table("p.jpg", results, 1.25, 0.5).splitlines()
  assert lines[0] == "p.jpg  5x4  1.2 s  50 found" and lines[-1] == "  ... 30 more in the JSON file"
  assert len(lines) == 23 and "two lines" in lines[2] and "100.00" in lines[2]


@pytest.mark.parametrize(
  "argv, says",
  [
    ("photo.jpg", "nothing to look for: give a phrase or --box"),
    ("truck", "no photo given; no file or folder is called 'truck'"),
    ("photos/ truck", "no such folder or photo: photos/ (if it is a phrase: --text 'photos/')"),
    ("photos/june truck", "no such folder or photo: photos/june"),
    ("../photos truck", "no such folder or photo: ../photos"),
    ("", "no photo given"),
    ("poto.jpg truck", "no such photo: poto.jpg; did you mean photo.jpg?"),
    ("none/photo.JPG truck", "no such photo: none/photo.JPG"),
    ("*.webp truck", "no such photo: *.webp"),
    ("http://x.org/a.jpg truck", "addresses are not fetched"),
    ("notes.txt truck", "image 'notes.txt' is not an image in a format that Pillow reads"),
    ("photo.jpg wheel", "not an image: wheel (if it is a phrase: --text 'wheel')"),
    ("photo.jpg truck --box 1,2,3", "--box: must be x1,y1,x2,y2"),
    ("photo.jpg truck --box 1,2,3,nan", "--box: must be x1,y1,x2,y2"),
    ("photo.jpg truck --box 1,2,3,4:2", ":0 or :1"),
    ("photo.jpg truck --box 1,2,3,4:", ":0 or :1"),
    ("photo.jpg truck --box 9,2,3,4", "x1 < x2"),
    ("photo.jpg truck --box a,b,c,d", "got 'a,b,c,d'"),
    ("photo.jpg truck --threshold 1.5", "--threshold: must be a number within [0, 1], got '1.5'"),
    ("photo.jpg truck --threshold -1", "--threshold: must be a number within [0, 1], got '-1'"),
    ("photo.jpg truck --threshold high", "--threshold: must be a number"),
    ("photo.jpg truck --mask-threshold nan", "--mask-threshold: must be a number"),
    ("photo.jpg truck --dtype float64", "choose from"),
    ("photo.jpg truck --profile mine", "choose from"),
    ("photo.jpg truck --colour red", "unrecognized arguments: --colour"),
    ("photo.jpg truck --out notes.txt", "--out 'notes.txt': "),
    (
      "photo.jpg truck --out notes.txt/x",
      "notes.txt is no directory; accepted: a directory, there or not yet",
    ),
    ("photo.jpg truck --model s00", "no model 's00'; did you mean 's0'?"),
  ],
)
def test_segment_mistakes(fake, folder, capsys, argv, says):
  assert says in mistake(capsys, "segment", *argv.split())
  assert fake.calls == [] and (fake.loaded == [] or "s00" in argv)


def test_more_segment_mistakes(fake, folder, capsys):
  assert "a phrase is empty" in mistake(capsys, "segment", "photo.jpg", " ")
  assert "a phrase is empty" in mistake(capsys, "segment", "photo.jpg", "--text", "")
  (folder / "void").mkdir()
  assert "no photos in the folder void" in mistake(capsys, "segment", "void", "truck")
  (folder / "empty.jpg").write_bytes(b"")
  assert "image 'empty.jpg' is empty (0 bytes)" in mistake(capsys, "segment", "empty.jpg", "truck")


def test_main_help_and_mistakes(folder, capsys):
  assert cli.main([]) == 2
  assert "usage: sam3lt VERB" in capsys.readouterr().err
  assert cli.main(["help", "segment"]) == 0
  assert "usage: sam3lt segment PHOTO" in capsys.readouterr().out
  assert "did you mean 'segment'?" in mistake(capsys, "help", "segmnt")
  for flag in ("--help", "-h", "help"):
    assert cli.main([flag]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS) and "examples:" in out
  assert cli.main(["--version"]) == 0
  assert capsys.readouterr().out.startswith("sam3lt 0.")
  assert "did you mean 'segment'?" in mistake(capsys, "segmnt", "x.jpg")
  assert "sam3lt segment photo.jpg" in mistake(capsys, "photo.jpg", "truck")
  assert f"accepted: {', '.join(cli.VERBS)}" in mistake(capsys, "zzz")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_teaches(verb, capsys):
  assert cli.main([verb, "--help"]) == 0
  out = capsys.readouterr().out
  assert f"usage: sam3lt {verb}" in out and f"sam3lt {verb} " in out.split("examples:")[1]
  assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_default_is_told_once(verb, capsys):
  """By the formatter, which knows it; of positional arguments and switches there is none to tell."""
  parser = cli.Parser(prog="sam3lt")
  importlib.import_module(cli.VERBS[verb][0]).add_arguments(parser)
  formatter = parser._get_formatter()
  for action in parser._actions:
    said = formatter._expand_help(action)
    assert said.count("(default: ") <= 1 and "SUPPRESS" not in said
    if action.option_strings and action.nargs != 0 and isinstance(action.default, (str, int, float)):
      told = f"{action.default:g}" if isinstance(action.default, float) else action.default
      assert f"(default: {told}" in said
  assert cli.main([verb, "--help"]) == 0
  assert "SUPPRESS" not in capsys.readouterr().out


def test_exceptions_that_are_nobodys_mistake_keep_their_traceback(fake, folder, monkeypatch, capsys):
  def broken(self, *args, **kwargs):
    return np.zeros(3).reshape(2, 2)  # a ValueError, but numpy's

  monkeypatch.setattr(FakePredictor, "__call__", broken)
  with pytest.raises(ValueError, match="cannot reshape"):
    cli.main(["segment", "photo.jpg", "truck"])
  with pytest.raises(ValueError, match="cannot reshape"):
    cli.main(["segment", "photo.jpg", "other.png", "truck"])


def test_traceback_on_request(fake, folder, monkeypatch):
  monkeypatch.setenv("SAM3LT_TRACEBACK", "1")
  with pytest.raises(cli.UserError):
    cli.main(["segment", "none.jpg", "truck"])


def test_interrupt_and_file_errors(fake, folder, monkeypatch, capsys):
  def stop(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(FakePredictor, "__call__", stop)
  assert cli.main(["segment", "photo.jpg", "truck"]) == 130
  assert "stopped" in capsys.readouterr().err

  def missing(*args, **kwargs):
    open("no/such/file")

  monkeypatch.setattr(FakePredictor, "from_pretrained", missing)
  assert mistake(capsys, "segment", "photo.jpg", "truck") == "No such file or directory: no/such/file"


@pytest.mark.parametrize("module", ["sam3lt_jax", "sam3lt_jax.cli"])
def test_python_m(folder, module):
  done = subprocess.run(
    [sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60,
    env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)},
  )  # fmt: skip
  assert done.returncode == 0 and done.stdout.startswith("sam3lt 0."), done.stderr


def test_phrases_with_a_slash_are_no_folders(fake, folder):
  assert cli.main(["segment", "photo.jpg", "black/white cat", "--text", "and/or"]) == 0
  assert fake.calls[0]["text"] == ["black/white cat", "and/or"]


def test_warnings_are_one_line(fake, folder, monkeypatch, capsys):
  plain = FakePredictor.__call__

  def warning(self, *args, **kwargs):
    warnings.warn("the phrase was cut", stacklevel=1)
    return plain(self, *args, **kwargs)

  monkeypatch.setattr(FakePredictor, "__call__", warning)
  with warnings.catch_warnings():
    warnings.simplefilter("always")
    assert cli.main(["segment", "photo.jpg", "truck"]) == 0
  assert capsys.readouterr().err.endswith("float32\nsam3lt: warning: the phrase was cut\n")


def test_progress_shows_only_when_it_takes_time(monkeypatch):
  """What the first waited for, which compiles, is no part of the rate."""
  now = [time.time()]
  monkeypatch.setattr(progress, "time", types.SimpleNamespace(time=lambda: now[0]))
  monkeypatch.setattr(sys, "stderr", io.StringIO())
  with progress.busy("quick"):
    pass
  assert "quick" not in sys.stderr.getvalue()
  monkeypatch.setattr(progress, "DELAY", 0.05)
  monkeypatch.setattr(progress, "_LOG_PERIOD", 0.05)

  def wait_for(shown):
    end = time.monotonic() + 60
    while not re.search(shown, sys.stderr.getvalue()):
      assert time.monotonic() < end, f"{shown} is not in {sys.stderr.getvalue()}"
      time.sleep(0.01)

  with tqdm(file=sys.stderr), progress.busy("slow", total=3) as bar:  # beside another bar
    wait_for(r"slow 0/3 \[[\d:]+\]")
    now[0] += 100
    bar.advance()
    wait_for(r"slow 1/3 \[[\d:]+\]")
    now[0] += 2
    bar.describe("slower")
    bar.advance()
    bar.say("a line", file=sys.stderr)
    wait_for(r"slower 2/3 \[[\d:]+, 0\.5 a second, 00:02 left\]")
  assert "a line\n" in sys.stderr.getvalue() and "\x1b" not in sys.stderr.getvalue()


def test_runs_as_a_program_and_keeps_help_quick(folder):
  run = [sys.executable, "-c", "import sys; from sam3lt_jax.cli import main; code = main(); "
         "print('jax' in sys.modules, file=sys.stderr); sys.exit(code)"]  # fmt: skip
  done = subprocess.run([*run, "segment", "--help"], capture_output=True, text=True, timeout=60)
  assert done.returncode == 0 and done.stderr == "False\n" and "examples:" in done.stdout
  done = subprocess.run([*run, "segment", "photo.jpg"], capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and done.stderr.splitlines()[0].startswith("sam3lt: error: nothing to look for")


def test_segment_with_the_real_predictor(folder, capsys):
  argv = ["photo.jpg", "truck", "--box", "5,5,40,40", "--model", "random:tiny", "--threshold", "0", "--json"]
  assert cli.main(["segment", *argv]) == 0
  out, err = capsys.readouterr()
  data = json.loads(out)
  assert data["annotations"] and {a["category_id"] for a in data["annotations"]} == {1}
  assert all(a["segmentation"]["size"] == [HEIGHT, WIDTH] for a in data["annotations"])
  assert "RANDOM WEIGHTS" in err
  assert "unknown model 's00'" in mistake(capsys, "segment", "photo.jpg", "truck", "--model", "s00")


def test_random_weights_show_the_best_three(fake, folder, capsys):
  assert cli.main(["segment", "photo.jpg", "truck", "cup", "--model", "random:s0", "--json"]) == 0
  assert fake.calls[0]["threshold"] == 0.0
  assert len(json.loads(capsys.readouterr().out)["annotations"]) == 3
  assert cli.main(["segment", "photo.jpg", "truck", "--model", "random:s0", "--threshold", "0.5"]) == 0
  assert fake.calls[1]["threshold"] == 0.5  # what is asked for counts


def test_random_if_offline_falls_back_and_says_so(fake, folder, capsys, monkeypatch):
  load = FakePredictor.from_pretrained.__func__

  def offline(cls, source, **kwargs):
    if source == "s1":
      raise ConnectionError("the hub cannot be reached")
    return load(cls, source, **kwargs)

  monkeypatch.setattr(FakePredictor, "from_pretrained", classmethod(offline))
  assert cli.main(["segment", "photo.jpg", "truck", "--model", "s1"]) == 2
  assert fake.loaded == [] and capsys.readouterr().err == "sam3lt: error: the hub cannot be reached\n"
  assert cli.main(["segment", "photo.jpg", "truck", "--model", "s1", "--random-if-offline", "--json"]) == 0
  out, err = capsys.readouterr()
  assert [loaded[0] for loaded in fake.loaded] == ["random:s1"]
  assert "sam3lt: warning: the hub cannot be reached\n" in err and "error" not in err
  assert "RANDOM WEIGHTS" in err
  info = json.loads(out)["info"]
  assert info["random_weights"] is True and info["threshold"] == 0.0  # the one that was used
