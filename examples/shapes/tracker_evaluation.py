"""How well a tracker answers on held-out scenes, and follows on held-out clips.

python -m examples.shapes.tracker_evaluation
python -m examples.shapes.tracker_evaluation --picture docs/images/clicks.png --seed 1000000006
python -m examples.shapes.tracker_evaluation --clip-picture docs/images/track.jpg --seed 1000000003
"""

from __future__ import annotations

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from examples.shapes.data import HELD_OUT_SEED
from examples.shapes.tracker_data import LEAST, encode
from sam3lt_jax import Predictor, VideoPredictor, tracker_from_pretrained
from sam3lt_jax.engine import Engine
from sam3lt_jax.features import Clicks
from sam3lt_jax.ops.resize import resized
from sam3lt_jax.processing.masks import mask_box
from sam3lt_jax.processing.results import Results
from sam3lt_jax.shapes.scenes import SceneConfig, draw_clip, draw_scene
from sam3lt_jax.tracker import Sam3Tracker
from sam3lt_jax.video.interactive import InteractiveVideo

ROUNDS = 3  # of clicks: one, and two corrections
EVERYTHING = {"points_per_side": 16, "pred_iou_thresh": 0.7, "stability_score_thresh": 0.8}
_ROWS = 32  # prompts a forward


def centre(region: np.ndarray) -> tuple[float, float]:
  """(x, y) of the pixel of a region that is farthest from its edge."""
  inside = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
  y, x = np.unravel_index(inside.argmax(), inside.shape)
  return float(x), float(y)


def next_click(found: np.ndarray, truth: np.ndarray) -> tuple[tuple[float, float], int]:
  """In the middle of the largest piece of what is wrong; on the object where nothing is."""
  pieces, n = ndimage.label(found != truth)
  if not n:
    return centre(truth), 1
  piece = pieces == 1 + np.bincount(pieces.ravel())[1:].argmax()
  return (at := centre(piece)), int(truth[int(at[1]), int(at[0])])


def answers(tracker: Sam3Tracker, variables):
  """A compiled function: (trunk [P, h, w, D], points, labels, logits, has_mask, one of several bool []) ->
  masks bool [P, S, S], logits [P, 4h, 4w], object scores [P].
  """

  @jax.jit
  def answer(trunk, points, labels, logits, has_mask, several):
    def call(self):
      features = self.get_image_features(trunk)
      decoded = self.decode(features, Clicks(points, labels, labels != -10, logits, has_mask))
      best = jnp.where(several, 1 + decoded.ious[:, 1:].argmax(axis=1), self.single(decoded))
      return decoded.masks[jnp.arange(len(points)), best], decoded.object_score_logits[:, 0]

    logits, score = tracker.apply(variables, method=call)
    side = tracker.config.patch_size * trunk.shape[1]
    return resized(logits, side) > 0, jnp.clip(logits, -32, 32), score

  return answer


