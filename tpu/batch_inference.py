"""`sam3lt batch` for launch scripts: joins the other hosts first, where the platform tells of them.

    python -m tpu.batch_inference gs://my/photos --prompts "a dog" --out gs://my/found

Every host runs the same command; which part is whose comes from `jax.distributed`. Options are those of
`sam3lt batch`, and

    --distributed auto    (default) join where the environment tells of several hosts or processes: by
                          JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by what Slurm,
                          Open MPI and GKE set
    --distributed always  let JAX find the others out: on the hosts of a TPU slice, which no variable tells of
    --distributed never   run alone, or as --process-index of --process-count

Hosts join to learn their number and to let the accelerators' driver find its neighbours, then part again:
while they work they do not talk to each other, none waits for another at the end, and none is ended because
another one was lost. What a lost host had in work is done by the others, or by the next run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

import jax

from sam3lt_jax import cli, parallel

CHOICES = ("auto", "always", "never")


def announced(environment: Mapping[str, str]) -> bool:
  """Whether the environment tells of several processes in a way that JAX understands."""
  for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
    if environment.get(name, "1").isdecimal() and int(environment.get(name, "1")) > 1:
      return True
  return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def join(choice: str) -> tuple[int, int]:
  """(number of this process, how many there are), as --distributed says.

  Raises:
    ValueError: the others did not come.
  """
  if choice == "auto" and os.environ.get("JAX_COORDINATOR_ADDRESS"):
    parallel.start_distributed()
  elif choice == "always" or (choice == "auto" and announced(os.environ)):
    parallel.start_distributed(auto=True)
  if not jax.distributed.is_initialized():
    return 0, 1
  numbers = jax.process_index(), jax.process_count()  # starts the devices
  # The service that brought them together ends every process when one dies or when process 0 is done first,
  # for the sake of collectives, which a job has none of.
  jax.distributed.shutdown()
  return numbers


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  choice = "auto"
  for i, argument in enumerate(argv):
    if argument == "--distributed" or argument.startswith("--distributed="):
      _, equals, value = argument.partition("=")
      choice = value if equals else (argv[i + 1 : i + 2] or [""])[0]
      del argv[i : i + 1 if equals else i + 2]
      break
  try:
    if choice not in CHOICES:
      raise cli.UserError(f"--distributed must be one of {', '.join(CHOICES)}, got {choice!r}")
    if not {"-h", "--help"}.intersection(argv):
      index, count = join(choice)
      if count > 1:
        argv += ["--process-index", str(index), "--process-count", str(count)]
  except ValueError as e:
    print(cli.error_line(e), file=sys.stderr)
    return 2
  return cli.main(["batch", *argv])


if __name__ == "__main__":
  sys.exit(main())
