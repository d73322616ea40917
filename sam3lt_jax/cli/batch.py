"""`sam3lt batch`: all that matches, in as many images as there are; interrupted and started again at will."""

from __future__ import annotations

import argparse
import json

from sam3lt_jax.cli import UserError
from sam3lt_jax.cli.arguments import (
  RANDOM,
  RANDOM_WARNING,
  add_model,
  add_out,
  add_thresholds,
  add_tracking,
  filled,
  start,
)
from sam3lt_jax.cli.kinds import count, fraction, whole
from sam3lt_jax.cli.progress import busy

_EPILOG = """\
examples:
  two phrases in a folder of photos, subfolders included:
    sam3lt batch photos/ --prompts "a dog" "a cat" --out found
  a file of phrases (one a line), or of questions an image (JSON lines), over tar shards:
    sam3lt batch 'shards/photos-{0000..0099}.tar' --prompts-file questions.jsonl --out found
  many clips, one a device at a time (see also sam3lt track):
    sam3lt batch clips/ --video --prompts "person" "dog" --tracker facebook/sam3 --out tracked
  it was interrupted, or the machine is another one: the same command does what is missing
  the first of four hosts (the others: 1 to 3), one output folder that all of them see:
    sam3lt batch gs://my/photos --prompts "a dog" --out gs://my/found --process-index 0 --process-count 4
  how far it is, and one COCO file in the end:
    sam3lt status found
    sam3lt merge found --out found.json

SOURCE is a folder, a glob, a list of paths (.txt), COCO images (.json), tar shards (.tar), or several; with
--video a folder, a glob or a list of video files, or several: what is found stands in OUT/clips.
A file of questions has a line an image: {"id": "a/1.jpg", "text": ["a dog"], "boxes": [[10, 20, 110, 90]]}.

exit codes: 0 done (images that cannot be read are recorded, counted and no error); 1 stopped, as more images
failed than --max-failures; 2 a mistake in the call, or a disk that cannot be written; 130 and 143 stopped by
Ctrl-C or SIGTERM, after writing what was in work. All but 2 print a summary, on stdout.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
  from sam3lt_jax.jobs.reading import MAX_PIXELS

  parser.usage = "%(prog)s SOURCE... --prompts PHRASE... --out DIR [options]"
  parser.epilog = _EPILOG
  add = parser.add_argument
  add("source", nargs="+", metavar="SOURCE", help="images, see below")
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--prompts", dest="phrases", nargs="+", default=[], metavar="PHRASE",
      help="phrases for every image")  # fmt: skip
  what.add_argument("--prompts-file", metavar="FILE", help="phrases, or questions an image, see below")
  add_out(parser, None, help="the job's folder: plan, shards of results, summaries")
  add("--images", metavar="DIR", help="where COCO's file names are (default: beside the JSON file)")
  add("--no-recursive", dest="recursive", action="store_false", help="leave out subfolders")
  model = parser.add_argument_group("model")
  add_model(model)
  add_thresholds(model)
  add = parser.add_argument_group("devices and processes").add_argument
  add("--batch", type=count, metavar="N",
      help="images a device (default: 8, or what its memory holds; 1 on a CPU)")  # fmt: skip
  add("--buckets", type=count, nargs="+", metavar="P",
      help="questions of an image that run together, ascending (default: as many as there are, up to 16;"
      " 1 on a CPU)",
  )  # fmt: skip
  add("--model-parallel", type=count, default=1, metavar="M",
      help="share one copy of the weights among M devices, where one is too small")  # fmt: skip
  add("--workers", type=count, metavar="N",
      help="images decoded at once (default: one a core, 2 to 16), and as many threads for the results",
  )  # fmt: skip
  add("--worker-processes", action="store_true",
      help="decode in processes instead of threads: not faster, but a decoder that crashes costs one image",
  )  # fmt: skip
  add("--process-index", type=int, metavar="I",
      help="this process's number, from 0, where several share a job")  # fmt: skip
  add("--process-count", type=count, metavar="N", help="how many there are (default: as jax.distributed has)")
  add("--compilation-cache", metavar="DIR",
      help="where compiled programs are kept for the next start (default: in the user's cache folder)",
  )  # fmt: skip
  add("--no-compilation-cache", dest="compilation_cache", action="store_const", const="",
      help="compile anew at each start")  # fmt: skip
  add = parser.add_argument_group("job").add_argument
  add("--shard-size", type=count, metavar="N", help="images committed together (default: by the job, 16-500)")
  add("--max-pixels", type=count, default=MAX_PIXELS, metavar="N",
      help="larger images are recorded as failures")  # fmt: skip
  add("--max-failures", type=fraction, default=0.5, metavar="SHARE",
      help="stop if more than this share of the images fails, from 20 images on")  # fmt: skip
  add("--overlays", type=whole, default=0, metavar="N", help="draw N of the images, spread over the source")
  add("--allow-change", action="store_true",
      help="go on where the job had other images, phrases or options; what is done stays")  # fmt: skip
  add("--verify", action="store_true", help="read all that is done, and do again what is damaged")
  add("--json", action="store_true", help="print the summary as JSON")
  clips = parser.add_argument_group("clips")
  clips.add_argument("--video", action="store_true", help="SOURCE is clips: follow the phrases through each")
  add_tracking(clips)


def run(args: argparse.Namespace) -> int:
  start(args)
  if args.video and args.prompts_file is not None:
    raise UserError("--video takes --prompts, the same for every clip, and no --prompts-file")
  with busy("starting") as progress:
    if args.model.startswith(RANDOM):
      progress.note(RANDOM_WARNING.replace("the masks and scores below", "the results"))
    if args.video:
      from sam3lt_jax.jobs.clips import ClipConfig, run_clips

      summary = run_clips(ClipConfig(**filled(ClipConfig, args)), progress=progress)
    else:
      from sam3lt_jax.jobs.run import JobConfig, run_job

      summary = run_job(JobConfig(**filled(JobConfig, args)), progress=progress)
  print(json.dumps(summary.to_json()) if args.json else summary)
  return summary.exit_code
