"""The JobSet and the Dockerfile: valid by their schemas, and true to the slices and files they name."""

from __future__ import annotations

import copy
import fnmatch
import importlib.metadata
import importlib.util
import json
import math
import re

import jsonschema
import kubernetes_validate
import pytest
import yaml

from sam3lt_jax import cli
from sam3lt_jax.cli import batch
from tests.tpu.conftest import ROOT
from tpu import jobset

KUBERNETES = "1.31"
SCHEMA = json.loads((ROOT / "tests" / "fixtures" / "jobset_v1alpha2.json").read_text())
TYPES = [f"{family}-{n}" for family in jobset.LABELS for n in jobset.TOPOLOGIES]
JOB = ["gs://b/photos", "--prompts", "a truck", "--out", "gs://b/found"]


def validate(manifest) -> None:
  """Raises where the JobSet, or the Job that is in it, is not as its API has it."""
  jsonschema.validate(manifest, SCHEMA)
  for job in manifest["spec"]["replicatedJobs"]:
    template = job["template"]
    document = {
      "apiVersion": "batch/v1",
      "kind": "Job",
      "metadata": {"name": job["name"], **template.get("metadata", {})},
      "spec": template["spec"],
    }
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.fixture(scope="module")
def example():
  return yaml.safe_load((ROOT / "tpu" / "jobset.yaml").read_text())


def _job(manifest):
  return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def _pod(manifest):
  return _job(manifest)["template"]["spec"]


def test_the_example_is_valid_and_what_the_command_prints(example, capsys):
  validate(example)
  container = _pod(example)["containers"][0]
  command = ["--image", container["image"], "--accelerator-type", "v6e-16", "--", *container["args"]]
  assert jobset.main(command) == 0
  assert json.loads(capsys.readouterr().out) == example


def test_the_examples_job_is_one_that_the_command_takes(example):
  parser = cli.Parser(prog="sam3lt batch")
  batch.add_arguments(parser)
  args = parser.parse(_pod(example)["containers"][0]["args"])
  assert args.phrases == ["truck", "traffic light"] and args.out == "gs://my-bucket/found"


@pytest.mark.parametrize("accelerator_type", TYPES)
def test_every_slice_is_valid_and_complete(accelerator_type):
  manifest = jobset.jobset("a", "image", accelerator_type, JOB, spot=True, service_account="batch")
  validate(manifest)
  job, pod, total = _job(manifest), _pod(manifest), int(accelerator_type.split("-")[1])
  limits = pod["containers"][0]["resources"]["limits"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  assert job["parallelism"] == job["completions"]
  assert job["parallelism"] * limits["google.com/tpu"] == total
  assert math.prod(map(int, topology.split("x"))) == total
  label = pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"]
  assert (
    label == {"v5litepod": "tpu-v5-lite-podslice", "v6e": "tpu-v6e-slice"}[accelerator_type.split("-")[0]]
  )
  assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"


def test_the_tables_of_the_readme_are_those_of_the_code():
  rows = re.findall(
    r"^\| `(\S+)` \| `(\S+)` \| (\S+) \| (\d+) \|$", (ROOT / "tpu" / "README.md").read_text(), re.M
  )
  assert len(rows) == 4
  for accelerator_type, machine, topology, nodes in rows:
    found = jobset.slice_of(accelerator_type)
    assert (found.machine, found.topology, found.hosts) == (machine, topology, int(nodes))


def _without_image(m):
  del _pod(m)["containers"][0]["image"]


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda m: m.update(apiVersion="jobset.x-k8s.io/v1"), "jobset.x-k8s.io/v1alpha2"),
    (lambda m: m["spec"].update(replicatedJob=[]), "replicatedJob"),
    (lambda m: m["spec"]["failurePolicy"].update(maxRestarts="20"), "'20' is not of type 'integer'"),
    (lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="Stop"), "'Stop' is not one of"),
    (lambda m: _job(m).update(paralellism=4), "paralellism"),
    (lambda m: _pod(m).update(nodeSelektor={}), "nodeSelektor"),
    (lambda m: _pod(m)["containers"][0].update(args="--prompts a"), "is not of type 'array'"),
    (lambda m: _pod(m)["containers"][0]["ports"][0].update(containerPort="8471"), "'8471' is not of type"),
    (lambda m: _job(m)["podFailurePolicy"]["rules"][0].pop("action"), "'action' is a required property"),
  ],
)
def test_a_wrong_manifest_is_found_out(example, damage, message):
  """The checks above can fail."""
  manifest = copy.deepcopy(example)
  damage(manifest)
  with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)) as error:
    validate(manifest)
  assert message in str(error.value)


@pytest.mark.parametrize("name", ["v5e-8", "v6e", "v6e-12", "v6e-", "v4-8"])
def test_an_unknown_slice_is_named(name, capsys):
  with pytest.raises(ValueError, match=f"accelerator_type must be v5litepod-N or v6e-N .*, got '{name}'"):
    jobset.slice_of(name)
  with pytest.raises(SystemExit) as end:
    jobset.main(["--image", "i", "--accelerator-type", name, "--", *JOB])
  assert end.value.code == 2 and name in capsys.readouterr().err


def test_the_manifest_needs_python_alone():
  """The script that calls it may run where nothing of ours is installed."""
  text = (ROOT / "tpu" / "jobset.py").read_text()
  assert set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) <= {
    "__future__", "argparse", "collections", "json", "sys", "typing"
  }  # fmt: skip


def test_the_image_holds_what_the_job_needs():
  lines = (ROOT / "tpu" / "Dockerfile").read_text().splitlines()
  copied = [s for line in lines if line.startswith("COPY ") for s in line.split()[1:-1]]
  assert {"pyproject.toml", "README.md", "LICENSE", "sam3lt_jax", "tpu"} == set(copied)
  kept = [s[1:] for s in (ROOT / "tpu" / "Dockerfile.dockerignore").read_text().split() if s.startswith("!")]
  for source in copied:
    assert (ROOT / source).exists() and any(fnmatch.fnmatch(source, k) for k in kept)
  (entry,) = [json.loads(line.partition(" ")[2]) for line in lines if line.startswith("ENTRYPOINT")]
  assert entry[:2] == ["python", "-m"] and importlib.util.find_spec(entry[2])
  (extra,) = [line.split("=")[1] for line in lines if line.startswith("ARG JAX=")]
  extras = importlib.metadata.metadata("jax").get_all("Provides-Extra")
  assert {extra, "cuda13", "cuda12", "cpu"} <= set(extras)
  (python,) = [line for line in lines if line.startswith("FROM python:")]
  assert re.fullmatch(r"FROM python:3\.1[1-9]-slim", python)
