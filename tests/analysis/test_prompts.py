"""The prompt report: lengths, context and vocabulary counted by hand; dimensions of known data."""

import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from sam3lt_jax.analysis import prompts as R
from sam3lt_jax.analysis.dimension import intrinsic_dimension, two_nn
from sam3lt_jax.analysis.plots import save_plots
from sam3lt_jax.data.prompts import PromptSet
from sam3lt_jax.processing.tokenizer import ClipTokenizer
from tests import tiny

# Each word is one token: 3, 4, 4, 5 and 12 tokens with start and end.
PHRASES = ["dog", "red dog", "red cat", "small red car", "red red red red red red red red red house"]


@pytest.fixture(scope="module")
def tokenizer():
  return ClipTokenizer()


def spread(points, width=32, seed=0):
  """points [N, d] in `width` dimensions: rotated, moved, scaled; distances keep their proportions."""
  rng = np.random.default_rng(seed)
  axes = np.linalg.qr(rng.normal(size=(width, points.shape[1])))[0]
  return 7 * points @ axes.T + rng.normal(size=width)


def test_lengths_by_hand(tokenizer):
  stats = R.prompt_report(PHRASES, tokenizer)["lengths"]
  assert stats["histogram"] == [0, 0, 0, 1, 2, 1, 0, 0, 0, 0, 0, 0, 1]
  assert (stats["minimum"], stats["maximum"], stats["share_at_most_10"]) == (3, 12, 0.8)
  assert stats["mean"] == pytest.approx(28 / 5)
  assert stats["std"] == pytest.approx((210 / 5 - 5.6**2) ** 0.5)
  # of 5 phrases, 0.05 is reached by the first, 0.25 and 0.5 by the second and third, 0.75 by the fourth
  assert stats["quantiles"] == {"0.05": 3, "0.25": 4, "0.5": 4, "0.75": 5, "0.9": 12, "0.95": 12, "0.99": 12}


def test_context_by_hand(tokenizer):
  report = R.prompt_report(PHRASES, tokenizer, 4)
  assert [c["context"] for c in report["contexts"]] == [4, 16, 32]
  four, sixteen, _ = report["contexts"]
  assert four["filled"] == pytest.approx((3 + 4 + 4 + 4 + 4) / 20)
  assert (four["truncated"], four["truncated_share"]) == (2, 0.4)
  assert four["tokens_lost"] == pytest.approx((1 + 8) / 28)
  assert sixteen["filled"] == pytest.approx(28 / 5 / 16)
  assert (sixteen["truncated"], sixteen["tokens_lost"]) == (0, 0)


def test_vocabulary_by_hand(tokenizer):
  use = R.prompt_report(PHRASES, tokenizer)["vocabulary"]
  # red 12; dog 2; cat, small, car, house 1
  assert (use["size"], use["used"], use["once"], use["tokens"], use["distinct_words"]) == (49408, 6, 4, 18, 6)
  assert use["frequent_words"][:2] == [["red", 12], ["dog", 2]]
  assert use["ids_for"] == {"0.5": 1, "0.9": 5, "0.95": 6, "0.99": 6}  # 12, 14, 15, 16, 17, 18 of 18
  assert use["curve"] == [[n, round(c / 18, 6)] for n, c in enumerate((12, 14, 15, 16, 17, 18), 1)]
  exact = R.vocabulary_use(np.array([0, 5, 3, 2]), ["a"], tokenizer)["ids_for"]
  assert exact == {"0.5": 1, "0.9": 3, "0.95": 3, "0.99": 3}  # 5, 8, 10 of 10


def test_curve_of_a_wide_vocabulary_is_short():
  counts = np.arange(1, 20001)
  use = R.vocabulary_use(counts, ["a"], ClipTokenizer())
  marks, shares = zip(*use["curve"])
  assert len(marks) <= 200 and marks[0] == 1 and marks[-1] == 20000
  assert list(shares) == sorted(shares) and shares[-1] == 1


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_dimension_of_a_gaussian(d):
  points = spread(np.random.default_rng(d).normal(size=(2000, d)))
  found = intrinsic_dimension(points)
  assert (found["points"], found["width"]) == (2000, 32)
  assert found["two_nn"] == pytest.approx(d, rel=0.1)
  assert found["participation_ratio"] == pytest.approx(d, rel=0.02)
  assert found["pca_95"] == found["pca_99"] == d and len(found["variance"]) == d


