"""`sam3lt segment`: photos and phrases in; overlays, masks, COCO JSON and a table out."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sam3lt_jax.cli import PROGRAM, UserError, error_line
from sam3lt_jax.cli.arguments import (
  RANDOM,
  RANDOM_WARNING,
  add_model,
  add_out,
  add_thresholds,
  add_tracker,
  load,
  make_folder,
  note,
)
from sam3lt_jax.cli.kinds import count
from sam3lt_jax.cli.photos import each_photo, output_names
from sam3lt_jax.errors import shown
from sam3lt_jax.jobs.sources import images_in
from sam3lt_jax.storage import is_image

if TYPE_CHECKING:
  from sam3lt_jax.config import Profile
  from sam3lt_jax.predictor import Predictor
  from sam3lt_jax.processing.results import Results

_ROWS = 20  # of the table, a photo
_RANDOM_SHOWN = 3  # of each photo's finds, where random weights leave a threshold without meaning

_EPILOG = """\
examples:
  every truck and every wheel in a photo:
    sam3lt segment truck.jpg "truck" "wheel"
  a folder of photos, weaker finds too, another folder for the output:
    sam3lt segment photos/ "red apple" --threshold 0.3 --out apples
  all that looks like an example (here 85,281 to 221,362), no phrase:
    sam3lt segment truck.jpg --box 85,281,221,362
  a phrase, one example of what it is (:1) and one of what it is not (:0):
    sam3lt segment kitchen.jpg "handle" --box 40,183,318,204:1 --box 60,300,90,350:0
  one thing that is pointed at, and not what is beside it; a second one by its outline:
    sam3lt segment truck.jpg --point 320,240 --point 30,25:0 --outline 85,281,221,362 --tracker facebook/sam3
  two things by a point each:
    sam3lt segment truck.jpg --tracker facebook/sam3 --object 320,240 --object 520,250
  the scores, in a script:
    sam3lt segment truck.jpg "truck" --json | jq '.annotations[].score'
  nothing downloaded: the bundled model, which knows drawn shapes only
    sam3lt demo
    sam3lt segment sam3lt_out/demo_scene.png "striped shape" --model shapes

written to the output folder for photo.jpg:
  photo_overlay.jpg   the photo with outlines, names and scores
  photo_masks.png     label map: 0 background, i + 1 instance i; smaller instances on top
  photo.json          COCO data set: images, categories, annotations (RLE masks, boxes, scores)

exit codes: 0 all photos are done; 2 a mistake in the call, or a photo failed: it is named, the rest is done.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.usage = '%(prog)s PHOTO... ["a phrase" ...] [options]'
  parser.epilog = _EPILOG
  add = parser.add_argument
  add("inputs", nargs="*", metavar="PHOTO | PHRASE",
      help="existing files, folders and names of image files are photos, all else phrases; quote a phrase of "
      "several words")  # fmt: skip
  add("--text", action="append", default=[], metavar="PHRASE", help="a phrase, also if a file has that name")
  add("--box", action="append", default=[], type=_box, metavar="X1,Y1,X2,Y2[:0|1]",
      help="an example in pixels of every photo, of what is sought (:1, default) or is not (:0); repeatable",
  )  # fmt: skip
  add("--point", dest="objects", action=_Pointing, default=[], type=_point, metavar="X,Y[:0|1]",
      help="a point in pixels of every photo, on one object (:1, default) or off it (:0); repeatable. Joins "
      "the object before it: the last --object or --outline",
  ).fills = ("points", "point_labels")  # fmt: skip
  add("--object", dest="objects", action=_Pointing, default=[], type=_point, metavar="X,Y",
      help="like --point, and begins the next object")  # fmt: skip
  add("--outline", dest="objects", action=_Pointing, default=[], type=_box, metavar="X1,Y1,X2,Y2",
      help="the outline of one object in pixels, begins the next object; --box is an example instead",
  )  # fmt: skip
  add_model(parser)
  add_tracker(parser)
  add("--random-if-offline", action="store_true",
      help="where the hub cannot be reached, run with random weights, to see the program work")  # fmt: skip
  add_thresholds(parser)
  add("--top-k", type=count, metavar="N", help="keep the best N of each photo (default: all)")
  add("--clean", type=count, metavar="N",
      help="fill holes and take out specks of up to N pixels in each mask (default: leave them)",
  )  # fmt: skip
  add_out(parser)
  add("--separate-masks", action="store_true",
      help="a black-and-white PNG for every mask, overlaps kept, instead of the label map")  # fmt: skip
  add("--json", action="store_true", help="print the COCO JSON of all photos instead of the table")


