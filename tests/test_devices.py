"""Which devices run, how that is said, and where compiled programs are kept."""

import os
import re
import subprocess
import sys

import jax
import pytest

from sam3lt_jax import Predictor, cli, devices, from_pretrained
from sam3lt_jax.cli import arguments
from tests import tiny

RUNNING = "CPU, float32, attention in blocks"


def test_a_predictor_says_what_it_runs_on():
  with tiny.hurry():
    predictor = Predictor(*tiny.load(tiny.config()), device="cpu")
  assert predictor.engine.devices == jax.devices("cpu")[:1] and predictor.running == RUNNING
  assert repr(predictor).startswith(f"Predictor({RUNNING}; ") and "profile original" in repr(predictor)


@pytest.mark.parametrize(
  "device, says",
  [
    ("gpu", "device=gpu: there is no such device here .*sam3lt_jax\\[cuda\\]"),
    ("cuda:1", "device=cuda:1: there is no such device here .*sam3lt_jax\\[cuda\\]"),
    ("cpu:7", "device='cpu:7': there is no such one, only CPU"),
    ("mps", "device must be 'cpu', 'gpu', 'tpu', or one of several, as 'gpu:1', got 'mps'"),
    ("gpu:x", "device must be"),
    (3, "device must be"),
  ],
)
def test_devices_that_are_not_there(device, says):
  for call in (
    lambda: Predictor(*tiny.load(tiny.config()), device=device),
    lambda: Predictor.from_pretrained("nobody/nothing", device=device),  # told before it is looked for
  ):
    with pytest.raises(ValueError, match=says):
      call()


def test_device_or_devices():
  with pytest.raises(ValueError, match="device and devices were given"):
    Predictor(*tiny.load(tiny.config()), device="cpu", devices=jax.devices())
  _, variables = from_pretrained("random:tiny", device="cpu")
  assert jax.tree.leaves(variables)[0].devices() == set(jax.devices("cpu")[:1])


@pytest.fixture
def config():
  """jax's settings, set back afterwards."""
  names = "jax_platforms", "jax_compilation_cache_dir", "jax_compilation_cache_max_size"
  names += "jax_enable_compilation_cache", "jax_cuda_visible_devices"
  before = {name: jax.config._read(name) for name in names}
  yield jax.config
  for name, value in before.items():
    jax.config.update(name, value)


def test_the_command_line_chooses_what_jax_sees(config, capsys):
  devices.use("gpu:1")
  assert jax.config.jax_platforms == "cuda,cpu" and config._read("jax_cuda_visible_devices") == "1"
  devices.use("tpu")
  assert jax.config.jax_platforms == "tpu,cpu"
  assert cli.main(["demo", "--device", "gpu"]) == 2
  assert capsys.readouterr().err.startswith("sam3lt: error: --device gpu: there is no such device here")
  assert cli.main(["demo", "--device", "tpu:1"]) == 2
  assert "--device takes a number with gpu only" in capsys.readouterr().err


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_that_runs_a_model_has_the_option(verb, capsys):
  assert cli.main([verb, "--help"]) == 0
  runs = verb not in ("info", "status", "merge")
  assert ("--device cpu|gpu|gpu:1|tpu" in capsys.readouterr().out) == runs


@pytest.mark.full  # 4 s
@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there(platform, tmp_path):
  """One sentence and 2, out of the command line and the converters; a ValueError in Python."""
  code = """if True:
    import sys, sam3lt_jax, convert.from_torch
    from sam3lt_jax import cli
    out = sys.argv[1]
    for verb in ("info s0", "demo", "batch . --prompts a -m shapes", "distill --prompts README.md"):
      print(cli.main([*verb.split(), *(["-o", out] if verb != "info s0" else [])]), file=sys.stderr)
    print(convert.run(convert.from_torch.main, ["shapes", out]), file=sys.stderr)
    try:
      sam3lt_jax.Predictor.from_pretrained("shapes")
    except ValueError as e:
      print("sam3lt: error:", e, file=sys.stderr)
  """
  done = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path / "out")],
    env=os.environ | {"JAX_PLATFORMS": platform}, capture_output=True, text=True, timeout=120, check=True,
  )  # fmt: skip
  progress = re.compile(r"WARNING|phrases|.*\[\d\d:\d\d\]|\s*$")  # the latter on a busy machine
  *pairs, last = (line for line in re.split(r"[\r\n]+", done.stderr) if not progress.match(line))
  assert pairs[1::2] == ["2"] * 5, done.stderr
  for line in [*pairs[::2], last]:
    assert f"error: JAX_PLATFORMS={platform}: there is no such device here" in line, done.stderr


def test_what_jax_said_is_cut_between_words():
  said = RuntimeError("Unable to initialize backend " + 30 * "libtpu.so ")
  assert "libtpu.so [...]); TPUs need" in str(devices._absent("device", "tpu", said))


def test_the_cache_of_compiled_programs(tmp_path, config, monkeypatch):
  config.update("jax_compilation_cache_dir", None)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  config.update("jax_enable_compilation_cache", False)
  devices.keep_compiled()
  assert config.jax_compilation_cache_dir is None
  config.update("jax_enable_compilation_cache", True)
  devices.keep_compiled()
  assert config.jax_compilation_cache_dir == devices.cache_folder() == str(tmp_path / "sam3lt_jax/compiled")
  assert (tmp_path / "sam3lt_jax/compiled").stat().st_mode & 0o077 == 0
  assert config.jax_compilation_cache_max_size == devices.CACHE_BYTES
  devices.keep_compiled(str(tmp_path / "own"))
  assert config.jax_compilation_cache_dir == str(tmp_path / "own")
  devices.keep_compiled()  # jax has one: it stays
  assert config.jax_compilation_cache_dir == str(tmp_path / "own")
  devices.keep_compiled("")
  assert config.jax_compilation_cache_dir is None


def test_predictors_and_verbs_keep_what_they_compile(tmp_path, config, monkeypatch):
  """Also where something was compiled before."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  for way in (
    lambda: Predictor.from_pretrained("random:tiny", compile_ahead=False),
    lambda: arguments.start(cli.argparse.Namespace(device=None)),
  ):
    config.update("jax_compilation_cache_dir", None)
    way()
    assert config.jax_compilation_cache_dir == devices.cache_folder()
  config.update("jax_compilation_cache_max_size", -1)
  arguments.start(cli.argparse.Namespace(device=None, compilation_cache="gs://some/where"))
  # jax keeps no bound, for which it needs a lock, in a bucket.
  assert config.jax_compilation_cache_dir == "gs://some/where" and config.jax_compilation_cache_max_size == -1
