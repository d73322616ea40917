"""`python -m sam3lt_jax.cli`, the same as `sam3lt`."""

import sys

from sam3lt_jax.cli import main

if __name__ == "__main__":
  sys.exit(main())