def _numbers(text: str, form: str) -> tuple[list[float], int]:
  """`x1,y1,x2,y2[:label]` -> ([x1, y1, x2, y2], label); likewise of another `form`."""
  place, colon, label = text.partition(":")
  try:
    values = [float(v) for v in place.split(",")]
  except ValueError:
    values = []
  good = len(values) == form.count(",") + 1 and all(map(math.isfinite, values))
  if not good or (colon and label not in ("0", "1")):
    raise argparse.ArgumentTypeError(f"must be {form} in pixels, then :0 or :1 or nothing, got {text!r}")
  return values, int(label or 1)


_point = functools.partial(_numbers, form="x,y")


def _box(text: str) -> tuple[list[float], int]:
  box, label = _numbers(text, "x1,y1,x2,y2")
  if box[0] >= box[2] or box[1] >= box[3]:
    raise argparse.ArgumentTypeError(f"must have x1 < x2 and y1 < y2, got {text!r}")
  return box, label


class _Pointing(argparse.Action):
  """Gathers what `Predictor.predict` is asked for each object; all but --point begin the next one."""

  def __call__(self, parser, namespace, value, option=None):
    (*before, last), (place, label) = namespace.objects or [None], value
    if option != "--point" or last is None:
      before, last = namespace.objects, {"points": None, "point_labels": None, "box": None}
    if option == "--outline":
      last = last | {"box": place}
    else:
      labels = [*(last["point_labels"] or []), label]
      last = last | {"points": [*(last["points"] or []), place], "point_labels": labels}
    namespace.objects = [*before, last]


def sort_inputs(inputs: Sequence[str]) -> tuple[list[str], list[str]]:
  """What was typed, as (photos, phrases), each in order; folders become their photos.

  Raises:
    UserError: a photo that does not exist, a folder without photos, an empty phrase, or no photo at all.
  """
  photos, phrases = [], []
  for given in inputs:
    if os.path.isdir(given):
      inside = images_in(given, recursive=False)
      if not inside:
        raise UserError(f"no photos in the folder {shown(given)} (if it is a phrase: --text {given!r})")
      photos += [os.path.join(given, name) for name in inside]
    elif os.path.exists(given):
      photos.append(given)
    elif given.startswith(("http://", "https://")):
      raise UserError(f"addresses are not fetched: download {shown(given)} and give the file")
    elif is_image(given):
      folder, name = os.path.split(given)
      siblings = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
      near = difflib.get_close_matches(name, siblings, n=1)
      hint = f"; did you mean {shown(os.path.join(folder, near[0]))}?" if near else ""
      raise UserError(f"no such photo: {shown(given)}{hint}")
    elif not given.strip():
      raise UserError("a phrase is empty")
    elif _is_path(given):
      raise UserError(f"no such folder or photo: {shown(given)} (if it is a phrase: --text {given!r})")
    else:
      phrases.append(given)
  if not photos:
    taken = "".join(f"; no file or folder is called {phrase!r}" for phrase in phrases)
    raise UserError(f"no photo given{taken} (see {PROGRAM} segment --help)")
  return photos, phrases