def test_dimension_of_a_circle_is_one_though_it_needs_two_axes():
  angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 2000)
  found = intrinsic_dimension(spread(np.stack([np.cos(angle), np.sin(angle)], 1)).astype(np.float32))
  assert found["two_nn"] == pytest.approx(1, abs=0.1)
  assert found["participation_ratio"] == pytest.approx(2, abs=0.01) and found["pca_95"] == 2


def test_two_nn_by_hand():
  # Ratios of 0, 1, 3: 3/1, 2/1, 3/2. Without the largest: a line by (ln 1.5, -ln 2/3) and (ln 2, -ln 1/3).
  x, y = np.log([1.5, 2]), -np.log([2 / 3, 1 / 3])
  points = np.array([[0.0], [1], [3]])
  for discard in (1 / 3, 0.0):  # 0: the largest has F = 1, whose logarithm is none
    assert two_nn(points, discard) == pytest.approx((x @ y) / (x @ x))
  assert two_nn(np.repeat(points, 4, axis=0), 1 / 3) == two_nn(points, 1 / 3)  # equal rows count once
  assert two_nn(points * 1e-3 + 1e3, 1 / 3) == pytest.approx(two_nn(points, 1 / 3), rel=1e-6)


def test_two_nn_beyond_a_block_equals_brute_force():
  points = np.random.default_rng(1).normal(size=(1500, 3))
  distances = np.linalg.norm(points[:, None] - points[None], axis=2)
  distances.sort(axis=1)
  ratios = np.sort(distances[:, 2] / distances[:, 1])
  for kept, found in ((1350, two_nn(points)), (900, two_nn(points, discard=0.4))):
    x, y = np.log(ratios[:kept]), -np.log(1 - np.arange(1, kept + 1) / 1500)
    assert found == pytest.approx((x @ y) / (x @ x), rel=1e-9)


def test_participation_ratio_by_hand():
  # Variances 4 : 1 on two axes: (4 + 1)^2 / (16 + 1); the first axis holds 80%.
  found = intrinsic_dimension(np.array([[2.0, 0], [-2, 0], [0, 1], [0, -1]]))
  assert found["participation_ratio"] == pytest.approx(25 / 17)
  assert found["variance"] == [0.8, 1.0] and (found["pca_90"], found["pca_95"]) == (2, 2)


@pytest.mark.parametrize(
  "features, says",
  [
    (np.zeros(3), r"must be floating point \[N, D\]"),
    (np.zeros((3, 2), int), "must be floating point"),
    (np.zeros((9, 2)), "at least 3 different rows, got 1"),
    (np.array([[0.0], [1], [np.nan]]), "must be finite"),
  ],
)
def test_features_that_have_no_dimension(features, says):
  with pytest.raises(ValueError, match=says):
    intrinsic_dimension(features)
  with pytest.raises(ValueError, match=says):
    two_nn(features)


def many(count=90):
  colours, things = "red green blue white black".split(), "dog cat car bus cup hat".split()
  return [f"{s} {c} {t}" for s in ("small", "large", "old") for c in colours for t in things][:count]


@pytest.fixture(scope="module")
def random_tiny():
  from sam3lt_jax import from_pretrained

  return from_pretrained("random:tiny", progress=False)


def test_features_are_means_over_tokens(tokenizer, random_tiny):
  model, variables = random_tiny
  phrases = many(70)  # more than a block
  with tiny.hurry():
    features = R.phrase_features(phrases, tokenizer, model, variables, 16)
    ids, mask = tokenizer([phrases[0], phrases[69]], context_length=16)
    apply = jax.jit(lambda v, i, m: model.apply(v, i, m, method="get_text_features").pooler_output)
    tokens = np.asarray(apply(variables, ids, mask))
  assert features.shape == (70, model.config.detr_encoder.hidden_size) and features.dtype == np.float32
  for row, all_tokens, m in zip(features[[0, 69]], tokens, mask):
    np.testing.assert_allclose(row, all_tokens[m > 0].mean(axis=0), rtol=1e-4, atol=1e-5)


