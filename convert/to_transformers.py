"""Writes a checkpoint as a transformers directory, for `Sam3LiteTextModel.from_pretrained(OUT)`.

  python -m convert.to_transformers ./my-finetuned ./for-transformers
  python -m convert.to_transformers efficient_sam3_..._ctx16.pt ./for-transformers

The configuration keeps this library's own fields (the profile) under the key "sam3lt_jax", which transformers
passes over: there, the transformers profile is what runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import convert
from convert.from_torch import convert_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
  parser = convert.parser("to_transformers", __doc__)
  convert.add_source(parser)
  parser.add_argument("out", metavar="OUT", help="directory to write")
  parser.add_argument("--dtype", choices=convert.DTYPES, default="float32", help="of the weights written")
  parser.add_argument("--overwrite", action="store_true", help="replace a directory that is not empty")
  args = parser.parse_args(argv)
  return convert_checkpoint(args, "transformers", None)


if __name__ == "__main__":
  sys.exit(convert.run(main))