def _is_path(given: str) -> bool:
  """Whether it is written as a path, "photos/" or "../photos/june", and not as words, "black/white cat"."""
  return "/" in given and (given[0] in "./~" or given.endswith("/") or not any(map(str.isspace, given)))


def _bad_photos(photos: Sequence[str], given: Sequence[str]) -> dict[str, str]:
  """Photo -> why it is none, by the files' heads, before a model is loaded for nothing.

  Raises:
    UserError: what was typed as a phrase has a file's name.
  """
  from sam3lt_jax.processing.images import check_file

  bad = {}
  for photo in photos:
    try:
      check_file(photo)
    except (OSError, ValueError, MemoryError) as e:
      if photo in given and not os.path.splitext(photo)[1]:
        raise UserError(f"not an image: {shown(photo)} (if it is a phrase: --text {photo!r})") from e
      bad[photo] = error_line(e)
  return bad


def run(args: argparse.Namespace) -> int:
  photos, phrases = sort_inputs(args.inputs)
  bad = _bad_photos(photos, args.inputs)
  phrases = list(dict.fromkeys([*phrases, *args.text]))
  if any(not phrase.strip() for phrase in phrases):
    raise UserError("a phrase is empty")
  if not phrases and not args.box and not args.objects:
    raise UserError(
      f"nothing to look for: give a phrase or --box, or --point at one thing (see {PROGRAM} segment --help)"
    )
  if args.objects and (phrases or args.box):
    raise UserError(
      "--point, --object and --outline mean one object each, phrases and --box all that match: one kind a"
      " call"
    )
  if args.objects and args.tracker is None:
    raise UserError("--point, --object and --outline need --tracker, where SAM 3's tracker is: facebook/sam3")
  make_folder(args.out)
  for why in bad.values():
    print(why, file=sys.stderr)
  names = {photo: name for photo, name in output_names(photos).items() if photo not in bad}
  if names:
    from sam3lt_jax.checkpoints import sources

    sources.check_phrases(args.model, phrases)
    predictor = _load(args)
    random = args.model.startswith(RANDOM)
    if random and args.threshold is None:
      args.threshold, args.top_k = 0.0, args.top_k or _RANDOM_SHOWN
    data = _dataset(args, phrases, predictor.model.config.profile)

  def one(photo: str) -> str:
    start = time.perf_counter()
    image, results = _segment(predictor, photo, phrases, args)
    seconds = time.perf_counter() - start
    paths = _write(args, data, names[photo], photo, image, results)
    if args.json:
      return ""
    found = table(shown(photo), results, seconds, data["info"]["threshold"])
    return f"{found}\n  wrote {', '.join(map(shown, paths))}"

  code = each_photo(names, one, len(bad))
  if names and args.json:
    print(json.dumps(data))
  if names and random:
    note(RANDOM_WARNING.replace("below", "above"))
  return code


def _load(args: argparse.Namespace) -> Predictor:
  """The predictor of `args.model`; under --random-if-offline that may become random weights of its size."""
  try:
    return load(args)
  except ConnectionError as e:
    if not args.random_if_offline or args.model not in ("s0", "s1", "l"):
      raise
    note(f"warning: {e}")
  args.model = f"{RANDOM}{args.model}"
  return load(args)


def _segment(predictor, photo: str, phrases: list[str], args) -> tuple[Any, Results]:
  from sam3lt_jax.processing.images import load_image

  image = load_image(photo)  # upright, once for the model and the overlay
  if args.objects:
    results = _clicked(predictor, image, args.objects, args.mask_threshold)
  else:
    results = predictor(
      image,
      text=phrases or None,
      boxes=[box for box, _ in args.box] or None,
      box_labels=[label for _, label in args.box] or None,
      threshold=args.threshold,
      mask_threshold=args.mask_threshold,
    )
  results = results if args.top_k is None else results.top_k(args.top_k)
  return image, results if args.clean is None else results.clean(args.clean, args.clean)


