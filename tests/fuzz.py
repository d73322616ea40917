"""What the fuzz tests share: cases made from seeds, changed JSON and bytes, what a reader may do with them.

Each test's `KEPT` are seeds that once found something; the others go on from 0 until the time is up. To look
for more: `SAM3LT_FUZZ_SECONDS=600 python -m pytest tests/checkpoints/test_fuzz.py`.
"""

import copy
import json
import os
import time


def seconds(default):
  """A reader's time."""
  return float(os.environ.get("SAM3LT_FUZZ_SECONDS", default))


def cases(kept, seconds, reader):
  """Seeds: those kept, then 0, 1, ... for a while."""
  end = time.monotonic() + seconds
  yield from kept[reader]
  seed = 0
  while time.monotonic() < end:
    yield seed
    seed += 1


_DEEP = [[]]
for _ in range(300):
  _DEEP = [_DEEP]
_ODD = (
  None, True, False, 0, -1, 1, 2, 3, 7, 2**24, 2**31, 2**63, 10**30, 10**400, 0.0, 0.5, -0.0, 1e-320, 1e308,
  float("nan"), float("inf"), -float("inf"), "", "x", "4", "\x1b[31m\n", "\ud800", "../../out", [], [1],
  [1, 2], ["x"], [None], [[]], [float("nan")], list(range(2000)), {}, {"a": 1}, {"": {}}, _DEEP,
)  # fmt: skip


def mutate_json(rng, data):
  """`data` with one to three of its values replaced, removed, renamed or moved."""
  data = copy.deepcopy(data)
  for _ in range(rng.choice((1, 1, 1, 2, 3))):
    node, nodes = data, []
    while isinstance(node, (dict, list)) and node and (not nodes or rng.random() < 0.8):
      key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
      nodes.append((node, key))
      node = node[key]
    if not nodes:
      return rng.choice(_ODD)
    parent, key = nodes[-1] if rng.random() < 0.6 else rng.choice(nodes)
    kind = rng.random()
    if kind < 0.7:
      parent[key] = copy.deepcopy(rng.choice(_ODD))
    elif kind < 0.8:
      del parent[key]
    elif kind < 0.9:
      parent[key] = copy.deepcopy(rng.choice(nodes)[0])
    elif isinstance(parent, dict):
      parent[f"{key}{rng.choice(('x', '.', '_config'))}"] = parent.pop(key)
  return data


def mutate_bytes(rng, data):
  """`data` cut, or with bytes changed, inserted or taken out."""
  data = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4))):
    at, kind = rng.randrange(len(data) + 1), rng.random()
    if kind < 0.15:
      del data[at:]
    elif kind < 0.6 and data:
      data[min(at, len(data) - 1)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind < 0.8:
      data[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
    else:
      del data[at : at + rng.choice((1, 8, 64))]
  return bytes(data)


def json_file(rng, path, data):
  text = json.dumps(mutate_json(rng, data)).encode()
  path.write_bytes(mutate_bytes(rng, text) if rng.random() < 0.2 else text)


def check(seed, read, *documented):
  """Runs `read`, which may return, or raise what is documented, in a message of printable text."""
  try:
    read()
  except documented as e:
    assert str(e), f"seed {seed}: {type(e).__name__} says nothing"
  except Exception as e:
    raise AssertionError(f"seed {seed}: {type(e).__name__}: {e}") from e