def test_report_with_a_model(tokenizer, random_tiny, tmp_path):
  model, variables = random_tiny
  with tiny.hurry():
    report = R.prompt_report(
      many(), tokenizer, model=model, variables=variables, model_name="random:tiny", max_points=60
    )
    again = R.prompt_report(
      many(), tokenizer, model=model, variables=variables, model_name="random:tiny", max_points=60
    )
  assert report == again
  features = report["dimensions"]["phrase features"]
  assert (features["points"], features["width"]) == (60, 32)
  assert 0 < features["two_nn"] < 32 and 1 < features["participation_ratio"] < 32
  assert "token embeddings" not in report["dimensions"]  # 14 ids are too few to tell
  assert "phrase features" in R.table(report) and "random:tiny" in R.table(report)
  save_plots(report, tmp_path / "report.png")
  with Image.open(tmp_path / "report.png") as image:
    assert image.format == "PNG" and image.width > 1500  # the third column


def test_model_of_another_vocabulary(tokenizer):
  model, variables = tiny.load(tiny.config())
  with pytest.raises(ValueError, match=r"gives id \d+, but the model's token table has 300 rows"):
    R.phrase_features(["red dog"], tokenizer, model, variables, 8)


def test_json_and_table(tokenizer):
  prompts = PromptSet(
    PHRASES, {"empty": 2}, 3, [{"path": "set.txt", "format": "text", "records": 10, "phrases": 5}]
  )
  report = R.prompt_report(prompts, tokenizer)
  read = json.loads(json.dumps(report))
  assert read["lengths"]["mean"] == pytest.approx(5.6) and read["skipped"] == {"empty": 2}
  assert read["sources"] == [{"path": "set.txt", "format": "text", "records": 10, "phrases": 5}]
  assert read["contexts"][0]["context"] == 16 and read["model"] is None and read["dimensions"] == {}
  table = R.table(report)
  for part in (
    "5 distinct phrases (left out as duplicates: 3), profile original", "skipped: 2 empty", "mean 5.60",
    "at most 10: 80.0%", "     16    35.0%     65.0%   0 (0.00%)", "6 of 49,408 ids used (0.01%)",
    "red 12, dog 2",
  ):  # fmt: skip
    assert part in table
  assert "dimensions" not in table


def test_json_of_an_infinite_dimension(tokenizer):
  assert two_nn(np.eye(3)) == np.inf  # all neighbours equally far
  report = R.prompt_report(PHRASES, tokenizer) | {"model": "a model"}
  report["dimensions"]["phrase features"] = intrinsic_dimension(np.eye(3))
  assert report["dimensions"]["phrase features"]["two_nn"] is None  # JSON has no infinity
  assert "inf" in R.table(report)


def test_empty_phrase_and_no_phrase(tokenizer):
  report = R.prompt_report([""], tokenizer)  # start and end alone
  assert (
    report["lengths"]["mean"] == 2
    and report["vocabulary"]["used"] == 0
    and report["vocabulary"]["curve"] == []
  )
  assert "0 of 49,408 ids used" in R.table(report)
  with pytest.raises(ValueError, match="at least one phrase"):
    R.prompt_report([], tokenizer)
  with pytest.raises(ValueError, match="context_length must be at least 2, got 1"):
    R.prompt_report(["dog"], tokenizer, 1)


@pytest.mark.filterwarnings("error")
def test_plots_of_odd_words(tokenizer, tmp_path):
  """Words that matplotlib would read as mathematics, that its font lacks, or that are long."""
  phrases = ["$x$ $ \\frac", "犬 と 猫", "w" * 90, "us$ bill"]
  save_plots(R.prompt_report(phrases, tokenizer), tmp_path / "report.png")
  with Image.open(tmp_path / "report.png") as image:
    assert image.size == (1144, 924)
    pixels = np.asarray(image.convert("L"))
  assert 0.02 < (pixels < 250).mean() < 0.5  # something is drawn


def test_without_matplotlib(monkeypatch, tokenizer, tmp_path):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(ImportError, match=r"pip install 'sam3lt_jax\[train\]'"):
    save_plots(R.prompt_report(PHRASES, tokenizer), tmp_path / "report.png")
