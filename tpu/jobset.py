"""The JobSet of a batch job, as JSON, which kubectl takes as it takes YAML.

    python -m tpu.jobset --name sam3lt --image IMAGE --accelerator-type v6e-16 -- SOURCE --prompts ...

jobset.yaml beside this file is what the example above gives, to read and to edit by hand. Needs Python alone.
Sources: JobSet v1alpha2; GKE's tables of TPU machine types and node labels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

LABELS = {"v5litepod": "tpu-v5-lite-podslice", "v6e": "tpu-v6e-slice"}
MACHINES = {"v5litepod": "ct5lp-hightpu-{}t", "v6e": "ct6e-standard-{}t"}
TOPOLOGIES = {
  1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"
}  # fmt: skip
USERS_MISTAKE = 2  # exit code of the job for what no restart can mend


class Slice(NamedTuple):
  """A TPU slice on GKE: `hosts` machines of `chips` chips each."""

  label: str
  topology: str
  machine: str
  hosts: int
  chips: int


def slice_of(accelerator_type: str) -> Slice:
  """The slice that "v5litepod-N" (v5e) or "v6e-N" names: up to 8 chips on one host, beyond that 4 a host.

  Raises ValueError for another name.
  """
  family, _, size = accelerator_type.partition("-")
  if family not in LABELS or not size.isdecimal() or int(size) not in TOPOLOGIES:
    raise ValueError(
      f"accelerator_type must be v5litepod-N or v6e-N with N one of {', '.join(map(str, TOPOLOGIES))},"
      f" got {accelerator_type!r}"
    )
  total = int(size)
  chips = total if total <= 8 else 4
  machine = MACHINES[family].format(chips)
  return Slice(LABELS[family], TOPOLOGIES[total], machine, total // chips, chips)


def jobset(
  name: str,
  image: str,
  accelerator_type: str,
  arguments: Sequence[str],
  *,
  service_account: str = "default",
  spot: bool = False,
  max_restarts: int = 20,
) -> dict[str, Any]:
  """The manifest: one slice, one pod a host, every pod with the same command.

  Args:
    name: of the JobSet.
    image: what to run; see the Dockerfile.
    accelerator_type: see `slice_of`.
    arguments: those of `python -m tpu.batch_inference`.
    service_account: Kubernetes service account, which may read and write the bucket.
    spot: run on spot nodes.
    max_restarts: how often all pods are started again after one was lost.

  Raises:
    ValueError: see `slice_of`.
  """
  tpu = slice_of(accelerator_type)
  token = {"name": "hf-token", "key": "token", "optional": True}
  pod: dict[str, Any] = {
    "restartPolicy": "Never",
    "serviceAccountName": service_account,
    "terminationGracePeriodSeconds": 25,  # a spot node leaves no more
    "nodeSelector": {
      "cloud.google.com/gke-tpu-accelerator": tpu.label,
      "cloud.google.com/gke-tpu-topology": tpu.topology,
    },
    "containers": [
      {
        "name": "batch",
        "image": image,
        "command": ["python", "-m", "tpu.batch_inference"],
        "args": list(arguments),
        "env": [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}}],
        "ports": [{"containerPort": 8471}, {"containerPort": 8476}],  # the TPU runtime's, jax.distributed's
        "resources": {"limits": {"google.com/tpu": tpu.chips}, "requests": {"google.com/tpu": tpu.chips}},
      }
    ],
  }
  if spot:
    pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
    key = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}
    pod["tolerations"] = [key | {"effect": "NoSchedule"}]
  mistake = {
    "action": "FailJob",
    "onExitCodes": {"containerName": "batch", "operator": "In", "values": [USERS_MISTAKE]},
  }
  job = {
    "parallelism": tpu.hosts,
    "completions": tpu.hosts,
    "backoffLimit": 0,
    "podFailurePolicy": {"rules": [mistake]},
    "template": {"spec": pod},
  }
  give_up = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
      "name": name,
      "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    },
    "spec": {
      "failurePolicy": {"maxRestarts": max_restarts, "rules": [give_up]},
      "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
    },
  }


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m tpu.jobset", description=__doc__.splitlines()[0])
  parser.add_argument("--name", default="sam3lt", help="of the JobSet (default: sam3lt)")
  parser.add_argument("--image", required=True, help="what to run")
  parser.add_argument("--accelerator-type", required=True, metavar="TYPE", help="v5litepod-N or v6e-N")
  parser.add_argument(
    "--service-account", default="default", metavar="NAME", help="Kubernetes service account"
  )
  parser.add_argument("--spot", action="store_true", help="run on spot nodes")
  parser.add_argument("--max-restarts", type=int, default=20, metavar="N", help="(default: 20)")
  parser.add_argument("job", nargs="+", metavar="ARGUMENT", help="of the job, after --")
  args = parser.parse_args(argv)
  try:
    manifest = jobset(
      args.name, args.image, args.accelerator_type, args.job,
      service_account=args.service_account, spot=args.spot, max_restarts=args.max_restarts,
    )  # fmt: skip
  except ValueError as e:
    parser.error(str(e))
  print(json.dumps(manifest, indent=1))
  return 0


if __name__ == "__main__":
  sys.exit(main())
