"""The state of a clip: which object stands where changes nothing, nor does what stands beside it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sam3lt_jax.features import Clicks
from sam3lt_jax.video import bank as banks
from sam3lt_jax.video.tracks import Tracks
from tests.video.common import engine, recorded

POINTS = {1: (0.85, 0.88), 2: (0.5, 0.2), 3: (0.2, 0.5)}
# Sums in another order: what the maps' rounding to bfloat16 makes of it over a few frames, of logits to 30.
ROUNDING = 2e-3


@pytest.fixture(scope="module", autouse=True)
def precision():
  with jax.default_matmul_precision("highest"):
    yield


def click(x: float, y: float) -> Clicks:
  one = np.ones((1, 1), bool)
  return Clicks(
    np.array([[[x, y]]], np.float32), np.ones((1, 1), np.int32), one, np.zeros((1, 32, 32), np.float32),
    np.zeros(1, bool),
  )  # fmt: skip


def start(tracks: Tracks, ids, frame: int = 0) -> None:
  tracks.add(ids, frame)
  features, clock = recorded((frame,)), tracks.clock(frame)
  tracked = tracks.ask(features, clock, {i: click(*POINTS[i]) for i in ids})
  tracks.keep(features, clock, tracked, ids)


def run(tracks: Tracks, frames) -> dict[int, list]:
  """Object -> (mask, pointer, score, IoU) of each frame."""
  found: dict[int, list] = {i: [] for i in tracks.slots}
  for t in frames:
    tracked = jax.device_get(tracks.advance(recorded((t,)), tracks.clock(t)))
    for i, slot in tracks.slots.items():
      found[i].append([x[slot] for x in vars(tracked).values()])
  return found


def same(a, b, tolerance: float) -> None:
  assert len(a) == len(b)
  for one, other in zip(a, b):
    for x, y in zip(one, other):
      np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def alone():
  """Each object by itself, over 9 frames."""
  found = {}
  for i in POINTS:
    tracks = Tracks(engine())
    start(tracks, [i])
    found |= run(tracks, range(1, 10))
  return found


@pytest.mark.full  # 4 s
def test_together_as_alone_in_any_slots_with_anything_beside(alone):
  tracks = Tracks(engine(), slots=4)
  tracks.add([9], 0)  # takes the first slot, and leaves it
  start(tracks, [3, 1])
  tracks.remove([9])
  dead = tracks.mask() ^ True
  spoiled = lambda x: jnp.where(dead.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x).astype(x.dtype)  # noqa: E731
  floats = {k: spoiled(v) for k, v in vars(tracks.bank).items() if jnp.issubdtype(v.dtype, jnp.floating)}
  tracks.bank = tracks.bank.replace(**floats)
  assert jnp.isnan(tracks.bank.maps).any()
  found = run(tracks, range(1, 10))
  for i in (1, 3):
    same(found[i], alone[i], ROUNDING)
    assert np.isfinite(found[i][-1][0]).all()


def test_growth_in_mid_clip_changes_nothing(alone):
  tracks = Tracks(engine())
  start(tracks, [1])
  found = run(tracks, range(1, 4))[1]
  tracks.add([8, 9], 3)
  tracks.remove([8, 9])
  assert tracks.size == 4
  start(tracks, [2], frame=3)
  both = run(tracks, range(4, 10))
  same(found + both[1], alone[1], ROUNDING)


def test_a_slot_that_was_used_before_is_like_new(alone):
  tracks = Tracks(engine())
  start(tracks, [2])
  run(tracks, range(1, 6))
  slot = tracks.slots[2]
  tracks.remove([2])
  start(tracks, [1])
  assert tracks.slots == {1: slot} and tracks.size == 1
  same(run(tracks, range(1, 10))[1], alone[1], 0)


@pytest.mark.full  # compiles for two; test_phrases goes on from a file and from a fork
def test_saved_and_loaded_and_forked_it_goes_on_bit_for_bit(tmp_path, alone):
  tracks = Tracks(engine())
  start(tracks, [1])
  before = run(tracks, range(1, 5))[1]
  np.savez(tmp_path / "state.npz", **tracks.state())
  fork = tracks.fork()
  after = run(tracks, range(5, 10))[1]
  same(before + after, alone[1], 0)
  with np.load(tmp_path / "state.npz", allow_pickle=False) as data:
    loaded = Tracks.of_state(engine(), dict(data))
  same(run(loaded, range(5, 10))[1], after, 0)
  start(fork, [2], frame=4)  # which the first does not see
  assert list(tracks.slots) == [1] and list(fork.slots) == [1, 2]
  same(run(fork, range(5, 10))[1], after, ROUNDING)


@pytest.mark.full  # 520 frames; test_phrases measures the state over 72
def test_memory_does_not_grow_with_the_clip():
  tracks = Tracks(engine())
  start(tracks, [1])
  frame = recorded((3,))

  def live():
    return sum(x.nbytes for x in jax.live_arrays())

  def go(frames):
    for t in frames:
      tracks.advance(frame, tracks.clock(t))

  go(range(1, 20))
  before, compiled = live(), len(engine().programs()["advance"])
  go(range(20, 520))
  assert live() == before and len(engine().programs()["advance"]) == compiled


def test_what_a_step_gave_up_is_gone():
  tracks = Tracks(engine())
  start(tracks, [1])
  before = tracks.bank.maps
  tracks.advance(recorded((1,)), tracks.clock(1))
  assert before.is_deleted()


def test_mistakes_are_told(tmp_path):
  tracks = Tracks(engine())
  tracks.add([1], 0)
  with pytest.raises(ValueError, match="ids must be of new objects, got 1, which is there already"):
    tracks.add([1], 0)
  with pytest.raises(ValueError, match=r"ids must be of \[1\], got 5"):
    tracks.remove([5])
  state = tracks.state()
  with pytest.raises(ValueError, match=r"state must be what Tracks\.state gave"):
    Tracks.of_state(engine(), {"maps": state["maps"]})
  with pytest.raises(ValueError, match="state must be of this tracker and its profile: maps is"):
    Tracks.of_state(engine(memory_quality=None), state)


# ---------------------------------------------------------------- the bank alone


def filled(config, frames, direction=1, quality=None):
  """A bank whose maps and pointers are the numbers of their frames, of which the first has a prompt."""

  @jax.jit
  def write(bank, t, quality, cond):
    clock = banks.Clock(t, np.int32(direction), np.int32(16))
    maps = jnp.full((1, 1, config.memory.hidden_size), t, jnp.float32)
    pointers = jnp.full((1, config.hidden_size), t, jnp.float32)
    return banks.write(bank, config, clock, bank.live, maps, pointers, quality[None], cond[None])

  bank = banks.born(banks.empty(config, 1, 1), jnp.ones(1, bool), 0)
  for n, t in enumerate(frames):
    bank = write(bank, np.int32(t), np.float32(1 if quality is None else quality[n]), np.bool_(n == 0))
  return bank


def read(bank, config, frame, direction=1):
  clock = banks.Clock(np.int32(frame), np.int32(direction), np.int32(16))
  memory = jax.jit(lambda bank: banks.choose(bank, config, clock))(bank)
  n = int(memory.count[0])
  maps = dict(zip(memory.maps[0, :n, 0, 0].astype(int).tolist(), memory.rows[0, :n].tolist()))
  there = np.asarray(memory.there[0])
  distances = np.asarray(memory.distances[0])[there] * 15
  return maps, dict(zip(np.asarray(memory.pointers[0, :, 0])[there].astype(int).tolist(), distances.round(4)))


@pytest.mark.parametrize("direction", [1, -1])
def test_the_bank_reads_the_prompt_and_the_frames_before(direction):
  config = engine(memory_quality=None).tracker.config
  frames = [100 + direction * t for t in range(40)]
  maps, pointers = read(filled(config, frames, direction), config, 100 + direction * 40, direction)
  assert maps == {100: 6} | {100 + direction * (40 - r): r - 1 for r in range(1, 7)}
  assert pointers == {100: 40} | {100 + direction * (40 - r): r for r in range(1, 16)}


def test_good_frames_are_read_long_after():
  config = engine().tracker.config
  quality = [1.0] * 12 + [0.0] * 200
  maps, pointers = read(filled(config, range(212), quality=quality), config, 212)
  # Frame 0 has the prompt; the frame before comes first whatever it is, then the last good ones.
  assert maps == {0: 6, 211: 0, 11: 1, 10: 2, 9: 3, 8: 4, 7: 5}
  assert pointers == {0: 212, 211: 1} | {11 - k: 2 + k for k in range(10)}  # without the oldest, frame 1
