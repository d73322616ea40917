"""Tar shards in WebDataset naming: which members are images, and where their bytes lie.

A sample is the members that share a path up to the first dot of the file name: `train/0001.jpg` and
`train/0001.json` are the sample `train/0001`. Its image is the first member whose whole suffix is an image's:
`0001.seg.png` is something else.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Collection, Iterator

from sam3lt_jax.jobs import files

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(pattern: str) -> list[str]:
  """`a-{000..002}.tar` -> a-000.tar, a-001.tar, a-002.tar; `{x,y}` -> x, y. As bash and webdataset do.

  Raises:
    ValueError: a brace without its pair, or what is inside is neither a range nor a list.
  """
  match = _BRACES.search(pattern)
  if match is None:
    if "{" in pattern or "}" in pattern:
      raise ValueError(f"{pattern}: a brace without its pair; accepted: shard-{{000000..000009}}.tar")
    return [pattern]
  before, inside, after = pattern[: match.start()], match[1], pattern[match.end() :]
  if numbers := _RANGE.fullmatch(inside):
    low, high = map(int, numbers.groups())
    if low > high:
      raise ValueError(f"{pattern}: the range {{{inside}}} runs backwards")
    width = len(numbers[1]) if numbers[1].startswith("0") else 0
    values = [f"{value:0{width}d}" for value in range(low, high + 1)]
  elif "," in inside:
    values = inside.split(",")
  else:
    raise ValueError(f"{pattern}: {{{inside}}} is neither a range {{000..009}} nor a list {{a,b}}")
  return [path for value in values for path in expand_braces(f"{before}{value}{after}")]


def key_of(member: str) -> str:
  """The sample's key: the member's path up to the first dot of its file name."""
  folder, slash, name = member.rpartition("/")
  return f"{folder}{slash}{name.partition('.')[0]}"


def split_member(uri: str) -> tuple[str, str]:
  """ "<tar>!<member>" -> (tar, member)."""
  end = uri.index(".tar!") + len(".tar")
  return uri[:end], uri[end + 1 :]


def image_members(path: str, suffixes: Collection[str]) -> Iterator[tuple[str, int, int]]:
  """(member, offset of its bytes, their number) of each sample's image, in the order of the tar.

  Only headers are read; of a URL, whole blocks, so that listing costs about as much as reading it.

  Raises:
    ValueError: not a tar, damaged, cut short, or a sample's members do not lie together.
    OSError: it cannot be opened.
  """
  finished: set[str] = set()
  last = None
  try:
    with files.open_read(path) as f, tarfile.open(fileobj=f, mode="r:") as tar:
      while (member := tar.next()) is not None:
        tar.members.clear()  # it would keep every header
        name = member.name.removeprefix("./")
        key, base = key_of(name), name.rpartition("/")[2]
        if not member.isreg() or base.startswith(".") or base[base.find(".") :].lower() not in suffixes:
          continue
        if key != last and key in finished:
          raise ValueError(f"{path}: the id {key!r} occurs twice: its members do not lie together")
        if key != last:
          yield name, member.offset_data, member.size
        last = key
        finished.add(key)
  except FileNotFoundError:
    raise ValueError(f"no such tar shard: {path}") from None
  except tarfile.TarError as e:
    raise ValueError(f"{path} is not a whole tar file: {e}") from None