def clicks(tracker: Sam3Tracker, variables, scenes: int = 100) -> dict[str, float]:
  """Mean IoU over all objects of held-out scenes: after one, two and three clicks, and for an exact box.

  The first click is in the middle of an object. Each other is in the middle of the largest piece of what is
  wrong and starts from the answer before, as `Predictor.refine` does it.
  """
  drawn = [draw_scene(HELD_OUT_SEED + i) for i in range(scenes)]
  maps = encode(np.stack([s.image for s in drawn])).astype(np.float32)
  things = [(i, t) for i, s in enumerate(drawn) for t in s.objects if t.mask.sum() >= LEAST]
  answer, side = answers(tracker, variables), drawn[0].image.shape[0]
  found: dict[str, list[float]] = {}
  for first in range(0, len(things), _ROWS):
    rows = things[first : first + _ROWS]
    padded = rows + rows[-1:] * (_ROWS - len(rows))
    trunk, truth = maps[[i for i, _ in padded]], np.stack([t.mask for _, t in padded])
    ask = functools.partial(answer, trunk)

    count = len(rows)

    def note(name, masks, truth=truth, count=count):
      found[name] = found.get(name, []) + _ious(masks[:count], truth[:count])

    points, labels = np.zeros((_ROWS, 2, 2), np.float32), np.full((_ROWS, 2), -10, np.int32)
    masks, logits = np.zeros_like(truth), np.zeros((_ROWS, side // 3, side // 3), np.float32)
    empty = logits
    for n in range(ROUNDS):
      asked = [next_click(m, t) for m, t in zip(masks, truth)]
      points[:, 0], labels[:, 0] = [at for at, _ in asked], [label for _, label in asked]
      masks, logits, _ = map(np.asarray, ask(points / side, labels, logits, np.full(_ROWS, n > 0), n == 0))
      note(f"{n + 1} clicks" if n else "1 click", masks)
    points[:] = np.array([t.box for _, t in padded], np.float32).reshape(-1, 2, 2)
    labels[:] = (2, 3)
    note("box", np.asarray(ask(points / side, labels, empty, np.full(_ROWS, False), True)[0]))
  return {name: float(np.mean(v)) for name, v in found.items()} | {"objects": len(things)}


def clips(engine: Engine, count: int = 20, frames: int = 24) -> dict[str, float]:
  """J, the mean IoU over frames and objects that are clicked on once, on the first frame of held-out clips.

  Where an object cannot be seen, an empty mask counts 1 and any other 0, as in DAVIS. The first frame does
  not count. "J, seen" is that over frames that show at least `LEAST` pixels of the object, "hidden" the share
  of frames without a pixel of it that are left empty.
  """
  video, seen, empty, every = InteractiveVideo(engine), [], [], []
  for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + count):
    drawn = draw_clip(seed, frames)
    state = video.init_state([scene.image for scene in drawn])
    asked = [i for i, thing in enumerate(drawn[0].objects) if thing.mask.sum() >= LEAST]
    for i in asked:
      at = centre(drawn[0].objects[i].mask)
      video.add_new_points_or_box(state, 0, i, points=[at], labels=[1])
    for t, ids, logits in video.propagate_in_video(state) if asked else ():
      for i, mask in zip(ids, logits[:, 0] > 0) if t else ():
        truth = drawn[t].objects[i].mask
        (iou,) = _ious([mask], [truth]) if truth.any() else [float(not mask.any())]
        every.append(iou)
        if truth.sum() >= LEAST:
          seen.append(iou)
        elif not truth.any():
          empty.append(iou)
  of = lambda x: float(np.mean(x)) if x else float("nan")  # noqa: E731
  return {
    "J": of(every),
    "J, seen": of(seen),
    "hidden": of(empty),
    "frames": len(every),
    "of hidden": len(empty),
  }


def picture(predictor: Predictor, seed: int, side: int = 300) -> Image.Image:
  """A scene in six panels: itself; its largest object by a click and by its outline; the next two by a click
  each, a white dot; everything.
  """
  scene = draw_scene(seed, SceneConfig(side=side, min_objects=4))
  predictor.set_image(scene.image)
  first, *others = sorted(scene.objects, key=lambda thing: -thing.mask.sum())[:3]
  at, box = centre(first.mask), list(first.box)
  panels = [Image.fromarray(scene.image), _panel(scene.image, predictor.predict(points=[at]), at)]
  panels.append(_panel(scene.image, predictor.predict(box=box)))
  ImageDraw.Draw(panels[-1]).rectangle(box, outline="white", width=2)
  for at in (centre(other.mask) for other in others):
    panels.append(_panel(scene.image, predictor.predict(points=[at]), at))
  records = predictor.generate_masks(scene.image, **EVERYTHING)
  masks = np.array([r["segmentation"] for r in records], bool).reshape(-1, side, side)
  boxes = np.array([mask_box(m) for m in masks]).reshape(-1, 4)
  names, scores = tuple(map(str, range(len(masks)))), np.array([r["predicted_iou"] for r in records])
  panels.append(_panel(scene.image, Results(boxes, scores, masks, names, (side, side))))
  return _sheet(panels, 3)


def clip_picture(video: VideoPredictor, seed: int, frames: int = 24, shown: int = 8) -> Image.Image:
  """Frames of a clip, evenly spaced, with all shapes that were found and followed."""
  side, last = 240, frames - 1
  drawn = draw_clip(seed, frames, SceneConfig(side=side, min_objects=2, max_objects=5))
  found = list(video.track([scene.image for scene in drawn], text="shape"))
  return _sheet([found[round(i * last / (shown - 1))].render() for i in range(shown)], shown // 2)


def _sheet(panels: list[Image.Image], columns: int, gap: int = 6) -> Image.Image:
  side = panels[0].width + gap
  sheet = Image.new("RGB", (columns * side - gap, -(-len(panels) // columns) * side - gap), "white")
  for i, panel in enumerate(panels):
    sheet.paste(panel, (i % columns * side, i // columns * side))
  return sheet


def _panel(image: np.ndarray, found: Results, at: tuple[float, float] | None = None) -> Image.Image:
  drawn = found.render(image, labels=False, scores=False)
  if at is not None:
    ImageDraw.Draw(drawn).ellipse((at[0] - 4, at[1] - 4, at[0] + 4, at[1] + 4), fill="white", outline="black")
  return drawn


def _ious(found: np.ndarray, truth: np.ndarray) -> list[float]:
  return [float((a & b).sum()) / max(float((a | b).sum()), 1.0) for a, b in zip(found, truth)]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tracker", default="shapes", help="what `tracker_from_pretrained` takes")
  parser.add_argument("--scenes", type=int, default=100)
  parser.add_argument("--clips", type=int, default=20)
  parser.add_argument("--picture", help="draw answers to this file, and measure nothing")
  parser.add_argument("--clip-picture", help="draw a clip that was followed to this file, likewise")
  parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="of the picture's scene or clip")
  args = parser.parse_args()
  if args.picture:
    predictor = Predictor.from_pretrained("shapes", tracker=args.tracker, compile_ahead=False)
    picture(predictor, args.seed).quantize(128).save(args.picture, optimize=True)
    return
  if args.clip_picture:
    video = VideoPredictor.from_pretrained("shapes", tracker=args.tracker, compile_ahead=False)
    clip_picture(video, args.seed).save(args.clip_picture)
    return
  tracker, variables = tracker_from_pretrained(args.tracker, progress=False)
  print(json.dumps(clicks(tracker, variables, args.scenes)), flush=True)
  if args.clips and tracker.config.memory:
    engine = Predictor.from_pretrained("shapes", tracker=args.tracker, compile_ahead=False).engine
    print(json.dumps(clips(engine, args.clips)))


if __name__ == "__main__":
  main()
