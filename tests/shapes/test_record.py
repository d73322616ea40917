"""The page about a training run."""

import json

import pytest

from examples.shapes import record


def test_hours_count_steps_at_the_speed_logged(tmp_path):
  rows = [
    {"step": 100, "images_per_second": 10.0},  # 600 rows: a minute
    {"step": 100, "eval_cgF1": 1.0},
    {"step": 200, "images_per_second": 5.0},  # two minutes
    {"step": 150, "images_per_second": 5.0},  # of an attempt that was stopped: step 200 came again
  ]
  rows = sorted(rows[:3], key=lambda row: row["step"]) + rows[3:]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert record.hours(tmp_path / "metrics.jsonl", 6) == pytest.approx((60 + 60 + 60) / 3600)
