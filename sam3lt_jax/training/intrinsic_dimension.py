"""How many dimensions a set of vectors really fills: two neighbours' distances, and principal components.

Axes: N points, D width. Numpy only, float64 inside.
"""

from __future__ import annotations

import dataclasses

import numpy as np

_BLOCK = 1024  # rows of distances held at once: 1024 x N float64
_CANDIDATES = 8  # by rounded distances; the two nearest are then found among them exactly


@dataclasses.dataclass(frozen=True)
class IntrinsicDimension:
  """Measures of one set of vectors.

  Attributes:
    points: distinct vectors measured.
    width: D, the dimensions they are written in.
    two_nn: Facco et al.'s estimate: of the curved surface the points lie on, at the scale of neighbours.
    participation_ratio: (sum of variances)^2 / sum of squared variances over the principal axes: of the
      flat space they lie in, from 1 to min(N - 1, D).
    pca_90, pca_95, pca_99: principal axes that hold 90, 95, 99% of the variance.
    variance: share of the variance that the first 1, 2, ... axes hold, ascending, up to 99.9%.
  """

  points: int
  width: int
  two_nn: float
  participation_ratio: float
  pca_90: int
  pca_95: int
  pca_99: int
  variance: list[float]


def intrinsic_dimension(features: np.ndarray) -> IntrinsicDimension:
  """All measures of `features` [N, D]; equal rows count once.

  Raises:
    ValueError: not a matrix of finite numbers, or fewer than 3 different rows.
  """
  features = _distinct(features)
  shares = _variances(features)
  cumulative = np.cumsum(shares)

  def axes(share: float) -> int:
    return int(np.searchsorted(cumulative, share - 1e-12) + 1)

  return IntrinsicDimension(
    points=features.shape[0],
    width=features.shape[1],
    two_nn=_slope(features, 0.1),
    participation_ratio=float(1 / np.square(shares).sum()),
    pca_90=axes(0.90),
    pca_95=axes(0.95),
    pca_99=axes(0.99),
    variance=[round(float(v), 6) for v in cumulative[: axes(0.999)]],
  )


def two_nn(features: np.ndarray, discard: float = 0.1) -> float:
  """The TwoNN estimate of the intrinsic dimension of `features` [N, D]; equal rows count once.

  The ratio m of the distances to a point's second and first neighbour has the distribution 1 - m^-d where the
  density is level around it, so d is the slope of -log(1 - F) over log m, a line through the origin.
  Within some 5% up to about 10 dimensions at N = 2000; it falls short of higher ones, for which no data
  set is large enough.

  Args:
    discard: share of the largest ratios left out, in [0, 1), where noise and edges show (the paper's 10%).

  Raises:
    ValueError: `discard` out of range; see also `intrinsic_dimension`.

  Source: Facco, d'Errico, Rodriguez, Laio, "Estimating the intrinsic dimension of datasets by a minimal
  neighborhood information", Scientific Reports 7 (2017).
  """
  if not 0 <= discard < 1:
    raise ValueError(f"discard must be a share in [0, 1), got {discard}")
  return _slope(_distinct(features), discard)


def _slope(features: np.ndarray, discard: float) -> float:
  first, second = _two_nearest(features)
  ratios = np.sort(second / first)
  n = len(ratios)
  kept = max(1, min(int(n * (1 - discard) + 1e-9), n - 1))  # of the largest, 1 - F is 0
  x = np.log(ratios[:kept])
  y = -np.log1p(-np.arange(1, kept + 1) / n)
  if not (x @ x) > 0:
    return float("inf")  # every point's two neighbours are equally far: no finite dimension does that
  return float(x @ y / (x @ x))


def _distinct(features: np.ndarray) -> np.ndarray:
  features = np.asarray(features)
  if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
    raise ValueError(f"features must be floating point [N, D], got {features.dtype} {features.shape}")
  features = features.astype(np.float64)
  if not np.isfinite(features).all():
    raise ValueError("features must be finite, got NaN or infinity")
  features = np.unique(features, axis=0)
  if len(features) < 3:
    raise ValueError(f"features must hold at least 3 different rows, got {len(features)}")
  return features


def _variances(features: np.ndarray) -> np.ndarray:
  """Shares of the variance of the principal axes, descending, without those that are rounding alone."""
  centred = features - features.mean(axis=0)
  n, width = centred.shape
  squares = np.linalg.eigvalsh(centred.T @ centred if width <= n else centred @ centred.T)[::-1]
  squares = squares[squares > squares[0] * 1e-12]
  return squares / squares.sum()


def _two_nearest(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Distances [N] to the nearest and the second nearest of the other rows."""
  centred = features - features.mean(axis=0)
  norms = np.square(centred).sum(axis=1)
  n, k = len(centred), min(_CANDIDATES, len(centred) - 1)
  nearest = np.empty((n, 2))
  for start in range(0, n, _BLOCK):
    rows = centred[start : start + _BLOCK]
    squares = norms - 2 * rows @ centred.T  # up to a constant of the row
    squares[np.arange(len(rows)), np.arange(start, start + len(rows))] = np.inf
    candidates = np.argpartition(squares, k - 1, axis=1)[:, :k]
    # Expanding the square loses the digits of a small distance: candidates are measured by the difference.
    exact = np.linalg.norm(rows[:, None] - centred[candidates], axis=2)
    nearest[start : start + _BLOCK] = np.partition(exact, 1, axis=1)[:, :2]
  return nearest[:, 0], nearest[:, 1]
