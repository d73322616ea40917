"""The estimate of throughput and cost: its arithmetic, its honesty, and the README's copy of it."""

from __future__ import annotations

import json
import re

import pytest

from tests.tpu.conftest import ROOT
from tpu import chips, estimate

USUAL = {"images": 1_000_000, "phrases": 1, "chip": "v5e", "chips": 1}


def test_figures_are_those_of_the_compiled_programs():
  found = estimate.estimate("s0", **USUAL)
  one = {"chips": 1, "size": "s0", "topology": "v5e:2x2"}
  rows = {r["program"]: r for r in json.loads(chips.COMPILED.read_text()) if one.items() <= r.items()}
  for program, count, flops, moved in (
    ("vision, 8 images", 8, found.image_flops, found.image_bytes),
    ("detection, 16 prompts", 16, found.phrase_flops, found.phrase_bytes),
  ):
    assert flops * count == rows[program]["flops"] and moved * count == rows[program]["accessed"]
  # An image takes some 5.6 TFLOP and a share of the detector, a phrase 0.3, as benchmarks count them.
  assert 5.6e12 < found.image_flops < 6.2e12 and 0.2e12 < found.phrase_flops < 0.5e12


def test_throughput_and_cost_follow_from_them():
  found = estimate.estimate("s0", **USUAL, utilisation=0.1, price=2.0)
  flops = found.image_flops + found.phrase_flops
  assert found.images_per_second == pytest.approx(0.1 * 197e12 / flops)
  assert found.hours == pytest.approx(1e6 * flops / (0.1 * 197e12) / 3600)
  assert found.cost == pytest.approx(2.0 * found.hours)
  more = estimate.estimate("s0", **USUAL | {"chips": 8, "chip": "v6e"}, utilisation=0.1, price=2.0)
  assert more.images_per_second == pytest.approx(8 * 918 / 197 * found.images_per_second)
  assert more.cost == pytest.approx(found.cost * 197 / 918)
  many = estimate.estimate("s0", **USUAL | {"phrases": 21}, utilisation=0.1)
  assert many.images_per_second == pytest.approx(0.1 * 197e12 / (flops + 20 * found.phrase_flops))
  assert estimate.estimate("l", **USUAL).image_flops == found.image_flops


def test_a_chip_moves_the_bytes_no_faster_than_it_can():
  found = estimate.estimate("s0", **USUAL, utilisation=1.0)
  slow = estimate.estimate("s0", **USUAL | {"chip": "l4"}, utilisation=1.0)
  moved = slow.image_bytes + slow.phrase_bytes
  computed = 121e12 / (slow.image_flops + slow.phrase_flops)
  assert slow.images_per_second == pytest.approx(min(300e9 / moved, computed))
  assert slow.images_per_second < found.images_per_second <= 819e9 / moved


def test_every_chip_says_where_its_peak_is_from():
  for name, chip in chips.CHIPS.items():
    assert 50 < chip.tflops < 5000 and 8 <= chip.memory <= 200 and 200 < chip.bandwidth < 10000
    assert name in chip.source.lower().replace(" ", "")


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model": "xl"}, "model must be one of s0, s1, l, sam3, got 'xl'"),
    ({"chip": "v9"}, "chip must be one of v5e, v6e"),
    ({"images": 0}, "images must be at least 1, got 0"),
    ({"phrases": -1}, "phrases must be at least 1"),
    ({"chips": 0}, "chips must be at least 1"),
    ({"utilisation": 1.5}, "utilisation must be over 0 and at most 1, got 1.5"),
    ({"utilisation": 0.0}, "utilisation must be over 0"),
    ({"price": -1.0}, "price must not be negative"),
    ({"price": float("nan")}, "price must not be negative, got nan"),
  ],
)
def test_a_mistake_is_named(change, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    estimate.estimate(**USUAL | change)


def test_the_readme_shows_what_the_command_prints(capsys):
  text = (ROOT / "tpu" / "README.md").read_text()
  (block,) = re.findall(
    r"<!-- estimate-begin -->\n```\n\$ python -m tpu\.estimate (.*?)\n(.*?)```", text, re.S
  )
  assert estimate.main(block[0].split()) == 0
  assert capsys.readouterr().out == block[1]
  assert "ESTIMATE, not a measurement" in block[1] and "an assumption" in block[1]


def test_without_a_price_there_is_no_cost(capsys):
  assert estimate.main("--images 10 --phrases 2 --chip l4 --chips 1".split()) == 0
  assert "give --price" in capsys.readouterr().out
  with pytest.raises(SystemExit) as end:
    estimate.main("--images 0 --phrases 2 --chip l4 --chips 1".split())
  assert end.value.code == 2 and "images must be at least 1" in capsys.readouterr().err
