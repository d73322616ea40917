"""The estimate of throughput and cost: its arithmetic, its honesty, and the README's copy of it."""

from __future__ import annotations

import re

import pytest

from tests.tpu.conftest import ROOT
from tpu import estimate

USUAL = {"images": 1_000_000, "phrases": 1, "chip": "v5e", "chips": 1}


def test_flops_of_the_released_size():
  found = estimate.estimate("s0", **USUAL)
  # About 5.9 TFLOP for an image and a phrase without box slots, as benchmarks and the reference count them.
  bare = estimate.estimate("s0", **USUAL, box_slots=0)
  assert 5.5e12 < bare.image_flops + bare.phrase_flops < 6.1e12
  assert bare.phrase_flops < found.phrase_flops < 1.2 * bare.phrase_flops
  assert found.image_flops == bare.image_flops


def test_throughput_and_cost_follow_from_them():
  found = estimate.estimate("s0", **USUAL, utilisation=0.5, price=2.0)
  flops = found.image_flops + found.phrase_flops
  assert found.images_per_second == pytest.approx(0.5 * 197e12 / flops)
  assert found.hours == pytest.approx(1e6 * flops / (0.5 * 197e12) / 3600)
  assert found.cost == pytest.approx(2.0 * found.hours)
  more = estimate.estimate("s0", **USUAL | {"chips": 8, "chip": "v6e"}, utilisation=0.5, price=2.0)
  assert more.images_per_second == pytest.approx(8 * 918 / 197 * found.images_per_second)
  assert more.cost == pytest.approx(found.cost * 197 / 918)
  many = estimate.estimate("s0", **USUAL | {"phrases": 21})
  assert many.images_per_second == pytest.approx(0.35 * 197e12 / (flops + 20 * found.phrase_flops))
  small = estimate.estimate("s0", **USUAL, image_size=336)  # a ninth of the tokens, in whole windows
  assert found.image_flops / 12 < small.image_flops < found.image_flops / 9
  assert estimate.estimate("l", **USUAL).image_flops == found.image_flops


def test_every_chip_says_where_its_peak_is_from():
  for name, chip in estimate.CHIPS.items():
    assert 50 < chip.tflops < 5000 and 8 <= chip.memory <= 200
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
    ({"image_size": 1000}, "image_size must be a multiple of 14"),
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
