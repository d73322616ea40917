"""`sam3lt batch`: what its options mean, what it prints and returns."""

import json
import re

import pytest

from sam3lt_jax import cli
from sam3lt_jax.cli import batch
from sam3lt_jax.jobs import run
from sam3lt_jax.jobs.summary import Summary
from tests.jobs import pictures

# pycocotools' own, of its decoder; users do not see it, pytest shows them all.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def asked(monkeypatch):
  """Configurations that `run_job` was called with; it does nothing and returns `asked.summary`."""

  class Asked(list):
    summary = Summary("0 of 1", "out", 3, shards_done=3, images=7)

  asked = Asked()

  def run_job(config, progress):
    progress.describe("listing")
    progress.expect(7)
    progress.advance(False)
    progress.note("something to know")
    asked.append(config)
    return asked.summary

  monkeypatch.setattr(run, "run_job", run_job)
  return asked


def test_a_job_from_the_command_line(tmp_path, monkeypatch, capsys):
  photos = pictures.folder(tmp_path / "photos", 3)
  monkeypatch.setattr(run, "load", lambda *_: (pictures.predictor().engine, "weights"))
  arguments = [
    "batch", str(photos), "--prompts", "a dog", "--out", str(tmp_path / "out"), "--threshold", "0",
    "--overlays", "1",
  ]  # fmt: skip
  assert cli.main(arguments) == 0
  out, err = capsys.readouterr()
  assert re.match(
    r"6 images in [\d.]+ s, [\d.]+ images/s: 18 instances found\n3 images failed: 1 empty, ", out
  )
  assert re.search(r"devices \(1, 1 images each\) busy \d+% of", out)
  assert err == "sam3lt: running on CPU, float32, attention in blocks\n"
  assert len(pictures.records(tmp_path / "out")) == 6
  assert cli.main(arguments) == 0
  assert capsys.readouterr().out == "nothing to do: all 6 images were done before\n"
  arguments[arguments.index("a dog")] = "a cat"
  assert cli.main(arguments) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.count("\n") == 1 and "--allow-change" in err


def test_options_are_the_configurations(asked, capsys):
  assert cli.main(["batch", "a", "--prompts", "x y", "z", "--out", "o", "b"]) == 0
  assert asked == [run.JobConfig(source=["a", "b"], out="o", phrases=["x y", "z"])]
  assert capsys.readouterr().err.endswith("something to know\n")
  given = (
    "batch a --prompts-file p.jsonl --out o --model l --profile transformers --dtype bfloat16"
    " --image-size 504 --threshold 0.25 --mask-threshold 0.4 --batch 4 --buckets 1 8 --model-parallel 2"
    " --workers 3 --worker-processes --process-index 1 --process-count 2 --no-compilation-cache"
    " --shard-size 9"
    " --max-pixels 1000 --max-failures 0.1 --overlays 5 --allow-change --verify --no-recursive --images i"
  )
  assert cli.main(given.split()) == 0
  assert asked[1] == run.JobConfig(
    source=["a"], out="o", phrases=[], prompts_file="p.jsonl", model="l", profile="transformers",
    dtype="bfloat16", image_size=504, threshold=0.25, mask_threshold=0.4, batch=4, buckets=[1, 8],
    model_parallel=2, workers=3, worker_processes=True, process_index=1, process_count=2,
    compilation_cache="", shard_size=9, max_pixels=1000, max_failures=0.1, overlays=5, allow_change=True,
    verify=True, recursive=False, images="i",
  )  # fmt: skip


def test_every_option_of_a_configuration_can_be_given():
  parser = cli.Parser()
  batch.add_arguments(parser)
  given = vars(parser.parse(["a", "--prompts", "x", "--out", "o"]))
  assert run.JobConfig.__dataclass_fields__.keys() <= given.keys()


def test_exit_codes_and_json(asked, capsys):
  arguments = ["batch", "a", "--prompts", "x", "--out", "o", "--json"]
  for changes, code in (
    ({}, 0),
    ({"stopped": "9 of 20 images failed", "too_many_failures": True}, 1),
    ({"stopped": "stopped by SIGTERM", "signal": 15}, 143),
    ({"stopped": "stopped by SIGINT", "signal": 2}, 130),
  ):
    asked.summary = Summary("0 of 1", "out", 3, images=7, **changes)
    assert cli.main(arguments) == code
    printed = json.loads(capsys.readouterr().out)
    assert printed["images"] == 7 and printed["stopped"] == changes.get("stopped")


def test_random_weights_are_announced(asked, capsys):
  assert cli.main(["batch", "a", "--prompts", "x", "--out", "o", "--model", "random:s0"]) == 0
  assert "RANDOM WEIGHTS: no trained model was loaded; the results mean nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--prompts", "a", "--out", "o"], "required: SOURCE"),
    (["s", "--out", "o"], "one of the arguments --prompts --prompts-file is required"),
    (["s", "--prompts", "a"], "required: -o/--out"),
    (["s", "--prompts", "a", "--prompts-file", "b", "--out", "o"], "not allowed with"),
    (["s", "--prompts", "a", "--out", "o", "--batch", "0"], "--batch: must be a whole number of at least 1"),
    (["s", "--prompts", "a", "--out", "o", "--max-failures", "2"], "--max-failures: must be a number within"),
    (["s", "--prompts", "a", "--out", "o", "--overlays", "-1"], "--overlays: must be a whole number of at"),
    (["s", "--prompts", "a", "--out", "o", "--process-index", "0"], "process_index and process_count go"),
    (["no/such", "--prompts", "a", "--out", "/dev/null/o"], "/dev/null/o"),
  ],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments, message, capsys):
  assert cli.main(["batch", *arguments]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("sam3lt: error: ") and err.count("\n") == 1
  assert message in err


def test_help_has_examples_and_exit_codes(capsys):
  assert cli.main(["batch", "--help"]) == 0
  out = capsys.readouterr().out
  assert "examples:" in out and "exit codes: 0 done" in out and "--process-count" in out


def test_a_summary_says_what_is_left():
  text = str(Summary("0 of 2", "out", 5, shards_left=2, shards_busy=1, images=3, seconds=2.0))
  assert text.endswith("2 of 5 shards are not done yet (1 in work elsewhere)")
  stopped = Summary("0 of 1", "out", 5, shards_left=2, images=3, stopped="stopped by SIGTERM")
  assert str(stopped).endswith("stopped by SIGTERM; the same command goes on from here")
