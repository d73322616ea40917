"""What remains of a training run: `python -m examples.shapes.record --run runs/shapes --out docs/shapes`.

Copies each stage's configuration (seeds among it) and log, draws its curves, renders answers about held-out
scenes, and writes a page with the results and the time that every stage took.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil

import numpy as np
from PIL import Image

from examples.shapes.evaluation import held_out_scenes, questions_about
from examples.shapes.train import FRESH_SCENES, STAGES, Runs
from sam3lt_jax import Predictor
from sam3lt_jax.shapes.scenes import SceneConfig, draw_scene
from sam3lt_jax.training.curves import plot_run

_RUNS = Runs()
ROWS_A_STEP = {
  stage: {"student": _RUNS.student.batch_size, "phrases": _RUNS.phrases.phrases}.get(stage)
  or getattr(_RUNS, stage).images
  for stage in STAGES
}
COLUMNS = {
  "teacher": "teacher", "student": "student", "finish": "finished student",
  "port": "under transformers' rules (ships)",
  "fresh": f"... on {FRESH_SCENES} fresh scenes",
}  # fmt: skip
GOALS = {
  "f1": 0.90, "mask_iou": 0.85, "presence_accuracy": 0.95, "box_f1": 0.75, "negative_box_removed": 1.0,
}  # fmt: skip
MEANING = {
  "cgF1": "SA-Co's measure over all phrases, of 100",
  "pmF1": "F1 of masks, mean over IoU 0.5 to 0.95, phrases that are present",
  "IL_MCC": "Matthews correlation of present and absent",
  "f1": "F1 of masks at IoU 0.5, phrases that are present",
  "mask_iou": "mean IoU of matched masks",
  "presence_accuracy": "present or absent told right, all phrases",
  "box_f1": "one positive box alone: F1 of the others of its kind",
  "negative_box_f1": "a phrase and a negative box: F1 of what remains",
  "negative_box_removed": "... and the share of the boxed kind that is left out",
  "boxed_removed": "... of the boxed objects alone",
}
PICTURES = 9
SIDE = 360  # pixels a picture


def stage_folder(run: str, stage: str) -> str:
  """Where `examples.shapes.train` keeps a stage's log."""
  return os.path.join(run, stage, "run") if stage == "student" else os.path.join(run, stage)


def hours(metrics: str, rows_a_step: int) -> float:
  """Time in steps, from the speeds logged: without compilation, evaluation and pauses."""
  with open(metrics, encoding="utf-8") as f:
    rows = [json.loads(line) for line in f]
  seconds, last = 0.0, 0
  for row in sorted((r for r in rows if "images_per_second" in r), key=lambda r: r["step"]):
    seconds += max(row["step"] - last, 0) * rows_a_step / row["images_per_second"]
    last = row["step"]
  return seconds / 3600