def _clicked(predictor, image: Any, objects: list[dict[str, Any]], mask_threshold: float) -> Results:
  """One instance an object, in the order asked."""
  from sam3lt_jax.processing.results import Results

  predictor.set_image(image)
  found = [predictor.predict(**asked, mask_threshold=mask_threshold) for asked in objects]
  labels = _object_names(len(objects))
  named = [dataclasses.replace(one, labels=(label,)) for one, label in zip(found, labels)]
  return Results.concatenate(named)


def _object_names(count: int) -> list[str]:
  return ["object"] if count == 1 else [f"object {i}" for i in range(1, count + 1)]


def _dataset(args: argparse.Namespace, phrases: list[str], profile: Profile) -> dict[str, Any]:
  """A COCO data set of no photo yet."""
  from sam3lt_jax import __version__

  info = {
    "description": f"sam3lt_jax {__version__}",
    "model": args.model,
    "random_weights": args.model.startswith(RANDOM),
    "profile": profile.name,
    "threshold": profile.score_threshold if args.threshold is None else args.threshold,
    "mask_threshold": args.mask_threshold,
    "boxes": [{"xyxy": box, "label": label} for box, label in args.box],
    "objects": args.objects,
  }
  if info["random_weights"]:
    info["warning"] = RANDOM_WARNING.split("; ")[0]
  names = phrases or _object_names(len(args.objects)) or ["visual"]
  categories = [{"id": i, "name": name} for i, name in enumerate(names, 1)]
  return {"info": info, "images": [], "categories": categories, "annotations": []}


def _write(args, data: dict[str, Any], name: str, photo: str, image, results: Results) -> list[str]:
  """Adds a photo to the data set and writes what belongs to it alone; returns the paths."""
  base = os.path.join(args.out, name)
  overlay = f"{base}_overlay.jpg"
  results.save(overlay, image, scale="auto")
  masks = results.save_png(f"{base}_masks.png", separate=args.separate_masks)
  number, (height, width) = len(data["images"]) + 1, results.size
  ids = {category["name"]: category["id"] for category in data["categories"]}
  own = {
    "images": [{"id": number, "file_name": photo, "height": height, "width": width}],
    "annotations": results.to_coco(number, ids, first_id=len(data["annotations"]) + 1),
  }
  for key, entries in own.items():
    data[key] += entries
  with open(f"{base}.json", "w", encoding="utf-8") as f:
    json.dump(data | own, f)
    f.write("\n")
  if len(masks) > 1:
    masks = [f"{masks[0]} to {os.path.basename(masks[-1])}"]
  return [overlay, *masks, f"{base}.json"]


def table(photo: str, results: Results, seconds: float, threshold: float) -> str:
  """What was found, best first: number, score, label, box in pixels and the mask's share of the photo."""
  height, width = results.size
  found = f"{len(results)} found" if len(results) else f"nothing found with a score above {threshold:g}"
  lines = [f"{photo}  {width}x{height}  {seconds:.1f} s  {found}"]
  if not len(results):
    return f"{lines[0]} (a lower --threshold finds more)" if threshold > 0 else lines[0]
  labels = [shown(" ".join(label.split())) for label in results.labels[:_ROWS]]
  room = max(5, *(len(label) for label in labels))
  lines.append(f"  {'#':>3}  score  {'label':<{room}}  {'x1':>7} {'y1':>7} {'x2':>7} {'y2':>7}  area %")
  for i, (label, area) in enumerate(zip(labels, results.areas)):
    box = " ".join(f"{v:7.1f}" for v in results.boxes[i])
    share = 100 * area / (height * width)
    lines.append(f"  {i:>3}  {results.scores[i]:5.3f}  {label:<{room}}  {box}  {share:6.2f}")
  if len(results) > _ROWS:
    lines.append(f"  ... {len(results) - _ROWS} more in the JSON file")
  return "\n".join(lines)
