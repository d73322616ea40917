"""`sam3lt track`: all that matches, through a video; interrupted and started again at will."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

from sam3lt_jax.cli.arguments import add_model, add_out, add_tracking, load
from sam3lt_jax.cli.kinds import fraction, positive
from sam3lt_jax.cli.progress import busy
from sam3lt_jax.errors import shown

if TYPE_CHECKING:
  from sam3lt_jax.video.predictor import VideoPredictor

_EPILOG = """\
examples:
  two phrases through a clip:
    sam3lt track clip.mp4 "person" "dog" --out tracked
  a folder of frames, or a glob of them, which were taken 10 a second:
    sam3lt track frames/ "person" --rate 10 --out tracked
  a camera, until Ctrl-C; each frame is put out at once, not after it was looked at for 14 more
    sam3lt track 0 "person" --latency 0 --out watched
  it was interrupted: the same command goes on

written to the output folder:
  masks.jsonl       a line a frame, while it runs: ids, phrases, scores, boxes, masks (RLE)
  overlay.mp4       the video with its objects drawn on it, with its sound
  youtube_vis.json  the masks by object, as YouTube-VIS wants results
  objects.csv       each object's phrase, first and last frame
  davis/            with --davis: a label map a frame

exit codes: 0 done; 2 a mistake in the call, or a disk that cannot be written; 130 and 143 stopped by Ctrl-C
or SIGTERM, after writing where it is. Ctrl-C ends a camera or stream as its last frame would.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.usage = '%(prog)s VIDEO "a phrase" ... --out DIR [options]'
  parser.epilog = _EPILOG
  add = parser.add_argument
  add("source", metavar="VIDEO",
      help="a video file, a folder of frames, a glob of them, a camera's number, or a stream's address",
  )  # fmt: skip
  add("phrases", nargs="+", metavar="PHRASE", help="what to follow; quote a phrase of several words")
  add_out(parser, None)
  add_model(parser)
  add("--threshold", type=fraction, metavar="T",
      help="detections below it start no object, 0 to 1 (default: the authors')")  # fmt: skip
  add("--rate", type=positive, metavar="FPS", help="frames a second of pictures (default: 25)")
  add_tracking(parser)


def run(args: argparse.Namespace) -> int:
  from sam3lt_jax import storage
  from sam3lt_jax.video.frames import open_frames
  from sam3lt_jax.video.writing import MASKS, OBJECTS, OVERLAY, VIS, Files, write_tracks

  source: Any = args.source
  if source.isdecimal() and not os.path.exists(source):
    source = int(source)
  storage.check_directory(args.out, "out")
  stop = threading.Event()
  with storage.signals(stop.set) as caught, open_frames(source, args.rate) as frames:
    predictor = _load(args)
    options = {name: getattr(args, name) for name in ("latency", "threshold", "max_objects")}
    with busy("tracking") as progress:

      def on_frame(done: int, total: int | None) -> None:
        if not progress.unit:
          progress.expect(total, " frames", done - 1)
        progress.advance()

      written = write_tracks(
        predictor, frames, Files(args.out, args.overlay, args.davis, args.every), args.phrases,
        stop=stop.is_set, on_frame=on_frame, note=lambda text: progress.note(shown(text)), **options,
      )  # fmt: skip
  new = written.frames - written.before
  rate = f", {new / written.seconds:.1f} frames/s" if new and written.seconds else ""
  if written.stopped:
    name = signal.Signals(caught[0]).name
    print(f"stopped by {name} after {written.frames} frames{rate}: the same command goes on from there")
    return 128 + caught[0]
  size = "x".join(map(str, frames.size[::-1]))
  found = f"{written.objects} object{'' if written.objects == 1 else 's'}"
  print(f"{shown(args.source)}  {size}  {written.frames} frames{rate}  {found}")
  overlay, davis = ([name] * asked for name, asked in ((OVERLAY, args.overlay), ("davis/", args.davis)))
  print(f"  wrote {shown(args.out)}/: {', '.join([MASKS, *overlay, VIS, OBJECTS, *davis])}")
  return 0


def _load(args: argparse.Namespace) -> VideoPredictor:
  from sam3lt_jax.video.predictor import VideoPredictor

  return VideoPredictor(load(args))
