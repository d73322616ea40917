"""How many dimensions a set of vectors really fills: two neighbours' distances, and principal components.

Axes: N points, D width. float64 inside.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def intrinsic_dimension(features: np.ndarray) -> dict[str, Any]:
  """All measures of `features` [N, D]; equal rows count once.

  Returns:
    points: distinct vectors measured; width: D; two_nn: see there, None if infinite; participation_ratio:
    (sum of variances)^2 / sum of squared variances over the principal axes, from 1 to min(N - 1, D); pca_90,
    pca_95, pca_99: axes that hold 90, 95, 99% of the variance; variance: the share that the first 1, 2, ...
    axes hold, up to 99.9%.

  Raises:
    ValueError: not a matrix of finite numbers, or fewer than 3 different rows.
  """
  features = _distinct(features)
  centred = features - features.mean(axis=0)
  n, width = centred.shape
  squares = np.linalg.eigvalsh(centred.T @ centred if width <= n else centred @ centred.T)[::-1]
  squares = squares[squares > squares[0] * 1e-12]  # the others are rounding alone
  shares = squares / squares.sum()
  cumulative = np.cumsum(shares)
  axes = {share: int(np.searchsorted(cumulative, share - 1e-12) + 1) for share in (0.90, 0.95, 0.99, 0.999)}
  estimate = _slope(features, 0.1)
  return {
    "points": n,
    "width": width,
    "two_nn": estimate if np.isfinite(estimate) else None,
    "participation_ratio": float(1 / np.square(shares).sum()),
    "pca_90": axes[0.90],
    "pca_95": axes[0.95],
    "pca_99": axes[0.99],
    "variance": [round(float(v), 6) for v in cumulative[: axes[0.999]]],
  }


def two_nn(features: np.ndarray, discard: float = 0.1) -> float:
  """The TwoNN estimate of the intrinsic dimension of `features` [N, D]; equal rows count once.

  The ratio m of the distances to a point's second and first neighbour has the distribution 1 - m^-d where the
  density is level around it, so d is the slope of -log(1 - F) over log m, a line through the origin.
  `discard`: share of the largest ratios left out, where noise and edges show (the paper's 10%). Within some
  5% up to about 10 dimensions at N = 2000; it falls short of higher ones, for which no data set is large
  enough.

  Source: Facco, d'Errico, Rodriguez, Laio, "Estimating the intrinsic dimension of datasets by a minimal
  neighborhood information", Scientific Reports 7 (2017). Raises ValueError as `intrinsic_dimension`.
  """
  return _slope(_distinct(features), discard)


def _slope(features: np.ndarray, discard: float) -> float:
  from scipy.spatial.distance import cdist

  blocks = (features[i : i + 1024] for i in range(0, len(features), 1024))  # 1024 rows of distances at once
  nearest = np.concatenate([np.partition(cdist(block, features), (1, 2), axis=1)[:, 1:3] for block in blocks])
  first, second = nearest.T  # the very nearest is the point itself
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