def pictures(model: str) -> Image.Image:
  """Held-out scenes, each with what the model finds for a phrase that is present."""
  predictor = Predictor.from_pretrained(model)
  sheet = Image.new("RGB", (3 * SIDE, (PICTURES + 2) // 3 * SIDE), "white")
  crowded = (scene for scene in held_out_scenes() if len(scene.objects) >= 4)
  for i, small in zip(range(PICTURES), crowded):
    scene = draw_scene(small.seed, SceneConfig(side=SIDE))
    text = questions_about(scene)[0].question.text
    sheet.paste(predictor(scene.image, text=text).render(scene.image), (i % 3 * SIDE, i // 3 * SIDE))
  return sheet


def page(found: dict[str, dict], spent: dict[str, float]) -> str:
  """The results as Markdown; `found`: the files that `examples.shapes.train` wrote, `COLUMNS` and sizes."""
  cores, today, counts = os.cpu_count(), datetime.date.today().isoformat(), found["port"]
  lines = [
    "# The bundled model: how it was made, and what it reaches", "",
    "Written by `python -m examples.shapes.record` from a run of `python -m examples.shapes.train`, on"
    f" {cores} cores of an {processor()}, {today}.",
    "The measures are of 500 held-out scenes, score threshold 0.5"
    f" ({counts['questions_present']} phrases present, {counts['questions_absent']} absent,"
    f" {counts['questions_box']} positive boxes, {counts['questions_negative_box']} negative boxes).",
    "No stage trains on them, but they were looked at while the stages were made; the last column is of"
    " scenes that were not.", "",
    f"| measure | {' | '.join(COLUMNS.values())} | goal | what it is |",
    "| --- |" + " --- |" * (len(COLUMNS) + 2),
  ]  # fmt: skip
  for name, meaning in MEANING.items():
    digits = 2 if name == "cgF1" else 4
    # A measure may be younger than a run: the models of its earlier stages are not kept.
    values = " | ".join(f"{found[c][name]:.{digits}f}" if name in found[c] else "" for c in COLUMNS)
    lines.append(f"| {name} | {values} | {_goal(name, found)} | {meaning} |")
  lines += ["", "| stage | hours | its log, settings and curves |", "| --- | --- | --- |"]
  for stage, time in spent.items():
    files = f"[log]({stage}.jsonl), [settings]({stage}.json), [curves]({stage}.png)"
    lines.append(f"| {stage} | {time:.2f} | {files} |")
  sizes = found["sizes"]
  fewer = 1 - sizes["student"] / sizes["teacher"]
  lines += [
    f"| all | {sum(spent.values()):.2f} | steps only, without compilation and evaluation |", "",
    f"The student's text encoder has {sizes['student']:,} parameters, {fewer:.1%} fewer than the teacher's"
    f" {sizes['teacher']:,}.", "",
    "Held-out scenes and what the model that ships finds for one phrase each:", "",
    "![answers](answers.jpg)", "",
  ]  # fmt: skip
  return "\n".join(lines)


def _goal(name: str, found: dict[str, dict]) -> str:
  """The goal of a measure, and whether what ships reaches it, on the 500 scenes and on the fresh ones."""
  if name == "cgF1":
    kept = found["student"][name] / max(found["teacher"][name], 1e-9)
    return f"student >= 98.1% of the teacher: {kept:.1%}"
  if name not in GOALS:
    return ""
  places = {"port": "the 500 scenes", "fresh": "the fresh ones"}
  short = [place for column, place in places.items() if found[column][name] < GOALS[name]]
  return f">= {GOALS[name]}: {'missed on ' + ' and '.join(short) if short else 'met'}"


def processor() -> str:
  """The processor's name, where the system tells."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as f:
      return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
  except (OSError, StopIteration):
    return platform.machine()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--run", default="runs/shapes", help="the folder given to examples.shapes.train")
  parser.add_argument("--out", default="docs/shapes", help="where the record is written")
  args = parser.parse_args()
  os.makedirs(args.out, exist_ok=True)
  spent = {}
  for stage in STAGES:
    folder = stage_folder(args.run, stage)
    metrics = os.path.join(folder, "metrics.jsonl")
    spent[stage] = hours(metrics, ROWS_A_STEP[stage])
    shutil.copyfile(metrics, os.path.join(args.out, f"{stage}.jsonl"))
    shutil.copyfile(os.path.join(folder, "config.json"), os.path.join(args.out, f"{stage}.json"))
    plot_run(metrics, os.path.join(args.out, f"{stage}.png"), f"shapes: {stage}")
  found = {}
  for name in (*COLUMNS, "sizes"):
    with open(os.path.join(args.run, f"{name}.json"), encoding="utf-8") as f:
      found[name] = json.load(f)
  pictures(os.path.join(args.run, "model")).save(os.path.join(args.out, "answers.jpg"), quality=90)
  with open(os.path.join(args.out, "README.md"), "w", encoding="utf-8") as f:
    f.write(page(found, spent))
  print(f"wrote {args.out}: {np.sum(list(spent.values())):.2f} hours of training")


if __name__ == "__main__":
  main()
