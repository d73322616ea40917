"""What the verbs about photos share: a name for what is written of each, and the loop over them."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Collection, Iterable

from sam3lt_jax.cli import error_line, is_users_mistake
from sam3lt_jax.cli.arguments import note
from sam3lt_jax.cli.progress import busy
from sam3lt_jax.errors import shown


def output_names(photos: Iterable[str]) -> dict[str, str]:
  """Photo -> a name for what is written of it: a/x.jpg, b/x.jpg -> x, x_2; case does not tell two apart."""
  names: dict[str, str] = {}
  taken = set()
  for photo in dict.fromkeys(photos):
    stem = name = os.path.splitext(os.path.basename(photo))[0]
    for count in itertools.count(2):
      if name.lower() not in taken:
        break
      name = f"{stem}_{count}"
    taken.add(name.lower())
    names[photo] = name
  return names


def each_photo(photos: Collection[str], do: Callable[[str], str], failed: int = 0) -> int:
  """Prints what `do` returns of each photo, or why it failed; returns the exit code.

  failed: how many more photos there were, which failed before.
  """
  total = len(photos) + failed
  with busy("", total=len(photos)) as progress:
    for i, photo in enumerate(photos):
      progress.describe(f"{shown(photo)}{'' if i else ' (the first photo compiles the model, too)'}")
      try:
        said = do(photo)
      except Exception as e:
        if not is_users_mistake(e):
          raise
        progress.say(error_line(e), file=sys.stderr)
        failed += 1
        continue
      progress.advance()
      if said:
        progress.say(said)
  if failed and total > 1:
    note(f"{failed} of {total} photos failed")
  return 2 if failed else 0
